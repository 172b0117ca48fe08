// Work is cut into pieces (a rectangle of one block, a run of a sparse one's entries) and items (one large piece, or whole small networks).
// The cut depends on the graph alone. Items are computed in any order on any number of threads and committed in their own order, so every
// sum has one order: results are bitwise independent of the thread count.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "../edge_program.h"

namespace ngk {

struct Piece {
  const Row* row;
  int64_t index;                                  // of the row
  int64_t copy, i0, i1, j0, j1;                   // destinations, sources; diagonal: j0 = i0, j1 = i1
  bool triangle = false;                          // the unordered pairs i <= j of i0 .. i1
  const int64_t *lists = nullptr, *at = nullptr;  // sparse: its row's lists, and its own line of their directory; i0, j0 = 0
  int64_t destination(int i) const { return at ? lists[at[0] + i] : i0 + i; }  // within its layer
  int64_t source(int j) const { return at ? lists[at[2] + j] : j0 + j; }
  const int64_t* entries() const { return lists + at[4]; }
  const int64_t* partners() const { return lists[1] ? entries() + row->count : nullptr; }  // their numbers
  int rows() const { return static_cast<int>(i1 - i0); }
  int cols() const { return static_cast<int>(j1 - j0); }
  int64_t edges() const {
    const int64_t n = rows();
    return at ? at[5] : row->kind == DIAGONAL ? n : triangle ? n * (n + 1) / 2 : n * cols();
  }
};

struct Item {
  int64_t first, last;  // range of pieces
  bool exclusive;       // whole networks: no other item touches their nodes
};

struct Plan {
  std::vector<Piece> pieces;
  std::vector<Item> items;
  int max_rows = 0, max_cols = 0;  // over pieces
};

Plan make_plan(const Call& call);

// In-degree of every output row, counting the call's blocks.
std::vector<int32_t> degrees(const Call& call);

// process(ctx, worker, item) concurrently; commit(ctx, worker, item) one at a time, in the order of the items.
void run_items(const Plan& plan, Parallel parallel, int threads, void* ctx, void (*process)(void*, int, const Item&),
               void (*commit)(void*, int, const Item&));

// Memory for tables that are read here and there: large pages, where there are any. Content unspecified; freed in the end.
class Pages {
 public:
  Pages() = default;
  explicit Pages(size_t bytes);
  void* data() const { return memory.get(); }

 private:
  std::unique_ptr<void, void (*)(void*)> memory{nullptr, std::free};
};

// Memory of one worker, kept between calls; 64-byte aligned, content unspecified. slot 0: shared by a call, 1: worker.
void* scratch(int slot, size_t bytes);

}  // namespace ngk
