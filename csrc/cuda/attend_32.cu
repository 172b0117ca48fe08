// Attention, registers of up to 32 columns.
#include "instances.h"

namespace ngk::cuda {
int launch_attend_32(int precision, bool backward, const Launch& l) { return launch_attend<32>(precision, backward, l); }
}  // namespace ngk::cuda
