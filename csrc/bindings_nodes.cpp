// Stable-ABI bindings of the node side of PNA. Their schemas stand in ngkernels/ops/node_map.py.
#include "bindings.h"

namespace ngk {
namespace {

// rows, norm, act, act_first; maps: matrix, bias[, lin, lin_bias]; norm: gamma, beta, or nothing; bounds: int64 [segments + 1]
NodeCall node_call(const Tensor& x, const Tensor& reduced, const Tensors& maps, const Tensors& factors, const Ints& unit,
                   const Tensors& affine, const Tensor& bounds, const Ints& form, double eps, const Tensor& out, const Tensor& stats) {
  const ScalarType type = x.scalar_type();
  NodeCall c;
  STD_TORCH_CHECK(form.size() == 3 && (maps.size() == 2 || maps.size() == 4) && (form[0] == NO_NORM || affine.size() == 2) &&
                      x.dim() == 2 && reduced.dim() == 2 && out.dim() == 2 && reduced.size(0) == x.size(0) && out.size(0) == x.size(0),
                  "ngkernels: malformed node map");
  c.rows = x.size(0);
  c.F = static_cast<int>(x.size(1));
  c.C = static_cast<int>(reduced.size(1));
  c.O = static_cast<int>(out.size(1));
  c.x = data(x, type, "x");
  c.reduced = data(reduced, type, "reduced");
  c.matrix = data(maps[0], type, "matrix");
  c.bias = data(maps[1], type, "bias");
  const int64_t first = maps[0].size(0);
  if (maps.size() == 4) {
    c.inner = static_cast<int>(first);
    c.lin = data(maps[2], type, "lin");
    c.lin_bias = data(maps[3], type, "lin_bias");
  }
  size_t given = 0;
  for (int64_t one : unit) {
    STD_TORCH_CHECK(one || (given < factors.size() && factors[given].numel() == c.rows), "ngkernels: expected a factor for each row");
    c.factors.push_back(one ? nullptr : data(factors[given++], type, "factor"));
  }
  STD_TORCH_CHECK(maps[0].size(1) == c.F + static_cast<int64_t>(unit.size()) * c.C && maps[1].numel() == first &&
                      (c.inner ? maps[2].size(0) == c.O && maps[2].size(1) == first && maps[3].numel() == c.O : first == c.O),
                  "ngkernels: node maps do not fit");
  c.norm = static_cast<int>(form[0]);
  c.act = static_cast<int>(form[1]);
  c.act_first = form[2] != 0;
  c.eps = eps;
  if (c.norm != NO_NORM) {
    c.gamma = data(affine[0], type, "gamma");
    c.beta = data(affine[1], type, "beta");
    STD_TORCH_CHECK(affine[0].numel() == c.O && affine[1].numel() == c.O, "ngkernels: expected a norm as wide as the result");
  }
  if (c.norm == GRAPH_NORM) {
    STD_TORCH_CHECK(bounds.is_cpu() && bounds.is_contiguous() && bounds.scalar_type() == ScalarType::Long && bounds.numel() >= 1 &&
                        stats.numel() == 2 * (bounds.numel() - 1),
                    "ngkernels: malformed bounds");
    const int64_t* b = static_cast<const int64_t*>(bounds.const_data_ptr());
    c.bounds.assign(b, b + bounds.numel());
    for (size_t k = 0; k + 1 < c.bounds.size(); ++k) STD_TORCH_CHECK(c.bounds[k] <= c.bounds[k + 1], "ngkernels: malformed bounds");
    STD_TORCH_CHECK(c.bounds.front() == 0 && c.bounds.back() == c.rows, "ngkernels: malformed bounds");
    c.stats = data(stats, type, "stats");
  } else {
    c.bounds = {0, c.rows};
  }
  c.out = data(out, type, "out");
  return c;
}

const Kernels& kernels(const Tensor& x) {
  const Isa& isa = isa_for(0);
  return x.scalar_type() == ScalarType::Double ? isa.f64 : isa.f32;
}

#define NGK_NODES Tensor x, Tensor reduced, Tensors maps, Tensors factors, Ints unit, Tensors affine, Tensor bounds, Ints form, double eps

void put_in_order(Tensor& x, Tensor& reduced, Tensors& maps, Tensors& factors, Tensors& affine) {
  for (Tensor* t : {&x, &reduced}) *t = in_order(*t);
  for (Tensors* t : {&maps, &factors, &affine}) *t = in_order(*t);
}

std::tuple<Tensor, Tensor> node_map(NGK_NODES, int64_t) {
  put_in_order(x, reduced, maps, factors, affine);
  STD_TORCH_CHECK(!maps.empty() && form.size() == 3, "ngkernels: malformed node map");
  const int64_t segments = form[0] == GRAPH_NORM ? bounds.numel() - 1 : 0;
  const Tensor out = room(x, {x.size(0), maps.back().numel()}, x.scalar_type()), stats = room(x, {segments, 2}, x.scalar_type());
  const NodeCall c = node_call(x, reduced, maps, factors, unit, affine, bounds, form, eps, out, stats);
  if (out.numel()) kernels(x).node_map(c, parallel, threads());
  return {out, stats};
}

// Gradients of x, reduced, the maps, gamma and beta; an empty one where it is not wanted.
Tensors node_map_backward(Tensor grad, Tensor stats, NGK_NODES, int64_t, Bools need) {
  put_in_order(x, reduced, maps, factors, affine);
  const Tensor given = in_order(grad);
  NodeCall c = node_call(x, reduced, maps, factors, unit, affine, bounds, form, eps, given, stats);
  const ScalarType type = x.scalar_type();
  c.grad = c.out;
  c.out = nullptr;
  Tensors grads;
  add_room(grads, {x, reduced}, need);
  add_room(grads, maps, need);
  add_room(grads, affine, need);
  std::vector<void*> to;
  for (const Tensor& g : grads) to.push_back(data(g, type, "gradient"));
  c.grad_x = to[0];
  c.grad_reduced = to[1];
  c.grad_matrix = to[2];
  c.grad_bias = to[3];
  if (c.lin) {
    c.grad_lin = to[4];
    c.grad_lin_bias = to[5];
  }
  if (c.norm != NO_NORM) {
    c.grad_gamma = to[2 + maps.size()];
    c.grad_beta = to[3 + maps.size()];
  }
  kernels(x).node_gradients(c, parallel, threads());
  return grads;
}

}  // namespace
}  // namespace ngk

STABLE_TORCH_LIBRARY_IMPL(ngkernels_C, CPU, m) {
  m.impl("node_map", TORCH_BOX(&ngk::node_map));
  m.impl("node_map_backward", TORCH_BOX(&ngk::node_map_backward));
}
