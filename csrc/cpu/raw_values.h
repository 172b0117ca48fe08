// Raw features into the rows of a tile, and gradients of rows back to the weights or to a virtual checkpoint.
#pragma once

#include "worker.h"

namespace ngk {

template <class V>
struct RawValues : OnWorker<V> {
  using OnWorker<V>::OnWorker, OnWorker<V>::p, OnWorker<V>::w;
  using T = typename V::T;

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

  // The gradient g [rows, ld] of the raw features, to the weights of the edges and of their partners.
  void write_weights(const Tile<V>& t, T* g, int ld, int channels) {
    if (!p.call.need_weights) return;
    const Row& row = *t.piece->row;
    if (t.partners(0)) {
      T* theirs = g + static_cast<int64_t>(t.half) * ld;
      for (int r = 0; r < t.n; ++r)
        if ((row.flags & SAME) || t.itself(r))  // one number, read twice
          add_rows(theirs + static_cast<int64_t>(r) * ld, g + static_cast<int64_t>(r) * ld, channels);
      if (!(row.flags & SAME)) write_side(t, theirs, ld, channels, side_of(row, true));
    }
    write_side(t, g, ld, channels, side_of(row, false));
  }

  // The gradient g [rows, D] of the states at instruction k, to the checkpoint's.
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
          if (t.itself(r)) add_rows(own + static_cast<int64_t>(t.half + r) * ld, own + static_cast<int64_t>(r) * ld, ld);
      scatter<V>(t, view(p.call.grad_carriers[at], row, side, t.piece->copy, true), p.call.instrs[k].n_out, own, ld);
    });
  }

 private:
  void write_side(const Tile<V>& t, T* g, int ld, int channels, const Side& side) {
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

  // Two rows of the same pair: both become their sum.
  static void add_rows(T* a, T* b, int n) {
    for (int c = 0; c < n; ++c) a[c] = b[c] = a[c] + b[c];
  }
};

}  // namespace ngk
