// The engine compiled for one instruction set. Standard headers come before the target pragma, so that nothing
// shared with other files is compiled with these instructions.
#include "schedule.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "kernels.h"

namespace ngk {
const Isa& isa_avx2() {
  static const Isa isa{"avx2", kernels_of<Avx2F>(), kernels_of<Avx2D>(), fold<Avx2D>, fold_late<Avx2D>, fold_gradients<Avx2D>};
  return isa;
}
}  // namespace ngk
#pragma GCC pop_options
#endif
