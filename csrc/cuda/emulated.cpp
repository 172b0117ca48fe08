// All kernels for an emulated GPU: a library of its own, for tests.
#include "instances.h"
#include "launcher.h"

namespace ngk::cuda {
int launch_16(int precision, bool backward, const Launch& l) { return launch_aggregate<16>(precision, backward, l); }
int launch_32(int precision, bool backward, const Launch& l) { return launch_aggregate<32>(precision, backward, l); }
int launch_64(int precision, bool backward, const Launch& l) { return launch_aggregate<64>(precision, backward, l); }
int launch_128(int precision, bool backward, const Launch& l) { return launch_aggregate<128>(precision, backward, l); }
}  // namespace ngk::cuda

extern "C" __attribute__((visibility("default"))) void ngk_cuda_backwards(int on) { ngk::cuda::machine().backwards = on != 0; }
