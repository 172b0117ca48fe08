// The memory of one worker, and what everything that works in it shares.
#pragma once

#include "views.h"

namespace ngk {

// Memory and node terms of one worker.
template <class V>
struct Worker {
  using T = typename V::T;
  std::vector<T*> out;                 // result of each instruction, [tile, ld]
  std::vector<T*> own_s, own_t;        // node terms of a piece as destinations and sources, [rows, ld] and [cols, ld]; paired: of all
  std::vector<const T*> s, t;          // those that the current piece reads: its own, or (sparse) of all nodes
  std::vector<int> node_ld;            // from one of their rows to the next
  std::vector<T*> grad_s, grad_t;      // its nodes, destinations first, [rows + cols, ld] both
  std::vector<T*> grad_add;            // gradient waiting at the instruction an ADD or attention reads
  std::vector<T*> grad_x_i, grad_x_j;  // node gradients of the piece held until its commit, [rows, d_x], [cols, d_x]
  int *i = nullptr, *j = nullptr, *at_i = nullptr, *at_j = nullptr;
  int64_t* number[2] = {nullptr, nullptr};
  T* cell = nullptr;                       // of each edge in the table, [tile]; -1: beyond it
  T *hermite = nullptr, *slope = nullptr;  // its interpolation weights and their derivatives, [2 TABLE_LINES][tile]
  T *g[3] = {nullptr, nullptr, nullptr}, *message = nullptr /* FiLM shifts on their way */, *coefficients = nullptr, *stats = nullptr,
    *rest = nullptr;
  T *params = nullptr, *table = nullptr, *raw_grad[2] = {nullptr, nullptr};  // gradients of the current item; raw_grad: of the piece
  T* pair = nullptr;                                                         // sums and differences of a tile's edges and partners
  std::vector<T*> common_add;                                                // as grad_add, summed over a piece
  T* common = nullptr;      // sums over a piece of the gradients of what its pairs have in common: share, state
  T* attention = nullptr;   // what attention keeps for a piece
  char* touched = nullptr;  // [directions, nodes] of the table: whether its gradient holds something; the lines of others are not even 0
  T* grad_rest = nullptr;   // of the current item, of the matrix for weights beyond the table; there if `beyond`
  bool beyond = false;
};

template <class V>
struct OnWorker {
  using T = typename V::T;
  using R = typename V::R;
  const Prepared<V>& p;
  Worker<V>& w;
  OnWorker(const Prepared<V>& prepared, Worker<V>& worker) : p(prepared), w(worker) {}

  // Encoder variant of the edges (first 0), of their partners.
  int direction(const Tile<V>& t, int first) const {
    return p.call.directions > 1 ? static_cast<int>(first ? t.piece->row->partner_variant : t.piece->row->variant) : 0;
  }

  // Node term k of a destination, of a source.
  const T* dst_term(int k, int i) const { return w.s[k] + static_cast<int64_t>(i) * w.node_ld[k]; }
  const T* src_term(int k, int j) const { return w.t[k] + static_cast<int64_t>(j) * w.node_ld[k]; }

  static int64_t vector_count(int64_t rows, int ld) { return (rows * ld + V::W - 1) / V::W * V::W; }

  static void add(const T* a, const T* b, T* out, int rows, int ld, int ldb) {
    const int n = ld < ldb ? ld : ldb;
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < n; ++c)
        out[static_cast<int64_t>(r) * ld + c] = a[static_cast<int64_t>(r) * ld + c] + b[static_cast<int64_t>(r) * ldb + c];
  }

  // e + e' in the rows of edges, e - e' in those of their partners.
  static void sums(const T* x, int half, int n, int ld, T* to) {
    const T* y = x + static_cast<int64_t>(half) * ld;
    T* difference = to + static_cast<int64_t>(half) * ld;
    if (ld % V::W) {  // no padding: a whole vector would reach the other half
      for (int64_t c = 0; c < static_cast<int64_t>(n) * ld; ++c) {
        const T a = x[c], b = y[c];
        to[c] = a + b;
        difference[c] = a - b;
      }
      return;
    }
    for (int64_t c = 0; c < vector_count(n, ld); c += V::W) {
      const R a = V::load(x + c), b = V::load(y + c);
      V::store(to + c, V::add(a, b));
      V::store(difference + c, V::sub(a, b));
    }
  }

  // out += the sum of the rows of g.
  static void column_sums(const T* g, int rows, int ld, T* out) {
    for (int c = 0; c < ld; c += V::W) {
      R a = V::load(out + c);
      for (int r = 0; r < rows; ++r) a = V::add(a, V::load(g + static_cast<int64_t>(r) * ld + c));
      V::store(out + c, a);
    }
  }
};

}  // namespace ngk
