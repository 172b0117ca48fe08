// All kernels for an emulated GPU: a library of its own, for tests.
#include "instances.h"
#include "launcher.h"

namespace ngk::cuda {
int launch_messages_16(int precision, bool backward, const Launch& l) { return launch_messages<16>(precision, backward, l); }
int launch_messages_32(int precision, bool backward, const Launch& l) { return launch_messages<32>(precision, backward, l); }
int launch_messages_64(int precision, bool backward, const Launch& l) { return launch_messages<64>(precision, backward, l); }
int launch_messages_128(int precision, bool backward, const Launch& l) { return launch_messages<128>(precision, backward, l); }
int launch_options_16(int precision, bool backward, const Launch& l) { return launch_options<16>(precision, backward, l); }
int launch_options_32(int precision, bool backward, const Launch& l) { return launch_options<32>(precision, backward, l); }
int launch_options_64(int precision, bool backward, const Launch& l) { return launch_options<64>(precision, backward, l); }
int launch_options_128(int precision, bool backward, const Launch& l) { return launch_options<128>(precision, backward, l); }
int launch_attend_16(int precision, bool backward, const Launch& l) { return launch_attend<16>(precision, backward, l); }
int launch_attend_32(int precision, bool backward, const Launch& l) { return launch_attend<32>(precision, backward, l); }
int launch_attend_64(int precision, bool backward, const Launch& l) { return launch_attend<64>(precision, backward, l); }
int launch_attend_128(int precision, bool backward, const Launch& l) { return launch_attend<128>(precision, backward, l); }
}  // namespace ngk::cuda

extern "C" __attribute__((visibility("default"))) void ngk_cuda_order(int order) {
  ngk::cuda::machine().backwards = order & 1;
  ngk::cuda::machine().ahead = order & 2;
}
