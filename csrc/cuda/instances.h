// The kernels that are built: one width of registers (16, 32, 64, 128) x three ways of rounding x forward and backward.
#pragma once

#include "aggregate.h"
#include "aggregate_back.h"
#include "launch.h"

namespace ngk::cuda {

template <class P, int D>
int launch_aggregate(bool backward, const Launch& l) {
  return backward ? launch<AggregateBackward<P, D>, Args, WARPS * LANES>(l) : launch<AggregateForward<P, D>, Args, WARPS * LANES>(l);
}
template <int D>
int launch_aggregate(int precision, bool backward, const Launch& l) {
  switch (precision) {  // PRECISIONS of ngkernels/_cuda/launch.py
    case 0:
      return launch_aggregate<Bf16, D>(backward, l);
    case 1:
      return launch_aggregate<Tf32<false>, D>(backward, l);
    case 2:
      return launch_aggregate<Tf32<true>, D>(backward, l);
    default:
      return UNKNOWN;
  }
}

}  // namespace ngk::cuda
