// What the edges of a tile add to on the way back: sums by node and by column, gradients of edge values.
//
// Everything that is summed over edges has one owner: sums by source and of columns a lane each, sums by destination a warp. Nothing is
// added atomically.
#pragma once

#include "evaluator.h"

namespace ngk::cuda {

template <class P, int D, bool FULL>
struct Sinks {
  using Left = typename P::Left;
  using Element = typename P::Element;
  using Edge = typename Evaluator<P, D, FULL>::Edge;
  static constexpr int KB = D / 16, FRAGMENTS = 256, LD = D + 8;  // LD: of staged rows, without bank conflicts

  const Args& g;
  Evaluator<P, D, FULL>& eval;
  float *sources, *sums, *waiting, *gradients;
  Element* staged;
  // of a tile
  const Panel* panel = nullptr;
  int strip = 0, number = 0;  // of its sources; which tile it is
  bool active = false;

  NGK_DEVICE Sinks(const Args& args, Evaluator<P, D, FULL>& e) : g(args), eval(e) {
    sources = placed_of_warp<float>(g.sources, g.sum_columns * 16) + lane() * 8;
    sums = placed_of_warp<float>(g.sums, g.n_sums * LANES * 4) + lane() * 4;
    waiting = placed_of_warp<float>(g.waiting, eval.sides() * KB * FRAGMENTS) + lane() * 8;
    gradients = placed<float>(g.gradients);
    staged = P::SHORT && D < WIDEST ? shared<Element>(g.staged) : placed<Element>(g.staged);
    NGK_ROLLED
    for (int64_t k = 0; k < g.n_sums; ++k) store4(sums + k * LANES * 4, {{0, 0, 0, 0}});
    NGK_ROLLED
    for (int64_t k = thread(); k < g.n_gradients * KB * KB * FRAGMENTS; k += WARPS * LANES) gradients[k] = 0;
    sync_block();
  }

  NGK_DEVICE bool wants_nodes() const { return g.need_nodes || g.need_parameters; }
  NGK_DEVICE bool wants_sources() const { return wants_nodes() || (FULL && g.combine == ATTEND); }
  // The gradient, columns 16 c .., that waits for the stage whose result was added to another, or normalised.
  NGK_DEVICE float* waits(int c) const { return waiting + (eval.side() * KB + c) * FRAGMENTS; }

  // Whether products of a stage's gradient are wanted.
  static NGK_DEVICE bool staged_too(const Stage& stage) { return stage.source == FROM_REGISTER || stage.groups; }
  // Puts them down; of a table, those of weights beyond it.
  NGK_DEVICE void stage_gradient(const Stage& stage, int64_t buffer, int c, const float* v) const {
    if (!staged_too(stage)) return;
    float x[8];
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) x[k] = stage.source == FROM_TABLE && !eval.row_beyond(k) ? 0.0f : v[k];
    P::stage(rows(buffer) + c * 16, LD, x);
  }

  // ---- what a tile adds to ----
  NGK_DEVICE Element* rows(int64_t buffer) const {  // of this warp, at this lane's place in a fragment
    return staged + (buffer * WARPS * 16 + warp() * 16 + lane() / 4) * LD + lane() % 4 * 2;
  }

  // Takes the gradient v of columns 16 c .. of half h of what a stage computes to all but its matrix and the stage below.
  NGK_DEVICE void sink(const Stage& stage, int h, int c, const float* v) const {
    if (stage.node >= 0 && wants_nodes()) {
      // a partner's destination is a source here: those sums have columns of their own
      const int64_t column = eval.side() * g.columns + stage.node + h * D + c * 16;
      to_sources(column, v);
      to_destination(column, v);
    }
    if (stage.sums >= 0 && g.need_parameters) {
      add_columns(stage.sums + h * KB + c, v, 1, 1);
      if (FULL && stage.source == FROM_NORM) {
        float y[8];
        eval.normalised(stage, eval.moments(stage), c, y);
        NGK_UNROLL
        for (int k = 0; k < 8; ++k) y[k] *= v[k];
        add_columns(stage.sums + KB + c, y, 1, 1);
      }
      if (stage.source == FROM_RAW) NGK_ROLLED
      for (int k = 0; k < g.channels; ++k)
        add_columns(stage.sums + ((1 + eval.direction() * g.channels + k) * stage.halves + h) * KB + c, v, eval.features_of(lane() / 4)[k],
                    eval.features_of(lane() / 4 + 8)[k]);
    }
    if (stage.source == FROM_RAW && g.need_raw) {
      NGK_ROLLED
      for (int k = 0; k < g.channels; ++k) {
        const Four w = eval.raw_weights(stage, k, h, c);
        float x[2] = {0, 0};
        NGK_UNROLL
        for (int e = 0; e < 8; ++e) x[e / 2 % 2] = fmaf(v[e], w.v[number_of(e)], x[e / 2 % 2]);
        add_feature_gradients(k, x);
      }
    } else if (stage.source == FROM_TABLE) {
      through_table(stage, h, c, v);
    } else if (stage.source == FROM_COPY && g.need_raw) {
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) {
        const int column = c * 16 + eval.column_of(k);
        if (column < g.channels) eval.gradients_of(eval.row_of(k))[column] += v[k];
      }
    }
  }

  // By source: added to this lane's own numbers, until the strip is done.
  NGK_DEVICE void to_sources(int64_t column, const float* v) const {
    float own[8];
    load8(sources + column / 16 * FRAGMENTS, own);
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) own[k] += v[k];
    store8(sources + column / 16 * FRAGMENTS, own);
  }
  // By destination: over the rows of each, to its partial row.
  NGK_DEVICE void to_destination(int64_t column, const float* v) const {
    eval.by_destination([&](const Run& run) {
      const bool upper = lane() & 16, odd = lane() & 8, top = run.has(lane() / 4), bottom = run.has(lane() / 4 + 8);
      float x[2];
      NGK_UNROLL
      for (int p = 0; p < 2; ++p) {
        const float low = (top ? v[p] : 0.0f) + (bottom ? v[2 + p] : 0.0f), high = (top ? v[4 + p] : 0.0f) + (bottom ? v[6 + p] : 0.0f);
        x[p] = (upper ? high : low) + shuffle_xor(upper ? low : high, 16);
      }
      float total = (odd ? x[1] : x[0]) + shuffle_xor(odd ? x[0] : x[1], 8);
      total += shuffle_xor(total, 4);
      if (lane() & 4) return;
      float* to = g.partial + (panel->rows_i + run.row) * g.sum_columns + column + (upper ? 8 : 0) + lane() % 4 * 2 + (odd ? 1 : 0);
      *to = run.begins ? total : *to + total;
    });
  }
  // Adds v times the rows' factors, row by row, to this lane's own numbers.
  NGK_DEVICE void add_columns(int64_t at, const float* v, float top, float bottom) const {
    Four own = load4(sums + at * LANES * 4);
    NGK_UNROLL
    for (int e = 0; e < 4; ++e) own.v[e] += fmaf(v[e / 2 * 4 + e % 2], top, v[e / 2 * 4 + 2 + e % 2] * bottom);
    store4(sums + at * LANES * 4, own);
  }
  NGK_DEVICE void add_feature_gradients(int channel, const float* x) const {
    NGK_UNROLL
    for (int h = 0; h < 2; ++h) {
      float total = x[h];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      if (lane() % 4 == 0) eval.gradients_of(lane() / 4 + 8 * h)[channel] += total;
    }
  }

  // What the table gets is put down edge by edge and summed later.
  NGK_DEVICE void through_table(const Stage& stage, int h, int c, const float* v) const {
    float x[2] = {0, 0};
    const int total_width = stage.width * stage.halves;
    NGK_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int edge = lane() / 4 + 8 * r;
      const float *rise = eval.hermite_of(edge) + 6, cell = rise[6];
      const int64_t place = (panel->slot + number * 16 + edge) * eval.sides() + eval.side();
      if (active && g.need_table && h == 0 && c == 0 && lane() % 4 == 0) {
        g.cells[place] = eval.ok[r] && cell >= 0 ? static_cast<int32_t>(eval.direction() * g.table_nodes + static_cast<int64_t>(cell)) : -1;
        g.places[place] = eval.features[edge];
      }
      NGK_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int column = e / 2 * 8 + lane() % 4 * 2 + e % 2;
        if (c * 16 + column >= stage.width) continue;
        if (active && g.need_table) g.curves[place * total_width + h * stage.width + c * 16 + column] = v[e / 2 * 4 + 2 * r + e % 2];
      }
      if (!g.need_raw) continue;
      Four slope{{0, 0, 0, 0}};
      NGK_ROLLED
      for (int k = 0; k < 2 * TABLE_LINES; ++k) {
        const Four line = eval.table_line(stage, cell, k, h, c);
        NGK_UNROLL
        for (int e = 0; e < 4; ++e) slope.v[e] = fmaf(rise[k], line.v[e], slope.v[e]);
      }
      const float unit = static_cast<float>(int64_t(1) << g.steps);
      NGK_UNROLL
      for (int e = 0; e < 4; ++e)
        if (c * 16 + e / 2 * 8 + lane() % 4 * 2 + e % 2 < stage.width)  // beyond, an infinite gradient would leave NaN
          x[r] = fmaf(v[e / 2 * 4 + 2 * r + e % 2], cell < 0 ? (stage.groups ? 0.0f : NAN) : slope.v[e] * unit, x[r]);
    }
    if (g.need_raw) add_feature_gradients(0, x);
  }

  NGK_DEVICE void clear_features() const {
    sync_warp();
    NGK_ROLLED
    for (int x = 0; x < eval.sides(); ++x) NGK_ROLLED
    for (int k = lane(); k < 16 * feature_row(g.channels); k += LANES) eval.gradients_of(0)[x * eval.features_of_side() + k] = 0;
    sync_warp();
  }
  // Of the edges; what their partners read is theirs too where it is the same, else it is added to gradients of its own.
  NGK_DEVICE void write_features() const {
    sync_warp();
    if (!g.need_raw || !active) return;
    const Rows& rows = *eval.block;
    const bool both = FULL && g.live;
    write_features(rows.gradient, rows.affine, rows.raw_by, 0, both && rows.same, rows.add);
    if (both && !rows.same) write_features(rows.partner_gradient, rows.partner_affine, rows.partner_raw_by, 1, false, true);
  }
  // Of a side, or the sum of both.
  NGK_DEVICE void write_features(const Values& to, int64_t affine, int64_t by, int side, bool sum, bool add) const {
    if (!to.data) return;
    const Dtype dtype = static_cast<Dtype>(to.dtype);
    const float scale = affine >= 0 ? eval.constants[affine] : 1.0f;
    eval.by_feature([&](int r, int c) {
      const Edge e = eval.edge(*panel, r);
      if (!eval.has_raw(e)) return;
      const float* own = eval.gradients_of(r) + side * eval.features_of_side() + c;
      char* p = element_of(to, panel->copy, e.destination, e.raw(by), c);
      const float x = (FULL && sum ? own[0] + own[eval.features_of_side()] : own[0]) * scale;
      write_value<float>(p, dtype, add ? x + read_value<float>(p, dtype) : x);
    });
  }

  // Writes the gradient of columns 16 c .. of a register to the stored state that it stops at.
  NGK_DEVICE void carry(int c, const float* v) const {
    const bool partner = eval.side();
    const Values& to = partner ? eval.block->partner_carrier : eval.block->carrier;
    if (!to.data || !active) return;
    eval.write_values(to, *panel, c, g.carrier_width, v, partner);
  }

  NGK_DEVICE void clear_sources() const {
    if (!wants_sources()) return;
    const float none[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    NGK_ROLLED
    for (int64_t c = 0; c < g.sum_columns / 16; ++c) store8(sources + c * FRAGMENTS, none);
  }
  // Of rows that several destinations have in turn, all; else of those that are sources.
  NGK_DEVICE void write_sources() const {
    if (!wants_sources()) return;
    const bool all = eval.block->step() > 1;
    NGK_ROLLED
    for (int64_t c = 0; c < g.sum_columns / 16; ++c) {
      float v[8];
      load8(sources + c * FRAGMENTS, v);
      NGK_UNROLL
      for (int k = 0; k < 8; ++k)
        if (all || eval.ok[k / 2 % 2])
          g.partial[(panel->rows_j + strip * 16 + eval.row_of(k)) * g.sum_columns + c * 16 + eval.column_of(k)] = v[k];
    }
  }
  // The block's gradients of parameters: fragments of matrices, then sums of columns.
  NGK_DEVICE void write_parameters() const {
    sync_block();
    const int64_t n = g.n_gradients * KB * KB * FRAGMENTS;
    float *to = g.parameters + block() * (n + g.n_sums * 16), *all = placed<float>(g.sums);
    NGK_ROLLED
    for (int64_t k = thread(); k < n; k += WARPS * LANES) to[k] = gradients[k];
    NGK_ROLLED
    for (int64_t k = thread(); k < g.n_sums * 16; k += WARPS * LANES) {
      const int column = static_cast<int>(k % 16);
      float total = 0;
      NGK_ROLLED
      for (int w = 0; w < WARPS; ++w) NGK_ROLLED
      for (int r = 0; r < 8; ++r)
        total += all[(w * g.n_sums + k / 16) * LANES * 4 + (r * 4 + column % 8 / 2) * 4 + column / 8 * 2 + column % 2];
      to[n + k] = total;
    }
  }
};

}  // namespace ngk::cuda
