// What one instruction set offers: the table that its wrapper file fills and dispatch.cpp chooses from.
#pragma once

#include "../rnn_params.h"
#include "worker.h"

namespace fused_rnn {
namespace cpu {

// A matrix in somebody's memory; strides in elements.
struct Matrix {
  void* data;
  int64_t rows, columns;
  int64_t row_stride;
  int64_t column_stride = 1;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};

struct Kernels {
  const char* name;
  int64_t vector_bytes;
  // One worker's part of one direction (0, or 1 for the reverse one).
  void (*forward)(const ForwardParams& params, int64_t direction, const Worker& worker);
  void (*backward)(const BackwardParams& params, int64_t direction, const Worker& worker);
  // Elements of a direction's workspace, enough for either.
  int64_t (*workspace_size)(const LayerShape& shape);
  // out = a b, or out += a b; out's columns are contiguous, and b's, or b's rows and a's columns.
  void (*small_product)(Dtype dtype, const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate);
  // sums[columns] = the sum of x's rows [rows, columns], `stride` apart.
  void (*column_sums)(Dtype dtype, const void* x, int64_t rows, int64_t columns, int64_t stride, void* sums);
  // y[i] = f(x[i]) for the accuracy tests; `function` is 's'igmoid or 't'anh.
  void (*map_float)(char function, const float* x, float* y, int64_t n);
  void (*map_double)(char function, const double* x, double* y, int64_t n);
};

extern const Kernels kPortable;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace cpu
}  // namespace fused_rnn
