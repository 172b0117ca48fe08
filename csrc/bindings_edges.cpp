// Stable-ABI bindings of the ops over edges. Their schemas stand in ngkernels/ops.
#include "problem.h"

namespace ngk {
namespace {

// The arguments that every op over edges takes first (ngkernels/program.py Expression).
#define NGK_EXPRESSION Tensors weights, Tensors xs, Tensors params, Tensor table, Tensors carriers, Tensor topology, Ints program
#define NGK_ATTENTION Tensor q, Tensor k, Tensor v, Ints shape, double scale, double dropout, int64_t seed

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

// The gradient of a weight has its strides (that of a transposed view is one too); of one in a file it lies in a file, if that was asked
// for.
Tensor gradient_like(const Tensor& weight) {
  if (!weight.numel() || !is_mapped(weight.const_data_ptr()))
    return allocated(weight.numel(), weight, [&] { return torch::stable::empty_like(weight); });
  std::array<StableIValue, 1> stack{torch::stable::detail::from(weight)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("ngkernels::gradient_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensors empty_gradients(const Tensors& weights, const Tensors& xs, const Tensors& params, const Tensor& table, const Tensors& carriers,
                        const Bools& need) {
  Tensors grads;
  grads.reserve(need.size());
  STD_TORCH_CHECK(weights.size() <= need.size(), "ngkernels: expected to be told of each weight whether its gradient is wanted");
  for (const Tensor& w : weights) grads.push_back(need[grads.size()] ? gradient_like(w) : room(w, {0}, w.scalar_type()));
  add_room(grads, xs, need);
  add_room(grads, params, need);
  add_room(grads, {table}, need);
  add_room(grads, carriers, need);
  return grads;
}

// grads: of the weights, xs, params, table and carriers; an empty one is not wanted.
void differentiate(Problem& p, int64_t compute, const Tensors& grads, const Tensors& weights) {
  p.want(grads, weights);
  p.clear(grads);
  p.kernels(compute).backward(p.call, parallel, threads());
  if (p.fold.grad) isa_for(0).fold_gradients(p.fold);
}

ScalarType compute_type(const Problem& p) { return p.f64 ? ScalarType::Double : ScalarType::Float; }
int count(int64_t mask) { return __builtin_popcountll(static_cast<unsigned long long>(mask)); }

void bind_reduced(Problem& p, const Tensor& out, const Tensor& aux, const Tensor& ties) {
  const ScalarType type = compute_type(p);
  p.call.out = data(out, type, "out");
  p.call.aux = data(aux, type, "aux");
  p.call.ties = ties.numel() ? const_cast<void*>(ties.const_data_ptr()) : nullptr;
  p.call.out_rows = out.size(0);
  for (const Row& r : p.call.rows)
    STD_TORCH_CHECK(r.out + (r.copies - 1) * r.out_stride + r.n_dst <= p.call.out_rows,
                    "ngkernels: a block names output rows that are not there");
}

Outputs aggregate(NGK_EXPRESSION, int64_t rows, int64_t compute) {
  Problem p(weights, xs, params, table, topology, program);
  const Call& c = p.call;
  const ScalarType type = compute_type(p), number = c.tie_bytes == 2 ? ScalarType::Short : ScalarType::Int;
  const bool mean = c.mask & (STD | VAR) && !(c.mask & MEAN);
  Outputs o{room(table, {rows, count(c.mask), c.width}, type), room(table, {rows, mean, c.width}, type),
            room(table, {rows, count(c.mask & (MIN | MAX)), c.width}, number)};
  const auto& [out, aux, ties] = o;
  bind_reduced(p, out, aux, ties);
  if (out.numel()) p.kernels(compute).aggregate(c, parallel, threads());
  return o;
}

Tensors aggregate_backward(Tensor grad, Tensor out, Tensor aux, Tensor ties, NGK_EXPRESSION, int64_t compute, Bools need) {
  Problem p(weights, xs, params, table, topology, program);
  bind_reduced(p, out, aux, ties);
  const Tensor g = in_order(grad);
  p.call.grad_out = data(g, compute_type(p), "grad");
  const Tensors grads = empty_gradients(weights, xs, params, table, carriers, need);
  differentiate(p, compute, grads, weights);
  return grads;
}

void bind_values(Problem& p, const Tensors& values) {
  for (const Tensor& v : values) p.call.values.push_back(edge_tensor(v, p.flat(v)));
  int64_t last = -1;
  for (const Row& r : p.call.rows) last = std::max(last, std::max(r.block, r.partner_block));
  STD_TORCH_CHECK(p.packed ? values.size() == 1 : static_cast<int64_t>(values.size()) > last,
                  "ngkernels: expected one tensor of values for each block");
}

Tensors evaluate(NGK_EXPRESSION, Ints shapes, int64_t dtype, int64_t compute) {
  constexpr ScalarType DTYPES[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double};
  STD_TORCH_CHECK(dtype >= 0 && dtype < 4, "ngkernels: expected a dtype of edge values");
  Problem p(weights, xs, params, table, topology, program);
  Tensors out;
  for (size_t k = 0; k < shapes.size(); k += static_cast<size_t>(shapes[k]) + 1) {
    STD_TORCH_CHECK(shapes[k] >= 2 && k + static_cast<size_t>(shapes[k]) < shapes.size(), "ngkernels: malformed shapes");
    const auto first = shapes.begin() + static_cast<int64_t>(k) + 1;
    out.push_back(room(table, Ints(first, first + shapes[k]), DTYPES[dtype]));
  }
  if (!shapes.empty() && shapes[0] == 2) torch::stable::zero_(out[0]);  // packed: a restricted graph leaves rows out
  bind_values(p, out);
  p.kernels(compute).evaluate(p.call, parallel, threads());
  return out;
}

Tensors evaluate_backward(Tensors values, NGK_EXPRESSION, Ints, int64_t compute, Bools need) {
  Problem p(weights, xs, params, table, topology, program);
  const Tensors given = in_order(values);
  bind_values(p, given);
  const Tensors grads = empty_gradients(weights, xs, params, table, carriers, need);
  differentiate(p, compute, grads, weights);
  return grads;
}

void bind_attention(Problem& p, const Tensor& q, const Tensor& k, const Tensor& v, const Ints& shape, double scale, double dropout,
                    int64_t seed, const Tensor& out, const Tensor& sums, const Tensor& lse) {
  const ScalarType type = compute_type(p);
  Call& c = p.call;
  STD_TORCH_CHECK(c.combine == ATTEND && c.paired && c.message_start >= 1 && shape.size() == 3 && shape[0] >= 1,
                  "ngkernels: malformed attention");
  c.heads = static_cast<int>(shape[0]);
  c.multiply = shape[1] != 0;
  c.summed = shape[2] != 0;
  c.d = static_cast<int>(q.size(1));
  c.d_v = static_cast<int>(v.size(1));
  c.d_e = c.instrs[static_cast<size_t>(c.message_start - 1)].n_out;
  c.scale = scale;
  c.dropout = dropout;
  c.seed = seed;
  c.nodes = q.size(0);
  c.q = data(q, type, "q");
  c.k = data(k, type, "k");
  c.v = data(v, type, "v");
  c.out = data(out, type, "out");
  c.sums = data(sums, type, "sums");
  c.lse = data(lse, type, "lse");
  c.out_rows = out.size(0);
  STD_TORCH_CHECK(k.size(0) == c.nodes && v.size(0) == c.nodes && k.size(1) == c.d && c.d % c.heads == 0 && c.d_v % c.heads == 0 &&
                      c.width == 2 * c.d + (c.multiply ? c.d_v : 0),
                  "ngkernels: q, k, v and the edges' shares do not fit");
  for (const Row& r : c.rows) {
    const int64_t last = (r.copies - 1) * r.out_stride, nodes = (r.copies - 1) * r.node_stride;
    STD_TORCH_CHECK(r.out + last + r.n_dst <= c.out_rows && (!(r.flags & PARTNER) || r.partner_out + last + r.n_src <= c.out_rows) &&
                        r.src + nodes + r.n_src <= c.nodes && r.dst + nodes + r.n_dst <= c.nodes,
                    "ngkernels: a block names rows that are not there");
  }
}

Outputs attend(NGK_EXPRESSION, NGK_ATTENTION, int64_t rows, int64_t compute) {
  Problem p(weights, xs, params, table, topology, program);
  STD_TORCH_CHECK(shape.size() == 3 && p.call.message_start >= 1, "ngkernels: malformed attention");
  const int64_t width = shape[2] ? p.call.instrs[static_cast<size_t>(p.call.message_start - 1)].n_out : 0;
  const ScalarType type = compute_type(p);
  Outputs o{room(table, {rows, v.size(1)}, type), room(table, {rows, shape[0], width}, type), room(table, {rows, shape[0]}, type)};
  const auto& [out, sums, lse] = o;
  bind_attention(p, q, k, v, shape, scale, dropout, seed, out, sums, lse);
  p.kernels(compute).attend(p.call, parallel, threads());
  return o;
}

Tensors attend_backward(Tensor grad, Tensor grad_sums, Tensor out, Tensor sums, Tensor lse, NGK_EXPRESSION, NGK_ATTENTION, int64_t compute,
                        Bools need) {
  Problem p(weights, xs, params, table, topology, program);
  const Tensors saved = in_order(Tensors{grad, grad_sums, out, sums, lse});
  bind_attention(p, q, k, v, shape, scale, dropout, seed, saved[2], saved[3], saved[4]);
  const ScalarType type = compute_type(p);
  p.call.grad_out = data(saved[0], type, "grad");
  p.call.grad_sums = data(saved[1], type, "grad sums");
  Tensors grads = empty_gradients(weights, xs, params, table, carriers, need), all = grads;
  add_room(all, {q, k, v}, need);
  p.call.grad_q = data(all[grads.size()], type, "grad q");
  p.call.grad_k = data(all[grads.size() + 1], type, "grad k");
  p.call.grad_v = data(all[grads.size() + 2], type, "grad v");
  differentiate(p, compute, grads, weights);
  return all;
}

}  // namespace
}  // namespace ngk

STABLE_TORCH_LIBRARY_IMPL(ngkernels_C, CPU, m) {
  m.impl("aggregate", TORCH_BOX(&ngk::aggregate));
  m.impl("aggregate_backward", TORCH_BOX(&ngk::aggregate_backward));
  m.impl("attend", TORCH_BOX(&ngk::attend));
  m.impl("attend_backward", TORCH_BOX(&ngk::attend_backward));
  m.impl("evaluate", TORCH_BOX(&ngk::evaluate));
  m.impl("evaluate_backward", TORCH_BOX(&ngk::evaluate_backward));
}
