// The backward pass of every op: every tile is evaluated again, its gradients go down the instructions.
#pragma once

#include "engine.h"

namespace ngk {

template <class V>
class Gradients : Engine<V> {
 public:
  using T = typename V::T;
  using Engine<V>::call;
  using Engine<V>::prepared;
  using Engine<V>::plan;
  using Engine<V>::slots;
  using Engine<V>::count;
  using Engine<V>::ldm;
  using Engine<V>::attention, Engine<V>::value_index;

  Gradients(const Call& c, Parallel parallel, int threads)
      : Engine<V>(c, parallel, threads, true), total_params(c.grad_params ? prepared.grad_size : 0, T(0)) {}

  void operator()() {
    for (size_t k = 0; k < call.grad_xs.size(); ++k)
      if (call.grad_xs[k]) std::memset(call.grad_xs[k], 0, sizeof(T) * call.nodes * call.x_width[k]);
    if (call.grad_table)
      std::memset(call.grad_table, 0,
                  sizeof(T) * call.directions * call.table_nodes * TABLE_LINES * call.instrs[prepared.table_step].n_out);
    for (auto [grad, n] : {std::pair<void*, int>{call.grad_q, call.d}, {call.grad_k, call.d}, {call.grad_v, call.d_v}})
      if (grad) std::memset(grad, 0, sizeof(T) * call.nodes * n);
    this->template run<Gradients, &Gradients::differentiate, &Gradients::commit_gradients>(this);
    if (this->sparse && (call.grad_params || call.need_nodes))
      this->run_nodes(
          this, [](void* e, int w, const Item& item) { static_cast<Gradients*>(e)->all_node_gradients(w, item); },
          [](void* e, int w, const Item& item) { static_cast<Gradients*>(e)->commit_gradients(w, item); });
    if (!call.grad_params) return;
    prepared.join_pairs(total_params.data());
    prepared.write_grads(total_params.data());
    if (!total_rest.empty())
      std::memcpy(static_cast<T*>(call.grad_params) + call.instrs[prepared.table_step].w, total_rest.data(), sizeof(T) * total_rest.size());
  }

 private:
  friend class Engine<V>;
  std::vector<T> total_params, total_rest;

  void coefficients(Worker<V>& w, const Piece& piece) {
    const int64_t F = call.width, K = slots.count;
    Coefficients<V> to(w.coefficients, piece.rows(), ldm);
    for (int i = 0; i < piece.rows(); ++i) {
      const int64_t row = piece.row->out + piece.copy * piece.row->out_stride + piece.destination(i);
      const T *out = static_cast<const T*>(call.out) + row * K * F, *g = static_cast<const T*>(call.grad_out) + row * K * F;
      const T* mean = slots.mean >= 0 ? out + slots.mean * F : slots.mean_aux ? static_cast<const T*>(call.aux) + row * F : nullptr;
      const T inverse = T(1) / static_cast<T>(count[row] ? count[row] : 1);
      for (int64_t c = 0; c < F; ++c) {
        const int64_t at = static_cast<int64_t>(i) * ldm + c;
        slopes_of(slots, out + c, g + c, F, inverse, to.constant + at, to.slope + at);
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
    Worker<V>& w = this->worker(k);
    Evaluator<V> eval(prepared, w);
    Backprop<V> back(prepared, w);
    std::memset(w.params, 0, sizeof(T) * prepared.grad_size);
    w.beyond = false;
    for (int64_t at = item.first; at < item.last; ++at) {
      const Piece& piece = plan.pieces[at];
      if (!wanted(piece)) continue;
      clear_piece(w, piece);
      Attention<V> pairs = attention();
      if (call.combine == ATTEND) {
        pairs.place(w.attention, piece, prepared.tile_rows(), true);
        pairs.begin_backward(piece);
      } else if (call.combine != EMIT) {
        coefficients(w, piece);
      }
      eval.template tiles<true>(piece, [&](const Tile<V>& t) { tile_gradients(w, back, pairs, t); });
      back.finish(piece);
      NodeTerms<V>(prepared, w).gradients(piece);
      if (item.exclusive) commit_piece(w, piece);
    }
  }

  // Whether the gradient of anything that a piece computes is there.
  bool wanted(const Piece& piece) const {
    if (call.combine != EMIT) return true;
    const Row& row = *piece.row;
    return has_values(side_of(row, false)) || ((row.flags & PARTNER) && has_values(side_of(row, true)));
  }
  bool has_values(const Side& side) const { return call.values[value_index(side)].data != nullptr; }

  void tile_gradients(Worker<V>& w, Backprop<V>& back, Attention<V>& attention, const Tile<V>& t) {
    const int e = this->edge_register(), q = this->message_register(), n = static_cast<int>(prepared.steps.size());
    if (call.combine == ATTEND) {
      const int x = call.message_start - 1;
      attention.backward(t, w.out[x], w.out[n - 1], prepared.steps[n - 1].ld, w.g[0], w.grad_add[x]);
      back.run(t, 0, n, 0);
      return;
    }
    if (call.combine == EMIT) {
      t.spans(e, [&](int first, int) { emitted(w, t, e, first); });
      back.run(t, 0, n, 0);
      return;
    }
    const Registers<V> g = this->registers(w);
    const Coefficients<V> from(w.coefficients, t.piece->rows(), ldm);
    with_kind(call.combine, [&](auto tag) {
      t.destinations([&](int i, int first, int last) {
        from.template apply<decltype(tag)::kind>(slots, i, g, first, last, w.g[0], w.g[1], w.message);
      });
    });
    if (call.combine == FILM) Coefficients<V>::shifts(g, t.n, w.message, ldm, w.g[0]);
    if (q >= 0) back.run(t, call.message_start, n, 1);
    back.run(t, 0, e + 1, 0);
  }

  // The gradients of what was written out for edges (first 0) or partners.
  void emitted(Worker<V>& w, const Tile<V>& t, int e, int first) {
    const Row& row = *t.piece->row;
    const Side side = side_of(row, first > 0);
    const int ld = prepared.steps[e].ld;
    T* g = w.g[0] + static_cast<int64_t>(first) * ld;
    if (!has_values(side)) {
      std::memset(g, 0, sizeof(T) * t.n * ld);
      return;
    }
    gather<V>(t, view(call.values[value_index(side)], row, side, t.piece->copy, true), call.width, g, ld);
    for (int r = 0; first && r < t.n; ++r)  // a neuron's pair with itself was written once
      if (t.itself(r)) std::memset(g + static_cast<int64_t>(r) * ld, 0, sizeof(T) * ld);
  }

  void clear_piece(Worker<V>& w, const Piece& piece) {
    if (prepared.constant(*piece.row)) {
      std::memset(w.common, 0, sizeof(T) * prepared.max_ld);
      for (T* sum : w.common_add)
        if (sum) std::memset(sum, 0, sizeof(T) * prepared.max_ld);
    }
    const int all = row_blocks<V>(piece.rows() + piece.cols()), rows = row_blocks<V>(piece.rows()), cols = row_blocks<V>(piece.cols());
    for (size_t k = 0; k < prepared.steps.size(); ++k) {
      const Step<V>& s = prepared.steps[k];
      if (w.grad_add[k]) std::memset(w.grad_add[k], 0, sizeof(T) * prepared.tile_rows() * s.ld);
      if (!s.node) continue;
      std::memset(w.grad_s[k], 0, sizeof(T) * (call.paired ? all : rows) * s.ld);
      std::memset(w.grad_t[k], 0, sizeof(T) * (call.paired ? all : cols) * s.ld);
    }
    for (size_t x = 0; !piece.at && x < call.xs.size(); ++x) {
      const size_t ld = padded<V>(call.x_width[x]);
      std::memset(w.grad_x_i[x], 0, sizeof(T) * row_blocks<V>(piece.rows()) * ld);
      std::memset(w.grad_x_j[x], 0, sizeof(T) * row_blocks<V>(piece.cols()) * ld);
    }
  }

  // Adds what a piece holds for nodes and shared raw weights.
  void commit_piece(Worker<V>& w, const Piece& piece) {
    const Row& row = *piece.row;
    if (piece.at) NodeTerms<V>(prepared, w).commit_sparse(piece);
    for (size_t x = 0; !piece.at && x < call.xs.size(); ++x) {
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
    if (call.combine == ATTEND) {
      Attention<V> pairs = attention();
      pairs.place(w.attention, piece, prepared.tile_rows(), true);
      pairs.commit_backward(piece);
    }
    if (!row.shared || !call.need_weights) return;
    for (const bool partner : {false, true}) {
      const Side side = side_of(row, partner);
      const bool own = !partner || (call.paired && prepared.live(row) > 0 && !(row.flags & SAME));
      if (own && side.weight >= 0 && call.grad_weights[side.weight].data)
        add_shared(w.raw_grad[partner], piece, view(call.grad_weights[side.weight], row, side, piece.copy, false));
    }
  }

  void add_shared(const T* raw, const Piece& piece, const View& v) {
    const int C = call.instrs[0].n_out, cols = piece.row->kind == DIAGONAL ? 1 : piece.cols();
    const auto add = [&](int64_t at, const T* g) {
      for (int c = 0; c < C; ++c) {
        char* p = v.base + (at + c * v.channel) * dtype_size(v.dtype);
        write_value(p, v.dtype, read_value<T>(p, v.dtype) + g[c]);
      }
    };
    if (piece.at) {
      for (int64_t e = 0; e < piece.edges(); ++e)
        add((v.number ? piece.partners()[e] : entry_of(piece.entries()[e]).number) * v.src, raw + e * C);
      return;
    }
    for (int i = 0; i < piece.rows(); ++i)
      for (int j = 0; j < cols; ++j)
        add((piece.i0 + i) * v.dst + (piece.row->kind == DIAGONAL ? piece.i0 + i : piece.j0 + j) * v.src,
            raw + (static_cast<int64_t>(i) * cols + j) * C);
  }

  void all_node_gradients(int k, const Item& item) {
    Worker<V>& w = this->worker(k);
    std::memset(w.params, 0, sizeof(T) * prepared.grad_size);
    NodeTerms<V>(prepared, w).all_gradients(item);
  }

  void commit_gradients(int k, const Item& item) {
    Worker<V>& w = this->workers[static_cast<size_t>(k)];
    if (!item.exclusive) {
      const Piece& piece = plan.pieces[item.first];
      if (wanted(piece)) commit_piece(w, piece);
    }
    for (size_t c = 0; c < total_params.size(); ++c) total_params[c] += w.params[c];
    if (w.beyond) {
      total_rest.resize(prepared.rest_size, T(0));
      for (size_t c = 0; c < total_rest.size(); ++c) total_rest[c] += w.grad_rest[c];
      w.beyond = false;
    }
    if (!w.table) return;
    const int ld = prepared.table_ld, n = call.instrs[prepared.table_step].n_out;
    for (int64_t node = 0; node < call.directions * call.table_nodes; ++node) {
      if (!w.touched[node]) continue;
      w.touched[node] = 0;
      for (int64_t r = node * TABLE_LINES; r < (node + 1) * TABLE_LINES; ++r) {
        T *to = static_cast<T*>(call.grad_table) + r * n, *from = w.table + r * ld;
        for (int c = 0; c < n; ++c) to[c] += from[c];
      }
    }
  }
};

}  // namespace ngk
