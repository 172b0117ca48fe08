// Registers of up to 64 columns.
#include "instances.h"

namespace ngk::cuda {
int launch_messages_64(int precision, bool backward, const Launch& l) { return launch_messages<64>(precision, backward, l); }
}  // namespace ngk::cuda
