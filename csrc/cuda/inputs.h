// What the first stages of an edge expression read: raw features, the table of a curve over them, their Fourier features.
#pragma once

#include "../message_math.h"
#include "arrivals.h"
#include "precision.h"

namespace ngk::cuda {

constexpr int HERMITE = 16;  // numbers of an edge: weights of the table's lines, of their derivatives, the cell (-1: beyond the table)

// From one edge's raw features to the next one's: many are read row by row, by lanes that want banks of their own.
constexpr int MANY = 8;
NGK_DEVICE int64_t feature_row(int64_t channels) { return channels < MANY ? channels : (channels + 3) / 8 * 8 + 4; }

// The 16 features cos | sin of 2 pi b w from column `first` on, or their derivatives by 2 pi b w. b: [count, channels]; w, second: of this
// lane's rows. One at a time: the code is long.
NGK_SELDOM Eight fourier_features(const float* b, int count, const float* w, const float* second, int channels, int first,
                                  bool derivative) {
  Eight f;
  NGK_ROLLED
  for (int k = 0; k < 4; ++k) {
    const int column = first + k / 2 * 8 + lane() % 4 * 2 + k % 2, q = column < count ? column : column - count;
    float x[2] = {0, 0};
    NGK_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (column >= 2 * count) break;
      const float *frequency = b + static_cast<int64_t>(q) * channels, *weight = h ? second : w;
      float t = 0, rest = 0, cosine, sine;
      NGK_ROLLED
      for (int c = 0; c < channels; ++c) t = fmaf(frequency[c], weight[c], t);
      // of one channel: the product's rounding error, put back after the turns are off
      if (channels == 1) t = frequency[0] * weight[0], rest = fmaf(frequency[0], weight[0], -t);
      cos_sin_turns<Number>(t, rest, &cosine, &sine);
      x[h] = column < count ? (derivative ? -sine : cosine) : derivative ? cosine : sine;
    }
    NGK_UNROLL
    for (int e = 0; e < 4; ++e)
      if (e == k) f.v[e / 2 * 4 + e % 2] = x[0], f.v[e / 2 * 4 + 2 + e % 2] = x[1];
  }
  return f;
}

// FULL: with layer norms, tokens, and reverse partners, which have registers of their own.
template <class P, int D, bool FULL>
struct Inputs {
  static constexpr int KB = D / 16, FRAGMENTS = 256;  // fragments of a row of a register; numbers of a fragment
  using Element = typename P::Element;

  const Args& g;
  const Element* matrices;
  const float* constants;
  float* features;  // of a side: of its rows, then their gradients, then weights of the table
  char* arrivals;
  // of a tile
  const Rows* block = nullptr;
  int turned = 0;

  NGK_DEVICE int side() const { return FULL ? turned : 0; }  // 0: edges, 1: their partners
  NGK_DEVICE int sides() const { return FULL && g.live ? 2 : 1; }
  NGK_DEVICE int64_t direction() const { return FULL && turned ? block->partner_direction : block->direction; }
  NGK_DEVICE int64_t features_of_side() const { return 16 * (2 * feature_row(g.channels) + (g.table ? HERMITE : 0)); }
  NGK_DEVICE int64_t features_of_warp() const { return features_of_side() * sides(); }
  static NGK_DEVICE int row_of(int k) { return lane() / 4 + k / 2 % 2 * 8; }
  static NGK_DEVICE int column_of(int k) { return k / 4 * 8 + lane() % 4 * 2 + k % 2; }

  // Copies what all warps read into shared memory. Every thread of the block comes here.
  NGK_DEVICE explicit Inputs(const Args& args) : g(args) {
    features = shared_of_warp<float>(g.features, features_of_warp());
    arrivals = shared_of_warp<char>(g.arrivals, AHEAD * sides() * arrival_bytes(g.channels));
    float* own = shared<float>(g.constants_copied);
    NGK_ROLLED
    for (int64_t k = thread(); k < g.n_constants; k += WARPS * LANES) own[k] = g.constants[k];
    constants = own;
    matrices = static_cast<const Element*>(g.matrices);
    if (g.matrices_copied) {
      float* copy = shared<float>(g.copied);
      const float* from = static_cast<const float*>(g.matrices);
      const int64_t n = g.matrices_copied * static_cast<int64_t>(sizeof(Element)) / 16;
      NGK_ROLLED
      for (int64_t k = thread(); k < n; k += WARPS * LANES) store4(copy + 4 * k, load4(from + 4 * k));
      matrices = reinterpret_cast<const Element*>(copy);
    }
    sync_block();
  }

  NGK_DEVICE const Values& raw(int of) const { return of ? block->partner_raw : block->raw; }
  // Of row r of a side: raw features, their gradients, weights of the table's lines.
  NGK_DEVICE float* features_of(int r) const { return features + r * feature_row(g.channels); }
  NGK_DEVICE float* gradients_of(int r) const { return features + (16 + r) * feature_row(g.channels); }
  NGK_DEVICE float* hermite_of(int r) const { return features + 32 * feature_row(g.channels) + r * HERMITE; }
  // f(row, channel) of all raw features of a tile, shared out among the lanes.
  template <class F>
  NGK_DEVICE void by_feature(F&& f) const {
    const bool many = g.channels >= MANY;
    NGK_ROLLED
    for (int r = many ? 0 : lane(); r < 16; r += many ? 1 : LANES) NGK_ROLLED
    for (int c = many ? lane() : 0; c < g.channels; c += many ? LANES : 1) f(r, c);
  }

  // Of the rows `real` of a tile, 0 of others: from where they have arrived into the features of this side; `tile`: of its band.
  NGK_DEVICE void take_features(char* from, int tile, uint32_t real) {
    const int64_t affine = side() ? block->partner_affine : block->affine;
    const Values& values = raw(side());
    const Dtype dtype = static_cast<Dtype>(values.dtype);
    by_feature([&](int r, int c) {
      float x = 0;
      if ((real >> r & 1) && values.data) {
        x = read_value<float>(from + starts_of(from, g.channels)[r] + (tile * g.channels + c) * dtype_size(dtype), dtype);
        if (affine >= 0) x = fmaf(x, constants[affine], constants[affine + 1]);
      }
      features_of(r)[c] = x;
    });
    if (!g.table || lane() >= 16) return;
    float* h = hermite_of(lane());
    hermite_cells<Number>(features + lane(), 1, static_cast<float>(int64_t(1) << g.steps), g.table_nodes / 2, h + 12, h, h + 6, 1);
  }

  // Of a stage FROM_RAW: the weights of one channel.
  NGK_DEVICE Four raw_weights(const Stage& stage, int channel, int h, int c) const {
    return of_lane(constants + stage.weight + (direction() * g.channels + channel) * stage.halves * D + h * D + c * 16);
  }
  NGK_DEVICE void from_raw(const Stage& stage, int h, int c, float* v) const {
    for (int k = 0; k < g.channels; ++k) {
      const Four w = raw_weights(stage, k, h, c);
      const float x[2] = {features_of(lane() / 4)[k], features_of(lane() / 4 + 8)[k]};
      NGK_UNROLL
      for (int e = 0; e < 8; ++e) v[e] = fmaf(x[e / 2 % 2], w.v[number_of(e)], v[e]);
    }
  }

  // This lane's columns of line k, of six, that the weights in a cell read.
  NGK_DEVICE Four table_line(const Stage& stage, float cell, int k, int h, int c) const {
    const int64_t first = (direction() * g.table_nodes + (cell < 0 ? 0 : static_cast<int64_t>(cell))) * TABLE_LINES;
    return of_lane(g.table + ((first + k) * stage.halves + h) * D + c * 16);
  }
  // Whether any of `rows` edges, from those of this lane's warp or of all, has a weight beyond the table.
  NGK_DEVICE bool beyond(const float* hermite_rows, int rows, int64_t stride) const {
    bool any = false;
    NGK_ROLLED
    for (int r = 0; r < rows; ++r) any |= hermite_rows[r / 16 * stride + r % 16 * HERMITE + 12] < 0;
    return any;
  }
  NGK_DEVICE bool row_beyond(int k) const { return hermite_of(row_of(k))[12] < 0; }

  NGK_DEVICE void from_table(const Stage& stage, int h, int c, float* v) const {
    float direct[8];
    const bool some = stage.groups && beyond(hermite_of(0), 16, 0);
    if (some) {
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) direct[k] = v[k];
      from_fourier(stage, h, c, direct);
    }
    NGK_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float* weights = hermite_of(lane() / 4 + 8 * r);
      const float cell = weights[12];
      NGK_ROLLED
      for (int k = 0; k < 2 * TABLE_LINES; ++k) {
        const Four line = table_line(stage, cell, k, h, c);
        NGK_UNROLL
        for (int e = 0; e < 4; ++e) v[e / 2 * 4 + r * 2 + e % 2] = fmaf(weights[k], line.v[e], v[e / 2 * 4 + r * 2 + e % 2]);
      }
      NGK_UNROLL
      for (int e = 0; e < 4; ++e)
        if (cell < 0) v[e / 2 * 4 + r * 2 + e % 2] = some ? direct[e / 2 * 4 + r * 2 + e % 2] : NAN;  // NaN: there should be none
    }
  }

  NGK_DEVICE Eight fourier(const Stage& stage, int first, bool derivative) const {
    return fourier_features(constants + stage.frequencies + direction() * stage.count * g.channels, stage.count, features_of(lane() / 4),
                            features_of(lane() / 4 + 8), static_cast<int>(g.channels), first, derivative);
  }
  NGK_DEVICE void from_fourier(const Stage& stage, int h, int c, float* v) const {
    NGK_ROLLED
    for (int k = 0; k < stage.groups * KB; ++k) {
      const Eight f = fourier(stage, k * 16, false);
      const Element* w = matrices + ((static_cast<int64_t>(stage.weight + k / KB * stage.halves + h) * KB + c) * KB + k % KB) * FRAGMENTS;
      P::multiply(v, P::left(f.v), P::right(w + lane() * 8));
    }
  }
};

}  // namespace ngk::cuda
