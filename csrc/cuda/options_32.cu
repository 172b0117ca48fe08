// Expressions with layer norms, tokens or reverse partners, registers of up to 32 columns.
#include "instances.h"

namespace ngk::cuda {
int launch_options_32(int precision, bool backward, const Launch& l) { return launch_options<32>(precision, backward, l); }
}  // namespace ngk::cuda
