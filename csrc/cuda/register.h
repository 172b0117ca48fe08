// The register of a tile of edges on its way from one stage to the next.
#pragma once

#include "../message_math.h"
#include "lane.h"

namespace ngk::cuda {

// act(z) and its derivative, of those with longer code.
NGK_SELDOM Two other_activation(int kind, float z) {
  Two x;
  if (kind == GELU) {
    gelu<Number>(z, x.v, x.v + 1);
  } else {
    act_scalar<float>(kind, z, x.v, x.v + 1);
  }
  return x;
}

// h = act(z) in place of z, and the derivative d of 8 numbers.
NGK_DEVICE void activate8(int kind, float* v, float* d) {
  NGK_UNROLL
  for (int k = 0; k < 8; ++k) {
    float h;
    switch (kind) {
      case SILU:
        silu<Number>(v[k], &h, d + k);
        break;
      case RELU:
        relu<Number>(v[k], &h, d + k);
        break;
      case SIGMOID:
        logistic<Number>(v[k], &h, d + k);
        break;
      default:
        const Two x = other_activation(kind, v[k]);
        h = x.v[0];
        d[k] = x.v[1];
    }
    v[k] = h;
  }
}

// A register where the last stage has left it, in the memory of its lane.
template <class Left>
struct Register {
  const Left* at;
  NGK_DEVICE const Left& operator[](int k) const { return at[k * LANES]; }
};
// The same, taken out of there by precisions whose numbers are short: all fragments of the next stage read it.
template <class Left, int KB>
struct Held {
  Left r[KB];
  NGK_DEVICE explicit Held(const Register<Left>& from) {
    NGK_UNROLL
    for (int k = 0; k < KB; ++k) r[k] = from[k];
  }
  NGK_DEVICE const Left& operator[](int k) const { return r[k]; }
};

}  // namespace ngk::cuda
