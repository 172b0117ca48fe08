// The node terms of edge updates: projections of the node states at both ends of an edge, and the way back.
#pragma once

#include "worker.h"

namespace ngk {

template <class V>
struct NodeTerms : OnWorker<V> {
  using OnWorker<V>::OnWorker, OnWorker<V>::p, OnWorker<V>::w;
  using T = typename V::T;
  using R = typename V::R;

  // Node terms of a piece: s for destinations, t for sources; where partners are evaluated, both for both.
  void of(const Piece& piece) {
    for (size_t k = 0; k < p.steps.size(); ++k) {
      const Step<V>& s = p.steps[k];
      if (!s.node) continue;
      w.s[k] = piece.at ? s.all_s : w.own_s[k];
      w.t[k] = piece.at ? s.all_t : w.own_t[k];
      w.node_ld[k] = piece.at ? p.all_ld : s.ld;
      if (piece.at) continue;
      const Instr& in = p.call.instrs[k];
      const int dx = p.call.x_width[in.x], rows = piece.rows(), cols = piece.cols();
      const T* x = static_cast<const T*>(p.call.xs[in.x]) + piece.copy * piece.row->node_stride * dx;
      const T *dst = x + (piece.row->dst + piece.i0) * dx, *src = x + (piece.row->src + piece.j0) * dx;
      const bool both = p.call.paired && p.live(*piece.row) > 0;
      const int64_t behind = p.call.paired ? static_cast<int64_t>(rows) * s.ld : 0;
      project(dst, dx, rows, s.wd, s.bias, w.own_s[k]);
      if (both) project(src, dx, cols, s.wd, s.bias, w.own_s[k] + behind);
      if (both) project(dst, dx, rows, s.ws, nullptr, w.own_t[k]);
      project(src, dx, cols, s.ws, nullptr, w.own_t[k] + behind);
    }
  }

  // Node terms of nodes first .. last - 1, for sparse pieces: their sources come from anywhere, so each is projected once.
  void all(int64_t first, int64_t last) {
    for (size_t k = 0; k < p.steps.size(); ++k) {
      const Step<V>& s = p.steps[k];
      if (!s.node) continue;
      const int dx = p.call.x_width[p.call.instrs[k].x], n = static_cast<int>(last - first);
      const T* x = static_cast<const T*>(p.call.xs[p.call.instrs[k].x]) + first * dx;
      project(x, dx, n, s.wd, s.bias, w.own_s[k]);
      project(x, dx, n, s.ws, nullptr, w.own_t[k]);
      for (int r = 0; r < n; ++r) {
        const int64_t to = (first - p.low_node + r) * p.all_ld, from = static_cast<int64_t>(r) * s.ld;
        std::memcpy(s.all_s + to, w.own_s[k] + from, sizeof(T) * s.ld);
        std::memcpy(s.all_t + to, w.own_t[k] + from, sizeof(T) * s.ld);
      }
    }
  }

  // Adds the rows of g to the node gradients of their destinations and sources.
  void add_gradients(const Tile<V>& t, int k, const T* g) {
    const int ld = p.steps[k].ld;
    T *gs = w.grad_s[k], *gt = w.grad_t[k];
    if (t.partners(k)) add_partner_gradients(t, g, ld, gs, gt);
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
  void add_partner_gradients(const Tile<V>& t, const T* g, int ld, T* gs, T* gt) {
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

  // From the gradients of node terms to those of the projections and the node states.
  void gradients(const Piece& piece) {
    if (piece.at) return;  // all_gradients
    const bool both = p.call.paired && p.live(*piece.row) > 0;
    const int rows = piece.rows(), cols = piece.cols();
    for (size_t k = 0; k < p.steps.size(); ++k) {
      const Step<V>& s = p.steps[k];
      if (!s.node) continue;
      const Instr& in = p.call.instrs[k];
      const int dx = p.call.x_width[in.x];
      const T* x = static_cast<const T*>(p.call.xs[in.x]) + piece.copy * piece.row->node_stride * dx;
      const T *x_i = x + (piece.row->dst + piece.i0) * dx, *x_j = x + (piece.row->src + piece.j0) * dx;
      const int64_t behind = p.call.paired ? static_cast<int64_t>(rows) * s.ld : 0;
      const T *dst_i = w.grad_s[k], *src_j = w.grad_t[k] + behind;                                    // of edges
      const T *dst_j = both ? w.grad_s[k] + behind : nullptr, *src_i = both ? w.grad_t[k] : nullptr;  // of partners
      const auto project = [&](const T* nodes, const T* g, int n, int64_t to) {
        if (g) gemm_outer<V>(nodes, dx, dx, g, s.ld, n, w.params + to, s.ld);
      };
      if (p.call.grad_params) {
        project(x_i, dst_i, rows, s.g_wd);
        project(x_j, src_j, cols, s.g_ws);
        project(x_j, dst_j, cols, s.g_wd);
        project(x_i, src_i, rows, s.g_ws);
        for (int i = 0; i < (both ? rows + cols : rows); ++i)
          for (int c = 0; c < s.ld; ++c) w.params[s.g_b + c] += w.grad_s[k][static_cast<int64_t>(i) * s.ld + c];
      }
      if (!p.call.grad_xs[in.x]) continue;
      const auto back = [&](const T* g, int n, const Matrix<V>& m, T* to) {
        if (g) gemm<V>(g, s.ld, n, m, to, FromRows<V>{to, m.ld});
      };
      back(dst_i, rows, s.wd_t, w.grad_x_i[in.x]);
      back(src_i, rows, s.ws_t, w.grad_x_i[in.x]);
      back(src_j, cols, s.ws_t, w.grad_x_j[in.x]);
      back(dst_j, cols, s.wd_t, w.grad_x_j[in.x]);
    }
  }

  // Adds the gradients of a sparse piece's node terms to those of all nodes.
  void commit_sparse(const Piece& piece) {
    const bool both = p.call.paired && p.live(*piece.row) > 0;
    const int64_t base = piece.copy * piece.row->node_stride - p.low_node, rows = piece.rows(), shift = p.call.paired ? rows : 0;
    const auto add = [&](const std::vector<T*>& terms, T* Step<V>::* all, int64_t row, int64_t node) {
      for (size_t k = 0; k < p.steps.size(); ++k) {
        const Step<V>& s = p.steps[k];
        if (!s.node) continue;
        T* to = s.*all + node * p.all_ld;
        const T* g = terms[k] + row * s.ld;
        for (int c = 0; c < s.ld; c += V::W) V::store(to + c, V::add(V::load(to + c), V::load(g + c)));
      }
    };
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t node = base + piece.row->dst + piece.destination(static_cast<int>(i));
      add(w.grad_s, &Step<V>::all_grad_s, i, node);
      if (both) add(w.grad_t, &Step<V>::all_grad_t, i, node);
    }
    for (int64_t j = 0; j < piece.cols(); ++j) {
      const int64_t node = base + piece.row->src + piece.source(static_cast<int>(j));
      add(w.grad_t, &Step<V>::all_grad_t, shift + j, node);
      if (both) add(w.grad_s, &Step<V>::all_grad_s, shift + j, node);
    }
  }

  // From the gradients of the node terms of nodes item.first .. item.last - 1 to those of the projections and the node states.
  void all_gradients(const Item& item) {
    const int n = static_cast<int>(item.last - item.first);
    for (size_t x = 0; x < p.call.xs.size(); ++x)
      std::memset(w.grad_x_i[x], 0, sizeof(T) * row_blocks<V>(n) * padded<V>(p.call.x_width[x]));
    for (size_t step = 0; step < p.steps.size(); ++step) {
      const Step<V>& s = p.steps[step];
      if (!s.node) continue;
      const int x = p.call.instrs[step].x, dx = p.call.x_width[x];
      const T *nodes = static_cast<const T*>(p.call.xs[x]) + item.first * dx, *gs = s.all_grad_s + (item.first - p.low_node) * p.all_ld,
              *gt = s.all_grad_t + (item.first - p.low_node) * p.all_ld;
      if (p.call.grad_params) {
        gemm_outer<V>(nodes, dx, dx, gs, p.all_ld, n, w.params + s.g_wd, s.ld);
        gemm_outer<V>(nodes, dx, dx, gt, p.all_ld, n, w.params + s.g_ws, s.ld);
        for (int r = 0; r < n; ++r)
          for (int c = 0; c < s.ld; ++c) w.params[s.g_b + c] += gs[static_cast<int64_t>(r) * p.all_ld + c];
      }
      if (!p.call.grad_xs[x]) continue;
      gemm<V>(gs, p.all_ld, n, s.wd_t, w.grad_x_i[x], FromRows<V>{w.grad_x_i[x], s.wd_t.ld});
      gemm<V>(gt, p.all_ld, n, s.ws_t, w.grad_x_i[x], FromRows<V>{w.grad_x_i[x], s.ws_t.ld});
    }
    for (size_t x = 0; x < p.call.xs.size(); ++x) {
      const int dx = p.call.x_width[x], ld = padded<V>(dx);
      for (int r = 0; p.call.grad_xs[x] && r < n; ++r)
        for (int c = 0; c < dx; ++c)
          static_cast<T*>(p.call.grad_xs[x])[(item.first + r) * dx + c] += w.grad_x_i[x][static_cast<int64_t>(r) * ld + c];
    }
  }

 private:
  // out[n, ld] = x m + bias for n rows of the caller's memory: the last rows go through a padded copy.
  void project(const T* x, int dx, int n, const Matrix<V>& m, const T* bias, T* out) {
    const int whole = n / V::MR * V::MR;
    const auto go = [&](const T* a, int rows, T* c) {
      if (bias) {
        gemm<V>(a, dx, rows, m, c, FromRow<V>{bias});
      } else {
        gemm<V>(a, dx, rows, m, c, FromZero<V>{});
      }
    };
    if (whole) go(x, whole, out);
    if (whole < n) {
      std::memcpy(w.rest, x + static_cast<int64_t>(whole) * dx, sizeof(T) * (n - whole) * dx);
      go(w.rest, V::MR, out + static_cast<int64_t>(whole) * m.ld);
    }
  }
};

}  // namespace ngk
