// The way of a warp through the tiles of its panel in a backward pass: the warps of a block go in step, strip by strip of 16 sources.
#pragma once

#include "memory.h"

namespace ngk::cuda {

struct Walk {
  const Panel* panel;
  bool lines;  // each of them is a strip of its own
  int own, height, most = 0;

  static NGK_DEVICE int tiles(const Panel& p) { return static_cast<int>((p.i1 - p.i0) * ((p.j1 - p.j0 + 15) / 16)); }

  template <class Evaluator>
  NGK_DEVICE Walk(const Args& g, Evaluator& eval) {
    const int64_t first = g.first_panel + block() * WARPS, number = first + warp();
    NGK_ROLLED
    for (int w = 0; w < WARPS; ++w)
      if (first + w < g.n_panels && tiles(g.panels[first + w]) > most) most = tiles(g.panels[first + w]);
    panel = g.panels + (number < g.n_panels ? number : first);
    lines = g.blocks[panel->block].lines;
    own = number < g.n_panels ? tiles(*panel) : 0;
    height = lines ? 1 : static_cast<int>(panel->i1 - panel->i0);
    eval.begin(*panel, own > 0, true);
  }

  template <class Evaluator, class Back>
  NGK_DEVICE void enter(int at, Evaluator& eval, Back& back) const {
    back.panel = panel;
    back.active = at < own;
    back.number = at;
    back.strip = back.active ? at / height : 0;
    back.row = !back.active ? 0 : lines ? at : at % height;
    if (at % height == 0) back.clear_sources();
    eval.tile(*panel, panel->i0 + back.row, lines ? 0 : panel->j0 + back.strip * 16, back.active);
    back.clear_features();
  }
  template <class Back>
  NGK_DEVICE void leave(int at, Back& back) const {
    back.write_features();
    if (back.active && (at + 1) % height == 0) back.write_sources();
  }
};

}  // namespace ngk::cuda
