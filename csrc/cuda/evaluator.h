// The evaluator of an edge expression: a warp takes 16 edges of one destination through its stages.
#pragma once

#include "../edge_math.h"
#include "../values.h"
#include "args.h"
#include "precision.h"

namespace ngk::cuda {

// h = act(z) in place of z, and the derivative d of 8 numbers.
NGK_DEVICE void activate8(int kind, float* v, float* d) {
  NGK_UNROLL
  for (int k = 0; k < 8; ++k) {
    float h;
    switch (kind) {
      case SILU:
        silu<Number>(v[k], &h, d + k);
        break;
      case RELU:
        relu<Number>(v[k], &h, d + k);
        break;
      case SIGMOID:
        logistic<Number>(v[k], &h, d + k);
        break;
      case GELU:
        gelu<Number>(v[k], &h, d + k);
        break;
      default:
        act_scalar<float>(kind, v[k], &h, d + k);
    }
    v[k] = h;
  }
}

NGK_DEVICE void load8(const float* p, float* v) {
  const Four x = load4(p), y = load4(p + 4);
  NGK_UNROLL
  for (int k = 0; k < 4; ++k) v[k] = x.v[k], v[4 + k] = y.v[k];
}
NGK_DEVICE void store8(float* p, const float* v) {
  store4(p, {{v[0], v[1], v[2], v[3]}});
  store4(p + 4, {{v[4], v[5], v[6], v[7]}});
}

template <class X>
NGK_DEVICE X* placed(const Place& p) {
  return reinterpret_cast<X*>(p.base ? p.base + block() * p.stride : shared_memory() + p.offset);
}
// The part of one warp, `size` elements.
template <class X>
NGK_DEVICE X* placed_of_warp(const Place& p, int64_t size) {
  return placed<X>(p) + warp() * size;
}

NGK_DEVICE char* element_of(const Values& v, int64_t copy, int64_t i, int64_t j, int64_t channel) {
  return reinterpret_cast<char*>(v.data) +
         (copy * v.copy + j * v.src + i * v.dst + channel * v.channel) * dtype_size(static_cast<Dtype>(v.dtype));
}

constexpr int HERMITE = 16;  // numbers of an edge: weights of the table's lines, of their derivatives, the cell (-1: beyond the table)

struct Eight {
  float v[8];
};
// The 16 features cos | sin of 2 pi b w from column `first` on, or their derivatives by 2 pi b w. b: [count, channels]; w: of this lane's
// first row. One at a time: the code is long.
NGK_DEVICE Eight fourier_features(const float* b, int count, const float* w, int channels, int first, bool derivative) {
  Eight f;
  NGK_ROLLED
  for (int k = 0; k < 4; ++k) {
    const int column = first + k / 2 * 8 + lane() % 4 * 2 + k % 2, q = column < count ? column : column - count;
    float x[2] = {0, 0};
    NGK_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (column >= 2 * count) break;
      const float *frequency = b + static_cast<int64_t>(q) * channels, *weight = w + 8 * h * channels;
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

template <class P, int D>
struct Evaluator {
  static constexpr int KB = D / 16, FRAGMENTS = 256;  // fragments of a row of a register; numbers of a fragment
  using Left = typename P::Left;
  using Element = typename P::Element;

  const Args& g;
  const Element* matrices;
  const float* constants;
  float *features, *feature_gradients, *hermite, *stash;
  Left* carry;
  // of a tile
  const Rows* block = nullptr;
  const int64_t* line = nullptr;                         // null: every pair is an edge
  const float *s = nullptr, *t[2] = {nullptr, nullptr};  // node terms of its destination, of this lane's two sources
  int64_t destination = 0, place[2] = {0, 0};            // places of this lane's two edges among edge values
  bool ok[2] = {false, false};

  struct Edge {
    int64_t source, place, raw;
    bool ok;
  };
  // Row r of the tile of sources from j on; where there is no such edge, another one that is.
  NGK_DEVICE Edge edge(const Panel& panel, int64_t j, int r) const {
    if (!line) {
      const int64_t source = j + r < panel.j1 ? j + r : panel.j1 - 1;
      return {source, source, source, j + r < panel.j1};
    }
    const int64_t* e = reinterpret_cast<const int64_t*>(block->edges) + 3 * (line[1] + (r < line[2] ? r : 0));
    return {e[0], e[1], e[2], r < line[2]};
  }

  NGK_DEVICE int64_t features_of_warp() const { return 16 * (2 * g.channels + (g.table ? HERMITE : 0)); }

  // Copies what all warps read into shared memory. Every thread of the block comes here.
  NGK_DEVICE explicit Evaluator(const Args& args) : g(args) {
    features = placed_of_warp<float>(g.features, features_of_warp());
    feature_gradients = features + 16 * g.channels;
    hermite = feature_gradients + 16 * g.channels;
    stash = placed_of_warp<float>(g.stash, g.n_slots * KB * FRAGMENTS) + lane() * 8;
    carry = placed_of_warp<Left>(g.carry, KB * LANES) + lane();
    float* own = placed<float>(g.constants_copied);
    NGK_ROLLED
    for (int64_t k = thread(); k < g.n_constants; k += WARPS * LANES) own[k] = g.constants[k];
    constants = own;
    matrices = static_cast<const Element*>(g.matrices);
    if (g.matrices_copied) {
      float* copy = placed<float>(g.copied);
      const float* from = static_cast<const float*>(g.matrices);
      const int64_t n = g.matrices_copied * static_cast<int64_t>(sizeof(Element)) / 16;
      NGK_ROLLED
      for (int64_t k = thread(); k < n; k += WARPS * LANES) store4(copy + 4 * k, load4(from + 4 * k));
      matrices = reinterpret_cast<const Element*>(copy);
    }
    sync_block();
  }

  // The edges from sources j .. j + 15 (below j1) to destination i, or those of line i; with `there` false, from none.
  NGK_DEVICE void tile(const Panel& panel, int64_t i, int64_t j, bool there) {
    block = g.blocks + panel.block;
    line = block->lines ? reinterpret_cast<const int64_t*>(block->lines) + 3 * i : nullptr;
    destination = line ? line[0] : i;
    const int64_t first = panel.copy * block->node_stride;
    s = g.nodes + (block->dst + first + destination) * g.columns + lane() % 4 * 2;
    NGK_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Edge e = edge(panel, j, lane() / 4 + 8 * h);
      ok[h] = there && e.ok;
      place[h] = e.place;
      t[h] = g.nodes + (g.n_nodes + block->src + first + e.source) * g.columns + lane() % 4 * 2;
    }
    sync_warp();  // the last tile's features are read
    if (lane() < 16) load_features(panel, edge(panel, j, lane()), there);
    sync_warp();
  }

  NGK_DEVICE void load_features(const Panel& panel, const Edge& e, bool there) {
    const Values& raw = block->raw;
    NGK_ROLLED
    for (int c = 0; c < g.channels; ++c) {
      float x = 0;
      if (there && e.ok && raw.data) {
        x = read_value<float>(element_of(raw, panel.copy, destination, e.raw, c), static_cast<Dtype>(raw.dtype));
        if (block->affine >= 0) x = fmaf(x, constants[block->affine], constants[block->affine + 1]);
      }
      features[lane() * g.channels + c] = x;
    }
    if (!g.table) return;
    float* h = hermite + lane() * HERMITE;
    hermite_cells<Number>(features + lane(), 1, static_cast<float>(int64_t(1) << g.steps), g.table_nodes / 2, h + 12, h, h + 6, 1);
  }

  // What the product of a stage is added to: columns 16 c .. of half h.
  NGK_DEVICE void start(const Stage& stage, int h, int c, float* v) const {
    const int at = h * D + c * 16;
    NGK_UNROLL
    for (int n = 0; n < 2; ++n) {
      Two a{{0, 0}}, x{{0, 0}}, y{{0, 0}};
      if (stage.node >= 0) {
        a = load2(s + stage.node + at + 8 * n);
        x = load2(t[0] + stage.node + at + 8 * n);
        y = load2(t[1] + stage.node + at + 8 * n);
      } else if (stage.bias >= 0) {
        a = load2(constants + stage.bias + at + 8 * n + lane() % 4 * 2);
      }
      NGK_UNROLL
      for (int p = 0; p < 2; ++p) v[4 * n + p] = a.v[p] + x.v[p], v[4 * n + 2 + p] = a.v[p] + y.v[p];
    }
  }

  // v of a stage, but for what was kept: columns 16 c .. of half h, from the register a.
  NGK_DEVICE void fragment(const Stage& stage, int h, int c, const Left* a, float* v) const {
    start(stage, h, c, v);
    if (stage.source == FROM_REGISTER) {
      const Element* w = matrices + (static_cast<int64_t>(stage.weight + h) * KB + c) * KB * FRAGMENTS + lane() * 8;
      NGK_UNROLL
      for (int k = 0; k < KB; ++k) P::multiply(v, a[k], P::right(w + k * FRAGMENTS));
    } else if (stage.source == FROM_RAW) {
      from_raw(stage, h, c, v);
    } else if (stage.source == FROM_TABLE) {
      from_table(stage, h, c, v);
    } else if (stage.source == FROM_FOURIER) {
      from_fourier(stage, h, c, v);
    } else if (stage.source == FROM_COPY) {
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) {
        const int column = c * 16 + column_of(k);
        if (column < g.channels) v[k] = features[row_of(k) * g.channels + column];
      }
    }
  }

  static NGK_DEVICE int row_of(int k) { return lane() / 4 + k / 2 % 2 * 8; }
  static NGK_DEVICE int column_of(int k) { return k / 4 * 8 + lane() % 4 * 2 + k % 2; }

  // Of a stage FROM_RAW: where the weights of one channel begin.
  NGK_DEVICE const float* raw_weights(const Stage& stage, int channel, int h, int c) const {
    return constants + stage.weight + (block->direction * g.channels + channel) * stage.halves * D + h * D + c * 16 + lane() % 4 * 2;
  }
  NGK_DEVICE void from_raw(const Stage& stage, int h, int c, float* v) const {
    for (int k = 0; k < g.channels; ++k) {
      const float* w = raw_weights(stage, k, h, c);
      const float x[2] = {features[lane() / 4 * g.channels + k], features[(lane() / 4 + 8) * g.channels + k]};
      NGK_UNROLL
      for (int e = 0; e < 8; ++e) v[e] = fmaf(x[e / 2 % 2], w[e / 4 * 8 + e % 2], v[e]);
    }
  }

  // Lines k of the table, six of them, at this lane's columns.
  NGK_DEVICE const float* table_line(const Stage& stage, int64_t cell, int h, int c) const {
    return g.table + (block->direction * g.table_nodes + cell) * TABLE_LINES * stage.width * stage.halves + h * stage.width + c * 16;
  }
  // Whether any of `rows` edges, from those of this lane's warp or of all, has a weight beyond the table.
  NGK_DEVICE bool beyond(const float* hermite_rows, int rows, int64_t stride) const {
    bool any = false;
    NGK_ROLLED
    for (int r = 0; r < rows; ++r) any |= hermite_rows[r / 16 * stride + r % 16 * HERMITE + 12] < 0;
    return any;
  }
  NGK_DEVICE bool row_beyond(int k) const { return hermite[row_of(k) * HERMITE + 12] < 0; }

  NGK_DEVICE void from_table(const Stage& stage, int h, int c, float* v) const {
    float direct[8];
    const bool some = stage.groups && beyond(hermite, 16, 0);
    if (some) {
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) direct[k] = v[k];
      from_fourier(stage, h, c, direct);
    }
    NGK_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float* weights = hermite + (lane() / 4 + 8 * r) * HERMITE;
      const float cell = weights[12];
      const float* line = table_line(stage, cell < 0 ? 0 : static_cast<int64_t>(cell), h, c);
      NGK_ROLLED
      for (int k = 0; k < 2 * TABLE_LINES; ++k) {
        NGK_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int column = e / 2 * 8 + lane() % 4 * 2 + e % 2;
          if (c * 16 + column < stage.width)
            v[e / 2 * 4 + r * 2 + e % 2] = fmaf(weights[k], line[k * stage.width * stage.halves + column], v[e / 2 * 4 + r * 2 + e % 2]);
        }
      }
      NGK_UNROLL
      for (int e = 0; e < 4; ++e)
        if (cell < 0) v[e / 2 * 4 + r * 2 + e % 2] = some ? direct[e / 2 * 4 + r * 2 + e % 2] : NAN;  // NaN: there should be none
    }
  }

  NGK_DEVICE Eight fourier(const Stage& stage, int first, bool derivative) const {
    return fourier_features(constants + stage.frequencies + block->direction * stage.count * g.channels, stage.count,
                            features + lane() / 4 * g.channels, static_cast<int>(g.channels), first, derivative);
  }
  NGK_DEVICE void from_fourier(const Stage& stage, int h, int c, float* v) const {
    NGK_ROLLED
    for (int k = 0; k < stage.groups * KB; ++k) {
      const Eight f = fourier(stage, k * 16, false);
      const Element* w = matrices + ((static_cast<int64_t>(stage.weight + k / KB * stage.halves + h) * KB + c) * KB + k % KB) * FRAGMENTS;
      P::multiply(v, P::left(f.v), P::right(w + lane() * 8));
    }
  }

  NGK_DEVICE float* kept(int slot, int c) const { return stash + (static_cast<int64_t>(slot) * KB + c) * FRAGMENTS; }

  // A stage, from the register a to the next one, fragment c.
  NGK_DEVICE Left next(const Stage& stage, int c, const Left* a) const {
    float v[8], d[8];
    fragment(stage, 0, c, a, v);
    if (stage.add >= 0) {
      load8(kept(stage.add, c), d);
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) v[k] += d[k];
    }
    if (stage.slot >= 0) store8(kept(stage.slot, c), v);
    if (stage.act >= 0) activate8(stage.act, v, d);
    return P::left(v);
  }

  // Stages first .. last - 1; a: the register that the next one reads. One fragment's code serves all: unrolled, it is many times as long.
  NGK_DEVICE void run(int first, int last, Left* a) const {
    NGK_ROLLED
    for (int k = first; k < last; ++k) {
      NGK_ROLLED
      for (int c = 0; c < KB; ++c) carry[c * LANES] = next(g.stages[k], c, a);
      NGK_UNROLL
      for (int c = 0; c < KB; ++c) a[c] = carry[c * LANES];
    }
  }

  // The parts of fragment c of a message: m = e, s q + t, sigmoid(s) q or s q.
  struct Message {
    float e[8] = {}, shift[8] = {}, q[8] = {}, m[8];
  };
  NGK_DEVICE void message(int c, const Left* edge, const Left* query, Message* out) const {
    const int last = static_cast<int>(g.edge_stages) - 1;
    NGK_ROLLED
    for (int part = 0; part < 3; ++part) {  // one piece of code for all three
      if (part == 1 ? g.combine != FILM : part == 2 && (g.combine == PLAIN || g.combine == EMIT)) continue;
      Left a[KB];
      NGK_UNROLL
      for (int k = 0; k < KB; ++k) a[k] = part == 2 ? query[k] : edge[k];
      const Stage& stage = g.stages[part == 2 ? last + g.message_stages : last];
      float v[8];
      fragment(stage, part == 1, c, a, v);
      if (stage.add >= 0) {
        float d[8];
        load8(kept(stage.add, c), d);
        NGK_UNROLL
        for (int k = 0; k < 8; ++k) v[k] += d[k];
      }
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) {
        out->e[k] = part == 0 ? v[k] : out->e[k];
        out->shift[k] = part == 1 ? v[k] : out->shift[k];
        out->q[k] = part == 2 ? v[k] : out->q[k];
      }
    }
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) {
      if (g.combine == GATE) out->e[k] = sigmoid<Number>(out->e[k]);
      out->m[k] = g.combine == PLAIN || g.combine == EMIT ? out->e[k]
                  : g.combine == FILM                     ? fmaf(out->e[k], out->q[k], out->shift[k])
                                                          : out->e[k] * out->q[k];
    }
  }
  NGK_DEVICE int message_fragments() const { return static_cast<int>((g.width + 15) / 16); }
};

}  // namespace ngk::cuda
