// Plain-data description of an edge expression, its blocks and the tensors around it. No torch, no ISA.
// The numbers are those of ngkernels/program.py and ngkernels/graph.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fold_call.h"
#include "node_call.h"

namespace ngk {

enum Op : int { LOAD, FOURIER, TABLE, LIN, ACT, ADD, MARK, NORM, MASK };
enum Combine : int { PLAIN, FILM, GATE, PRODUCT, EMIT, ATTEND };
enum Activation : int { SILU, RELU, GELU, TANH, SIGMOID, LEAKY_RELU, IDENTITY };
enum Reduce : int { SUM = 1, MEAN = 2, MIN = 4, MAX = 8, STD = 16, VAR = 32 };
enum Kind : int { DENSE, DIAGONAL, TRIANGLE, SPARSE };
enum Flag : int { FORWARD = 1, PARTNER = 2, TOKEN = 4, SAME = 8, SPARSE_RAW = 16 };
enum Dtype : int { F32, BF16, F16, F64 };

constexpr double STD_THRESHOLD = 1e-5;  // a variance up to here counts as 0, with gradient 0
constexpr int TABLE_LINES = 3;          // of a grid node: value, slope and curvature, in units of the step
constexpr double LEAKY_SLOPE = 0.01;

// One step on the register of an edge. n_in == 0: the register starts at the node term (message register).
struct Instr {
  int op, n_in, n_out;
  int64_t w, b;    // offsets into params: matrix [n_out, n_in], bias [n_out]; -1: none
  int x;           // node term: index into xs, -1: none
  int64_t wd, ws;  // [n_out, d_x] each
  int64_t arg0, arg1;
  // LOAD arg0: offset of (scale, shift) pairs by weight tensor, -1: none. TABLE arg0: log2 of steps a unit,
  // arg1: offset of the frequencies, w: matrix [n_out, 2 n_in], for weights beyond the table and made when there are some; -1: there are
  // none. LIN arg0: elements from one direction's matrix to the next (0: one matrix). ACT arg0: activation. ADD arg0: the instruction whose
  // result is added. LIN arg1: offset of the matrix that the partners' registers are multiplied with, -1: none. NORM w, b: scale and shift
  // [n_out]; arg0: eps, the bits of a double.
};

// One block of the graph, or a pair of opposite blocks: ngkernels/topology.py COLUMNS, in its order. The partner of an
// edge (j -> i) is (i -> j).
struct Row {
  int64_t kind, weight, variant, src, n_src, dst, n_dst, copies, node_stride, out, out_stride, src_axis, shared, offset, edge_stride, block,
      emit_offset, emit_stride, part, partner, partner_variant, partner_axis, partner_offset, partner_block, partner_emit_offset,
      partner_out, flags, lists, count;
  int64_t edges() const {
    return kind == DIAGONAL ? n_src : kind == TRIANGLE ? n_src * (n_src + 1) / 2 : kind == SPARSE ? count : n_src * n_dst;
  }
};
constexpr int ROW_COLUMNS = sizeof(Row) / sizeof(int64_t);

// The lists of a sparse row, ngkernels/edge_index.py make_lists: a head, a directory of the pieces, nodes and entries.
constexpr int LISTS_HEAD = 2, LISTS_DIRECTORY = 6, LOCAL_BITS = 12, NUMBER_BITS = 39;
struct Entry {
  int i, j;        // positions of its nodes in the piece
  int64_t number;  // of the edge
};
inline Entry entry_of(int64_t e) {
  constexpr int64_t local = (int64_t(1) << LOCAL_BITS) - 1;
  return {static_cast<int>(e >> (LOCAL_BITS + NUMBER_BITS) & local), static_cast<int>(e >> NUMBER_BITS & local),
          e & ((int64_t(1) << NUMBER_BITS) - 1)};
}

// A tensor of edge values seen from one block: element (copy, d0, d1, channel) or (copy, n, channel).
struct EdgeTensor {
  void* data = nullptr;  // null: not there, or no gradient wanted
  Dtype dtype = F32;
  int64_t stride[4] = {0, 0, 0, 0};  // copy, d0, d1, channel (diagonal, sparse: d1 unused); packed: edge in d1
  int channels = 0;
  int64_t extent = 0;   // bytes from the first value to behind the last
  bool mapped = false;  // lies in a file (cpu/mapped.h)
};

struct Call {
  int directions = 1, combine = 0, width = 0, mask = 0, message_start = 0, tie_bytes = 2;
  bool paired = false;  // edges are evaluated together with their partners
  std::vector<Instr> instrs;
  std::vector<Row> rows;
  const int64_t* topology = nullptr;              // where lists begin
  std::vector<EdgeTensor> weights, grad_weights;  // by weight tensor
  std::vector<EdgeTensor> values;                 // by block: what evaluate writes, or reads as gradient
  std::vector<EdgeTensor> grad_carriers;          // by block
  std::vector<const void*> xs;
  std::vector<void*> grad_xs;
  std::vector<int> x_width;
  int64_t nodes = 0, n_params = 0, out_rows = 0, table_nodes = 0;
  const void *params = nullptr, *table = nullptr;
  FoldCall* fold = nullptr;                // that made params
  void (*fold_late)(FoldCall&) = nullptr;  // makes what is late in it
  void *grad_params = nullptr, *grad_table = nullptr;
  void *out = nullptr, *aux = nullptr, *ties = nullptr;  // aggregate: [rows, K, F], [rows, 0..1, F], [rows, 0..2, F]
  const void* grad_out = nullptr;
  // attend: heads, columns of q and k and of v; q, k [nodes, d], v [nodes, d_v]; out [rows, d_v], sums [rows, heads, De], lse [rows, heads]
  int heads = 0, d = 0, d_v = 0, d_e = 0;
  bool multiply = false, summed = false;  // values times the edge's share; sums of edge states wanted
  double scale = 1, dropout = 0;
  int64_t seed = 0;
  const void *q = nullptr, *k = nullptr, *v = nullptr, *grad_sums = nullptr;
  void *grad_q = nullptr, *grad_k = nullptr, *grad_v = nullptr, *sums = nullptr, *lse = nullptr;
  bool mapped = false;                            // any of weights
  bool need_weights = false, need_nodes = false;  // any of grad_weights, any of grad_xs
};

// Runs body(ctx, begin, end) over [0, n) on the caller's threads.
using Parallel = void (*)(int64_t n, void* ctx, void (*body)(void* ctx, int64_t begin, int64_t end));

// Bytes that a call takes beside its tensors: once, and for each worker. Kept by the threads for later calls, but for `call`.
struct Workspace {
  int64_t shared, worker, call, items;  // items: at most so many workers
};

struct Kernels {
  void (*aggregate)(const Call&, Parallel, int threads);
  void (*evaluate)(const Call&, Parallel, int threads);
  void (*attend)(const Call&, Parallel, int threads);
  void (*backward)(const Call&, Parallel, int threads);  // of any, by Call::combine
  void (*node_map)(const NodeCall&, Parallel, int threads);
  void (*node_gradients)(const NodeCall&, Parallel, int threads);
  Workspace (*workspace)(const Call&, bool backward);  // reads no tensor's values
};

struct Isa {
  const char* name;
  Kernels f32, f64;
  void (*fold)(const FoldCall&);  // the parameters of the others
  void (*fold_late)(FoldCall&);
  void (*fold_gradients)(const FoldCall&);
};

// Files in memory: ranges of addresses whose pages kernels give back once they are done with them. What was in a page stays in its
// file, and the next reader gets it from there.
void map_range(const void* begin, int64_t bytes, bool on);
bool is_mapped(const void* p);
void give_back(const char* begin, const char* end);  // the pages that hold any of it

const Isa& isa_scalar();
#if defined(__x86_64__)
const Isa& isa_avx2();
const Isa& isa_avx512();
const Isa& isa_avx512_bf16();
#endif

}  // namespace ngk
