// Layer normalisation of one row (Ba, Kiros and Hinton 2016), forward and backward.
//
// A row belongs to one thread and lies in the first-level cache: each function reads it two or three times.
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

// Calls f(first, count) for the vectors of n elements.
template <class T, class F>
FUSED_RNN_INLINE void each_lanes(int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += kLanes<T>) f(i, n - i < kLanes<T> ? n - i : kLanes<T>);
}

// row becomes (row - mean) / sqrt(variance + eps); returns the inverse of that root.
template <class T>
T normalise(T* row, int64_t n) {
  Vec<T> sums{}, squares{};
  each_lanes<T>(n, [&](int64_t i, int64_t count) { sums += load(row + i, count); });
  const T mean = sum_of_lanes<T>(sums) / T(n);
  each_lanes<T>(n, [&](int64_t i, int64_t count) {
    const Vec<T> centred = load(row + i, count) - mean;
    store(row + i, centred, count);
    const Vec<T> present = load(row + i, count);  // lanes behind the row are zero
    squares += present * present;
  });
  const T inverse = T(1) / __builtin_sqrt(double(sum_of_lanes<T>(squares) / T(n)) + kNormEps);
  each_lanes<T>(n, [&](int64_t i, int64_t count) { store(row + i, load(row + i, count) * inverse, count); });
  return inverse;
}

// The gradient of a row before normalise, from that of gain * hat: hat is the normalised row. May be in place.
template <class T>
void normalise_backward(T* out, const T* grad, const T* gain, const T* hat, T inverse, int64_t n) {
  Vec<T> sums{}, products{};
  each_lanes<T>(n, [&](int64_t i, int64_t count) {
    const Vec<T> g = load(grad + i, count) * load(gain + i, count);
    sums += g;
    products += g * load(hat + i, count);
  });
  const T mean = sum_of_lanes<T>(sums) / T(n), slope = sum_of_lanes<T>(products) / T(n);
  each_lanes<T>(n, [&](int64_t i, int64_t count) {
    const Vec<T> g = load(grad + i, count) * load(gain + i, count);
    store(out + i, (g - mean - load(hat + i, count) * slope) * inverse, count);
  });
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
