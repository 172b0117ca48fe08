// Products and sums of small matrices, and their derivative: one call instead of some dozens.
#pragma once

#include "../fold_call.h"
#include "prepare.h"

namespace ngk {

// c[m, n] += sum over k of a[i si + k sk] b[k, n], in the order of k, each step rounded once.
template <class V, int ROWS, int NV>
NGK_INLINE void add_block(const typename V::T* a, int64_t si, int64_t sk, const typename V::T* b, typename V::T* c, int64_t depth,
                          int64_t n) {
  typename V::R acc[ROWS][NV];
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < NV; ++v) acc[i][v] = V::load(c + i * n + v * V::W);
  for (int64_t k = 0; k < depth; ++k)
    for (int i = 0; i < ROWS; ++i) {
      const typename V::R scale = V::set1(a[i * si + k * sk]);
      for (int v = 0; v < NV; ++v) acc[i][v] = V::fma(scale, V::load(b + k * n + v * V::W), acc[i][v]);
    }
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < NV; ++v) V::store(c + i * n + v * V::W, acc[i][v]);
}

template <class V, int ROWS>
NGK_INLINE void add_rows(const typename V::T* a, int64_t si, int64_t sk, const typename V::T* b, typename V::T* c, int64_t depth,
                         int64_t n) {
  int64_t col = 0;
  for (; col + 2 * V::W <= n; col += 2 * V::W) add_block<V, ROWS, 2>(a, si, sk, b + col, c + col, depth, n);
  for (; col + V::W <= n; col += V::W) add_block<V, ROWS, 1>(a, si, sk, b + col, c + col, depth, n);
  for (; col < n; ++col)
    for (int i = 0; i < ROWS; ++i) {
      typename V::T sum = c[i * n + col];
      for (int64_t k = 0; k < depth; ++k) sum = std::fma(a[i * si + k * sk], b[k * n + col], sum);
      c[i * n + col] = sum;
    }
}

template <class V>
__attribute__((noinline)) void add_product(const typename V::T* a, int64_t si, int64_t sk, const typename V::T* b, typename V::T* c,
                                           int64_t m, int64_t depth, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) add_rows<V, 4>(a + i * si, si, sk, b, c + i * n, depth, n);
  for (; i < m; ++i) add_rows<V, 1>(a + i * si, si, sk, b, c + i * n, depth, n);
}

// Runs the recipe of a FoldCall, or its derivative, in double: results and gradients are rounded once.
template <class V>
class Fold {
 public:
  static_assert(sizeof(typename V::T) == sizeof(double));

  explicit Fold(const FoldCall& call) : c(call), values(c.nodes.size(), nullptr), grads(c.nodes.size(), nullptr), live(c.nodes.size(), 0) {
    std::vector<char> operands(c.nodes.size(), 0);
    for (const FoldNode& n : c.nodes) need_operands(n, operands);
    for (size_t k = 0; k < c.nodes.size(); ++k) alone.push_back(c.nodes[k].op == LEAF && c.nodes[k].offset >= 0 && !operands[k]);
  }

  // What is stored, late or not.
  void forward(bool late) {
    std::vector<char> made(c.nodes.size(), 0);
    for (size_t k = c.nodes.size(); k-- > 0;) {
      const FoldNode& n = c.nodes[k];
      if (n.offset >= 0 && n.late == late) {
        if (alone[k]) {
          copy(n, true);
        } else {
          made[k] = 1;
        }
      }
      if (made[k]) need_operands(n, made);
    }
    const auto layout = [&](Arena& a) {
      for (size_t k = 0; k < c.nodes.size(); ++k)
        if (made[k]) values[k] = a.take<double>(c.nodes[k].size());
    };
    std::vector<double> own;  // in the middle of a kernel, the threads' memory is taken
    if (late) {
      Arena measure, arena;
      layout(measure);
      own.resize(measure.used / sizeof(double) + 8);
      arena.base = reinterpret_cast<char*>(own.data());
      layout(arena);
    } else {
      allocate(layout);
    }
    for (size_t k = 0; k < c.nodes.size(); ++k) {
      const FoldNode& n = c.nodes[k];
      if (!made[k]) continue;
      evaluate(k);
      if (n.offset >= 0 && n.late == late) write(values[k], n.rows * n.cols, c.out, n.offset);
    }
  }

  void backward() {
    std::vector<char> read(c.nodes.size(), 0);  // values that the derivative of a product needs, and those they are made of
    mark(read);
    for (size_t k = 0; k < c.nodes.size(); ++k)
      if (alone[k] && c.leaves[static_cast<size_t>(c.nodes[k].a)].grad) copy(c.nodes[k], false);
    size_t widest = 0;
    for (const FoldNode& n : c.nodes) widest = n.size() > widest ? n.size() : widest;
    double* turned = nullptr;
    allocate([&](Arena& a) {
      turned = a.take<double>(widest);
      for (size_t k = 0; k < c.nodes.size(); ++k) {
        if (read[k]) values[k] = a.take<double>(c.nodes[k].size());
        if (live[k]) grads[k] = a.take<double>(c.nodes[k].size());
      }
    });
    for (size_t k = 0; k < c.nodes.size(); ++k) {
      const FoldNode& n = c.nodes[k];
      if (read[k]) evaluate(k);
      if (!live[k]) continue;
      if (n.offset < 0 || unasked(n)) {
        std::memset(grads[k], 0, sizeof(double) * n.size());
      } else {
        load(c.grad, n.offset, 1, n.rows * n.cols, grads[k]);
      }
    }
    for (size_t k = c.nodes.size(); k-- > 0;)
      if (live[k] && !unasked(c.nodes[k])) differentiate(k, turned);
  }

 private:
  const FoldCall& c;
  std::vector<double*> values, grads;
  std::vector<char> live;   // whether a wanted leaf lies below
  std::vector<char> alone;  // leaves that are stored as they are and read by nothing else

  template <class X>
  static void widen(const X* from, int64_t stride, int64_t n, double* to) {
    if (stride == 1) {
      for (int64_t j = 0; j < n; ++j) to[j] = from[j];
    } else {
      for (int64_t j = 0; j < n; ++j) to[j] = from[j * stride];
    }
  }
  // n numbers from element `at` on, `stride` elements apart.
  void load(const void* from, int64_t at, int64_t stride, int64_t n, double* to) const {
    if (c.f64) {
      widen(static_cast<const double*>(from) + at, stride, n, to);
    } else {
      widen(static_cast<const float*>(from) + at, stride, n, to);
    }
  }
  void write(const double* from, int64_t n, void* to, int64_t at) const {
    if (c.f64) {
      std::memcpy(static_cast<double*>(to) + at, from, sizeof(double) * static_cast<size_t>(n));
    } else {
      float* rounded = static_cast<float*>(to) + at;
      for (int64_t j = 0; j < n; ++j) rounded[j] = static_cast<float>(from[j]);
    }
  }

  // A leaf that stands alone, to the result, or its gradient.
  void copy(const FoldNode& n, bool forward) const {
    if (c.f64) {
      copy<double>(n, forward);
    } else {
      copy<float>(n, forward);
    }
  }
  template <class X>
  void copy(const FoldNode& n, bool forward) const {
    const FoldLeaf& leaf = c.leaves[static_cast<size_t>(n.a)];
    if (!forward) return void(std::memcpy(leaf.grad, static_cast<const X*>(c.grad) + n.offset, sizeof(X) * n.size()));
    const X* from = static_cast<const X*>(leaf.data);
    X* to = static_cast<X*>(c.out) + n.offset;
    for (int64_t i = 0; i < n.rows; ++i)
      for (int64_t j = 0; j < n.cols; ++j) *to++ = from[i * leaf.row_stride + j * leaf.col_stride];
  }

  template <class Layout>
  void allocate(const Layout& layout) {
    Arena measure, arena;
    layout(measure);
    arena.base = static_cast<char*>(scratch(0, measure.used + 64));
    layout(arena);
  }

  const FoldNode& node(int64_t k) const { return c.nodes[static_cast<size_t>(k)]; }

  void evaluate(size_t k) {
    const FoldNode& n = c.nodes[k];
    double* to = values[k];
    if (n.op == LEAF) {
      const FoldLeaf& leaf = c.leaves[static_cast<size_t>(n.a)];
      const bool whole = leaf.col_stride == 1 && leaf.row_stride == n.cols;
      if (whole) load(leaf.data, 0, 1, n.rows * n.cols, to);
      for (int64_t i = 0; !whole && i < n.rows; ++i) load(leaf.data, i * leaf.row_stride, leaf.col_stride, n.cols, to + i * n.cols);
      return;
    }
    const double *a = values[static_cast<size_t>(n.a)], *b = n.op == COPY ? nullptr : values[static_cast<size_t>(n.b)];
    if (n.op == MULTIPLY) {
      const int64_t depth = node(n.a).cols;
      std::memset(to, 0, sizeof(double) * n.size());
      add_product<V>(a, depth, 1, b, to, n.rows, depth, n.cols);
    } else {
      for (size_t j = 0; j < n.size(); ++j) to[j] = b ? a[j] + b[j] : a[j];
    }
  }

  bool unasked(const FoldNode& n) const { return n.late && !c.asked; }  // nothing read it: its gradient is 0

  static void need_operands(const FoldNode& n, std::vector<char>& needed) {
    if (n.op == LEAF) return;
    needed[static_cast<size_t>(n.a)] = 1;
    if (n.op != COPY) needed[static_cast<size_t>(n.b)] = 1;
  }

  void mark(std::vector<char>& read) {
    for (size_t k = 0; k < c.nodes.size(); ++k) {
      const FoldNode& n = c.nodes[k];
      live[k] = alone[k]       ? 0
                : n.op == LEAF ? c.leaves[static_cast<size_t>(n.a)].grad != nullptr
                               : live[static_cast<size_t>(n.a)] || (n.op != COPY && live[static_cast<size_t>(n.b)]);
    }
    for (size_t k = c.nodes.size(); k-- > 0;) {
      const FoldNode& n = c.nodes[k];
      if (read[k] || (n.op == MULTIPLY && live[k] && !unasked(n))) need_operands(n, read);
    }
  }

  void differentiate(size_t k, double* turned) {
    const FoldNode& n = c.nodes[k];
    const double* g = grads[k];
    if (n.op == LEAF) {
      write(g, n.rows * n.cols, c.leaves[static_cast<size_t>(n.a)].grad, 0);
      return;
    }
    double *ga = grads[static_cast<size_t>(n.a)], *gb = n.op == COPY ? nullptr : grads[static_cast<size_t>(n.b)];
    if (n.op != MULTIPLY) {
      for (size_t j = 0; ga && j < n.size(); ++j) ga[j] += g[j];
      for (size_t j = 0; gb && j < n.size(); ++j) gb[j] += g[j];
      return;
    }
    const FoldNode &a = node(n.a), &b = node(n.b);
    if (ga) {
      const double* right = values[static_cast<size_t>(n.b)];
      for (int64_t i = 0; i < b.rows; ++i)
        for (int64_t j = 0; j < b.cols; ++j) turned[j * b.rows + i] = right[i * b.cols + j];
      add_product<V>(g, n.cols, 1, turned, ga, a.rows, n.cols, a.cols);
    }
    if (gb) add_product<V>(values[static_cast<size_t>(n.a)], 1, a.cols, g, gb, b.rows, a.rows, n.cols);
  }
};

template <class V>
void fold(const FoldCall& c) {
  Fold<V>(c).forward(false);
}
template <class V>
void fold_late(FoldCall& c) {
  c.asked = true;
  Fold<V>(c).forward(true);
}
template <class V>
void fold_gradients(const FoldCall& c) {
  Fold<V>(c).backward();
}

}  // namespace ngk
