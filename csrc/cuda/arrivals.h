// Raw features of the tiles to come, on their way into shared memory while a warp works on those before.
#pragma once

#include "memory.h"

namespace ngk::cuda {

// Where a warp is in its panel: sources from j on of destinations from i on, or tile i of listed edges. They go on by destination or, in
// strips, by source.
struct Tile {
  int64_t i = 0, j = 0;
  bool there = false, strips = false;

  // `step`: destinations, or numbers of tiles, that a tile has.
  NGK_DEVICE void next(const Panel& p, int64_t step) {
    if (strips) {
      if ((i += step) < p.i1) return;
      i = p.i0;
      there = there && (j += 16) < p.j1;
    } else {
      if ((j += 16) < p.j1) return;
      j = p.j0;
      there = there && (i += step) < p.i1;
    }
  }
};

constexpr int AHEAD = 2;  // tiles that are on their way at a time

// Of one tile and side: the elements of 16 edges, behind what lies before them in their first 16 bytes; then of each edge where they start:
// so many bytes lie before the first of all; below 0: -1 less the bytes before its own first one, each in a word of 4 bytes.
NGK_DEVICE int64_t arrival_bytes(int64_t channels) { return 16 * channels * 4 + 16 + 16 * 4; }
NGK_DEVICE int* starts_of(char* arrival, int64_t channels) { return reinterpret_cast<int*>(arrival + 16 * channels * 4 + 16); }

// Whether the numbers of neighbouring sources are neighbours in memory.
NGK_DEVICE bool in_a_row(const Values& v, int64_t channels) { return v.src == channels && (v.channel == 1 || channels == 1); }
NGK_DEVICE int before(const char* p) { return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16); }

// WORDS: values of 2 bytes come in the word of 4 that they are in, as less cannot be copied on the side, and it is written down where edges
// start. Else they are copied at once: exact kernels with all options have no register left for the rest (one spilled 156 bytes).

// Copies the values of sources from `first` on, `edges` of them, by whole lines of 16 bytes: all lanes together.
template <bool WORDS>
NGK_DEVICE void fetch_row(const Values& v, int64_t copy, int64_t destination, int64_t first, int edges, int64_t channels, char* to) {
  const char* from = element_of(v, copy, destination, first, 0);
  const int skipped = before(from), bytes = skipped + edges * static_cast<int>(channels) * dtype_size(static_cast<Dtype>(v.dtype));
  if (WORDS && lane() < 16) starts_of(to, channels)[lane()] = skipped;
  NGK_ROLLED
  for (int at = lane() * 16; at < bytes; at += LANES * 16) copy_async16(to + at, from - skipped + at, bytes - at < 16 ? bytes - at : 16);
}
// Copies those of one edge: the lane's own.
// Where weights lie (in, out), a tile's 16 sources are rows apart and there are no lines of 16 bytes to copy: 16 sectors of 32 bytes from L2, of
// which neighbouring tiles read the rest. By count that is a third of what L2 delivers in the time of a tile's products at d = 32, were the
// tensor cores at their peak; lines along destinations would want panels, and so partial rows, of another shape.
template <bool WORDS>
NGK_DEVICE void fetch_edge(const Values& v, int64_t copy, int64_t destination, int64_t number, int row, int64_t channels, char* to) {
  const int size = dtype_size(static_cast<Dtype>(v.dtype));
  NGK_ROLLED
  for (int64_t c = 0; c < channels; ++c) {
    const char* from = element_of(v, copy, destination, number, c);
    if (WORDS) {
      const int skipped = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 4);
      if (c == 0) starts_of(to, channels)[row] = -1 - skipped;
      copy_async4(to + (row * channels + c) * 4, from - skipped, skipped + size);
    } else if (size == 4) {
      copy_async4(to + (row * channels + c) * 4, from, 4);
    } else {
      std::memcpy(to + (row * channels + c) * 2, from, 2);
    }
  }
}

}  // namespace ngk::cuda
