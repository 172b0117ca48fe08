// Expressions with layer norms, tokens or reverse partners, registers of up to 16 columns.
#include "instances.h"

namespace ngk::cuda {
int launch_options_16(int precision, bool backward, const Launch& l) { return launch_options<16>(precision, backward, l); }
}  // namespace ngk::cuda
