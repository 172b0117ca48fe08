#include "schedule.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ngk {
namespace {

constexpr int64_t PIECE_EDGES = 12288, SMALL_GRAPH = 4096, ITEM_EDGES = 8192;
constexpr int64_t PAIR_SIDE = 64;  // with partners, node terms of destinations and sources are kept for both: small pieces

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void cut_pairs(const Row& row, int64_t index, int64_t copy, std::vector<Piece>& out) {
  const bool triangle = row.kind == TRIANGLE;
  const int64_t tall = triangle ? PAIR_SIDE : std::min<int64_t>(4 * PAIR_SIDE, std::max(PAIR_SIDE, PAIR_SIDE * PAIR_SIDE / row.n_src));
  const int64_t wide = triangle ? PAIR_SIDE : std::min<int64_t>(4 * PAIR_SIDE, std::max(PAIR_SIDE, PAIR_SIDE * PAIR_SIDE / row.n_dst));
  for (int64_t i = 0; i < row.n_dst; i += tall)
    for (int64_t j = triangle ? i : 0; j < row.n_src; j += wide)
      out.push_back({&row, index, copy, i, std::min(row.n_dst, i + tall), j, std::min(row.n_src, j + wide), triangle && i == j, nullptr, nullptr});
}

void cut_lists(const Row& row, int64_t index, int64_t copy, const int64_t* lists, std::vector<Piece>& out) {
  for (int64_t p = 0; p < lists[0]; ++p) {
    const int64_t* at = lists + LISTS_HEAD + LISTS_DIRECTORY * p;
    out.push_back({&row, index, copy, 0, at[1], 0, at[3], false, lists, at});
  }
}

void cut(const Row& row, int64_t index, int64_t copy, bool paired, std::vector<Piece>& out) {
  if (row.kind == DIAGONAL) {
    for (int64_t i = 0; i < row.n_dst; i += 4096) {
      const int64_t end = std::min(row.n_dst, i + 4096);
      out.push_back({&row, index, copy, i, end, i, end, false, nullptr, nullptr});
    }
    return;
  }
  if (paired) return cut_pairs(row, index, copy, out);
  const int64_t wide = std::min<int64_t>(2048, std::max<int64_t>(192, PIECE_EDGES / std::min<int64_t>(row.n_dst, 64)));
  const int64_t nj = ceil_div(row.n_src, wide), J = ceil_div(row.n_src, nj);
  const int64_t tall = std::min<int64_t>(1024, std::max<int64_t>(64, PIECE_EDGES / J));
  const int64_t ni = ceil_div(row.n_dst, tall), I = ceil_div(row.n_dst, ni);
  for (int64_t i = 0; i < row.n_dst; i += I)
    for (int64_t j = 0; j < row.n_src; j += J)
      out.push_back({&row, index, copy, i, std::min(row.n_dst, i + I), j, std::min(row.n_src, j + J), false, nullptr, nullptr});
}

}  // namespace

Plan make_plan(const Call& call) {
  Plan plan;
  const auto& rows = call.rows;
  int64_t open_edges = 0;  // of the item being filled with small networks
  for (size_t begin = 0; begin < rows.size();) {
    size_t end = begin;
    int64_t edges = 0;
    for (; end < rows.size() && rows[end].part == rows[begin].part; ++end) edges += rows[end].edges();
    const bool small = edges <= SMALL_GRAPH;
    for (int64_t copy = 0; copy < rows[begin].copies; ++copy) {
      const int64_t first = static_cast<int64_t>(plan.pieces.size());
      for (size_t r = begin; r < end; ++r) {
        if (rows[r].kind == SPARSE) {
          cut_lists(rows[r], static_cast<int64_t>(r), copy, call.topology + rows[r].lists, plan.pieces);
        } else {
          cut(rows[r], static_cast<int64_t>(r), copy, call.paired, plan.pieces);
        }
      }
      const int64_t last = static_cast<int64_t>(plan.pieces.size());
      if (!small) {
        for (int64_t p = first; p < last; ++p) plan.items.push_back({p, p + 1, false});
        open_edges = ITEM_EDGES;
      } else if (!plan.items.empty() && plan.items.back().exclusive && open_edges < ITEM_EDGES) {
        plan.items.back().last = last;
        open_edges += edges;
      } else {
        plan.items.push_back({first, last, true});
        open_edges = edges;
      }
    }
    begin = end;
  }
  for (const Piece& p : plan.pieces) {
    plan.max_rows = std::max(plan.max_rows, p.rows());
    plan.max_cols = std::max(plan.max_cols, p.cols());
  }
  return plan;
}

std::vector<int32_t> degrees(const Call& call) {
  std::vector<int32_t> count(static_cast<size_t>(call.out_rows), 0);
  for (const Row& row : call.rows)
    for (int64_t copy = 0; copy < row.copies; ++copy) {
      int32_t* c = count.data() + row.out + copy * row.out_stride;
      if (row.kind == SPARSE) {
        std::vector<Piece> pieces;
        cut_lists(row, 0, copy, call.topology + row.lists, pieces);
        for (const Piece& p : pieces)
          for (int64_t e = 0; e < p.edges(); ++e) ++c[p.destination(entry_of(p.entries()[e]).i)];
        continue;
      }
      const int32_t add = row.kind == DIAGONAL ? 1 : static_cast<int32_t>(row.n_src);
      for (int64_t i = 0; i < row.n_dst; ++i) c[i] += add;
    }
  return count;
}

void run_items(const Plan& plan, Parallel parallel, int threads, void* ctx, void (*process)(void*, int, const Item&),
               void (*commit)(void*, int, const Item&)) {
  struct State {
    const Plan& plan;
    void* ctx;
    void (*process)(void*, int, const Item&);
    void (*commit)(void*, int, const Item&);
    std::atomic<int64_t> next{0}, turn{0};
    std::atomic<int> workers{0};
  } state{plan, ctx, process, commit};
  const int64_t n = static_cast<int64_t>(plan.items.size());
  // Workers may also run one after the other: the one that takes an item is never waited for by an earlier item.
  const auto work = [](void* p, int64_t begin, int64_t end) {
    State& s = *static_cast<State*>(p);
    for (int64_t w = begin; w < end; ++w) {
      const int worker = s.workers.fetch_add(1);
      for (int64_t m; (m = s.next.fetch_add(1)) < static_cast<int64_t>(s.plan.items.size());) {
        const Item& item = s.plan.items[static_cast<size_t>(m)];
        s.process(s.ctx, worker, item);
        if (s.commit) {
          while (s.turn.load(std::memory_order_acquire) != m) std::this_thread::yield();
          s.commit(s.ctx, worker, item);
          s.turn.store(m + 1, std::memory_order_release);
        }
      }
    }
  };
  const int64_t workers = std::min<int64_t>(threads, n);
  if (workers <= 1) {
    if (n) work(&state, 0, 1);
  } else {
    parallel(workers, &state, work);
  }
}

Pages::Pages(size_t bytes) {
  constexpr size_t large = size_t(1) << 21;
  const size_t page = bytes < 2 * large ? 4096 : large, whole = (bytes + page - 1) / page * page;
  memory.reset(std::aligned_alloc(page, whole));
  if (!memory) throw std::bad_alloc();
#if defined(__linux__)
  if (page == large) madvise(memory.get(), whole, MADV_HUGEPAGE);  // a wish: nothing depends on it
#endif
}

void* scratch(int slot, size_t bytes) {
  struct Buffer {
    void* p = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(p); }
  };
  thread_local Buffer buffers[2];
  Buffer& b = buffers[slot];
  if (b.size < bytes) {
    std::free(b.p);
    b.p = nullptr;
    b.size = (bytes + 4095) / 4096 * 4096;
    b.p = std::aligned_alloc(64, b.size);
    if (!b.p) {
      b.size = 0;
      throw std::bad_alloc();
    }
  }
  return b.p;
}

}  // namespace ngk
