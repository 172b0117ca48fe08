// Numbers as tensors hold them.
#pragma once

#include <cstdint>
#include <cstring>

#include "edge_program.h"
#include "inline.h"
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace ngk {

NGK_INLINE uint16_t to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 64);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
NGK_INLINE float from_bf16(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

#if defined(__CUDACC__)
using Half = __half;
#else
using Half = _Float16;
#endif
NGK_INLINE float from_f16(uint16_t h) {
  Half f;
  std::memcpy(&f, &h, 2);
  return static_cast<float>(f);
}
NGK_INLINE uint16_t to_f16(float f) {
  const Half half = static_cast<Half>(f);
  uint16_t h;
  std::memcpy(&h, &half, 2);
  return h;
}

// A number at an address that is a multiple of its size.
template <class X>
NGK_INLINE X number_at(const char* p) {
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const X*>(p);  // what memcpy does byte by byte there
#else
  X x;
  std::memcpy(&x, p, sizeof(X));
  return x;
#endif
}
template <class X>
NGK_INLINE void put_number(char* p, X x) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<X*>(p) = x;
#else
  std::memcpy(p, &x, sizeof(X));
#endif
}

NGK_INLINE int dtype_size(Dtype d) { return d == F64 ? 8 : d == F32 ? 4 : 2; }

template <class T>
NGK_INLINE T read_value(const char* p, Dtype dtype) {
  if (dtype == F32) return static_cast<T>(number_at<float>(p));
  if (dtype == F64) return static_cast<T>(number_at<double>(p));
  const uint16_t h = number_at<uint16_t>(p);
  return static_cast<T>(dtype == BF16 ? from_bf16(h) : from_f16(h));
}
template <class T>
NGK_INLINE void write_value(char* p, Dtype dtype, T x) {
  const float f = static_cast<float>(x);
  if (dtype == F32) {
    put_number(p, f);
  } else if (dtype == F64) {
    put_number(p, static_cast<double>(x));
  } else {
    put_number(p, dtype == BF16 ? to_bf16(f) : to_f16(f));
  }
}

}  // namespace ngk
