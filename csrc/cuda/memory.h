// Numbers of a warp in memory: fragments, the places of working memory, edge values.
#pragma once

#include "../values.h"
#include "args.h"
#include "lane.h"

namespace ngk::cuda {

NGK_DEVICE void load8(const float* p, float* v) {
  const Four x = load4(p), y = load4(p + 4);
  NGK_UNROLL
  for (int k = 0; k < 4; ++k) v[k] = x.v[k], v[4 + k] = y.v[k];
}
NGK_DEVICE void store8(float* p, const float* v) {
  store4(p, {{v[0], v[1], v[2], v[3]}});
  store4(p + 4, {{v[4], v[5], v[6], v[7]}});
}

// Rows that lanes read by column lie in lanes' order: padded to 16 columns and, of these, the four that a lane has (precision.h) in 16
// bytes.
NGK_DEVICE int64_t in_lanes_order(int64_t column) { return column / 16 * 16 + column % 8 / 2 * 4 + column % 16 / 8 * 2 + column % 2; }
// This lane's of the 16 from `columns` on: number e is column 8 (e / 2) + 2 (l % 4) + e % 2.
NGK_DEVICE Four of_lane(const float* columns) { return load4(columns + lane() % 4 * 4); }
// Which of them, and of its two rows, number k of a fragment is.
NGK_DEVICE int number_of(int k) { return k / 4 * 2 + k % 2; }

struct Eight {
  float v[8];
};

template <class X>
NGK_DEVICE X* placed(const Place& p) {
  return reinterpret_cast<X*>(p.base ? p.base + block() * p.stride : shared_memory() + p.offset);
}
// The part of one warp, `size` elements.
template <class X>
NGK_DEVICE X* placed_of_warp(const Place& p, int64_t size) {
  return placed<X>(p) + warp() * size;
}
// The same of what always lies in shared memory, which the compiler should know.
template <class X>
NGK_DEVICE X* shared(const Place& p) {
  return reinterpret_cast<X*>(shared_memory() + static_cast<int>(p.offset));
}
template <class X>
NGK_DEVICE X* shared_of_warp(const Place& p, int64_t size) {
  return shared<X>(p) + warp() * static_cast<int>(size);
}

NGK_DEVICE char* element_of(const Values& v, int64_t copy, int64_t i, int64_t j, int64_t channel) {
  return reinterpret_cast<char*>(v.data) +
         (copy * v.copy + j * v.src + i * v.dst + channel * v.channel) * dtype_size(static_cast<Dtype>(v.dtype));
}

}  // namespace ngk::cuda
