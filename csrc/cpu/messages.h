// Messages of a tile from its registers, their running statistics by destination, and the way back.
#pragma once

#include "evaluator.h"

namespace ngk {

// What a set of reductions needs: where each lives in out [rows, K, F] and aux, ties.
struct Slots {
  int sum = -1, mean = -1, min = -1, max = -1, std = -1, var = -1, count = 0;
  bool mean_aux = false;
  int min_tie = -1, max_tie = -1, ties = 0;
  explicit Slots(int mask) {
    int* slot[6] = {&sum, &mean, &min, &max, &std, &var};
    for (int k = 0; k < 6; ++k)
      if (mask >> k & 1) *slot[k] = count++;
    mean_aux = mean < 0 && (std >= 0 || var >= 0);
    if (min >= 0) min_tie = ties++;
    if (max >= 0) max_tie = ties++;
  }
  bool spread() const { return std >= 0 || var >= 0; }
  bool centre() const { return mean >= 0 || mean_aux; }
};

// The registers of a tile that make its messages.
template <class V>
struct Registers {
  const typename V::T *e, *q;
  int lde, ldq, F;
  // W channels of the message of edge r; s and y are what the way back needs.
  template <int KIND>
  NGK_INLINE typename V::R message(const Registers& g, int r, int c, typename V::R* s, typename V::R* y) {
    const typename V::T* er = g.e + static_cast<int64_t>(r) * g.lde + c;
    *s = V::load(er);
    *y = KIND == PLAIN ? V::zero() : V::load(g.q + static_cast<int64_t>(r) * g.ldq + c);
    return combined<V>(KIND, s, KIND == FILM ? V::load(er + g.F) : V::zero(), *y);
  }
};

// Calls f(std::integral_constant-like tag) for a combination known at run time.
template <int KIND>
struct Tag {
  static constexpr int kind = KIND;
};
template <class F>
NGK_INLINE void with_kind(int kind, F&& f) {
  switch (kind) {
    case PLAIN:
      f(Tag<PLAIN>{});
      break;
    case FILM:
      f(Tag<FILM>{});
      break;
    case GATE:
      f(Tag<GATE>{});
      break;
    default:
      f(Tag<PRODUCT>{});
  }
}

// Running statistics of a piece: rows of [stat][rows, ld].
template <class V>
struct Stats {
  using T = typename V::T;
  using R = typename V::R;
  T *shift, *s1, *s2, *lo, *lo_ties, *hi, *hi_ties;
  int ld;
  static constexpr int PLANES = 7;
  Stats(T* base, int rows, int width) : ld(width) {
    const int64_t plane = static_cast<int64_t>(rows) * ld;
    T** all[PLANES] = {&shift, &s1, &s2, &lo, &lo_ties, &hi, &hi_ties};
    for (int k = 0; k < PLANES; ++k) *all[k] = base + k * plane;
  }

  // The messages of edges first .. last - 1, all of destination i, join its statistics; `fresh`: they are the first.
  template <int KIND>
  void join(const Slots& slots, int i, bool fresh, const Registers<V>& g, int first, int last) {
    const R zero = V::zero(), one = V::set1(T(1));
    const bool spread = slots.spread(), low = slots.min >= 0, high = slots.max >= 0;
    for (int c = 0; c < ld; c += V::W) {
      const int64_t at = static_cast<int64_t>(i) * ld + c;
      R s, y;
      const R start = Registers<V>::template message<KIND>(g, first, c, &s, &y);
      const R k = !spread ? zero : fresh ? start : V::load(shift + at);
      R a = fresh ? zero : V::load(s1 + at), b = fresh ? zero : V::load(s2 + at);
      R l = fresh ? start : V::load(lo + at), ln = fresh ? zero : V::load(lo_ties + at);
      R h = fresh ? start : V::load(hi + at), hn = fresh ? zero : V::load(hi_ties + at);
      for (int r = first; r < last; ++r) {
        const R m = Registers<V>::template message<KIND>(g, r, c, &s, &y);
        join_spread<V>(m, k, &a, &b);  // always: a NaN in the sum is how merging learns of one
        if (low) join_extreme<V, false>(m, one, &l, &ln);
        if (high) join_extreme<V, true>(m, one, &h, &hn);
      }
      V::store(shift + at, k);
      V::store(s1 + at, a);
      V::store(s2 + at, b);
      V::store(lo + at, l);
      V::store(lo_ties + at, ln);
      V::store(hi + at, h);
      V::store(hi_ties + at, hn);
    }
  }
};

// What turns a message into its gradient, by destination (message_math.h). Planes of [rows, ld].
template <class V>
struct Coefficients {
  using T = typename V::T;
  using R = typename V::R;
  T *constant, *slope, *mean, *lo_share, *lo, *hi_share, *hi;
  int ld;
  static constexpr int PLANES = 7;
  Coefficients(T* base, int rows, int width) : ld(width) {
    const int64_t plane = static_cast<int64_t>(rows) * ld;
    T** all[PLANES] = {&constant, &slope, &mean, &lo_share, &lo, &hi_share, &hi};
    for (int k = 0; k < PLANES; ++k) *all[k] = base + k * plane;
  }

  // Gradients of the registers of edges first .. last - 1 of destination i: ge (g.lde), gq (g.ldq). Where the shifts of
  // FiLM do not start at a full vector, they go to `late` [tile, ld], for `shifts` to copy once all scales are written.
  template <int KIND>
  void apply(const Slots& slots, int i, const Registers<V>& g, int first, int last, T* ge, T* gq, T* late) const {
    const bool low = slots.min >= 0, high = slots.max >= 0, whole = g.F % V::W == 0;
    for (int c = 0; c < ld; c += V::W) {
      const int64_t at = static_cast<int64_t>(i) * ld + c;
      const R k0 = V::load(constant + at), k1 = V::load(slope + at), mu = V::load(mean + at);
      const R lg = V::load(lo_share + at), l = V::load(lo + at), hg = V::load(hi_share + at), h = V::load(hi + at);
      for (int r = first; r < last; ++r) {
        R s, y;
        const R m = Registers<V>::template message<KIND>(g, r, c, &s, &y);
        R x = spread_back<V>(m, k0, k1, mu), of_q;
        if (low) x = extreme_back<V>(m, l, lg, x);
        if (high) x = extreme_back<V>(m, h, hg, x);
        T* er = ge + static_cast<int64_t>(r) * g.lde + c;
        V::store(er, combined_back<V>(KIND, x, s, y, &of_q));
        if (KIND == FILM) V::store(whole ? er + g.F : late + static_cast<int64_t>(r) * ld + c, x);
        if (KIND != PLAIN) V::store(gq + static_cast<int64_t>(r) * g.ldq + c, of_q);
      }
    }
  }
  static void shifts(const Registers<V>& g, int n, const T* late, int ld, T* ge) {
    if (g.F % V::W == 0) return;
    for (int r = 0; r < n; ++r)
      std::memcpy(ge + static_cast<int64_t>(r) * g.lde + g.F, late + static_cast<int64_t>(r) * ld, sizeof(T) * g.F);
  }
};

}  // namespace ngk
