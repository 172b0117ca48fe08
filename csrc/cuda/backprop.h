// The way back through an edge expression: every tile is evaluated again, and its gradients go down the stages.
//
// The warps of a block go in step. A stage's gradient is staged in shared memory, rounded, beside the register that the stage has read:
// their product over all edges of the block is the gradient of its matrix, and every warp adds up its part of it.
#pragma once

#include "sinks.h"

namespace ngk::cuda {

template <class P, int D>
struct Backprop : Sinks<P, D> {
  using Base = Sinks<P, D>;
  using Base::add_feature_gradients, Base::carry, Base::rows, Base::sink, Base::stage_gradient;
  using Base::KB, Base::FRAGMENTS, Base::LD, Base::g, Base::eval, Base::waiting, Base::gradients, Base::staged;
  using typename Base::Element, typename Base::Left;

  NGK_DEVICE Backprop(const Args& args, const Evaluator<P, D>& e) : Base(args, e) {}

  // From the staged gradients of stage last - 1 (in buffers up and up + 1) down to stage `first`.
  NGK_DEVICE void descend(int first, int last, int64_t up) const {
    NGK_ROLLED
    for (int k = last - 2; k >= first && !g.stages[k + 1].mark; --k) {
      const Stage& upper = g.stages[k + 1];
      const int64_t down = g.free_buffers[(last - 2 - k) % 2];
      below(upper, g.stages[k], up, down);
      if (g.need_parameters) {
        sync_block();
        NGK_ROLLED
        for (int h = 0; h < upper.halves; ++h) matrix_gradient(upper.gradient + h, up + h);
        sync_block();
      }
      up = down;
    }
    const Stage& lowest = g.stages[first];
    if (!lowest.groups || stopped(first, last)) return;
    if (lowest.source == FROM_FOURIER || beyond_table()) through_fourier(lowest, up);
    if (lowest.source == FROM_TABLE) sync_block();  // all have seen all weights
  }
  // Whether any warp has weights beyond the table.
  NGK_DEVICE bool beyond_table() const {
    sync_block();
    const int64_t size = eval.features_of_warp();
    return eval.beyond(eval.hermite - warp() * size, WARPS * 16, size);
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
            const float b = eval.constants[stage.frequencies + (eval.block->direction * stage.count + q) * g.channels + x];
            total[k / 2 % 2] = fmaf(v[k] * f.v[k], 6.283185307179586f * b, total[k / 2 % 2]);
          }
          add_feature_gradients(x, total);
        }
      }
      if (!g.need_parameters) continue;
      sync_block();
      NGK_ROLLED
      for (int h = 0; h < stage.halves; ++h) matrix_gradient(stage.gradient + group * stage.halves + h, up + h);
      sync_block();
    }
  }

  NGK_DEVICE void below(const Stage& upper, const Stage& stage, int64_t up, int64_t down) const {
    Left a[2][KB];
    NGK_UNROLL
    for (int h = 0; h < 2; ++h) NGK_UNROLL
    NGK_ROLLED
    for (int k = 0; k < KB; ++k)
      if (h < upper.halves) a[h][k] = P::staged(rows(up + h) + k * 16, LD);
    NGK_ROLLED
    for (int c = 0; c < KB; ++c) {
      float v[8] = {0, 0, 0, 0, 0, 0, 0, 0}, x[8], d[8];
      NGK_UNROLL
      for (int h = 0; h < 2; ++h) {
        if (h >= upper.halves) break;
        const Element* w = eval.matrices + (static_cast<int64_t>(upper.back + h) * KB + c) * KB * FRAGMENTS + lane() * 8;
        NGK_UNROLL
        for (int k = 0; k < KB; ++k) P::multiply(v, a[h][k], P::right(w + k * FRAGMENTS));
      }
      if (stage.held) {
        load8(waiting + c * FRAGMENTS, d);
        NGK_UNROLL
        for (int k = 0; k < 8; ++k) v[k] += d[k];
      }
      load8(eval.kept(stage.slot, c), x);
      if (stage.mark) {
        carry(c, v);
        if (g.need_parameters) P::stage(rows(g.inputs_buffer) + c * 16, LD, x);
        continue;
      }
      if (stage.act >= 0) {
        activate8(stage.act, x, d);
        NGK_UNROLL
        for (int k = 0; k < 8; ++k) v[k] *= d[k];
      }
      if (stage.add >= 0) store8(waiting + c * FRAGMENTS, v);
      if (g.need_parameters) P::stage(rows(g.inputs_buffer) + c * 16, LD, x);
      stage_gradient(stage, down, c, v);
      sink(stage, 0, c, v);
    }
  }

  // Adds the product of staged gradients, transposed, and inputs over all edges of the block; 16 x 16 numbers at a time are one warp's.
  NGK_DEVICE void matrix_gradient(int64_t matrix, int64_t buffer) const {
    const Element *gz = staged + buffer * WARPS * 16 * LD, *x = staged + g.inputs_buffer * WARPS * 16 * LD;
    NGK_ROLLED
    for (int u = warp(); u < KB * KB; u += WARPS) {
      float* own = gradients + (matrix * KB * KB + u) * FRAGMENTS + lane() * 8;
      float acc[8];
      load8(own, acc);
      NGK_UNROLL
      for (int r = 0; r < WARPS; ++r)
        P::multiply(acc, P::left_transposed(gz + r * 16 * LD + u / KB * 16, LD), P::right_transposed(x + r * 16 * LD + u % KB * 16, LD));
      store8(own, acc);
    }
  }
};

}  // namespace ngk::cuda
