// Parameters of a call in the layouts kernels read, and where each one's gradient accumulates.
#pragma once

#include <mutex>

#include "gemm.h"
#include "schedule.h"

namespace ngk {

// Hands out pieces of one buffer; with a null base it only measures.
struct Arena {
  char* base = nullptr;
  size_t used = 0;
  template <class X>
  X* take(size_t n) {
    X* p = base ? reinterpret_cast<X*>(base + used) : nullptr;
    used += (n * sizeof(X) + 63) / 64 * 64;
    return p;
  }
};

template <class V>
struct Step {
  using T = typename V::T;
  Matrix<V> fwd[2], bwd[2];      // LIN: [n_in, n_out] and its transpose, by direction
  Matrix<V> wd, ws, wd_t, ws_t;  // node term: [d_x, n_out] and transposes
  // LIN with partners: what their registers are multiplied with; its sum with and difference from fwd (evaluator.h)
  Matrix<V> partner, partner_t, plus, minus, plus_t, minus_t;
  T* bias = nullptr;                    // [ld], zero where none
  T *gamma = nullptr, *ones = nullptr;  // NORM: [ld] scale, and 1 on the columns that count
  T eps = 0;
  T *all_s = nullptr, *all_t = nullptr, *all_grad_s = nullptr, *all_grad_t = nullptr;  // sparse blocks: its part of all_t and so on
  int ld = 0;                                                                          // of the result
  int64_t g_w[2] = {-1, -1}, g_b = -1, g_wd = -1, g_ws = -1, g_partner = -1, g_plus = -1,
          g_minus = -1;  // offsets into the padded parameter gradients
  bool node = false;
};

template <class V>
struct Prepared {
  using T = typename V::T;
  const Call& call;
  std::vector<Step<V>> steps;
  const T *params, *table = nullptr;  // table: [directions, nodes, TABLE_LINES, table_ld]
  int table_step = -1, table_ld = 0, tile = 48, max_ld = 0;
  int last_pair = 0;     // the last instruction that reads partners: below it, they are evaluated
  int first_node = 0;    // the first instruction with a node term (or a checkpoint): below it, pairs without edges are all alike
  size_t bytes = 0;      // of all of it
  size_t grad_size = 0;  // of the padded parameter gradients
  size_t rest_size = 0;  // of the matrix for weights beyond the table
  int64_t low_node = 0, high_node = 0;   // sparse blocks join nodes low_node .. high_node - 1: the rows of all_s, all_t
  T *all_s = nullptr, *all_t = nullptr;  // of each node as destination, as source: terms of all steps side by side [nodes, all_ld]
  int all_ld = 0;

  bool backward;  // whether the transposes that gradients go through are wanted
  mutable std::once_flag asked_rest;

  // measured: finds sizes alone, reads no values.
  Prepared(const Call& c, bool backward, bool measured)
      : call(c), steps(c.instrs.size()), params(static_cast<const T*>(c.params)), backward(backward) {
    Arena measure;
    build(measure);
    bytes = measure.used;
    if (measured) return;
    Arena arena;
    arena.base = static_cast<char*>(scratch(0, measure.used));
    grad_size = 0;
    build(arena);
  }

  // Rows of a tile's buffers: edges, then (from a full block on) their partners.
  int tile_rows() const { return call.paired ? 2 * row_blocks<V>(tile / 2) : row_blocks<V>(tile); }
  // Instructions below this give the same result for all pairs of a row, because none has raw features; 0: not so.
  int constant(const Row& row) const {
    const int n = static_cast<int>(steps.size());
    if (!call.paired || row.kind == SPARSE || row.weight >= 0 || row.partner >= 0) return 0;
    if (first_node == n) return call.combine == ATTEND ? n : 0;
    return first_node >= 2 && call.instrs[static_cast<size_t>(first_node)].op == LIN ? first_node : 0;
  }
  // Instructions below this are evaluated for the partners of a row's edges.
  int live(const Row& row) const { return row.flags & PARTNER ? static_cast<int>(steps.size()) : last_pair; }

  Matrix<V> matrix(Arena& arena, int64_t offset, int rows, int cols, bool transpose) {
    Matrix<V> m;
    m.K = transpose ? rows : cols;  // params hold [n_out, n_in]; a forward product reads [n_in, n_out]
    m.N = transpose ? cols : rows;
    m.ld = padded<V>(m.N);
    T* p = arena.take<T>(static_cast<size_t>(m.K) * m.ld);
    const T* src = params + offset;
    if (p)
      for (int k = 0; k < m.K; ++k)
        for (int n = 0; n < m.ld; ++n)
          p[k * m.ld + n] = n >= m.N ? T(0) : (transpose ? src[k * cols + n] : src[static_cast<int64_t>(n) * cols + k]);
    m.p = p;
    pack(arena, m);
    return m;
  }

  // The bf16 form of a matrix.
  void pack(Arena& arena, Matrix<V>& m) {
    if constexpr (V::BF16) {
      const T* p = m.p;
      uint32_t* q = arena.take<uint32_t>(static_cast<size_t>((m.K + 1) / 2) * m.ld);
      if (p)
        for (int k = 0; k < m.K; k += 2)
          for (int n = 0; n < m.ld; ++n)
            q[k / 2 * m.ld + n] =
                to_bf16(p[k * m.ld + n]) | (k + 1 < m.K ? static_cast<uint32_t>(to_bf16(p[(k + 1) * m.ld + n])) << 16 : 0u);
      m.pairs = q;
    }
  }

  int64_t grads(size_t n) {
    const int64_t at = static_cast<int64_t>(grad_size);
    grad_size += (n + 15) / 16 * 16;
    return at;
  }

  void build(Arena& arena) {
    first_node = 0;
    while (first_node < static_cast<int>(steps.size()) && call.instrs[first_node].x < 0 && call.instrs[first_node].op != MARK) ++first_node;
    for (size_t k = 0; k < steps.size(); ++k) {
      const Instr& in = call.instrs[k];
      Step<V>& s = steps[k];
      const bool same = in.op == ACT || in.op == ADD || in.op == MARK || in.op == NORM || in.op == MASK;
      s.ld = in.op == LOAD ? in.n_out : same ? steps[k - 1].ld : padded<V>(in.n_out);
      if (s.ld > max_ld) max_ld = s.ld;
      if (padded<V>(in.n_in) > max_ld) max_ld = padded<V>(in.n_in);  // gradients of an unpadded LOAD are made padded
      if (in.op == NORM) prepare_norm(arena, in, s);
      if (in.op != LIN && in.op != TABLE) continue;
      if (in.op == LIN && in.arg1 >= 0) {
        last_pair = static_cast<int>(k);
        s.partner = matrix(arena, in.arg1, in.n_out, in.n_in, false);
        if (backward) s.partner_t = matrix(arena, in.arg1, in.n_out, in.n_in, true);
        for (int64_t* g : {&s.g_partner, &s.g_plus, &s.g_minus}) *g = grads(static_cast<size_t>(in.n_in) * s.ld);
      }
      if (in.op == LIN && in.n_in)
        for (int v = 0; v < (in.arg0 ? call.directions : 1); ++v) {
          s.fwd[v] = matrix(arena, in.w + v * in.arg0, in.n_out, in.n_in, false);
          if (backward) s.bwd[v] = matrix(arena, in.w + v * in.arg0, in.n_out, in.n_in, true);
          s.g_w[v] = grads(static_cast<size_t>(in.n_in) * s.ld);
        }
      if (in.op == LIN && in.arg1 >= 0) prepare_pair(arena, s);
      if (in.op == LIN && !in.arg0) s.fwd[1] = s.fwd[0], s.bwd[1] = s.bwd[0], s.g_w[1] = s.g_w[0];
      s.bias = arena.take<T>(s.ld);
      if (s.bias)
        for (int n = 0; n < s.ld; ++n) s.bias[n] = in.b >= 0 && n < in.n_out ? params[in.b + n] : T(0);
      s.g_b = grads(s.ld);
      s.node = in.x >= 0;
      if (s.node) {
        const int dx = call.x_width[in.x];
        s.wd = matrix(arena, in.wd, in.n_out, dx, false);
        s.ws = matrix(arena, in.ws, in.n_out, dx, false);
        if (backward) {
          s.wd_t = matrix(arena, in.wd, in.n_out, dx, true);
          s.ws_t = matrix(arena, in.ws, in.n_out, dx, true);
        }
        s.g_wd = grads(static_cast<size_t>(dx) * s.ld);
        s.g_ws = grads(static_cast<size_t>(dx) * s.ld);
      }
      if (in.op == TABLE) prepare_table(arena, static_cast<int>(k));
    }
  }

  // The matrix [n_out, 2 m] for weights beyond the table, made at the first of them.
  const T* rest() const {
    std::call_once(asked_rest, [&] { call.fold_late(*call.fold); });
    return params + call.instrs[static_cast<size_t>(table_step)].w;
  }

  // (A + B) / 2 and (A - B) / 2 of a pair update's matrices.
  void prepare_pair(Arena& arena, Step<V>& s) {
    s.plus = blend(arena, s.fwd[0], s.partner, 1);
    s.minus = blend(arena, s.fwd[0], s.partner, -1);
    if (!backward) return;
    s.plus_t = blend(arena, s.bwd[0], s.partner_t, 1);
    s.minus_t = blend(arena, s.bwd[0], s.partner_t, -1);
  }
  Matrix<V> blend(Arena& arena, const Matrix<V>& a, const Matrix<V>& b, T sign) {
    Matrix<V> m = a;
    T* p = arena.take<T>(static_cast<size_t>(m.K) * m.ld);
    for (int64_t k = 0; p && k < static_cast<int64_t>(m.K) * m.ld; ++k) p[k] = T(0.5) * (a.p[k] + sign * b.p[k]);
    m.p = p;
    pack(arena, m);
    return m;
  }

  T* row(Arena& arena, const T* from, int n, int ld) {
    T* p = arena.take<T>(ld);
    for (int c = 0; p && c < ld; ++c) p[c] = c < n ? (from ? from[c] : T(1)) : T(0);
    return p;
  }

  void prepare_norm(Arena& arena, const Instr& in, Step<V>& s) {
    s.gamma = row(arena, params + in.w, in.n_out, s.ld);
    s.bias = row(arena, params + in.b, in.n_out, s.ld);
    s.ones = row(arena, nullptr, in.n_out, s.ld);
    double eps;
    std::memcpy(&eps, &in.arg0, sizeof(eps));
    s.eps = static_cast<T>(eps);
    s.g_w[0] = grads(s.ld);
    s.g_b = grads(s.ld);
  }

  void prepare_table(Arena& arena, int k) {
    const Instr& in = call.instrs[k];
    Step<V>& s = steps[k];
    table_step = k;
    table_ld = s.ld;
    if (in.w >= 0) rest_size = static_cast<size_t>(in.n_out) * 2 * in.n_in;
    const T* src = static_cast<const T*>(call.table);
    if (in.n_out == s.ld) {
      table = src;
      return;
    }
    const int64_t lines = TABLE_LINES * call.table_nodes * call.directions;
    T* p = arena.take<T>(static_cast<size_t>(lines) * s.ld);
    if (p)
      for (int64_t r = 0; r < lines; ++r)
        for (int n = 0; n < s.ld; ++n) p[r * s.ld + n] = n < in.n_out ? src[r * in.n_out + n] : T(0);
    table = p;
  }

  // Gradients of the sums and differences of pair updates, to those of their matrices.
  void join_pairs(T* g) const {
    for (const Step<V>& s : steps) {
      if (s.g_plus < 0) continue;
      for (int64_t k = 0; k < static_cast<int64_t>(s.partner.K) * s.ld; ++k) {
        const T plus = T(0.5) * g[s.g_plus + k], minus = T(0.5) * g[s.g_minus + k];
        g[s.g_w[0] + k] += plus + minus;
        g[s.g_partner + k] += plus - minus;
      }
    }
  }

  // Adds the padded gradients into grad_params, in its [n_out, n_in] form.
  void write_grads(const T* g) const {
    T* out = static_cast<T*>(call.grad_params);
    for (int64_t k = 0; k < call.n_params; ++k) out[k] = T(0);
    const auto put = [&](int64_t from, int64_t to, int rows, int cols, int ld) {
      for (int o = 0; o < rows; ++o)
        for (int i = 0; i < cols; ++i) out[to + static_cast<int64_t>(o) * cols + i] = g[from + static_cast<int64_t>(i) * ld + o];
    };
    for (size_t k = 0; k < steps.size(); ++k) {
      const Instr& in = call.instrs[k];
      const Step<V>& s = steps[k];
      if (in.op == NORM) {
        put(s.g_w[0], in.w, in.n_out, 1, 0);
        put(s.g_b, in.b, in.n_out, 1, 0);
      }
      if (in.op != LIN && in.op != TABLE) continue;
      if (in.op == LIN && in.arg1 >= 0) put(s.g_partner, in.arg1, in.n_out, in.n_in, s.ld);
      if (in.op == LIN && in.n_in)
        for (int v = 0; v < (in.arg0 ? call.directions : 1); ++v) put(s.g_w[v], in.w + v * in.arg0, in.n_out, in.n_in, s.ld);
      if (in.b >= 0) put(s.g_b, in.b, in.n_out, 1, 0);
      if (s.node) {
        put(s.g_wd, in.wd, in.n_out, call.x_width[in.x], s.ld);
        put(s.g_ws, in.ws, in.n_out, call.x_width[in.x], s.ld);
      }
    }
  }
};

}  // namespace ngk
