// The edges that a warp works on together: 16 at a time, from sources of one destination or from those of several.
#pragma once

#include "inputs.h"
#include "lines.h"

namespace ngk::cuda {

// Rows first .. end - 1 of a tile: edges of one destination, whose results go to partial row `row` of the panel's destinations. Others of
// the panel come before them, in tiles before (`begins`: none), or later (`ends`: none).
struct Run {
  int first, end, row;
  bool begins, ends;

  NGK_DEVICE bool has(int r) const { return r >= first && r < end; }
};

template <class P, int D, bool FULL>
struct Edges : Inputs<P, D, FULL> {
  using Base = Inputs<P, D, FULL>;
  using Base::g, Base::block, Base::side;

  // of a tile
  int i = 0, j = 0;             // its first destination, or number; its first source
  int destination[2] = {0, 0};  // of this lane's two rows, in its layer
  int node[2] = {0, 0}, source_node[2] = {0, 0};
  bool ok[2] = {false, false};  // whether they are edges
  uint32_t present = 0;         // the rows that are
  int rows = 0, row = 0;        // those up to the end of the last run; partial row of the first run
  uint32_t starts = 0;          // the rows that runs begin at
  bool closed = false;          // whether the last one ends here

  struct Edge {
    int64_t destination = 0, source = 0, place = 0, partner = 0;
    bool ok = false;
    NGK_DEVICE int64_t raw(int64_t by) const { return by ? partner : place; }
  };
  NGK_DEVICE explicit Edges(const Args& args) : Base(args) {}

  // Row r of the tile at (i, j); where there is no such edge, another one that is.
  NGK_DEVICE Edge edge(const Panel& panel, int64_t i, int64_t j, int r) const {
    if (!block->edges) {
      const int64_t destination = i + (r >> block->log_rows), source = j + (r & ((1 << block->log_rows) - 1));
      const bool ok = destination < panel.i1 && source < panel.j1;
      const int64_t s = source < panel.j1 ? source : panel.j1 - 1;
      return {destination < panel.i1 ? destination : panel.i1 - 1, s, s, s, ok};
    }
    const int64_t at = 16 * i + r;
    const int64_t* e = reinterpret_cast<const int64_t*>(block->edges) + 3 * (at < block->n_edges ? at : 16 * i);
    return {e[0] >> 32, e[0] & 0xffffffff, e[1], e[2], at < block->n_edges};
  }
  NGK_DEVICE Edge edge(const Panel& panel, int r) const { return edge(panel, i, j, r); }
  NGK_DEVICE int node_of(const Panel& panel, const Edge& e) const {
    return static_cast<int>(block->dst + panel.copy * block->node_stride + e.destination);
  }
  NGK_DEVICE int64_t output_row(const Panel& panel, int64_t of) const { return block->out + panel.copy * block->out_stride + of; }
  NGK_DEVICE bool has(int r) const { return present >> r & 1; }
  // Whether raw features belong to an edge.
  NGK_DEVICE bool has_raw(const Edge& e) const { return e.ok && !(FULL && block->diagonal && e.source != e.destination); }

  // Columns 16 c .. of what every edge has of `width` values; `add`: to what is there.
  NGK_DEVICE void write_values(const Values& to, const Panel& panel, int c, int64_t width, const float* v, bool add) const {
    Eight x;
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) x.v[k] = v[k];
    cuda::write_values(to, c, static_cast<int>(width), row_of_values(to, panel, 0), row_of_values(to, panel, 8), x, add);
  }
  NGK_DEVICE Eight read_values(const Values& from, const Panel& panel, int c, int64_t width) const {
    return cuda::read_values(from, c, static_cast<int>(width), row_of_values(from, panel, 0), row_of_values(from, panel, 8));
  }

  // f(run) of each destination that the tile has edges of, in their order.
  template <class F>
  NGK_DEVICE void by_destination(F&& f) const {
    NGK_ROLLED
    for (int first = 0, n = 0; first < rows; ++n) {
      const uint32_t later = starts >> first >> 1;
      const int end = later ? first + 1 + lowest_bit(later) : rows;
      f(Run{first, end, row + n, (starts >> first & 1) != 0, end < rows || closed});
      first = end;
    }
  }

  // ---- raw features arrive some tiles ahead; the numbers of edges in lists one more ----
  Tile coming;                   // the next tile to be fetched
  int64_t listed[2] = {-1, -1};  // of its edges in lists, the numbers of this lane's raw features and of its partner's; -1: none
  int fetched = 0;

  // Begins the tiles of a panel (Tile); none if `some` is false.
  NGK_DEVICE void begin(const Panel& panel, bool some, bool strips) {
    block = g.blocks + panel.block;
    coming = {static_cast<int>(panel.i0), static_cast<int>(panel.j0), some, strips};
    look_up(panel);
    NGK_ROLLED
    for (int k = 0; k < AHEAD; ++k) fetch(panel);
  }

  // The 16 edges from (i, j) on; with `there` false, none. The tiles of a panel come in the order in which they were fetched; the next one
  // is fetched now.
  NGK_DEVICE void tile(const Panel& panel, int64_t first_destination, int64_t first_source, bool there) {
    i = static_cast<int>(first_destination);
    j = static_cast<int>(first_source);
    find_runs(panel, there);
    NGK_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Edge e = edge(panel, lane() / 4 + 8 * h);
      ok[h] = has(lane() / 4 + 8 * h);
      destination[h] = static_cast<int>(e.destination);
      node[h] = node_of(panel, e);
      source_node[h] = static_cast<int>(block->src + panel.copy * block->node_stride + e.source);
    }
    wait_for_copies<AHEAD - 1>();
    sync_warp();  // the copies of all lanes are there, and the last tile's features are read
    const uint32_t real = FULL && block->diagonal ? present & with_raw(panel) : present;
    NGK_ROLLED
    for (int x = 0; x < this->sides(); ++x) {
      turn(x);
      const int tile = in_bands(this->raw(x)) ? (i - static_cast<int>(panel.i0)) % BAND : 0;
      this->take_features(arrival(panel, i, j, fetched - AHEAD, x), tile, real);
    }
    turn(0);
    sync_warp();
    fetch(panel);
  }

  // What is evaluated from here on is of the edges (0) or of their partners (1).
  NGK_DEVICE void turn(int to) {
    if (!FULL || to == this->turned) return;
    this->features += (to - this->turned) * this->features_of_side();
    this->turned = to;
  }

 private:
  // Where those of this lane's first row, or second, begin; null: it is no edge, or they are not there.
  NGK_DEVICE char* row_of_values(const Values& v, const Panel& panel, int further) const {
    const Edge e = edge(panel, lane() / 4 + further);
    return ok[further / 8] && v.data ? element_of(v, panel.copy, e.destination, side() ? e.partner : e.place, 0) : nullptr;
  }
  NGK_DEVICE uint32_t with_raw(const Panel& panel) const {
    uint32_t found = 0;
    NGK_ROLLED
    for (int r = 0; r < 16; ++r) found |= (has_raw(edge(panel, r)) ? 1u : 0u) << r;
    return found;
  }
  NGK_DEVICE void find_runs(const Panel& panel, bool there) {
    const auto first = [](int64_t n) { return n < 16 ? (1u << n) - 1 : 0xffffu; };  // rows
    uint32_t begins, sources = 0;
    int64_t left;
    if (block->edges) {
      const int64_t run = reinterpret_cast<const int64_t*>(block->runs)[i];
      left = block->n_edges - 16 * static_cast<int64_t>(i);
      begins = static_cast<uint32_t>(run & 0xffff);
      closed = run >> 16 & 1;
      row = static_cast<int>(run >> 32);
    } else {
      left = (panel.i1 - i) << block->log_rows;
      begins = static_cast<uint32_t>(block->runs);
      sources = first(panel.j1 - j);
      closed = j + 16 >= panel.j1;
      row = static_cast<int>(i - panel.i0);
    }
    rows = there ? static_cast<int>(left < 16 ? left : 16) : 0;
    present = first(rows) & (block->edges ? 0xffffu : begins * sources);
    starts = block->edges || j == panel.j0 ? begins & first(rows) : 0;
  }

  // Whether values come as one piece: of the sources of a tile; of a source, to the destinations of a band of tiles.
  NGK_DEVICE bool one_piece(const Values& raw, int64_t stride) const {
    const bool single = block->edges || (FULL && block->diagonal);
    return !single && block->log_rows == 4 && stride == g.channels && (raw.channel == 1 || stride == 1);
  }
  NGK_DEVICE bool in_a_row(const Values& raw) const { return one_piece(raw, raw.src); }
  NGK_DEVICE bool in_bands(const Values& raw) const {
    return coming.strips && g.channels < BAND && one_piece(raw, raw.dst) && !in_a_row(raw);
  }
  // Where values of the tile at (i, j) arrive, which is number `tile` of its panel.
  NGK_DEVICE char* arrival(const Panel& panel, int64_t i, int64_t j, int tile, int of) const {
    if (in_bands(this->raw(of))) {
      const int bands = static_cast<int>(panel.i1 - panel.i0 + BAND - 1) / BAND;
      tile = static_cast<int>(j - panel.j0) / 16 * bands + static_cast<int>(i - panel.i0) / BAND;
    }
    return this->arrivals + (tile % AHEAD * this->sides() + of) * arrival_bytes(g.channels);
  }
  NGK_DEVICE void look_up(const Panel& panel) {
    if (!block->edges) return;
    const Edge e = coming.there ? edge(panel, coming.i, coming.j, lane() % 16) : Edge{};
    listed[0] = e.ok ? e.raw(block->raw_by) : -1;
    listed[1] = e.ok ? e.raw(block->partner_raw_by) : -1;
  }
  // The next tile's values of a side, or its band's, which begins with it.
  NGK_DEVICE void fetch(const Panel& panel, const Values& raw, int of, char* to) {
    const bool row = in_a_row(raw), bands = in_bands(raw);
    const int64_t size = g.channels * dtype_size(static_cast<Dtype>(raw.dtype));
    const int r = lane() % 16;
    int64_t destination = coming.i, source = coming.j, values = size;
    if (row) {
      values *= panel.j1 - coming.j < 16 ? panel.j1 - coming.j : 16;
    } else if (block->edges) {
      destination = 0, source = of ? listed[1] : listed[0];
      if (source < 0) return;
    } else {
      const Edge e = edge(panel, coming.i, coming.j, r);
      if (!has_raw(e) || (bands && (coming.i - panel.i0) % BAND)) return;
      destination = e.destination, source = e.source;
      if (bands) values *= panel.i1 - coming.i < BAND ? panel.i1 - coming.i : BAND;
    }
    const char* from = element_of(raw, panel.copy, destination, source, 0);
    const int64_t piece = row ? 0 : r * piece_bytes(g.channels);
    if (raw.channel == 1 || g.channels == 1) {
      fetch_lines(from, values, to + piece, row);
      if (lane() < 16) starts_of(to, g.channels)[r] = static_cast<int>(piece + (row ? r * size : 0)) + before(from);
    } else if (lane() < 16) {
      gather(raw, from, g.channels, to + piece);
      starts_of(to, g.channels)[r] = static_cast<int>(piece);
    }
  }
  NGK_DEVICE void fetch(const Panel& panel) {
    NGK_ROLLED
    for (int x = 0; x < this->sides(); ++x) {
      const Values& raw = this->raw(x);
      if (coming.there && raw.data) fetch(panel, raw, x, arrival(panel, coming.i, coming.j, fetched, x));
    }
    copies_end();
    ++fetched;
    coming.next(panel, static_cast<int>(block->step()));
    look_up(panel);
  }
};

}  // namespace ngk::cuda
