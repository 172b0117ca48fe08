// Rows of edge values in memory: a fragment of them is written and read by whole lines of 16 bytes where they consist of such.
#pragma once

#include "memory.h"

namespace ngk::cuda {

// Whether rows of `width` values are whole lines.
NGK_DEVICE bool in_lines(const Values& v, int64_t width) {
  return v.channel == 1 && (v.data | (width | v.copy | v.src | v.dst) * dtype_size(static_cast<Dtype>(v.dtype))) % 16 == 0;
}

// Lanes below (of two that differ in the bit `mask`) give *high for the other's *low, which gives it for that: a transposition.
NGK_DEVICE void exchange(float* low, float* high, int mask) {
  const bool above = lane() & mask;
  const float got = shuffle_xor(above ? *low : *high, mask);
  *low = above ? got : *low;
  *high = above ? *high : got;
}
// From a fragment to rows, and back: then x[4 n + 2 h + p] is column 8 (l % 2) + 4 (l / 2 % 2) + 2 n + p of row l / 4 + 8 h.
NGK_DEVICE void by_rows(float* x) {
  NGK_UNROLL
  for (int k = 0; k < 4; ++k) exchange(x + k, x + 4 + k, 1);
}
// The same with pairs of 16-bit numbers: then they are columns 8 (l % 2) .. of row l / 4 + 8 (l / 2 % 2).
NGK_DEVICE void by_halves(float* pairs) {
  exchange(pairs, pairs + 2, 2);
  exchange(pairs + 1, pairs + 3, 2);
}

NGK_DEVICE float pair_of(float x, float y, Dtype dtype) {
  const uint32_t low = dtype == BF16 ? to_bf16(x) : to_f16(x), high = dtype == BF16 ? to_bf16(y) : to_f16(y), both = low | high << 16;
  float pair;
  std::memcpy(&pair, &both, 4);
  return pair;
}
NGK_DEVICE float of_pair(float pair, int k, Dtype dtype) {
  uint32_t both;
  std::memcpy(&both, &pair, 4);
  const uint16_t half = static_cast<uint16_t>(both >> (16 * k));
  return dtype == BF16 ? from_bf16(half) : from_f16(half);
}

// Columns 16 c .. of two rows of `width` values, those of this lane; null: not there, 0. All lanes together.
NGK_SELDOM Eight read_values(const Values& from, int c, int width, const char* top, const char* bottom) {
  const Dtype dtype = static_cast<Dtype>(from.dtype);
  Eight x;
  if (!in_lines(from, width)) {
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) {
      const int column = c * 16 + k / 4 * 8 + lane() % 4 * 2 + k % 2;
      const char* row = k / 2 % 2 ? bottom : top;
      x.v[k] = row && column < width ? read_value<float>(row + column * from.channel * dtype_size(dtype), dtype) : 0.0f;
    }
    return x;
  }
  const int column = c * 16 + lane() % 2 * 8, half = lane() / 2 % 2;
  if (dtype == F32) {
    NGK_UNROLL
    for (int h = 0; h < 2; ++h) {
      const float* row = reinterpret_cast<const float*>(h ? bottom : top);
      const Four line = row && column + 4 * half < width ? load4(row + column + 4 * half) : Four{{0, 0, 0, 0}};
      x.v[2 * h] = line.v[0], x.v[2 * h + 1] = line.v[1], x.v[4 + 2 * h] = line.v[2], x.v[5 + 2 * h] = line.v[3];
    }
  } else {
    const float* row = reinterpret_cast<const float*>(half ? bottom : top);
    Four line = row && column < width ? load4(row + column / 2) : Four{{0, 0, 0, 0}};
    by_halves(line.v);
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) x.v[k] = of_pair(line.v[k / 2 % 2 * 2 + k / 4], k % 2, dtype);
  }
  by_rows(x.v);
  return x;
}
// `add`: to what is there.
NGK_SELDOM void write_values(const Values& to, int c, int width, char* top, char* bottom, Eight x, bool add) {
  if (add) {
    const Eight old = read_values(to, c, width, top, bottom);
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) x.v[k] += old.v[k];
  }
  const Dtype dtype = static_cast<Dtype>(to.dtype);
  if (!in_lines(to, width)) {
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) {
      const int column = c * 16 + k / 4 * 8 + lane() % 4 * 2 + k % 2;
      char* row = k / 2 % 2 ? bottom : top;
      if (row && column < width) write_value<float>(row + column * to.channel * dtype_size(dtype), dtype, x.v[k]);
    }
    return;
  }
  by_rows(x.v);
  const int column = c * 16 + lane() % 2 * 8, half = lane() / 2 % 2;
  if (dtype == F32) {
    NGK_UNROLL
    for (int h = 0; h < 2; ++h) {
      float* row = reinterpret_cast<float*>(h ? bottom : top);
      if (row && column + 4 * half < width) store4(row + column + 4 * half, {{x.v[2 * h], x.v[2 * h + 1], x.v[4 + 2 * h], x.v[5 + 2 * h]}});
    }
    return;
  }
  Four pairs{
      {pair_of(x.v[0], x.v[1], dtype), pair_of(x.v[4], x.v[5], dtype), pair_of(x.v[2], x.v[3], dtype), pair_of(x.v[6], x.v[7], dtype)}};
  by_halves(pairs.v);
  float* row = reinterpret_cast<float*>(half ? bottom : top);
  if (row && column < width) store4(row + column / 2, pairs);
}

}  // namespace ngk::cuda
