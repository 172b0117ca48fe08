// A piece's edges, tile by tile: nodes, numbers and partners of each row.
#pragma once

#include "worker.h"

namespace ngk {

template <class V>
struct Tiler : OnWorker<V> {
  using OnWorker<V>::OnWorker, OnWorker<V>::p, OnWorker<V>::w;
  using T = typename V::T;

  // Cuts a piece into tiles of edges and calls f(tile).
  template <class F>
  void operator()(const Piece& piece, F&& f) {
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
      const int64_t *own = sparse ? w.number[0] : nullptr, *theirs = sparse ? w.number[1] : nullptr;
      f(Tile<V>{n, half, live, shift, w.i, w.j, at_i, at_j, &piece, {own, theirs}, begin});
    }
  }

 private:
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
};

}  // namespace ngk
