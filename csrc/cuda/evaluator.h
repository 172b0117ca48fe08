// The evaluator of an edge expression: a warp takes 16 edges of one destination through its stages.
#pragma once

#include <type_traits>
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
  using Register = cuda::Register<Left>;
  // What a stage reads of the last one: all of it held by the lane, or fragment by fragment.
  using Reads = std::conditional_t<P::SHORT && !FULL, Held<Left, KB>, Register>;
  static constexpr int CARRIED =
      FULL ? 4 : 3;  // registers: the last and the next one, and a state's while its message goes on; or partners'

  float* stash;
  Left* carry;
  // of a tile
  const int64_t* line = nullptr;          // null: every pair is an edge
  int destination = 0;                    // in its layer
  int node = 0, source_node[2] = {0, 0};  // its destination in the graph, this lane's two sources
  bool ok[2] = {false, false};
  int count = 0;  // FULL: its edges, the first rows

  struct Edge {
    int64_t source = 0, place = 0, partner = 0;
    bool ok = false;
    NGK_DEVICE int64_t raw(int64_t by) const { return by ? partner : place; }
  };
  NGK_DEVICE static const int64_t* line_of(const Rows* block, int64_t i) {
    return block->lines ? reinterpret_cast<const int64_t*>(block->lines) + 3 * i : nullptr;
  }
  // Row r of the tile of sources from j on, or of a line; where there is no such edge, another one that is.
  NGK_DEVICE Edge edge(const Panel& panel, const int64_t* of, int64_t j, int r) const {
    if (!of) {
      const int64_t source = j + r < panel.j1 ? j + r : panel.j1 - 1;
      return {source, source, source, j + r < panel.j1};
    }
    const int64_t* e = reinterpret_cast<const int64_t*>(block->edges) + 3 * (of[1] + (r < of[2] ? r : 0));
    return {e[0], e[1], e[2], r < of[2]};
  }
  NGK_DEVICE Edge edge(const Panel& panel, int64_t j, int r) const { return edge(panel, line, j, r); }

  NGK_DEVICE explicit Evaluator(const Args& args) : Base(args) {
    stash = placed_of_warp<float>(g.stash, this->sides() * g.n_slots * KB * FRAGMENTS) + lane() * 8;
    carry = placed_of_warp<Left>(g.carry, CARRIED * KB * LANES) + lane();
  }

  // What is evaluated from here on is of the edges (0) or of their partners (1).
  NGK_DEVICE void turn(int to) {
    if (!FULL || to == this->turned) return;
    const int64_t by = to - this->turned;
    this->turned = to;
    features += by * this->features_of_side();
    this->feature_gradients += by * this->features_of_side();
    hermite += by * this->features_of_side();
    stash += by * g.n_slots * KB * FRAGMENTS;
  }
  // Node terms of a node at this lane's columns, as destination (0) or as source (1); partners have them the other way about.
  NGK_DEVICE const float* node_terms(int of, int role) const {
    return g.nodes + ((role == side() ? 0 : g.n_nodes) + of) * g.columns + lane() % 4 * 2;
  }

  // ---- tiles: raw features arrive some tiles ahead; the numbers of edges in lists one more ----
  Tile coming;                   // the next tile to be fetched
  int64_t listed[2] = {-1, -1};  // of its edges in lists, the numbers of this lane's raw features and of its partner's; -1: none
  int fetched = 0;

  // Begins the tiles of a panel (Tile); none if `some` is false.
  NGK_DEVICE void begin(const Panel& panel, bool some, bool strips) {
    block = g.blocks + panel.block;
    coming = {panel.i0, panel.j0, some, strips};
    look_up(panel);
    NGK_ROLLED
    for (int k = 0; k < AHEAD; ++k) fetch(panel);
  }
  NGK_DEVICE void look_up(const Panel& panel) {
    if (!block->lines) return;
    const Edge e = coming.there ? edge(panel, line_of(block, coming.i), coming.j, lane() % 16) : Edge{};
    listed[0] = e.ok ? e.raw(block->raw_by) : -1;
    listed[1] = e.ok ? e.raw(block->partner_raw_by) : -1;
  }
  NGK_DEVICE void fetch(const Panel& panel) {
    NGK_ROLLED
    for (int x = 0; x < this->sides(); ++x) {
      const Values& raw = this->raw(x);
      char* to = this->arrival(fetched, x);
      if (!coming.there || !raw.data) continue;
      const int64_t edges = block->lines ? 0 : panel.j1 - coming.j;
      if (block->lines) {
        const int64_t number = x ? listed[1] : listed[0];
        if (lane() < 16 && number >= 0) fetch_edge(raw, panel.copy, line_of(block, coming.i)[0], number, lane(), g.channels, to);
      } else if (in_a_row(raw, g.channels)) {
        fetch_row(raw, panel.copy, coming.i, coming.j, static_cast<int>(edges < 16 ? edges : 16), g.channels, to);
      } else if (lane() < 16 && lane() < edges) {
        fetch_edge(raw, panel.copy, coming.i, coming.j + lane(), lane(), g.channels, to);
      }
    }
    copies_end();
    ++fetched;
    coming.next(panel);
    look_up(panel);
  }

  // The edges from sources j .. j + 15 (below j1) to destination i, or those of line i; with `there` false, from none. The tiles of a panel
  // come in the order in which they were fetched; the next one is fetched now.
  NGK_DEVICE void tile(const Panel& panel, int64_t i, int64_t j, bool there) {
    line = line_of(block, i);
    destination = static_cast<int>(line ? line[0] : i);
    const int64_t first = panel.copy * block->node_stride;
    node = static_cast<int>(block->dst + first + destination);
    NGK_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Edge e = edge(panel, j, lane() / 4 + 8 * h);
      ok[h] = there && e.ok;
      source_node[h] = static_cast<int>(block->src + first + e.source);
    }
    if (FULL) {
      const int64_t edges = line ? line[2] : panel.j1 - j;
      count = there ? static_cast<int>(edges < 16 ? edges : 16) : 0;
    }
    wait_for_copies<AHEAD - 1>();
    sync_warp();  // the copies of all lanes are there, and the last tile's features are read
    if (lane() < 16) {
      const Edge e = edge(panel, j, lane());
      const bool has_raw = there && e.ok && !(FULL && block->diagonal && e.source != destination);
      NGK_ROLLED
      for (int x = 0; x < this->sides(); ++x) {
        turn(x);
        const Values& raw = this->raw(x);
        const int skipped = !line && in_a_row(raw, g.channels) ? before(element_of(raw, panel.copy, destination, j, 0)) : 0;
        this->take_features(this->arrival(fetched - AHEAD, x) + skipped, has_raw);
      }
      turn(0);
    }
    sync_warp();
    fetch(panel);
  }

  // What the product of a stage is added to: columns 16 c .. of half h.
  NGK_DEVICE void start(const Stage& stage, int h, int c, float* v) const {
    const int at = h * D + c * 16;
    const float *own = node_terms(node, 0), *top = node_terms(source_node[0], 1), *bottom = node_terms(source_node[1], 1);
    NGK_UNROLL
    for (int n = 0; n < 2; ++n) {
      Two a{{0, 0}}, x{{0, 0}}, y{{0, 0}};
      if (stage.node >= 0) {
        a = load2(own + stage.node + at + 8 * n);
        x = load2(top + stage.node + at + 8 * n);
        y = load2(bottom + stage.node + at + 8 * n);
      } else if (stage.bias >= 0) {
        a = load2(constants + stage.bias + at + 8 * n + lane() % 4 * 2);
      }
      NGK_UNROLL
      for (int p = 0; p < 2; ++p) v[4 * n + p] = a.v[p] + x.v[p], v[4 * n + 2 + p] = a.v[p] + y.v[p];
    }
  }

  // Adds columns 16 c .. of a register times matrix number `matrix`.
  template <class A>
  NGK_DEVICE void product(int64_t matrix, int c, const A& a, float* v) const {
    const Element* w = matrices + (matrix * KB + c) * KB * FRAGMENTS + lane() * 8;
    NGK_UNROLL_IF(P::SHORT && (!FULL || KB <= 2))
    for (int k = 0; k < KB; ++k) P::multiply(v, a[k], P::right(w + k * FRAGMENTS));
  }

  // v of a stage, but for what was kept: columns 16 c .. of part h, from the register a (of partners: b).
  template <class A>
  NGK_DEVICE void fragment(const Stage& stage, int h, int c, const A& a, const A& b, float* v) const {
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
  template <class A>
  NGK_DEVICE Left next(const Stage& stage, int c, const A& a, const A& b) const {
    float v[8], d[8];
    fragment(stage, 0, c, a, b, v);
    finish(stage, c, v);
    if (stage.slot >= 0) store8(kept(stage.slot, c), v);
    if (stage.act >= 0) activate8(stage.act, v, d);
    return P::left(v);
  }

  // Which of the carried registers stage k leaves its own in, of a run from stage `first` on; a partner's is the next one. A message's
  // stages come after: then what partners had is free, and the state's register stays where it is.
  NGK_DEVICE int64_t carried(int first, int k) const {
    const int odd = (k - first) % 2;
    if (FULL) return 2 * odd + (first ? 1 : 0);
    return !first ? odd : odd ? 2 : 1 - g.edge_stages % 2;
  }
  // Stages first .. last - 1, of partners too as far as they are evaluated: the register that the next one reads. One fragment's code
  // serves all: unrolled, it is many times as long.
  NGK_DEVICE Register run(int first, int last) {
    Register own{carry}, other{carry};
    NGK_ROLLED
    for (int k = first; k < last; ++k) {
      Left* to = carry + carried(first, k) * KB * LANES;
      NGK_ROLLED
      for (int x = 0; x < 1 + (FULL && k < g.live); ++x) {
        turn(x);
        const Reads a(x ? other : own), b(x ? own : other);
        NGK_ROLLED
        for (int c = 0; c < KB; ++c) to[(x * KB + c) * LANES] = next(g.stages[k], c, a, b);
      }
      turn(0);
      own.at = to;
      other.at = to + KB * LANES;
    }
    return own;
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
      const Register a = part == 2 ? query : edge;
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
