// Relational attention on one tile: logits of its edges, softmax by destination, and the way back.
//
// An edge's share r = [query | key | value factor] is the last stage, three parts of the state e below it.
//   logit = scale <q_i + r_q, k_j + r_k>,  value = v_j r_v (or v_j),  out_i = sum_j p value,  sums_i = sum_j p e   (p by head)
#pragma once

#include "evaluator.h"

namespace ngk::cuda {

NGK_DEVICE float float_of(int64_t bits) {
  float x;
  const int32_t low = static_cast<int32_t>(bits);
  std::memcpy(&x, &low, 4);
  return x;
}

template <class P, int D>
struct Attention {
  using Eval = Evaluator<P, D, true>;
  using Register = typename Eval::Register;
  static constexpr int KB = D / 16, WIDE = D + 1;  // WIDE: of a row of products
  enum Part : int { QUERY, KEY, VALUE };

  const Args& g;
  const Eval& eval;
  const int heads, d, d_v;
  const float scale, keep;
  // [16][WIDE], [16][heads]: exponentials, with dropout, their gradients (forward: the largest logits)
  float *products, *p, *weight, *slope;

  // Numbers of the working memory of a warp; then come top, total and shrink [heads] (attend.h).
  static NGK_DEVICE int64_t memory(const Args& g) { return 16 * WIDE + 3 * (16 + 1) * g.heads; }

  NGK_DEVICE Attention(const Args& args, const Eval& e)
      : g(args),
        eval(e),
        heads(static_cast<int>(g.heads)),
        d(static_cast<int>(g.heads * g.dk)),
        d_v(static_cast<int>(g.heads * g.dv)),
        scale(float_of(g.scale)),
        keep(float_of(g.keep)) {
    products = shared_of_warp<float>(g.scores, memory(g));
    p = products + 16 * WIDE;
    weight = p + 16 * heads;
    slope = weight + 16 * heads;
  }

  NGK_DEVICE const Stage& share() const { return g.stages[g.edge_stages - 1]; }
  NGK_DEVICE const Stage& state() const { return g.stages[g.edge_stages - 2]; }
  static NGK_DEVICE int fragments(int columns) { return (columns + 15) / 16; }

  // Columns 16 c .. of a part of the share, from the register of the state.
  NGK_DEVICE void part(Part which, int c, const Register& e, float* v) const {
    eval.start(share(), which, c, v);
    eval.product(share().weight + which, c, e, v);
  }
  // v += columns 16 c .. of x at this lane's two nodes.
  static NGK_DEVICE void add_nodes(const float* x, int width, int64_t top, int64_t bottom, int c, float* v) {
    const int64_t row = 16 * fragments(width);
    const Four own[2] = {of_lane(x + top * row + c * 16), of_lane(x + bottom * row + c * 16)};
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) v[k] += own[k / 2 % 2].v[number_of(k)];
  }
  NGK_DEVICE void query(int c, const Register& e, float* v) const {
    part(QUERY, c, e, v);
    add_nodes(g.q, d, eval.node[0], eval.node[1], c, v);
  }
  NGK_DEVICE void key(int c, const Register& e, float* v) const {
    part(KEY, c, e, v);
    add_nodes(g.k, d, eval.source_node[0], eval.source_node[1], c, v);
  }
  // v_j, and what it is multiplied with.
  NGK_DEVICE void value(int c, const Register& e, float* v, float* factor) const {
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) v[k] = 0, factor[k] = 1;
    add_nodes(g.v, d_v, eval.source_node[0], eval.source_node[1], c, v);
    if (g.multiply) part(VALUE, c, e, factor);
  }

  // x[row][head of a column], for the 8 numbers of a fragment; 0 beyond `columns`.
  NGK_DEVICE void spread(const float* x, int64_t of_head, int columns, int c, float* v) const {
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) {
      const int column = c * 16 + Eval::column_of(k);
      v[k] = column < columns ? x[Eval::row_of(k) * heads + column / static_cast<int>(of_head)] : 0.0f;
    }
  }
  NGK_DEVICE void put(int c, const float* v) const {
    NGK_UNROLL
    for (int k = 0; k < 8; ++k) products[Eval::row_of(k) * WIDE + c * 16 + Eval::column_of(k)] = v[k];
  }
  // f(place of (row, head), row, head), one each for a lane.
  template <class F>
  NGK_DEVICE void by_head(F&& f) const {
    NGK_ROLLED
    for (int k = lane(); k < 16 * heads; k += LANES) f(k % 16 * heads + k / 16, k % 16, k / 16);
  }
  // Of the products of a row, the sum over the columns of a head.
  NGK_DEVICE float head_sum(int row, int head, int64_t of_head) const {
    float total = 0;
    NGK_ROLLED
    for (int64_t z = head * of_head; z < (head + 1) * of_head; ++z) total += products[row * WIDE + z];
    return total;
  }

  // The logits of the tile, to p.
  NGK_DEVICE void logits(const Register& e) const {
    sync_warp();
    NGK_ROLLED
    for (int c = 0; c < fragments(d); ++c) {
      float a[8], b[8];
      query(c, e, a);
      key(c, e, b);
      NGK_UNROLL
      for (int k = 0; k < 8; ++k) a[k] *= b[k];
      put(c, a);
    }
    sync_warp();
    by_head([&](int at, int row, int head) { p[at] = head_sum(row, head, g.dk) * scale; });
    sync_warp();
  }

  // An exponential with dropout.
  NGK_DEVICE float dropped(float x, const Panel& panel, int row, int head) const {
    if (!g.dropped_below) return x;
    const Rows& b = *eval.block;
    const typename Eval::Edge e = eval.edge(panel, row);
    const int64_t j = b.src + panel.copy * b.node_stride + e.source;
    return dropout_hash(eval.node_of(panel, e), j, head, g.seed) >= static_cast<uint32_t>(g.dropped_below) ? x * keep : 0.0f;
  }
};

}  // namespace ngk::cuda
