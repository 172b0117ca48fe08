// What the files of bindings share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "edge_program.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using Bools = std::vector<bool>;
using Tensors = std::vector<Tensor>;

namespace ngk {

// The best instruction set for the compute mode (1: bf16 operands allowed).
const Isa& isa_for(int64_t compute);
void parallel(int64_t n, void* ctx, void (*body)(void*, int64_t, int64_t));
int threads();

// A recipe of `length` integers, with its leaves: offsets lie within [0, size), operands are earlier matrices of sizes that fit.
FoldCall fold_call(const Tensors& leaves, ScalarType type, const int64_t* recipe, size_t length, int64_t size);

// Where a contiguous tensor of the compute dtype lies; null for an empty one.
inline void* data(const Tensor& t, ScalarType type, const char* name) {
  if (t.numel() == 0) return nullptr;
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == type, "ngkernels: expected ", name,
                  " contiguous, on the CPU, of the compute dtype");
  return const_cast<void*>(t.const_data_ptr());
}

// Compiled code hands tensors over with any strides.
inline Tensor in_order(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline Tensors in_order(Tensors tensors) {
  for (Tensor& t : tensors) t = in_order(t);
  return tensors;
}

// What `make` returns; the stable ABI says of an allocation that fails no more than where it was called.
template <class Make>
Tensor allocated(int64_t numbers, const Tensor& like, Make make) {
  try {
    return make();
  } catch (const std::exception&) {
    STD_TORCH_CHECK(false, "ngkernels: not enough memory for a tensor of ", numbers, " numbers of ", like.element_size(),
                    " bytes; the planner (ngk.plan) says what a step needs");
  }
}

// Uninitialised and contiguous, on the device of `like`. Not torch::stable::empty, which looks its op up by name: the gradients of a
// small network are a hundred tensors, at 1 us each.
inline Tensor room(const Tensor& like, const Ints& sizes, ScalarType type) {
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device = aoti_torch_device_type_cpu();
  int64_t numbers = 1;
  for (int64_t size : sizes) numbers *= size;
  return allocated(numbers, like, [&] {
    AtenTensorHandle made;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &dtype, nullptr, &device, 0, nullptr, &made));
    return Tensor(made);
  });
}

// Adds, for each of the tensors, an uninitialised contiguous gradient, or an empty tensor where `need` does not ask for one.
inline void add_room(Tensors& grads, const Tensors& tensors, const Bools& need) {
  for (const Tensor& t : tensors) {
    const size_t k = grads.size();
    STD_TORCH_CHECK(k < need.size(), "ngkernels: expected to be told of each tensor whether its gradient is wanted");
    grads.push_back(room(t, need[k] ? Ints(t.sizes().begin(), t.sizes().end()) : Ints{0}, t.scalar_type()));
  }
}

}  // namespace ngk
