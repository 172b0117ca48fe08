// Recipes of small matrices: from the integers and tensors of an op to plain data.
#include "bindings.h"

namespace ngk {
namespace {

// The size of a matrix from those of its operands, which are earlier ones; false where they do not fit.
bool size_up(FoldNode& n, const std::vector<FoldNode>& before) {
  const int64_t known = static_cast<int64_t>(before.size());
  if (n.a < 0 || n.a >= known || (n.op != COPY && (n.b < 0 || n.b >= known))) return false;
  const FoldNode &a = before[static_cast<size_t>(n.a)], &b = before[static_cast<size_t>(n.op == COPY ? n.a : n.b)];
  n.rows = a.rows;
  n.cols = b.cols;
  return n.op == MULTIPLY ? a.cols == b.rows : a.rows == b.rows && a.cols == b.cols;
}

}  // namespace

FoldCall fold_call(const Tensors& leaves, ScalarType type, const int64_t* recipe, size_t length, int64_t size) {
  FoldCall c;
  c.f64 = type == ScalarType::Double;
  STD_TORCH_CHECK(length % FOLD_RECORD == 0, "ngkernels: malformed recipe");
  c.nodes.reserve(length / FOLD_RECORD);
  for (const int64_t* r = recipe; r != recipe + length; r += FOLD_RECORD) {
    FoldNode n{static_cast<int>(r[0]), r[1], r[2], r[3], 0, 0};
    bool fits = r[0] >= LEAF && r[0] <= MULTIPLY && n.offset >= -1;
    if (fits && n.op == LEAF) {  // each once, in their order
      fits = n.a == static_cast<int64_t>(c.leaves.size()) && c.leaves.size() < leaves.size();
      if (fits) {
        const Tensor& t = leaves[c.leaves.size()];
        const bool matrix = t.dim() == 2;
        STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == type && (matrix || t.dim() == 1),
                        "ngkernels: expected parameters to be vectors and matrices on the CPU, of the compute dtype");
        n.rows = t.size(0);
        n.cols = matrix ? t.size(1) : 1;
        c.leaves.push_back({t.const_data_ptr(), t.stride(0), matrix ? t.stride(1) : 1});
      }
    } else if (fits) {
      fits = size_up(n, c.nodes);
    }
    STD_TORCH_CHECK(fits && (n.offset < 0 || n.offset + n.rows * n.cols <= size), "ngkernels: malformed recipe");
    c.nodes.push_back(n);
  }
  STD_TORCH_CHECK(c.leaves.size() == leaves.size(), "ngkernels: malformed recipe");
  return c;
}

}  // namespace ngk
