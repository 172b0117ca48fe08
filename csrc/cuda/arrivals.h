// Raw features of the tiles to come, on their way into shared memory while a warp works on those before.
#pragma once

#include "memory.h"

namespace ngk::cuda {

// Where a warp is in its panel: sources from j on of destinations from i on, or tile i of listed edges. They go on by destination or, in
// strips, by source.
struct Tile {
  int i = 0, j = 0;
  bool there = false, strips = false;

  // `step`: destinations, or numbers of tiles, that a tile has.
  NGK_DEVICE void next(const Panel& p, int step) {
    if (strips) {
      if ((i += step) < p.i1) return;
      i = static_cast<int>(p.i0);
      there = there && (j += 16) < p.j1;
    } else {
      if ((j += 16) < p.j1) return;
      j = static_cast<int>(p.j0);
      there = there && (i += step) < p.i1;
    }
  }
};

constexpr int AHEAD = 2;  // tiles, or bands of them, that are on their way at a time
constexpr int BAND = 4;   // tiles of a strip whose edges' values come together: a source's lie side by side where weights lie (in, out)

// Everything is copied by whole lines of 16 bytes, with what lies before and behind in them. Of one side arrive the values of the 16 edges
// of a tile, or of a band: of sources that are neighbours in memory as one piece, else of each source its own; then [16] where those of
// each edge start.
NGK_DEVICE int64_t piece_bytes(int64_t channels) { return (channels * (channels < BAND ? BAND : 1) * 4 + 27) / 16 * 16; }
NGK_DEVICE int64_t arrival_bytes(int64_t channels) { return 16 * piece_bytes(channels) + 16 * 4; }
NGK_DEVICE int* starts_of(char* arrival, int64_t channels) { return reinterpret_cast<int*>(arrival + 16 * piece_bytes(channels)); }

NGK_DEVICE int before(const char* p) { return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16); }  // bytes, in its line
// Copies `bytes` bytes line by line: the warp all together, or in turns with the other lane that has the same source. Then neighbours of
// theirs, of a band to come or of another warp's destination, lie in the same lines.
NGK_DEVICE void fetch_lines(const char* from, int64_t bytes, char* to, bool together) {
  const int skipped = before(from), end = skipped + static_cast<int>(bytes);
  NGK_ROLLED
  for (int at = together ? lane() * 16 : lane() / 16 * 16; at < end; at += together ? LANES * 16 : 2 * 16)
    copy_async16(to + at, from - skipped + at, end - at < 16 ? end - at : 16, together);
}
// Where channels are not neighbours: one by one, at once. No tensor of the models has them so.
NGK_DEVICE void gather(const Values& v, const char* from, int64_t channels, char* to) {
  const int size = dtype_size(static_cast<Dtype>(v.dtype));
  NGK_ROLLED
  for (int64_t c = 0; c < channels; ++c) {
    const char* p = from + c * v.channel * size;
    if (size == 4) {
      put_number(to + c * 4, number_at<float>(p));
    } else {
      put_number(to + c * 2, number_at<uint16_t>(p));
    }
  }
}

}  // namespace ngk::cuda
