// What the operators need of torch: checked tensors and allocation.
//
// Only LibTorch's stable ABI is used, so that one binary runs on every torch from 2.10 on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fused_rnn {
namespace bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws what Python sees as a RuntimeError.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "fused_rnn: ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

// A macro, so that the message is only made when it is needed: these checks run on every call.
#define FUSED_RNN_CHECK(condition, ...) \
  if (!(condition)) ::fused_rnn::bindings::fail(__VA_ARGS__)

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

// A tensor's storage may have been resized behind its back; torch does not look.
inline void require_storage(const Tensor& tensor, const char* name, int64_t elements) {
  int64_t bytes = 0;
  aoti_torch_get_storage_size(tensor.get(), &bytes);
  FUSED_RNN_CHECK(tensor.storage_offset() + elements <= bytes / static_cast<int64_t>(tensor.element_size()), name,
                  " reaches beyond the end of its storage");
}

inline Tensor contiguous(const Tensor& tensor, const char* name) {
  const int64_t numel = tensor.numel();
  if (numel == 0) return tensor;
  if (tensor.is_contiguous()) {
    require_storage(tensor, name, numel);
    return tensor;
  }
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  require_storage(tensor, name, last + 1);
  return torch::stable::contiguous(tensor);
}

// `tensor`, contiguous, after checking that it has these sizes and x's dtype.
inline Tensor checked(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  FUSED_RNN_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  FUSED_RNN_CHECK(tensor.scalar_type() == dtype, name, " must have the dtype of x");
  const auto got = tensor.sizes();
  bool same = got.size() == sizes.size();
  size_t i = 0;
  for (int64_t size : sizes) same = same && got[i++] == size;
  FUSED_RNN_CHECK(same, name, " must have shape ", shape_text(sizes), ", got ", shape_text(got));
  return contiguous(tensor, name);
}

inline OptionalTensor checked(const OptionalTensor& tensor, const char* name, std::initializer_list<int64_t> sizes,
                              ScalarType dtype) {
  if (!tensor) return std::nullopt;
  return checked(*tensor, name, sizes, dtype);
}

inline const void* data(const Tensor& tensor) { return tensor.data_ptr(); }
inline const void* data(const OptionalTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

inline int32_t type_number(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_float32();
  }
}

// Straight through the C shim: torch::stable::empty boxes its arguments.
inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
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
                                                        type_number(dtype), aoti_torch_device_type_cpu(), 0, &handle);
  FUSED_RNN_CHECK(error == AOTI_TORCH_SUCCESS, "no memory for a buffer of shape ", shape_text(sizes));
  return Tensor(handle);
}

inline Tensor converted(const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() == dtype) return tensor;
  Tensor out = empty(tensor.sizes(), dtype);
  torch::stable::copy_(out, tensor);
  return out;
}

// Memory for the length of one call. Little lies on the stack. What is more is kept for the thread's next call, up to
// kKept bytes: fresh memory from the system costs a page fault every 4 KB, for small layers more than the arithmetic.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes <= static_cast<int64_t>(sizeof(local_))) {
      data_ = local_;
    } else if (bytes <= kKept) {
      if (kept().size < bytes) kept() = Kept(bytes);
      data_ = kept().data;
    } else {
      heap_ = empty({(bytes + 3) / 4}, ScalarType::Float);  // torch aligns to 64 bytes, too
      data_ = static_cast<char*>(heap_->data_ptr());
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  char* data() const { return data_; }

 private:
  static constexpr int64_t kKept = 64 << 20;

  struct Kept {
    int64_t size = 0;
    char* data = nullptr;

    Kept() = default;
    explicit Kept(int64_t bytes) : size((bytes + 63) / 64 * 64) {
      data = static_cast<char*>(std::aligned_alloc(64, size));
      FUSED_RNN_CHECK(data, "no memory for ", size, " bytes of scratch");
    }
    Kept& operator=(Kept&& other) noexcept {
      std::swap(size, other.size);
      std::swap(data, other.data);
      return *this;
    }
    ~Kept() { std::free(data); }
  };
  static Kept& kept() {
    static thread_local Kept of_thread;
    return of_thread;
  }

  alignas(64) char local_[8192];
  OptionalTensor heap_;
  char* data_;
};

}  // namespace bindings
}  // namespace fused_rnn
