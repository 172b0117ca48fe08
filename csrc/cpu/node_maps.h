// The maps of a node call in the layouts that products read, and the way back from their product to each of them.
#pragma once

#include "../node_call.h"
#include "prepare.h"

namespace ngk {

template <class V>
struct NodeMaps {
  using T = typename V::T;
  const NodeCall& c;
  int count, inputs, ld;                       // scalers; columns of the matrix; padded columns of the result
  T *transposed, *bias, *gamma, *beta;         // of lin matrix: [inputs, ld]; [ld], zero beyond O
  Matrix<V> x, x_back;                         // [F, O] and its transpose
  std::vector<Matrix<V>> scaled, scaled_back;  // [C, O] of each scaler

  NodeMaps(const NodeCall& call, bool backward)
      : c(call), count(static_cast<int>(call.factors.size())), inputs(call.F + count * call.C), ld(padded<V>(call.O)) {
    Arena measure, arena;
    build(measure, backward);
    arena.base = static_cast<char*>(scratch(0, measure.used));
    build(arena, backward);
  }

  // Writes the gradients of matrix, bias, lin and lin_bias, from those of the transposed product [inputs, ld] and of its bias [ld].
  void gradients(std::vector<T>& product, const T* grad_bias) const {
    const auto vector = [&](void* to) {
      if (to) std::memcpy(to, grad_bias, sizeof(T) * c.O);
    };
    if (!c.lin) {
      vector(c.grad_bias);
      transpose(product.data(), inputs, c.O, ld, c.grad_matrix);
      return;
    }
    vector(c.grad_lin_bias);
    const int wide = padded<V>(c.inner);
    product.resize(static_cast<size_t>(row_blocks<V>(inputs)) * ld + 64);  // rows that a product may read
    const T *l = static_cast<const T*>(c.lin), *m = static_cast<const T*>(c.matrix), *b = static_cast<const T*>(c.bias);
    std::vector<T> lin(static_cast<size_t>(c.O) * wide, T(0)), back(static_cast<size_t>(row_blocks<V>(inputs)) * wide + 64);
    for (int o = 0; o < c.O; ++o)
      std::memcpy(lin.data() + static_cast<int64_t>(o) * wide, l + static_cast<int64_t>(o) * c.inner, sizeof(T) * c.inner);
    Matrix<V> map;
    map.p = lin.data();
    map.K = c.O;
    map.N = c.inner;
    map.ld = wide;
    gemm<V>(product.data(), ld, inputs, map, back.data(), FromZero<V>{});
    transpose(back.data(), inputs, c.inner, wide, c.grad_matrix);
    T *to_bias = static_cast<T*>(c.grad_bias), *to_lin = static_cast<T*>(c.grad_lin);
    for (int i = 0; to_bias && i < c.inner; ++i) {
      to_bias[i] = T(0);
      for (int o = 0; o < c.O; ++o) to_bias[i] += l[static_cast<int64_t>(o) * c.inner + i] * grad_bias[o];
    }
    if (!to_lin) return;
    std::vector<T> flipped(static_cast<size_t>(inputs) * wide, T(0));
    for (int i = 0; i < c.inner; ++i)
      for (int k = 0; k < inputs; ++k) flipped[static_cast<size_t>(k) * wide + i] = m[static_cast<int64_t>(i) * inputs + k];
    std::fill(lin.begin(), lin.end(), T(0));
    gemm_outer<V>(product.data(), ld, c.O, flipped.data(), wide, inputs, lin.data(), wide);
    for (int o = 0; o < c.O; ++o)
      for (int i = 0; i < c.inner; ++i)
        to_lin[static_cast<int64_t>(o) * c.inner + i] = lin[static_cast<size_t>(o) * wide + i] + grad_bias[o] * b[i];
  }

 private:
  static void transpose(const T* from, int rows, int columns, int ld, void* p) {
    T* to = static_cast<T*>(p);
    for (int k = 0; to && k < columns; ++k)
      for (int r = 0; r < rows; ++r) to[static_cast<int64_t>(k) * rows + r] = from[static_cast<int64_t>(r) * ld + k];
  }

  void build(Arena& a, bool backward) {
    transposed = a.take<T>(static_cast<size_t>(inputs) * ld);
    bias = row(a, c.lin ? c.lin_bias : c.bias);
    gamma = row(a, c.gamma);
    beta = row(a, c.beta);
    T* lin = a.take<T>(static_cast<size_t>(c.inner) * ld);
    if (transposed) multiply(lin);
    x = view(0, c.F);
    scaled.clear();
    scaled_back.clear();
    for (int s = 0; s < count; ++s) scaled.push_back(view(c.F + s * c.C, c.C));
    if (!backward) return;
    x_back = back(a, 0, c.F);
    for (int s = 0; s < count; ++s) scaled_back.push_back(back(a, c.F + s * c.C, c.C));
  }

  T* row(Arena& a, const void* from) const {
    T* p = a.take<T>(ld);
    if (p)
      for (int o = 0; o < ld; ++o) p[o] = from && o < c.O ? static_cast<const T*>(from)[o] : T(0);
    return p;
  }

  // The transpose of lin matrix (of matrix, where there is no lin), and lin bias + lin_bias.
  void multiply(T* lin) {
    const T *m = static_cast<const T*>(c.matrix), *l = static_cast<const T*>(c.lin), *b = static_cast<const T*>(c.bias);
    std::memset(transposed, 0, sizeof(T) * inputs * ld);
    if (!l) {
      for (int o = 0; o < c.O; ++o)
        for (int k = 0; k < inputs; ++k) transposed[static_cast<int64_t>(k) * ld + o] = m[static_cast<int64_t>(o) * inputs + k];
      return;
    }
    for (int i = 0; i < c.inner; ++i)
      for (int o = 0; o < ld; ++o) lin[i * ld + o] = o < c.O ? l[static_cast<int64_t>(o) * c.inner + i] : T(0);
    gemm_outer<V>(m, inputs, inputs, lin, ld, c.inner, transposed, ld);
    for (int i = 0; i < c.inner; ++i)
      for (int o = 0; o < c.O; ++o) bias[o] += lin[i * ld + o] * b[i];
  }

  Matrix<V> view(int first, int n) const {
    Matrix<V> m;
    m.p = transposed ? transposed + static_cast<int64_t>(first) * ld : nullptr;
    m.K = n;
    m.N = c.O;
    m.ld = ld;
    return m;
  }
  Matrix<V> back(Arena& a, int first, int n) const {
    Matrix<V> m;
    m.K = c.O;
    m.N = n;
    m.ld = padded<V>(n);
    T* p = a.take<T>(static_cast<size_t>(c.O) * m.ld);
    if (p)
      for (int o = 0; o < c.O; ++o)
        for (int k = 0; k < m.ld; ++k) p[o * m.ld + k] = k < n ? transposed[static_cast<int64_t>(first + k) * ld + o] : T(0);
    m.p = p;
    return m;
  }
};

}  // namespace ngk
