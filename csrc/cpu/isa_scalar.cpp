// The engine compiled for one instruction set. Standard headers come before the target pragma, so that nothing
// shared with other files is compiled with these instructions.
#include "schedule.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include "kernels.h"

namespace ngk {
const Isa& isa_scalar() {
  static const Isa isa{"scalar", kernels_of<Scalar<float>>(), kernels_of<Scalar<double>>(), fold<Scalar<double>>, fold_late<Scalar<double>>, fold_gradients<Scalar<double>>};
  return isa;
}
}  // namespace ngk
