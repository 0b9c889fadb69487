// Column sums of a matrix: the biases' gradients. Rows are summed in short runs and the runs' sums added, so that
// rounding grows with the number of runs and the length of one, not with their product.
#pragma once

#include "tile.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// W vectors of columns at once, so that a row's visit reads whole cache lines side by side.
template <int W, class T>
FUSED_RNN_INLINE void column_block(const T* x, int64_t rows, int64_t stride, T* sums, int64_t count) {
  constexpr int64_t kRun = 64, n = kLanes<T>;
  Vec<T> total[W] = {};
  for (int64_t begin = 0; begin < rows; begin += kRun) {
    const int64_t end = begin + kRun < rows ? begin + kRun : rows;
    Vec<T> run[W] = {};
    for (int64_t row = begin; row < end; ++row) {
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) run[w] += load(x + row * stride + w * n, W == 1 ? count : n);
    }
    for (int w = 0; w < W; ++w) total[w] += run[w];
  }
  for (int w = 0; w < W; ++w) store(sums + w * n, total[w], W == 1 ? count : n);
}

template <class T>
void column_sums(const T* x, int64_t rows, int64_t columns, int64_t stride, T* sums) {
  constexpr int64_t n = kLanes<T>;
  int64_t column = 0;
  for (; column + 8 * n <= columns; column += 8 * n) column_block<8>(x + column, rows, stride, sums + column, n);
  for (; column < columns; column += n) {
    column_block<1>(x + column, rows, stride, sums + column, columns - column < n ? columns - column : n);
  }
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
