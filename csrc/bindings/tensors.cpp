#include "tensors.h"

namespace fused_rnn {
namespace bindings {

namespace {

Tensor view(const cpu::Matrix& m, ScalarType dtype) {
  const int64_t sizes[2] = {m.rows, m.columns};
  const int64_t strides[2] = {m.row_stride, m.column_stride};
  const int32_t type = dtype == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64();
  AtenTensorHandle handle;
  const AOTITorchError error =
      aoti_torch_create_tensor_from_blob(m.data, 2, sizes, strides, 0, type, aoti_torch_device_type_cpu(), 0, &handle);
  FUSED_RNN_CHECK(error == AOTI_TORCH_SUCCESS, "a matrix of ", m.rows, " x ", m.columns, " could not be viewed");
  return Tensor(handle);
}

// Whether a call of BLAS would cost more than it saves: little arithmetic, or so few rows that reading b is all of it.
bool is_small(const cpu::Matrix& out, const cpu::Matrix& a, const cpu::Matrix& b) {
  const double work = double(out.rows) * double(out.columns) * double(a.columns);
  const bool by_dots = b.column_stride != 1;
  if (by_dots && a.column_stride != 1) return false;
  return work < (by_dots && out.rows <= 2 ? 1 << 19 : 1 << 15);
}

template <class T>
void add(const cpu::Matrix& out, const void* terms) {
  const T* term = static_cast<const T*>(terms);
  for (int64_t m = 0; m < out.rows; ++m) {
    T* row = static_cast<T*>(out.data) + m * out.row_stride;
    for (int64_t n = 0; n < out.columns; ++n) row[n] += *term++;
  }
}

}  // namespace

void product(const cpu::Matrix& out, const cpu::Matrix& a, const cpu::Matrix& b, ScalarType dtype, bool accumulate) {
  if (is_small(out, a, b)) {
    cpu::kernels().small_product(dtype == ScalarType::Float ? Dtype::kFloat32 : Dtype::kFloat64, out, a, b, accumulate);
    return;
  }
  // BLAS adds every term to what out holds, with the rounding of the whole sum each time: add its result instead.
  const Tensor c = accumulate ? empty({out.rows, out.columns}, dtype) : view(out, dtype);
  const AOTITorchError error = aoti_torch_cpu_mm_out(c.get(), view(a, dtype).get(), view(b, dtype).get());
  FUSED_RNN_CHECK(error == AOTI_TORCH_SUCCESS, "the matrix product failed");
  if (accumulate && dtype == ScalarType::Float) add<float>(out, c.data_ptr());
  if (accumulate && dtype == ScalarType::Double) add<double>(out, c.data_ptr());
}

}  // namespace bindings
}  // namespace fused_rnn
