// Small dense products on tiles. Every product of one kind goes through one micro-kernel with one K order, tails
// included (rows are padded), so a value does not depend on where in a tile its row stands: forward and backward
// evaluate bit-identically. Measured at 96 x 32 x 32 on one AVX-512 core: see benchmarks/results.
#pragma once

#include "../values.h"
#include "vec.h"

namespace ngk {

template <class V>
constexpr int padded(int n) {
  return (n + V::W - 1) / V::W * V::W;
}
template <class V>
constexpr int row_blocks(int n) {
  return (n + V::MR - 1) / V::MR * V::MR;
}

// Where a product starts from.
template <class V>
struct FromZero {
  NGK_INLINE typename V::R at(const FromZero&, int, int) { return V::zero(); }
};
template <class V>
struct FromRow {  // the same row everywhere (a bias)
  const typename V::T* row;
  NGK_INLINE typename V::R at(const FromRow& f, int, int col) { return V::load(f.row + col); }
};
template <class V>
struct FromNodes {  // s_i + t_j
  const typename V::T *s, *t;
  int ld;
  const int *i, *j;
  NGK_INLINE typename V::R at(const FromNodes& f, int row, int col) {
    return V::add(V::load(f.s + static_cast<int64_t>(f.i[row]) * f.ld + col), V::load(f.t + static_cast<int64_t>(f.j[row]) * f.ld + col));
  }
};

template <class V>
struct FromRows {  // what is there already
  const typename V::T* c;
  int ld;
  NGK_INLINE typename V::R at(const FromRows& f, int row, int col) { return V::load(f.c + static_cast<int64_t>(row) * f.ld + col); }
};

// A matrix in the layouts kernels read: [K][ld] rows padded to full vectors; bf16: pairs of rows side by side.
template <class V>
struct Matrix {
  const typename V::T* p = nullptr;
  const uint32_t* pairs = nullptr;  // [ceil(K / 2)][ld], only with V::BF16
  int K = 0, N = 0, ld = 0;
};

template <class V, int MR, int NV>
NGK_INLINE void finish_block(typename V::R (&acc)[MR][NV], typename V::T* c, int ldc, int col, const typename V::T* scale) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      const int64_t at = static_cast<int64_t>(r) * ldc + col + v * V::W;
      V::store(c + at, scale ? V::mul(acc[r][v], V::load(scale + at)) : acc[r][v]);
    }
}

template <class V, int MR, int NV, class From>
NGK_INLINE void gemm_block(const typename V::T* a, int64_t lda, const typename V::T* b, int ldb, typename V::T* c, int ldc, int K, int row,
                           int col, const From& from, const typename V::T* scale) {
  using R = typename V::R;
  R acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[r][v] = From::at(from, row + r, col + v * V::W);
  for (int k = 0; k < K; ++k) {
    R bk[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) bk[v] = V::load(b + static_cast<int64_t>(k) * ldb + col + v * V::W);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const R ar = V::set1(a[r * lda + k]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[r][v] = V::fma(ar, bk[v], acc[r][v]);
    }
  }
  finish_block<V, MR, NV>(acc, c, ldc, col, scale);
}

template <class V, int MR, int NV, class From>
NGK_INLINE void dot_block(const uint32_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int pairs, int row, int col,
                          const From& from, const float* scale) {
  typename V::R acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[r][v] = From::at(from, row + r, col + v * V::W);
  for (int k = 0; k < pairs; ++k)
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[r][v] = V::dot(acc[r][v], a[r * lda + k], b + static_cast<int64_t>(k) * ldb + col + v * V::W);
  finish_block<V, MR, NV>(acc, c, ldc, col, scale);
}

// c[rows, ld] = from + a[rows, K] m, times scale[rows, ld] where given. a, c and scale have room for rows rounded up to MR; at most 512
// columns of K for bf16.
template <class V, class From>
__attribute__((noinline)) void gemm(const typename V::T* a, int64_t lda, int rows, const Matrix<V>& m, typename V::T* c, const From& from,
                                    const typename V::T* scale = nullptr) {
  if constexpr (V::BF16) {
    if (m.pairs && m.K > 1 && m.K <= 512) {
      uint32_t packed[V::MR * 256];
      const int pairs = (m.K + 1) / 2;
      for (int row = 0; row < rows; row += V::MR) {
        for (int r = 0; r < V::MR; ++r) {
          const float* p = a + (row + r) * lda;
          uint32_t* to = packed + r * pairs;
          int k = 0;
          for (; k + V::W <= m.K; k += V::W) V::pack(p + k, to + k / 2);
          for (; k < m.K; k += 2) to[k / 2] = to_bf16(p[k]) | static_cast<uint32_t>(to_bf16(k + 1 < m.K ? p[k + 1] : 0.f)) << 16;
        }
        int col = 0;
        for (; col + 2 * V::W <= m.ld; col += 2 * V::W)
          dot_block<V, V::MR, 2>(packed, pairs, m.pairs, m.ld, c + static_cast<int64_t>(row) * m.ld, m.ld, pairs, row, col, from,
                                 scale ? scale + static_cast<int64_t>(row) * m.ld : nullptr);
        if (col < m.ld)
          dot_block<V, V::MR, 1>(packed, pairs, m.pairs, m.ld, c + static_cast<int64_t>(row) * m.ld, m.ld, pairs, row, col, from,
                                 scale ? scale + static_cast<int64_t>(row) * m.ld : nullptr);
      }
      return;
    }
  }
  const auto columns = [&](auto width, int col) {  // column by column: a panel of m stays in the first-level cache
    for (int row = 0; row < rows; row += V::MR) {
      const int64_t at = static_cast<int64_t>(row) * m.ld;
      gemm_block<V, V::MR, decltype(width)::value>(a + row * lda, lda, m.p, m.ld, c + at, m.ld, m.K, row, col, from,
                                                   scale ? scale + at : nullptr);
    }
  };
  int col = 0;
  for (; col + 2 * V::W <= m.ld; col += 2 * V::W) columns(std::integral_constant<int, 2>{}, col);
  if (col < m.ld) columns(std::integral_constant<int, 1>{}, col);
}

template <class V, int MK, int NV>
NGK_INLINE void outer_block(const typename V::T* a, int64_t lda, const typename V::T* g, int ldg, int rows, typename V::T* w, int ldw) {
  using R = typename V::R;
  R acc[MK][NV];
#pragma GCC unroll 16
  for (int k = 0; k < MK; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[k][v] = V::load(w + static_cast<int64_t>(k) * ldw + v * V::W);
  for (int r = 0; r < rows; ++r) {
    R gr[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) gr[v] = V::load(g + static_cast<int64_t>(r) * ldg + v * V::W);
#pragma GCC unroll 16
    for (int k = 0; k < MK; ++k) {
      const R ak = V::set1(a[r * lda + k]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[k][v] = V::fma(ak, gr[v], acc[k][v]);
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < MK; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) V::store(w + static_cast<int64_t>(k) * ldw + v * V::W, acc[k][v]);
}

template <class V, int NV>
NGK_INLINE void outer_columns(const typename V::T* a, int64_t lda, int K, const typename V::T* g, int ldg, int rows, typename V::T* w,
                              int ldw) {
  int k = 0;
  for (; k + V::MR <= K; k += V::MR) outer_block<V, V::MR, NV>(a + k, lda, g, ldg, rows, w + static_cast<int64_t>(k) * ldw, ldw);
  if constexpr (V::MR > 8)
    for (; k + 8 <= K; k += 8) outer_block<V, 8, NV>(a + k, lda, g, ldg, rows, w + static_cast<int64_t>(k) * ldw, ldw);
  for (; k + 4 <= K; k += 4) outer_block<V, 4, NV>(a + k, lda, g, ldg, rows, w + static_cast<int64_t>(k) * ldw, ldw);
  for (; k < K; ++k) outer_block<V, 1, NV>(a + k, lda, g, ldg, rows, w + static_cast<int64_t>(k) * ldw, ldw);
}

// w[K, ldw] += a[rows, K]^T g[rows, ldw]: a weight gradient.
template <class V>
__attribute__((noinline)) void gemm_outer(const typename V::T* a, int64_t lda, int K, const typename V::T* g, int ldg, int rows,
                                          typename V::T* w, int ldw) {
  int col = 0;
  for (; col + 2 * V::W <= ldw; col += 2 * V::W) outer_columns<V, 2>(a, lda, K, g + col, ldg, rows, w + col, ldw);
  if (col < ldw) outer_columns<V, 1>(a, lda, K, g + col, ldg, rows, w + col, ldw);
}

}  // namespace ngk
