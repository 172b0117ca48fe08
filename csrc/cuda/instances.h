// The kernels that are built: of each purpose and width of registers, three ways of rounding x forward and backward.
#pragma once

#include "aggregate.h"
#include "aggregate_back.h"
#include "attend.h"
#include "attend_back.h"
#include "launch.h"

namespace ngk::cuda {

template <class Forward, class Backward>
int launch_way(bool backward, const Launch& l) {
  return backward ? launch<Backward, Args, WARPS * LANES>(l) : launch<Forward, Args, WARPS * LANES>(l);
}
// PRECISIONS of ngkernels/_cuda/launch.py
template <template <class, int> class Forward, template <class, int> class Backward, int D>
int launch_rounded(int precision, bool backward, const Launch& l) {
  switch (precision) {
    case 0:
      return launch_way<Forward<Bf16, D>, Backward<Bf16, D>>(backward, l);
    case 1:
      return launch_way<Forward<Tf32<false>, D>, Backward<Tf32<false>, D>>(backward, l);
    case 2:
      return launch_way<Forward<Tf32<true>, D>, Backward<Tf32<true>, D>>(backward, l);
    default:
      return UNKNOWN;
  }
}
template <class P, int D>
struct MessagesForward : AggregateForward<P, D, false> {};
template <class P, int D>
struct MessagesBackward : AggregateBackward<P, D, false> {};
template <class P, int D>
struct OptionsForward : AggregateForward<P, D, true> {};
template <class P, int D>
struct OptionsBackward : AggregateBackward<P, D, true> {};

// Messages and values of plain expressions; with layer norms, tokens and reverse partners; attention.
template <int D>
int launch_messages(int precision, bool backward, const Launch& l) {
  return launch_rounded<MessagesForward, MessagesBackward, D>(precision, backward, l);
}
template <int D>
int launch_options(int precision, bool backward, const Launch& l) {
  return launch_rounded<OptionsForward, OptionsBackward, D>(precision, backward, l);
}
template <int D>
int launch_attend(int precision, bool backward, const Launch& l) {
  return launch_rounded<AttendForward, AttendBackward, D>(precision, backward, l);
}

}  // namespace ngk::cuda
