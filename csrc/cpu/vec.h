// Vector types, one class for each instruction set and value type: the only place with intrinsics.
// Every class has T, R (register), W (lanes), MR (rows of a GEMM block) and the functions of Scalar<T>.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../inline.h"

namespace ngk {

// 2^f on [-1/2, 1/2], relative error 7.5e-8 (minimax).
constexpr float EXP2_C[6] = {1.000000071654682f,    0.693146967064733f,   0.24022119723848634f,
                             0.055507132735430245f, 0.00967554133421011f, 0.0013276471979301512f};

template <class Value>
struct Scalar {
  using T = Value;
  using R = Value;
  static constexpr int W = 1, MR = 4;
  static constexpr bool BF16 = false;
  NGK_INLINE R zero() { return 0; }
  NGK_INLINE R set1(T a) { return a; }
  NGK_INLINE R load(const T* p) { return *p; }
  NGK_INLINE void store(T* p, R a) { *p = a; }
  NGK_INLINE R add(R a, R b) { return a + b; }
  NGK_INLINE R sub(R a, R b) { return a - b; }
  NGK_INLINE R mul(R a, R b) { return a * b; }
  NGK_INLINE R div(R a, R b) { return a / b; }
  NGK_INLINE R fma(R a, R b, R c) { return a * b + c; }  // one rounding or two: the same on every path of one library
  NGK_INLINE R fms(R a, R b, R c) { return a * b - c; }
  NGK_INLINE R lower(R a, R b) { return b < a ? b : a; }  // a where either is NaN
  NGK_INLINE R upper(R a, R b) { return b > a ? b : a; }
  NGK_INLINE R rint(R a) { return std::nearbyint(a); }
  NGK_INLINE R floor(R a) { return std::floor(a); }
  NGK_INLINE R if_le(R a, R b, R x, R y) { return a <= b ? x : y; }
  NGK_INLINE R if_eq(R a, R b, R x, R y) { return a == b ? x : y; }
  NGK_INLINE R if_lt(R a, R b, R x, R y) { return a < b ? x : y; }
  NGK_INLINE T sum(R a) { return a; }
  NGK_INLINE R exp(R a) { return std::exp(a); }
  NGK_INLINE R recip(R a) { return T(1) / a; }
};

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
struct Avx2F {
  using T = float;
  using R = __m256;
  static constexpr int W = 8, MR = 6;
  static constexpr bool BF16 = false;
  NGK_INLINE R zero() { return _mm256_setzero_ps(); }
  NGK_INLINE R set1(T a) { return _mm256_set1_ps(a); }
  NGK_INLINE R load(const T* p) { return _mm256_loadu_ps(p); }
  NGK_INLINE void store(T* p, R a) { _mm256_storeu_ps(p, a); }
  NGK_INLINE R add(R a, R b) { return _mm256_add_ps(a, b); }
  NGK_INLINE R sub(R a, R b) { return _mm256_sub_ps(a, b); }
  NGK_INLINE R mul(R a, R b) { return _mm256_mul_ps(a, b); }
  NGK_INLINE R div(R a, R b) { return _mm256_div_ps(a, b); }
  NGK_INLINE R fma(R a, R b, R c) { return _mm256_fmadd_ps(a, b, c); }
  NGK_INLINE R fms(R a, R b, R c) { return _mm256_fmsub_ps(a, b, c); }
  NGK_INLINE R lower(R a, R b) { return _mm256_min_ps(b, a); }  // the second operand where either is NaN
  NGK_INLINE R upper(R a, R b) { return _mm256_max_ps(b, a); }
  NGK_INLINE R rint(R a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  NGK_INLINE R floor(R a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  NGK_INLINE R if_le(R a, R b, R x, R y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
  NGK_INLINE R if_eq(R a, R b, R x, R y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
  NGK_INLINE R if_lt(R a, R b, R x, R y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  NGK_INLINE T sum(R a) {
    T t[8];
    store(t, a);
    return ((t[0] + t[4]) + (t[1] + t[5])) + ((t[2] + t[6]) + (t[3] + t[7]));
  }
  NGK_INLINE R exp(R a) {  // |a| <= 88
    const R x = mul(a, set1(1.44269504088896341f)), n = rint(x);
    const R f = fma(n, set1(-0.693145751953125f), a), g = mul(fma(n, set1(-1.42860682030941723e-6f), f), set1(1.44269504088896341f));
    R p = set1(EXP2_C[5]);
    for (int k = 4; k >= 0; --k) p = fma(p, g, set1(EXP2_C[k]));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
  }
  NGK_INLINE R recip(R a) { return div(set1(1.f), a); }
};
struct Avx2D {
  using T = double;
  using R = __m256d;
  static constexpr int W = 4, MR = 6;
  static constexpr bool BF16 = false;
  NGK_INLINE R zero() { return _mm256_setzero_pd(); }
  NGK_INLINE R set1(T a) { return _mm256_set1_pd(a); }
  NGK_INLINE R load(const T* p) { return _mm256_loadu_pd(p); }
  NGK_INLINE void store(T* p, R a) { _mm256_storeu_pd(p, a); }
  NGK_INLINE R add(R a, R b) { return _mm256_add_pd(a, b); }
  NGK_INLINE R sub(R a, R b) { return _mm256_sub_pd(a, b); }
  NGK_INLINE R mul(R a, R b) { return _mm256_mul_pd(a, b); }
  NGK_INLINE R div(R a, R b) { return _mm256_div_pd(a, b); }
  NGK_INLINE R fma(R a, R b, R c) { return _mm256_fmadd_pd(a, b, c); }
  NGK_INLINE R fms(R a, R b, R c) { return _mm256_fmsub_pd(a, b, c); }
  NGK_INLINE R lower(R a, R b) { return _mm256_min_pd(b, a); }
  NGK_INLINE R upper(R a, R b) { return _mm256_max_pd(b, a); }
  NGK_INLINE R rint(R a) { return _mm256_round_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  NGK_INLINE R floor(R a) { return _mm256_round_pd(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  NGK_INLINE R if_le(R a, R b, R x, R y) { return _mm256_blendv_pd(y, x, _mm256_cmp_pd(a, b, _CMP_LE_OQ)); }
  NGK_INLINE R if_eq(R a, R b, R x, R y) { return _mm256_blendv_pd(y, x, _mm256_cmp_pd(a, b, _CMP_EQ_OQ)); }
  NGK_INLINE R if_lt(R a, R b, R x, R y) { return _mm256_blendv_pd(y, x, _mm256_cmp_pd(a, b, _CMP_LT_OQ)); }
  NGK_INLINE T sum(R a) {
    T t[4];
    store(t, a);
    return (t[0] + t[2]) + (t[1] + t[3]);
  }
  NGK_INLINE R exp(R a) {
    T t[4];
    store(t, a);
    for (T& v : t) v = std::exp(v);
    return load(t);
  }
  NGK_INLINE R recip(R a) { return div(set1(1.), a); }
};
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
struct Avx512F {
  using T = float;
  using R = __m512;
  static constexpr int W = 16, MR = 12;
  static constexpr bool BF16 = false;
  NGK_INLINE R zero() { return _mm512_setzero_ps(); }
  NGK_INLINE R set1(T a) { return _mm512_set1_ps(a); }
  NGK_INLINE R load(const T* p) { return _mm512_loadu_ps(p); }
  NGK_INLINE void store(T* p, R a) { _mm512_storeu_ps(p, a); }
  NGK_INLINE R add(R a, R b) { return _mm512_add_ps(a, b); }
  NGK_INLINE R sub(R a, R b) { return _mm512_sub_ps(a, b); }
  NGK_INLINE R mul(R a, R b) { return _mm512_mul_ps(a, b); }
  NGK_INLINE R div(R a, R b) { return _mm512_div_ps(a, b); }
  NGK_INLINE R fma(R a, R b, R c) { return _mm512_fmadd_ps(a, b, c); }
  NGK_INLINE R fms(R a, R b, R c) { return _mm512_fmsub_ps(a, b, c); }
  NGK_INLINE R lower(R a, R b) { return _mm512_min_ps(b, a); }
  NGK_INLINE R upper(R a, R b) { return _mm512_max_ps(b, a); }
  NGK_INLINE R rint(R a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  NGK_INLINE R floor(R a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  NGK_INLINE R if_le(R a, R b, R x, R y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), y, x); }
  NGK_INLINE R if_eq(R a, R b, R x, R y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), y, x); }
  NGK_INLINE R if_lt(R a, R b, R x, R y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x); }
  NGK_INLINE T sum(R a) { return _mm512_reduce_add_ps(a); }
  NGK_INLINE R exp(R a) {
    const R x = mul(a, set1(1.44269504088896341f)), n = rint(x);
    // the rounding error of x (|x| up to 127) is put back: relative error of the result below 2e-7
    const R g = fma(a, set1(1.92596299112661746e-8f), fms(a, set1(1.44269502162933350f), n));
    R p = set1(EXP2_C[5]);
    for (int k = 4; k >= 0; --k) p = fma(p, g, set1(EXP2_C[k]));
    return _mm512_scalef_ps(p, n);
  }
  NGK_INLINE R recip(R a) {
    const R r = _mm512_rcp14_ps(a);
    return fma(r, _mm512_fnmadd_ps(a, r, set1(1.f)), r);
  }
};
struct Avx512D {
  using T = double;
  using R = __m512d;
  static constexpr int W = 8, MR = 12;
  static constexpr bool BF16 = false;
  NGK_INLINE R zero() { return _mm512_setzero_pd(); }
  NGK_INLINE R set1(T a) { return _mm512_set1_pd(a); }
  NGK_INLINE R load(const T* p) { return _mm512_loadu_pd(p); }
  NGK_INLINE void store(T* p, R a) { _mm512_storeu_pd(p, a); }
  NGK_INLINE R add(R a, R b) { return _mm512_add_pd(a, b); }
  NGK_INLINE R sub(R a, R b) { return _mm512_sub_pd(a, b); }
  NGK_INLINE R mul(R a, R b) { return _mm512_mul_pd(a, b); }
  NGK_INLINE R div(R a, R b) { return _mm512_div_pd(a, b); }
  NGK_INLINE R fma(R a, R b, R c) { return _mm512_fmadd_pd(a, b, c); }
  NGK_INLINE R fms(R a, R b, R c) { return _mm512_fmsub_pd(a, b, c); }
  NGK_INLINE R lower(R a, R b) { return _mm512_min_pd(b, a); }
  NGK_INLINE R upper(R a, R b) { return _mm512_max_pd(b, a); }
  NGK_INLINE R rint(R a) { return _mm512_roundscale_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  NGK_INLINE R floor(R a) { return _mm512_roundscale_pd(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  NGK_INLINE R if_le(R a, R b, R x, R y) { return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_LE_OQ), y, x); }
  NGK_INLINE R if_eq(R a, R b, R x, R y) { return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ), y, x); }
  NGK_INLINE R if_lt(R a, R b, R x, R y) { return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_LT_OQ), y, x); }
  NGK_INLINE T sum(R a) { return _mm512_reduce_add_pd(a); }
  NGK_INLINE R exp(R a) {
    T t[8];
    store(t, a);
    for (T& v : t) v = std::exp(v);
    return load(t);
  }
  NGK_INLINE R recip(R a) { return div(set1(1.), a); }
};
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
// Matrix products with bf16 operands and float32 accumulation; everything else as Avx512F.
struct Avx512BF16 : Avx512F {
  static constexpr bool BF16 = true;
  // W values to bf16, side by side: W / 2 pairs.
  NGK_INLINE void pack(const float* p, uint32_t* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(p)));
  }
  NGK_INLINE R dot(R acc, uint32_t a, const uint32_t* b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)_mm512_loadu_si512(b));
  }
};
#pragma GCC pop_options
#endif

}  // namespace ngk
