// Attention, registers of up to 128 columns.
#include "instances.h"

namespace ngk::cuda {
int launch_attend_128(int precision, bool backward, const Launch& l) { return launch_attend<128>(precision, backward, l); }
}  // namespace ngk::cuda
