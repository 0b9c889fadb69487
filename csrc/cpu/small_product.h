// Small matrix products, where a BLAS call costs more than its arithmetic, and products with a few rows.
#pragma once

#include "kernels.h"
#include "tile.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

template <class T>
FUSED_RNN_INLINE T sum_of_lanes(const Vec<T>& v) {
  T sum = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

// R rows of out from b whose rows are contiguous: out[m] += a(m, k) * b[k], a vector of columns at a time.
template <int R, class T>
void product_by_rows(const cpu::Matrix& out, const cpu::Matrix& a, const cpu::Matrix& b, int64_t m, bool accumulate) {
  constexpr int64_t n = kLanes<T>;
  const T* a_at = static_cast<const T*>(a.data) + m * a.row_stride;
  const T* b_at = static_cast<const T*>(b.data);
  T* out_at = static_cast<T*>(out.data) + m * out.row_stride;
  for (int64_t column = 0; column < out.columns; column += n) {
    const int64_t count = out.columns - column < n ? out.columns - column : n;
    Vec<T> acc[R] = {};
    for (int64_t k = 0; k < a.columns; ++k) {
      const Vec<T> row = load(b_at + k * b.row_stride + column, count);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r] += a_at[r * a.row_stride + k * a.column_stride] * row;
    }
    for (int r = 0; r < R; ++r) {
      T* to = out_at + r * out.row_stride + column;
      store(to, accumulate ? acc[r] + load(to, count) : acc[r], count);
    }
  }
}

// R rows of out from a transposed b: dot products of contiguous rows, four columns at a time.
template <int R, class T>
void product_by_dots(const cpu::Matrix& out, const cpu::Matrix& a, const cpu::Matrix& b, int64_t m, bool accumulate) {
  constexpr int64_t n = kLanes<T>;
  constexpr int C = 4;
  const int64_t K = a.columns;
  const T* a_at = static_cast<const T*>(a.data) + m * a.row_stride;
  const T* b_at = static_cast<const T*>(b.data);
  T* out_at = static_cast<T*>(out.data) + m * out.row_stride;
  for (int64_t column = 0; column < out.columns; column += C) {
    const int64_t width = out.columns - column < C ? out.columns - column : C;
    const T* rows[C];
    for (int64_t c = 0; c < C; ++c) rows[c] = b_at + (column + (c < width ? c : 0)) * b.column_stride;
    Vec<T> acc[R][C] = {};
    for (int64_t k = 0; k < K; k += n) {
      const int64_t count = K - k < n ? K - k : n;
      Vec<T> x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = load(a_at + r * a.row_stride + k, count);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const Vec<T> w = load(rows[c] + k, count);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r][c] += x[r] * w;
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int64_t c = 0; c < width; ++c) {
        T* to = out_at + r * out.row_stride + column + c;
        *to = sum_of_lanes<T>(acc[r][c]) + (accumulate ? *to : 0);
      }
    }
  }
}

// out = a b or out += a b. out's columns are contiguous; either b's are, or b's rows and a's columns are.
template <class T>
void small_product(const cpu::Matrix& out, const cpu::Matrix& a, const cpu::Matrix& b, bool accumulate) {
  int64_t m = 0;
  if (b.column_stride == 1) {
    for (; m + 4 <= out.rows; m += 4) product_by_rows<4, T>(out, a, b, m, accumulate);
    for (; m < out.rows; ++m) product_by_rows<1, T>(out, a, b, m, accumulate);
  } else {
    for (; m + 2 <= out.rows; m += 2) product_by_dots<2, T>(out, a, b, m, accumulate);
    for (; m < out.rows; ++m) product_by_dots<1, T>(out, a, b, m, accumulate);
  }
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
