// The node side of PNA, forward and backward: nothing but its results has a row for each node.
#pragma once

#include "node_rows.h"

namespace ngk {

template <class V>
class NodeMap : NodeRows<V> {
 public:
  using Rows = NodeRows<V>;
  using Rows::c, Rows::chunks, Rows::segments, Rows::ld;
  using typename Rows::Chunk;
  using typename Rows::T;
  using typename Rows::Worker;

  NodeMap(const NodeCall& call, Parallel parallel, int threads) : Rows(call, parallel, threads, false) {}

  void operator()() {
    this->template pass<NodeMap, &NodeMap::map>(this);
    if (c.norm != GRAPH_NORM) return;
    merge_spreads();
    this->template pass<NodeMap, &NodeMap::finish>(this);
  }

 private:
  friend class NodeRows<V>;

  void map(Worker& w, Chunk& k) {
    this->evaluate(w, k);
    if (c.act_first) this->activated(w.y, k.rows);
    if (c.norm == GRAPH_NORM) measure(w, k);
    if (c.norm == LAYER_NORM) {
      this->normalise(w, k);
      this->scale(w.y, w.y, k.rows);
    }
    if (c.norm != GRAPH_NORM && !c.act_first) this->activated(w.y, k.rows);
    this->put(w.y, c.out, k);
  }

  void finish(Worker& w, Chunk& k) {
    this->get(c.out, w.y, k);
    this->normalise(w, k);
    this->scale(w.y, w.y, k.rows);
    if (!c.act_first) this->activated(w.y, k.rows);
    this->put(w.y, c.out, k);
  }

  void measure(Worker& w, Chunk& k) const {
    for (const bool centred : {false, true}) {
      const T mean = static_cast<T>(k.mean);
      for (int o = 0; o < ld; ++o) w.d[o] = T(0);
      for (int r = 0; r < k.rows; ++r)
        for (int o = 0; o < ld; ++o) w.d[o] += centred ? (w.y[r * ld + o] - mean) * (w.y[r * ld + o] - mean) : w.y[r * ld + o];
      double sum = 0;
      for (int o = 0; o < c.O; ++o) sum += w.d[o];
      (centred ? k.spread : k.mean) = centred ? sum : sum / (static_cast<double>(k.rows) * c.O);
    }
  }

  // Chan's update, in the order of the chunks; then mean and standard deviation, rounded as they are kept.
  void merge_spreads() {
    for (const Chunk& k : chunks) {
      NodeSegment<V>& s = segments[static_cast<size_t>(k.segment)];
      const double n = k.rows, delta = k.mean - s.mean, all = s.rows + n;
      s.spread += k.spread + delta * delta * (s.rows * n / all) * c.O;
      s.mean += delta * (n / all);
      s.rows = all;
    }
    T* stats = static_cast<T*>(c.stats);
    for (size_t s = 0; s < segments.size(); ++s) {
      stats[2 * s] = static_cast<T>(segments[s].mean);
      stats[2 * s + 1] = static_cast<T>(std::sqrt(segments[s].spread / (segments[s].rows * c.O)));
      segments[s].spread = stats[2 * s + 1];
    }
  }
};

template <class V>
class NodeGradients : NodeRows<V> {
 public:
  using Rows = NodeRows<V>;
  using Rows::c, Rows::maps, Rows::chunks, Rows::segments, Rows::ld;
  using typename Rows::Chunk;
  using typename Rows::T;
  using typename Rows::Worker;

  NodeGradients(const NodeCall& call, Parallel parallel, int threads) : Rows(call, parallel, threads, true) {}

  void operator()() {
    if (c.norm == GRAPH_NORM) {
      const T* stats = static_cast<const T*>(c.stats);
      for (size_t s = 0; s < segments.size(); ++s) segments[s].mean = stats[2 * s], segments[s].spread = stats[2 * s + 1];
      sums.assign(chunks.size() * 2 * static_cast<size_t>(ld), T(0));
      this->template pass<NodeGradients, &NodeGradients::sum_gradients>(this);
      merge_sums();
    }
    if (c.grad_reduced && !maps.count) std::memset(c.grad_reduced, 0, sizeof(T) * c.rows * c.C);
    total.assign(this->partial_size(), T(0));
    this->new_workers();
    run_items(
        this->plan, this->parallel, this->threads, this,
        [](void* p, int k, const Item& item) { static_cast<NodeGradients*>(p)->gradients(k, item); },
        [](void* p, int k, const Item&) { static_cast<NodeGradients*>(p)->commit(k); });
    const T* bias = total.data() + static_cast<int64_t>(maps.inputs) * ld;
    const std::vector<T> columns(bias, bias + 3 * ld);
    if (c.grad_beta) std::memcpy(c.grad_beta, columns.data() + ld, sizeof(T) * c.O);
    if (c.grad_gamma) std::memcpy(c.grad_gamma, columns.data() + 2 * ld, sizeof(T) * c.O);
    maps.gradients(total, columns.data());
  }

 private:
  friend class NodeRows<V>;
  std::vector<T> sums;   // gradients of beta and gamma by chunk
  std::vector<T> total;  // of the transposed matrix, bias, beta and gamma

  // Leaves the normalised values in y, the gradient of gamma y + beta in g, and in d the derivative of an activation before the norm.
  void again(Worker& w, const Chunk& k) const {
    this->evaluate(w, k);
    const int64_t n = this->vectors(static_cast<int64_t>(k.rows) * ld);
    if (c.act_first) activate<V, true>(c.act, w.y, w.y, w.d, n);
    if (c.norm != NO_NORM) this->normalise(w, k);
    this->get(c.grad, w.g, k);
    if (c.act_first || c.act == IDENTITY) return;
    const T* z = w.y;
    if (c.norm != NO_NORM) {
      this->scale(w.y, w.h, k.rows);
      z = w.h;
    }
    activate<V, true>(c.act, z, w.h, w.d, n);
    times_derivative(w, k);
  }
  void times_derivative(Worker& w, const Chunk& k) const {
    for (int64_t j = 0; j < static_cast<int64_t>(k.rows) * ld; ++j) w.g[j] *= w.d[j];
  }

  // first += sums of the columns of g, second (if any) += those of g y; sixteen rows at a time, for the rounding errors.
  void add_sums(Worker& w, const Chunk& k, T* first, T* second) const {
    for (int begin = 0; begin < k.rows; begin += 16) {
      const int end = begin + 16 < k.rows ? begin + 16 : k.rows;
      std::memset(w.sums, 0, sizeof(T) * 2 * ld);
      for (int r = begin; r < end; ++r)
        for (int o = 0; o < ld; ++o) {
          w.sums[o] += w.g[r * ld + o];
          w.sums[ld + o] += w.g[r * ld + o] * w.y[r * ld + o];
        }
      for (int o = 0; o < ld; ++o) first[o] += w.sums[o];
      for (int o = 0; second && o < ld; ++o) second[o] += w.sums[ld + o];
    }
  }

  void sum_gradients(Worker& w, Chunk& k) {
    again(w, k);
    T* to = sums.data() + (&k - chunks.data()) * 2 * ld;
    add_sums(w, k, to, to + ld);
  }

  // Means over each segment of the normalised values' gradient, and of it times them.
  void merge_sums() {
    std::vector<double> first(segments.size(), 0.), second(segments.size(), 0.);
    for (size_t j = 0; j < chunks.size(); ++j) {
      const T* from = sums.data() + j * 2 * ld;
      const size_t s = static_cast<size_t>(chunks[j].segment);
      segments[s].rows += chunks[j].rows;
      for (int o = 0; o < c.O; ++o) {
        first[s] += static_cast<double>(from[o]) * maps.gamma[o];
        second[s] += static_cast<double>(from[ld + o]) * maps.gamma[o];
      }
    }
    for (size_t s = 0; s < segments.size(); ++s) {
      NodeSegment<V>& to = segments[s];
      const double n = to.rows * c.O;
      to.a = static_cast<T>(first[s] / n / (to.spread + c.eps));
      to.b = to.spread > 0 ? static_cast<T>(second[s] / n / to.spread) : T(0);  // equal states have no slope
    }
  }

  // g becomes the gradient of what is normalised.
  void through_norm(Worker& w, const Chunk& k) const {
    const NodeSegment<V>& s = segments[static_cast<size_t>(k.segment)];
    T a = s.a, b = s.b, inverse = T(1) / (static_cast<T>(s.spread) + static_cast<T>(c.eps));
    for (int r = 0; r < k.rows; ++r) {
      T *g = w.g + r * ld, *y = w.y + r * ld;
      for (int o = 0; o < ld; ++o) g[o] *= maps.gamma[o];
      if (c.norm == LAYER_NORM) {
        inverse = w.rstd[r];
        a = b = T(0);
        for (int o = 0; o < c.O; ++o) a += g[o], b += g[o] * y[o];
        a *= inverse / static_cast<T>(c.O);
        b *= inverse / static_cast<T>(c.O);
      }
      for (int o = 0; o < c.O; ++o) g[o] = g[o] * inverse - a - y[o] * b;
    }
  }

  void gradients(int number, const Item& item) {
    Worker& w = this->worker(number);
    std::memset(w.partial, 0, sizeof(T) * this->partial_size());
    T* bias = w.partial + static_cast<int64_t>(maps.inputs) * ld;
    for (int64_t at = item.first; at < item.last; ++at) {
      const Chunk& k = chunks[static_cast<size_t>(at)];
      again(w, k);
      if (c.norm != NO_NORM) {
        add_sums(w, k, bias + ld, bias + 2 * ld);
        through_norm(w, k);
      }
      if (c.act_first) times_derivative(w, k);
      std::memset(w.g + static_cast<int64_t>(k.rows) * ld, 0, sizeof(T) * (row_blocks<V>(k.rows) - k.rows) * ld);
      add_sums(w, k, bias, nullptr);
      through_maps(w, k);
    }
  }
  void commit(int number) {
    const T* from = this->workers[static_cast<size_t>(number)].partial;
    for (size_t j = 0; j < total.size(); ++j) total[j] += from[j];
  }

  void through_maps(Worker& w, const Chunk& k) const {
    gemm_outer<V>(this->rows_of(c.x, k, c.F), c.F, c.F, w.g, ld, k.rows, w.partial, ld);
    if (c.grad_x) {
      gemm<V>(w.g, ld, k.rows, maps.x_back, w.wide, FromZero<V>{});
      write(w, c.grad_x, k, c.F);
    }
    for (int s = 0; s < maps.count; ++s) {
      const T *a = static_cast<const T*>(c.factors[static_cast<size_t>(s)]), *g = w.g;
      if (a) {
        for (int r = 0; r < row_blocks<V>(k.rows); ++r) {
          const T scale = r < k.rows ? a[k.first + r] : T(0);
          for (int o = 0; o < ld; ++o) w.h[r * ld + o] = scale * w.g[r * ld + o];
        }
        g = w.h;
      }
      gemm_outer<V>(this->rows_of(c.reduced, k, c.C), c.C, c.C, g, ld, k.rows, w.partial + static_cast<int64_t>(c.F + s * c.C) * ld, ld);
      if (!c.grad_reduced) continue;
      const Matrix<V>& m = maps.scaled_back[s];
      if (s) {
        gemm<V>(g, ld, k.rows, m, w.wide, FromRows<V>{w.wide, m.ld});
      } else {
        gemm<V>(g, ld, k.rows, m, w.wide, FromZero<V>{});
      }
    }
    if (c.grad_reduced && maps.count) write(w, c.grad_reduced, k, c.C);
  }
  void write(const Worker& w, void* to, const Chunk& k, int columns) const {
    const int from = padded<V>(columns);
    for (int r = 0; r < k.rows; ++r)
      std::memcpy(static_cast<T*>(to) + (k.first + r) * columns, w.wide + static_cast<int64_t>(r) * from, sizeof(T) * columns);
  }
};

}  // namespace ngk
