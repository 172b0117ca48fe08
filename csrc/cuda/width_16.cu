// Registers of up to 16 columns.
#include "instances.h"

namespace ngk::cuda {
int launch_messages_16(int precision, bool backward, const Launch& l) { return launch_messages<16>(precision, backward, l); }
}  // namespace ngk::cuda
