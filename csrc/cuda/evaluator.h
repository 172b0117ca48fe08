// The evaluator of an edge expression: a warp takes 16 edges through its stages.
#pragma once

#include <type_traits>

#include "edges.h"
#include "register.h"

namespace ngk::cuda {

template <class P, int D, bool FULL>
struct Evaluator : Edges<P, D, FULL> {
  using Base = Edges<P, D, FULL>;
  using Base::column_of, Base::row_of, Base::side, Base::node, Base::source_node;
  using Base::KB, Base::FRAGMENTS, Base::g, Base::block, Base::constants, Base::features, Base::matrices;
  using typename Base::Element;
  using Left = typename P::Left;
  using Register = cuda::Register<Left>;
  // What a stage reads of the last one: all of it held by the lane, or fragment by fragment.
  using Reads = std::conditional_t<P::SHORT && !FULL, Held<Left, KB>, Register>;
  // A stage is read at once, as memory that is not the lane's own is read again after every store; with all options there are no registers
  // for it.
  using Own = std::conditional_t<FULL, const Stage&, const Stage>;
  static constexpr int CARRIED =
      FULL ? 4 : 3;  // registers: the last and the next one, and a state's while its message goes on; or partners'

  float* stash;
  Left* carry;

  NGK_DEVICE explicit Evaluator(const Args& args) : Base(args) {
    stash = placed_of_warp<float>(g.stash, this->sides() * g.n_slots * KB * FRAGMENTS) + lane() * 8;
    carry = placed_of_warp<Left>(g.carry, CARRIED * KB * LANES) + lane();
  }

  // What is evaluated from here on is of the edges (0) or of their partners (1).
  NGK_DEVICE void turn(int to) {
    if (FULL) stash += (to - this->turned) * g.n_slots * KB * FRAGMENTS;
    Base::turn(to);
  }
  // Node terms of a node, as destination (0) or as source (1); partners have them the other way about.
  NGK_DEVICE const float* node_terms(int of, int role) const { return g.nodes + ((role == side() ? 0 : g.n_nodes) + of) * g.columns; }

  // What the product of a stage is added to: columns 16 c .. of half h.
  NGK_DEVICE void start(const Stage& stage, int h, int c, float* v) const {
    const int at = h * D + c * 16;
    Four own[2] = {{{0, 0, 0, 0}}, {{0, 0, 0, 0}}}, other[2] = {{{0, 0, 0, 0}}, {{0, 0, 0, 0}}};
    if (stage.node >= 0) {
      own[0] = of_lane(node_terms(node[0], 0) + stage.node + at);
      own[1] = node[1] == node[0] ? own[0] : of_lane(node_terms(node[1], 0) + stage.node + at);
      NGK_UNROLL
      for (int r = 0; r < 2; ++r) other[r] = of_lane(node_terms(source_node[r], 1) + stage.node + at);
    } else if (stage.bias >= 0) {
      own[0] = own[1] = of_lane(constants + stage.bias + at);
    }
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) v[k] = own[k / 2 % 2].v[number_of(k)] + other[k / 2 % 2].v[number_of(k)];
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
        if (column < g.channels) v[k] = this->features_of(row_of(k))[column];
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
    for (int k = 0; k < 8; ++k) y[k] = layer_norm<Number>(y[k], m.mean[k / 2 % 2], m.scale[k / 2 % 2]);
  }
  // Columns 16 c .. of a vector among the constants, for both rows.
  NGK_DEVICE void by_column(int64_t place, int c, float* v) const {
    const Four own = of_lane(constants + place + c * 16);
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) v[k] = own.v[number_of(k)];
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
      const Own stage = g.stages[k];
      Left* to = carry + carried(first, k) * KB * LANES;
      NGK_ROLLED
      for (int x = 0; x < 1 + (FULL && k < g.live); ++x) {
        turn(x);
        const Reads a(x ? other : own), b(x ? own : other);
        NGK_ROLLED
        for (int c = 0; c < KB; ++c) to[(x * KB + c) * LANES] = next(stage, c, a, b);
      }
      turn(0);
      own.at = to;
      other.at = to + KB * LANES;
    }
    return own;
  }

  // The parts of fragment c of a message.
  struct Message {
    float e[8] = {}, shift[8] = {}, q[8] = {}, m[8];
  };
  NGK_DEVICE void message(int c, const Register& edge, const Register& query, Message* out) const {
    const int last = static_cast<int>(g.edge_stages) - 1;
    NGK_ROLLED
    for (int part = 0; part < 3; ++part) {  // one piece of code for all three
      if (part == 1 ? g.combine != FILM : part == 2 && (g.combine == PLAIN || g.combine == EMIT)) continue;
      const Register a = part == 2 ? query : edge;
      const Own stage = g.stages[part == 2 ? last + g.message_stages : last];
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
    for (int k = 0; k < 8; ++k) out->m[k] = combined<Number>(static_cast<int>(g.combine), out->e + k, out->shift[k], out->q[k]);
  }
  NGK_DEVICE int message_fragments() const { return static_cast<int>((g.width + 15) / 16); }
};

}  // namespace ngk::cuda
