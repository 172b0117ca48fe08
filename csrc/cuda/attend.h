// Forward of attend: each warp takes the softmax sums of a panel, tile by tile, to partial rows, one of each destination:
// [top heads | total heads | sums of values | sums of states by head], the largest logit and sums of exponentials of what lies below it.
#pragma once

#include "attention.h"

namespace ngk::cuda {

template <class P, int D>
struct Gathering : Attention<P, D> {
  using Base = Attention<P, D>;
  using Base::fragments, Base::heads, Base::KB, Base::p, Base::weight;
  using typename Base::Register;

  float *top, *total, *shrink;  // [heads]: of the destination that goes on; what its sums are scaled down with
  float *highest, *sums;  // [16][heads]; [fragments of values, then of each head's states][lanes, 4 columns], of each lane its own rows

  NGK_DEVICE Gathering(const Args& args, const typename Base::Eval& e) : Base(args, e) {
    highest = this->slope;
    top = highest + 16 * heads;
    total = top + heads;
    shrink = total + heads;
    sums = placed_of_warp<float>(args.statistics, pieces() * LANES * 4) + lane() * 4;
  }
  NGK_DEVICE int64_t pieces() const { return fragments(this->d_v) + (this->g.summed ? heads * KB : 0); }

  // The tile joins the sums of its destinations.
  NGK_DEVICE void join(const Panel& panel, const Register& e) const {
    this->logits(e);
    NGK_ROLLED
    for (int h = lane(); h < heads; h += LANES) find_highest(h);
    sync_warp();
    this->by_head([&](int at, int row, int head) {
      const float base = highest[at] == -INFINITY ? 0.0f : highest[at];
      p[at] = this->eval.has(row) ? expf(p[at] - base) : 0.0f;
      weight[at] = this->eval.has(row) ? this->dropped(p[at], panel, row, head) : 0.0f;
    });
    sync_warp();
    NGK_ROLLED
    for (int h = lane(); h < heads; h += LANES) add_total(panel, h);
    add_values(panel, e);
    if (this->g.summed) add_states(panel);
  }

 private:
  NGK_DEVICE float* row_of(const Panel& panel, const Run& run) const { return this->g.partial + (panel.rows_i + run.row) * this->g.width; }

  NGK_DEVICE void find_highest(int h) const {
    this->eval.by_destination([&](const Run& run) {
      const float before = run.begins ? -INFINITY : top[h];
      float high = before;
      for (int row = run.first; row < run.end; ++row)
        if (this->eval.has(row) && p[row * heads + h] > high) high = p[row * heads + h];
      for (int row = run.first; row < run.end; ++row) highest[row * heads + h] = high;
      if (!run.begins) shrink[h] = expf(before - (high == -INFINITY ? 0.0f : high));
      top[h] = high;
    });
  }
  NGK_DEVICE void add_total(const Panel& panel, int h) const {
    this->eval.by_destination([&](const Run& run) {
      float sum = run.begins ? 0.0f : total[h] * shrink[h];
      for (int row = run.first; row < run.end; ++row) sum += p[row * heads + h];
      total[h] = sum;
      if (!run.ends) return;
      float* to = row_of(panel, run);
      to[h] = highest[run.first * heads + h];
      to[heads + h] = sum;
    });
  }

  NGK_DEVICE void add_values(const Panel& panel, const Register& e) const {
    NGK_ROLLED
    for (int c = 0; c < fragments(this->d_v); ++c) {
      float v[8], factor[8], w[8];
      this->value(c, e, v, factor);
      this->spread(weight, this->g.dv, this->d_v, c, w);
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) v[k] = v[k] * factor[k];
      gather(panel, c, w, v, [&](int column) { return column < this->d_v ? shrink[column / this->g.dv] : 0.0f; }, c, 0, this->d_v);
    }
  }
  NGK_DEVICE void add_states(const Panel& panel) const {
    const int de = static_cast<int>(this->g.de);
    NGK_ROLLED
    for (int h = 0; h < heads; ++h) {
      float w[8];
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) w[k] = weight[Base::Eval::row_of(k) * heads + h];
      NGK_ROLLED
      for (int c = 0; c < KB; ++c) {
        float v[8];
        load8(this->eval.kept(this->state().slot, c), v);
        gather(panel, fragments(this->d_v) + h * KB + c, w, v, [&](int) { return shrink[h]; }, c, this->d_v + h * de, de);
      }
    }
  }
  // Piece k of the sums of each destination: scaled down, and w v of this lane's two rows added. Where it ends, columns 16 c .. of `width`
  // go to place `to` of its partial row.
  template <class F>
  NGK_DEVICE void gather(const Panel& panel, int k, const float* w, const float* v, F&& by, int c, int to, int width) const {
    this->eval.by_destination([&](const Run& run) {
      Four own{{0, 0, 0, 0}};
      if (!run.begins) own = load4(sums + k * LANES * 4);
      NGK_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (!run.begins) own.v[e] *= by(c * 16 + e / 2 * 8 + lane() % 4 * 2 + e % 2);
        NGK_UNROLL
        for (int h = 0; h < 2; ++h) {
          const int at = e / 2 * 4 + h * 2 + e % 2;
          if (this->eval.ok[h] && run.has(lane() / 4 + 8 * h)) own.v[e] = fmaf(w[at], v[at], own.v[e]);
        }
      }
      if (run.ends) {
        write_piece(row_of(panel, run) + 2 * heads + to, c, width, own);
      } else {
        store4(sums + k * LANES * 4, own);
      }
    });
  }
  // Sums over the lanes.
  NGK_DEVICE void write_piece(float* to, int c, int width, Four x) const {
    NGK_UNROLL
    for (int e = 0; e < 4; ++e) {
      NGK_UNROLL
      for (int mask = 4; mask < LANES; mask *= 2) x.v[e] += shuffle_xor(x.v[e], mask);
      const int column = c * 16 + e / 2 * 8 + lane() % 4 * 2 + e % 2;
      if (lane() < 4 && column < width) to[column] = x.v[e];
    }
  }
};

template <class P, int D>
struct AttendForward {
  static constexpr bool TOGETHER = true;

  static NGK_DEVICE void run(const Args& g) {
    Evaluator<P, D, true> eval(g);
    const int64_t number = g.first_panel + block() * WARPS + warp();
    if (number >= g.n_panels) return;
    const Panel& panel = g.panels[number];
    eval.begin(panel, true, false);
    const Gathering<P, D> gathering(g, eval);
    NGK_ROLLED
    for (int64_t i = panel.i0; i < panel.i1; i += eval.block->step()) {
      NGK_ROLLED
      for (int64_t j = panel.j0; j < panel.j1; j += 16) {
        eval.tile(panel, i, j, true);
        const auto e = eval.run(0, static_cast<int>(g.edge_stages) - 1);
        gathering.join(panel, e);
      }
    }
  }
};

}  // namespace ngk::cuda
