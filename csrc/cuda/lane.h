// What a kernel sees of the machine: its place in the grid, its shared memory, and what the 32 lanes of a warp do together. Compiled by
// nvcc for a device, and by any C++ compiler for a machine that is emulated (emulation.h): the kernels are the same source.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../inline.h"
#if defined(__CUDACC__)
#define NGK_DEVICE __device__ __forceinline__
#define NGK_SELDOM inline __device__ __noinline__  // inlined where it is not run, its code costs registers all the same
#define NGK_UNROLL _Pragma("unroll")
#define NGK_ROLLED _Pragma("unroll 1")
#define NGK_PRAGMA(x) _Pragma(#x)
#define NGK_UNROLL_IF(x) NGK_PRAGMA(unroll(x) ? 8 : 1)
#else
#define NGK_DEVICE inline
#define NGK_SELDOM inline
#define NGK_UNROLL
#define NGK_ROLLED
#define NGK_UNROLL_IF(x)
#include "emulation.h"
#endif

namespace ngk::cuda {

constexpr int LANES = 32;

#if defined(__CUDACC__)
NGK_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
NGK_DEVICE int64_t block() { return blockIdx.x; }
NGK_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}
NGK_DEVICE void sync_block() { __syncthreads(); }
NGK_DEVICE void sync_warp() { __syncwarp(); }
NGK_DEVICE int lowest_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }
NGK_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// d += a b: a 16 x 16 (bf16) or 16 x 8 (tf32), b with 8 columns, as mma.sync lays them out over the lanes.
NGK_DEVICE void mma_bf16(float* d, const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
NGK_DEVICE void mma_tf32(float* d, const float* a, const float* b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
// Four 8 x 8 matrices of 16-bit numbers, transposed; lane 8 m + r names row r of matrix m in shared memory.
NGK_DEVICE void load_transposed(uint32_t* r, const uint16_t* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
// A copy to shared memory that goes on beside the lane's work: 16 bytes, all but the first `bytes` of them zero. `once`: what it reads is
// not kept in the L1 cache for others.
NGK_DEVICE void copy_async16(char* to, const char* from, int bytes, bool once) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if (once) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(__cvta_generic_to_global(from)), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(__cvta_generic_to_global(from)), "r"(bytes) : "memory");
  }
}
// Ends a group of copies of this lane; waits until no more than the last `N` groups are on their way.
NGK_DEVICE void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
NGK_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
NGK_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
NGK_DEVICE float to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return __uint_as_float(r);
}
#endif

NGK_DEVICE int lane() { return thread() % LANES; }
NGK_DEVICE int warp() { return thread() / LANES; }

struct alignas(16) Four {
  float v[4];
};
struct alignas(8) Two {
  float v[2];
};
NGK_DEVICE Four load4(const float* p) { return *reinterpret_cast<const Four*>(p); }
NGK_DEVICE void store4(float* p, Four x) { *reinterpret_cast<Four*>(p) = x; }

// The number of one lane, as edge_math.h wants its vectors.
struct Number {
  using T = float;
  using R = float;
  static constexpr int W = 1;
  NGK_INLINE float zero() { return 0; }
  NGK_INLINE float set1(float a) { return a; }
  NGK_INLINE float load(const float* p) { return *p; }
  NGK_INLINE void store(float* p, float a) { *p = a; }
  NGK_INLINE float add(float a, float b) { return a + b; }
  NGK_INLINE float sub(float a, float b) { return a - b; }
  NGK_INLINE float mul(float a, float b) { return a * b; }
  NGK_INLINE float fma(float a, float b, float c) { return fmaf(a, b, c); }
  NGK_INLINE float lower(float a, float b) { return b < a ? b : a; }  // a where either is NaN
  NGK_INLINE float upper(float a, float b) { return b > a ? b : a; }
  NGK_INLINE float rint(float a) { return rintf(a); }
  NGK_INLINE float floor(float a) { return floorf(a); }
  NGK_INLINE float if_le(float a, float b, float x, float y) { return a <= b ? x : y; }
  NGK_INLINE float if_eq(float a, float b, float x, float y) { return a == b ? x : y; }
  NGK_INLINE float if_lt(float a, float b, float x, float y) { return a < b ? x : y; }
#if defined(__CUDA_ARCH__)
  NGK_INLINE float exp(float a) { return __expf(a); }
  NGK_INLINE float recip(float a) { return __fdividef(1.0f, a); }
#else
  NGK_INLINE float exp(float a) { return expf(a); }
  NGK_INLINE float recip(float a) { return 1.0f / a; }
#endif
};

}  // namespace ngk::cuda
