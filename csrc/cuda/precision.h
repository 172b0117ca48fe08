// How matrix products round their operands, and how a warp holds them.
//
// A fragment is 16 rows (edges) by 16 columns: lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next one, and the same 8
// columns on: v[4 n + 2 h + p] is row l / 4 + 8 h, column 8 n + 2 (l % 4) + p. This is how mma.sync leaves a product, and, rounded, how it
// takes its left operand: the result of one product is the operand of the next without leaving the lane. For tf32, whose operands have
// another layout, the columns are summed in another order, and the right operands are packed in that order too.
#pragma once

#include "lane.h"

namespace ngk::cuda {

struct Bf16 {
  using Element = uint16_t;            // of packed matrices and of staged rows
  static constexpr bool SHORT = true;  // a row of operands fits into registers
  static constexpr bool SPLIT = false;
  struct alignas(16) Left {
    uint32_t r[4];
  };
  struct Right {  // 16 x 16: two products' right operands
    uint32_t r[4];
  };
  static NGK_DEVICE Left left(const float* v) {
    return {{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])}};
  }
  // Packed by the host: the 8 elements of a lane side by side.
  static NGK_DEVICE Right right(const Element* packed) {
    Right b;
    const Four x = load4(reinterpret_cast<const float*>(packed));
    std::memcpy(&b, &x, 16);
    return b;
  }
  static NGK_DEVICE void multiply(float* acc, const Left& a, const Right& b) {
    mma_bf16(acc, a.r, b.r);
    mma_bf16(acc + 4, a.r, b.r + 2);
  }
  // Rows of a staged tile [*, ld]: `at` is row l / 4, column 2 (l % 4) of a fragment.
  static NGK_DEVICE void stage(Element* at, int ld, const float* v) {
    const Left x = left(v);
    uint32_t *top = reinterpret_cast<uint32_t*>(at), *bottom = reinterpret_cast<uint32_t*>(at + 8 * ld);
    top[0] = x.r[0];
    bottom[0] = x.r[1];
    top[4] = x.r[2];
    bottom[4] = x.r[3];
  }
  static NGK_DEVICE Left staged(const Element* at, int ld) {
    const uint32_t *top = reinterpret_cast<const uint32_t*>(at), *bottom = reinterpret_cast<const uint32_t*>(at + 8 * ld);
    return {{top[0], bottom[0], top[4], bottom[4]}};
  }
  // Operands of g^T x from 16 staged rows: of g its 16 columns from `tile` on, of x likewise. In shared memory, or not.
  static NGK_DEVICE Left left_transposed(const Element* tile, int ld, bool shared) {
    Left a;
    if (shared) {
      load_transposed(a.r, tile + (lane() / 16 * 8 + lane() % 8) * ld + lane() / 8 % 2 * 8);
    } else {
      NGK_UNROLL
      for (int m = 0; m < 4; ++m) a.r[m] = pair_transposed(tile + m / 2 * 8 * ld + m % 2 * 8, ld);
    }
    return a;
  }
  static NGK_DEVICE Right right_transposed(const Element* tile, int ld, bool shared) {
    Right b;
    if (shared) {
      load_transposed(b.r, tile + (lane() / 8 % 2 * 8 + lane() % 8) * ld + lane() / 16 * 8);
    } else {
      NGK_UNROLL
      for (int m = 0; m < 4; ++m) b.r[m] = pair_transposed(tile + m % 2 * 8 * ld + m / 2 * 8, ld);
    }
    return b;
  }

 private:
  // What load_transposed gives this lane of one of its matrices.
  static NGK_DEVICE uint32_t pair_transposed(const Element* matrix, int ld) {
    const Element* top = matrix + lane() % 4 * 2 * ld + lane() / 4;
    return static_cast<uint32_t>(top[0]) | static_cast<uint32_t>(top[ld]) << 16;
  }
};

// tf32: one product, or three, of the operands and what rounding took from them, which is as good as float32. Tensor cores truncate what they
// add to (on all GPUs that were measured: Fasi et al., PeerJ CS 2021; Ootomo and Yokota, IJHPCA 2022), by 2^-26 of it on average: 7e-7 after the
// 48 of the widest row, but more with every product that a sum goes on over. Longer sums are added by instructions that round.
template <bool EXACT>
struct Tf32 {
  using Element = float;
  static constexpr bool SHORT = false;
  static constexpr bool SPLIT = EXACT;  // operands in two parts
  struct Left {
    float r[8];
  };
  struct Right {
    float r[8];
  };
  static NGK_DEVICE Left left(const float* v) { return {{v[0], v[2], v[1], v[3], v[4], v[6], v[5], v[7]}}; }
  static NGK_DEVICE Right right(const Element* packed) {
    const Four x = load4(packed), y = load4(packed + 4);
    return {{x.v[0], x.v[1], x.v[2], x.v[3], y.v[0], y.v[1], y.v[2], y.v[3]}};
  }
  static NGK_DEVICE void rounded(const float* x, int n, float* high, float* low) {
    NGK_UNROLL
    for (int k = 0; k < n; ++k) {
      high[k] = to_tf32(x[k]);
      low[k] = EXACT ? to_tf32(x[k] - high[k]) : 0.0f;
    }
  }
  static NGK_DEVICE void multiply(float* acc, const Left& a, const Right& b) {
    NGK_UNROLL
    for (int k = 0; k < 2; ++k) {
      float ah[4], al[4], bh[4], bl[4];
      const float both[4] = {b.r[2 * k], b.r[2 * k + 1], b.r[4 + 2 * k], b.r[5 + 2 * k]};
      rounded(a.r + 4 * k, 4, ah, al);
      rounded(both, 4, bh, bl);
      NGK_UNROLL
      for (int n = 0; n < 2; ++n) {
        if (EXACT) {
          mma_tf32(acc + 4 * n, ah, bl + 2 * n);
          mma_tf32(acc + 4 * n, al, bh + 2 * n);
        }
        mma_tf32(acc + 4 * n, ah, bh + 2 * n);
      }
    }
  }
  static NGK_DEVICE void stage(Element* at, int ld, const float* v) {
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) at[k / 2 % 2 * 8 * ld + k / 4 * 8 + k % 2] = v[k];
  }
  static NGK_DEVICE Left staged(const Element* at, int ld) {
    float v[8];
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) v[k] = at[k / 2 % 2 * 8 * ld + k / 4 * 8 + k % 2];
    return left(v);
  }
  static NGK_DEVICE Left left_transposed(const Element* tile, int ld, bool) {
    Left a;
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) a.r[k] = tile[(k / 4 * 8 + k % 4 / 2 * 4 + lane() % 4) * ld + k % 2 * 8 + lane() / 4];
    return a;
  }
  // Laid out as Right is: (rows of the first product, of the second) of columns 0 - 7, then of columns 8 - 15.
  static NGK_DEVICE Right right_transposed(const Element* tile, int ld, bool) {
    Right b;
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) b.r[k] = tile[(k % 4 / 2 * 8 + k % 2 * 4 + lane() % 4) * ld + k / 4 * 8 + lane() / 4];
    return b;
  }
};

}  // namespace ngk::cuda
