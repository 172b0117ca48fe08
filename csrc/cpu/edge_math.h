// Per-edge maths on vectors: activations with their derivatives, Fourier features, the tabulated curve.
#pragma once

#include "vec.h"
#include "../edge_program.h"

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

// h = act(z) over n values; with d, also the derivative there (d may be z itself).
template <class V, bool GRAD>
__attribute__((noinline)) void activate(int kind, const typename V::T* z, typename V::T* h, typename V::T* d, int64_t n) {
  using T = typename V::T;
  using R = typename V::R;
  const R one = V::set1(T(1));
  switch (kind) {
    case SILU:
      for (int64_t k = 0; k < n; k += V::W) {
        const R x = V::load(z + k), s = sigmoid<V>(x), y = V::mul(x, s);
        V::store(h + k, y);
        if (GRAD) V::store(d + k, V::fma(y, V::sub(one, s), s));
      }
      return;
    case RELU:
      for (int64_t k = 0; k < n; k += V::W) {
        const R x = V::load(z + k);
        V::store(h + k, V::upper(x, V::zero()));
        if (GRAD) V::store(d + k, V::if_lt(V::zero(), x, one, V::zero()));
      }
      return;
    case SIGMOID:
      for (int64_t k = 0; k < n; k += V::W) {
        const R s = sigmoid<V>(V::load(z + k));
        V::store(h + k, s);
        if (GRAD) V::store(d + k, V::mul(s, V::sub(one, s)));
      }
      return;
    default:
      for (int64_t k = 0; k < n; ++k) {
        T hk, dk;
        act_scalar<T>(kind, z[k], &hk, &dk);
        h[k] = hk;
        if (GRAD) d[k] = dk;
      }
  }
}

// cos and sin of 2 pi t, t in turns: half turns are taken off exactly, then Taylor on [-pi/2, pi/2] (1e-7 in float).
template <class V>
NGK_INLINE void cos_sin_turns(typename V::R t, typename V::R rest, typename V::R* c, typename V::R* s) {
  using T = typename V::T;
  using R = typename V::R;
  if constexpr (sizeof(T) == 8) {
    T a[V::W], b[V::W], x[V::W];
    V::store(x, V::add(V::sub(t, V::rint(t)), rest));
    for (int k = 0; k < V::W; ++k) {
      a[k] = std::cos(T(6.283185307179586476925) * x[k]);
      b[k] = std::sin(T(6.283185307179586476925) * x[k]);
    }
    *c = V::load(a);
    *s = V::load(b);
    return;
  }
  const R half = V::rint(V::add(t, t));
  const R turns = V::add(V::fma(half, V::set1(T(-0.5)), t), rest);
  const R odd = V::sub(half, V::mul(V::set1(T(2)), V::rint(V::mul(half, V::set1(T(0.5))))));  // -1, 0 or 1
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

// Cells of a tile's weights in the table, and the cubic Hermite weights of (value, slope) at the cell's two ends with
// their derivatives: index [n] (-1: beyond the table, NaN too), c and d [4][n].
template <class V>
__attribute__((noinline)) void hermite_cells(const typename V::T* value, int n, typename V::T steps, int64_t half, int32_t* index, typename V::T* c, typename V::T* d, int stride) {
  using T = typename V::T;
  for (int r = 0; r < n; ++r) {
    const T at = value[r] * steps;
    const bool inside = at >= T(-half) && at < T(half);
    const T low = std::floor(inside ? at : T(0)), u = (inside ? at : T(0)) - low, v = T(1) - u;
    index[r] = inside ? static_cast<int32_t>(low) + static_cast<int32_t>(half) : -1;
    c[r] = (T(1) + T(2) * u) * v * v;
    c[stride + r] = u * v * v;
    c[2 * stride + r] = u * u * (T(3) - T(2) * u);
    c[3 * stride + r] = -u * u * v;
    d[r] = T(-6) * u * v;
    d[stride + r] = v * (T(1) - T(3) * u);
    d[2 * stride + r] = T(6) * u * v;
    d[3 * stride + r] = u * (T(3) * u - T(2));
  }
}

}  // namespace ngk
