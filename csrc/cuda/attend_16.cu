// Attention, registers of up to 16 columns.
#include "instances.h"

namespace ngk::cuda {
int launch_attend_16(int precision, bool backward, const Launch& l) { return launch_attend<16>(precision, backward, l); }
}  // namespace ngk::cuda
