// Relational attention on one piece: logits of a tile's pairs, online softmax by destination, and the way back.
// A pair's share r = [query | key | value factor] is the program's last register, its state e an earlier one.
//   logit = scale <q_i + r_q, k_j + r_k>,  value = v_j r_v (or v_j),  out_i = sum p value, sums_i = sum p e   (p by head)
#pragma once

#include "views.h"

namespace ngk {

template <class V>
class Attention {
 public:
  using T = typename V::T;
  using R = typename V::R;

  // e_ld: columns of the register of pair states.
  Attention(const Call& call, int e_ld)
      : c(call),
        H(call.heads),
        dk(H ? call.d / H : 0),
        dv(H ? call.d_v / H : 0),
        ldq(padded<V>(call.d)),
        ldv(padded<V>(call.d_v)),
        lde(e_ld),
        lds(call.summed ? H * e_ld : 0) {}

  size_t memory(int nodes, int tile_rows, bool backward) const {
    Attention measure(c, lde);
    Arena a;
    measure.take(a, nodes, tile_rows, backward);
    return a.used / sizeof(T) + 64;
  }

  void place(T* base, const Piece& piece, int tile_rows, bool backward) {
    Arena a;
    a.base = reinterpret_cast<char*>(base);
    rows = piece.rows();
    nodes = rows + piece.cols();
    take(a, nodes, tile_rows, backward);
  }

  // ---- forward ----
  void begin_forward(const Piece& piece) {
    load_nodes(piece);
    for (int64_t x = 0; x < static_cast<int64_t>(nodes) * H; ++x) top[x] = -std::numeric_limits<T>::infinity();
    std::memset(total, 0, sizeof(T) * nodes * H);
    std::memset(acc, 0, sizeof(T) * nodes * ldv);
    if (lds) std::memset(sum, 0, sizeof(T) * nodes * lds);
  }

  void forward(const Tile<V>& t, const T* e, const T* share, int ld) {
    const int last = static_cast<int>(c.instrs.size()) - 1;
    each(t, last, [&](int r) {
      logits(t.i[r], t.j[r], share + static_cast<int64_t>(r) * ld, p + static_cast<int64_t>(r) * H);
      raise(t.i[r], p + static_cast<int64_t>(r) * H);
    });
    each(t, last, [&](int r) {
      for (int h = 0; h < H; ++h) p[static_cast<int64_t>(r) * H + h] -= top[static_cast<int64_t>(t.i[r]) * H + h];
    });
    exponentials(t, last);
    each(t, last, [&](int r) { gather_values(t, r, e + static_cast<int64_t>(r) * lde, share + static_cast<int64_t>(r) * ld + 2 * c.d); });
  }

  // Adds a piece's sums to those of its destinations: out, sums and lse (which holds the largest logit meanwhile).
  void commit_forward(const Piece& piece, T* totals) const {
    destinations(piece, [&](int x, int64_t row) {
      T *out = static_cast<T*>(c.out) + row * c.d_v, *sums = static_cast<T*>(c.sums) + row * H * c.d_e,
        *tops = static_cast<T*>(c.lse) + row * H;
      for (int h = 0; h < H; ++h) {
        const T mine = total[static_cast<int64_t>(x) * H + h], theirs = totals[row * H + h];
        if (mine == T(0)) continue;
        const T t = top[static_cast<int64_t>(x) * H + h], high = theirs == T(0) || !(t <= tops[h]) ? t : tops[h];
        const T a = theirs == T(0) ? T(0) : std::exp(tops[h] - high), b = std::exp(t - high);
        for (int z = h * dv; z < (h + 1) * dv; ++z) out[z] = out[z] * a + acc[static_cast<int64_t>(x) * ldv + z] * b;
        for (int z = 0; lds && z < c.d_e; ++z)
          sums[h * c.d_e + z] = sums[h * c.d_e + z] * a + sum[static_cast<int64_t>(x) * lds + h * lde + z] * b;
        totals[row * H + h] = theirs * a + mine * b;
        tops[h] = high;
      }
    });
  }

  // ---- backward ----
  void begin_backward(const Piece& piece) {
    load_nodes(piece);
    for (T* g : {gq, gk}) std::memset(g, 0, sizeof(T) * nodes * ldq);
    for (T* g : {gv, gout}) std::memset(g, 0, sizeof(T) * nodes * ldv);
    if (lds) std::memset(gsum, 0, sizeof(T) * nodes * lds);
    destinations(piece, [&](int x, int64_t row) {
      const T *out = static_cast<const T*>(c.out) + row * c.d_v, *g = static_cast<const T*>(c.grad_out) + row * c.d_v;
      const T *sums = static_cast<const T*>(c.sums) + row * H * c.d_e, *gs = static_cast<const T*>(c.grad_sums) + row * H * c.d_e;
      std::memcpy(gout + static_cast<int64_t>(x) * ldv, g, sizeof(T) * c.d_v);
      for (int h = 0; h < H; ++h) {
        T dot = 0;
        for (int z = h * dv; z < (h + 1) * dv; ++z) dot += out[z] * g[z];
        for (int z = 0; lds && z < c.d_e; ++z) {
          dot += sums[h * c.d_e + z] * gs[h * c.d_e + z];
          gsum[static_cast<int64_t>(x) * lds + h * lde + z] = gs[h * c.d_e + z];
        }
        delta[static_cast<int64_t>(x) * H + h] = dot;
        top[static_cast<int64_t>(x) * H + h] = static_cast<const T*>(c.lse)[row * H + h];
      }
    });
  }

  // Gradients of the shares (ld) and, for `sums`, of the states of a tile's pairs; those of q, k, v stay with the piece.
  void backward(const Tile<V>& t, const T* e, const T* share, int ld, T* g_share, T* g_e) {
    const int last = static_cast<int>(c.instrs.size()) - 1;
    each(t, last, [&](int r) {
      T* x = p + static_cast<int64_t>(r) * H;
      logits(t.i[r], t.j[r], share + static_cast<int64_t>(r) * ld, x);
      for (int h = 0; h < H; ++h) x[h] -= top[static_cast<int64_t>(t.i[r]) * H + h];
    });
    exponentials(t, last);
    t.spans(last, [&](int first, int n) {
      for (int r = first; r < first + n; ++r) {
        T *gs = g_share + static_cast<int64_t>(r) * ld, *ge = g_e + static_cast<int64_t>(r) * lde;
        if (first && t.itself(r - first)) {
          std::memset(gs, 0, sizeof(T) * ld);
          std::memset(ge, 0, sizeof(T) * lde);
        } else {
          pair_gradients(t, r, e + static_cast<int64_t>(r) * lde, share + static_cast<int64_t>(r) * ld, gs, ge);
        }
      }
    });
  }

  void commit_backward(const Piece& piece) const {
    for (int x = 0; x < nodes; ++x) {
      const int64_t node = node_of(piece, x);
      const auto add = [&](void* grad, const T* from, int n) {
        T* to = static_cast<T*>(grad) + node * n;
        for (int z = 0; grad && z < n; ++z) to[z] += from[z];
      };
      add(c.grad_q, gq + static_cast<int64_t>(x) * ldq, c.d);
      add(c.grad_k, gk + static_cast<int64_t>(x) * ldq, c.d);
      add(c.grad_v, gv + static_cast<int64_t>(x) * ldv, c.d_v);
    }
  }

 private:
  const Call& c;
  const int H, dk, dv, ldq, ldv, lde, lds;
  int rows = 0, nodes = 0;  // of the piece: destinations, then sources
  T *q = nullptr, *k = nullptr, *v = nullptr, *top = nullptr, *total = nullptr, *acc = nullptr, *sum = nullptr, *p = nullptr,
    *wide = nullptr;
  T *gq = nullptr, *gk = nullptr, *gv = nullptr, *gout = nullptr, *gsum = nullptr, *delta = nullptr, *slope = nullptr, *kept = nullptr;

  void take(Arena& a, int n, int tile_rows, bool backward) {
    const size_t slack = 64, m = static_cast<size_t>(n), heads = static_cast<size_t>(H);
    for (T** x : {&q, &k}) *x = a.take<T>(m * ldq + slack);
    v = a.take<T>(m * ldv + slack);
    top = a.take<T>(m * heads);
    p = a.take<T>(static_cast<size_t>(tile_rows) * heads + slack);
    wide = a.take<T>(static_cast<size_t>(ldq > ldv ? ldq : ldv) + slack);
    for (T** x : {&slope, &kept}) *x = a.take<T>(heads + slack);
    if (!backward) {
      total = a.take<T>(m * heads);
      acc = a.take<T>(m * ldv + slack);
      sum = a.take<T>(m * lds + slack);
      return;
    }
    for (T** x : {&gq, &gk}) *x = a.take<T>(m * ldq + slack);
    for (T** x : {&gv, &gout}) *x = a.take<T>(m * ldv + slack);
    gsum = a.take<T>(m * lds + slack);
    delta = a.take<T>(m * heads);
  }

  int64_t node_of(const Piece& piece, int x) const {
    const Row& row = *piece.row;
    return piece.copy * row.node_stride + (x < rows ? row.dst + piece.destination(x) : row.src + piece.source(x - rows));
  }

  // f(local node, output row) for the nodes that read pairs of this piece.
  template <class F>
  void destinations(const Piece& piece, F&& f) const {
    const Row& row = *piece.row;
    const int64_t at = piece.copy * row.out_stride;
    for (int x = 0; x < rows; ++x) f(x, row.out + at + piece.destination(x));
    if (row.flags & PARTNER)
      for (int x = rows; x < nodes; ++x) f(x, row.partner_out + at + piece.source(x - rows));
  }

  void load_nodes(const Piece& piece) {
    for (int x = 0; x < nodes; ++x) {
      const int64_t node = node_of(piece, x);
      const auto copy = [&](const void* from, T* to, int n, int ld) {
        std::memcpy(to + static_cast<int64_t>(x) * ld, static_cast<const T*>(from) + node * n, sizeof(T) * n);
        for (int z = n; z < ld; ++z) to[static_cast<int64_t>(x) * ld + z] = T(0);
      };
      copy(c.q, q, c.d, ldq);
      copy(c.k, k, c.d, ldq);
      copy(c.v, v, c.d_v, ldv);
    }
  }

  // f(row) for every row of a tile that a destination reads: a neuron's pair with itself once.
  template <class F>
  NGK_INLINE_MEMBER void each(const Tile<V>& t, int last, F&& f) const {
    for (int r = 0; r < t.n; ++r) f(r);
    if (t.partners(last))
      for (int r = 0; r < t.n; ++r)
        if (!t.itself(r)) f(t.half + r);
  }

  // out[h] = sum over a head's columns of f(column), plus that of the vector more(h).
  template <class F, class G>
  NGK_INLINE_MEMBER void by_head(int width, F&& f, G&& more, T* out) const {
    if (width % V::W == 0) {
      for (int h = 0; h < H; ++h) {
        R a = more(h);
        for (int z = h * width; z < (h + 1) * width; z += V::W) a = V::add(a, f(z));
        out[h] = V::sum(a);
      }
      return;
    }
    for (int z = 0; z < H * width; z += V::W) V::store(wide + z, f(z));
    for (int h = 0; h < H; ++h) {
      T a = V::sum(more(h));
      for (int z = h * width; z < (h + 1) * width; ++z) a += wide[z];
      out[h] = a;
    }
  }

  // f(column, vector of x[head]) over all columns.
  template <class F>
  NGK_INLINE_MEMBER void spread(int width, const T* x, F&& f) const {
    if (width % V::W == 0) {
      for (int h = 0; h < H; ++h) {
        const R xh = V::set1(x[h]);
        for (int z = h * width; z < (h + 1) * width; z += V::W) f(z, xh);
      }
      return;
    }
    for (int h = 0; h < H; ++h)
      for (int z = h * width; z < (h + 1) * width; ++z) wide[z] = x[h];
    for (int z = 0; z < H * width; z += V::W) f(z, V::load(wide + z));
  }

  NGK_INLINE_MEMBER void logits(int a, int b, const T* share, T* out) const {
    const T *qa = q + static_cast<int64_t>(a) * ldq, *kb = k + static_cast<int64_t>(b) * ldq;
    by_head(
        dk, [&](int z) { return V::mul(V::add(V::load(qa + z), V::load(share + z)), V::add(V::load(kb + z), V::load(share + c.d + z))); },
        [&](int) { return V::zero(); }, out);
    for (int h = 0; h < H; ++h) out[h] *= static_cast<T>(c.scale);
  }

  // Where a logit of destination a is larger than all before, what was summed is scaled down.
  void raise(int a, const T* logit) {
    T* high = top + static_cast<int64_t>(a) * H;
    for (int h = 0; h < H; ++h) {
      if (logit[h] <= high[h]) continue;
      T& n = total[static_cast<int64_t>(a) * H + h];
      if (n != T(0)) {
        const T by = std::exp(high[h] - logit[h]);
        n *= by;
        for (int z = h * dv; z < (h + 1) * dv; ++z) acc[static_cast<int64_t>(a) * ldv + z] *= by;
        for (int z = 0; lds && z < lde; ++z) sum[static_cast<int64_t>(a) * lds + h * lde + z] *= by;
      }
      high[h] = logit[h];
    }
  }

  // exp of the differences in p, none of them above 0 (NaN stays).
  void exponentials(const Tile<V>& t, int last) {
    const R low = V::set1(sizeof(T) == 4 ? T(-87) : T(-700));
    for (int z = 0; z < t.rows(last) * H; z += V::W) V::store(p + z, V::exp(V::upper(V::load(p + z), low)));
  }

  // Dropout: 0 or 1 / (1 - rate).
  T keep(int64_t i, int64_t j, int h) const {
    const bool kept_one = static_cast<double>(dropout_hash(i, j, h, c.seed)) >= std::floor(c.dropout * 4294967296.0);
    return kept_one ? static_cast<T>(1 / (1 - c.dropout)) : T(0);
  }

  // Probabilities of row r with dropout.
  NGK_INLINE_MEMBER const T* dropped(const Tile<V>& t, int r) {
    const T* x = p + static_cast<int64_t>(r) * H;
    if (c.dropout == 0) return x;
    const int64_t i = node_of(*t.piece, t.i[r]), j = node_of(*t.piece, t.j[r]);
    for (int h = 0; h < H; ++h) kept[h] = x[h] * keep(i, j, h);
    return kept;
  }

  NGK_INLINE_MEMBER void gather_values(const Tile<V>& t, int r, const T* e, const T* factor) {
    const int64_t a = t.i[r];
    const T* vb = v + static_cast<int64_t>(t.j[r]) * ldv;
    T *n = total + a * H, *to = acc + a * ldv;
    for (int h = 0; h < H; ++h) n[h] += p[static_cast<int64_t>(r) * H + h];
    const T* weight = dropped(t, r);
    spread(dv, weight, [&](int z, R x) {
      const R value = c.multiply ? V::mul(V::load(vb + z), V::load(factor + z)) : V::load(vb + z);
      V::store(to + z, V::fma(x, value, V::load(to + z)));
    });
    for (int h = 0; lds && h < H; ++h) {
      const R x = V::set1(weight[h]);
      T* s = sum + a * lds + static_cast<int64_t>(h) * lde;
      for (int z = 0; z < lde; z += V::W) V::store(s + z, V::fma(x, V::load(e + z), V::load(s + z)));
    }
  }

  NGK_INLINE_MEMBER void pair_gradients(const Tile<V>& t, int r, const T* e, const T* share, T* gs, T* ge) {
    const int64_t a = t.i[r], b = t.j[r];
    const T *qa = q + a * ldq, *kb = k + b * ldq, *vb = v + b * ldv, *go = gout + a * ldv, *factor = share + 2 * c.d, *gsa = gsum + a * lds;
    const T *x = p + static_cast<int64_t>(r) * H, *weight = dropped(t, r);
    const auto value = [&](int z) { return c.multiply ? V::mul(V::load(vb + z), V::load(factor + z)) : V::load(vb + z); };
    by_head(
        dv, [&](int z) { return V::mul(V::load(go + z), value(z)); },
        [&](int h) {
          R s = V::zero();
          for (int z = 0; lds && z < lde; z += V::W) s = V::fma(V::load(gsa + static_cast<int64_t>(h) * lde + z), V::load(e + z), s);
          return s;
        },
        slope);
    const T* d = delta + a * H;
    for (int h = 0; h < H; ++h) slope[h] = softmax_back(weight[h], slope[h], x[h], d[h], static_cast<T>(c.scale));
    T *to_q = gq + a * ldq, *to_k = gk + b * ldq, *to_v = gv + b * ldv;
    spread(dk, slope, [&](int z, R s) {  // the tail of the query's part is the key's: written next
      const R y = V::mul(s, V::add(V::load(kb + z), V::load(share + c.d + z)));
      V::store(gs + z, y);
      V::store(to_q + z, V::add(V::load(to_q + z), y));
    });
    spread(dk, slope, [&](int z, R s) {
      const R y = V::mul(s, V::add(V::load(qa + z), V::load(share + z)));
      V::store(gs + c.d + z, y);
      V::store(to_k + z, V::add(V::load(to_k + z), y));
    });
    spread(dv, weight, [&](int z, R w) {
      const R y = V::mul(w, V::load(go + z));
      if (c.multiply) V::store(gs + 2 * c.d + z, V::mul(y, V::load(vb + z)));
      V::store(to_v + z, V::add(V::load(to_v + z), c.multiply ? V::mul(y, V::load(factor + z)) : y));
    });
    if (!lds) return;
    for (int z = 0; z < lde; z += V::W) {
      R s = V::zero();
      for (int h = 0; h < H; ++h) s = V::fma(V::set1(weight[h]), V::load(gsa + static_cast<int64_t>(h) * lde + z), s);
      V::store(ge + z, s);
    }
  }
};

}  // namespace ngk
