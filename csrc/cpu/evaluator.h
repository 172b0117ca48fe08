// The evaluator of an edge expression, tile by tile.
#pragma once

#include "fourier_encoder.h"
#include "node_terms.h"
#include "raw_values.h"
#include "tiler.h"

namespace ngk {

template <class V>
class Evaluator : OnWorker<V> {
 public:
  using OnWorker<V>::OnWorker;
  using T = typename V::T;
  using R = typename V::R;

  // Evaluates a piece and calls f(tile) for each tile of its edges; the instructions' results are then in w.out.
  template <bool GRAD, class F>
  void tiles(const Piece& piece, F&& f) {
    NodeTerms<V>(p, w).of(piece);
    common<GRAD>(piece);
    Tiler<V>(p, w)(piece, [&](const Tile<V>& t) {
      run<GRAD>(t);
      f(t);
    });
  }

  // Mean and 1 / sqrt(var + eps) of a row of n numbers, ld with the padding: `ones` is 1 on the n, 0 beyond.
  static NGK_INLINE_MEMBER void moments(const T* x, const T* ones, int n, int ld, T eps, R* mean, R* scale) {
    R sum = V::zero(), square = V::zero();
    for (int c = 0; c < ld; c += V::W) sum = V::fma(V::load(ones + c), V::load(x + c), sum);
    const R mu = V::set1(V::sum(sum) / static_cast<T>(n));
    for (int c = 0; c < ld; c += V::W) {
      const R d = V::mul(V::load(ones + c), V::sub(V::load(x + c), mu));
      square = V::fma(d, d, square);
    }
    *mean = mu;
    *scale = V::set1(T(1) / std::sqrt(V::sum(square) / static_cast<T>(n) + eps));
  }

 private:
  using OnWorker<V>::p, OnWorker<V>::w;

  // What all pairs of a piece have in common (Prepared::constant), once: a whole tile of it, and its share in the first node term.
  template <bool GRAD>
  void common(const Piece& piece) {
    const int until = p.constant(*piece.row);
    if (!until) return;
    const int most = p.tile / 2;
    for (int r = 0; r < p.tile_rows(); ++r) w.i[r] = w.j[r] = 0;
    run<GRAD>(Tile<V>{most, p.live(*piece.row) ? row_blocks<V>(most) : 0, p.live(*piece.row), 0, w.i, w.j, w.i, w.j, &piece}, 0, until);
    if (until == static_cast<int>(p.steps.size())) return;
    const Step<V>& s = p.steps[until];
    const T* x = w.out[until - 1];
    T* share = w.out[until];  // of a block of rows, all the same
    gemm<V>(x, p.steps[until - 1].ld, V::MR, s.fwd[0], share, FromZero<V>{});
    if (p.call.instrs[until].arg1 >= 0) gemm<V>(x, p.steps[until - 1].ld, V::MR, s.partner, share, FromRows<V>{share, s.ld});
    const int rows = piece.rows() + (p.live(*piece.row) ? piece.cols() : 0);
    for (int i = 0; i < rows; ++i)
      for (int c = 0; c < s.ld; ++c) w.own_s[until][static_cast<int64_t>(i) * s.ld + c] += share[c];
  }

  // Runs the instructions of a tile that are not done yet.
  template <bool GRAD>
  void run(const Tile<V>& t) {
    const int n = static_cast<int>(p.steps.size()), done = p.constant(*t.piece->row);
    if (done && done < n) {  // the node term holds the rest
      Matrix<V> none;
      none.ld = p.steps[done].ld;
      gemm<V>(w.out[done], 0, t.rows(done), none, w.out[done], FromNodes<V>{w.s[done], w.t[done], w.node_ld[done], t.at_i, t.at_j});
    }
    run<GRAD>(t, done ? done + 1 : 0, n);
  }

  // Runs instructions first .. last - 1. With GRAD, activations leave their derivative in their input's place.
  template <bool GRAD>
  void run(const Tile<V>& t, int first_step, int last_step) {
    for (int k = first_step; k < last_step; ++k) {
      const Instr& in = p.call.instrs[static_cast<size_t>(k)];
      const Step<V>& s = p.steps[static_cast<size_t>(k)];
      const T* prev = k ? w.out[k - 1] : nullptr;
      switch (in.op) {
        case LOAD:
          t.spans(k, [&](int first, int) { RawValues<V>(p, w).load(t, in, s.ld, first); });
          break;
        case FOURIER:
          FourierEncoder<V>(p, w).features(t, k, prev);
          break;
        case TABLE:
          FourierEncoder<V>(p, w).table(t, k);
          break;
        case LIN:
          linear(t, k, prev);
          break;
        case ACT:
          activate<V, GRAD>(static_cast<int>(in.arg0), prev, w.out[k], GRAD ? w.out[k - 1] : nullptr, this->vector_count(t.rows(k), s.ld));
          break;
        case ADD:
          this->add(prev, w.out[in.arg0], w.out[k], t.rows(k), s.ld, p.steps[in.arg0].ld);
          break;
        case NORM:
          norm(t, k, prev);
          break;
        case MASK:
          if (t.piece->row->flags & TOKEN) {
            std::memset(w.out[k], 0, sizeof(T) * t.rows(k) * s.ld);
            break;
          }
          [[fallthrough]];
        case MARK:
          std::memcpy(w.out[k], prev, sizeof(T) * row_blocks<V>(t.rows(k)) * s.ld);
          break;
      }
    }
  }

  // A pair update where both directions are wanted: z = A e + B e' and z' = A e' + B e are the sum and the difference of
  // (A + B) / 2 (e + e') and (A - B) / 2 (e - e'): half the products.
  void pair(const Tile<V>& t, int k, const T* prev) {
    const Step<V>& s = p.steps[k];
    const int lda = p.steps[k - 1].ld;
    T *out = w.out[k], *back = out + static_cast<int64_t>(t.half) * s.ld;
    this->sums(prev, t.half, t.n, lda, w.pair);
    gemm<V>(w.pair, lda, t.n, s.plus, out, FromZero<V>{});
    gemm<V>(w.pair + static_cast<int64_t>(t.half) * lda, lda, t.n, s.minus, back, FromZero<V>{});
    for (int r = 0; r < t.n; ++r) {
      const T *si = s.bias, *sj = s.bias, *ti = nullptr, *tj = nullptr;
      if (s.node) {
        si = this->dst_term(k, t.at_i[r]);
        sj = this->dst_term(k, t.at_j[r]);
        ti = this->src_term(k, t.at_i[r]);
        tj = this->src_term(k, t.at_j[r]);
      }
      T *a = out + static_cast<int64_t>(r) * s.ld, *b = back + static_cast<int64_t>(r) * s.ld;
      for (int c = 0; c < s.ld; c += V::W) {
        const R x = V::load(a + c), y = V::load(b + c);
        V::store(a + c, V::add(V::add(x, y), tj ? V::add(V::load(si + c), V::load(tj + c)) : V::load(si + c)));
        V::store(b + c, V::add(V::sub(x, y), ti ? V::add(V::load(sj + c), V::load(ti + c)) : V::load(sj + c)));
      }
    }
  }

  void linear(const Tile<V>& t, int k, const T* prev) {
    if (p.call.instrs[k].arg1 >= 0 && t.partners(k)) return pair(t, k, prev);
    const Instr& in = p.call.instrs[k];
    const Step<V>& s = p.steps[k];
    const int lda = in.n_in ? p.steps[k - 1].ld : 0;
    const T* a = in.n_in ? prev : w.out[k];
    const auto go = [&](int first, int rows) {
      Matrix<V> m = s.fwd[this->direction(t, first)];
      if (in.n_in == 0) m.ld = s.ld;  // K = 0: the node term alone
      const T* from = a + static_cast<int64_t>(first) * lda;
      T* to = w.out[k] + static_cast<int64_t>(first) * s.ld;
      if (s.node) {
        gemm<V>(from, lda, rows, m, to, FromNodes<V>{w.s[k], w.t[k], w.node_ld[k], t.at_i + first, t.at_j + first});
      } else {
        gemm<V>(from, lda, rows, m, to, FromRow<V>{s.bias});
      }
    };
    if (in.arg0) {
      t.spans(k, go);
    } else {
      go(0, t.rows(k));
    }
    if (in.arg1 < 0) return;
    gemm<V>(prev + static_cast<int64_t>(t.half) * lda, lda, t.n, s.partner, w.out[k], FromRows<V>{w.out[k], s.ld});
  }

  void norm(const Tile<V>& t, int k, const T* prev) {
    const Instr& in = p.call.instrs[k];
    const Step<V>& s = p.steps[k];
    const int ld = s.ld;
    for (int r = 0; r < t.rows(k); ++r) {
      const T* x = prev + static_cast<int64_t>(r) * ld;
      T* out = w.out[k] + static_cast<int64_t>(r) * ld;
      R mean, scale;
      moments(x, s.ones, in.n_out, ld, s.eps, &mean, &scale);
      for (int c = 0; c < ld; c += V::W)
        V::store(out + c, V::fma(layer_norm<V>(V::load(x + c), mean, scale), V::load(s.gamma + c), V::load(s.bias + c)));
    }
  }
};

}  // namespace ngk
