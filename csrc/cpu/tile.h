// A tile: up to `tile` edges of one piece, destination by destination, and the evaluator of the expression on it.
#pragma once

#include "edge_math.h"
#include "prepare.h"

namespace ngk {

// Strides of an edge tensor as one block sees it.
struct View {
  char* base;
  int64_t src, dst, channel;  // in elements
  Dtype dtype;
};

NGK_INLINE int dtype_size(Dtype d) { return d == F64 ? 8 : d == F32 ? 4 : 2; }

NGK_INLINE float from_f16(uint16_t h) {
  _Float16 f;
  std::memcpy(&f, &h, 2);
  return static_cast<float>(f);
}

NGK_INLINE View view(const EdgeTensor& t, const Row& row, int64_t copy, bool own, int64_t offset, int64_t edge_stride) {
  const bool flip = !own && row.src_axis == 2;
  View v{static_cast<char*>(t.data), 0, 0, t.stride[3], t.dtype};
  int64_t at;
  if (offset >= 0) {  // packed: rows of one tensor [E, C]
    const int64_t e = t.stride[2], d1 = flip ? row.n_src : row.n_dst;
    at = (offset + copy * edge_stride) * e;
    v.src = row.kind == DIAGONAL ? e : flip ? e : d1 * e;
    v.dst = row.kind == DIAGONAL ? 0 : flip ? d1 * e : e;
  } else {
    at = copy * t.stride[0];
    v.src = row.kind == DIAGONAL ? t.stride[1] : t.stride[flip ? 2 : 1];
    v.dst = row.kind == DIAGONAL ? 0 : t.stride[flip ? 1 : 2];
  }
  v.base += at * dtype_size(t.dtype);
  return v;
}

template <class V>
struct Tile {
  int n;             // edges
  const int *i, *j;  // local destination and source of each edge; entries up to row_blocks(n) are valid
  const Piece* piece;
  // Calls f(i, first, last) for the runs of edges of one destination.
  template <class F>
  void destinations(F&& f) const {
    for (int r = 0; r < n;) {
      const int first = r, left = piece->cols() - j[r];  // sources left in this destination's row
      r = piece->row->kind == DIAGONAL ? r + 1 : first + left < n ? first + left : n;
      f(i[first], first, r);
    }
  }
};

// Copies edge values into (Put false: from) rows of a tile buffer, converting; `add` accumulates instead.
template <class V, class S, class Convert>
NGK_INLINE void gather(const Tile<V>& t, const View& v, int channels, typename V::T* buffer, int ld, Convert convert) {
  const S* base = reinterpret_cast<const S*>(v.base) + t.piece->i0 * v.dst + t.piece->j0 * v.src;
  if (channels == 1) {
    t.destinations([&](int i, int first, int last) {
      const S* p = base + i * v.dst + t.j[first] * v.src;
      for (int r = first; r < last; ++r) buffer[static_cast<int64_t>(r) * ld] = static_cast<typename V::T>(convert(p[(r - first) * v.src]));
    });
    return;
  }
  for (int r = 0; r < t.n; ++r) {
    const S* p = base + t.i[r] * v.dst + t.j[r] * v.src;
    for (int c = 0; c < channels; ++c) buffer[static_cast<int64_t>(r) * ld + c] = static_cast<typename V::T>(convert(p[c * v.channel]));
  }
}
template <class V>
void gather(const Tile<V>& t, const View& v, int channels, typename V::T* buffer, int ld) {
  switch (v.dtype) {
    case F32:
      return gather<V, float>(t, v, channels, buffer, ld, [](float x) { return x; });
    case F64:
      return gather<V, double>(t, v, channels, buffer, ld, [](double x) { return x; });
    case BF16:
      return gather<V, uint16_t>(t, v, channels, buffer, ld, [](uint16_t x) { return from_bf16(x); });
    case F16:
      return gather<V, uint16_t>(t, v, channels, buffer, ld, [](uint16_t x) { return from_f16(x); });
  }
}
template <class V, class S, class Convert>
NGK_INLINE void scatter(const Tile<V>& t, const View& v, int channels, const typename V::T* buffer, int ld, Convert convert) {
  S* base = reinterpret_cast<S*>(v.base) + t.piece->i0 * v.dst + t.piece->j0 * v.src;
  for (int r = 0; r < t.n; ++r) {
    S* p = base + t.i[r] * v.dst + t.j[r] * v.src;
    for (int c = 0; c < channels; ++c) p[c * v.channel] = convert(buffer[static_cast<int64_t>(r) * ld + c]);
  }
}
template <class V>
void scatter(const Tile<V>& t, const View& v, int channels, const typename V::T* buffer, int ld) {
  using T = typename V::T;
  switch (v.dtype) {
    case F32:
      return scatter<V, float>(t, v, channels, buffer, ld, [](T x) { return static_cast<float>(x); });
    case F64:
      return scatter<V, double>(t, v, channels, buffer, ld, [](T x) { return static_cast<double>(x); });
    case BF16:
      return scatter<V, uint16_t>(t, v, channels, buffer, ld, [](T x) { return to_bf16(static_cast<float>(x)); });
    case F16:
      return scatter<V, uint16_t>(t, v, channels, buffer, ld, [](T x) {
        const _Float16 f = static_cast<_Float16>(x);
        uint16_t h;
        std::memcpy(&h, &f, 2);
        return h;
      });
  }
}

// Memory and node terms of one worker.
template <class V>
struct Worker {
  using T = typename V::T;
  std::vector<T*> out;   // result of each instruction, [tile, ld]
  std::vector<T*> s, t;  // node terms of the current piece, [rows, ld] and [cols, ld]
  std::vector<T*> grad_s, grad_t;
  std::vector<T*> grad_add;            // gradient waiting at the instruction an ADD reads
  std::vector<T*> grad_x_i, grad_x_j;  // node gradients of the piece held until its commit, [rows, d_x], [cols, d_x]
  int *i = nullptr, *j = nullptr;
  T* cell = nullptr;                       // of each edge in the table, [tile]; -1: beyond it
  T *hermite = nullptr, *slope = nullptr;  // its interpolation weights and their derivatives, [2 TABLE_LINES][tile]
  T *g[3] = {nullptr, nullptr, nullptr}, *message = nullptr /* FiLM shifts on their way */, *coefficients = nullptr, *stats = nullptr,
    *rest = nullptr;
  T *params = nullptr, *table = nullptr, *raw_grad = nullptr;  // gradients of the current item; raw_grad: of the piece
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

  // s_i and t_j of every node term for the nodes of a piece.
  void nodes(const Piece& piece) {
    for (size_t k = 0; k < p.steps.size(); ++k) {
      const Step<V>& s = p.steps[k];
      if (!s.node) continue;
      const Instr& in = p.call.instrs[k];
      const int dx = p.call.x_width[in.x];
      const T* x = static_cast<const T*>(p.call.xs[in.x]) + piece.copy * piece.row->node_stride * dx;
      project(x + (piece.row->dst + piece.i0) * dx, dx, piece.rows(), s.wd, s.bias, w.s[k]);
      project(x + (piece.row->src + piece.j0) * dx, dx, piece.cols(), s.ws, nullptr, w.t[k]);
    }
  }

  // Cuts a piece into tiles of edges and calls f(tile).
  template <class F>
  void tiles(const Piece& piece, F&& f) {
    const int64_t edges = piece.edges();
    const int cols = piece.cols();
    int i = 0, j = 0;
    for (int64_t begin = 0; begin < edges; begin += p.tile) {
      const int n = static_cast<int>(edges - begin < p.tile ? edges - begin : p.tile);
      for (int r = 0; r < n;) {
        const int run = piece.row->kind == DIAGONAL ? 1 : cols - j < n - r ? cols - j : n - r;
        for (int q = 0; q < run; ++q) {
          w.i[r + q] = i;
          w.j[r + q] = j + q;
        }
        r += run;
        j += run;
        if (piece.row->kind == DIAGONAL || j == cols) {
          ++i;
          if (piece.row->kind != DIAGONAL) j = 0;
        }
      }
      for (int r = n; r < row_blocks<V>(n); ++r) w.i[r] = w.j[r] = 0;
      f(Tile<V>{n, w.i, w.j, &piece});
    }
  }

  // Runs every instruction on a tile. With GRAD, activations leave their derivative in their input's place.
  template <bool GRAD>
  void run(const Tile<V>& t) {
    const int direction = p.call.directions > 1 ? static_cast<int>(t.piece->row->variant) : 0;
    for (size_t k = 0; k < p.steps.size(); ++k) {
      const Instr& in = p.call.instrs[k];
      const Step<V>& s = p.steps[k];
      const T* prev = k ? w.out[k - 1] : nullptr;
      switch (in.op) {
        case LOAD:
          load(t, in);
          break;
        case FOURIER:
          for (int r = 0; r < t.n; ++r)
            fourier_row<V>(p.params + in.w + static_cast<int64_t>(direction) * in.n_in * (in.n_out / 2), in.n_out / 2, in.n_in,
                           prev + static_cast<int64_t>(r) * p.steps[k - 1].ld, w.out[k] + static_cast<int64_t>(r) * s.ld);
          break;
        case TABLE:
          table(t, static_cast<int>(k), direction);
          break;
        case LIN:
          linear(t, static_cast<int>(k), direction, prev);
          break;
        case ACT:
          activate<V, GRAD>(static_cast<int>(in.arg0), prev, w.out[k], GRAD ? w.out[k - 1] : nullptr, vector_count(t.n, s.ld));
          break;
        case ADD:
          add(prev, w.out[in.arg0], w.out[k], t.n, s.ld, p.steps[in.arg0].ld);
          break;
        case MARK:
          std::memcpy(w.out[k], prev, sizeof(T) * row_blocks<V>(t.n) * s.ld);
          break;
      }
    }
  }

  static int64_t vector_count(int64_t rows, int ld) { return (rows * ld + V::W - 1) / V::W * V::W; }

  static void add(const T* a, const T* b, T* out, int rows, int ld, int ldb) {
    const int n = ld < ldb ? ld : ldb;
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < n; ++c)
        out[static_cast<int64_t>(r) * ld + c] = a[static_cast<int64_t>(r) * ld + c] + b[static_cast<int64_t>(r) * ldb + c];
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

  void load(const Tile<V>& t, const Instr& in) {
    const Row& row = *t.piece->row;
    T* out = w.out[0];
    gather<V>(t, view(p.call.weights[row.weight], row, t.piece->copy, false, row.offset, row.edge_stride), in.n_out, out, in.n_out);
    if (in.arg0 >= 0) {
      const T scale = p.params[in.arg0 + 2 * row.weight], shift = p.params[in.arg0 + 2 * row.weight + 1];
      for (int k = 0; k < t.n * in.n_out; ++k) out[k] = out[k] * scale + shift;
    }
  }

  void linear(const Tile<V>& t, int k, int direction, const T* prev) {
    const Instr& in = p.call.instrs[k];
    const Step<V>& s = p.steps[k];
    Matrix<V> m = s.fwd[direction];
    if (in.n_in == 0) m.ld = s.ld;  // K = 0: the node term alone
    const int lda = in.n_in ? p.steps[k - 1].ld : 0;
    const T* a = in.n_in ? prev : w.out[k];
    if (s.node) {
      gemm<V>(a, lda, t.n, m, w.out[k], FromNodes<V>{w.s[k], w.t[k], s.ld, t.i, t.j});
    } else {
      gemm<V>(a, lda, t.n, m, w.out[k], FromRow<V>{s.bias});
    }
  }

 public:
  const T* frequencies(int direction) const {
    const Instr& in = p.call.instrs[p.table_step];
    return p.params + in.arg1 + static_cast<int64_t>(direction) * in.n_in;
  }

 private:
  void table(const Tile<V>& t, int k, int direction) {
    const Instr& in = p.call.instrs[k];
    const Step<V>& s = p.steps[k];
    const int ld = s.ld;
    const T* base = p.table + static_cast<int64_t>(direction) * p.call.table_nodes * TABLE_LINES * ld;
    hermite_cells<V>(w.out[k - 1], t.n, T(int64_t(1) << in.arg0), p.call.table_nodes / 2, w.cell, w.hermite, w.slope, p.tile);
    for (int r = 0; r < t.n; ++r) {
      T* out = w.out[k] + static_cast<int64_t>(r) * ld;
      const T* si = s.node ? w.s[k] + static_cast<int64_t>(t.i[r]) * ld : s.bias;
      const T* tj = s.node ? w.t[k] + static_cast<int64_t>(t.j[r]) * ld : nullptr;
      if (w.cell[r] >= 0) {
        const T* q = base + static_cast<int64_t>(w.cell[r]) * TABLE_LINES * ld;
        int c = 0;
        for (; c + 2 * V::W <= ld; c += 2 * V::W) curve<2>(w.hermite + r, q + c, ld, si + c, tj ? tj + c : nullptr, out + c);
        if (c < ld) curve<1>(w.hermite + r, q + c, ld, si + c, tj ? tj + c : nullptr, out + c);
      } else {
        direct(w.out[k - 1][r], direction, si, tj, in, s, out);
      }
    }
  }

  // out = si + tj + sum over the lines q of a cell, NV vectors of columns.
  template <int NV>
  NGK_INLINE_MEMBER void curve(const T* hermite, const T* q, int64_t ld, const T* si, const T* tj, T* out) {
    R acc[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[v] = tj ? V::add(V::load(si + v * V::W), V::load(tj + v * V::W)) : V::load(si + v * V::W);
#pragma GCC unroll 6
    for (int l = 0; l < 2 * TABLE_LINES; ++l, q += ld) {
      const R weight = V::set1(hermite[l * p.tile]);
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
