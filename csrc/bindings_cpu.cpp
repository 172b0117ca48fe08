// Stable-ABI bindings of the CPU kernels: the only kind of file that knows torch. Checks and allocation of outputs
// are done in Python (ngkernels/ops); what is checked here protects memory.
#include "bindings.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>

namespace ngk {
namespace {

constexpr int HEADER = 11, RECORD = 10;

Dtype dtype_of(const Tensor& t) {
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
EdgeTensor edge_tensor(const Tensor& t, bool packed) {
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

  Problem(const Tensors& weights, const Tensors& xs, const Tensors& params, const Tensor& table, const Tensor& topology,
          const Ints& program) {
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
    isa_for(0).fold(fold);
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

std::string forced;

bool supports(const char* name) {
#if defined(__x86_64__)
  if (!std::strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(name, "avx512")) return wide;
  if (!std::strcmp(name, "avx512_bf16")) return wide && __builtin_cpu_supports("avx512bf16");
#endif
  return !std::strcmp(name, "scalar");
}

}  // namespace

// The bf16 dot product pays on AMD only: on Intel cores without AMX it runs at half the rate of float32 products (measured: 86 against
// 176 GFLOP/s a core).
const Isa& isa_for(int64_t compute) {
#if defined(__x86_64__)
  const bool pays = __builtin_cpu_is("amd");
  if (forced == "avx512_bf16" || (forced.empty() && compute == 1 && pays && supports("avx512_bf16"))) {
    if (compute == 1) return isa_avx512_bf16();
    return isa_avx512();
  }
  if (forced == "avx512" || (forced.empty() && supports("avx512"))) return isa_avx512();
  if (forced == "avx2" || (forced.empty() && supports("avx2"))) return isa_avx2();
#endif
  return isa_scalar();
}

namespace {

std::string isa() { return forced.empty() ? isa_for(0).name : forced; }

void map_pages(Tensor bytes, bool on) { map_range(bytes.const_data_ptr(), bytes.numel(), on); }
void drop_pages(Tensor bytes) {
  const char* p = static_cast<const char*>(bytes.const_data_ptr());
  give_back(p, p + bytes.numel());
}

// "" chooses again; anything else is used from now on.
void set_isa(std::string name) {
  STD_TORCH_CHECK(name.empty() || supports(name.c_str()), "ngkernels: this processor does not run ", name);
  forced = name;
}

}  // namespace

void parallel(int64_t n, void* ctx, void (*body)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(ctx, begin, end); });
}
int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

namespace {

// grads: of the weights, xs, params, table and carriers; an empty one is not wanted.
void differentiate(Problem& p, int64_t compute, const Tensors& grads, const Tensors& weights) {
  p.want(grads, weights);
  p.clear(grads);
  p.kernels(compute).backward(p.call, parallel, threads());
  if (p.fold.grad) isa_for(0).fold_gradients(p.fold);
}

void bind_reduced(Problem& p, const Tensor& out, const Tensor& aux, const Tensor& ties) {
  const ScalarType type = p.f64 ? ScalarType::Double : ScalarType::Float;
  p.call.out = data(out, type, "out");
  p.call.aux = data(aux, type, "aux");
  p.call.ties = ties.numel() ? const_cast<void*>(ties.const_data_ptr()) : nullptr;
  p.call.out_rows = out.size(0);
  for (const Row& r : p.call.rows)
    STD_TORCH_CHECK(r.out + (r.copies - 1) * r.out_stride + r.n_dst <= p.call.out_rows,
                    "ngkernels: a block names output rows that are not there");
}

void aggregate(Tensors weights, Tensors xs, Tensors params, Tensor table, Tensor topology, Ints program, int64_t compute, Tensor out,
               Tensor aux, Tensor ties) {
  Problem p(weights, xs, params, table, topology, program);
  bind_reduced(p, out, aux, ties);
  if (out.numel()) p.kernels(compute).aggregate(p.call, parallel, threads());
}

void aggregate_backward(Tensor grad, Tensor out, Tensor aux, Tensor ties, Tensors weights, Tensors xs, Tensors params, Tensor table,
                        Tensor topology, Ints program, int64_t compute, Tensors grads) {
  Problem p(weights, xs, params, table, topology, program);
  bind_reduced(p, out, aux, ties);
  p.call.grad_out = data(grad, p.f64 ? ScalarType::Double : ScalarType::Float, "grad");
  differentiate(p, compute, grads, weights);
}

void bind_values(Problem& p, const Tensors& values) {
  for (const Tensor& v : values) p.call.values.push_back(edge_tensor(v, p.flat(v)));
  int64_t last = -1;
  for (const Row& r : p.call.rows) last = std::max(last, std::max(r.block, r.partner_block));
  STD_TORCH_CHECK(p.packed ? values.size() == 1 : static_cast<int64_t>(values.size()) > last,
                  "ngkernels: expected one tensor of values for each block");
}

void evaluate(Tensors weights, Tensors xs, Tensors params, Tensor table, Tensor topology, Ints program, int64_t compute, Tensors out) {
  Problem p(weights, xs, params, table, topology, program);
  bind_values(p, out);
  p.kernels(compute).evaluate(p.call, parallel, threads());
}

void evaluate_backward(Tensors values, Tensors weights, Tensors xs, Tensors params, Tensor table, Tensor topology, Ints program,
                       int64_t compute, Tensors grads) {
  Problem p(weights, xs, params, table, topology, program);
  bind_values(p, values);
  differentiate(p, compute, grads, weights);
}

void bind_attention(Problem& p, const Tensor& q, const Tensor& k, const Tensor& v, const Ints& shape, double scale, double dropout,
                    int64_t seed, const Tensor& out, const Tensor& sums, const Tensor& lse) {
  const ScalarType type = p.f64 ? ScalarType::Double : ScalarType::Float;
  Call& c = p.call;
  STD_TORCH_CHECK(c.combine == ATTEND && c.paired && c.message_start >= 1 && shape.size() == 3 && shape[0] >= 1,
                  "ngkernels: malformed attention");
  c.heads = static_cast<int>(shape[0]);
  c.multiply = shape[1] != 0;
  c.summed = shape[2] != 0;
  c.d = static_cast<int>(q.size(1));
  c.d_v = static_cast<int>(v.size(1));
  c.d_e = c.instrs[static_cast<size_t>(c.message_start - 1)].n_out;
  c.scale = scale;
  c.dropout = dropout;
  c.seed = seed;
  c.nodes = q.size(0);
  c.q = data(q, type, "q");
  c.k = data(k, type, "k");
  c.v = data(v, type, "v");
  c.out = data(out, type, "out");
  c.sums = data(sums, type, "sums");
  c.lse = data(lse, type, "lse");
  c.out_rows = out.size(0);
  STD_TORCH_CHECK(k.size(0) == c.nodes && v.size(0) == c.nodes && k.size(1) == c.d && c.d % c.heads == 0 && c.d_v % c.heads == 0 &&
                      c.width == 2 * c.d + (c.multiply ? c.d_v : 0),
                  "ngkernels: q, k, v and the edges' shares do not fit");
  for (const Row& r : c.rows) {
    const int64_t last = (r.copies - 1) * r.out_stride, nodes = (r.copies - 1) * r.node_stride;
    STD_TORCH_CHECK(r.out + last + r.n_dst <= c.out_rows && (!(r.flags & PARTNER) || r.partner_out + last + r.n_src <= c.out_rows) &&
                        r.src + nodes + r.n_src <= c.nodes && r.dst + nodes + r.n_dst <= c.nodes,
                    "ngkernels: a block names rows that are not there");
  }
}

void attend(Tensors weights, Tensors xs, Tensors params, Tensor table, Tensor topology, Ints program, int64_t compute, Tensor q, Tensor k,
            Tensor v, Ints shape, double scale, double dropout, int64_t seed, Tensor out, Tensor sums, Tensor lse) {
  Problem p(weights, xs, params, table, topology, program);
  bind_attention(p, q, k, v, shape, scale, dropout, seed, out, sums, lse);
  p.kernels(compute).attend(p.call, parallel, threads());
}

void attend_backward(Tensor grad, Tensor grad_sums, Tensor out, Tensor sums, Tensor lse, Tensors weights, Tensors xs, Tensors params,
                     Tensor table, Tensor topology, Ints program, int64_t compute, Tensor q, Tensor k, Tensor v, Ints shape, double scale,
                     double dropout, int64_t seed, Tensors grads) {
  Problem p(weights, xs, params, table, topology, program);
  bind_attention(p, q, k, v, shape, scale, dropout, seed, out, sums, lse);
  const ScalarType type = p.f64 ? ScalarType::Double : ScalarType::Float;
  p.call.grad_out = data(grad, type, "grad");
  p.call.grad_sums = data(grad_sums, type, "grad sums");
  const size_t n = grads.size() - 3;
  p.call.grad_q = data(grads[n], type, "grad q");
  p.call.grad_k = data(grads[n + 1], type, "grad k");
  p.call.grad_v = data(grads[n + 2], type, "grad v");
  grads.resize(n);
  differentiate(p, compute, grads, weights);
}

// Bytes that a call takes beside its tensors: [shared, for each worker, of the call, most workers]. Tensors count by their shapes: only
// small matrices are read. shape: as of attend, then the columns of q and v; empty for the others.
Ints workspace(Tensors weights, Tensors xs, Tensors params, Tensor table, Tensor topology, Ints program, int64_t compute, Ints shape,
               int64_t rows, bool backward) {
  Problem p(weights, xs, params, table, topology, program);
  Call& c = p.call;
  c.out_rows = rows;
  if (c.combine == ATTEND) {
    STD_TORCH_CHECK(shape.size() == 5 && shape[0] >= 1 && c.message_start >= 1, "ngkernels: malformed attention");
    c.heads = static_cast<int>(shape[0]);
    c.summed = shape[2] != 0;
    c.d = static_cast<int>(shape[3]);
    c.d_v = static_cast<int>(shape[4]);
    c.d_e = c.instrs[static_cast<size_t>(c.message_start - 1)].n_out;
  }
  if (backward) c.grad_table = const_cast<void*>(c.table);  // wanted: its place is not used
  const Workspace w = p.kernels(compute).workspace(c, backward);
  return {w.shared, w.worker, w.call, w.items};
}

}  // namespace
}  // namespace ngk

#define NGK_EXPRESSION "Tensor[] weights, Tensor[] xs, Tensor[] params, Tensor table, Tensor topology, int[] program, int compute"

#define NGK_ATTENTION "Tensor q, Tensor k, Tensor v, int[] shape, float scale, float dropout, int seed"

STABLE_TORCH_LIBRARY(ngkernels_C, m) {
  m.def("aggregate(" NGK_EXPRESSION ", Tensor(a!) out, Tensor(b!) aux, Tensor(c!) ties) -> ()");
  m.def("aggregate_backward(Tensor grad, Tensor out, Tensor aux, Tensor ties, " NGK_EXPRESSION ", Tensor(a!)[] grads) -> ()");
  m.def("evaluate(" NGK_EXPRESSION ", Tensor(a!)[] out) -> ()");
  m.def("evaluate_backward(Tensor[] values, " NGK_EXPRESSION ", Tensor(a!)[] grads) -> ()");
  m.def("attend(" NGK_EXPRESSION ", " NGK_ATTENTION ", Tensor(a!) out, Tensor(b!) sums, Tensor(c!) lse) -> ()");
  m.def("attend_backward(Tensor grad, Tensor grad_sums, Tensor out, Tensor sums, Tensor lse, " NGK_EXPRESSION ", " NGK_ATTENTION
        ", Tensor(a!)[] grads) -> ()");
  m.def("workspace(" NGK_EXPRESSION ", int[] shape, int rows, bool backward) -> int[]");
  m.def("map_pages(Tensor bytes, bool on) -> ()");
  m.def("drop_pages(Tensor bytes) -> ()");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ngkernels_C, CPU, m) {
  m.impl("aggregate", TORCH_BOX(&ngk::aggregate));
  m.impl("aggregate_backward", TORCH_BOX(&ngk::aggregate_backward));
  m.impl("attend", TORCH_BOX(&ngk::attend));
  m.impl("attend_backward", TORCH_BOX(&ngk::attend_backward));
  m.impl("evaluate", TORCH_BOX(&ngk::evaluate));
  m.impl("evaluate_backward", TORCH_BOX(&ngk::evaluate_backward));
  m.impl("workspace", TORCH_BOX(&ngk::workspace));
  m.impl("map_pages", TORCH_BOX(&ngk::map_pages));
  m.impl("drop_pages", TORCH_BOX(&ngk::drop_pages));
}

STABLE_TORCH_LIBRARY_IMPL(ngkernels_C, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&ngk::isa));
  m.impl("set_isa", TORCH_BOX(&ngk::set_isa));
}

// `import ngkernels._C` runs the registrations above; the module itself is empty. These few declarations are CPython's
// stable ABI (3.10 on), written out so that building needs a compiler and torch, but no Python headers.
extern "C" {
struct NgkModuleDef {
  intptr_t refcount = 1;  // PyModuleDef_HEAD_INIT
  void *type = nullptr, *init = nullptr;
  intptr_t index = 0;
  void* copy = nullptr;
  const char *name = "_C", *doc = nullptr;
  intptr_t size = -1;
  void *methods = nullptr, *slots = nullptr, *traverse = nullptr, *clear = nullptr, *free = nullptr;
};
void* PyModule_Create2(NgkModuleDef*, int);
__attribute__((visibility("default"))) void* PyInit__C(void) {
  static NgkModuleDef def;
  return PyModule_Create2(&def, 3);  // 3: PYTHON_ABI_VERSION of the stable ABI
}
}
