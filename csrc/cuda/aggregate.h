// Forward: each warp reduces the messages of a panel, tile by tile, to partial rows of statistics, one of each destination; or it writes
// out what the last stage computes for every edge.
#pragma once

#include "statistics.h"

namespace ngk::cuda {

template <class P, int D, bool FULL>
struct AggregateForward {
  static constexpr bool TOGETHER = true;  // threads work together

  static NGK_DEVICE void run(const Args& g) {
    Evaluator<P, D, FULL> eval(g);
    const int64_t number = g.first_panel + block() * WARPS + warp();
    if (number >= g.n_panels) return;
    const Panel& panel = g.panels[number];
    eval.begin(panel, true, false);
    const int fragments = eval.message_fragments();
    float* memory = placed_of_warp<float>(g.statistics, static_cast<int64_t>(STATISTIC_PLANES + 1) * fragments * LANES * 4);
    float seen = 0, after = 0;  // messages of this lane's rows to the destination that goes on: before this tile, after it
    NGK_ROLLED
    for (int64_t i = panel.i0; i < panel.i1; i += eval.block->step()) {
      NGK_ROLLED
      for (int64_t j = panel.j0; j < panel.j1; j += 16) {
        eval.tile(panel, i, j, true);
        const auto edge = eval.run(0, static_cast<int>(g.edge_stages) - 1);
        const auto query = eval.run(static_cast<int>(g.edge_stages), static_cast<int>(g.edge_stages + g.message_stages) - 1);
        NGK_ROLLED
        for (int c = 0; c < fragments; ++c) {
          typename Evaluator<P, D, FULL>::Message m;
          eval.message(c, edge, query, &m);
          if (g.combine == EMIT) {
            eval.write_values(eval.block->values, panel, c, g.width, m.m, false);
            continue;
          }
          eval.by_destination([&](const Run& run) {
            const bool ok[2] = {eval.ok[0] && run.has(lane() / 4), eval.ok[1] && run.has(lane() / 4 + 8)};
            Statistics stats{g, memory, fragments, run.begins ? 0 : seen};
            if (ok[0] || ok[1]) stats.add(c, m.m, ok);
            after = stats.seen;
            if (run.ends) stats.write(c, g.partial + (panel.rows_i + run.row) * STATISTIC_PLANES * 16 * fragments);
          });
        }
        seen = after;
      }
    }
  }
};

}  // namespace ngk::cuda
