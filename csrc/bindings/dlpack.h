// Of DLPack 1.x (https://dmlc.github.io/dlpack), what reads a tensor of a Python class that offers its C functions in
// `__dlpack_c_exchange_api__`. The layout is fixed for a major version.
#pragma once

#include <cstdint>

namespace fused_rnn {
namespace dlpack {

constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2;

struct Tensor {  // DLTensor
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;  // of the element's type
  uint16_t lanes;
  int64_t *shape, *strides;  // strides in elements; null: contiguous
  uint64_t byte_offset;
};

struct ExchangeApi {  // DLPackExchangeAPI
  uint32_t major, minor;
  ExchangeApi* older;
  void *allocator, *managed_from_object, *object_from_managed;
  // Lends the tensor of a Python object until control is returned. 0, or -1 with a Python exception set; may be null.
  int (*tensor_from_object)(void* object, Tensor* out);
};

}  // namespace dlpack
}  // namespace fused_rnn
