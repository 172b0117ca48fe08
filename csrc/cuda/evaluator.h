// The evaluator of an edge expression: a warp takes 16 edges of one destination through its stages.
#pragma once

#include "inputs.h"
#include "register.h"

namespace ngk::cuda {

template <class P, int D, bool FULL>
struct Evaluator : Inputs<P, D, FULL> {
  using Base = Inputs<P, D, FULL>;
  using Base::column_of, Base::row_of, Base::side;
  using Base::KB, Base::FRAGMENTS, Base::g, Base::block, Base::constants, Base::features, Base::hermite, Base::matrices;
  using typename Base::Element;
  using Left = typename P::Left;
  using Register = cuda::Register<Left, KB, FULL>;
  static constexpr int CARRIED = FULL ? 4 : 1;  // registers: of edges and of partners, each the last and the next one

  float* stash;
  Left* carry;
  // of a tile
  const int64_t* line = nullptr;                         // null: every pair is an edge
  const float *s = nullptr, *t[2] = {nullptr, nullptr};  // node terms of its destination, of this lane's two sources
  int64_t destination = 0, place[2] = {0, 0};            // places of this lane's two edges among edge values
  bool ok[2] = {false, false};
  // FULL: its edges, the first rows; nodes of its destination, of this lane's two sources; places of two edges among their partners' values
  int count = 0;
  int64_t node = 0, source_node[2] = {0, 0}, partner_place[2] = {0, 0};

  struct Edge {
    int64_t source, place, partner;
    bool ok;
    NGK_DEVICE int64_t raw(int64_t by) const { return by ? partner : place; }
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
    stash = placed_of_warp<float>(g.stash, this->sides() * g.n_slots * KB * FRAGMENTS) + lane() * 8;
    carry = placed_of_warp<Left>(g.carry, CARRIED * KB * LANES) + lane();
  }

  // What is evaluated from here on is of the edges (0) or of their partners (1).
  NGK_DEVICE void turn(int to) {
    if (!FULL || to == this->turned) return;
    const int64_t by = to - this->turned, plane = g.n_nodes * g.columns;
    this->turned = to;
    features += by * this->features_of_side();
    this->feature_gradients += by * this->features_of_side();
    hermite += by * this->features_of_side();
    stash += by * g.n_slots * KB * FRAGMENTS;
    s += by * plane;
    t[0] -= by * plane;
    t[1] -= by * plane;
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
      if (FULL) source_node[h] = block->src + first + e.source, partner_place[h] = e.partner;
    }
    if (FULL) {
      const int64_t edges = line ? line[2] : panel.j1 - j;
      node = block->dst + first + destination;
      count = there ? static_cast<int>(edges < 16 ? edges : 16) : 0;
    }
    sync_warp();  // the last tile's features are read
    if (lane() < 16) {
      const Edge e = edge(panel, j, lane());
      const bool has_raw = there && e.ok && !(FULL && block->diagonal && e.source != destination);
      this->load_features(panel, destination, e.raw(block->raw_by), has_raw);
      if (FULL && g.live) {
        turn(1);
        this->load_features(panel, destination, e.raw(block->partner_raw_by), has_raw);
        turn(0);
      }
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

  // Adds columns 16 c .. of a register times matrix number `matrix`.
  NGK_DEVICE void product(int64_t matrix, int c, const Register& a, float* v) const {
    const Element* w = matrices + (matrix * KB + c) * KB * FRAGMENTS + lane() * 8;
    NGK_UNROLL
    for (int k = 0; k < KB; ++k) P::multiply(v, a[k], P::right(w + k * FRAGMENTS));
  }

  // v of a stage, but for what was kept: columns 16 c .. of part h, from the register a (of partners: b).
  NGK_DEVICE void fragment(const Stage& stage, int h, int c, const Register& a, const Register& b, float* v) const {
    start(stage, h, c, v);
    if (stage.source == FROM_REGISTER) {
      product(stage.weight + h, c, a, v);
      if (FULL && stage.reverse >= 0) product(stage.reverse, c, b, v);
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
    } else if (FULL && stage.source == FROM_NORM) {
      float y[8], w[8];
      normalised(stage, moments(stage), c, y);
      by_column(stage.weight, c, w);
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) v[k] = fmaf(y[k], w[k], v[k]);
    }
  }

  // ---- layer norms: of what slot `input` keeps ----
  struct Moments {
    float mean[2], scale[2];  // of this lane's two rows; scale: 1 / sqrt(variance + eps)
  };
  NGK_DEVICE Moments moments(const Stage& stage) const {
    Moments m{{0, 0}, {0, 0}};
    float eps;
    std::memcpy(&eps, &stage.eps, 4);
    NGK_ROLLED
    for (int pass = 0; pass < 2; ++pass) {
      float total[2] = {0, 0};
      NGK_ROLLED
      for (int c = 0; c < KB; ++c) {
        float x[8];
        load8(kept(stage.input, c), x);
        NGK_UNROLL
        for (int k = 0; k < 8; ++k) {
          if (c * 16 + column_of(k) >= stage.width) continue;
          const float d = x[k] - m.mean[k / 2 % 2];
          total[k / 2 % 2] += pass ? d * d : d;
        }
      }
      NGK_UNROLL
      for (int h = 0; h < 2; ++h) {
        const float mean = over_row(total[h]) / static_cast<float>(stage.width);
        if (pass) {
          m.scale[h] = 1.0f / sqrtf(mean + eps);
        } else {
          m.mean[h] = mean;
        }
      }
    }
    return m;
  }
  NGK_DEVICE void normalised(const Stage& stage, const Moments& m, int c, float* y) const {
    load8(kept(stage.input, c), y);
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) y[k] = (y[k] - m.mean[k / 2 % 2]) * m.scale[k / 2 % 2];
  }
  // Columns 16 c .. of a vector among the constants, for both rows.
  NGK_DEVICE void by_column(int64_t place, int c, float* v) const {
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) v[k] = constants[place + c * 16 + column_of(k)];
  }
  // Summed over the four lanes that hold a row.
  static NGK_DEVICE float over_row(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
  }

  NGK_DEVICE float* kept(int slot, int c) const { return stash + (static_cast<int64_t>(slot) * KB + c) * FRAGMENTS; }

  // Adds what was kept, and masks.
  NGK_DEVICE void finish(const Stage& stage, int c, float* v) const {
    if (stage.add >= 0) {
      float d[8];
      load8(kept(stage.add, c), d);
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) v[k] += d[k];
    }
    if (FULL && stage.masked && block->token) NGK_UNROLL
    for (int k = 0; k < 8; ++k) v[k] = 0;
  }

  // A stage, from the register a (of partners: b) to the next one, fragment c.
  NGK_DEVICE Left next(const Stage& stage, int c, const Register& a, const Register& b) const {
    float v[8], d[8];
    fragment(stage, 0, c, a, b, v);
    finish(stage, c, v);
    if (stage.slot >= 0) store8(kept(stage.slot, c), v);
    if (stage.act >= 0) activate8(stage.act, v, d);
    return P::left(v);
  }

  // Stages first .. last - 1; a: the register that the next one reads. One fragment's code serves all: unrolled, it is many times as long.
  NGK_DEVICE void run(int first, int last, Register* a) {
    if constexpr (FULL) {
      run_pair(first, last, a);
    } else {
      NGK_ROLLED
      for (int k = first; k < last; ++k) {
        NGK_ROLLED
        for (int c = 0; c < KB; ++c) carry[c * LANES] = next(g.stages[k], c, *a, *a);
        NGK_UNROLL
        for (int c = 0; c < KB; ++c) a->r[c] = carry[c * LANES];
      }
    }
  }
  // With partners as far as they are evaluated. A message's stages come after: what partners had is free for them.
  NGK_DEVICE void run_pair(int first, int last, Register* a) {
    Left* to = carry + (first ? KB * LANES : 0);
    Register own{to}, other{to};
    NGK_ROLLED
    for (int k = first; k < last; ++k) {
      to = carry + ((k - first) % 2 * 2 + (first ? 1 : 0)) * KB * LANES;
      NGK_ROLLED
      for (int x = 0; x < 1 + (k < g.live); ++x) {
        turn(x);
        NGK_ROLLED
        for (int c = 0; c < KB; ++c) to[(x * KB + c) * LANES] = next(g.stages[k], c, x ? other : own, x ? own : other);
      }
      turn(0);
      own.at = to;
      other.at = to + KB * LANES;
    }
    *a = own;
  }

  // The parts of fragment c of a message: m = e, s q + t, sigmoid(s) q or s q.
  struct Message {
    float e[8] = {}, shift[8] = {}, q[8] = {}, m[8];
  };
  NGK_DEVICE void message(int c, const Register& edge, const Register& query, Message* out) const {
    const int last = static_cast<int>(g.edge_stages) - 1;
    NGK_ROLLED
    for (int part = 0; part < 3; ++part) {  // one piece of code for all three
      if (part == 1 ? g.combine != FILM : part == 2 && (g.combine == PLAIN || g.combine == EMIT)) continue;
      Register a = edge;
      if (part == 2) a = query;
      const Stage& stage = g.stages[part == 2 ? last + g.message_stages : last];
      float v[8];
      fragment(stage, part == 1, c, a, a, v);
      finish(stage, c, v);
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
