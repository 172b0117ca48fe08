// The way back through an edge expression: every tile is evaluated again, and its gradients go down the stages.
//
// The warps of a block go in step. A stage's gradient is staged in shared memory, rounded, beside the register that the stage has read:
// their product over all edges of the block is the gradient of its matrix, and every warp adds up its part of it. Everything else that is
// summed over edges has one owner: sums by source and of columns a lane each, sums by destination a warp. Nothing is added atomically.
#pragma once

#include "evaluator.h"

namespace ngk::cuda {

template <class P, int D>
struct Backprop {
  using Left = typename P::Left;
  using Element = typename P::Element;
  static constexpr int KB = D / 16, FRAGMENTS = 256, LD = D + 8;  // LD: of staged rows, without bank conflicts

  const Args& g;
  const Evaluator<P, D>& eval;
  float *sources, *sums, *waiting, *gradients;
  Element* staged;
  // of a tile
  const Panel* panel = nullptr;
  int64_t i = 0, source = 0, strip = 0, number = 0;  // destination, first source, which strip of sources and which tile it is
  bool active = false;

  NGK_DEVICE Backprop(const Args& args, const Evaluator<P, D>& e) : g(args), eval(e) {
    sources = placed_of_warp<float>(g.sources, g.columns * 16) + lane() * 8;
    sums = placed_of_warp<float>(g.sums, g.n_sums * LANES * 4) + lane() * 4;
    waiting = placed_of_warp<float>(g.waiting, KB * FRAGMENTS) + lane() * 8;
    gradients = placed<float>(g.gradients);
    staged = placed<Element>(g.staged);
    NGK_ROLLED
    for (int64_t k = 0; k < g.n_sums; ++k) store4(sums + k * LANES * 4, {{0, 0, 0, 0}});
    NGK_ROLLED
    for (int64_t k = thread(); k < g.n_gradients * KB * KB * FRAGMENTS; k += WARPS * LANES) gradients[k] = 0;
    sync_block();
  }

  NGK_DEVICE bool wants_nodes() const { return g.need_nodes || g.need_parameters; }

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
    if (stage.node >= 0 && wants_nodes()) node_sums(stage.node + h * D + c * 16, v);
    if (stage.sums >= 0 && g.need_parameters) {
      add_columns(stage.sums + h * KB + c, v, 1, 1);
      if (stage.source == FROM_RAW) NGK_ROLLED
      for (int k = 0; k < g.channels; ++k)
        add_columns(stage.sums + ((1 + eval.block->direction * g.channels + k) * stage.halves + h) * KB + c, v,
                    eval.features[lane() / 4 * g.channels + k], eval.features[(lane() / 4 + 8) * g.channels + k]);
    }
    if (stage.source == FROM_RAW && g.need_raw) {
      NGK_ROLLED
      for (int k = 0; k < g.channels; ++k) {
        const float* w = eval.raw_weights(stage, k, h, c);
        float x[2] = {0, 0};
        NGK_UNROLL
        for (int e = 0; e < 8; ++e) x[e / 2 % 2] = fmaf(v[e], w[e / 4 * 8 + e % 2], x[e / 2 % 2]);
        add_feature_gradients(k, x);
      }
    } else if (stage.source == FROM_TABLE) {
      through_table(stage, h, c, v);
    } else if (stage.source == FROM_COPY && g.need_raw) {
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) {
        const int column = c * 16 + eval.column_of(k);
        if (column < g.channels) eval.feature_gradients[eval.row_of(k) * g.channels + column] += v[k];
      }
    }
  }

  // By source: added to this lane's own numbers, until the strip is done. By destination: over the 16 rows, to its partial row.
  NGK_DEVICE void node_sums(int64_t column, const float* v) const {
    float own[8];
    load8(sources + column / 16 * FRAGMENTS, own);
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) own[k] += v[k];
    store8(sources + column / 16 * FRAGMENTS, own);
    const bool upper = lane() & 16, odd = lane() & 8;
    float x[2];
    NGK_UNROLL
    for (int p = 0; p < 2; ++p) {
      const float low = v[p] + v[2 + p], high = v[4 + p] + v[6 + p];
      x[p] = (upper ? high : low) + shuffle_xor(upper ? low : high, 16);
    }
    float total = (odd ? x[1] : x[0]) + shuffle_xor(odd ? x[0] : x[1], 8);
    total += shuffle_xor(total, 4);
    if (!active || (lane() & 4)) return;
    float* to = g.partial + (panel->rows_i + i - panel->i0) * g.columns + column + (upper ? 8 : 0) + lane() % 4 * 2 + (odd ? 1 : 0);
    *to = strip && !eval.line ? *to + total : total;
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
      if (lane() % 4 == 0) eval.feature_gradients[(lane() / 4 + 8 * h) * g.channels + channel] += total;
    }
  }

  // What the table gets is put down edge by edge and summed later.
  NGK_DEVICE void through_table(const Stage& stage, int h, int c, const float* v) const {
    float x[2] = {0, 0};
    const int total_width = stage.width * stage.halves;
    NGK_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = lane() / 4 + 8 * r;
      const float *rise = eval.hermite + row * HERMITE + 6, cell = eval.hermite[row * HERMITE + 12];
      const float* line = eval.table_line(stage, cell < 0 ? 0 : static_cast<int64_t>(cell), h, c);
      const int64_t place = panel->slot + number * 16 + row;
      if (active && g.need_table && h == 0 && c == 0 && lane() % 4 == 0) {
        g.cells[place] =
            eval.ok[r] && cell >= 0 ? static_cast<int32_t>(eval.block->direction * g.table_nodes + static_cast<int64_t>(cell)) : -1;
        g.places[place] = eval.features[row];
      }
      NGK_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int column = e / 2 * 8 + lane() % 4 * 2 + e % 2;
        if (c * 16 + column >= stage.width) continue;
        const float gz = v[e / 2 * 4 + 2 * r + e % 2];
        if (active && g.need_table) g.curves[place * total_width + h * stage.width + c * 16 + column] = gz;
        if (!g.need_raw) continue;
        float slope = 0;
        NGK_ROLLED
        for (int k = 0; k < 2 * TABLE_LINES; ++k) slope = fmaf(rise[k], line[k * total_width + column], slope);
        x[r] = fmaf(gz, cell < 0 ? (stage.groups ? 0.0f : NAN) : slope * static_cast<float>(int64_t(1) << g.steps), x[r]);
      }
    }
    if (g.need_raw) add_feature_gradients(0, x);
  }

  // ---- one tile ----
  NGK_DEVICE void clear_features() const {
    sync_warp();
    NGK_ROLLED
    for (int k = lane(); k < 16 * g.channels; k += LANES) eval.feature_gradients[k] = 0;
    sync_warp();
  }
  NGK_DEVICE void write_features() const {
    sync_warp();
    const Values& to = eval.block->gradient;
    if (!to.data || !g.need_raw || !active || lane() >= 16) return;
    const typename Evaluator<P, D>::Edge e = eval.edge(*panel, source, lane());
    if (!e.ok) return;
    const Dtype dtype = static_cast<Dtype>(to.dtype);
    const float scale = eval.block->affine >= 0 ? eval.constants[eval.block->affine] : 1.0f;
    NGK_ROLLED
    for (int c = 0; c < g.channels; ++c) {
      char* p = element_of(to, panel->copy, eval.destination, e.raw, c);
      const float x = eval.feature_gradients[lane() * g.channels + c] * scale;
      write_value<float>(p, dtype, eval.block->add ? x + read_value<float>(p, dtype) : x);
    }
  }

  // Writes the gradient of columns 16 c .. of a register to the stored state that it stops at.
  NGK_DEVICE void carry(int c, const float* v) const {
    const Values& to = eval.block->carrier;
    if (!to.data || !active) return;
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) {
      const int column = c * 16 + eval.column_of(k);
      if (eval.ok[k / 2 % 2] && column < g.carrier_width)
        write_value<float>(element_of(to, panel->copy, eval.destination, eval.place[k / 2 % 2], column), static_cast<Dtype>(to.dtype),
                           v[k]);
    }
  }

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

  // ---- before and after a strip of 16 sources; after all ----
  NGK_DEVICE void clear_sources() const {
    if (!wants_nodes()) return;
    const float none[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    NGK_ROLLED
    for (int64_t c = 0; c < g.columns / 16; ++c) store8(sources + c * FRAGMENTS, none);
  }
  NGK_DEVICE void write_sources() const {
    if (!wants_nodes()) return;
    NGK_ROLLED
    for (int64_t c = 0; c < g.columns / 16; ++c) {
      float v[8];
      load8(sources + c * FRAGMENTS, v);
      NGK_UNROLL
      for (int k = 0; k < 8; ++k)
        if (eval.ok[k / 2 % 2]) g.partial[(panel->rows_j + strip * 16 + eval.row_of(k)) * g.columns + c * 16 + eval.column_of(k)] = v[k];
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

template <class P, int D>
struct AggregateBackward {
  static constexpr bool TOGETHER = true;
  static NGK_DEVICE int64_t tiles(const Panel& p) { return (p.i1 - p.i0) * ((p.j1 - p.j0 + 15) / 16); }

  static NGK_DEVICE void run(const Args& g) {
    Evaluator<P, D> eval(g);
    Backprop<P, D> back(g, eval);
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
