// Expressions with layer norms, tokens or reverse partners, registers of up to 128 columns.
#include "instances.h"

namespace ngk::cuda {
int launch_options_128(int precision, bool backward, const Launch& l) { return launch_options<128>(precision, backward, l); }
}  // namespace ngk::cuda
