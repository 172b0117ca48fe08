// Stable-ABI binding of the CUDA kernels. The library is the same with and without them, and loads under a torch of either kind: what may
// be missing is a weak symbol.
#include "bindings.h"

extern "C" {
__attribute__((weak)) int ngk_cuda_launch(int kernel, const int64_t* args, int64_t n, int64_t blocks, int64_t shared, void* stream);
__attribute__((weak)) int ngk_cuda_runs();
// of libtorch_cuda
__attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
__attribute__((weak)) int32_t aoti_torch_create_cuda_guard(int32_t device, void** guard);
__attribute__((weak)) int32_t aoti_torch_delete_cuda_guard(void* guard);
}

namespace ngk {
namespace {

bool cuda_built() { return ngk_cuda_launch != nullptr; }

class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    STD_TORCH_CHECK(aoti_torch_create_cuda_guard(device, &guard) == 0, "ngkernels: CUDA device ", device, " cannot be used");
  }
  ~DeviceGuard() { aoti_torch_delete_cuda_guard(guard); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void* guard = nullptr;
};

// 0: the library has code for the device, else an error of CUDA.
int64_t cuda_runs(int64_t device) {
  STD_TORCH_CHECK(ngk_cuda_runs && aoti_torch_create_cuda_guard && aoti_torch_delete_cuda_guard,
                  "ngkernels: expected a library built with nvcc and a torch with CUDA");
  const DeviceGuard guard(static_cast<int32_t>(device));
  return ngk_cuda_runs();
}

// args: the kernel's plain struct as 64-bit numbers; what they point to was checked and allocated in Python (ngkernels/_cuda/call.py).
void cuda_launch(int64_t kernel, Ints args, int64_t blocks, int64_t shared, int64_t device) {
  STD_TORCH_CHECK(ngk_cuda_launch && aoti_torch_get_current_cuda_stream && aoti_torch_create_cuda_guard && aoti_torch_delete_cuda_guard,
                  "ngkernels: expected a library built with nvcc and a torch with CUDA");
  STD_TORCH_CHECK(blocks > 0 && blocks <= INT32_MAX, "ngkernels: expected 1 to 2^31 - 1 blocks, got ", blocks);
  const DeviceGuard guard(static_cast<int32_t>(device));
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(static_cast<int32_t>(device), &stream) == 0, "ngkernels: no current CUDA stream");
  const int error = ngk_cuda_launch(static_cast<int>(kernel), args.data(), static_cast<int64_t>(args.size()), blocks, shared, stream);
  STD_TORCH_CHECK(error == 0, "ngkernels: kernel ", kernel, " could not be launched, CUDA error ", error);
}

}  // namespace
}  // namespace ngk

STABLE_TORCH_LIBRARY_FRAGMENT(ngkernels_C, m) {
  m.def("cuda_built() -> bool");
  m.def("cuda_runs(int device) -> int");
  m.def("cuda_launch(int kernel, int[] args, int blocks, int shared, int device) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ngkernels_C, CompositeExplicitAutograd, m) {
  m.impl("cuda_built", TORCH_BOX(&ngk::cuda_built));
  m.impl("cuda_runs", TORCH_BOX(&ngk::cuda_runs));
  m.impl("cuda_launch", TORCH_BOX(&ngk::cuda_launch));
}
