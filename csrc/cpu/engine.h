// What the ops share: the prepared parameters, the plan, the workers and their memory.
#pragma once

#include "attention.h"
#include "backprop.h"
#include "messages.h"

namespace ngk {

template <class V>
class Engine {
 public:
  using T = typename V::T;
  static constexpr int NODES = 48 * V::MR;  // of all nodes, that a worker projects at a time: whole blocks of rows

  Engine(const Call& c, Parallel parallel, int threads, bool backward) : Engine(c, backward, parallel, threads, false) {
    const int64_t n = static_cast<int64_t>(plan.items.size());
    workers.resize(static_cast<size_t>(threads < n ? threads : n > 0 ? n : 1));
    ready.assign(workers.size(), 0);
    if (c.combine != EMIT && c.combine != ATTEND) count = degrees(c);
    place_nodes();
    if (sparse) run_nodes(this, [](void* e, int w, const Item& item) { static_cast<Engine*>(e)->project(w, item); }, nullptr);
  }

  static Workspace workspace(const Call& c, bool backward) {
    Engine e(c, backward, nullptr, 1, true);
    const size_t terms = e.node_term_values() * sizeof(T) * (backward ? 4 : 2);
    Worker<V> w;
    Arena a;
    e.layout(a, w);
    const size_t rows = static_cast<size_t>(c.out_rows) * 2 * (c.combine == ATTEND ? c.heads * sizeof(T) : sizeof(int32_t));
    const size_t plan = e.plan.pieces.size() * sizeof(Piece) + e.plan.items.size() * sizeof(Item);
    return {static_cast<int64_t>(e.prepared.bytes), static_cast<int64_t>(a.used), static_cast<int64_t>(terms + rows + plan),
            static_cast<int64_t>(e.plan.items.size())};
  }

 protected:
  Engine(const Call& c, bool backward, Parallel parallel, int threads, bool measured)
      : call(c),
        prepared(c, backward, measured),
        plan(make_plan(c)),
        slots(c.mask),
        parallel(parallel),
        threads(threads),
        ldm(padded<V>(c.width)),
        backward(backward) {}

  const Call& call;
  Prepared<V> prepared;
  Plan plan;
  Slots slots;
  Parallel parallel;
  int threads, ldm;
  bool backward;
  std::vector<Worker<V>> workers;
  std::vector<char> ready;
  std::vector<int32_t> count;
  bool sparse = false;  // some blocks are
  Pages node_terms[4];  // of all nodes that they join

  // Values of one table of the node terms of all nodes that sparse blocks join.
  size_t node_term_values() {
    int64_t &first = prepared.low_node, &last = prepared.high_node;
    for (const Row& r : call.rows) {
      if (r.kind != SPARSE || !r.count) continue;
      const int64_t low = std::min(r.src, r.dst), high = (r.copies - 1) * r.node_stride + std::max(r.src + r.n_src, r.dst + r.n_dst);
      first = sparse ? std::min(first, low) : low;
      last = std::max(last, high);
      sparse = true;
    }
    if (!sparse) return 0;
    plan.max_rows = std::max(plan.max_rows, NODES);
    plan.max_cols = std::max(plan.max_cols, NODES);
    for (const Step<V>& s : prepared.steps) prepared.all_ld += s.node ? s.ld : 0;
    return (static_cast<size_t>(last - first) + V::MR) * prepared.all_ld;
  }

  // Where they live; their gradients start at 0.
  void place_nodes() {
    const size_t size = node_term_values();
    if (!size) return;
    T* tables[4] = {};  // as destinations, as sources, their gradients
    for (int k = 0; k < (backward ? 4 : 2); ++k) {
      node_terms[k] = Pages(size * sizeof(T));
      tables[k] = static_cast<T*>(node_terms[k].data());
      if (k >= 2) std::memset(tables[k], 0, size * sizeof(T));
    }
    prepared.all_s = tables[0];
    prepared.all_t = tables[1];
    int at = 0;
    for (Step<V>& s : prepared.steps) {
      if (!s.node) continue;
      T** parts[4] = {&s.all_s, &s.all_t, &s.all_grad_s, &s.all_grad_t};
      for (int k = 0; k < (backward ? 4 : 2); ++k) *parts[k] = tables[k] + at;
      at += s.ld;
    }
  }

  void project(int k, const Item& item) { NodeTerms<V>(prepared, worker(k)).all(item.first, item.last); }

  void layout(Arena& a, Worker<V>& w) {
    const size_t n = prepared.steps.size(), slack = 64;
    const size_t tile = static_cast<size_t>(prepared.tile_rows()), rows = row_blocks<V>(plan.max_rows), cols = row_blocks<V>(plan.max_cols),
                 s_rows = call.paired ? rows + cols : rows, t_rows = call.paired ? rows + cols : cols;
    for (auto* v : {&w.out, &w.own_s, &w.own_t, &w.grad_s, &w.grad_t, &w.grad_add, &w.common_add}) v->assign(n, nullptr);
    for (auto* v : {&w.s, &w.t}) v->assign(n, nullptr);
    w.node_ld.assign(n, 0);
    size_t rest = 0;
    for (size_t k = 0; k < n; ++k) {
      const Step<V>& s = prepared.steps[k];
      const Instr& in = call.instrs[k];
      w.out[k] = a.take<T>(tile * s.ld + slack);
      if (in.op == TABLE && rest < 2 * static_cast<size_t>(in.n_in) + slack) rest = 2 * in.n_in + slack;
      const auto waits = [&](size_t at) {  // the gradient of instruction `at` comes in two parts
        if (!backward || w.grad_add[at]) return;
        w.grad_add[at] = a.take<T>(tile * prepared.steps[at].ld + slack);
        w.common_add[at] = a.take<T>(static_cast<size_t>(prepared.max_ld) + slack);
      };
      if (in.op == ADD) waits(static_cast<size_t>(in.arg0));
      if (call.combine == ATTEND && static_cast<int>(k) == call.message_start - 1) waits(k);
      if (!s.node) continue;
      const size_t dx = call.x_width[in.x];
      if (rest < V::MR * dx + slack) rest = V::MR * dx + slack;
      w.own_s[k] = a.take<T>(s_rows * s.ld + slack);
      w.own_t[k] = a.take<T>(t_rows * s.ld + slack);
      if (!backward) continue;
      w.grad_s[k] = a.take<T>(s_rows * s.ld + slack);
      w.grad_t[k] = a.take<T>(t_rows * s.ld + slack);
    }
    w.rest = a.take<T>(rest);
    size_t pair = 0;
    for (size_t k = 1; k < n; ++k)
      if (call.instrs[k].op == LIN && call.instrs[k].arg1 >= 0)
        for (int ld : {prepared.steps[k].ld, prepared.steps[k - 1].ld})
          if (pair < static_cast<size_t>(ld)) pair = static_cast<size_t>(ld);
    w.pair = a.take<T>(tile * pair + slack);
    for (int** x : {&w.i, &w.j, &w.at_i, &w.at_j}) *x = a.take<int>(tile);
    for (int64_t*& x : w.number) x = a.take<int64_t>(tile);
    if (prepared.table_step >= 0) {
      w.cell = a.take<T>(tile + slack);
      w.hermite = a.take<T>(2 * TABLE_LINES * tile + slack);
      w.slope = a.take<T>(2 * TABLE_LINES * tile + slack);
    }
    if (call.combine == ATTEND) w.attention = a.take<T>(attention_memory());
    if (!backward) {
      if (call.combine == ATTEND) return;
      w.stats = a.take<T>(static_cast<size_t>(Stats<V>::PLANES) * plan.max_rows * ldm + slack);
      return;
    }
    if (call.combine != ATTEND) {
      w.message = a.take<T>(tile * ldm + slack);
      w.coefficients = a.take<T>(static_cast<size_t>(Coefficients<V>::PLANES) * plan.max_rows * ldm + slack);
    }
    w.common = a.take<T>(static_cast<size_t>(prepared.max_ld) + slack);
    for (T*& g : w.g) g = a.take<T>(tile * prepared.max_ld + slack);
    w.grad_x_i.assign(call.xs.size(), nullptr);
    w.grad_x_j.assign(call.xs.size(), nullptr);
    for (size_t x = 0; x < call.xs.size(); ++x) {
      w.grad_x_i[x] = a.take<T>(rows * padded<V>(call.x_width[x]));
      w.grad_x_j[x] = a.take<T>(cols * padded<V>(call.x_width[x]));
    }
    w.params = a.take<T>(prepared.grad_size);
    if (call.grad_params && prepared.rest_size) w.grad_rest = a.take<T>(prepared.rest_size);
    if (call.grad_table) {
      const size_t nodes = static_cast<size_t>(call.directions) * call.table_nodes;
      w.table = a.take<T>(nodes * TABLE_LINES * prepared.table_ld);
      w.touched = a.take<char>(nodes);
    }
    size_t raw = 0;
    for (const Piece& p : plan.pieces)
      if (p.row->shared && raw < static_cast<size_t>(p.edges())) raw = static_cast<size_t>(p.edges());
    for (int side = 0; side < (call.paired ? 2 : 1); ++side) w.raw_grad[side] = a.take<T>(raw * call.instrs[0].n_out);
  }

  Worker<V>& worker(int k) {
    Worker<V>& w = workers[static_cast<size_t>(k)];
    if (!ready[static_cast<size_t>(k)]) {
      Arena measure, arena;
      layout(measure, w);
      arena.base = static_cast<char*>(scratch(1, measure.used));
      layout(arena, w);
      clear_worker(w);
      ready[static_cast<size_t>(k)] = 1;
    }
    return w;
  }

  // Padding must not hold what an earlier call left (denormal numbers are slow), gradients of the table start at 0.
  void clear_worker(Worker<V>& w) {
    const size_t tile = static_cast<size_t>(prepared.tile_rows());
    for (size_t k = 0; k < prepared.steps.size(); ++k) std::memset(w.out[k], 0, sizeof(T) * tile * prepared.steps[k].ld);
    if (!backward) return;
    if (w.coefficients) std::memset(w.coefficients, 0, sizeof(T) * Coefficients<V>::PLANES * plan.max_rows * ldm);  // NaN * 0 would spread
    for (T* g : w.g) std::memset(g, 0, sizeof(T) * tile * prepared.max_ld);
    if (w.touched) std::memset(w.touched, 0, static_cast<size_t>(call.directions * call.table_nodes));
  }

  int edge_register() const {  // the last one, where messages have no register of their own
    return call.combine == PLAIN || call.combine == EMIT || call.combine == ATTEND ? static_cast<int>(prepared.steps.size()) - 1
                                                                                   : call.message_start - 1;
  }
  int message_register() const { return call.combine == PLAIN || call.combine == EMIT ? -1 : static_cast<int>(prepared.steps.size()) - 1; }

  Registers<V> registers(const Worker<V>& w) const {
    const int e = edge_register(), q = message_register();
    return {w.out[e], q < 0 ? nullptr : w.out[q], prepared.steps[e].ld, q < 0 ? 0 : prepared.steps[q].ld, call.width};
  }
  size_t value_index(const Side& side) const { return side.emit_offset >= 0 ? 0 : static_cast<size_t>(side.block); }

  Attention<V> attention() const {  // of pairs, where the op is attend
    return Attention<V>(call, call.combine == ATTEND ? prepared.steps[static_cast<size_t>(call.message_start - 1)].ld : 0);
  }
  size_t attention_memory() const { return attention().memory(plan.max_rows + plan.max_cols, prepared.tile_rows(), backward); }

  // Runs process (and commit) over the nodes that sparse blocks join.
  void run_nodes(void* op, void (*process)(void*, int, const Item&), void (*commit)(void*, int, const Item&)) {
    Plan chunks;
    for (int64_t n = prepared.low_node; n < prepared.high_node; n += NODES)
      chunks.items.push_back({n, std::min(prepared.high_node, n + NODES), true});
    ready.assign(ready.size(), 0);  // threads take workers, and their memory with them, in any order
    run_items(chunks, parallel, static_cast<int>(workers.size()), op, process, commit);
    ready.assign(ready.size(), 0);
  }

  // Runs process (and commit) of an op derived from this class over the plan.
  template <class Op, void (Op::*process)(int, const Item&), void (Op::*commit)(int, const Item&)>
  void run(Op* op) {
    run_items(
        plan, parallel, threads, op, [](void* e, int w, const Item& item) { (static_cast<Op*>(e)->*process)(w, item); },
        [](void* e, int w, const Item& item) {
          (static_cast<Op*>(e)->*commit)(w, item);
          if (static_cast<Op*>(e)->call.mapped) static_cast<Op*>(e)->done(item);
        });
  }

  // Pages of files that nobody reads once an item and those before it are committed.
  void done(const Item& item) {
    for (int64_t at = item.first; at < item.last; ++at)
      for (const bool partner : {false, true}) {
        const Piece& piece = plan.pieces[static_cast<size_t>(at)];
        const Side side = side_of(*piece.row, partner);
        if (side.weight < 0) continue;
        done(call.weights[side.weight], piece, side);
        if (!call.grad_weights.empty()) done(call.grad_weights[side.weight], piece, side);
      }
  }

  // Whole rows of a matrix, since a piece in their middle leaves pages to the next. What is no such block (sparse, packed) waits for the
  // end of the call.
  static void done(const EdgeTensor& t, const Piece& piece, const Side& side) {
    const Row& row = *piece.row;
    if (!t.mapped || piece.at || side.offset >= 0) return;
    const View v = view(t, row, side, piece.copy, false);
    const int64_t size = dtype_size(t.dtype), channels = (t.channels - 1) * v.channel + 1;
    const auto rows = [&](int64_t first, int64_t last, int64_t stride, int64_t inner) {
      give_back(v.base + first * stride * size, v.base + ((last - 1) * stride + inner + channels) * size);
    };
    if (row.kind == DIAGONAL || (row.flags & SPARSE_RAW)) return rows(piece.j0, piece.j1, v.src, 0);
    if (v.dst < v.src) return rows(piece.j0, piece.j1, v.src, (row.n_dst - 1) * v.dst);
    if (piece.j1 == row.n_src) rows(piece.i0, piece.i1, v.dst, (row.n_src - 1) * v.src);
  }
};

}  // namespace ngk
