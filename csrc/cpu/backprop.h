// The back-propagator: takes the gradient of a register down the instructions of one tile, into the gradients of
// parameters and table (of the item), node terms (of the piece) and raw weights or a virtual checkpoint (memory).
#pragma once

#include "tile.h"

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
  void run(const Tile<V>& t, int begin, int end, int slot) {
    const int direction = p.call.directions > 1 ? static_cast<int>(t.piece->row->variant) : 0;
    T *g = w.g[slot], *next = w.g[2];
    for (int k = end - 1; k >= begin; --k) {
      const Instr& in = p.call.instrs[k];
      const Step<V>& s = p.steps[k];
      if (w.grad_add[k]) Evaluator<V>::add(g, w.grad_add[k], g, t.n, s.ld, s.ld);
      switch (in.op) {
        case MARK:
          write_carrier(t, s.ld, in.n_out, g);
          return;
        case ACT:
          multiply(g, w.out[k - 1], Evaluator<V>::vector_count(t.n, s.ld));
          break;
        case ADD:
          copy_rows(g, s.ld, w.grad_add[in.arg0], p.steps[in.arg0].ld, t.n);
          break;
        case LIN:
          if (!linear(t, k, direction, g, next)) return;
          swap(g, next);
          if (scales(k)) --k;  // the activation's derivative is in
          break;
        case TABLE:
          table(t, k, direction, g, next);
          swap(g, next);
          k -= 1;  // past LOAD, whose gradient is in g
          write_weights(t, g, 1);
          return;
        case FOURIER:
          if (!p.call.need_weights) return;
          fourier(t, k, direction, g, next);
          swap(g, next);
          break;
        case LOAD:
          write_weights(t, g, p.steps[0].ld);
          return;
      }
    }
  }

 private:
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
      column_sums(g, t.n, s.ld, w.params + s.g_b);
    }
  }

  // Whether instruction k's product with its input's derivative comes out of its GEMM.
  bool scales(int k) const {
    return k > 1 && p.call.instrs[k - 1].op == ACT && !w.grad_add[k - 1] && p.steps[k - 1].ld == p.steps[k].bwd[0].ld;
  }

  // False when nothing below wants a gradient.
  bool linear(const Tile<V>& t, int k, int direction, const T* g, T* next) {
    const Instr& in = p.call.instrs[k];
    const Step<V>& s = p.steps[k];
    bias_or_nodes(t, k, g);
    if (in.n_in == 0) return false;
    const int lda = p.steps[k - 1].ld;
    if (p.call.grad_params) gemm_outer<V>(w.out[k - 1], lda, in.n_in, g, s.ld, t.n, w.params + s.g_w[direction], s.ld);
    if (k == 1 && !p.call.need_weights) return false;
    gemm<V>(g, s.ld, t.n, s.bwd[direction], next, FromZero<V>{}, scales(k) ? w.out[k - 2] : nullptr);
    compact(next, t.n, s.bwd[direction].ld, p.steps[k - 1].ld);  // LOAD, and what follows it as it is, has no padding
    return true;
  }

  static void copy_rows(const T* from, int ld_from, T* to, int ld_to, int rows) {
    const int n = ld_from < ld_to ? ld_from : ld_to;
    for (int r = 0; r < rows; ++r)
      std::memcpy(to + static_cast<int64_t>(r) * ld_to, from + static_cast<int64_t>(r) * ld_from, sizeof(T) * n);
  }

  static void compact(T* g, int rows, int from, int to) {
    if (from == to) return;
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < to; ++c) g[static_cast<int64_t>(r) * to + c] = g[static_cast<int64_t>(r) * from + c];
  }

  void fourier(const Tile<V>& t, int k, int direction, const T* g, T* next) {
    const Instr& in = p.call.instrs[k];
    const int m = in.n_out / 2, C = in.n_in, ld = p.steps[k].ld;
    const T* b = p.params + in.w + static_cast<int64_t>(direction) * C * m;
    for (int r = 0; r < t.n; ++r) {
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
  void table(const Tile<V>& t, int k, int direction, const T* g, T* next) {
    bias_or_nodes(t, k, g);
    const Step<V>& s = p.steps[k];
    const int ld = s.ld;
    const int64_t size = p.call.table_nodes * TABLE_LINES * ld;
    const T* base = p.table + direction * size;
    T* grad = w.table ? w.table + direction * size : nullptr;
    const T steps = T(int64_t(1) << p.call.instrs[k].arg0);
    for (int r = 0; r < t.n; ++r) {  // cells and weights are there from the evaluation
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
      const R weight = V::set1(hermite[l * p.tile]);
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
      const R weight = V::set1(slope[l * p.tile]);
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

  void write_weights(const Tile<V>& t, T* g, int channels) {
    if (!p.call.need_weights) return;
    const Row& row = *t.piece->row;
    const Instr& in = p.call.instrs[0];
    const EdgeTensor& target = p.call.grad_weights[row.weight];
    if (!target.data) return;
    if (in.arg0 >= 0) {
      const T scale = p.params[in.arg0 + 2 * row.weight];
      for (int k = 0; k < t.n * channels; ++k) g[k] *= scale;
    }
    if (row.shared) {  // another block adds to the same weights: held until the commit
      const int cols = row.kind == DIAGONAL ? 1 : t.piece->cols();
      for (int r = 0; r < t.n; ++r)
        for (int c = 0; c < channels; ++c)
          w.raw_grad[(static_cast<int64_t>(t.i[r]) * cols + (row.kind == DIAGONAL ? 0 : t.j[r])) * channels + c] =
              g[static_cast<int64_t>(r) * channels + c];
      return;
    }
    scatter<V>(t, view(target, row, t.piece->copy, false, row.offset, row.edge_stride), channels, g, channels);
  }

  void write_carrier(const Tile<V>& t, int ld, int channels, const T* g) {
    const Row& row = *t.piece->row;
    const size_t k = row.emit_offset >= 0 ? 0 : static_cast<size_t>(row.block);
    if (k >= p.call.grad_carriers.size() || !p.call.grad_carriers[k].data) return;
    scatter<V>(t, view(p.call.grad_carriers[k], row, t.piece->copy, true, row.emit_offset, row.emit_stride), channels, g, ld);
  }
};

}  // namespace ngk
