// Tiles of edges, and the way between their rows and the tensors of edge values.
#pragma once

#include "../message_math.h"
#include "../values.h"
#include "prepare.h"

namespace ngk {

// The edges of a row, or their partners, as readers of a weight tensor and owners of values.
struct Side {
  int64_t weight, variant, axis, offset, block, emit_offset;
  bool partner;
};
NGK_INLINE Side side_of(const Row& r, bool partner) {
  return partner ? Side{r.partner, r.partner_variant, r.partner_axis, r.partner_offset, r.partner_block, r.partner_emit_offset, true}
                 : Side{r.weight, r.variant, r.src_axis, r.offset, r.block, r.emit_offset, false};
}

// Strides of an edge tensor as one side of a row sees it, for (i, j) of the row.
struct View {
  char* base;
  int64_t src, dst, channel;  // in elements; sparse: src from one edge's number to the next
  Dtype dtype;
  int number;  // sparse: 0 for an edge's own number, 1 for its partner's
};

// `own`: values by block (n_src, n_dst) of the block's own direction; else raw weights.
NGK_INLINE View view(const EdgeTensor& t, const Row& row, const Side& side, int64_t copy, bool own) {
  const bool flip = (!own && side.axis == 2) != side.partner,
             diagonal = row.kind == DIAGONAL || row.kind == SPARSE || (!own && (row.flags & SPARSE_RAW));
  const int64_t offset = own ? side.emit_offset : side.offset;
  View v{static_cast<char*>(t.data), 0, 0, t.stride[3], t.dtype, own ? side.partner : side.axis == 2};
  int64_t at;
  if (offset >= 0) {  // packed: rows of one tensor [E, C]
    const int64_t e = t.stride[2], d1 = flip ? row.n_src : row.n_dst;
    at = (offset + copy * (own ? row.emit_stride : row.edge_stride)) * e;
    v.src = diagonal ? e : flip ? e : d1 * e;
    v.dst = diagonal ? 0 : flip ? d1 * e : e;
  } else {
    at = copy * t.stride[0];
    v.src = diagonal ? t.stride[1] : t.stride[flip ? 2 : 1];
    v.dst = diagonal ? 0 : t.stride[flip ? 1 : 2];
  }
  v.base += at * dtype_size(t.dtype);
  return v;
}

// Up to `tile` edges of one piece, destination by destination; with partners, these follow at row `half`.
template <class V>
struct Tile {
  int n;                   // edges
  int half;                // rows from an edge to its partner; 0: no partners
  int live;                // instructions below `live` are evaluated for partners too
  int shift;               // where sources begin in j: behind the destinations, when there may be partners
  const int *i, *j;        // of each row: destination and source in the piece's tables; entries up to row_blocks(rows) are valid
  const int *at_i, *at_j;  // the same in the tables of node terms (a sparse piece reads those of all nodes)
  const Piece* piece;
  const int64_t* number[2] = {nullptr, nullptr};    // sparse: of each edge, of its partner
  int64_t begin = 0;                                // edges of the piece before these
  int source(int r) const { return j[r] - shift; }  // of an edge, in the piece
  int rows(int k) const { return half && k < live ? half + n : n; }
  bool partners(int k) const { return half && k < live; }
  // Calls f(first, count) for the rows of instruction k that stand for edges.
  template <class F>
  void spans(int k, F&& f) const {
    f(0, n);
    if (partners(k)) f(half, n);
  }
  // Calls f(i, first, last) for the runs of edges of one destination.
  template <class F>
  void destinations(F&& f) const {
    for (int r = 0; piece->at && r < n;) {
      const int first = r;
      while (++r < n && i[r] == i[first]) continue;
      f(i[first], first, r);
    }
    for (int r = 0; !piece->at && r < n;) {
      const int first = r, left = piece->cols() - source(r);  // sources left in this destination's row
      r = piece->row->kind == DIAGONAL ? r + 1 : first + left < n ? first + left : n;
      f(i[first], first, r);
    }
  }
  // Whether no edge of the destination of edge r, the first in a run, came before it in the piece.
  bool opens(int r) const {
    if (piece->at) return r > 0 || begin == 0 || entry_of(piece->entries()[begin - 1]).i != i[0];
    return piece->row->kind == DIAGONAL || source(r) == 0;
  }
  // Whether edge r joins a neuron with itself, or (diagonal features in a dense row) neurons of equal index.
  bool itself(int r) const {
    if (piece->at) return piece->row->partner_block >= 0 && at_i[r] == at_j[r];
    return piece->row->kind == DIAGONAL ? piece->row->src == piece->row->dst : piece->triangle && i[r] == source(r);
  }
  bool equal_index(int r) const { return piece->i0 + i[r] == piece->j0 + source(r); }
};

// Copies the values of a tile's edges between their tensor and rows of a buffer, converting. Padding is 0: it is multiplied with 0 later,
// which of what lay there before may be NaN.
template <class V, class S, class Convert>
NGK_INLINE void gather(const Tile<V>& t, const View& v, int channels, typename V::T* buffer, int ld, Convert convert) {
  for (int r = 0; ld > channels && r < t.n; ++r)
    for (int c = channels; c < ld; ++c) buffer[static_cast<int64_t>(r) * ld + c] = 0;
  if (const int64_t* number = t.number[v.number]) {
    for (int r = 0; r < t.n; ++r) {
      const S* p = reinterpret_cast<const S*>(v.base) + number[r] * v.src;
      for (int c = 0; c < channels; ++c) buffer[static_cast<int64_t>(r) * ld + c] = static_cast<typename V::T>(convert(p[c * v.channel]));
    }
    return;
  }
  const S* base = reinterpret_cast<const S*>(v.base) + t.piece->i0 * v.dst + t.piece->j0 * v.src;
  if (channels == 1) {
    t.destinations([&](int i, int first, int last) {
      const S* p = base + i * v.dst + t.source(first) * v.src;
      for (int r = first; r < last; ++r) buffer[static_cast<int64_t>(r) * ld] = static_cast<typename V::T>(convert(p[(r - first) * v.src]));
    });
    return;
  }
  for (int r = 0; r < t.n; ++r) {
    const S* p = base + t.i[r] * v.dst + t.source(r) * v.src;
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
// The values of one edge, at `index` along the sources.
template <class V>
void gather_row(const View& v, int64_t index, int channels, typename V::T* out) {
  for (int c = 0; c < channels; ++c) {
    const char* p = v.base + (index * v.src + c * v.channel) * dtype_size(v.dtype);
    out[c] = static_cast<typename V::T>(read_value<typename V::T>(p, v.dtype));
  }
}
template <class V, class S, class Convert>
NGK_INLINE void scatter(const Tile<V>& t, const View& v, int channels, const typename V::T* buffer, int ld, Convert convert) {
  S* base = reinterpret_cast<S*>(v.base) + t.piece->i0 * v.dst + t.piece->j0 * v.src;
  const int64_t* number = t.number[v.number];
  for (int r = 0; r < t.n; ++r) {
    S* p = number ? base + number[r] * v.src : base + t.i[r] * v.dst + t.source(r) * v.src;
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

}  // namespace ngk
