// Gaussian Fourier features and the tabulated curve of a scalar weight, and their adjoints.
#pragma once

#include "worker.h"

namespace ngk {

template <class V>
struct FourierEncoder : OnWorker<V> {
  using OnWorker<V>::OnWorker, OnWorker<V>::p, OnWorker<V>::w;
  using T = typename V::T;
  using R = typename V::R;

  void features(const Tile<V>& t, int k, const T* prev) {
    const Instr& in = p.call.instrs[k];
    t.spans(k, [&](int first, int n) {
      const T* b = p.params + in.w + static_cast<int64_t>(this->direction(t, first)) * in.n_in * (in.n_out / 2);
      for (int r = first; r < first + n; ++r)
        fourier_row<V>(b, in.n_out / 2, in.n_in, prev + static_cast<int64_t>(r) * p.steps[k - 1].ld,
                       w.out[k] + static_cast<int64_t>(r) * p.steps[k].ld);
    });
  }

  void table(const Tile<V>& t, int k) {
    const Instr& in = p.call.instrs[k];
    const Step<V>& s = p.steps[k];
    const int ld = s.ld;
    hermite_cells<V>(w.out[k - 1], t.rows(k), T(int64_t(1) << in.arg0), p.call.table_nodes / 2, w.cell, w.hermite, w.slope, p.tile_rows());
    t.spans(k, [&](int from, int n) {
      const T* base = p.table + static_cast<int64_t>(this->direction(t, from)) * p.call.table_nodes * TABLE_LINES * ld;
      for (int r = from; r < from + n; ++r) {
        T* out = w.out[k] + static_cast<int64_t>(r) * ld;
        const T* si = s.node ? this->dst_term(k, t.at_i[r]) : s.bias;
        const T* tj = s.node ? this->src_term(k, t.at_j[r]) : nullptr;
        if (w.cell[r] >= 0) {
          const T* q = base + static_cast<int64_t>(w.cell[r]) * TABLE_LINES * ld;
          int c = 0;
          for (; c + 2 * V::W <= ld; c += 2 * V::W) curve<2>(w.hermite + r, q + c, ld, si + c, tj ? tj + c : nullptr, out + c);
          if (c < ld) curve<1>(w.hermite + r, q + c, ld, si + c, tj ? tj + c : nullptr, out + c);
        } else {
          direct(w.out[k - 1][r], this->direction(t, from), si, tj, in, s, out);
        }
      }
    });
  }

  // out = si + tj + sum over the lines q of a cell, NV vectors of columns.
  template <int NV>
  NGK_INLINE_MEMBER void curve(const T* hermite, const T* q, int64_t ld, const T* si, const T* tj, T* out) {
    R acc[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[v] = tj ? V::add(V::load(si + v * V::W), V::load(tj + v * V::W)) : V::load(si + v * V::W);
#pragma GCC unroll 6
    for (int l = 0; l < 2 * TABLE_LINES; ++l, q += ld) {
      const R weight = V::set1(hermite[l * p.tile_rows()]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[v] = V::fma(weight, V::load(q + v * V::W), acc[v]);
    }
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) V::store(out + v * V::W, acc[v]);
  }

  void direct(T value, int direction, const T* si, const T* tj, const Instr& in, const Step<V>& s, T* out) {
    if (in.w < 0) {  // the caller promised that there are none
      for (int c = 0; c < s.ld; ++c) out[c] = std::numeric_limits<T>::quiet_NaN();
      return;
    }
    T* gamma = w.rest;
    fourier_row<V>(frequencies(direction), in.n_in, 1, &value, gamma);
    const T* row = p.rest();
    for (int c = 0; c < s.ld; ++c) {
      out[c] = tj ? si[c] + tj[c] : si[c];
      for (int q = 0; c < in.n_out && q < 2 * in.n_in; ++q) out[c] += row[static_cast<int64_t>(c) * 2 * in.n_in + q] * gamma[q];
    }
  }

  void features_back(const Tile<V>& t, int k, const T* g, T* next) {
    t.spans(k, [&](int first, int n) { features_back(k, this->direction(t, first), g, next, first, first + n); });
  }
  void features_back(int k, int direction, const T* g, T* next, int first, int last) {
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
  void table_back(const Tile<V>& t, int k, const T* g, T* next) {
    t.spans(k, [&](int first, int n) { table_back(k, this->direction(t, first), g, next, first, first + n); });
  }
  void table_back(int k, int direction, const T* g, T* next, int first, int last) {
    const Step<V>& s = p.steps[k];
    const int ld = s.ld;
    const int64_t size = p.call.table_nodes * TABLE_LINES * ld;
    const T* base = p.table + direction * size;
    T* grad = w.table ? w.table + direction * size : nullptr;
    char* touched = w.touched + direction * p.call.table_nodes;
    const T steps = T(int64_t(1) << p.call.instrs[k].arg0);
    for (int r = first; r < last; ++r) {  // cells and weights are there from the evaluation
      const T* gr = g + static_cast<int64_t>(r) * ld;
      const int64_t index = static_cast<int64_t>(w.cell[r]);
      if (index < 0) {
        next[r] = direct_back(w.out[k - 1][r], direction, gr, k);
        continue;
      }
      if (grad) {
        T* q = grad + index * TABLE_LINES * ld;
        for (int64_t node = 0; node < 2; ++node)
          if (!touched[index + node]) {
            touched[index + node] = 1;
            std::memset(q + node * TABLE_LINES * ld, 0, sizeof(T) * TABLE_LINES * ld);
          }
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

  T direct_back(T value, int direction, const T* g, int k) {
    const Instr& in = p.call.instrs[k];
    const int m = in.n_in;
    if (in.w < 0) return std::numeric_limits<T>::quiet_NaN();
    const T* matrix = p.rest();
    T* gamma = w.rest;
    fourier_row<V>(frequencies(direction), m, 1, &value, gamma);
    T total = 0;
    for (int q = 0; q < 2 * m; ++q) {
      T dot = 0;
      for (int c = 0; c < in.n_out; ++c) dot += matrix[static_cast<int64_t>(c) * 2 * m + q] * g[c];
      // d cos = -2 pi b sin, d sin = 2 pi b cos
      total += q < m ? -dot * gamma[m + q] * frequencies(direction)[q] : dot * gamma[q - m] * frequencies(direction)[q - m];
    }
    if (w.grad_rest) {
      if (!w.beyond) std::memset(w.grad_rest, 0, sizeof(T) * p.rest_size);
      w.beyond = true;
      for (int c = 0; c < in.n_out; ++c)
        for (int q = 0; q < 2 * m; ++q) w.grad_rest[static_cast<int64_t>(c) * 2 * m + q] += gamma[q] * g[c];
    }
    return total * T(6.283185307179586476925);
  }

 private:
  const T* frequencies(int direction) const {
    const Instr& in = p.call.instrs[p.table_step];
    return p.params + in.arg1 + static_cast<int64_t>(direction) * in.n_in;
  }
};

}  // namespace ngk
