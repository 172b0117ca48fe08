// The one entrance to all kernels, by number.
#pragma once

#include "launch.h"
#include "second_stage.h"
#include "softmax.h"

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
    case 8:
      return launch_simple<Softmax>(l);
    case 9:
      return launch_simple<Delta>(l);
    case 10:
      return launch_simple<Store>(l);
    case 11:
      return launch_simple<MergeCells>(l);
    case 12:
      return launch_simple<Arrange>(l);
    default:
      break;
  }
  // PURPOSES of ngkernels/_cuda/launch.py: by purpose, width, precision, backward
  constexpr int (*wide[])(int, bool, const Launch&) = {launch_messages_16, launch_messages_32, launch_messages_64, launch_messages_128,
                                                       launch_options_16,  launch_options_32,  launch_options_64,  launch_options_128,
                                                       launch_attend_16,   launch_attend_32,   launch_attend_64,   launch_attend_128};
  const int number = kernel - 16;
  if (number < 0 || number >= 12 * 6) return UNKNOWN;
  return wide[number / 6](number / 2 % 3, number % 2, l);
}

}  // namespace ngk::cuda

#if defined(__CUDACC__)
// Whether the library has code for the current device: 0, or the number of an error.
extern "C" __attribute__((visibility("default"))) int ngk_cuda_runs() {
  cudaFuncAttributes found;
  const cudaError_t error = cudaFuncGetAttributes(&found, ngk::cuda::entry<ngk::cuda::Gather, ngk::cuda::Gather::Args, ngk::cuda::THREADS>);
  cudaGetLastError();  // else the next launch would return it
  return static_cast<int>(error);
}
#endif

// Launches a kernel; 0, or the number of an error. `args`: n numbers, which the kernel's plain struct of arguments consists of.
extern "C" __attribute__((visibility("default"))) int ngk_cuda_launch(int kernel, const int64_t* args, int64_t n, int64_t blocks,
                                                                      int64_t shared, void* stream) {
  return ngk::cuda::launch_by_number(kernel, {args, n, blocks, shared, stream});
}
