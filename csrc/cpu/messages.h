// Messages of a tile from its registers, their running statistics by destination, and the way back.
#pragma once

#include "tile.h"

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

// m[n, ldm] from the edge register e (ld lde) and the message register q (ld ldq).
template <class V>
void combine(int kind, int F, int n, const typename V::T* e, int lde, const typename V::T* q, int ldq, typename V::T* m, int ldm) {
  using R = typename V::R;
  for (int r = 0; r < n; ++r) {
    const typename V::T *er = e + static_cast<int64_t>(r) * lde, *qr = q ? q + static_cast<int64_t>(r) * ldq : nullptr;
    typename V::T* mr = m + static_cast<int64_t>(r) * ldm;
    for (int c = 0; c < F; c += V::W) {
      const R s = V::load(er + c);
      switch (kind) {
        case PLAIN: V::store(mr + c, s); break;
        case FILM: V::store(mr + c, V::fma(s, V::load(qr + c), V::load(er + F + c))); break;
        case GATE: V::store(mr + c, V::mul(sigmoid<V>(s), V::load(qr + c))); break;
        default: V::store(mr + c, V::mul(s, V::load(qr + c)));
      }
    }
  }
}

// Gradients of the registers from that of the messages: ge (lde), gq (ldq).
template <class V>
void combine_backward(int kind, int F, int n, const typename V::T* gm, int ldm, const typename V::T* e, int lde, const typename V::T* q, int ldq, typename V::T* ge, typename V::T* gq) {
  using T = typename V::T;
  using R = typename V::R;
  const R one = V::set1(T(1));
  for (int r = 0; r < n; ++r) {
    const T *g = gm + static_cast<int64_t>(r) * ldm, *er = e + static_cast<int64_t>(r) * lde, *qr = q ? q + static_cast<int64_t>(r) * ldq : nullptr;
    T *er_g = ge + static_cast<int64_t>(r) * lde, *qr_g = gq ? gq + static_cast<int64_t>(r) * ldq : nullptr;
    for (int c = 0; c < F; c += V::W) {
      const R x = V::load(g + c);
      if (kind == PLAIN) {
        V::store(er_g + c, x);
        continue;
      }
      const R s = V::load(er + c), y = V::load(qr + c);
      if (kind == GATE) {
        const R a = sigmoid<V>(s);
        V::store(er_g + c, V::mul(V::mul(x, y), V::mul(a, V::sub(one, a))));
        V::store(qr_g + c, V::mul(x, a));
      } else {
        V::store(er_g + c, V::mul(x, y));
        V::store(qr_g + c, V::mul(x, s));
      }
    }
    if (kind == FILM)  // after the scales: a last partial vector of theirs may reach into the shifts
      for (int c = 0; c < F; c += V::W) V::store(er_g + F + c, V::load(g + c));
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

  // One destination's messages m[first .. last) join its statistics; `fresh`: they are the first.
  void join(const Slots& slots, int i, bool fresh, const T* m, int first, int last) {
    const R zero = V::zero(), one = V::set1(T(1));
    for (int c = 0; c < ld; c += V::W) {
      const int64_t at = static_cast<int64_t>(i) * ld + c;
      const T* p = m + static_cast<int64_t>(first) * ld + c;
      const R start = V::load(p);
      if (slots.sum >= 0 || slots.centre()) {
        const R k = slots.spread() ? (fresh ? start : V::load(shift + at)) : zero;
        R a = fresh ? zero : V::load(s1 + at), b = fresh ? zero : V::load(s2 + at);
        if (slots.spread()) {
          for (int r = first; r < last; ++r) {
            const R d = V::sub(V::load(m + static_cast<int64_t>(r) * ld + c), k);
            a = V::add(a, d);
            b = V::fma(d, d, b);
          }
          V::store(shift + at, k);
          V::store(s2 + at, b);
        } else {
          for (int r = first; r < last; ++r) a = V::add(a, V::load(m + static_cast<int64_t>(r) * ld + c));
        }
        V::store(s1 + at, a);
      }
      if (slots.min >= 0) extreme<false>(fresh, lo + at, lo_ties + at, m + c, first, last, start, zero, one);
      if (slots.max >= 0) extreme<true>(fresh, hi + at, hi_ties + at, m + c, first, last, start, zero, one);
    }
  }

 private:
  template <bool MAXIMUM>
  NGK_INLINE void extreme_step(R v, R zero, R one, R& best, R& ties) {
    const R count = V::if_eq(v, best, V::add(ties, one), ties);
    ties = MAXIMUM ? V::if_lt(best, v, one, count) : V::if_lt(v, best, one, count);
    best = MAXIMUM ? V::if_lt(best, v, v, best) : V::if_lt(v, best, v, best);
    (void)zero;
  }
  template <bool MAXIMUM>
  void extreme(bool fresh, T* best_at, T* ties_at, const T* m, int first, int last, R start, R zero, R one) {
    R best = fresh ? start : V::load(best_at), ties = fresh ? zero : V::load(ties_at);
    for (int r = first; r < last; ++r) extreme_step<MAXIMUM>(V::load(m + static_cast<int64_t>(r) * ld), zero, one, best, ties);
    V::store(best_at, best);
    V::store(ties_at, ties);
  }
};

}  // namespace ngk
