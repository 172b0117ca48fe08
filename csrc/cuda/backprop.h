// The way back through an edge expression: every tile is evaluated again, and its gradients go down the stages.
//
// The warps of a block go in step. A stage's gradient is staged in shared memory, rounded, beside the register that the stage has read:
// their product over all edges of the block is the gradient of its matrix, and every warp adds up its part of it.
#pragma once

#include "sinks.h"

namespace ngk::cuda {

template <class P, int D, bool FULL>
struct Backprop : Sinks<P, D, FULL> {
  using Base = Sinks<P, D, FULL>;
  using Base::add_feature_gradients, Base::carry, Base::rows, Base::sink, Base::stage_gradient, Base::waits;
  using Base::KB, Base::FRAGMENTS, Base::LD, Base::g, Base::eval, Base::gradients, Base::staged;
  using typename Base::Element, typename Base::Left;

  // Buffers of staged rows: a gradient of the edges, of their partners (-1: they have none).
  struct Buffers {
    int64_t own, partners;
    NGK_DEVICE int64_t of(int side) const { return side ? partners : own; }
  };

  NGK_DEVICE Backprop(const Args& args, Evaluator<P, D, FULL>& e) : Base(args, e) {}

  // From the staged gradients of stage last - 1 (in buffers up and up + 1, ..) down to stage `first`.
  NGK_DEVICE void descend(int first, int last, int64_t top) const {
    Buffers up{top, -1};
    NGK_ROLLED
    for (int k = last - 2; k >= first && !g.stages[k + 1].mark; --k) {
      const Stage& upper = g.stages[k + 1];
      const int turn = (last - 2 - k) % 2;
      const Buffers down{g.free_buffers[turn], FULL && k < g.live ? g.partner_buffers[turn] : -1};
      if constexpr (FULL) {
        NGK_ROLLED
        for (int side = 0; side < 1 + (k < g.live); ++side) {
          eval.turn(side);
          below(upper, g.stages[k], up, down.of(side));
        }
        eval.turn(0);
      } else {
        below(upper, g.stages[k], up, down.own);
      }
      if (g.need_parameters && !(FULL && upper.source == FROM_NORM)) {
        sync_block();
        matrix_gradients(upper, up);
        sync_block();
      }
      up = down;
    }
    const Stage& lowest = g.stages[first];
    if (!lowest.groups || stopped(first, last)) return;
    NGK_ROLLED
    for (int side = 0; side < 1 + (FULL && up.partners >= 0); ++side) {
      eval.turn(side);
      if (lowest.source == FROM_FOURIER || beyond_table()) through_fourier(lowest, up.of(side));
      if (lowest.source == FROM_TABLE) sync_block();  // all have seen all weights
    }
    eval.turn(0);
  }
  // Of a stage that reads a register: its parts' gradients times what its edges have read, and their partners.
  NGK_DEVICE void matrix_gradients(const Stage& upper, Buffers up) const {
    NGK_ROLLED
    for (int h = 0; h < upper.halves; ++h) matrix_gradient(upper.gradient + h, up.own + h, g.inputs_buffer);
    if constexpr (FULL) {
      const bool both = up.partners >= 0, reverse = upper.reverse >= 0;
      if (both) matrix_gradient(upper.gradient, up.partners, g.partner_inputs);
      if (reverse) matrix_gradient(upper.reverse_gradient, up.own, g.partner_inputs);
      if (both && reverse) matrix_gradient(upper.reverse_gradient, up.partners, g.inputs_buffer);
    }
  }
  // Whether any warp has weights beyond the table.
  NGK_DEVICE bool beyond_table() const {
    sync_block();
    const int64_t size = eval.features_of_warp();
    return eval.beyond(eval.hermite_of(0) - warp() * size, WARPS * 16, size);
  }
  NGK_DEVICE bool stopped(int first, int last) const {
    for (int k = first; k < last; ++k)
      if (g.stages[k].mark) return true;
    return false;
  }

  // From the staged gradients of a stage to its features' matrices and frequencies' weights, D features at a time.
  NGK_DEVICE void through_fourier(const Stage& stage, int64_t up) const {
    NGK_ROLLED
    for (int group = 0; group < stage.groups; ++group) {
      NGK_ROLLED
      for (int c = 0; c < KB; ++c) {
        const int first = group * D + c * 16;
        if (g.need_parameters) P::stage(rows(g.inputs_buffer) + c * 16, LD, eval.fourier(stage, first, false).v);
        if (!g.need_raw) continue;
        float v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        NGK_ROLLED
        for (int h = 0; h < stage.halves; ++h) {
          const Element* w =
              eval.matrices + (static_cast<int64_t>(stage.back + group * stage.halves + h) * KB + c) * KB * FRAGMENTS + lane() * 8;
          NGK_ROLLED
          for (int k = 0; k < KB; ++k) P::multiply(v, P::staged(rows(up + h) + k * 16, LD), P::right(w + k * FRAGMENTS));
        }
        const Eight f = eval.fourier(stage, first, true);
        NGK_ROLLED
        for (int x = 0; x < g.channels; ++x) {
          float total[2] = {0, 0};
          NGK_UNROLL
          for (int k = 0; k < 8; ++k) {
            const int column = first + eval.column_of(k), q = column < stage.count ? column : column - stage.count;
            if (column >= 2 * stage.count) continue;
            const float b = eval.constants[stage.frequencies + (eval.direction() * stage.count + q) * g.channels + x];
            total[k / 2 % 2] = fmaf(v[k] * f.v[k], 6.283185307179586f * b, total[k / 2 % 2]);
          }
          add_feature_gradients(x, total);
        }
      }
      if (!g.need_parameters) continue;
      sync_block();
      NGK_ROLLED
      for (int h = 0; h < stage.halves; ++h) matrix_gradient(stage.gradient + group * stage.halves + h, up + h, g.inputs_buffer);
      sync_block();
    }
  }

  // From the staged gradients of a stage to those of the one below it.
  NGK_DEVICE void below(const Stage& upper, const Stage& stage, Buffers up, int64_t down) const {
    const int side = eval.side();
    const Slope slope = FULL && upper.source == FROM_NORM ? norm_slope(upper) : Slope{};
    NGK_ROLLED
    for (int c = 0; c < KB; ++c) {
      float v[8] = {0, 0, 0, 0, 0, 0, 0, 0}, x[8], d[8];
      if (FULL && upper.source == FROM_NORM) {
        through_norm(upper, slope, c, v);
      } else {
        NGK_ROLLED
        for (int h = 0; up.of(side) >= 0 && h < upper.halves; ++h) add_product(upper.back + h, up.of(side) + h, c, v);
        if (FULL && upper.reverse >= 0 && up.of(1 - side) >= 0) add_product(upper.reverse_back, up.of(1 - side), c, v);
      }
      if (stage.held && !(FULL && side && stage.held > g.live)) {  // partners have no gradient of what only edges add
        load8(waits(c), d);
        NGK_UNROLL
        for (int k = 0; k < 8; ++k) v[k] += d[k];
      }
      load8(eval.kept(stage.slot, c), x);
      const bool wanted = g.need_parameters && !(FULL && upper.source == FROM_NORM);
      const int64_t inputs = side ? g.partner_inputs : g.inputs_buffer;
      if (stage.mark) {
        if (wanted) P::stage(rows(inputs) + c * 16, LD, x);
        carry(c, v);
        continue;
      }
      if (stage.act >= 0) {
        activate8(stage.act, x, d);
        NGK_UNROLL
        for (int k = 0; k < 8; ++k) v[k] *= d[k];
      }
      if (FULL && stage.masked && eval.block->token) NGK_UNROLL
      for (int k = 0; k < 8; ++k) v[k] = 0;
      if (stage.add >= 0 || (FULL && stage.source == FROM_NORM)) store8(waits(c), v);
      if (wanted) P::stage(rows(inputs) + c * 16, LD, x);
      stage_gradient(stage, down, c, v);
      sink(stage, 0, c, v);
    }
  }
  // Adds columns 16 c .. of the staged rows of a buffer times matrix number `matrix`.
  NGK_DEVICE void add_product(int64_t matrix, int64_t buffer, int c, float* v) const {
    const Element* w = eval.matrices + (matrix * KB + c) * KB * FRAGMENTS + lane() * 8;
    NGK_ROLLED
    for (int k = 0; k < KB; ++k) P::multiply(v, P::staged(rows(buffer) + k * 16, LD), P::right(w + k * FRAGMENTS));
  }

  // ---- layer norms: d is gradient x weight, y the normalised register ----
  struct Slope {
    typename Evaluator<P, D, FULL>::Moments m;
    float total[2], along[2];  // mean(d), mean(d y) of this lane's rows
  };
  NGK_DEVICE Slope norm_slope(const Stage& upper) const {
    Slope s{eval.moments(upper), {0, 0}, {0, 0}};
    NGK_ROLLED
    for (int c = 0; c < KB; ++c) {
      float d[8], y[8];
      scaled_gradient(upper, s, c, d, y);
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) s.total[k / 2 % 2] += d[k], s.along[k / 2 % 2] += d[k] * y[k];
    }
    NGK_UNROLL
    for (int h = 0; h < 2; ++h) {
      s.total[h] = eval.over_row(s.total[h]) / static_cast<float>(upper.width);
      s.along[h] = eval.over_row(s.along[h]) / static_cast<float>(upper.width);
    }
    return s;
  }
  NGK_DEVICE void scaled_gradient(const Stage& upper, const Slope& s, int c, float* d, float* y) const {
    float w[8];
    eval.normalised(upper, s.m, c, y);
    eval.by_column(upper.weight, c, w);
    load8(waits(c), d);
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) d[k] *= w[k];
  }
  NGK_DEVICE void through_norm(const Stage& upper, const Slope& s, int c, float* v) const {
    float d[8], y[8];
    scaled_gradient(upper, s, c, d, y);
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) {
      const int h = k / 2 % 2;
      v[k] = c * 16 + eval.column_of(k) < upper.width ? layer_norm_back<Number>(d[k], y[k], s.total[h], s.along[h], s.m.scale[h]) : 0.0f;
    }
  }

  // Adds the product of staged gradients, transposed, and inputs over all edges of the block; 16 x 16 numbers at a time are one warp's.
  NGK_DEVICE void matrix_gradient(int64_t matrix, int64_t buffer, int64_t inputs) const {
    const Element *gz = staged + buffer * WARPS * 16 * LD, *x = staged + inputs * WARPS * 16 * LD;
    const bool shared = D < WIDEST || !g.staged.base;
    NGK_ROLLED
    for (int u = warp(); u < KB * KB; u += WARPS) {
      float* own = gradients + (matrix * KB * KB + u) * FRAGMENTS + lane() * 8;
      float acc[8] = {0, 0, 0, 0, 0, 0, 0, 0}, before[8];
      NGK_ROLLED
      for (int r = 0; r < WARPS; ++r)
        P::multiply(acc, P::left_transposed(gz + r * 16 * LD + u / KB * 16, LD, shared),
                    P::right_transposed(x + r * 16 * LD + u % KB * 16, LD, shared));
      load8(own, before);
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) acc[k] += before[k];
      store8(own, acc);
    }
  }
};

}  // namespace ngk::cuda
