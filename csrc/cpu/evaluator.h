// The evaluator of an edge expression on one tile, and the memory it works in.
#pragma once

#include "views.h"

namespace ngk {

// Memory and node terms of one worker.
template <class V>
struct Worker {
  using T = typename V::T;
  std::vector<T*> out;             // result of each instruction, [tile, ld]
  std::vector<T*> own_s, own_t;    // node terms of a piece as destinations and sources, [rows, ld] and [cols, ld]; paired: of all
  std::vector<const T*> s, t;      // those that the current piece reads: its own, or (sparse) of all nodes
  std::vector<int> node_ld;        // from one of their rows to the next
  std::vector<T*> grad_s, grad_t;  // its nodes, destinations first, [rows + cols, ld] both
  std::vector<T*> grad_add;        // gradient waiting at the instruction an ADD or attention reads
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
  T* common = nullptr;     // sums over a piece of the gradients of what its pairs have in common: share, state
  T* attention = nullptr;  // what attention keeps for a piece
  int64_t table_low[2], table_high[2];
};

template <class V>
class Evaluator {
 public:
  using T = typename V::T;
  using R = typename V::R;
  const Prepared<V>& p;
  Worker<V>& w;
  Evaluator(const Prepared<V>& prepared, Worker<V>& worker) : p(prepared), w(worker) {}

  // Node terms of a piece: s for destinations, t for sources; where partners are evaluated, both for both.
  void nodes(const Piece& piece) {
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
  void all_nodes(int64_t first, int64_t last) {
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

  // Cuts a piece into tiles of edges and calls f(tile).
  template <class F>
  void tiles(const Piece& piece, F&& f) {
    const bool diagonal = piece.row->kind == DIAGONAL;
    const int live = p.call.paired ? p.live(*piece.row) : 0, most = p.call.paired ? p.tile / 2 : p.tile;
    const int cols = piece.cols(), shift = p.call.paired ? piece.rows() : 0;
    const int64_t edges = piece.edges();
    const bool sparse = piece.at;
    int i = 0, j = 0;
    for (int64_t begin = 0; begin < edges; begin += most) {
      const int n = static_cast<int>(edges - begin < most ? edges - begin : most), half = live ? row_blocks<V>(n) : 0;
      if (sparse) read_entries(piece, begin, n, shift);
      if (sparse) expect_entries(piece, begin + n, begin + n + most < edges ? begin + n + most : edges);
      for (int r = 0; !sparse && r < n;) {
        const int run = diagonal ? 1 : cols - j < n - r ? cols - j : n - r;
        for (int q = 0; q < run; ++q) {
          w.i[r + q] = i;
          w.j[r + q] = shift + j + q;
        }
        r += run;
        j += run;
        if (diagonal || j == cols) {
          ++i;
          if (!diagonal) j = piece.triangle ? i : 0;
        }
      }
      int *at_i = sparse ? w.at_i : w.i, *at_j = sparse ? w.at_j : w.j;
      for (int r = n; r < row_blocks<V>(n); ++r) w.i[r] = w.j[r] = at_i[r] = at_j[r] = 0;
      for (int r = 0; r < half; ++r) {
        w.i[half + r] = w.j[r];
        w.j[half + r] = w.i[r];
        at_i[half + r] = at_j[r];  // the same numbers again, or (sparse) those of the tables of all nodes
        at_j[half + r] = at_i[r];
      }
      f(Tile<V>{n, half, live, shift, w.i, w.j, at_i, at_j, &piece, {sparse ? w.number[0] : nullptr, sparse ? w.number[1] : nullptr}, begin});
    }
  }

  // Asks for what the next tile reads from anywhere in memory: node terms and raw features.
  void expect_entries(const Piece& piece, int64_t first, int64_t last) const {
    const Row& row = *piece.row;
    const int64_t* entries = piece.entries();
    const int64_t base = piece.copy * row.node_stride - p.low_node;
    const auto expect = [](const T* from, int n) {
      for (int c = 0; c < n; c += 64 / sizeof(T)) __builtin_prefetch(from + c, 0, 3);
    };
    int last_i = -1;
    const bool reads = row.weight >= 0 && row.src_axis == 1;
    const View v = reads ? view(p.call.weights[row.weight], row, side_of(row, false), piece.copy, false) : View{};
    const int64_t width = v.src * dtype_size(v.dtype);
    for (int64_t x = first; x < last; ++x) {
      const Entry e = entry_of(entries[x]);
      if (e.i != last_i) expect(p.all_s + (base + row.dst + piece.destination(e.i)) * p.all_ld, p.all_ld);
      last_i = e.i;
      expect(p.all_t + (base + row.src + piece.source(e.j)) * p.all_ld, p.all_ld);
      if (reads) __builtin_prefetch(v.base + e.number * width);
    }
  }

  // Nodes and numbers of n entries of a sparse piece.
  void read_entries(const Piece& piece, int64_t begin, int n, int shift) {
    const Row& row = *piece.row;
    const int64_t *entries = piece.entries() + begin, *partners = piece.partners(), base = piece.copy * row.node_stride - p.low_node;
    for (int r = 0; r < n; ++r) {
      const Entry e = entry_of(entries[r]);
      w.i[r] = e.i;
      w.j[r] = shift + e.j;
      w.at_i[r] = static_cast<int>(base + row.dst + piece.destination(e.i));
      w.at_j[r] = static_cast<int>(base + row.src + piece.source(e.j));
      w.number[0][r] = e.number;
      w.number[1][r] = partners ? partners[begin + r] : e.number;
    }
  }

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
          t.spans(k, [&](int first, int) { load(t, in, s.ld, first); });
          break;
        case FOURIER:
          fourier(t, k, prev);
          break;
        case TABLE:
          table(t, k);
          break;
        case LIN:
          linear(t, k, prev);
          break;
        case ACT:
          activate<V, GRAD>(static_cast<int>(in.arg0), prev, w.out[k], GRAD ? w.out[k - 1] : nullptr, vector_count(t.rows(k), s.ld));
          break;
        case ADD:
          add(prev, w.out[in.arg0], w.out[k], t.rows(k), s.ld, p.steps[in.arg0].ld);
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

  // Encoder variant of the edges (first 0), of their partners.
  int direction(const Tile<V>& t, int first) const {
    return p.call.directions > 1 ? static_cast<int>(first ? t.piece->row->partner_variant : t.piece->row->variant) : 0;
  }

  static int64_t vector_count(int64_t rows, int ld) { return (rows * ld + V::W - 1) / V::W * V::W; }

  static void add(const T* a, const T* b, T* out, int rows, int ld, int ldb) {
    const int n = ld < ldb ? ld : ldb;
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < n; ++c)
        out[static_cast<int64_t>(r) * ld + c] = a[static_cast<int64_t>(r) * ld + c] + b[static_cast<int64_t>(r) * ldb + c];
  }

  const T* frequencies(int direction) const {
    const Instr& in = p.call.instrs[p.table_step];
    return p.params + in.arg1 + static_cast<int64_t>(direction) * in.n_in;
  }

  // Mean and 1 / sqrt(var + eps) of a row of n numbers, ld with the padding: `ones` is 1 on the n, 0 beyond.
  NGK_INLINE_MEMBER void moments(const T* x, const T* ones, int n, int ld, T eps, R* mean, R* scale) const {
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

  // Raw features of the edges (first 0) or of their partners, to the rows from `first` on.
  void load(const Tile<V>& t, const Instr& in, int ld, int first) {
    const Row& row = *t.piece->row;
    const Side side = side_of(row, first > 0);
    T* out = w.out[0] + static_cast<int64_t>(first) * ld;
    if (side.weight < 0) {
      std::memset(out, 0, sizeof(T) * t.n * ld);
      return;
    }
    const View v = view(p.call.weights[side.weight], row, side, t.piece->copy, false);
    T scale = 1, shift = 0;
    if (in.arg0 >= 0) {
      scale = p.params[in.arg0 + 2 * side.weight];
      shift = p.params[in.arg0 + 2 * side.weight + 1];
    }
    if (row.flags & SPARSE_RAW) {  // few edges have features: one at a time
      for (int r = 0; r < t.n; ++r) {
        T* o = out + static_cast<int64_t>(r) * ld;
        for (int c = 0; c < in.n_out; ++c) o[c] = T(0);
        if (!t.equal_index(r)) continue;
        gather_row<V>(v, t.piece->j0 + t.source(r), in.n_out, o);
        for (int c = 0; c < in.n_out; ++c) o[c] = o[c] * scale + shift;
      }
      return;
    }
    gather<V>(t, v, in.n_out, out, ld);
    if (in.arg0 >= 0)
      for (int k = 0; k < t.n * ld; ++k) out[k] = out[k] * scale + shift;
  }

  void fourier(const Tile<V>& t, int k, const T* prev) {
    const Instr& in = p.call.instrs[k];
    t.spans(k, [&](int first, int n) {
      const T* b = p.params + in.w + static_cast<int64_t>(direction(t, first)) * in.n_in * (in.n_out / 2);
      for (int r = first; r < first + n; ++r)
        fourier_row<V>(b, in.n_out / 2, in.n_in, prev + static_cast<int64_t>(r) * p.steps[k - 1].ld,
                       w.out[k] + static_cast<int64_t>(r) * p.steps[k].ld);
    });
  }

  // A pair update where both directions are wanted: z = A e + B e' and z' = A e' + B e are the sum and the difference of
  // (A + B) / 2 (e + e') and (A - B) / 2 (e - e'): half the products.
  void pair(const Tile<V>& t, int k, const T* prev) {
    const Step<V>& s = p.steps[k];
    const int lda = p.steps[k - 1].ld;
    T *out = w.out[k], *back = out + static_cast<int64_t>(t.half) * s.ld;
    sums(prev, t.half, t.n, lda, w.pair);
    gemm<V>(w.pair, lda, t.n, s.plus, out, FromZero<V>{});
    gemm<V>(w.pair + static_cast<int64_t>(t.half) * lda, lda, t.n, s.minus, back, FromZero<V>{});
    for (int r = 0; r < t.n; ++r) {
      const T *si = s.node ? w.s[k] + static_cast<int64_t>(t.at_i[r]) * w.node_ld[k] : s.bias,
              *tj = s.node ? w.t[k] + static_cast<int64_t>(t.at_j[r]) * w.node_ld[k] : nullptr;
      const T *sj = s.node ? w.s[k] + static_cast<int64_t>(t.at_j[r]) * w.node_ld[k] : s.bias,
              *ti = s.node ? w.t[k] + static_cast<int64_t>(t.at_i[r]) * w.node_ld[k] : nullptr;
      T *a = out + static_cast<int64_t>(r) * s.ld, *b = back + static_cast<int64_t>(r) * s.ld;
      for (int c = 0; c < s.ld; c += V::W) {
        const R x = V::load(a + c), y = V::load(b + c);
        V::store(a + c, V::add(V::add(x, y), tj ? V::add(V::load(si + c), V::load(tj + c)) : V::load(si + c)));
        V::store(b + c, V::add(V::sub(x, y), ti ? V::add(V::load(sj + c), V::load(ti + c)) : V::load(sj + c)));
      }
    }
  }

 public:
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

 private:
  void linear(const Tile<V>& t, int k, const T* prev) {
    if (p.call.instrs[k].arg1 >= 0 && t.partners(k)) return pair(t, k, prev);
    const Instr& in = p.call.instrs[k];
    const Step<V>& s = p.steps[k];
    const int lda = in.n_in ? p.steps[k - 1].ld : 0;
    const T* a = in.n_in ? prev : w.out[k];
    const auto go = [&](int first, int rows) {
      Matrix<V> m = s.fwd[direction(t, first)];
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
        V::store(out + c, V::fma(V::mul(V::sub(V::load(x + c), mean), scale), V::load(s.gamma + c), V::load(s.bias + c)));
    }
  }

  void table(const Tile<V>& t, int k) {
    const Instr& in = p.call.instrs[k];
    const Step<V>& s = p.steps[k];
    const int ld = s.ld;
    hermite_cells<V>(w.out[k - 1], t.rows(k), T(int64_t(1) << in.arg0), p.call.table_nodes / 2, w.cell, w.hermite, w.slope, p.tile_rows());
    t.spans(k, [&](int from, int n) {
      const T* base = p.table + static_cast<int64_t>(direction(t, from)) * p.call.table_nodes * TABLE_LINES * ld;
      for (int r = from; r < from + n; ++r) {
        T* out = w.out[k] + static_cast<int64_t>(r) * ld;
        const T* si = s.node ? w.s[k] + static_cast<int64_t>(t.at_i[r]) * w.node_ld[k] : s.bias;
        const T* tj = s.node ? w.t[k] + static_cast<int64_t>(t.at_j[r]) * w.node_ld[k] : nullptr;
        if (w.cell[r] >= 0) {
          const T* q = base + static_cast<int64_t>(w.cell[r]) * TABLE_LINES * ld;
          int c = 0;
          for (; c + 2 * V::W <= ld; c += 2 * V::W) curve<2>(w.hermite + r, q + c, ld, si + c, tj ? tj + c : nullptr, out + c);
          if (c < ld) curve<1>(w.hermite + r, q + c, ld, si + c, tj ? tj + c : nullptr, out + c);
        } else {
          direct(w.out[k - 1][r], direction(t, from), si, tj, in, s, out);
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
    T* gamma = w.rest;
    fourier_row<V>(frequencies(direction), in.n_in, 1, &value, gamma);
    for (int c = 0; c < s.ld; ++c) out[c] = tj ? si[c] + tj[c] : si[c];
    for (int m = 0; m < 2 * in.n_in; ++m)
      for (int c = 0; c < s.ld; ++c) out[c] += gamma[m] * s.fwd[0].p[static_cast<int64_t>(m) * s.ld + c];
  }
};

}  // namespace ngk
