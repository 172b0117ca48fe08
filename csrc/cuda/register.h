// The register of a tile of edges on its way from one stage to the next.
#pragma once

#include "../edge_math.h"
#include "lane.h"

namespace ngk::cuda {

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
      case GELU:
        gelu<Number>(v[k], &h, d + k);
        break;
      default:
        act_scalar<float>(kind, v[k], &h, d + k);
    }
    v[k] = h;
  }
}

// The register that a stage reads: in registers of its lane or, where partners have one too, where the last stage has left it.
template <class Left, int KB, bool FULL>
struct Register {
  Left r[KB];
  NGK_DEVICE const Left& operator[](int k) const { return r[k]; }
};
template <class Left, int KB>
struct Register<Left, KB, true> {
  const Left* at;
  NGK_DEVICE const Left& operator[](int k) const { return at[k * LANES]; }
};

}  // namespace ngk::cuda
