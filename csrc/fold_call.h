// Plain-data description of products and sums of small matrices (ngkernels/fold.py holds the same numbers).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ngk {

enum FoldOp : int { LEAF, COPY, ADD_UP, MULTIPLY };
constexpr int FOLD_RECORD = 4;  // op, a, b, offset

// One matrix [rows, cols]: a leaf (a: which), or made of earlier matrices a and b; offset: where it stands in the result, -1: nowhere.
struct FoldNode {
  int op;
  int64_t a, b, offset, rows, cols;
  bool late = false;  // made when a kernel asks for it, if one does
  size_t size() const { return static_cast<size_t>(rows * cols); }
};

struct FoldLeaf {
  const void* data;
  int64_t row_stride, col_stride;
  void* grad = nullptr;  // contiguous; null: not wanted
};

struct FoldCall {
  bool f64 = false;  // whether leaves, result and gradients are double or float
  std::vector<FoldNode> nodes;
  std::vector<FoldLeaf> leaves;
  void* out = nullptr;         // the result
  const void* grad = nullptr;  // its gradient
  bool asked = false;          // for what is late
};

}  // namespace ngk
