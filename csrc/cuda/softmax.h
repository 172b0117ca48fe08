// What happens before and after the tiles of attend: a thread for each number.
#pragma once

#include "lane.h"
#include "second_stage.h"

namespace ngk::cuda {

// Merges the partial softmax sums (attend.h) of every output row, in the order of the panels: out [rows, heads dv], sums [rows, heads, de]
// (de 0: none) and lse [rows, heads]; or, of hubs, some of a row at a time to other partial sums, `merged`.
struct Softmax {
  static constexpr bool TOGETHER = false;
  struct Args {
    float *out, *sums, *lse, *merged;
    const float* partial;
    const int64_t *keys, *starts;
    const int32_t* order;
    int64_t n, heads, dv, de;
  };
  static NGK_DEVICE void run(const Args& g) {
    const int64_t values = g.heads * g.dv, states = g.heads * g.de, width = values + states + g.heads;  // of a result
    const int64_t k = own_index();
    if (k >= g.n * width) return;
    const int64_t s = k / width, c = k % width, of_row = 2 * g.heads + values + states;
    const int64_t h = c < values ? c / g.dv : c < values + states ? (c - values) / g.de : c - values - states;
    float top = -INFINITY, total = 0, x = 0;
    for (int64_t e = g.starts[s]; e < g.starts[s + 1]; ++e) {
      const float here = g.partial[g.order[e] * of_row + h];
      top = here > top ? here : top;
    }
    const float base = top == -INFINITY ? 0.0f : top;
    for (int64_t e = g.starts[s]; e < g.starts[s + 1]; ++e) {
      const float *p = g.partial + g.order[e] * of_row, scale = expf(p[h] - base);
      total = fmaf(p[g.heads + h], scale, total);
      if (c < values + states) x = fmaf(p[2 * g.heads + c], scale, x);
    }
    if (g.merged) {
      float* to = g.merged + g.keys[s] * of_row;
      if (c < values + states) {
        to[2 * g.heads + c] = x;
      } else {
        to[h] = top;
        to[g.heads + h] = total;
      }
      return;
    }
    const bool empty = total == 0;
    if (c < values) {
      g.out[g.keys[s] * values + c] = empty ? 0.0f : x / total;
    } else if (c < values + states) {
      g.sums[g.keys[s] * states + c - values] = empty ? 0.0f : x / total;
    } else {
      g.lse[g.keys[s] * g.heads + h] = empty ? 0.0f : base + logf(total);
    }
  }
};

// What every logit's gradient loses to the softmax's sum: delta [rows, heads] = <out, grad> + <sums, grad_sums>, head by head. Summed in
// the order in which the tiles sum the same products (attend_back.h): a row that reads one neuron alone has gradients of exactly 0.
struct Delta {
  static constexpr bool TOGETHER = false;
  struct Args {
    float* delta;
    const float *out, *grad, *sums, *grad_sums;
    int64_t n, dv, de;
  };
  static NGK_DEVICE void run(const Args& g) {
    const int64_t k = own_index();
    if (k >= g.n) return;
    float values = 0, states[4] = {0, 0, 0, 0};
    for (int64_t z = k * g.dv; z < (k + 1) * g.dv; ++z) values += g.grad[z] * g.out[z];
    for (int64_t z = 0; z < g.de; ++z) {
      float* lane = states + z % 8 / 2;  // that holds this column of a fragment
      *lane = fmaf(g.grad_sums[k * g.de + z], g.sums[k * g.de + z], *lane);
    }
    g.delta[k] = values + ((states[0] + states[1]) + (states[2] + states[3]));
  }
};

}  // namespace ngk::cuda
