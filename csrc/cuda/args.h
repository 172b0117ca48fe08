// What kernels are told, as plain data: made in Python (ngkernels/_cuda), where the same fields have the same order.
#pragma once

#include <cstdint>

namespace ngk::cuda {

enum Source : int { FROM_RAW, FROM_REGISTER, FROM_TABLE, FROM_NODES, FROM_COPY, FROM_FOURIER, FROM_NORM };

// One step on the register of an edge: v = source + start [+ what was kept], then an activation. Registers are D columns wide, or have
// parts of D columns (FiLM's scales and shifts; an edge's share of query, key and value), padded with zeros.
struct alignas(16) Stage {
  int source;
  int width, halves;  // columns in use of each part; parts
  int act;            // -1: none
  int slot;           // where v is kept, -1: nowhere
  int add;            // slot that is added, -1: none
  int node;           // first column of its node term, -1: none
  int bias;           // FROM_*: place of its bias among the constants, -1: none
  int weight;         // FROM_RAW: place of its matrices [directions, channels, halves D] among the constants, FROM_REGISTER: matrix
  int back;           // FROM_REGISTER: transposed matrix
  int gradient;       // FROM_REGISTER: place among the gradients of matrices
  int sums;           // first block of 16 columns among the column sums: of its bias, then (FROM_RAW) of each direction and channel
  int held;           // 1 + the later stage that adds v of this one, 0: none
  int mark;           // 1: gradients stop at its result, and go to a stored edge state
  // FROM_FOURIER, and FROM_TABLE for weights beyond the table (groups 0: there are none): place of [directions, count, channels] among the
  // constants; matrices of D features each.
  int frequencies, count, groups;
  // of kernels with all options:
  int masked;                                   // 1: its result is 0 for the edges of tokens
  int input, eps;                               // FROM_NORM: slot of what is normalised; the bits of a float
  int reverse, reverse_back, reverse_gradient;  // as weight, back, gradient, of what the partner's register is multiplied with; -1: nothing
  int padding;                                  // a stage is read by whole lines of 16 bytes
};
constexpr int STAGE_INTS = sizeof(Stage) / sizeof(int);

// A view of a block's edge values: element (i, j, channel) of a copy.
struct Values {
  int64_t data, dtype, copy, src, dst, channel;  // address; strides in elements
};
// A block of the graph, as tiles of 16 edges. Where every pair is an edge, a tile has 2^log_rows rows of each of its destinations: 16, or
// fewer where there are fewer sources; runs: the rows at which destinations begin. Else edges: address of (destination 2^32 + source,
// number, partner's number), by destination, 16 to a tile; runs: address of what a tile's runs are: bits of the rows that they begin at,
// bit 16: whether the last one ends there, from bit 32 on the first one's partial row in its panel. Edge values then go by number instead
// of source, raw ones by numbers[raw_by]. The partner of an edge is its reversal: its values go by the edge's own destination and source.
struct Rows {
  int64_t n_src, n_dst, src, dst, node_stride, out, out_stride;
  int64_t direction, affine, add;  // affine: place of its (scale, shift), -1: none
  int64_t edges, n_edges, runs, log_rows, raw_by;
  int64_t partner_direction, partner_affine, partner_raw_by;
  int64_t token, diagonal, same;          // diagonal: pairs of equal index alone have raw features; same: partners read the same numbers
  Values raw, gradient, values, carrier;  // data 0: not there, not wanted; values: what evaluate writes, or reads as gradient
  Values partner_raw, partner_gradient, partner_carrier;  // gradients of partners are added to what is there

  // Destinations, or numbers of tiles, that a tile has.
  NGK_INLINE_MEMBER int64_t step() const { return 16 >> log_rows; }
};
constexpr int ROWS_INTS = sizeof(Rows) / sizeof(int64_t);

// A rectangle of a block that one warp works through, or its tiles i0 .. i1 - 1 of listed edges.
struct Panel {
  int64_t block, copy, i0, i1, j0, j1;
  int64_t rows_i, rows_j;  // first partial row of its destinations, of its sources
  int64_t slot;            // first place of its edges among those that have gradients of a table
};
constexpr int PANEL_INTS = sizeof(Panel) / sizeof(int64_t);

// Where a kind of working memory lies: in shared memory from `offset` on, or, with a base, in global memory, `stride` bytes a block.
struct Place {
  char* base;
  int64_t offset, stride;
};

struct Args {
  const Stage* stages;
  const Rows* blocks;
  const Panel* panels;
  const void* matrices;  // packed for both ways
  // in lanes' order: vectors and raw matrices among the constants, node terms, the table [directions, nodes, TABLE_LINES, halves, padded];
  // backward, of each output row: MESSAGE_PLANES
  const float *constants, *nodes, *table, *coefficients;
  float* partial;  // forward: statistics; backward: sums by node
  float *parameters, *curves, *places;
  int32_t* cells;
  int64_t n_panels, first_panel, n_nodes, columns, table_nodes;  // columns: of all node terms
  int64_t edge_stages, message_stages, channels, combine, width, carrier_width, steps;
  int64_t matrices_copied, n_constants;  // elements of the matrices that are copied to shared memory; numbers
  int64_t spread, low, high;             // which statistics are wanted
  int64_t need_parameters, need_nodes, need_raw, need_table;
  int64_t n_slots, n_gradients, n_sums, message_buffer, free_buffers[2], inputs_buffer;
  // of kernels with all options: stages below `live` are evaluated for partners too; their staged rows
  int64_t live, partner_buffers[2], partner_inputs, sum_columns;  // sum_columns: of a partial row of the way back
  // attend: q, k [n_nodes, heads dk], v [n_nodes, heads dv] in lanes' order; of each output row lse, delta [heads], gradients [heads dv],
  // [heads de]
  const float *q, *k, *v, *lse, *delta, *grad_out, *grad_sums;
  int64_t heads, dk, dv, de, multiply, summed, attention_columns;  // attention_columns: where q's, or k's and v's, stand in a partial row
  int64_t dropped_below, seed, scale, keep;                        // scale, keep: the bits of a float
  // of each warp: raw features and the table's weights, those of tiles to come, kept registers, a register on its way to the next stage,
  // statistics, sums by source, column sums, a gradient that waits for the stage whose register was added or normalised, what attention
  // keeps of a tile; of the block: matrices, constants, staged rows, gradients
  Place features, arrivals, stash, carry, statistics, sources, sums, waiting, scores, copied, constants_copied, staged, gradients;
};
static_assert(sizeof(Args) % sizeof(int64_t) == 0, "an array of 64-bit numbers");

constexpr int WARPS = 4;             // of a block of threads
constexpr int WIDEST = 128;          // columns of a register; the rows that those stage need not lie in shared memory
constexpr int MESSAGE_PLANES = 7;    // constant, slope, mean, low, its share, high, its share
constexpr int STATISTIC_PLANES = 6;  // mean or sum, squares, low, its ties, high, its ties

}  // namespace ngk::cuda
