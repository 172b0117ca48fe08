// Forward of attend: each warp takes the softmax sums of a panel's destinations, one after the other, to partial rows
// [top heads | total heads | sums of values | sums of states by head], the largest logit and sums of exponentials of what lies below it.
#pragma once

#include "attention.h"

namespace ngk::cuda {

template <class P, int D>
struct Gathering : Attention<P, D> {
  using Base = Attention<P, D>;
  using Base::fragments, Base::heads, Base::KB, Base::p, Base::weight;
  using typename Base::Register;

  float *top, *total, *shrink;  // [heads]
  float* sums;                  // [fragments of values, then of each head's states][lanes, 4 columns], of each lane its own rows

  NGK_DEVICE Gathering(const Args& args, const typename Base::Eval& e) : Base(args, e) {
    top = this->slope + 16 * heads;
    total = top + heads;
    shrink = total + heads;
    sums = placed_of_warp<float>(args.statistics, pieces() * LANES * 4) + lane() * 4;
  }
  NGK_DEVICE int64_t pieces() const { return fragments(this->d_v) + (this->g.summed ? heads * KB : 0); }

  NGK_DEVICE void clear() const {
    sync_warp();
    NGK_ROLLED
    for (int h = lane(); h < heads; h += LANES) top[h] = -INFINITY, total[h] = 0;
    NGK_ROLLED
    for (int64_t k = 0; k < pieces(); ++k) store4(sums + k * LANES * 4, {{0, 0, 0, 0}});
    sync_warp();
  }

  // The tile joins the sums of its destination.
  NGK_DEVICE void join(const Panel& panel, int64_t source, const Register& e) const {
    this->logits(e);
    NGK_ROLLED
    for (int h = lane(); h < heads; h += LANES) {
      float high = top[h];
      for (int row = 0; row < this->eval.count; ++row) high = p[row * heads + h] > high ? p[row * heads + h] : high;
      const float base = high == -INFINITY ? 0.0f : high;
      shrink[h] = expf(top[h] - base);
      top[h] = high;
      total[h] *= shrink[h];
    }
    sync_warp();
    this->by_head([&](int at, int row, int head) {
      const float base = top[head] == -INFINITY ? 0.0f : top[head];
      p[at] = row < this->eval.count ? expf(p[at] - base) : 0.0f;
      weight[at] = this->dropped(p[at], panel, source, row, head);
    });
    sync_warp();
    NGK_ROLLED
    for (int h = lane(); h < heads; h += LANES)
      for (int row = 0; row < 16; ++row) total[h] += p[row * heads + h];
    add_values(e);
    if (this->g.summed) add_states();
  }

  NGK_DEVICE void add_values(const Register& e) const {
    NGK_ROLLED
    for (int c = 0; c < fragments(this->d_v); ++c) {
      float v[8], factor[8], w[8];
      this->value(c, e, v, factor);
      this->spread(weight, this->g.dv, this->d_v, c, w);
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) v[k] = v[k] * factor[k];
      gather(c, w, v, [&](int column) { return column < this->d_v ? shrink[column / this->g.dv] : 0.0f; }, c);
    }
  }
  NGK_DEVICE void add_states() const {
    NGK_ROLLED
    for (int h = 0; h < heads; ++h) {
      float w[8];
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) w[k] = weight[Base::Eval::row_of(k) * heads + h];
      NGK_ROLLED
      for (int c = 0; c < KB; ++c) {
        float v[8];
        load8(this->eval.kept(this->state().slot, c), v);
        gather(fragments(this->d_v) + h * KB + c, w, v, [&](int) { return shrink[h]; }, c);
      }
    }
  }
  // Piece k of the sums: scaled down, and w v of this lane's two rows added.
  template <class F>
  NGK_DEVICE void gather(int k, const float* w, const float* v, F&& by, int c) const {
    Four own = load4(sums + k * LANES * 4);
    NGK_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int column = c * 16 + e / 2 * 8 + lane() % 4 * 2 + e % 2;
      NGK_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int at = e / 2 * 4 + h * 2 + e % 2;
        const float before = h ? own.v[e] : own.v[e] * by(column);
        own.v[e] = this->eval.ok[h] ? fmaf(w[at], v[at], before) : before;
      }
    }
    store4(sums + k * LANES * 4, own);
  }

  NGK_DEVICE void write(float* row) const {
    sync_warp();
    NGK_ROLLED
    for (int h = lane(); h < heads; h += LANES) row[h] = top[h], row[heads + h] = total[h];
    write_piece(row + 2 * heads, 0, this->d_v);
    const int de = static_cast<int>(this->g.de);
    if (this->g.summed) NGK_ROLLED
    for (int h = 0; h < heads; ++h) write_piece(row + 2 * heads + this->d_v + h * de, fragments(this->d_v) + h * KB, de);
  }
  // Sums over the lanes of the pieces from `first` on, `width` columns.
  NGK_DEVICE void write_piece(float* to, int first, int width) const {
    NGK_ROLLED
    for (int c = 0; c < fragments(width); ++c) {
      Four x = load4(sums + (first + c) * LANES * 4);
      NGK_UNROLL
      for (int e = 0; e < 4; ++e) {
        NGK_UNROLL
        for (int mask = 4; mask < LANES; mask *= 2) x.v[e] += shuffle_xor(x.v[e], mask);
        const int column = c * 16 + e / 2 * 8 + lane() % 4 * 2 + e % 2;
        if (lane() < 4 && column < width) to[column] = x.v[e];
      }
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
    for (int64_t i = panel.i0; i < panel.i1; ++i) {
      gathering.clear();
      NGK_ROLLED
      for (int64_t j = panel.j0; j < panel.j1; j += 16) {
        eval.tile(panel, i, j, true);
        const auto e = eval.run(0, static_cast<int>(g.edge_stages) - 1);
        gathering.join(panel, j, e);
      }
      gathering.write(g.partial + (panel.rows_i + i - panel.i0) * g.width);
    }
  }
};

}  // namespace ngk::cuda
