// The evaluator of an edge expression: a warp takes 16 edges of one destination through its stages.
#pragma once

#include "inputs.h"

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

template <class P, int D>
struct Evaluator : Inputs<P, D> {
  using Base = Inputs<P, D>;
  using typename Base::Element;
  using Left = typename P::Left;
  using Base::column_of, Base::row_of;
  using Base::KB, Base::FRAGMENTS, Base::g, Base::block, Base::constants, Base::features, Base::matrices;

  float* stash;
  Left* carry;
  // of a tile
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

  NGK_DEVICE explicit Evaluator(const Args& args) : Base(args) {
    stash = placed_of_warp<float>(g.stash, g.n_slots * KB * FRAGMENTS) + lane() * 8;
    carry = placed_of_warp<Left>(g.carry, KB * LANES) + lane();
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
    if (lane() < 16) {
      const Edge e = edge(panel, j, lane());
      this->load_features(panel, destination, e.raw, there && e.ok);
    }
    sync_warp();
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
      this->from_raw(stage, h, c, v);
    } else if (stage.source == FROM_TABLE) {
      this->from_table(stage, h, c, v);
    } else if (stage.source == FROM_FOURIER) {
      this->from_fourier(stage, h, c, v);
    } else if (stage.source == FROM_COPY) {
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) {
        const int column = c * 16 + column_of(k);
        if (column < g.channels) v[k] = features[row_of(k) * g.channels + column];
      }
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
