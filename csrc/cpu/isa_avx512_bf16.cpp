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
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "kernels.h"

namespace ngk {
const Isa& isa_avx512_bf16() {
  static const Isa isa{"avx512_bf16", kernels_of<Avx512BF16>(), kernels_of<Avx512D>(), fold<Avx512D>, fold_late<Avx512D>, fold_gradients<Avx512D>};
  return isa;
}
}  // namespace ngk
#pragma GCC pop_options
#endif
