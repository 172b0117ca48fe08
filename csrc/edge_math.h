// Per-edge maths on vectors: activations with their derivatives, Fourier features, the tabulated curve. V is one of the classes of
// cpu/vec.h, or the number of one lane of a GPU (cuda/lane.h).
#pragma once

#include <cmath>

#include "edge_program.h"
#include "inline.h"

namespace ngk {

template <class V>
NGK_INLINE typename V::R sigmoid(typename V::R z) {
  using T = typename V::T;
  const T cap = sizeof(T) == 4 ? T(87) : T(700);
  const typename V::R e = V::exp(V::lower(V::upper(V::sub(V::zero(), z), V::set1(-cap)), V::set1(cap)));
  return V::recip(V::add(V::set1(T(1)), e));
}

template <class T>
NGK_INLINE void act_scalar(int kind, T z, T* h, T* d) {
  switch (kind) {
    case GELU: {
      const T phi = T(0.5) * (T(1) + std::erf(z * T(0.70710678118654752440)));
      *h = z * phi;
      *d = phi + z * T(0.39894228040143267794) * std::exp(T(-0.5) * z * z);
      break;
    }
    case TANH:
      *h = std::tanh(z);
      *d = T(1) - *h * *h;
      break;
    case LEAKY_RELU:
      *h = z > 0 ? z : z * T(LEAKY_SLOPE);
      *d = z > 0 ? T(1) : T(LEAKY_SLOPE);
      break;
    default:
      *h = z;
      *d = T(1);
  }
}

// gelu = z Phi(z) with derivative Phi(z) + z phi(z). Phi from erfc(|z| / sqrt 2) = exp(-z^2 / 2) t P(t), t = 1 / (1 + p |z|): the
// polynomial is a weighted least-squares fit, absolute error of Phi 3e-9, relative error of its tail 4e-6.
template <class V>
NGK_INLINE void gelu(typename V::R z, typename V::R* h, typename V::R* d) {
  using T = typename V::T;
  using R = typename V::R;
  constexpr double P[8] = {0.31060257599880314, 0.3045873426399233,  0.3083392156077877,  -0.02022740038758009,
                           0.5153611091793976,  -0.7066168153937421, 0.35302391919082055, -0.06506994334254164};
  const R one = V::set1(T(1)), square = V::mul(z, z);
  const R bell = V::exp(V::upper(V::mul(square, V::set1(T(-0.5))), V::set1(T(-87))));
  const R t = V::recip(V::fma(V::upper(z, V::sub(V::zero(), z)), V::set1(T(0.55 * 0.70710678118654752440)), one));
  R q = V::set1(T(0.5 * P[7]));
  for (int k = 6; k >= 0; --k) q = V::fma(q, t, V::set1(T(0.5 * P[k])));
  q = V::mul(V::mul(q, t), bell);
  const R phi = V::if_lt(z, V::zero(), q, V::sub(one, q));
  *h = V::mul(z, phi);
  *d = V::fma(V::mul(z, bell), V::set1(T(0.39894228040143267794)), phi);
}

// h = act(z) and its derivative d, of these three.
template <class V>
NGK_INLINE void silu(typename V::R z, typename V::R* h, typename V::R* d) {
  const typename V::R s = sigmoid<V>(z), y = V::mul(z, s);
  *h = y;
  *d = V::fma(y, V::sub(V::set1(typename V::T(1)), s), s);
}
template <class V>
NGK_INLINE void relu(typename V::R z, typename V::R* h, typename V::R* d) {
  *h = V::upper(z, V::zero());
  *d = V::if_lt(V::zero(), z, V::set1(typename V::T(1)), V::zero());
}
template <class V>
NGK_INLINE void logistic(typename V::R z, typename V::R* h, typename V::R* d) {
  const typename V::R s = sigmoid<V>(z);
  *h = s;
  *d = V::mul(s, V::sub(V::set1(typename V::T(1)), s));
}

// The same over n values; with GRAD, d too (which may be z itself).
template <class V, bool GRAD, class F>
NGK_INLINE void activate_all(const typename V::T* z, typename V::T* h, typename V::T* d, int64_t n, F&& f) {
  for (int64_t k = 0; k < n; k += V::W) {
    typename V::R y, slope;
    f(V::load(z + k), &y, &slope);
    V::store(h + k, y);
    if (GRAD) V::store(d + k, slope);
  }
}

// h = act(z) over n values; with d, also the derivative there (d may be z itself).
template <class V, bool GRAD>
NGK_APART void activate(int kind, const typename V::T* z, typename V::T* h, typename V::T* d, int64_t n) {
  using T = typename V::T;
  using R = typename V::R;
  switch (kind) {
    case SILU:
      return activate_all<V, GRAD>(z, h, d, n, [](R x, R* y, R* slope) { silu<V>(x, y, slope); });
    case RELU:
      return activate_all<V, GRAD>(z, h, d, n, [](R x, R* y, R* slope) { relu<V>(x, y, slope); });
    case SIGMOID:
      return activate_all<V, GRAD>(z, h, d, n, [](R x, R* y, R* slope) { logistic<V>(x, y, slope); });
    case GELU:
      if constexpr (sizeof(T) == 4) {
        activate_all<V, GRAD>(z, h, d, n, [](R x, R* y, R* slope) { gelu<V>(x, y, slope); });
        return;
      }
      [[fallthrough]];
    default:
      for (int64_t k = 0; k < n; ++k) {
        T hk, dk;
        act_scalar<T>(kind, z[k], &hk, &dk);
        h[k] = hk;
        if (GRAD) d[k] = dk;
      }
  }
}

// cos and sin of 2 pi (t + rest), in turns: whole and half turns are taken off exactly (of `rest` too: it is large where
// t is), then Taylor on [-pi/2, pi/2] (1e-7 in float).
template <class V>
NGK_INLINE void cos_sin_turns(typename V::R t, typename V::R rest, typename V::R* c, typename V::R* s) {
  using T = typename V::T;
  using R = typename V::R;
  const R whole = V::add(V::sub(t, V::rint(t)), V::sub(rest, V::rint(rest)));
  if constexpr (sizeof(T) == 8) {
    T a[V::W], b[V::W], x[V::W];
    V::store(x, whole);
    for (int k = 0; k < V::W; ++k) {
      a[k] = std::cos(T(6.283185307179586476925) * x[k]);
      b[k] = std::sin(T(6.283185307179586476925) * x[k]);
    }
    *c = V::load(a);
    *s = V::load(b);
    return;
  }
  const R half = V::rint(V::add(whole, whole));
  const R turns = V::fma(half, V::set1(T(-0.5)), whole);
  const R odd = V::sub(half, V::mul(V::set1(T(2)), V::rint(V::mul(half, V::set1(T(0.5))))));  // odd: -1 or 1
  const R sign = V::fma(V::mul(odd, odd), V::set1(T(-2)), V::set1(T(1)));
  const R x = V::mul(turns, V::set1(T(6.283185307179586))), y = V::mul(x, x);
  R p = V::set1(T(-2.5052108385441720e-8));
  p = V::fma(p, y, V::set1(T(2.7557319223985893e-6)));
  p = V::fma(p, y, V::set1(T(-1.9841269841269841e-4)));
  p = V::fma(p, y, V::set1(T(8.3333333333333333e-3)));
  p = V::fma(p, y, V::set1(T(-1.6666666666666667e-1)));
  *s = V::mul(sign, V::fma(V::mul(p, y), x, x));
  R q = V::set1(T(2.0876756987868099e-9));
  q = V::fma(q, y, V::set1(T(-2.7557319223985888e-7)));
  q = V::fma(q, y, V::set1(T(2.4801587301587302e-5)));
  q = V::fma(q, y, V::set1(T(-1.3888888888888889e-3)));
  q = V::fma(q, y, V::set1(T(4.1666666666666667e-2)));
  q = V::fma(q, y, V::set1(T(-0.5)));
  *c = V::mul(sign, V::fma(q, y, V::set1(T(1))));
}

// out = [cos(2 pi b w) (m) | sin(2 pi b w) (m)], b [m, C], w [C].
template <class V>
NGK_INLINE void fourier_row(const typename V::T* b, int m, int C, const typename V::T* w, typename V::T* out) {
  using T = typename V::T;
  using R = typename V::R;
  for (int k = 0; k < m; k += V::W) {
    T lane[V::W], more[V::W], cv[V::W], sv[V::W];
    const int n = m - k < V::W ? m - k : V::W;
    for (int l = 0; l < V::W; ++l) {
      T t = 0, rest = 0;
      if (l < n) {
        const T* bl = b + static_cast<int64_t>(k + l) * C;
        if (C == 1) {
          t = bl[0] * w[0];
          rest = std::fma(bl[0], w[0], -t);  // the product's rounding error, put back after the turns are off
        } else {
          for (int c = 0; c < C; ++c) t += bl[c] * w[c];
        }
      }
      lane[l] = t;
      more[l] = rest;
    }
    R c, s;
    cos_sin_turns<V>(V::load(lane), V::load(more), &c, &s);
    V::store(cv, c);
    V::store(sv, s);
    for (int l = 0; l < n; ++l) {
      out[k + l] = cv[l];
      out[m + k + l] = sv[l];
    }
  }
}

// Of dropout: a weight of attention is dropped where this is below the rate x 2^32. ngkernels/reference/attend.py has the same.
NGK_INLINE uint32_t dropout_hash(int64_t i, int64_t j, int head, int64_t seed) {
  const uint32_t more = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  uint32_t x = static_cast<uint32_t>(i) * 0x9E3779B1u + static_cast<uint32_t>(j) * 0x85EBCA77u + static_cast<uint32_t>(head) * 0xC2B2AE3Du +
               static_cast<uint32_t>(seed);
  x = (x ^ (x >> 16)) * 0x7FEB352Du + more;
  x = (x ^ (x >> 15)) * 0x846CA68Bu + more;
  return x ^ (x >> 16);
}

// Cells of a tile's weights in the table, and the quintic Hermite weights of (value, slope, curvature) at the cell's two
// ends with their derivatives: cell [n] (-1: beyond the table, NaN too), c and d [6][stride]; n is rounded up to W.
template <class V>
NGK_APART void hermite_cells(const typename V::T* value, int n, typename V::T steps, int64_t half, typename V::T* cell, typename V::T* c,
                             typename V::T* d, int stride) {
  using T = typename V::T;
  using R = typename V::R;
  const R one = V::set1(T(1)), three = V::set1(T(3)), six = V::set1(T(6)), lo = V::set1(T(-half)), hi = V::set1(T(half)), zero = V::zero();
  const R half_ = V::set1(T(0.5)), thirty = V::set1(T(30)), minus = V::set1(T(-1));
  for (int r = 0; r < n; r += V::W) {
    const R raw = V::mul(V::load(value + r), V::set1(steps));
    const R inside = V::if_le(lo, raw, V::if_lt(raw, hi, one, zero), zero);
    const R at = V::if_eq(inside, one, raw, zero), low = V::floor(at), u = V::sub(at, low), v = V::sub(one, u);
    V::store(cell + r, V::if_eq(inside, one, V::add(low, hi), minus));
    const R u2 = V::mul(u, u), v2 = V::mul(v, v), u3 = V::mul(u2, u), v3 = V::mul(v2, v), uv = V::mul(u, v), uv2 = V::mul(uv, uv);
    const auto value_weight = [&](R a, R a2) { return V::fma(six, a2, V::fma(three, a, one)); };  // 1 + 3 a + 6 a^2
    V::store(c + r, V::mul(v3, value_weight(u, u2)));
    V::store(c + stride + r, V::mul(V::mul(v3, u), V::fma(three, u, one)));
    V::store(c + 2 * stride + r, V::mul(half_, V::mul(v3, u2)));
    V::store(c + 3 * stride + r, V::mul(u3, value_weight(v, v2)));
    V::store(c + 4 * stride + r, V::sub(zero, V::mul(V::mul(u3, v), V::fma(three, v, one))));
    V::store(c + 5 * stride + r, V::mul(half_, V::mul(u3, v2)));
    // d/du: -30 u^2 v^2;  v^2 (1 + 2 u - 15 u^2);  u v^2 (2 - 5 u) / 2; and with u and v exchanged
    const R bend = V::mul(thirty, uv2), fifteen = V::set1(T(15)), two = V::set1(T(2)), five = V::set1(T(5));
    const auto slope_weight = [&](R a, R a2, R b2) { return V::mul(b2, V::sub(V::fma(two, a, one), V::mul(fifteen, a2))); };
    const auto bend_weight = [&](R a, R b2) { return V::mul(V::mul(half_, V::mul(a, b2)), V::sub(two, V::mul(five, a))); };
    V::store(d + r, V::sub(zero, bend));
    V::store(d + stride + r, slope_weight(u, u2, v2));
    V::store(d + 2 * stride + r, bend_weight(u, v2));
    V::store(d + 3 * stride + r, bend);
    V::store(d + 4 * stride + r, slope_weight(v, v2, u2));
    V::store(d + 5 * stride + r, V::sub(zero, bend_weight(v, u2)));
  }
}

}  // namespace ngk
