// aggregate, forward: statistics of each piece's messages, merged by destination in the order of the items.
#pragma once

#include "engine.h"

namespace ngk {

template <class V>
class Aggregate : Engine<V> {
 public:
  using T = typename V::T;
  using Engine<V>::call;
  using Engine<V>::prepared;
  using Engine<V>::plan;
  using Engine<V>::slots;
  using Engine<V>::count;
  using Engine<V>::ldm;

  Aggregate(const Call& c, Parallel parallel, int threads) : Engine<V>(c, parallel, threads, false), seen(count.size(), 0) {}

  void operator()() {
    const int64_t K = slots.count, F = call.width;
    std::memset(call.out, 0, sizeof(T) * call.out_rows * K * F);
    if (slots.mean_aux) std::memset(call.aux, 0, sizeof(T) * call.out_rows * F);
    if (slots.ties) std::memset(call.ties, 0, static_cast<size_t>(call.tie_bytes) * call.out_rows * slots.ties * F);
    this->template run<Aggregate, &Aggregate::reduce, &Aggregate::commit_reduced>(this);
    finish();
  }

 private:
  friend class Engine<V>;
  std::vector<int32_t> seen;  // messages merged so far, by row

  void reduce(int k, const Item& item) {
    Worker<V>& w = this->worker(k);
    Evaluator<V> eval(prepared, w);
    for (int64_t at = item.first; at < item.last; ++at) {
      const Piece& piece = plan.pieces[at];
      Stats<V> stats(w.stats, piece.rows(), ldm);
      eval.template tiles<false>(piece, [&](const Tile<V>& t) {
        const Registers<V> g = this->registers(w);
        with_kind(call.combine, [&](auto tag) {
          t.destinations(
              [&](int i, int first, int last) { stats.template join<decltype(tag)::kind>(slots, i, t.opens(first), g, first, last); });
        });
      });
      if (item.exclusive) merge(piece, stats);
    }
  }

  void commit_reduced(int k, const Item& item) {
    if (item.exclusive) return;
    const Piece& piece = plan.pieces[item.first];
    merge(piece, Stats<V>(this->workers[static_cast<size_t>(k)].stats, piece.rows(), ldm));
  }

  // The rows' statistics, by those of one piece.
  void merge(const Piece& piece, const Stats<V>& s) {
    const int64_t F = call.width, K = slots.count;
    int64_t entry = 0;
    for (int i = 0; i < piece.rows(); ++i) {
      const int64_t row = piece.row->out + piece.copy * piece.row->out_stride + piece.destination(i), at = static_cast<int64_t>(i) * s.ld;
      int messages = piece.row->kind == DIAGONAL ? 1 : piece.cols();
      if (piece.at)
        for (messages = 0; entry < piece.edges() && entry_of(piece.entries()[entry]).i == i; ++entry) ++messages;
      const T na = static_cast<T>(seen[row]), nb = static_cast<T>(messages);
      T* out = static_cast<T*>(call.out) + row * K * F;
      T* mean = slots.mean >= 0 ? out + slots.mean * F : slots.mean_aux ? static_cast<T*>(call.aux) + row * F : nullptr;
      if (slots.spread()) {
        T* spread = out + (slots.std >= 0 ? slots.std : slots.var) * F;
        for (int64_t c = 0; c < F; ++c) {
          T more, about;
          centred(s.shift[at + c], s.s1[at + c], s.s2[at + c], nb, &more, &about);
          merge_spread(mean + c, spread + c, na, more, about, nb);
          if (slots.sum >= 0) out[slots.sum * F + c] += s.s1[at + c] + nb * s.shift[at + c];
        }
      } else {
        for (int64_t c = 0; mean && c < F; ++c) mean[c] += s.s1[at + c];
        for (int64_t c = 0; slots.sum >= 0 && c < F; ++c) out[slots.sum * F + c] += s.s1[at + c];
      }
      if (slots.min >= 0) merge_extreme<false>(na, out + slots.min * F, row, slots.min_tie, s.lo + at, s.lo_ties + at, s.s1 + at);
      if (slots.max >= 0) merge_extreme<true>(na, out + slots.max * F, row, slots.max_tie, s.hi + at, s.hi_ties + at, s.s1 + at);
      seen[row] += messages;
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
      double extreme = na == 0 ? value[c] : best[c], count = na == 0 ? 0 : n[c];  // counts are exact in double
      join_extreme<Scalar<double>, MAXIMUM>(value[c], ties[c], &extreme, &count);
      n[c] = static_cast<Count>(count);
      best[c] = sum[c] != sum[c] ? sum[c] : static_cast<T>(extreme);  // a NaN among the messages stays
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
        if (slots.std >= 0) out[slots.std * F + c] = deviation(var);
      }
    }
  }
};

}  // namespace ngk
