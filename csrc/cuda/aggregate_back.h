// Backward of aggregate and of evaluate: the gradients of a tile's messages, or of its values, and then down the stages.
#pragma once

#include "backprop.h"

namespace ngk::cuda {

template <class P, int D>
struct MessageBack : Backprop<P, D> {
  using Base = Backprop<P, D>;
  using Base::carry, Base::sink, Base::stage_gradient;
  using Base::KB, Base::FRAGMENTS, Base::g, Base::eval, Base::panel, Base::waiting;
  using typename Base::Left;

  NGK_DEVICE MessageBack(const Args& args, const Evaluator<P, D>& e) : Base(args, e) {}

  // The gradient of what was written out, to the last stage and its staged rows.
  NGK_DEVICE void from_values() const {
    const Stage& last = g.stages[g.edge_stages - 1];
    const Values& from = eval.block->values;
    NGK_ROLLED
    for (int c = 0; c < KB; ++c) {
      float e[8];
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) {
        const int column = c * 16 + eval.column_of(k);
        const bool there = eval.ok[k / 2 % 2] && column < g.width && from.data;
        e[k] = there ? read_value<float>(element_of(from, panel->copy, eval.destination, eval.place[k / 2 % 2], column),
                                         static_cast<Dtype>(from.dtype))
                     : 0.0f;
      }
      if (last.mark) {
        carry(c, e);
        continue;
      }
      if (last.add >= 0) store8(waiting + c * FRAGMENTS, e);
      stage_gradient(last, 0, c, e);
      sink(last, 0, c, e);
    }
  }

  // Gradients of the messages by their destination's coefficients, to the last stages and their staged rows.
  NGK_DEVICE void from_messages(const Left* edge, const Left* query) const {
    const Stage& last = g.stages[g.edge_stages - 1];
    const Stage& last_query = g.stages[g.edge_stages + g.message_stages - (g.message_stages ? 1 : 0)];
    const int stride = 16 * eval.message_fragments();
    const float* k = g.coefficients + (eval.block->out + panel->copy * eval.block->out_stride + eval.destination) * MESSAGE_PLANES * stride;
    NGK_ROLLED
    for (int c = 0; c < KB; ++c) {
      float e[8] = {0, 0, 0, 0, 0, 0, 0, 0}, shift[8] = {0, 0, 0, 0, 0, 0, 0, 0}, query_gradient[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      if (c * 16 < stride) {
        typename Evaluator<P, D>::Message m;
        eval.message(c, edge, query, &m);
        NGK_UNROLL
        for (int x = 0; x < 8; ++x) {
          const float* own = k + c * 16 + eval.column_of(x);
          float d = fmaf(own[stride], m.m[x] - own[2 * stride], own[0]);
          if (g.low && m.m[x] == own[3 * stride]) d += own[4 * stride];
          if (g.high && m.m[x] == own[5 * stride]) d += own[6 * stride];
          if (!eval.ok[x / 2 % 2]) d = 0;
          shift[x] = d;
          e[x] = g.combine == PLAIN ? d : d * m.q[x];
          if (g.combine == GATE) e[x] *= m.e[x] * (1.0f - m.e[x]);
          if (g.combine != PLAIN) query_gradient[x] = eval.ok[x / 2 % 2] ? d * m.e[x] : 0.0f;
          if (!eval.ok[x / 2 % 2]) e[x] = 0;
        }
      }
      sink(last, 0, c, e);
      stage_gradient(last, 0, c, e);
      if (g.combine == FILM) {
        sink(last, 1, c, shift);
        stage_gradient(last, 1, c, shift);
      }
      if (g.combine == PLAIN) continue;
      sink(last_query, 0, c, query_gradient);
      stage_gradient(last_query, g.message_buffer, c, query_gradient);
    }
  }
};

template <class P, int D>
struct AggregateBackward {
  static constexpr bool TOGETHER = true;
  static NGK_DEVICE int64_t tiles(const Panel& p) { return (p.i1 - p.i0) * ((p.j1 - p.j0 + 15) / 16); }

  static NGK_DEVICE void run(const Args& g) {
    Evaluator<P, D> eval(g);
    MessageBack<P, D> back(g, eval);
    const int64_t first = g.first_panel + block() * WARPS, number = first + warp();
    int64_t most = 0;
    NGK_ROLLED
    for (int w = 0; w < WARPS; ++w)
      if (first + w < g.n_panels && tiles(g.panels[first + w]) > most) most = tiles(g.panels[first + w]);
    const Panel& panel = g.panels[number < g.n_panels ? number : first];
    const bool lines = g.blocks[panel.block].lines;  // each of them is a strip of its own
    const int64_t own = number < g.n_panels ? tiles(panel) : 0, height = lines ? 1 : panel.i1 - panel.i0;
    back.panel = &panel;
    NGK_ROLLED
    for (int64_t at = 0; at < most; ++at) {
      back.active = at < own;
      back.number = at;
      back.strip = back.active ? at / height : 0;
      back.i = !back.active ? panel.i0 : lines ? panel.i0 + at : panel.i0 + at % height;
      back.source = lines ? 0 : panel.j0 + back.strip * 16;
      if (at % height == 0) back.clear_sources();
      eval.tile(panel, back.i, back.source, back.active);
      back.clear_features();
      typename P::Left edge[D / 16], query[D / 16];
      const int edges = static_cast<int>(g.edge_stages), all = static_cast<int>(g.edge_stages + g.message_stages);
      eval.run(0, edges - 1, edge);
      eval.run(edges, all - 1, query);
      if (g.combine == EMIT) {
        back.from_values();
      } else {
        back.from_messages(edge, query);
      }
      if (g.message_stages) back.descend(edges, all, g.message_buffer);
      back.descend(0, edges, 0);
      back.write_features();
      if (back.active && (at + 1) % height == 0) back.write_sources();
    }
    if (g.need_parameters) back.write_parameters();
  }
};

}  // namespace ngk::cuda
