// Maths of messages and what becomes of them: how the registers of an edge combine, running statistics and how they merge, layer norms,
// softmax; each with the way back. V as in edge_math.h; T: of numbers that one thread has, V::T or a lane's.
#pragma once

#include "edge_math.h"

namespace ngk {

// ---- messages: m = e (PLAIN, EMIT), s q + t (FILM), sigmoid(s) q (GATE) or s q (PRODUCT) ----
// e is e or s; of a gate it becomes sigmoid(s).
template <class V>
NGK_INLINE typename V::R combined(int combine, typename V::R* e, typename V::R shift, typename V::R q) {
  if (combine == GATE) *e = sigmoid<V>(*e);
  if (combine == PLAIN || combine == EMIT) return *e;
  return combine == FILM ? V::fma(*e, q, shift) : V::mul(*e, q);
}
// From the gradient d of a message, which is that of t, to those of e or s, and of q. e: as `combined` leaves it.
template <class V>
NGK_INLINE typename V::R combined_back(int combine, typename V::R d, typename V::R e, typename V::R q, typename V::R* of_q) {
  *of_q = V::mul(d, e);
  if (combine == PLAIN) return d;
  const typename V::R x = V::mul(d, q);
  return combine == GATE ? V::mul(x, V::mul(e, V::sub(V::set1(typename V::T(1)), e))) : x;
}

// ---- running statistics ----
// A message joins the sum of all less `shift`, and their squares.
template <class V>
NGK_INLINE void join_spread(typename V::R m, typename V::R shift, typename V::R* sum, typename V::R* squares) {
  const typename V::R d = V::sub(m, shift);
  *sum = V::add(*sum, d);
  *squares = V::fma(d, d, *squares);
}
// The smallest or the largest value so far, and how often it was there, meet `other`, which was there `count` times.
template <class V, bool MAXIMUM>
NGK_INLINE void join_extreme(typename V::R other, typename V::R count, typename V::R* best, typename V::R* ties) {
  const typename V::R more = V::if_eq(other, *best, V::add(*ties, count), *ties);
  *ties = MAXIMUM ? V::if_lt(*best, other, count, more) : V::if_lt(other, *best, count, more);
  *best = MAXIMUM ? V::if_lt(*best, other, other, *best) : V::if_lt(other, *best, other, *best);
}
// Of n messages with these sums about `shift`: their mean, and the squares about that.
template <class T>
NGK_INLINE void centred(T shift, T sum, T squares, T n, T* mean, T* about) {
  const T d = sum / n, rest = squares - sum * d;
  *mean = shift + d;
  *about = rest < 0 ? T(0) : rest;
}
// Chan's update of the mean and the squares of na values by those of nb more.
template <class T>
NGK_INLINE void merge_spread(T* mean, T* squares, T na, T other_mean, T other_squares, T nb) {
  const T n = na + nb, delta = other_mean - *mean;
  if (nb == 0) return;
  *mean = na == 0 ? other_mean : *mean + delta * (nb / n);
  *squares = na == 0 ? other_squares : *squares + (other_squares + delta * delta * (na * nb / n));
}
template <class T>
NGK_INLINE T deviation(T variance) {
  return variance <= static_cast<T>(STD_THRESHOLD) ? T(0) : std::sqrt(variance);  // a NaN stays one
}

// ---- reductions, backward: the gradient of a message m is constant + slope (m - mean) + [m = smallest] share + [m = largest] share ----
// S: where sum, mean, std and var lie in the results of a destination, in steps of F; -1: not there. inverse: 1 / number of messages.
template <class T, class S>
NGK_INLINE void slopes_of(const S& slots, const T* out, const T* grad, int64_t F, T inverse, T* constant, T* slope) {
  T a = slots.sum >= 0 ? grad[slots.sum * F] : T(0), b = 0;  // GCC 12 gets loops over *slope += .. wrong (-ftree-loop-distribution)
  if (slots.mean >= 0) a += grad[slots.mean * F] * inverse;
  if (slots.std >= 0 && out[slots.std * F] > 0) b = grad[slots.std * F] * inverse / out[slots.std * F];
  if (slots.var >= 0) b += T(2) * grad[slots.var * F] * inverse;
  *constant = a;
  *slope = b;
}
template <class V>
NGK_INLINE typename V::R spread_back(typename V::R m, typename V::R constant, typename V::R slope, typename V::R mean) {
  return V::fma(slope, V::sub(m, mean), constant);
}
template <class V>
NGK_INLINE typename V::R extreme_back(typename V::R m, typename V::R extreme, typename V::R share, typename V::R d) {
  return V::add(d, V::if_eq(m, extreme, share, V::zero()));
}

// ---- layer norms: y = (x - mean) scale, scale = 1 / sqrt(variance + eps) ----
template <class V>
NGK_INLINE typename V::R layer_norm(typename V::R x, typename V::R mean, typename V::R scale) {
  return V::mul(V::sub(x, mean), scale);
}
// From the gradient d of y to that of x; total, along: the means of d and of d y over the row.
template <class V>
NGK_INLINE typename V::R layer_norm_back(typename V::R d, typename V::R y, typename V::R total, typename V::R along, typename V::R scale) {
  return V::mul(V::sub(V::sub(d, total), V::mul(y, along)), scale);
}

// ---- softmax: p = exp(scale x - lse); `weight`: p with dropout ----
// The gradient of x from `dot`, that of the weight, and `delta`, which the destination's sum takes off.
template <class T>
NGK_INLINE T softmax_back(T weight, T dot, T p, T delta, T scale) {
  return (weight * dot - p * delta) * scale;
}

}  // namespace ngk
