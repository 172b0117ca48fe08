// Backward of attend: the gradients of a tile's shares and states, and then down the stages.
#pragma once

#include "attention.h"
#include "backprop.h"
#include "walk.h"

namespace ngk::cuda {

template <class P, int D>
struct AttendBack : Backprop<P, D, true> {
  using Base = Backprop<P, D, true>;
  using Eval = Evaluator<P, D, true>;
  using Base::eval, Base::g, Base::KB, Base::panel, Base::sink, Base::stage_gradient;
  using Part = typename Attention<P, D>::Part;
  using Register = typename Eval::Register;

  Attention<P, D> of;

  NGK_DEVICE AttendBack(const Args& args, Eval& e) : Base(args, e), of(args, e) {}

  NGK_DEVICE void from_result(const Register& e) const {
    of.logits(e);
    of.by_head([&](int at, int r, int h) {
      of.p[at] = eval.has(r) ? expf(of.p[at] - g.lse[output_row(r) * of.heads + h]) : 0.0f;
      of.weight[at] = eval.has(r) ? of.dropped(of.p[at], *panel, r, h) : 0.0f;
    });
    value_products(e);
    sync_warp();
    of.by_head([&](int at, int r, int h) { of.slope[at] = of.head_sum(r, h, g.dv); });
    sync_warp();
    if (g.summed) state_products();
    of.by_head([&](int at, int r, int h) {
      const float delta = g.delta[output_row(r) * of.heads + h];
      of.slope[at] = eval.has(r) ? softmax_back(of.weight[at], of.slope[at], of.p[at], delta, of.scale) : 0.0f;
    });
    sync_warp();
    share_gradients(e);
    if (g.summed) state_gradients();
    sync_warp();  // all have read what the next tile overwrites
  }

 private:
  // Of the destination of a row of the tile; of this lane's rows.
  NGK_DEVICE int64_t output_row(int r) const { return eval.output_row(*panel, eval.edge(*panel, r).destination); }
  NGK_DEVICE int64_t own_row(int h) const { return eval.output_row(*panel, eval.destination[h]); }
  // The gradient of the result, columns 16 c ..
  NGK_DEVICE void result_gradient(int c, float* v) const {
    const float* grad[2] = {g.grad_out + own_row(0) * of.d_v, g.grad_out + own_row(1) * of.d_v};
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) v[k] = c * 16 + Eval::column_of(k) < of.d_v ? grad[k / 2 % 2][c * 16 + Eval::column_of(k)] : 0.0f;
  }
  // That of a head's sums of states, of the destination of row h of this lane.
  NGK_DEVICE const float* sums_gradient(int h, int head) const { return g.grad_sums + (own_row(h) * of.heads + head) * g.de; }
  NGK_DEVICE void value_products(const Register& e) const {
    NGK_ROLLED
    for (int c = 0; c < of.fragments(of.d_v); ++c) {
      float v[8], factor[8], x[8];
      of.value(c, e, v, factor);
      result_gradient(c, x);
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) x[k] *= v[k] * factor[k];
      of.put(c, x);
    }
  }
  // What the sums of states add to the gradients of the exponentials.
  NGK_DEVICE void state_products() const {
    NGK_ROLLED
    for (int h = 0; h < of.heads; ++h) {
      const float* grad[2] = {sums_gradient(0, h), sums_gradient(1, h)};
      float total[2] = {0, 0};
      NGK_ROLLED
      for (int c = 0; c < KB; ++c) {
        float e[8];
        load8(eval.kept(of.state().slot, c), e);
        NGK_UNROLL
        for (int k = 0; k < 8; ++k)
          if (c * 16 + Eval::column_of(k) < g.de)
            total[k / 2 % 2] = fmaf(grad[k / 2 % 2][c * 16 + Eval::column_of(k)], e[k], total[k / 2 % 2]);
      }
      NGK_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float all = eval.over_row(total[r]);
        if (lane() % 4 == 0) of.slope[(lane() / 4 + 8 * r) * of.heads + h] += all;
      }
    }
    sync_warp();
  }
  NGK_DEVICE void state_gradients() const {
    NGK_ROLLED
    for (int c = 0; c < KB; ++c) {
      float v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      NGK_ROLLED
      for (int h = 0; h < of.heads; ++h) {
        const float* grad[2] = {sums_gradient(0, h), sums_gradient(1, h)};
        NGK_UNROLL
        for (int k = 0; k < 8; ++k)
          if (c * 16 + Eval::column_of(k) < g.de)
            v[k] = fmaf(of.weight[Eval::row_of(k) * of.heads + h], grad[k / 2 % 2][c * 16 + Eval::column_of(k)], v[k]);
      }
      store8(this->waits(c), v);
    }
  }

  // Puts the gradients of the shares down, and adds those of q, k and v to their nodes'.
  NGK_DEVICE void share_gradients(const Register& e) const {
    NGK_ROLLED
    for (int c = 0; c < KB; ++c) {
      float a[8] = {0, 0, 0, 0, 0, 0, 0, 0}, b[8] = {0, 0, 0, 0, 0, 0, 0, 0}, s[8];
      if (c < of.fragments(of.d)) {
        of.query(c, e, a);
        of.key(c, e, b);
        of.spread(of.slope, g.dk, of.d, c, s);
        NGK_UNROLL
        for (int k = 0; k < 8; ++k) {
          const float x = eval.ok[k / 2 % 2] ? s[k] : 0.0f, y = a[k];
          a[k] = eval.ok[k / 2 % 2] ? x * b[k] : 0.0f;
          b[k] = eval.ok[k / 2 % 2] ? x * y : 0.0f;
        }
      }
      put_down(Part::QUERY, c, a);
      put_down(Part::KEY, c, b);
      this->to_destination(g.attention_columns + c * 16, a);
      this->to_sources(g.attention_columns + c * 16, b);
      value_gradients(c, e);
    }
  }
  NGK_DEVICE void value_gradients(int c, const Register& e) const {
    float v[8] = {0, 0, 0, 0, 0, 0, 0, 0}, factor[8] = {0, 0, 0, 0, 0, 0, 0, 0}, x[8], w[8];
    if (c < of.fragments(of.d_v)) {
      of.value(c, e, v, factor);
      result_gradient(c, x);
      of.spread(of.weight, g.dv, of.d_v, c, w);
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) {
        const float y = w[k] * x[k], z = v[k];
        v[k] = eval.ok[k / 2 % 2] ? y * factor[k] : 0.0f;
        factor[k] = eval.ok[k / 2 % 2] ? y * z : 0.0f;
      }
    }
    this->to_sources(g.attention_columns + D + c * 16, v);
    if (g.multiply) put_down(Part::VALUE, c, factor);
  }
  NGK_DEVICE void put_down(Part part, int c, const float* v) const {
    stage_gradient(of.share(), part, c, v);
    sink(of.share(), part, c, v);
  }
};

template <class P, int D>
struct AttendBackward {
  static constexpr bool TOGETHER = true;

  static NGK_DEVICE void run(const Args& g) {
    Evaluator<P, D, true> eval(g);
    AttendBack<P, D> back(g, eval);
    Walk walk(g, eval);
    NGK_ROLLED
    for (int at = 0; at < walk.most; ++at) {
      walk.enter(at, eval, back);
      const int edges = static_cast<int>(g.edge_stages);
      const auto e = eval.run(0, edges - 1);
      back.from_result(e);
      back.descend(0, edges, 0);
      walk.leave(at, back);
    }
    if (g.need_parameters) back.write_parameters();
  }
};

}  // namespace ngk::cuda
