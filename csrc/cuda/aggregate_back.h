// Backward of aggregate and of evaluate: the gradients of a tile's messages, or of its values, and then down the stages.
#pragma once

#include "backprop.h"
#include "walk.h"

namespace ngk::cuda {

template <class P, int D, bool FULL>
struct MessageBack : Backprop<P, D, FULL> {
  using Base = Backprop<P, D, FULL>;
  using Register = typename Evaluator<P, D, FULL>::Register;
  using Base::carry, Base::sink, Base::stage_gradient;
  using Base::KB, Base::g, Base::eval, Base::panel, Base::waits;

  NGK_DEVICE MessageBack(const Args& args, Evaluator<P, D, FULL>& e) : Base(args, e) {}

  // The gradient of what was written out, to the last stage and its staged rows.
  NGK_DEVICE void from_values() const {
    const Stage& last = g.stages[g.edge_stages - 1];
    NGK_ROLLED
    for (int c = 0; c < KB; ++c) {
      Eight values = eval.read_values(eval.block->values, *panel, c, g.width);
      float* e = values.v;
      if (last.mark) {
        carry(c, e);
        continue;
      }
      if (FULL && last.masked && eval.block->token) NGK_UNROLL
      for (int k = 0; k < 8; ++k) e[k] = 0;
      if (last.add >= 0 || (FULL && last.source == FROM_NORM)) store8(waits(c), e);
      stage_gradient(last, 0, c, e);
      sink(last, 0, c, e);
    }
  }

  // Gradients of the messages by their destination's coefficients, to the last stages and their staged rows.
  NGK_DEVICE void from_messages(const Register& edge, const Register& query) const {
    const Stage& last = g.stages[g.edge_stages - 1];
    const Stage& last_query = g.stages[g.edge_stages + g.message_stages - (g.message_stages ? 1 : 0)];
    const int stride = 16 * eval.message_fragments();
    const float* of[2] = {coefficients(0, stride), coefficients(1, stride)};
    NGK_ROLLED
    for (int c = 0; c < KB; ++c) {
      float e[8] = {0, 0, 0, 0, 0, 0, 0, 0}, shift[8] = {0, 0, 0, 0, 0, 0, 0, 0}, query_gradient[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      if (c * 16 < stride) {
        typename Evaluator<P, D, FULL>::Message m;
        eval.message(c, edge, query, &m);
        NGK_UNROLL
        for (int h = 0; h < 2; ++h) slopes(of[h] + c * 16, stride, m.m + 2 * h, shift + 2 * h);
        NGK_UNROLL
        for (int x = 0; x < 8; ++x) {
          if (!eval.ok[x / 2 % 2]) shift[x] = 0;
          e[x] = combined_back<Number>(static_cast<int>(g.combine), shift[x], m.e[x], m.q[x], query_gradient + x);
          if (!eval.ok[x / 2 % 2]) e[x] = query_gradient[x] = 0;
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

 private:
  // Of the destination of row h of this lane.
  NGK_DEVICE const float* coefficients(int h, int stride) const {
    return g.coefficients + eval.output_row(*panel, eval.destination[h]) * MESSAGE_PLANES * stride;
  }
  // The gradients of this lane's columns of a message, whose numbers m[number_of(k)] and d[..] are.
  NGK_DEVICE void slopes(const float* own, int stride, const float* m, float* d) const {
    const Four constant = of_lane(own), slope = of_lane(own + stride), mean = of_lane(own + 2 * stride);
    Four low{{0, 0, 0, 0}}, low_share = low, high = low, high_share = low;
    if (g.low) low = of_lane(own + 3 * stride), low_share = of_lane(own + 4 * stride);
    if (g.high) high = of_lane(own + 5 * stride), high_share = of_lane(own + 6 * stride);
    NGK_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int k = e / 2 * 4 + e % 2;
      d[k] = spread_back<Number>(m[k], constant.v[e], slope.v[e], mean.v[e]);
      if (g.low) d[k] = extreme_back<Number>(m[k], low.v[e], low_share.v[e], d[k]);
      if (g.high) d[k] = extreme_back<Number>(m[k], high.v[e], high_share.v[e], d[k]);
    }
  }
};

template <class P, int D, bool FULL>
struct AggregateBackward {
  static constexpr bool TOGETHER = true;

  static NGK_DEVICE void run(const Args& g) {
    Evaluator<P, D, FULL> eval(g);
    MessageBack<P, D, FULL> back(g, eval);
    Walk walk(g, eval);
    NGK_ROLLED
    for (int at = 0; at < walk.most; ++at) {
      walk.enter(at, eval, back);
      const int edges = static_cast<int>(g.edge_stages), all = static_cast<int>(g.edge_stages + g.message_stages);
      const auto edge = eval.run(0, edges - 1);
      const auto query = eval.run(edges, all - 1);
      if (g.combine == EMIT) {
        back.from_values();
      } else {
        back.from_messages(edge, query);
      }
      if (g.message_stages) back.descend(edges, all, g.message_buffer);
      back.descend(0, edges, 0);
      walk.leave(at, back);
    }
    if (g.need_parameters) back.write_parameters();
  }
};

}  // namespace ngk::cuda
