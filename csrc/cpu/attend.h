// attend, forward: online softmax over each piece's pairs, merged by destination in the order of the items.
#pragma once

#include "engine.h"

namespace ngk {

template <class V>
class Attend : Engine<V> {
 public:
  using T = typename V::T;
  using Engine<V>::call;
  using Engine<V>::prepared;
  using Engine<V>::plan;
  using Engine<V>::attention;

  Attend(const Call& c, Parallel parallel, int threads)
      : Engine<V>(c, parallel, threads, false), totals(static_cast<size_t>(c.out_rows) * c.heads, T(0)) {}

  void operator()() {
    const int64_t rows = call.out_rows;
    std::memset(call.out, 0, sizeof(T) * rows * call.d_v);
    std::memset(call.lse, 0, sizeof(T) * rows * call.heads);
    if (call.summed) std::memset(call.sums, 0, sizeof(T) * rows * call.heads * call.d_e);
    this->template run<Attend, &Attend::attend, &Attend::commit_attended>(this);
    finish();
  }

 private:
  friend class Engine<V>;
  std::vector<T> totals;  // sums of exponentials, by row and head

  void attend(int k, const Item& item) {
    Worker<V>& w = this->worker(k);
    Evaluator<V> eval(prepared, w);
    const int last = static_cast<int>(prepared.steps.size()) - 1;
    for (int64_t at = item.first; at < item.last; ++at) {
      const Piece& piece = plan.pieces[at];
      Attention<V> a = attention();
      a.place(w.attention, piece, prepared.tile_rows(), false);
      a.begin_forward(piece);
      eval.template tiles<false>(
          piece, [&](const Tile<V>& t) { a.forward(t, w.out[call.message_start - 1], w.out[last], prepared.steps[last].ld); });
      if (item.exclusive) a.commit_forward(piece, totals.data());
    }
  }

  void commit_attended(int k, const Item& item) {
    if (item.exclusive) return;
    const Piece& piece = plan.pieces[item.first];
    Attention<V> a = attention();
    a.place(this->workers[static_cast<size_t>(k)].attention, piece, prepared.tile_rows(), false);
    a.commit_forward(piece, totals.data());
  }

  void finish() {
    const int H = call.heads, dv = call.d_v / H, de = call.d_e;
    for (int64_t row = 0; row < call.out_rows; ++row)
      for (int h = 0; h < H; ++h) {
        const T n = totals[static_cast<size_t>(row * H + h)];
        if (n == T(0)) continue;
        T *out = static_cast<T*>(call.out) + row * call.d_v + h * dv, *sums = static_cast<T*>(call.sums) + (row * H + h) * de;
        for (int z = 0; z < dv; ++z) out[z] /= n;
        for (int z = 0; call.summed && z < de; ++z) sums[z] /= n;
        static_cast<T*>(call.lse)[row * H + h] += std::log(n);
      }
  }
};

}  // namespace ngk
