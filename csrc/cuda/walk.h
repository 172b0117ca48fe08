// The way of a warp through the tiles of its panel in a backward pass: the warps of a block go in step, strip by strip of 16 sources.
#pragma once

#include "memory.h"

namespace ngk::cuda {

struct Walk {
  const Panel* panel;
  int own, height, most = 0;

  // Tiles of a strip: of listed edges, each is a strip of its own.
  static NGK_DEVICE int height_of(const Rows& rows, const Panel& p) {
    return rows.edges ? 1 : static_cast<int>((p.i1 - p.i0 + rows.step() - 1) / rows.step());
  }
  static NGK_DEVICE int tiles(const Args& g, const Panel& p) {
    const Rows& rows = g.blocks[p.block];
    return rows.edges ? static_cast<int>(p.i1 - p.i0) : height_of(rows, p) * static_cast<int>((p.j1 - p.j0 + 15) / 16);
  }

  template <class Evaluator>
  NGK_DEVICE Walk(const Args& g, Evaluator& eval) {
    const int64_t first = g.first_panel + block() * WARPS, number = first + warp();
    NGK_ROLLED
    for (int w = 0; w < WARPS; ++w)
      if (first + w < g.n_panels && tiles(g, g.panels[first + w]) > most) most = tiles(g, g.panels[first + w]);
    panel = g.panels + (number < g.n_panels ? number : first);
    own = number < g.n_panels ? tiles(g, *panel) : 0;
    height = height_of(g.blocks[panel->block], *panel);
    eval.begin(*panel, own > 0, true);
  }

  template <class Evaluator, class Back>
  NGK_DEVICE void enter(int at, Evaluator& eval, Back& back) const {
    back.panel = panel;
    back.active = at < own;
    back.number = at;
    back.strip = back.active ? at / height : 0;
    if (at % height == 0) back.clear_sources();
    const bool listed = eval.block->edges;
    const int64_t along = !back.active ? 0 : listed ? at : at % height * eval.block->step();
    eval.tile(*panel, panel->i0 + along, panel->j0 + (listed ? 0 : back.strip * 16), back.active);
    back.clear_features();
  }
  template <class Back>
  NGK_DEVICE void leave(int at, Back& back) const {
    back.write_features();
    if (back.active && (at + 1) % height == 0) back.write_sources();
  }
};

}  // namespace ngk::cuda
