// Stable-ABI bindings of the CPU kernels: with their headers, the only kind of file that knows torch. Checks and allocation of outputs
// are done in Python (ngkernels/ops); what is checked here protects memory.
#include "problem.h"

#include <optional>
#include <string>

namespace ngk {
namespace {

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
