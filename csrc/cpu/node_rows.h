// What forward and backward of the node side share: rows cut into chunks, workers, the maps and the norm of one chunk.
#pragma once

#include "../message_math.h"
#include "node_maps.h"

namespace ngk {

struct NodeChunk {
  int64_t segment, first;
  int rows;
  double mean = 0, spread = 0;  // of its values; spread: sum of squares about the mean
};

template <class V>
struct NodeSegment {
  double rows = 0, mean = 0, spread = 0;  // of its values; spread: standard deviation, in the end
  typename V::T a = 0, b = 0;             // backward: what `through_norm` takes off
};

template <class V>
struct NodeWorker {
  typename V::T *tail = nullptr, *y = nullptr, *h = nullptr, *d = nullptr, *g = nullptr, *wide = nullptr, *partial = nullptr,
                *rstd = nullptr, *sums = nullptr;
};

template <class V>
class NodeRows {
 public:
  using T = typename V::T;
  using Chunk = NodeChunk;
  using Worker = NodeWorker<V>;

  NodeRows(const NodeCall& call, Parallel parallel, int threads, bool backward)
      : c(call), maps(call, backward), parallel(parallel), threads(threads), backward(backward), ld(maps.ld) {
    cut();
  }

 protected:
  static constexpr int ROWS = 192;
  const NodeCall& c;
  NodeMaps<V> maps;
  Parallel parallel;
  int threads;
  bool backward;
  int ld;
  Plan plan;
  std::vector<Chunk> chunks;
  std::vector<NodeSegment<V>> segments;
  std::vector<Worker> workers;

  size_t partial_size() const { return static_cast<size_t>(maps.inputs + 3) * ld; }

  // Chunks end where a segment does; items hold chunks of about ROWS rows together.
  void cut() {
    segments.resize(c.bounds.size() - 1);
    int64_t open = ROWS;
    for (size_t s = 0; s + 1 < c.bounds.size(); ++s)
      for (int64_t first = c.bounds[s]; first < c.bounds[s + 1]; first += ROWS) {
        const int64_t rest = c.bounds[s + 1] - first, rows = rest < ROWS ? rest : ROWS, at = static_cast<int64_t>(chunks.size());
        chunks.push_back({static_cast<int64_t>(s), first, static_cast<int>(rows)});
        if (open + rows > ROWS) {
          plan.items.push_back({at, at + 1, false});
          open = rows;
        } else {
          plan.items.back().last = at + 1;
          open += rows;
        }
      }
  }

  // A worker is a thread of one pass: its memory is that thread's.
  void new_workers() {
    const int64_t n = static_cast<int64_t>(plan.items.size());
    workers.assign(static_cast<size_t>(threads < n ? threads : n > 0 ? n : 1), Worker{});
  }
  Worker& worker(int k) {
    Worker& w = workers[static_cast<size_t>(k)];
    if (w.y) return w;
    Arena measure, arena;
    layout(measure, w);
    arena.base = static_cast<char*>(scratch(1, measure.used));
    layout(arena, w);
    return w;
  }
  void layout(Arena& a, Worker& w) const {
    const size_t tile = static_cast<size_t>(row_blocks<V>(ROWS)), slack = 64;
    const int widest = c.F > c.C ? c.F : c.C;
    w.tail = a.take<T>(static_cast<size_t>(V::MR) * widest + slack);
    for (T** p : {&w.y, &w.h, &w.d, &w.g}) *p = a.take<T>(tile * ld + slack);
    w.rstd = a.take<T>(tile);
    w.sums = a.take<T>(2 * static_cast<size_t>(ld));
    if (!backward) return;
    w.wide = a.take<T>(tile * padded<V>(widest) + slack);
    w.partial = a.take<T>(partial_size());
  }

  // body(this, worker, chunk) for every chunk, in any order.
  template <class Op, void (Op::*body)(Worker&, Chunk&)>
  void pass(Op* op) {
    new_workers();
    run_items(
        plan, parallel, threads, op,
        [](void* p, int k, const Item& item) {
          Op* self = static_cast<Op*>(p);
          for (int64_t at = item.first; at < item.last; ++at) (self->*body)(self->worker(k), self->chunks[static_cast<size_t>(at)]);
        },
        nullptr);
  }

  const T* rows_of(const void* p, const Chunk& k, int columns) const { return static_cast<const T*>(p) + k.first * columns; }

  // to[rows, ld] = start + from[rows, K] m. The rows of the last block are copied, so that none beyond them is read.
  template <class From>
  void product(Worker& w, const T* from, int K, int rows, const Matrix<V>& m, T* to, const From& start, const From& start_of_rest) const {
    const int full = rows / V::MR * V::MR, rest = rows - full;
    if (full) gemm<V>(from, K, full, m, to, start);
    if (!rest) return;
    std::memcpy(w.tail, from + static_cast<int64_t>(full) * K, sizeof(T) * rest * K);
    std::memset(w.tail + rest * K, 0, sizeof(T) * (V::MR - rest) * K);
    gemm<V>(w.tail, K, rest, m, to + static_cast<int64_t>(full) * ld, start_of_rest);
  }

  // y = x W_x^T + sum of a_s (reduced W_s^T) + b.
  void evaluate(Worker& w, const Chunk& k) const {
    const FromRow<V> bias{maps.bias};
    product(w, rows_of(c.x, k, c.F), c.F, k.rows, maps.x, w.y, bias, bias);
    for (int s = 0; s < maps.count; ++s) {
      const T *a = static_cast<const T*>(c.factors[static_cast<size_t>(s)]), *reduced = rows_of(c.reduced, k, c.C);
      if (!a) {
        const FromRows<V> there{w.y, ld}, rest{w.y + static_cast<int64_t>(k.rows / V::MR * V::MR) * ld, ld};
        product(w, reduced, c.C, k.rows, maps.scaled[s], w.y, there, rest);
        continue;
      }
      product(w, reduced, c.C, k.rows, maps.scaled[s], w.h, FromZero<V>{}, FromZero<V>{});
      for (int r = 0; r < k.rows; ++r) {
        const T scale = a[k.first + r];
        for (int o = 0; o < ld; ++o) w.y[r * ld + o] += scale * w.h[r * ld + o];
      }
    }
  }

  static int64_t vectors(int64_t n) { return (n + V::W - 1) / V::W * V::W; }

  // Rows of a tensor [rows, O] from and to padded ones.
  void put(const T* from, void* to, const Chunk& k) const {
    for (int r = 0; r < k.rows; ++r) std::memcpy(static_cast<T*>(to) + (k.first + r) * c.O, from + r * ld, sizeof(T) * c.O);
  }
  void get(const void* from, T* to, const Chunk& k) const {
    for (int r = 0; r < k.rows; ++r) {
      std::memcpy(to + r * ld, static_cast<const T*>(from) + (k.first + r) * c.O, sizeof(T) * c.O);
      for (int o = c.O; o < ld; ++o) to[r * ld + o] = T(0);
    }
  }

  // y becomes (y - mean) / s: of its segment, or of each row.
  void normalise(Worker& w, const Chunk& k) const {
    const NodeSegment<V>& s = segments[static_cast<size_t>(k.segment)];
    const T eps = static_cast<T>(c.eps), n = static_cast<T>(c.O);
    T mean = static_cast<T>(s.mean), inverse = T(1) / (static_cast<T>(s.spread) + eps);
    for (int r = 0; r < k.rows; ++r) {
      T* y = w.y + r * ld;
      if (c.norm == LAYER_NORM) {
        T sum = 0, squares = 0;
        for (int o = 0; o < c.O; ++o) sum += y[o];
        mean = sum / n;
        for (int o = 0; o < c.O; ++o) squares += (y[o] - mean) * (y[o] - mean);
        inverse = w.rstd[r] = T(1) / std::sqrt(squares / n + eps);
      }
      for (int o = 0; o < ld; ++o) y[o] = (y[o] - mean) * inverse;
    }
  }
  // to = gamma y + beta (to may be y).
  void scale(const T* y, T* to, int rows) const {
    for (int r = 0; r < rows; ++r)
      for (int o = 0; o < ld; ++o) to[r * ld + o] = maps.gamma[o] * y[r * ld + o] + maps.beta[o];
  }
  void activated(T* y, int rows) const {
    if (c.act != IDENTITY) activate<V, false>(c.act, y, y, nullptr, vectors(static_cast<int64_t>(rows) * ld));
  }
};

}  // namespace ngk
