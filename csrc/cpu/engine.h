// The ops on the evaluator and the back-propagator: aggregate and evaluate, forward, and one backward for both.
#pragma once

#include "backprop.h"
#include "messages.h"

namespace ngk {

template <class V>
class Engine {
 public:
  using T = typename V::T;

  Engine(const Call& c, Parallel parallel, int threads, bool backward)
      : call(c), prepared(c), plan(make_plan(c)), slots(c.mask), parallel(parallel), threads(threads), backward(backward) {
    ldm = padded<V>(c.width);
    const int64_t n = static_cast<int64_t>(plan.items.size());
    workers.resize(static_cast<size_t>(threads < n ? threads : n > 0 ? n : 1));
    ready.assign(workers.size(), 0);
    if (c.combine != EMIT) count = degrees(c);
    if (backward) {
      if (c.grad_params) total_params.assign(prepared.grad_size, T(0));
    } else {
      seen.assign(count.size(), 0);
    }
  }

  void aggregate() {
    const int64_t K = slots.count, F = call.width;
    std::memset(call.out, 0, sizeof(T) * call.out_rows * K * F);
    if (slots.mean_aux) std::memset(call.aux, 0, sizeof(T) * call.out_rows * F);
    if (slots.ties) std::memset(call.ties, 0, static_cast<size_t>(call.tie_bytes) * call.out_rows * slots.ties * F);
    run_items(
        plan, parallel, threads, this, [](void* e, int w, const Item& item) { static_cast<Engine*>(e)->reduce(w, item); },
        [](void* e, int w, const Item& item) { static_cast<Engine*>(e)->commit_reduced(w, item); });
    finish();
  }

  void evaluate() {
    run_items(plan, parallel, threads, this, [](void* e, int w, const Item& item) { static_cast<Engine*>(e)->write(w, item); }, nullptr);
  }

  void gradients() {
    for (size_t k = 0; k < call.grad_xs.size(); ++k)
      if (call.grad_xs[k]) std::memset(call.grad_xs[k], 0, sizeof(T) * call.nodes * call.x_width[k]);
    if (call.grad_table) std::memset(call.grad_table, 0, sizeof(T) * call.directions * call.table_nodes * TABLE_LINES * call.instrs[prepared.table_step].n_out);
    run_items(
        plan, parallel, threads, this, [](void* e, int w, const Item& item) { static_cast<Engine*>(e)->differentiate(w, item); },
        [](void* e, int w, const Item& item) { static_cast<Engine*>(e)->commit_gradients(w, item); });
    if (call.grad_params) prepared.write_grads(total_params.data());
  }

 private:
  const Call& call;
  Prepared<V> prepared;
  Plan plan;
  Slots slots;
  Parallel parallel;
  int threads, ldm;
  bool backward;
  std::vector<Worker<V>> workers;
  std::vector<char> ready;
  std::vector<int32_t> count, seen;
  std::vector<T> total_params;

  // ---- memory ----
  void layout(Arena& a, Worker<V>& w) {
    const size_t n = prepared.steps.size(), slack = 64;
    const size_t tile = static_cast<size_t>(row_blocks<V>(prepared.tile)), rows = row_blocks<V>(plan.max_rows), cols = row_blocks<V>(plan.max_cols);
    for (auto* v : {&w.out, &w.s, &w.t, &w.grad_s, &w.grad_t, &w.grad_add}) v->assign(n, nullptr);
    size_t rest = 0;
    for (size_t k = 0; k < n; ++k) {
      const Step<V>& s = prepared.steps[k];
      const Instr& in = call.instrs[k];
      w.out[k] = a.take<T>(tile * s.ld + slack);
      if (in.op == TABLE && rest < 2 * static_cast<size_t>(in.n_in) + slack) rest = 2 * in.n_in + slack;
      if (in.op == ADD && backward) w.grad_add[in.arg0] = a.take<T>(tile * prepared.steps[in.arg0].ld + slack);
      if (!s.node) continue;
      const size_t dx = call.x_width[in.x];
      if (rest < V::MR * dx + slack) rest = V::MR * dx + slack;
      w.s[k] = a.take<T>(rows * s.ld + slack);
      w.t[k] = a.take<T>(cols * s.ld + slack);
      if (!backward) continue;
      w.grad_s[k] = a.take<T>(rows * s.ld + slack);
      w.grad_t[k] = a.take<T>(cols * s.ld + slack);
    }
    w.rest = a.take<T>(rest);
    w.i = a.take<int>(tile);
    w.j = a.take<int>(tile);
    if (prepared.table_step >= 0) {
      w.cell = a.take<T>(tile + slack);
      w.hermite = a.take<T>(2 * TABLE_LINES * tile + slack);
      w.slope = a.take<T>(2 * TABLE_LINES * tile + slack);
    }
    if (!backward) {
      w.stats = a.take<T>(static_cast<size_t>(Stats<V>::PLANES) * plan.max_rows * ldm + slack);
      return;
    }
    w.message = a.take<T>(tile * ldm + slack);
    for (T*& g : w.g) g = a.take<T>(tile * prepared.max_ld + slack);
    w.coefficients = a.take<T>(static_cast<size_t>(Coefficients<V>::PLANES) * plan.max_rows * ldm + slack);
    w.grad_x_i.assign(call.xs.size(), nullptr);
    w.grad_x_j.assign(call.xs.size(), nullptr);
    for (size_t x = 0; x < call.xs.size(); ++x) {
      w.grad_x_i[x] = a.take<T>(rows * padded<V>(call.x_width[x]));
      w.grad_x_j[x] = a.take<T>(cols * padded<V>(call.x_width[x]));
    }
    w.params = a.take<T>(prepared.grad_size);
    if (call.grad_table) w.table = a.take<T>(static_cast<size_t>(call.directions) * call.table_nodes * TABLE_LINES * prepared.table_ld);
    size_t raw = 0;
    for (const Piece& p : plan.pieces)
      if (p.row->shared && raw < static_cast<size_t>(p.edges())) raw = static_cast<size_t>(p.edges());
    w.raw_grad = a.take<T>(raw * call.instrs[0].n_out);
  }

  Worker<V>& worker(int k) {
    Worker<V>& w = workers[static_cast<size_t>(k)];
    if (!ready[static_cast<size_t>(k)]) {
      Arena measure, arena;
      layout(measure, w);
      arena.base = static_cast<char*>(scratch(1, measure.used));
      layout(arena, w);
      clear_worker(w);
      for (int d = 0; d < 2; ++d) w.table_low[d] = call.table_nodes, w.table_high[d] = 0;
      ready[static_cast<size_t>(k)] = 1;
    }
    return w;
  }

  // Padding must not hold what an earlier call left (denormal numbers are slow), gradients of the table start at 0.
  void clear_worker(Worker<V>& w) {
    const size_t tile = static_cast<size_t>(row_blocks<V>(prepared.tile));
    for (size_t k = 0; k < prepared.steps.size(); ++k) std::memset(w.out[k], 0, sizeof(T) * tile * prepared.steps[k].ld);
    if (!backward) return;
    for (T* g : w.g) std::memset(g, 0, sizeof(T) * tile * prepared.max_ld);
    if (w.table) std::memset(w.table, 0, sizeof(T) * call.directions * call.table_nodes * TABLE_LINES * prepared.table_ld);
  }

  int edge_register() const { return call.combine == PLAIN || call.combine == EMIT ? static_cast<int>(prepared.steps.size()) - 1 : call.message_start - 1; }
  int message_register() const { return call.combine == PLAIN || call.combine == EMIT ? -1 : static_cast<int>(prepared.steps.size()) - 1; }

  Registers<V> registers(const Worker<V>& w) const {
    const int e = edge_register(), q = message_register();
    return {w.out[e], q < 0 ? nullptr : w.out[q], prepared.steps[e].ld, q < 0 ? 0 : prepared.steps[q].ld, call.width};
  }

  // ---- aggregate, forward ----
  void reduce(int k, const Item& item) {
    Worker<V>& w = worker(k);
    Evaluator<V> eval(prepared, w);
    for (int64_t at = item.first; at < item.last; ++at) {
      const Piece& piece = plan.pieces[at];
      Stats<V> stats(w.stats, piece.rows(), ldm);
      eval.nodes(piece);
      eval.tiles(piece, [&](const Tile<V>& t) {
        eval.template run<false>(t);
        const Registers<V> g = registers(w);
        with_kind(call.combine, [&](auto tag) {
          t.destinations([&](int i, int first, int last) { stats.template join<decltype(tag)::kind>(slots, i, piece.row->kind == DIAGONAL || t.j[first] == 0, g, first, last); });
        });
      });
      if (item.exclusive) merge(piece, stats);
    }
  }

  void commit_reduced(int k, const Item& item) {
    if (item.exclusive) return;
    const Piece& piece = plan.pieces[item.first];
    merge(piece, Stats<V>(workers[static_cast<size_t>(k)].stats, piece.rows(), ldm));
  }

  // Chan's parallel update of the rows' statistics by those of one piece.
  void merge(const Piece& piece, const Stats<V>& s) {
    const int64_t F = call.width, K = slots.count;
    for (int i = 0; i < piece.rows(); ++i) {
      const int64_t row = piece.row->out + piece.copy * piece.row->out_stride + piece.i0 + i, at = static_cast<int64_t>(i) * s.ld;
      const T na = static_cast<T>(seen[row]), nb = static_cast<T>(piece.row->kind == DIAGONAL ? 1 : piece.cols());
      T* out = static_cast<T*>(call.out) + row * K * F;
      T* mean = slots.mean >= 0 ? out + slots.mean * F : slots.mean_aux ? static_cast<T*>(call.aux) + row * F : nullptr;
      if (slots.spread()) {
        T* spread = out + (slots.std >= 0 ? slots.std : slots.var) * F;
        for (int64_t c = 0; c < F; ++c) {
          const T d = s.s1[at + c] / nb, mb = s.shift[at + c] + d, m2 = s.s2[at + c] - s.s1[at + c] * d, delta = mb - mean[c];
          mean[c] = na > 0 ? mean[c] + delta * (nb / (na + nb)) : mb;
          spread[c] += (m2 < 0 ? T(0) : m2) + (na > 0 ? delta * delta * (na * nb / (na + nb)) : T(0));
          if (slots.sum >= 0) out[slots.sum * F + c] += s.s1[at + c] + nb * s.shift[at + c];
        }
      } else {
        for (int64_t c = 0; mean && c < F; ++c) mean[c] += s.s1[at + c];
        for (int64_t c = 0; slots.sum >= 0 && c < F; ++c) out[slots.sum * F + c] += s.s1[at + c];
      }
      if (slots.min >= 0) merge_extreme<false>(na, out + slots.min * F, row, slots.min_tie, s.lo + at, s.lo_ties + at, s.s1 + at);
      if (slots.max >= 0) merge_extreme<true>(na, out + slots.max * F, row, slots.max_tie, s.hi + at, s.hi_ties + at, s.s1 + at);
      seen[row] += static_cast<int32_t>(nb);
    }
  }

  template <bool MAXIMUM>
  void merge_extreme(T na, T* best, int64_t row, int slot, const T* value, const T* ties, const T* sum) {
    if (call.tie_bytes == 2) {
      merge_extreme<MAXIMUM>(na, best, static_cast<uint16_t*>(call.ties) + (row * slots.ties + slot) * call.width, value, ties, sum);
    } else {
      merge_extreme<MAXIMUM>(na, best, static_cast<uint32_t*>(call.ties) + (row * slots.ties + slot) * call.width, value, ties, sum);
    }
  }
  template <bool MAXIMUM, class Count>
  void merge_extreme(T na, T* best, Count* n, const T* value, const T* ties, const T* sum) {
    for (int64_t c = 0; c < call.width; ++c) {
      const bool better = na == 0 || (MAXIMUM ? value[c] > best[c] : value[c] < best[c]);
      const Count more = static_cast<Count>(ties[c]);
      n[c] = better ? more : static_cast<Count>(n[c] + (value[c] == best[c] ? more : 0));
      best[c] = sum[c] != sum[c] ? sum[c] : better ? value[c] : best[c];  // a NaN among the messages stays
    }
  }

  void finish() {
    const int64_t F = call.width, K = slots.count;
    for (int64_t row = 0; row < call.out_rows; ++row) {
      if (!count[row]) continue;
      T* out = static_cast<T*>(call.out) + row * K * F;
      const T inverse = T(1) / static_cast<T>(count[row]);
      if (!slots.spread()) {
        for (int64_t c = 0; slots.mean >= 0 && c < F; ++c) out[slots.mean * F + c] *= inverse;
        continue;
      }
      T* from = out + (slots.std >= 0 ? slots.std : slots.var) * F;
      for (int64_t c = 0; c < F; ++c) {
        const T var = from[c] * inverse;
        if (slots.var >= 0) out[slots.var * F + c] = var;
        if (slots.std >= 0) out[slots.std * F + c] = var > T(STD_THRESHOLD) || var != var ? std::sqrt(var) : T(0);
      }
    }
  }

  // ---- evaluate, forward ----
  void write(int k, const Item& item) {
    Worker<V>& w = worker(k);
    Evaluator<V> eval(prepared, w);
    const int e = edge_register();
    for (int64_t at = item.first; at < item.last; ++at) {
      const Piece& piece = plan.pieces[at];
      const Row& row = *piece.row;
      const View v = view(call.values[value_index(piece)], row, piece.copy, true, row.emit_offset, row.emit_stride);
      eval.nodes(piece);
      eval.tiles(piece, [&](const Tile<V>& t) {
        eval.template run<false>(t);
        scatter<V>(t, v, call.width, w.out[e], prepared.steps[e].ld);
      });
    }
  }
  size_t value_index(const Piece& piece) const { return piece.row->emit_offset >= 0 ? 0 : static_cast<size_t>(piece.index); }

  // ---- backward ----
  void coefficients(Worker<V>& w, const Piece& piece) {
    const int64_t F = call.width, K = slots.count;
    Coefficients<V> to(w.coefficients, piece.rows(), ldm);
    for (int i = 0; i < piece.rows(); ++i) {
      const int64_t row = piece.row->out + piece.copy * piece.row->out_stride + piece.i0 + i;
      const T *out = static_cast<const T*>(call.out) + row * K * F, *g = static_cast<const T*>(call.grad_out) + row * K * F;
      const T* mean = slots.mean >= 0 ? out + slots.mean * F : slots.mean_aux ? static_cast<const T*>(call.aux) + row * F : nullptr;
      const T inverse = T(1) / static_cast<T>(count[row] ? count[row] : 1);
      for (int64_t c = 0; c < F; ++c) {
        const int64_t at = static_cast<int64_t>(i) * ldm + c;
        T constant = slots.sum >= 0 ? g[slots.sum * F + c] : T(0), slope = 0;
        if (slots.mean >= 0) constant += g[slots.mean * F + c] * inverse;
        if (slots.std >= 0 && out[slots.std * F + c] > 0) slope += g[slots.std * F + c] * inverse / out[slots.std * F + c];
        if (slots.var >= 0) slope += T(2) * g[slots.var * F + c] * inverse;
        to.constant[at] = constant;
        to.slope[at] = slope;
        to.mean[at] = mean ? mean[c] : T(0);
        if (slots.min >= 0) {
          to.lo_share[at] = g[slots.min * F + c] / ties(row, slots.min_tie, c);
          to.lo[at] = out[slots.min * F + c];
        }
        if (slots.max >= 0) {
          to.hi_share[at] = g[slots.max * F + c] / ties(row, slots.max_tie, c);
          to.hi[at] = out[slots.max * F + c];
        }
      }
    }
  }
  T ties(int64_t row, int slot, int64_t c) const {
    const int64_t at = (row * slots.ties + slot) * call.width + c;
    const int64_t n = call.tie_bytes == 2 ? static_cast<const uint16_t*>(call.ties)[at] : static_cast<const uint32_t*>(call.ties)[at];
    return static_cast<T>(n ? n : 1);
  }

  void differentiate(int k, const Item& item) {
    Worker<V>& w = worker(k);
    Evaluator<V> eval(prepared, w);
    Backprop<V> back(prepared, w, eval);
    std::memset(w.params, 0, sizeof(T) * prepared.grad_size);
    for (int64_t at = item.first; at < item.last; ++at) {
      const Piece& piece = plan.pieces[at];
      if (call.combine == EMIT && !call.values[value_index(piece)].data) continue;
      eval.nodes(piece);
      clear_piece(w, piece);
      if (call.combine != EMIT) coefficients(w, piece);
      eval.tiles(piece, [&](const Tile<V>& t) {
        eval.template run<true>(t);
        tile_gradients(w, back, t);
      });
      node_gradients(w, piece);
      if (item.exclusive) commit_piece(w, piece);
    }
  }

  void tile_gradients(Worker<V>& w, Backprop<V>& back, const Tile<V>& t) {
    const int e = edge_register(), q = message_register(), n = static_cast<int>(prepared.steps.size());
    if (call.combine == EMIT) {
      const Row& row = *t.piece->row;
      gather<V>(t, view(call.values[value_index(*t.piece)], row, t.piece->copy, true, row.emit_offset, row.emit_stride), call.width, w.g[0], prepared.steps[e].ld);
      back.run(t, 0, n, 0);
      return;
    }
    const Registers<V> g = registers(w);
    const Coefficients<V> from(w.coefficients, t.piece->rows(), ldm);
    with_kind(call.combine, [&](auto tag) {
      t.destinations([&](int i, int first, int last) { from.template apply<decltype(tag)::kind>(slots, i, g, first, last, w.g[0], w.g[1], w.message); });
    });
    if (call.combine == FILM) Coefficients<V>::shifts(g, t.n, w.message, ldm, w.g[0]);
    if (q >= 0) back.run(t, call.message_start, n, 1);
    back.run(t, 0, e + 1, 0);
  }

  void clear_piece(Worker<V>& w, const Piece& piece) {
    for (size_t k = 0; k < prepared.steps.size(); ++k) {
      const Step<V>& s = prepared.steps[k];
      if (w.grad_add[k]) std::memset(w.grad_add[k], 0, sizeof(T) * row_blocks<V>(prepared.tile) * s.ld);
      if (!s.node) continue;
      std::memset(w.grad_s[k], 0, sizeof(T) * row_blocks<V>(piece.rows()) * s.ld);
      std::memset(w.grad_t[k], 0, sizeof(T) * row_blocks<V>(piece.cols()) * s.ld);
    }
    for (size_t x = 0; x < call.xs.size(); ++x) {
      const size_t ld = padded<V>(call.x_width[x]);
      std::memset(w.grad_x_i[x], 0, sizeof(T) * row_blocks<V>(piece.rows()) * ld);
      std::memset(w.grad_x_j[x], 0, sizeof(T) * row_blocks<V>(piece.cols()) * ld);
    }
  }

  // From the gradients of node terms to those of the projections and the node states.
  void node_gradients(Worker<V>& w, const Piece& piece) {
    for (size_t k = 0; k < prepared.steps.size(); ++k) {
      const Step<V>& s = prepared.steps[k];
      if (!s.node) continue;
      const Instr& in = call.instrs[k];
      const int dx = call.x_width[in.x], rows = piece.rows(), cols = piece.cols();
      if (call.grad_params) {
        const T* x = static_cast<const T*>(call.xs[in.x]) + piece.copy * piece.row->node_stride * dx;
        gemm_outer<V>(x + (piece.row->dst + piece.i0) * dx, dx, dx, w.grad_s[k], s.ld, rows, w.params + s.g_wd, s.ld);
        gemm_outer<V>(x + (piece.row->src + piece.j0) * dx, dx, dx, w.grad_t[k], s.ld, cols, w.params + s.g_ws, s.ld);
        for (int i = 0; i < rows; ++i)
          for (int c = 0; c < s.ld; ++c) w.params[s.g_b + c] += w.grad_s[k][static_cast<int64_t>(i) * s.ld + c];
      }
      if (!call.grad_xs[in.x]) continue;
      T *gi = w.grad_x_i[in.x], *gj = w.grad_x_j[in.x];
      gemm<V>(w.grad_s[k], s.ld, rows, s.wd_t, gi, FromRows<V>{gi, s.wd_t.ld});
      gemm<V>(w.grad_t[k], s.ld, cols, s.ws_t, gj, FromRows<V>{gj, s.ws_t.ld});
    }
  }

  // Adds what a piece holds for nodes and shared raw weights.
  void commit_piece(Worker<V>& w, const Piece& piece) {
    const Row& row = *piece.row;
    for (size_t x = 0; x < call.xs.size(); ++x) {
      if (!call.grad_xs[x]) continue;
      const int dx = call.x_width[x], ld = padded<V>(dx);
      T* g = static_cast<T*>(call.grad_xs[x]) + piece.copy * row.node_stride * dx;
      const auto add = [&](int64_t first, int n, const T* from) {
        for (int i = 0; i < n; ++i)
          for (int c = 0; c < dx; ++c) g[(first + i) * dx + c] += from[static_cast<int64_t>(i) * ld + c];
      };
      add(row.dst + piece.i0, piece.rows(), w.grad_x_i[x]);
      add(row.src + piece.j0, piece.cols(), w.grad_x_j[x]);
    }
    if (!row.shared || !call.need_weights || !call.grad_weights[row.weight].data) return;
    add_shared(w, piece, view(call.grad_weights[row.weight], row, piece.copy, false, row.offset, row.edge_stride));
  }

  void add_shared(Worker<V>& w, const Piece& piece, const View& v) {
    const int C = call.instrs[0].n_out, cols = piece.row->kind == DIAGONAL ? 1 : piece.cols();
    Worker<V>& worker = w;
    for (int i = 0; i < piece.rows(); ++i)
      for (int j = 0; j < cols; ++j) {
        const int64_t jj = piece.row->kind == DIAGONAL ? piece.i0 + i : piece.j0 + j;
        char* p = v.base + ((piece.i0 + i) * v.dst + jj * v.src) * dtype_size(v.dtype);
        for (int c = 0; c < C; ++c) accumulate(p + c * v.channel * dtype_size(v.dtype), v.dtype, worker.raw_grad[(static_cast<int64_t>(i) * cols + j) * C + c]);
      }
  }
  static void accumulate(char* p, Dtype dtype, T x) {
    if (dtype == F32) {
      float f;
      std::memcpy(&f, p, 4);
      f += static_cast<float>(x);
      std::memcpy(p, &f, 4);
    } else if (dtype == F64) {
      double f;
      std::memcpy(&f, p, 8);
      f += static_cast<double>(x);
      std::memcpy(p, &f, 8);
    } else {
      uint16_t h;
      std::memcpy(&h, p, 2);
      if (dtype == BF16) {
        h = to_bf16(from_bf16(h) + static_cast<float>(x));
      } else {
        const _Float16 f = static_cast<_Float16>(from_f16(h) + static_cast<float>(x));
        std::memcpy(&h, &f, 2);
      }
      std::memcpy(p, &h, 2);
    }
  }

  void commit_gradients(int k, const Item& item) {
    Worker<V>& w = workers[static_cast<size_t>(k)];
    if (!item.exclusive) {
      const Piece& piece = plan.pieces[item.first];
      if (call.combine != EMIT || call.values[value_index(piece)].data) commit_piece(w, piece);
    }
    for (size_t c = 0; c < total_params.size(); ++c) total_params[c] += w.params[c];
    if (!w.table) return;
    const int ld = prepared.table_ld, n = call.instrs[prepared.table_step].n_out;
    for (int d = 0; d < call.directions; ++d) {
      const int64_t first = TABLE_LINES * (w.table_low[d] + d * call.table_nodes), last = TABLE_LINES * (w.table_high[d] + d * call.table_nodes);
      for (int64_t r = first; r < last; ++r) {
        T *to = static_cast<T*>(call.grad_table) + r * n, *from = w.table + r * ld;
        for (int c = 0; c < n; ++c) to[c] += from[c];
        std::memset(from, 0, sizeof(T) * ld);
      }
      w.table_low[d] = call.table_nodes;
      w.table_high[d] = 0;
    }
  }
};

template <class V>
Kernels kernels_of() {
  return {
      [](const Call& c, Parallel p, int n) { Engine<V>(c, p, n, false).aggregate(); },
      [](const Call& c, Parallel p, int n) { Engine<V>(c, p, n, false).evaluate(); },
      [](const Call& c, Parallel p, int n) { Engine<V>(c, p, n, true).gradients(); },
  };
}

}  // namespace ngk
