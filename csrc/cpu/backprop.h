// The back-propagator: takes the gradient of a register down the instructions of one tile, into the gradients of
// parameters and table (of the item), node terms (of the piece) and raw weights or a virtual checkpoint (memory).
#pragma once

#include "evaluator.h"

namespace ngk {

template <class V>
class Backprop {
 public:
  using T = typename V::T;
  using R = typename V::R;
  const Prepared<V>& p;
  Worker<V>& w;
  Evaluator<V>& eval;

  Backprop(const Prepared<V>& prepared, Worker<V>& worker, Evaluator<V>& evaluator) : p(prepared), w(worker), eval(evaluator) {}

  // From the result of instruction end - 1 (gradient in w.g[slot], ld of that result) down to `begin`.
  // Where all pairs of the piece have the first instructions in common, it stops above them: `finish` goes on.
  void run(const Tile<V>& t, int begin, int end, int slot) {
    const int common = p.constant(*t.piece->row);
    if (common == end) return keep(t, slot);
    run(t, begin, end, slot, common);
  }

  // Gradients of what the pairs of a piece have in common, from their sums: one pair stands for all.
  void finish(const Piece& piece) {
    const int common = p.constant(*piece.row), n = static_cast<int>(p.steps.size());
    if (!common) return;
    const int live = p.live(*piece.row), half = live ? row_blocks<V>(1) : 0;
    for (int r = 0; r < p.tile_rows(); ++r) w.i[r] = w.j[r] = 0;
    const Tile<V> t{1, half, live, 0, w.i, w.j, w.i, w.j, &piece};
    T *g = w.g[0], *next = w.g[1];
    const Step<V>& s = p.steps[common < n ? common : n - 1];
    std::memset(g, 0, sizeof(T) * (half + 1) * s.ld);
    if (common == n) {
      const int e = p.call.message_start - 1, ld = p.steps[e].ld;
      std::memset(w.grad_add[e], 0, sizeof(T) * (half + 1) * ld);
      std::memcpy(g, w.common, sizeof(T) * s.ld);
      std::memcpy(w.grad_add[e], w.common_add[e], sizeof(T) * ld);
      return run(t, 0, n, 0, 0);
    }
    const int rows = piece.rows() + (live ? piece.cols() : 0);
    column_sums(w.grad_s[common], rows, s.ld, g);
    for (int k = 0; k < common; ++k)
      if (w.grad_add[k]) {
        std::memset(w.grad_add[k], 0, sizeof(T) * (half + 1) * p.steps[k].ld);
        std::memcpy(w.grad_add[k], w.common_add[k], sizeof(T) * p.steps[k].ld);
      }
    if (!linear_only(t, common, g, next)) return;
    run(t, 0, scales(common) ? common - 1 : common, 1, 0);  // the activation's derivative is in
  }

 private:
  // The sums over a tile's rows, for `finish`.
  void keep(const Tile<V>& t, int slot) {
    const int n = static_cast<int>(p.steps.size()), e = p.call.message_start - 1;
    sum_rows(t, n - 1, w.g[slot], w.common);
    sum_rows(t, e, w.grad_add[e], w.common_add[e]);
  }
  // Adds the rows of a tile's gradient of instruction k.
  void sum_rows(const Tile<V>& t, int k, const T* g, T* to) {
    const int ld = p.steps[k].ld;
    t.spans(k, [&](int first, int rows) { column_sums(g + static_cast<int64_t>(first) * ld, rows, ld, to); });
  }

  void run(const Tile<V>& t, int begin, int end, int slot, int common) {
    T *g = w.g[slot], *next = w.g[2];
    for (int k = end - 1; k >= begin; --k) {
      const Instr& in = p.call.instrs[k];
      const Step<V>& s = p.steps[k];
      if (w.grad_add[k]) Evaluator<V>::add(g, w.grad_add[k], g, t.rows(k), s.ld, s.ld);
      switch (in.op) {
        case MARK:
          write_carriers(t, k, g);
          return;
        case MASK:
          if (t.piece->row->flags & TOKEN) return;
          break;
        case ACT:
          multiply(g, w.out[k - 1], Evaluator<V>::vector_count(t.rows(k), s.ld));
          break;
        case NORM:
          norm(t, k, g);
          break;
        case ADD:
          if (in.arg0 < common) {
            sum_rows(t, k, g, w.common_add[in.arg0]);
            break;
          }
          copy_rows(g, s.ld, w.grad_add[in.arg0], p.steps[in.arg0].ld, t.rows(k), t.rows(static_cast<int>(in.arg0)));
          break;
        case LIN:
          if (k == common && common) return bias_or_nodes(t, k, g);
          if (!linear(t, k, g, next)) return;
          swap(g, next);
          if (scales(k)) --k;  // the activation's derivative is in
          break;
        case TABLE:
          table(t, k, g, next);
          swap(g, next);
          write_weights(t, g, 1, 1);  // past LOAD, whose gradient is in g
          return;
        case FOURIER:
          if (!p.call.need_weights) return;
          fourier(t, k, g, next);
          swap(g, next);
          break;
        case LOAD:
          write_weights(t, g, s.ld, in.n_out);
          return;
      }
    }
  }

  static void swap(T*& a, T*& b) {
    T* c = a;
    a = b;
    b = c;
  }

  static void multiply(T* g, const T* d, int64_t n) {
    for (int64_t k = 0; k < n; k += V::W) V::store(g + k, V::mul(V::load(g + k), V::load(d + k)));
  }

  // Adds the rows of g to the node gradients of their destinations and sources.
  void node_term(const Tile<V>& t, int k, const T* g) {
    const int ld = p.steps[k].ld;
    T *gs = w.grad_s[k], *gt = w.grad_t[k];
    if (t.partners(k)) partner_node_term(t, g, ld, gs, gt);
    t.destinations([&](int i, int first, int r) {
      T* si = gs + static_cast<int64_t>(i) * ld;
      int c = 0;
      for (; c + 2 * V::W <= ld; c += 2 * V::W) {
        R a = V::load(si + c), b = V::load(si + c + V::W);
        for (int q = first; q < r; ++q) {
          const T* gq = g + static_cast<int64_t>(q) * ld + c;
          T* tj = gt + static_cast<int64_t>(t.j[q]) * ld + c;
          const R x = V::load(gq), y = V::load(gq + V::W);
          a = V::add(a, x);
          b = V::add(b, y);
          V::store(tj, V::add(V::load(tj), x));
          V::store(tj + V::W, V::add(V::load(tj + V::W), y));
        }
        V::store(si + c, a);
        V::store(si + c + V::W, b);
      }
      for (; c < ld; c += V::W) {
        R a = V::load(si + c);
        for (int q = first; q < r; ++q) {
          const R x = V::load(g + static_cast<int64_t>(q) * ld + c);
          T* tj = gt + static_cast<int64_t>(t.j[q]) * ld + c;
          a = V::add(a, x);
          V::store(tj, V::add(V::load(tj), x));
        }
        V::store(si + c, a);
      }
    });
  }

  // The partners' share: their destinations change from row to row.
  void partner_node_term(const Tile<V>& t, const T* g, int ld, T* gs, T* gt) {
    for (int r = t.half; r < t.half + t.n; ++r) {
      T *si = gs + static_cast<int64_t>(t.i[r]) * ld, *tj = gt + static_cast<int64_t>(t.j[r]) * ld;
      const T* gr = g + static_cast<int64_t>(r) * ld;
      for (int c = 0; c < ld; c += V::W) {
        const R x = V::load(gr + c);
        V::store(si + c, V::add(V::load(si + c), x));
        V::store(tj + c, V::add(V::load(tj + c), x));
      }
    }
  }

  void column_sums(const T* g, int rows, int ld, T* out) {
    for (int c = 0; c < ld; c += V::W) {
      R a = V::load(out + c);
      for (int r = 0; r < rows; ++r) a = V::add(a, V::load(g + static_cast<int64_t>(r) * ld + c));
      V::store(out + c, a);
    }
  }

  void bias_or_nodes(const Tile<V>& t, int k, const T* g) {
    const Step<V>& s = p.steps[k];
    if (s.node) {
      node_term(t, k, g);
    } else if (p.call.grad_params && p.call.instrs[k].b >= 0) {
      t.spans(k, [&](int first, int n) { column_sums(g + static_cast<int64_t>(first) * s.ld, n, s.ld, w.params + s.g_b); });
    }
  }

  // Whether instruction k's product with its input's derivative comes out of its GEMM.
  bool scales(int k) const {
    return k > 1 && p.call.instrs[k - 1].op == ACT && !w.grad_add[k - 1] && p.steps[k - 1].ld == p.steps[k].bwd[0].ld;
  }

  // False when nothing below wants a gradient.
  bool linear(const Tile<V>& t, int k, const T* g, T* next) {
    bias_or_nodes(t, k, g);
    return linear_only(t, k, g, next);
  }

  // The same without bias and node term.
  bool linear_only(const Tile<V>& t, int k, const T* g, T* next) {
    const Instr& in = p.call.instrs[k];
    const Step<V>& s = p.steps[k];
    if (in.n_in == 0) return false;
    if (in.arg1 >= 0 && t.partners(k)) return pair(t, k, g, next);
    const int lda = p.steps[k - 1].ld, ldn = s.bwd[0].ld;
    const T* x = w.out[k - 1];
    const auto at = [](auto* base, int row, int ld) { return base + static_cast<int64_t>(row) * ld; };
    if (p.call.grad_params)
      t.spans(k, [&](int first, int n) {
        gemm_outer<V>(at(x, first, lda), lda, in.n_in, at(g, first, s.ld), s.ld, n, w.params + s.g_w[eval.direction(t, first)], s.ld);
        if (in.arg1 >= 0) gemm_outer<V>(at(x, t.half, lda), lda, in.n_in, at(g, first, s.ld), s.ld, n, w.params + s.g_partner, s.ld);
      });
    if (k == 1 && !p.call.need_weights) return false;
    const T* scale = scales(k) ? w.out[k - 2] : nullptr;
    const auto go = [&](int first, int rows) {
      gemm<V>(at(g, first, s.ld), s.ld, rows, s.bwd[eval.direction(t, first)], at(next, first, ldn), FromZero<V>{},
              in.arg1 < 0 && scale ? at(scale, first, ldn) : nullptr);
    };
    if (in.arg0) {
      t.spans(k, go);
    } else {
      go(0, t.rows(k));
    }
    if (in.arg1 >= 0) from_partners(t, k, g, next, scale);
    compact(next, t.rows(k - 1), ldn, lda);  // LOAD, and what follows it as it is, has no padding
    return true;
  }

  // What only the edges' update took from their partners.
  void from_partners(const Tile<V>& t, int k, const T* g, T* next, const T* scale) {
    const Step<V>& s = p.steps[k];
    const int64_t ld = s.partner_t.ld;
    if (scale) multiply(next, scale, Evaluator<V>::vector_count(t.n, s.partner_t.ld));
    gemm<V>(g, s.ld, t.n, s.partner_t, next + t.half * ld, FromZero<V>{}, scale ? scale + t.half * ld : nullptr);
  }

  // A pair update of both directions (Evaluator::pair), by sums and differences of the gradients.
  bool pair(const Tile<V>& t, int k, const T* g, T* next) {
    const Instr& in = p.call.instrs[k];
    const Step<V>& s = p.steps[k];
    const int lda = p.steps[k - 1].ld, ldn = s.plus_t.ld;
    const int64_t half = t.half;
    if (p.call.grad_params) {
      Evaluator<V>::sums(w.out[k - 1], t.half, t.n, lda, w.pair);
      Evaluator<V>::sums(g, t.half, t.n, s.ld, next);  // next: free until its own turn
      gemm_outer<V>(w.pair, lda, in.n_in, next, s.ld, t.n, w.params + s.g_plus, s.ld);
      gemm_outer<V>(w.pair + half * lda, lda, in.n_in, next + half * s.ld, s.ld, t.n, w.params + s.g_minus, s.ld);
    }
    if (k == 1 && !p.call.need_weights) return false;
    Evaluator<V>::sums(g, t.half, t.n, s.ld, w.pair);
    gemm<V>(w.pair, s.ld, t.n, s.plus_t, next, FromZero<V>{});
    gemm<V>(w.pair + half * s.ld, s.ld, t.n, s.minus_t, next + half * ldn, FromZero<V>{});
    for (int64_t c = 0; c < Evaluator<V>::vector_count(t.n, ldn); c += V::W) {
      T *a = next + c, *b = a + half * ldn;
      const R x = V::load(a), y = V::load(b);
      V::store(a, V::add(x, y));
      V::store(b, V::sub(x, y));
    }
    if (scales(k)) multiply(next, w.out[k - 2], Evaluator<V>::vector_count(t.rows(k), ldn));
    compact(next, t.rows(k - 1), ldn, lda);
    return true;
  }

  // g becomes the gradient of what was normalised.
  void norm(const Tile<V>& t, int k, T* g) {
    const Instr& in = p.call.instrs[k];
    const Step<V>& s = p.steps[k];
    const int ld = s.ld;
    const T one_n = T(1) / static_cast<T>(in.n_out);
    t.spans(k, [&](int first, int n) {
      for (int r = first; r < first + n; ++r) {
        const T* x = w.out[k - 1] + static_cast<int64_t>(r) * ld;
        T* gr = g + static_cast<int64_t>(r) * ld;
        R mean, scale, sum = V::zero(), dot = V::zero();
        eval.moments(x, s.ones, in.n_out, ld, s.eps, &mean, &scale);
        for (int c = 0; c < ld; c += V::W) {
          const R y = V::mul(V::mul(V::sub(V::load(x + c), mean), scale), V::load(s.ones + c));
          const R up = V::mul(V::load(gr + c), V::load(s.ones + c)), gy = V::mul(up, V::load(s.gamma + c));
          T *gw = w.params + s.g_w[0] + c, *gb = w.params + s.g_b + c;
          V::store(gw, V::fma(up, y, V::load(gw)));
          V::store(gb, V::add(up, V::load(gb)));
          sum = V::add(sum, gy);
          dot = V::fma(gy, y, dot);
        }
        const R a = V::set1(V::sum(sum) * one_n), b = V::set1(V::sum(dot) * one_n);
        for (int c = 0; c < ld; c += V::W) {
          const R y = V::mul(V::sub(V::load(x + c), mean), scale), gy = V::mul(V::load(gr + c), V::load(s.gamma + c));
          V::store(gr + c, V::mul(V::mul(scale, V::load(s.ones + c)), V::sub(V::sub(gy, a), V::mul(y, b))));
        }
      }
    });
  }

  // `rows` rows of a gradient, and zeros up to `all` rows.
  static void copy_rows(const T* from, int ld_from, T* to, int ld_to, int rows, int all) {
    const int n = ld_from < ld_to ? ld_from : ld_to;
    for (int r = 0; r < rows; ++r)
      std::memcpy(to + static_cast<int64_t>(r) * ld_to, from + static_cast<int64_t>(r) * ld_from, sizeof(T) * n);
    if (all > rows) std::memset(to + static_cast<int64_t>(rows) * ld_to, 0, sizeof(T) * (all - rows) * ld_to);
  }

  static void compact(T* g, int rows, int from, int to) {
    if (from == to) return;
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < to; ++c) g[static_cast<int64_t>(r) * to + c] = g[static_cast<int64_t>(r) * from + c];
  }

  void fourier(const Tile<V>& t, int k, const T* g, T* next) {
    t.spans(k, [&](int first, int n) { fourier(k, eval.direction(t, first), g, next, first, first + n); });
  }
  void fourier(int k, int direction, const T* g, T* next, int first, int last) {
    const Instr& in = p.call.instrs[k];
    const int m = in.n_out / 2, C = in.n_in, ld = p.steps[k].ld;
    const T* b = p.params + in.w + static_cast<int64_t>(direction) * C * m;
    for (int r = first; r < last; ++r) {
      const T *gr = g + static_cast<int64_t>(r) * ld, *f = w.out[k] + static_cast<int64_t>(r) * ld;
      T* out = next + static_cast<int64_t>(r) * C;
      for (int c = 0; c < C; ++c) out[c] = T(0);
      for (int q = 0; q < m; ++q) {
        const T turn = T(6.283185307179586476925) * (gr[m + q] * f[q] - gr[q] * f[m + q]);
        for (int c = 0; c < C; ++c) out[c] += turn * b[static_cast<int64_t>(q) * C + c];
      }
    }
  }

  // Adjoint of the tabulated curve: the lines of two nodes of the table's gradient an edge, and the curve's slope for the weight.
  void table(const Tile<V>& t, int k, const T* g, T* next) {
    bias_or_nodes(t, k, g);
    t.spans(k, [&](int first, int n) { table(k, eval.direction(t, first), g, next, first, first + n); });
  }
  void table(int k, int direction, const T* g, T* next, int first, int last) {
    const Step<V>& s = p.steps[k];
    const int ld = s.ld;
    const int64_t size = p.call.table_nodes * TABLE_LINES * ld;
    const T* base = p.table + direction * size;
    T* grad = w.table ? w.table + direction * size : nullptr;
    const T steps = T(int64_t(1) << p.call.instrs[k].arg0);
    for (int r = first; r < last; ++r) {  // cells and weights are there from the evaluation
      const T* gr = g + static_cast<int64_t>(r) * ld;
      const int64_t index = static_cast<int64_t>(w.cell[r]);
      if (index < 0) {
        next[r] = direct(w.out[k - 1][r], direction, gr, k);
        continue;
      }
      if (grad) {
        if (index < w.table_low[direction]) w.table_low[direction] = index;
        if (index + 2 > w.table_high[direction]) w.table_high[direction] = index + 2;
        T* q = grad + index * TABLE_LINES * ld;
        int c = 0;
        for (; c + 2 * V::W <= ld; c += 2 * V::W) spread<2>(w.hermite + r, gr + c, ld, q + c);
        if (c < ld) spread<1>(w.hermite + r, gr + c, ld, q + c);
      }
      if (p.call.need_weights) {
        const T* q = base + index * TABLE_LINES * ld;
        R total = V::zero();
        int c = 0;
        for (; c + 2 * V::W <= ld; c += 2 * V::W) total = rise<2>(w.slope + r, gr + c, ld, q + c, total);
        if (c < ld) total = rise<1>(w.slope + r, gr + c, ld, q + c, total);
        next[r] = V::sum(total) * steps;
      }
    }
  }

  // Lines q of a cell's gradient += weight of the line * g, NV vectors of columns.
  template <int NV>
  NGK_INLINE_MEMBER void spread(const T* hermite, const T* g, int64_t ld, T* q) {
    R x[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) x[v] = V::load(g + v * V::W);
#pragma GCC unroll 6
    for (int l = 0; l < 2 * TABLE_LINES; ++l, q += ld) {
      const R weight = V::set1(hermite[l * p.tile_rows()]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) V::store(q + v * V::W, V::fma(weight, x[v], V::load(q + v * V::W)));
    }
  }

  // total + <g, slope of the curve> in units of the step.
  template <int NV>
  NGK_INLINE_MEMBER R rise(const T* slope, const T* g, int64_t ld, const T* q, R total) {
    R sum[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) sum[v] = V::zero();
#pragma GCC unroll 6
    for (int l = 0; l < 2 * TABLE_LINES; ++l, q += ld) {
      const R weight = V::set1(slope[l * p.tile_rows()]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sum[v] = V::fma(weight, V::load(q + v * V::W), sum[v]);
    }
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) total = V::fma(sum[v], V::load(g + v * V::W), total);
    return total;
  }

  T direct(T value, int direction, const T* g, int k) {
    const Instr& in = p.call.instrs[k];
    const Step<V>& s = p.steps[k];
    const int m = in.n_in;
    T* gamma = w.rest;
    fourier_row<V>(eval.frequencies(direction), m, 1, &value, gamma);
    T total = 0;
    for (int q = 0; q < 2 * m; ++q) {
      const T* row = s.fwd[0].p + static_cast<int64_t>(q) * s.ld;
      T dot = 0;
      for (int c = 0; c < in.n_out; ++c) dot += row[c] * g[c];
      // d cos = -2 pi b sin, d sin = 2 pi b cos
      total += q < m ? -dot * gamma[m + q] * eval.frequencies(direction)[q] : dot * gamma[q - m] * eval.frequencies(direction)[q - m];
      if (p.call.grad_params)
        for (int c = 0; c < in.n_out; ++c) w.params[s.g_w[0] + static_cast<int64_t>(q) * s.ld + c] += gamma[q] * g[c];
    }
    return total * T(6.283185307179586476925);
  }

  // The gradient g [rows, ld] of the raw features, to the weights of the edges and of their partners.
  void write_weights(const Tile<V>& t, T* g, int ld, int channels) {
    if (!p.call.need_weights) return;
    const Row& row = *t.piece->row;
    if (t.partners(0)) {
      T* theirs = g + static_cast<int64_t>(t.half) * ld;
      for (int r = 0; r < t.n; ++r)
        if ((row.flags & SAME) || t.itself(r))  // one number, read twice
          for (int c = 0; c < channels; ++c) {
            g[static_cast<int64_t>(r) * ld + c] += theirs[static_cast<int64_t>(r) * ld + c];
            theirs[static_cast<int64_t>(r) * ld + c] = g[static_cast<int64_t>(r) * ld + c];
          }
      if (!(row.flags & SAME)) write_weights(t, theirs, ld, channels, side_of(row, true));
    }
    write_weights(t, g, ld, channels, side_of(row, false));
  }

  void write_weights(const Tile<V>& t, T* g, int ld, int channels, const Side& side) {
    const Row& row = *t.piece->row;
    const Instr& in = p.call.instrs[0];
    if (side.weight < 0) return;
    const EdgeTensor& target = p.call.grad_weights[side.weight];
    if (!target.data) return;
    if (in.arg0 >= 0) {
      const T scale = p.params[in.arg0 + 2 * side.weight];
      for (int k = 0; k < t.n * ld; ++k) g[k] *= scale;
    }
    if (row.shared) {  // another row adds to the same weights: held until the commit
      const int64_t cols = row.kind == DIAGONAL ? 1 : t.piece->cols();
      for (int r = 0; r < t.n; ++r) {
        const int64_t at = t.piece->at ? t.begin + r : t.i[r] * cols + (row.kind == DIAGONAL ? 0 : t.source(r));
        for (int c = 0; c < channels; ++c) w.raw_grad[side.partner][at * channels + c] = g[static_cast<int64_t>(r) * ld + c];
      }
      return;
    }
    const View v = view(target, row, side, t.piece->copy, false);
    if (!(row.flags & SPARSE_RAW)) {
      scatter<V>(t, v, channels, g, ld);
      return;
    }
    for (int r = 0; r < t.n; ++r)
      for (int c = 0; c < channels && t.equal_index(r); ++c)
        write_value(v.base + ((t.piece->j0 + t.source(r)) * v.src + c * v.channel) * dtype_size(v.dtype), v.dtype,
                    g[static_cast<int64_t>(r) * ld + c]);
  }

  void write_carriers(const Tile<V>& t, int k, T* g) {
    const int ld = p.steps[k].ld;
    t.spans(k, [&](int first, int) {
      const Row& row = *t.piece->row;
      const Side side = side_of(row, first > 0);
      const size_t at = side.emit_offset >= 0 ? 0 : static_cast<size_t>(side.block);
      if (side.block < 0 || at >= p.call.grad_carriers.size() || !p.call.grad_carriers[at].data) return;
      T* own = g + static_cast<int64_t>(first) * ld;
      if (!first && t.partners(k))
        for (int r = 0; r < t.n; ++r)
          if (t.itself(r)) add_row(own + static_cast<int64_t>(t.half + r) * ld, own + static_cast<int64_t>(r) * ld, ld);
      scatter<V>(t, view(p.call.grad_carriers[at], row, side, t.piece->copy, true), p.call.instrs[k].n_out, own, ld);
    });
  }
  // Two rows of the same pair: both become their sum.
  static void add_row(T* a, T* b, int ld) {
    for (int c = 0; c < ld; ++c) a[c] = b[c] = a[c] + b[c];
  }
};

}  // namespace ngk
