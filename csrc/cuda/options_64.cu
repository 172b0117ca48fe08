// Expressions with layer norms, tokens or reverse partners, registers of up to 64 columns.
#include "instances.h"

namespace ngk::cuda {
int launch_options_64(int precision, bool backward, const Launch& l) { return launch_options<64>(precision, backward, l); }
}  // namespace ngk::cuda
