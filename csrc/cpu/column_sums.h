// Column sums of a matrix, or of the elementwise product of two: the gradients of biases and of normalisation gains.
//
// Rows are summed in short runs, and then the sums of the runs, so that rounding errors grow with the number of runs
// plus the length of one, not with the number of rows.
#pragma once

#include "tile.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// Sums W vectors of columns together, so that each row is read in whole cache lines. `count` is the number of columns
// of a single vector (W == 1); wider blocks are full.
template <int W, class T>
FUSED_RNN_INLINE void column_block(const T* x, int64_t rows, int64_t stride, const T* by, int64_t by_stride, T* sums,
                                   int64_t count, bool accumulate) {
  constexpr int64_t kRun = 64, n = kLanes<T>;
  Vec<T> total[W] = {};
  for (int64_t begin = 0; begin < rows; begin += kRun) {
    const int64_t end = begin + kRun < rows ? begin + kRun : rows;
    Vec<T> run[W] = {};
    for (int64_t row = begin; row < end; ++row) {
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) {
        const int64_t columns = W == 1 ? count : n;
        const Vec<T> v = load(x + row * stride + w * n, columns);
        run[w] += by ? v * load(by + row * by_stride + w * n, columns) : v;
      }
    }
    for (int w = 0; w < W; ++w) total[w] += run[w];
  }
  for (int w = 0; w < W; ++w) {
    const int64_t columns = W == 1 ? count : n;
    store(sums + w * n, accumulate ? total[w] + load(sums + w * n, columns) : total[w], columns);
  }
}

// sums[c] = sum over the rows of x[row][c] * by[row][c], or of x[row][c] if `by` is null; += if `accumulate`.
template <class T>
void column_sums(const T* x, int64_t rows, int64_t columns, int64_t stride, const T* by, int64_t by_stride, T* sums,
                 bool accumulate) {
  constexpr int64_t n = kLanes<T>;
  for (int64_t column = 0; column < columns;) {
    const bool wide = column + 8 * n <= columns;
    const int64_t count = columns - column < n ? columns - column : n;
    const auto block = wide ? column_block<8, T> : column_block<1, T>;
    block(x + column, rows, stride, by ? by + column : nullptr, by_stride, sums + column, count, accumulate);
    column += wide ? 8 * n : n;
  }
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
