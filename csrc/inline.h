// How small functions are declared that every compiler of csrc/ takes in: those of CPU kernels, and nvcc for a device too.
#pragma once

#if defined(__CUDACC__)
#define NGK_INLINE __host__ __device__ __forceinline__ static
#define NGK_INLINE_MEMBER __host__ __device__ __forceinline__
#define NGK_APART NGK_INLINE  // calls cost more there
#else
#define NGK_INLINE __attribute__((always_inline)) static inline
#define NGK_INLINE_MEMBER __attribute__((always_inline)) inline
#define NGK_APART __attribute__((noinline))
#endif
