// What happens before and after the edges: a thread for each number. Partial results are summed in the order of the panels.
#pragma once

#include "statistics.h"

namespace ngk::cuda {

constexpr int THREADS = 256;  // of a block, where threads work on their own
NGK_DEVICE int64_t own_index() { return block() * THREADS + thread(); }

// to[k] = values[k]: what changes from call to call and kernels read, such as addresses. Arguments, unlike memory that is copied, are part
// of a captured CUDA graph.
struct Store {
  static constexpr bool TOGETHER = false;
  struct Args {
    int64_t* to;
    int64_t n, values[254];
  };
  static NGK_DEVICE void run(const Args& s) {
    const int64_t k = own_index();
    if (k < s.n) s.to[k] = s.values[k];
  }
};

// out[k] = params[map[k]], 0 where map[k] is -1; with `bf16` rounded to it.
struct Gather {
  static constexpr bool TOGETHER = false;
  struct Args {
    const float* params;
    const int32_t* map;
    void* out;
    int64_t n, bf16;
  };
  static NGK_DEVICE void run(const Args& g) {
    const int64_t k = own_index();
    if (k >= g.n) return;
    const float x = g.map[k] >= 0 ? g.params[g.map[k]] : 0.0f;
    if (g.bf16) {
      static_cast<uint16_t*>(g.out)[k] = to_bf16(x);
    } else {
      static_cast<float*>(g.out)[k] = x;
    }
  }
};

// A term that nodes add to a stage: x [N, width] times matrices [n_out, width] at wd (destinations), ws (sources), bias at b (-1: none),
// from `column` on.
struct Term {
  int64_t x, width, n_out, wd, ws, b, column;
};

// out [2, N, columns]: the terms of all nodes as destinations (with biases), as sources, in lanes' order. weights [2, widest, columns]:
// their matrices, one below the other, so that neighbouring threads read neighbours.
struct Project {
  static constexpr bool TOGETHER = false;
  struct Args {
    float* out;
    const int64_t *xs, *owners;  // addresses of node states; term of each column, -1: padding
    const Term* terms;
    const float *weights, *params;
    int64_t nodes, columns, widest;
  };
  static NGK_DEVICE void run(const Args& g) {
    const int64_t k = own_index();
    if (k >= 2 * g.nodes * g.columns) return;
    const int64_t column = k % g.columns, node = k / g.columns % g.nodes, side = k / g.columns / g.nodes;
    float total = 0;
    if (g.owners[column] >= 0) {
      const Term& t = g.terms[g.owners[column]];
      const float *x = reinterpret_cast<const float*>(g.xs[t.x]) + node * t.width, *w = g.weights + side * g.widest * g.columns + column;
      if (!side && t.b >= 0) total = g.params[t.b + column - t.column];
      for (int64_t i = 0; i < t.width; ++i) total = fmaf(x[i], w[i * g.columns], total);
    }
    g.out[k - column + in_lanes_order(column)] = total;
  }
};

// to [rows, padded] in lanes' order: from [rows, width] and zeros.
struct Arrange {
  static constexpr bool TOGETHER = false;
  struct Args {
    float* to;
    const float* from;
    int64_t rows, width, padded;
  };
  static NGK_DEVICE void run(const Args& g) {
    const int64_t k = own_index(), row = k / g.padded, column = k % g.padded;
    if (row < g.rows) g.to[row * g.padded + in_lanes_order(column)] = column < g.width ? g.from[row * g.width + column] : 0.0f;
  }
};

// grad_x [N, width]: over all terms of one node state, their gradients in sums [2, N, columns] times their matrices.
struct NodeGradient {
  static constexpr bool TOGETHER = false;
  struct Args {
    float* grad_x;
    const float *sums, *params;
    const Term* terms;
    int64_t n_terms, nodes, columns, x, width;
  };
  static NGK_DEVICE void run(const Args& g) {
    const int64_t k = own_index();
    if (k >= g.nodes * g.width) return;
    const int64_t i = k % g.width, node = k / g.width;
    float total = 0;
    for (int64_t n = 0; n < g.n_terms; ++n) {
      const Term& t = g.terms[n];
      if (t.x != g.x) continue;
      for (int side = 0; side < 2; ++side) {
        const float *s = g.sums + (side * g.nodes + node) * g.columns + t.column, *w = g.params + (side ? t.ws : t.wd) + i;
        for (int64_t o = 0; o < t.n_out; ++o) total = fmaf(s[o], w[o * t.width], total);
      }
    }
    g.grad_x[k] = total;
  }
};

// sums [*, columns] += the partial rows of each key: entries starts[s] .. starts[s + 1] - 1 of `order` belong to row keys[s].
struct Fold {
  static constexpr bool TOGETHER = false;
  struct Args {
    float* sums;
    const float* partial;
    const int64_t *keys, *starts;
    const int32_t* order;
    int64_t n, columns;
  };
  static NGK_DEVICE void run(const Args& g) {
    const int64_t k = own_index();
    if (k >= g.n * g.columns) return;
    const int64_t s = k / g.columns, c = k % g.columns;
    float total = g.sums[g.keys[s] * g.columns + c];
    for (int64_t e = g.starts[s]; e < g.starts[s + 1]; ++e) total += g.partial[g.order[e] * g.columns + c];
    g.sums[g.keys[s] * g.columns + c] = total;
  }
};

// gradients[k] += the blocks' numbers at map[k], one block after the other; -1: none.
struct SumBlocks {
  static constexpr bool TOGETHER = false;
  struct Args {
    float* gradients;
    const float* partial;
    const int32_t* map;
    int64_t n, blocks, stride;
  };
  static NGK_DEVICE void run(const Args& g) {
    const int64_t k = own_index();
    if (k >= g.n || g.map[k] < 0) return;
    float total = g.gradients[k];
    for (int64_t b = 0; b < g.blocks; ++b) total += g.partial[b * g.stride + g.map[k]];
    g.gradients[k] = total;
  }
};

// Where the reductions of a message lie in out [rows, results, F], aux [rows, 0..1, F] and ties [rows, 0..2, F]; -1: not there.
struct Slots {
  int64_t sum, mean, low, high, std, var, mean_aux, low_ties, high_ties, results, ties;
  NGK_INLINE_MEMBER bool spread() const { return std >= 0 || var >= 0; }
};
NGK_DEVICE float read_ties(const void* ties, int64_t at, int64_t bytes) {
  const int64_t n = bytes == 2 ? static_cast<const uint16_t*>(ties)[at] : static_cast<const uint32_t*>(ties)[at];
  return static_cast<float>(n ? n : 1);
}

// Merges the partial statistics of every output row and writes its reductions; or, of hubs, those of some at a time to rows `merged`.
struct Merge {
  static constexpr bool TOGETHER = false;
  struct Args {
    float *out, *aux;
    void* ties;
    float* merged;
    const float* partial;
    const int64_t *keys, *starts;
    const int32_t* order;
    const int64_t* messages;  // messages: of each partial row
    int64_t n, width, padded, tie_bytes;
    Slots slots;
  };
  static NGK_DEVICE void run(const Args& g) {
    const int64_t k = own_index();
    if (k >= g.n * g.width) return;
    const int64_t s = k / g.width, c = k % g.width;
    float n = 0, first = 0, squares = 0, low = INFINITY, low_ties = 0, high = -INFINITY, high_ties = 0;
    for (int64_t e = g.starts[s]; e < g.starts[s + 1]; ++e) {
      const float *p = g.partial + int64_t{g.order[e]} * STATISTIC_PLANES * g.padded + c, more = static_cast<float>(g.messages[g.order[e]]);
      if (g.slots.spread()) {
        merge_spread(&first, &squares, n, p[0], p[g.padded], more);
      } else {
        first += p[0];
      }
      if (g.slots.low >= 0) join_extreme<Number, false>(p[2 * g.padded], p[3 * g.padded], &low, &low_ties);
      if (g.slots.high >= 0) join_extreme<Number, true>(p[4 * g.padded], p[5 * g.padded], &high, &high_ties);
      n += more;
    }
    if (!g.merged) return write(g, g.keys[s], c, n, first, squares, low, low_ties, high, high_ties);
    float* to = g.merged + g.keys[s] * STATISTIC_PLANES * g.padded + c;
    to[0] = first;
    if (g.slots.spread()) to[g.padded] = squares;
    if (g.slots.low >= 0) to[2 * g.padded] = low, to[3 * g.padded] = low_ties;
    if (g.slots.high >= 0) to[4 * g.padded] = high, to[5 * g.padded] = high_ties;
  }
  static NGK_DEVICE void write(const Args& g, int64_t row, int64_t c, float n, float first, float squares, float low, float low_ties,
                               float high, float high_ties) {
    const bool bad = first != first;  // a NaN among the messages stays one
    const float mean = g.slots.spread() ? first : first / n, var = squares / n;
    float* out = g.out + row * g.slots.results * g.width + c;
    if (g.slots.sum >= 0) out[g.slots.sum * g.width] = g.slots.spread() ? first * n : first;
    if (g.slots.mean >= 0) out[g.slots.mean * g.width] = mean;
    if (g.slots.mean_aux) g.aux[row * g.width + c] = mean;
    if (g.slots.var >= 0) out[g.slots.var * g.width] = var;
    if (g.slots.std >= 0) out[g.slots.std * g.width] = deviation(var);
    const int64_t at = row * g.slots.ties * g.width + c;
    if (g.slots.low >= 0) {
      out[g.slots.low * g.width] = bad ? first : low;
      write_ties(g, at + g.slots.low_ties * g.width, low_ties);
    }
    if (g.slots.high >= 0) {
      out[g.slots.high * g.width] = bad ? first : high;
      write_ties(g, at + g.slots.high_ties * g.width, high_ties);
    }
  }
  static NGK_DEVICE void write_ties(const Args& g, int64_t at, float n) {
    if (g.tie_bytes == 2) {
      static_cast<uint16_t*>(g.ties)[at] = static_cast<uint16_t>(n);
    } else {
      static_cast<uint32_t*>(g.ties)[at] = static_cast<uint32_t>(n);
    }
  }
};

// What turns a message of each output row into its gradient (message_math.h), [rows, MESSAGE_PLANES, padded] in lanes' order: constant,
// slope, mean, smallest, its share, largest, its share.
struct Coefficients {
  static constexpr bool TOGETHER = false;
  struct Args {
    float* to;
    const float *out, *aux;
    const void* ties;
    const float *grad, *degrees;
    int64_t rows, width, padded, tie_bytes;
    Slots slots;
  };
  static NGK_DEVICE void run(const Args& g) {
    const int64_t k = own_index();
    if (k >= g.rows * g.padded) return;
    const int64_t row = k / g.padded, c = k % g.padded;
    float* to = g.to + row * MESSAGE_PLANES * g.padded + in_lanes_order(c);
    for (int p = 0; p < MESSAGE_PLANES; ++p) to[p * g.padded] = 0;
    if (c >= g.width) return;
    const float *out = g.out + row * g.slots.results * g.width + c, *grad = g.grad + row * g.slots.results * g.width + c;
    slopes_of(g.slots, out, grad, g.width, 1.0f / g.degrees[row], to, to + g.padded);
    to[2 * g.padded] = g.slots.mean >= 0 ? out[g.slots.mean * g.width] : g.slots.mean_aux ? g.aux[row * g.width + c] : 0.0f;
    const int64_t at = row * g.slots.ties * g.width + c;
    if (g.slots.low >= 0) {
      to[3 * g.padded] = out[g.slots.low * g.width];
      to[4 * g.padded] = grad[g.slots.low * g.width] / read_ties(g.ties, at + g.slots.low_ties * g.width, g.tie_bytes);
    }
    if (g.slots.high >= 0) {
      to[5 * g.padded] = out[g.slots.high * g.width];
      to[6 * g.padded] = grad[g.slots.high * g.width] / read_ties(g.ties, at + g.slots.high_ties * g.width, g.tie_bytes);
    }
  }
};

// What edges add to the lines of their cell's two nodes, [2 TABLE_LINES, width]. Edges are sorted by cell and taken PIECE at a time,
// however many a cell has: what a piece has of the cell that it begins with, and ends with, is put down as `ends` [pieces, 2, ..], and
// merged later; the cells between, which it has whole, go to sums [cells, ..].
constexpr int PIECE = 256;
struct SumCells {
  static constexpr bool TOGETHER = false;
  struct Args {
    float *sums, *ends;
    const float *curves, *places;
    const int64_t* order;
    const int32_t* cells;  // of the sorted edges; -1: beyond the table
    int64_t n, width, table_nodes, steps;
  };
  static NGK_DEVICE void run(const Args& g) {
    const int64_t k = own_index(), piece = k / g.width, c = k % g.width, begin = piece * PIECE;
    if (begin >= g.n) return;
    const int64_t end = begin + PIECE < g.n ? begin + PIECE : g.n;
    float total[2 * TABLE_LINES] = {0, 0, 0, 0, 0, 0};
    int64_t first = begin;
    NGK_ROLLED
    for (int64_t e = begin; e < end; ++e) {
      float h[HERMITE];
      const int64_t edge = g.order[e], cell = g.cells[e];
      hermite_cells<Number>(g.places + edge, 1, static_cast<float>(int64_t(1) << g.steps), g.table_nodes / 2, h + 12, h, h + 6, 1);
      const float x = g.curves[edge * g.width + c];
      NGK_UNROLL
      for (int l = 0; l < 2 * TABLE_LINES; ++l) total[l] = cell < 0 ? 0.0f : fmaf(h[l], x, total[l]);
      if (e + 1 < end && g.cells[e + 1] == cell) continue;
      const bool whole = first > begin && e + 1 < end;
      float* to = whole ? g.sums + cell * 2 * TABLE_LINES * g.width : g.ends + (2 * piece + (first > begin)) * 2 * TABLE_LINES * g.width;
      NGK_UNROLL
      for (int l = 0; l < 2 * TABLE_LINES; ++l) to[l * g.width + c] = total[l], total[l] = 0;
      first = e + 1;
    }
  }
};
// sums [cells, 2 TABLE_LINES, width] of all cells, whose edges are starts[c] .. starts[c + 1] - 1 of the sorted ones.
struct MergeCells {
  static constexpr bool TOGETHER = false;
  struct Args {
    float* sums;
    const float* ends;
    const int64_t* starts;
    int64_t n, numbers, width;
  };
  static NGK_DEVICE void run(const Args& g) {
    const int64_t k = own_index(), of_cell = 2 * TABLE_LINES * g.width;
    if (k >= g.numbers) return;
    const int64_t begin = g.starts[k / of_cell], end = g.starts[k / of_cell + 1];
    float total = 0;
    for (int64_t piece = begin / PIECE; begin < end && piece <= (end - 1) / PIECE; ++piece) {
      const int64_t first = piece * PIECE, last = first + PIECE < g.n ? first + PIECE : g.n;
      const bool at_begin = begin <= first, at_end = end >= last;
      total += at_begin || at_end ? g.ends[(2 * piece + !at_begin) * of_cell + k % of_cell] : g.sums[k];
    }
    g.sums[k] = total;
  }
};

}  // namespace ngk::cuda
