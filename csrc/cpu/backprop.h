// The back-propagator: takes the gradient of a register down the instructions of one tile, into the gradients of
// parameters and table (of the item), node terms (of the piece) and raw weights or a virtual checkpoint (memory).
#pragma once

#include "evaluator.h"

namespace ngk {

template <class V>
class Backprop : OnWorker<V> {
 public:
  using OnWorker<V>::OnWorker;
  using T = typename V::T;
  using R = typename V::R;

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
    this->column_sums(w.grad_s[common], rows, s.ld, g);
    for (int k = 0; k < common; ++k)
      if (w.grad_add[k]) {
        std::memset(w.grad_add[k], 0, sizeof(T) * (half + 1) * p.steps[k].ld);
        std::memcpy(w.grad_add[k], w.common_add[k], sizeof(T) * p.steps[k].ld);
      }
    if (!linear_only(t, common, g, next)) return;
    run(t, 0, scales(common) ? common - 1 : common, 1, 0);  // the activation's derivative is in
  }

 private:
  using OnWorker<V>::p, OnWorker<V>::w;

  // The sums over a tile's rows, for `finish`.
  void keep(const Tile<V>& t, int slot) {
    const int n = static_cast<int>(p.steps.size()), e = p.call.message_start - 1;
    sum_rows(t, n - 1, w.g[slot], w.common);
    sum_rows(t, e, w.grad_add[e], w.common_add[e]);
  }
  // Adds the rows of a tile's gradient of instruction k.
  void sum_rows(const Tile<V>& t, int k, const T* g, T* to) {
    const int ld = p.steps[k].ld;
    t.spans(k, [&](int first, int rows) { this->column_sums(g + static_cast<int64_t>(first) * ld, rows, ld, to); });
  }

  void run(const Tile<V>& t, int begin, int end, int slot, int common) {
    T *g = w.g[slot], *next = w.g[2];
    for (int k = end - 1; k >= begin; --k) {
      const Instr& in = p.call.instrs[k];
      const Step<V>& s = p.steps[k];
      if (w.grad_add[k]) this->add(g, w.grad_add[k], g, t.rows(k), s.ld, s.ld);
      switch (in.op) {
        case MARK:
          RawValues<V>(p, w).write_carriers(t, k, g);
          return;
        case MASK:
          if (t.piece->row->flags & TOKEN) return;
          break;
        case ACT:
          multiply(g, w.out[k - 1], this->vector_count(t.rows(k), s.ld));
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
          bias_or_nodes(t, k, g);
          FourierEncoder<V>(p, w).table_back(t, k, g, next);
          swap(g, next);
          RawValues<V>(p, w).write_weights(t, g, 1, 1);  // past LOAD, whose gradient is in g
          return;
        case FOURIER:
          if (!p.call.need_weights) return;
          FourierEncoder<V>(p, w).features_back(t, k, g, next);
          swap(g, next);
          break;
        case LOAD:
          RawValues<V>(p, w).write_weights(t, g, s.ld, in.n_out);
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

  void bias_or_nodes(const Tile<V>& t, int k, const T* g) {
    const Step<V>& s = p.steps[k];
    if (s.node) {
      NodeTerms<V>(p, w).add_gradients(t, k, g);
    } else if (p.call.grad_params && p.call.instrs[k].b >= 0) {
      t.spans(k, [&](int first, int n) { this->column_sums(g + static_cast<int64_t>(first) * s.ld, n, s.ld, w.params + s.g_b); });
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
        gemm_outer<V>(at(x, first, lda), lda, in.n_in, at(g, first, s.ld), s.ld, n, w.params + s.g_w[this->direction(t, first)], s.ld);
        if (in.arg1 >= 0) gemm_outer<V>(at(x, t.half, lda), lda, in.n_in, at(g, first, s.ld), s.ld, n, w.params + s.g_partner, s.ld);
      });
    if (k == 1 && !p.call.need_weights) return false;
    const T* scale = scales(k) ? w.out[k - 2] : nullptr;
    const auto go = [&](int first, int rows) {
      gemm<V>(at(g, first, s.ld), s.ld, rows, s.bwd[this->direction(t, first)], at(next, first, ldn), FromZero<V>{},
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
    if (scale) multiply(next, scale, this->vector_count(t.n, s.partner_t.ld));
    gemm<V>(g, s.ld, t.n, s.partner_t, next + t.half * ld, FromZero<V>{}, scale ? scale + t.half * ld : nullptr);
  }

  // A pair update of both directions (Evaluator::pair), by sums and differences of the gradients.
  bool pair(const Tile<V>& t, int k, const T* g, T* next) {
    const Instr& in = p.call.instrs[k];
    const Step<V>& s = p.steps[k];
    const int lda = p.steps[k - 1].ld, ldn = s.plus_t.ld;
    const int64_t half = t.half;
    if (p.call.grad_params) {
      this->sums(w.out[k - 1], t.half, t.n, lda, w.pair);
      this->sums(g, t.half, t.n, s.ld, next);  // next: free until its own turn
      gemm_outer<V>(w.pair, lda, in.n_in, next, s.ld, t.n, w.params + s.g_plus, s.ld);
      gemm_outer<V>(w.pair + half * lda, lda, in.n_in, next + half * s.ld, s.ld, t.n, w.params + s.g_minus, s.ld);
    }
    if (k == 1 && !p.call.need_weights) return false;
    this->sums(g, t.half, t.n, s.ld, w.pair);
    gemm<V>(w.pair, s.ld, t.n, s.plus_t, next, FromZero<V>{});
    gemm<V>(w.pair + half * s.ld, s.ld, t.n, s.minus_t, next + half * ldn, FromZero<V>{});
    for (int64_t c = 0; c < this->vector_count(t.n, ldn); c += V::W) {
      T *a = next + c, *b = a + half * ldn;
      const R x = V::load(a), y = V::load(b);
      V::store(a, V::add(x, y));
      V::store(b, V::sub(x, y));
    }
    if (scales(k)) multiply(next, w.out[k - 2], this->vector_count(t.rows(k), ldn));
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
        Evaluator<V>::moments(x, s.ones, in.n_out, ld, s.eps, &mean, &scale);
        for (int c = 0; c < ld; c += V::W) {
          const R y = V::mul(layer_norm<V>(V::load(x + c), mean, scale), V::load(s.ones + c));
          const R up = V::mul(V::load(gr + c), V::load(s.ones + c)), gy = V::mul(up, V::load(s.gamma + c));
          T *gw = w.params + s.g_w[0] + c, *gb = w.params + s.g_b + c;
          V::store(gw, V::fma(up, y, V::load(gw)));
          V::store(gb, V::add(up, V::load(gb)));
          sum = V::add(sum, gy);
          dot = V::fma(gy, y, dot);
        }
        const R a = V::set1(V::sum(sum) * one_n), b = V::set1(V::sum(dot) * one_n);
        for (int c = 0; c < ld; c += V::W) {
          const R y = layer_norm<V>(V::load(x + c), mean, scale), gy = V::mul(V::load(gr + c), V::load(s.gamma + c));
          V::store(gr + c, layer_norm_back<V>(gy, y, a, b, V::mul(scale, V::load(s.ones + c))));
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
};

}  // namespace ngk
