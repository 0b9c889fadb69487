// torch's operations that a CUDA layer needs around its kernels. They run on the current stream, and nothing here waits
// for the GPU. Products and sums are the variants that write to a given tensor: autocast leaves those alone, whereas it
// would change the dtype of what the others return.
#pragma once

#include <array>
#include <vector>

#include "tensors.h"

namespace fused_rnn {
namespace bindings {

using torch::stable::select;

// While it lives, torch records no gradients: the operators have none of their own, on any device, and torch would
// refuse to write products of parameters to a given tensor.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

// A functional operation of one result.
template <class... Arguments>
Tensor call(const char* operation, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  FUSED_RNN_CHECK(torch_call_dispatcher(operation, overload, stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
                  operation, " failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// out = a @ b or a * b: `operation` is aten::mm or aten::mul.
inline void into(const Tensor& out, const char* operation, const Tensor& a, const Tensor& b) {
  call(operation, "out", a, b, out);  // returns out once more
}
inline Tensor product(const Tensor& a, const Tensor& b) {
  const Tensor out = empty({a.size(0), b.size(1)}, a.scalar_type(), Place(a));
  into(out, "aten::mm", a, b);
  return out;
}
inline Tensor where(const Tensor& condition, const Tensor& a, const Tensor& b) {
  return call("aten::where", "self", condition, a, b);
}

inline Tensor narrow(const Tensor& tensor, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(const_cast<Tensor&>(tensor), dim, start, length);
}
inline Tensor view(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  return torch::stable::view(tensor, sizes);
}
inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }
inline Tensor sum(const Tensor& tensor, int64_t dim) {
  const auto given = tensor.sizes();
  std::vector<int64_t> sizes(given.begin(), given.end());
  sizes.erase(sizes.begin() + dim);
  Tensor out = empty(sizes, tensor.scalar_type(), Place(tensor));
  const std::array<int64_t, 1> dims{dim};
  return torch::stable::sum_out(out, tensor, torch::headeronly::IntHeaderOnlyArrayRef(dims));
}
inline void copy(const Tensor& from, const Tensor& to) { torch::stable::copy_(const_cast<Tensor&>(to), from); }
inline Tensor cleared(Tensor tensor) {
  if (tensor.numel() > 0) torch::stable::zero_(tensor);
  return tensor;
}
// `from`, or zeros, in `to`.
inline Tensor filled(const OptionalTensor& from, const Tensor& to) {
  if (!from) return cleared(to);
  copy(*from, to);
  return to;
}
inline Tensor zero_like(const Tensor& tensor) { return cleared(empty({}, tensor.scalar_type(), Place(tensor))); }

// The address of index `at` of the first dimension; null without a tensor or without elements.
inline char* slice(const Tensor& tensor, int64_t at) {
  if (!tensor.defined() || tensor.numel() == 0) return nullptr;
  return static_cast<char*>(tensor.data_ptr()) + at * tensor.stride(0) * element_size(tensor.scalar_type());
}
inline char* slice(const OptionalTensor& tensor, int64_t at) { return tensor ? slice(*tensor, at) : nullptr; }

// The resident kernels load weights by 16 bytes; a view of a larger buffer may begin anywhere.
inline Tensor aligned(const Tensor& weights) {
  return reinterpret_cast<uintptr_t>(weights.data_ptr()) % 16 ? torch::stable::clone(weights) : weights;
}

}  // namespace bindings
}  // namespace fused_rnn
