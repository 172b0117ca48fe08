// Running statistics of the messages to one destination: of each lane its own rows, merged over the lanes in the end. A column fragment
// of a tile is added, and written, at a time; `seen` is from before that.
#pragma once

#include "evaluator.h"

namespace ngk::cuda {

struct Statistics {
  const Args& g;
  float* base;  // [planes, fragments, lanes, 4 columns]; planes: sum, with `spread` shift and squares, low, ties, high, ties
  int fragments;
  float seen = 0;  // messages of this lane's rows

  NGK_DEVICE float* plane(int k, int c) const { return base + (k * fragments + c) * LANES * 4 + lane() * 4; }

  NGK_DEVICE void add(int c, const float* m, const bool* ok) {
    Four sum = seen ? load4(plane(0, c)) : Four{{0, 0, 0, 0}};
    if (g.spread) {
      Four shift = seen ? load4(plane(1, c)) : Four{{0, 0, 0, 0}}, squares = seen ? load4(plane(2, c)) : Four{{0, 0, 0, 0}};
      NGK_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (!seen) shift.v[e] = ok[0] ? m[value_of(e, 0)] : m[value_of(e, 1)];
        NGK_UNROLL
        for (int h = 0; h < 2; ++h) {
          if (ok[h]) join_spread<Number>(m[value_of(e, h)], shift.v[e], sum.v + e, squares.v + e);
        }
      }
      store4(plane(1, c), shift);
      store4(plane(2, c), squares);
    } else {
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) sum.v[k / 4 * 2 + k % 2] += ok[k / 2 % 2] ? m[k] : 0.0f;
    }
    store4(plane(0, c), sum);
    if (g.low) extreme<false>(3, c, m, ok);
    if (g.high) extreme<true>(5, c, m, ok);
    seen += static_cast<float>(ok[0]) + static_cast<float>(ok[1]);
  }

  // The statistics of all lanes, of columns 16 c .., written to a partial row [STATISTIC_PLANES, 16 fragments].
  NGK_DEVICE void write(int c, float* row) const {
    const Four none{{0, 0, 0, 0}};
    Four sum = seen ? load4(plane(0, c)) : none, squares = none, ends[4];
    if (g.spread) {
      const Four shift = seen ? load4(plane(1, c)) : none, second = seen ? load4(plane(2, c)) : none;
      NGK_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (seen) centred(shift.v[e], sum.v[e], second.v[e], seen, sum.v + e, squares.v + e);
      }
    }
    NGK_UNROLL
    for (int k = 0; k < 4; ++k)
      if (k < 2 ? g.low : g.high) ends[k] = seen ? load4(plane(3 + k, c)) : k % 2 ? none : endless(k / 2);
    NGK_UNROLL
    for (int e = 0; e < 4; ++e) {
      float n = seen;
      NGK_UNROLL
      for (int mask = 4; mask < LANES; mask *= 2) {
        const float more = shuffle_xor(n, mask);
        if (g.spread) {
          const float mean = shuffle_xor(sum.v[e], mask), second = shuffle_xor(squares.v[e], mask);
          merge_spread(&sum.v[e], &squares.v[e], n, mean, second, more);
        } else {
          sum.v[e] += shuffle_xor(sum.v[e], mask);
        }
        if (g.low) {
          const float x = shuffle_xor(ends[0].v[e], mask), count = shuffle_xor(ends[1].v[e], mask);
          join_extreme<Number, false>(x, count, &ends[0].v[e], &ends[1].v[e]);
        }
        if (g.high) {
          const float x = shuffle_xor(ends[2].v[e], mask), count = shuffle_xor(ends[3].v[e], mask);
          join_extreme<Number, true>(x, count, &ends[2].v[e], &ends[3].v[e]);
        }
        n += more;
      }
    }
    if (lane() >= 4) return;
    NGK_UNROLL
    for (int e = 0; e < 4; ++e) {
      float* to = row + c * 16 + e / 2 * 8 + lane() * 2 + e % 2;
      const int stride = 16 * fragments;
      to[0] = sum.v[e];
      if (g.spread) to[stride] = squares.v[e];
      if (g.low) to[2 * stride] = ends[0].v[e], to[3 * stride] = ends[1].v[e];
      if (g.high) to[4 * stride] = ends[2].v[e], to[5 * stride] = ends[3].v[e];
    }
  }

 private:
  static NGK_DEVICE int value_of(int e, int h) { return e / 2 * 4 + h * 2 + e % 2; }
  static NGK_DEVICE Four endless(bool maximum) {
    const float x = maximum ? -INFINITY : INFINITY;
    return {{x, x, x, x}};
  }
  template <bool MAXIMUM>
  NGK_DEVICE void extreme(int at, int c, const float* m, const bool* ok) const {
    Four best = seen ? load4(plane(at, c)) : endless(MAXIMUM), ties = seen ? load4(plane(at + 1, c)) : Four{{0, 0, 0, 0}};
    NGK_UNROLL
    for (int k = 0; k < 8; ++k)
      if (ok[k / 2 % 2]) join_extreme<Number, MAXIMUM>(m[k], 1, &best.v[k / 4 * 2 + k % 2], &ties.v[k / 4 * 2 + k % 2]);
    store4(plane(at, c), best);
    store4(plane(at + 1, c), ties);
  }
};

}  // namespace ngk::cuda
