#include "tensors.h"

namespace fused_rnn {
namespace bindings {

namespace {

Tensor view(const Matrix& m, ScalarType dtype) {
  const int64_t sizes[2] = {m.rows, m.columns};
  const int64_t strides[2] = {m.transposed ? 1 : m.stride, m.transposed ? m.stride : 1};
  return torch::stable::from_blob(m.data, {sizes, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

}  // namespace

void product(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate) {
  const Tensor c = view(out, dtype);
  const AOTITorchError error =
      accumulate ? aoti_torch_cpu_addmm_out(c.get(), c.get(), view(a, dtype).get(), view(b, dtype).get(), 1.0, 1.0)
                 : aoti_torch_cpu_mm_out(c.get(), view(a, dtype).get(), view(b, dtype).get());
  check(error == AOTI_TORCH_SUCCESS, "the matrix product failed");
}

}  // namespace bindings
}  // namespace fused_rnn
