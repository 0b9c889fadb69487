// What the operators need of torch: checked tensors and allocation.
//
// Only LibTorch's stable ABI is used, so that one binary runs on every torch from 2.10 on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "check.h"
#include "dtypes.h"

namespace fused_rnn {
namespace bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A tensor's storage may have been resized behind its back; torch does not look. One of zeros may have no memory.
inline void require_storage(const Tensor& tensor, const char* name, int64_t elements) {
  int64_t bytes = 0;
  aoti_torch_get_storage_size(tensor.get(), &bytes);
  FUSED_RNN_CHECK(tensor.storage_offset() + elements <= bytes / static_cast<int64_t>(tensor.element_size()), name,
                  " reaches beyond the end of its storage");
  // A view of no memory has its offset for an address.
  const int64_t skipped = tensor.storage_offset() * static_cast<int64_t>(tensor.element_size());
  FUSED_RNN_CHECK(reinterpret_cast<intptr_t>(tensor.data_ptr()) != skipped, name, " has no memory");
}

inline Tensor contiguous(const Tensor& tensor, const char* name) {
  const int64_t numel = tensor.numel();
  if (numel == 0) {  // else the storage tells another layout
    int32_t layout = 0;
    aoti_torch_get_layout(tensor.get(), &layout);
    FUSED_RNN_CHECK(layout == aoti_torch_layout_strided(), name, " must be strided");
    return tensor;
  }
  if (tensor.is_contiguous()) {
    require_storage(tensor, name, numel);
    return tensor;
  }
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  require_storage(tensor, name, last + 1);
  return torch::stable::contiguous(tensor);
}

// The device that all tensors of a call are on.
class Place {
 public:
  Place() = default;  // the CPU
  explicit Place(const Tensor& tensor) {
    if (tensor.is_cpu()) return;
    is_cpu_ = false;
    aoti_torch_get_device_type(tensor.get(), &type_);
    index_ = tensor.get_device_index();
  }
  bool is_cpu() const { return is_cpu_; }
  int32_t type() const { return type_; }
  int32_t index() const { return index_; }
  bool holds(const Tensor& tensor) const {
    if (is_cpu_) return tensor.is_cpu();
    const Place other(tensor);
    return other.type_ == type_ && other.index_ == index_;
  }

 private:
  bool is_cpu_ = true;
  int32_t type_ = aoti_torch_device_type_cpu(), index_ = 0;
};

// Whether `tensor` has these sizes and this dtype and lies there; `dtype_of` is the argument that decides the dtype.
inline void require(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes, ScalarType dtype,
                    const Place& place = {}, const char* dtype_of = "x") {
  FUSED_RNN_CHECK(place.holds(tensor), name, " must be on ", place.is_cpu() ? "the CPU" : "the device of x");
  FUSED_RNN_CHECK(tensor.scalar_type() == dtype, name, " must have the dtype of ", dtype_of);
  const auto got = tensor.sizes();
  bool same = got.size() == sizes.size();
  size_t i = 0;
  for (int64_t size : sizes) same = same && got[i++] == size;
  FUSED_RNN_CHECK(same, name, " must have shape ", shape_text(sizes), ", got ", shape_text(got));
}

// `tensor`, contiguous, after `require`.
inline Tensor checked(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes, ScalarType dtype,
                      const Place& place = {}) {
  require(tensor, name, sizes, dtype, place);
  return contiguous(tensor, name);
}

inline OptionalTensor checked(const OptionalTensor& tensor, const char* name, std::initializer_list<int64_t> sizes,
                              ScalarType dtype, const Place& place = {}) {
  if (!tensor) return std::nullopt;
  return checked(*tensor, name, sizes, dtype, place);
}

// Refuses what no kernel takes.
inline void require_dtype(ScalarType dtype) {
  switch (dtype) {
#define FUSED_RNN_CASE(type, name) case ScalarType::type:
    FUSED_RNN_DTYPES(FUSED_RNN_CASE)
#undef FUSED_RNN_CASE
    return;
    default:
      fail("x must be float32, float64, bfloat16 or float16");
  }
}

inline const void* data(const Tensor& tensor) { return tensor.data_ptr(); }
inline const void* data(const OptionalTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

inline int32_t type_number(ScalarType dtype) {
  switch (dtype) {
#define FUSED_RNN_CASE(type, name) \
  case ScalarType::type:           \
    return aoti_torch_dtype_##name();
    FUSED_RNN_DTYPES(FUSED_RNN_CASE)
#undef FUSED_RNN_CASE
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    case ScalarType::Bool:
      return aoti_torch_dtype_bool();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    default:
      fail("no buffer has such a dtype");
  }
}

inline int64_t element_size(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::Long ? 8
         : dtype == ScalarType::Float || dtype == ScalarType::Int ? 4
         : dtype == ScalarType::Byte || dtype == ScalarType::Bool ? 1
                                                                  : 2;
}

// Straight through the C shim: torch::stable::empty boxes its arguments.
inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, const Place& place = {}) {
  int64_t strides[4];  // of no more dimensions than any buffer has
  int64_t stride = 1;
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    const int64_t size = sizes[i];
    FUSED_RNN_CHECK(size >= 0 && !__builtin_mul_overflow(stride, size > 1 ? size : 1, &stride), "a buffer of shape ",
                    shape_text(sizes), " is too large");
  }
  AtenTensorHandle handle;
  const AOTITorchError error = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                                        type_number(dtype), place.type(), place.index(), &handle);
  FUSED_RNN_CHECK(error == AOTI_TORCH_SUCCESS, "no memory for a buffer of shape ", shape_text(sizes));
  return Tensor(handle);
}

// Another view of a tensor's memory, `skipped` elements further on. torch::stable's operations go through the
// dispatcher.
inline Tensor viewed(const Tensor& tensor, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                     torch::headeronly::IntHeaderOnlyArrayRef strides, int64_t skipped) {
  AtenTensorHandle handle;
  const AOTITorchError error = aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()),
                                                              sizes.data(), strides.data(), skipped, &handle);
  FUSED_RNN_CHECK(error == AOTI_TORCH_SUCCESS, "no memory for a view");
  return Tensor(handle);
}

template <class To, class From>
bool convert_elements(const Tensor& to, const Tensor& from) {
  const From* const in = static_cast<const From*>(from.data_ptr());
  To* const out = static_cast<To*>(to.data_ptr());
  const int64_t count = from.numel();
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(in[i]);
  return true;
}
// Whether it has converted a tensor to another of the same shape: few numbers, for which torch's dispatcher takes
// longer than they do.
inline bool convert_few(const Tensor& to, const Tensor& from) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  constexpr int64_t kFew = 2048;
  if (from.numel() > kFew || !from.is_cpu() || !from.is_contiguous() || !to.is_contiguous()) return false;
  const ScalarType in = from.scalar_type(), out = to.scalar_type();
  if (out == ScalarType::Float && in == ScalarType::BFloat16) return convert_elements<float, BFloat16>(to, from);
  if (out == ScalarType::Float && in == ScalarType::Half) return convert_elements<float, Half>(to, from);
  if (out == ScalarType::BFloat16 && in == ScalarType::Float) return convert_elements<BFloat16, float>(to, from);
  if (out == ScalarType::Half && in == ScalarType::Float) return convert_elements<Half, float>(to, from);
  return false;
}
inline void convert(Tensor& to, const Tensor& from) {
  if (!convert_few(to, from)) torch::stable::copy_(to, from);
}

inline Tensor converted(const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() == dtype) return tensor;
  Tensor out = empty(tensor.sizes(), dtype, Place(tensor));
  convert(out, tensor);
  return out;
}

}  // namespace bindings
}  // namespace fused_rnn
