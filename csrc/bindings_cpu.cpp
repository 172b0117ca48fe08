// Stable-ABI bindings: with their headers, the only kind of file that knows torch. What there is beside the ops: instruction sets, pages
// of files, sizes of workspaces. Arguments are checked in Python (ngkernels/ops); what is checked here protects memory.
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
  const bool pays = __builtin_cpu_is("amd"), low = compute & 1;  // above this bit stands the backend
  if (forced == "avx512_bf16" || (forced.empty() && low && pays && supports("avx512_bf16"))) {
    if (low) return isa_avx512_bf16();
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
  if (backward) {  // wanted: their places are not used
    c.grad_table = const_cast<void*>(c.table);
    c.grad_params = const_cast<void*>(c.params);
  }
  const Workspace w = p.kernels(compute).workspace(c, backward);
  return {w.shared, w.worker, w.call, w.items};
}

}  // namespace
}  // namespace ngk

STABLE_TORCH_LIBRARY(ngkernels_C, m) {
  m.def(
      "workspace(Tensor[] weights, Tensor[] xs, Tensor[] params, Tensor table, Tensor topology, int[] program, int compute, int[] shape, "
      "int rows, bool backward) -> int[]");
  m.def("map_pages(Tensor bytes, bool on) -> ()");
  m.def("drop_pages(Tensor bytes) -> ()");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ngkernels_C, CPU, m) {
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
