// Plain-data description of the node side of PNA: z = act(norm(x W_x^T + sum over s of a_s (reduced W_s^T) + b)).
#pragma once

#include <cstdint>
#include <vector>

namespace ngk {

enum NodeNorm : int { NO_NORM, LAYER_NORM, GRAPH_NORM };  // over nothing, over each row, over the rows of each segment

// All tensors are contiguous and of the compute dtype. Null gradients are not wanted.
struct NodeCall {
  int64_t rows = 0;
  int F = 0, C = 0, O = 0;  // columns of x, of reduced, of the result
  int inner = 0;            // rows of matrix where lin follows it, else 0
  const void *x = nullptr, *reduced = nullptr;
  const void *matrix = nullptr, *bias = nullptr, *lin = nullptr, *lin_bias = nullptr;  // [inner, F + S C], [inner], [O, inner], [O]
  std::vector<const void*> factors;                                                    // S of them, [rows]; null: 1
  int norm = NO_NORM, act = 0;
  bool act_first = false;
  double eps = 0;
  const void *gamma = nullptr, *beta = nullptr;  // [O]
  std::vector<int64_t> bounds;                   // first row of each segment, then rows
  void *out = nullptr, *stats = nullptr;         // [rows, O]; mean and standard deviation of each segment [segments, 2]
  const void* grad = nullptr;
  void *grad_x = nullptr, *grad_reduced = nullptr, *grad_matrix = nullptr, *grad_bias = nullptr, *grad_lin = nullptr,
       *grad_lin_bias = nullptr, *grad_gamma = nullptr, *grad_beta = nullptr;
};

}  // namespace ngk
