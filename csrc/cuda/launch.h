// Launches: the same call for a device and for an emulated one.
#pragma once

#include <cstdint>
#include <cstring>

#include "lane.h"
#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace ngk::cuda {

// What every launcher takes: the kernel's arguments, as 64-bit numbers; blocks, bytes of shared memory, a stream.
struct Launch {
  const int64_t* args;
  int64_t n_args, blocks, shared;
  void* stream;
};
constexpr int UNKNOWN = -1, MALFORMED = -2;  // else an error code of CUDA, 0: launched

#if defined(__CUDACC__)
// One block of a multiprocessor may have all its registers: left to itself, nvcc makes room for three or four blocks, and spills.
template <class K, class Args, int SIZE>
__global__ void __launch_bounds__(SIZE, 1) entry(const __grid_constant__ Args args) {
  K::run(args);
}
#endif

template <class K, class Args, int SIZE>
int launch(const Launch& l) {
  Args args;
  if (l.n_args * static_cast<int64_t>(sizeof(int64_t)) != static_cast<int64_t>(sizeof(Args))) return MALFORMED;
  std::memcpy(static_cast<void*>(&args), l.args, sizeof(Args));
  if (l.blocks <= 0) return 0;
#if defined(__CUDACC__)
  const auto kernel = entry<K, Args, SIZE>;
  if (l.shared > 48 * 1024) {  // as much as there is, whatever this launch needs: other threads launch the same kernel
    int device = 0, most = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) {
      cudaGetLastError();  // else the next launch would return it
      return static_cast<int>(error);
    }
  }
  kernel<<<static_cast<unsigned>(l.blocks), SIZE, static_cast<size_t>(l.shared), static_cast<cudaStream_t>(l.stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
#else
  const std::function<void()> body = [&args] { K::run(args); };
  for (int64_t b = 0; b < l.blocks; ++b) {
    if (K::TOGETHER) {
      run_block(b, SIZE, l.shared, body);
    } else {
      for (int t = 0; t < SIZE; ++t) machine().block = b, machine().thread = t, body();
    }
  }
  return 0;
#endif
}

int launch_messages_16(int precision, bool backward, const Launch& l);
int launch_messages_32(int precision, bool backward, const Launch& l);
int launch_messages_64(int precision, bool backward, const Launch& l);
int launch_messages_128(int precision, bool backward, const Launch& l);
int launch_options_16(int precision, bool backward, const Launch& l);
int launch_options_32(int precision, bool backward, const Launch& l);
int launch_options_64(int precision, bool backward, const Launch& l);
int launch_options_128(int precision, bool backward, const Launch& l);
int launch_attend_16(int precision, bool backward, const Launch& l);
int launch_attend_32(int precision, bool backward, const Launch& l);
int launch_attend_64(int precision, bool backward, const Launch& l);
int launch_attend_128(int precision, bool backward, const Launch& l);

}  // namespace ngk::cuda
