// evaluate, forward: the register of every edge, written out.
#pragma once

#include "engine.h"

namespace ngk {

template <class V>
class Evaluate : Engine<V> {
 public:
  using T = typename V::T;
  using Engine<V>::call;
  using Engine<V>::prepared;
  using Engine<V>::plan;

  Evaluate(const Call& c, Parallel parallel, int threads) : Engine<V>(c, parallel, threads, false) {}

  void operator()() {
    run_items(
        plan, this->parallel, this->threads, this, [](void* e, int w, const Item& item) { static_cast<Evaluate*>(e)->write(w, item); },
        nullptr);
  }

 private:
  void write(int k, const Item& item) {
    Worker<V>& w = this->worker(k);
    Evaluator<V> eval(prepared, w);
    const int e = this->edge_register(), ld = prepared.steps[e].ld;
    for (int64_t at = item.first; at < item.last; ++at) {
      const Piece& piece = plan.pieces[at];
      const Row& row = *piece.row;
      eval.template tiles<false>(piece, [&](const Tile<V>& t) {
        t.spans(e, [&](int first, int) {
          const Side side = side_of(row, first > 0);
          scatter<V>(t, view(call.values[this->value_index(side)], row, side, piece.copy, true), call.width,
                     w.out[e] + static_cast<int64_t>(first) * ld, ld);
        });
      });
    }
  }
};

}  // namespace ngk
