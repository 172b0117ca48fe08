// Attention, registers of up to 64 columns.
#include "instances.h"

namespace ngk::cuda {
int launch_attend_64(int precision, bool backward, const Launch& l) { return launch_attend<64>(precision, backward, l); }
}  // namespace ngk::cuda
