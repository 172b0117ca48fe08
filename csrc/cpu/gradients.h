// The backward pass of both ops: every tile is evaluated again, its gradients go down the instructions.
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
  using Engine<V>::value_index;

  Gradients(const Call& c, Parallel parallel, int threads)
      : Engine<V>(c, parallel, threads, true), total_params(c.grad_params ? prepared.grad_size : 0, T(0)) {}

  void operator()() {
    for (size_t k = 0; k < call.grad_xs.size(); ++k)
      if (call.grad_xs[k]) std::memset(call.grad_xs[k], 0, sizeof(T) * call.nodes * call.x_width[k]);
    if (call.grad_table)
      std::memset(call.grad_table, 0,
                  sizeof(T) * call.directions * call.table_nodes * TABLE_LINES * call.instrs[prepared.table_step].n_out);
    this->template run<Gradients, &Gradients::differentiate, &Gradients::commit_gradients>(this);
    if (call.grad_params) prepared.write_grads(total_params.data());
  }

 private:
  friend class Engine<V>;
  std::vector<T> total_params;

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
    Worker<V>& w = this->worker(k);
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
    const int e = this->edge_register(), q = this->message_register(), n = static_cast<int>(prepared.steps.size());
    if (call.combine == EMIT) {
      const Row& row = *t.piece->row;
      gather<V>(t, view(call.values[value_index(*t.piece)], row, t.piece->copy, true, row.emit_offset, row.emit_stride), call.width, w.g[0],
                prepared.steps[e].ld);
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
        for (int c = 0; c < C; ++c)
          accumulate(p + c * v.channel * dtype_size(v.dtype), v.dtype, worker.raw_grad[(static_cast<int64_t>(i) * cols + j) * C + c]);
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
    Worker<V>& w = this->workers[static_cast<size_t>(k)];
    if (!item.exclusive) {
      const Piece& piece = plan.pieces[item.first];
      if (call.combine != EMIT || call.values[value_index(piece)].data) commit_piece(w, piece);
    }
    for (size_t c = 0; c < total_params.size(); ++c) total_params[c] += w.params[c];
    if (!w.table) return;
    const int ld = prepared.table_ld, n = call.instrs[prepared.table_step].n_out;
    for (int d = 0; d < call.directions; ++d) {
      const int64_t first = TABLE_LINES * (w.table_low[d] + d * call.table_nodes),
                    last = TABLE_LINES * (w.table_high[d] + d * call.table_nodes);
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

}  // namespace ngk
