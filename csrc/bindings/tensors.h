// What the operators need of torch: checked tensors, allocation, and products through torch's own BLAS.
//
// Only LibTorch's stable ABI is used, so that one binary runs on every torch from 2.10 on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fused_rnn {
namespace bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws what Python sees as a RuntimeError.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "fused_rnn: ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  bool first = true;
  for (int64_t size : sizes) {
    text << (first ? "" : ", ") << size;
    first = false;
  }
  text << "]";
  return text.str();
}

// `tensor`, contiguous, after checking that a kernel may read it as [sizes] of x's dtype.
inline Tensor checked(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  check(tensor.is_cpu(), name, " must be on the CPU");
  check(tensor.scalar_type() == dtype, name, " must have the dtype of x");
  const auto got = tensor.sizes();
  bool same = got.size() == sizes.size();
  size_t i = 0;
  for (int64_t size : sizes) same = same && got[i++] == size;
  check(same, name, " must have shape ", shape_text(sizes), ", got ", shape_text(got));
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor checked(const OptionalTensor& tensor, const char* name, std::initializer_list<int64_t> sizes,
                              ScalarType dtype) {
  if (!tensor) return std::nullopt;
  return checked(*tensor, name, sizes, dtype);
}

inline const void* data(const Tensor& tensor) { return tensor.data_ptr(); }
inline const void* data(const OptionalTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

// A row-major matrix in somebody's memory.
struct Matrix {
  void* data;
  int64_t rows, columns;
  int64_t stride;  // elements from one row to the next
  bool transposed = false;

  Matrix t() const { return {data, columns, rows, stride, !transposed}; }
};

// out = a b, or out += a b.
void product(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate = false);

}  // namespace bindings
}  // namespace fused_rnn
