// Column sums of a matrix: the biases' gradients. Rows are summed in short runs and the runs' sums added, so that
// rounding grows with the number of runs and the length of one, not with their product.
#pragma once

#include "tile.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

template <class T>
void column_sums(const T* x, int64_t rows, int64_t columns, int64_t stride, T* sums) {
  constexpr int64_t kRun = 64;
  for (int64_t column = 0; column < columns; column += kLanes<T>) {
    const int64_t n = columns - column < kLanes<T> ? columns - column : kLanes<T>;
    Vec<T> total{};
    for (int64_t begin = 0; begin < rows; begin += kRun) {
      const int64_t end = begin + kRun < rows ? begin + kRun : rows;
      Vec<T> run{};
      for (int64_t row = begin; row < end; ++row) run += load(x + row * stride + column, n);
      total += run;
    }
    store(sums + column, total, n);
  }
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
