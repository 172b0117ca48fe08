// The one entrance to all kernels, by number.
#pragma once

#include "launch.h"
#include "second_stage.h"

namespace ngk::cuda {

template <class K>
int launch_simple(const Launch& l) {
  return launch<K, typename K::Args, THREADS>(l);
}

inline int launch_by_number(int kernel, const Launch& l) {
  switch (kernel) {  // KERNELS of ngkernels/_cuda/launch.py
    case 0:
      return launch_simple<Gather>(l);
    case 1:
      return launch_simple<Project>(l);
    case 2:
      return launch_simple<NodeGradient>(l);
    case 3:
      return launch_simple<Fold>(l);
    case 4:
      return launch_simple<SumBlocks>(l);
    case 5:
      return launch_simple<Merge>(l);
    case 6:
      return launch_simple<Coefficients>(l);
    case 7:
      return launch_simple<SumCells>(l);
    default:
      break;
  }
  const int number = kernel - 16, precision = number / 2 % 3;  // aggregate: by width, precision, backward
  if (number < 0) return UNKNOWN;
  const bool backward = number % 2;
  switch (number / 6) {
    case 0:
      return launch_16(precision, backward, l);
    case 1:
      return launch_32(precision, backward, l);
    case 2:
      return launch_64(precision, backward, l);
    case 3:
      return launch_128(precision, backward, l);
    default:
      return UNKNOWN;
  }
}

}  // namespace ngk::cuda

// Launches a kernel; 0, or the number of an error. `args`: n numbers, which the kernel's plain struct of arguments consists of.
extern "C" __attribute__((visibility("default"))) int ngk_cuda_launch(int kernel, const int64_t* args, int64_t n, int64_t blocks,
                                                                      int64_t shared, void* stream) {
  return ngk::cuda::launch_by_number(kernel, {args, n, blocks, shared, stream});
}
