// The arguments of an op as its kernels take them: checked where memory depends on it.
#pragma once

#include "bindings.h"

#include <algorithm>
#include <cstring>
#include <memory>

namespace ngk {

constexpr int HEADER = 11, RECORD = 10;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return F32;
    case ScalarType::Double:
      return F64;
    case ScalarType::BFloat16:
      return BF16;
    case ScalarType::Half:
      return F16;
    default:
      STD_TORCH_CHECK(false, "ngkernels: expected float32, float64, bfloat16 or float16 edge values");
      return F32;
  }
}

// (copies, d0, d1, C), (copies, n, C) or packed (E, C).
inline EdgeTensor edge_tensor(const Tensor& t, bool packed) {
  EdgeTensor e;
  if (t.numel() == 0) return e;
  e.data = const_cast<void*>(t.const_data_ptr());
  e.dtype = dtype_of(t);
  const int64_t dim = t.dim();
  STD_TORCH_CHECK(t.is_cpu() && (packed ? dim == 2 : dim == 3 || dim == 4), "ngkernels: expected CPU edge tensors of rank ",
                  packed ? "2" : "3 or 4", ", got rank ", dim);
  e.channels = static_cast<int>(t.size(dim - 1));
  e.mapped = is_mapped(e.data);
  e.extent = 1;
  for (int64_t k = 0; k < dim; ++k) e.extent += (t.size(k) - 1) * t.stride(k);
  e.extent *= e.dtype == F64 ? 8 : e.dtype == F32 ? 4 : 2;
  e.stride[3] = t.stride(dim - 1);
  if (packed) {
    e.stride[2] = t.stride(0);
  } else {
    e.stride[0] = t.stride(0);
    e.stride[1] = t.stride(1);
    if (dim == 4) e.stride[2] = t.stride(2);
  }
  return e;
}

struct Problem {
  Call call;
  FoldCall fold;
  std::unique_ptr<double[]> folded, grad_folded;  // the parameters and their gradient
  bool f64 = false, packed = false;
  Tensors xs;  // contiguous
  Tensor table;

  Problem(const Tensors& weights, const Tensors& node_states, const Tensors& params, const Tensor& values, const Tensor& topology,
          const Ints& program)
      : xs(in_order(node_states)), table(in_order(values)) {
    const ScalarType type = table.scalar_type();
    f64 = type == ScalarType::Double;
    STD_TORCH_CHECK(program.size() >= HEADER && program[8] == RECORD && program[1] >= 0 && program[7] >= 0 &&
                        program.size() >= static_cast<size_t>(HEADER + RECORD * program[1]),
                    "ngkernels: malformed program");
    const size_t recipe = static_cast<size_t>(HEADER + RECORD * program[1]);
    call.directions = static_cast<int>(program[0]);
    call.combine = static_cast<int>(program[2]);
    call.width = static_cast<int>(program[3]);
    call.mask = static_cast<int>(program[4]);
    call.message_start = static_cast<int>(program[5]);
    call.tie_bytes = static_cast<int>(program[9]);
    call.paired = program[10] != 0;
    for (size_t k = HEADER; k < recipe; k += RECORD) {
      const int64_t* r = program.data() + k;
      call.instrs.push_back({static_cast<int>(r[0]), static_cast<int>(r[1]), static_cast<int>(r[2]), r[3], r[4], static_cast<int>(r[5]),
                             r[6], r[7], r[8], r[9]});
    }
    STD_TORCH_CHECK(topology.dim() == 1 && topology.numel() >= 1 && topology.is_contiguous() && topology.scalar_type() == ScalarType::Long,
                    "ngkernels: malformed topology table");
    call.topology = static_cast<const int64_t*>(topology.const_data_ptr());
    const int64_t rows = call.topology[0];
    STD_TORCH_CHECK(rows >= 0 && rows <= (topology.numel() - 1) / ROW_COLUMNS, "ngkernels: malformed topology table");
    call.rows.resize(static_cast<size_t>(rows));
    if (rows) std::memcpy(static_cast<void*>(call.rows.data()), call.topology + 1, call.rows.size() * sizeof(Row));
    for (const Row& r : call.rows)
      if (r.kind == SPARSE) check_lists(r, topology.numel());
    packed = !call.rows.empty() && call.rows[0].emit_offset >= 0;
    for (const Tensor& w : weights) {
      call.weights.push_back(edge_tensor(w, packed));
      call.mapped |= call.weights.back().mapped;
    }
    for (const Tensor& x : xs) {
      call.xs.push_back(data(x, type, "x"));
      call.x_width.push_back(static_cast<int>(x.size(1)));
      call.nodes = x.size(0);
    }
    call.n_params = program[7];
    fold = fold_call(params, type, program.data() + recipe, program.size() - recipe, call.n_params);
    fold.out = room(folded);
    call.params = fold.out;
    for (const Instr& in : call.instrs)
      for (FoldNode& n : fold.nodes) n.late |= in.op == TABLE && in.w >= 0 && n.offset == in.w;
    isa_for(0).fold(fold);
    call.fold = &fold;
    call.fold_late = isa_for(0).fold_late;
    call.table = data(table, type, "table");
    if (call.table) call.table_nodes = table.size(1);
    check();
  }

  const Kernels& kernels(int64_t compute) const {
    const Isa& isa = isa_for(compute);
    return f64 ? isa.f64 : isa.f32;
  }

  // Memory for so many numbers as there are parameters.
  void* room(std::unique_ptr<double[]>& owner) const {
    const size_t bytes = static_cast<size_t>(call.n_params) * (f64 ? sizeof(double) : sizeof(float));
    owner.reset(new double[bytes / sizeof(double) + 1]);
    return owner.get();
  }

  // The outline of a sparse row's lists; what is in them was checked when the graph was built.
  void check_lists(const Row& row, int64_t size) const {
    const int64_t room = size - row.lists;
    bool fits = row.lists >= 0 && room >= LISTS_HEAD && row.count >= 0;
    const int64_t* lists = call.topology + row.lists;
    const int64_t pieces = fits ? lists[0] : 0, entries = fits && lists[1] ? 2 * row.count : row.count;
    fits = fits && pieces >= 0 && pieces <= (room - LISTS_HEAD) / LISTS_DIRECTORY;
    for (int64_t p = 0; fits && p < pieces; ++p) {
      const int64_t* at = lists + LISTS_HEAD + LISTS_DIRECTORY * p;
      for (int k = 0; k < LISTS_DIRECTORY; k += 2) fits = fits && at[k] >= 0 && at[k + 1] > 0 && at[k] + at[k + 1] <= room;
      fits = fits && at[4] + at[5] + entries - row.count <= room;
    }
    STD_TORCH_CHECK(fits, "ngkernels: malformed lists of a sparse block");
  }

  // What would let a kernel leave its memory.
  void check() const {
    for (const Row& r : call.rows) {
      const int64_t tensors = static_cast<int64_t>(call.weights.size());
      STD_TORCH_CHECK(r.weight >= -1 && r.weight < tensors && r.partner >= -1 && r.partner < tensors,
                      "ngkernels: a block names a weight tensor that is not there");
      const int64_t last = (r.copies - 1) * r.node_stride;
      STD_TORCH_CHECK(call.xs.empty() || (r.src + last + r.n_src <= call.nodes && r.dst + last + r.n_dst <= call.nodes),
                      "ngkernels: a block names nodes that x does not have");
    }
    for (size_t k = 0; k < call.instrs.size(); ++k) {
      const Instr& in = call.instrs[k];
      STD_TORCH_CHECK(in.x < static_cast<int>(call.xs.size()), "ngkernels: an instruction names a node state that is not there");
      STD_TORCH_CHECK(k == 0 ? in.op == LOAD : in.op != LOAD, "ngkernels: a program starts with one LOAD");
      for (int64_t offset : {in.w, in.b, in.wd, in.ws, in.op == LIN ? in.arg1 : 0})
        STD_TORCH_CHECK(offset < call.n_params || offset <= 0, "ngkernels: an instruction names parameters that are not there");
      if (in.op == TABLE) STD_TORCH_CHECK(call.table_nodes >= 3, "ngkernels: expected a table");
    }
  }

  void want(const Tensors& grads, const Tensors& weights) {
    const ScalarType type = f64 ? ScalarType::Double : ScalarType::Float;
    const size_t nw = weights.size(), nx = call.xs.size();
    for (size_t k = 0; k < nw; ++k) {
      call.grad_weights.push_back(edge_tensor(grads[k], packed));
      call.need_weights |= call.grad_weights.back().data != nullptr;
    }
    for (size_t k = 0; k < nx; ++k) {
      call.grad_xs.push_back(data(grads[nw + k], type, "grad x"));
      call.need_nodes |= call.grad_xs.back() != nullptr;
    }
    size_t rest = nw + nx;
    bool any = false;
    for (FoldLeaf& leaf : fold.leaves) {
      leaf.grad = data(grads[rest++], type, "gradient");
      any |= leaf.grad != nullptr;
    }
    if (any) fold.grad = call.grad_params = room(grad_folded);
    call.grad_table = data(grads[rest], type, "grad table");
    for (size_t k = rest + 1; k < grads.size(); ++k) call.grad_carriers.push_back(edge_tensor(grads[k], flat(grads[k])));
  }

  // In the end, the pages of files that are left.
  ~Problem() {
    for (const auto* tensors : {&call.weights, &call.grad_weights})
      for (const EdgeTensor& t : *tensors)
        if (t.mapped) give_back(static_cast<const char*>(t.data), static_cast<const char*>(t.data) + t.extent);
  }

  // Whether values by edge come as one tensor; a table without blocks does not say.
  bool flat(const Tensor& t) const { return call.rows.empty() ? t.dim() == 2 : packed; }

  // Edges of a row that have raw features, as its weight tensor counts them.
  static int64_t raw_edges(const Row& row) {
    return row.kind == TRIANGLE     ? (row.flags & SPARSE_RAW ? row.n_src : row.n_src * row.n_src)
           : row.flags & SPARSE_RAW ? std::min(row.n_src, row.n_dst)
                                    : row.edges();
  }
  bool last_pair() const {
    for (const Instr& in : call.instrs)
      if (in.op == LIN && in.arg1 >= 0) return true;
    return false;
  }

  // Gradients that blocks add to, or do not cover (a restricted packed graph, a skipped block), start at zero.
  void clear(const Tensors& grads) const {
    bool marked = false;  // gradients stop at a virtual checkpoint: none reach the weights
    for (const Instr& in : call.instrs) marked |= in.op == MARK;
    std::vector<int64_t> covered(call.weights.size(), 0), carried(call.grad_carriers.size(), 0);
    const bool attended = call.combine == ATTEND;
    for (const Row& row : call.rows) {
      const auto wanted = [&](int64_t block) { return call.combine != EMIT || (block >= 0 && call.values[packed ? 0 : block].data); };
      const bool both = call.paired && (row.flags & PARTNER);
      if (!wanted(row.block) && !(both && wanted(row.partner_block))) continue;
      const auto cover = [&](int64_t weight) {
        if (weight >= 0 && !row.shared && !marked) covered[static_cast<size_t>(weight)] += row.copies * raw_edges(row);
      };
      cover(row.weight);
      // in a table of pairs, a partner's own weights are written by this row, if it is evaluated
      if (row.partner != row.weight && (both || (attended && last_pair()))) cover(row.partner);
      if (carried.empty()) continue;
      carried[packed ? 0 : static_cast<size_t>(row.block)] += row.copies * row.edges();
      if (both && row.partner_block >= 0 && row.partner_block != row.block)
        carried[packed ? 0 : static_cast<size_t>(row.partner_block)] += row.copies * row.edges();
    }
    const auto zero = [&](const Tensor& g, const EdgeTensor& e, int64_t edges) {
      if (!e.data || edges * e.channels >= g.numel()) return;
      if (!e.mapped) return void(torch::stable::zero_(const_cast<Tensor&>(g)));
      char *p = static_cast<char*>(e.data), *last = p + e.extent;
      for (constexpr int64_t step = int64_t(1) << 22; p < last; p += step) {  // pages go back on the way
        const int64_t n = std::min<int64_t>(step, last - p);
        std::memset(p, 0, static_cast<size_t>(n));
        give_back(p, p + n);
      }
    };
    for (size_t k = 0; k < covered.size(); ++k) zero(grads[k], call.grad_weights[k], covered[k]);
    const size_t first = grads.size() - carried.size();
    for (size_t k = 0; k < carried.size(); ++k) zero(grads[first + k], call.grad_carriers[k], carried[k]);
  }
};

}  // namespace ngk
