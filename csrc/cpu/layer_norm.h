// Layer normalisation of one row (Ba, Kiros and Hinton 2016), forward and backward.
//
// One thread has the whole row. Each function reads it two or three times, because it stays in the first-level cache.
#pragma once

#include "../rnn_params.h"
#include "vec.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

template <class T>
FUSED_RNN_INLINE T sum_of_lanes(const Vec<T>& v) {
  T sum = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

// row = (row - mean) * rstd, where rstd = 1 / sqrt(variance + eps) is returned.
template <class T>
T normalise(T* row, int64_t n) {
  Vec<T> sums{}, squares{};
  each_lanes<T>(n, [&](int64_t i, int64_t count) { sums += load(row + i, count); });
  const T mean = sum_of_lanes<T>(sums) / T(n);
  each_lanes<T>(n, [&](int64_t i, int64_t count) {
    const Vec<T> centred = load(row + i, count) - mean;
    store(row + i, centred, count);
    const Vec<T> valid = load(row + i, count);  // zero in the lanes beyond the row
    squares += valid * valid;
  });
  const T rstd = T(1) / __builtin_sqrt(double(sum_of_lanes<T>(squares) / T(n)) + kNormEps);
  each_lanes<T>(n, [&](int64_t i, int64_t count) { store(row + i, load(row + i, count) * rstd, count); });
  return rstd;
}

// Backward of gain * hat with hat = normalise(row): `grad` is the gradient of the result, `out` that of the row. They
// may be the same.
template <class T>
void normalise_backward(T* out, const T* grad, const T* gain, const T* hat, T rstd, int64_t n) {
  Vec<T> sums{}, products{};
  each_lanes<T>(n, [&](int64_t i, int64_t count) {
    const Vec<T> g = load(grad + i, count) * load(gain + i, count);
    sums += g;
    products += g * load(hat + i, count);
  });
  const T mean = sum_of_lanes<T>(sums) / T(n), slope = sum_of_lanes<T>(products) / T(n);
  each_lanes<T>(n, [&](int64_t i, int64_t count) {
    const Vec<T> g = load(grad + i, count) * load(gain + i, count);
    store(out + i, (g - mean - load(hat + i, count) * slope) * rstd, count);
  });
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
