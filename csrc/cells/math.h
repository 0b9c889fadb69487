// sigmoid and tanh for any lane type V: a SIMD vector, a float or a double; at most 2 ulp from the exact value.
//
// Both come from one exponential of a negative number, e^t = 2^n (1 + p) with n = round(t / ln 2): a polynomial of
// |r| <= ln(2) / 2, no table, no branch, so a vector costs what a scalar costs. Keeping p apart from the 1 is what
// lets tanh be exact for small arguments. NaN stays NaN; +-inf saturate; results underflow gradually.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define FUSED_RNN_INLINE __host__ __device__ __forceinline__
#else
#define FUSED_RNN_INLINE inline __attribute__((always_inline))
#endif

namespace fused_rnn {
namespace math {

template <class V, class = void>
struct Lane {  // a GCC/Clang vector type
  using Scalar = std::remove_cv_t<std::remove_reference_t<decltype(V{}[0])>>;
  using Int = decltype(V{} < V{});
};
template <class V>
struct Lane<V, std::enable_if_t<std::is_floating_point<V>::value>> {
  using Scalar = V;
  using Int = std::conditional_t<sizeof(V) == 4, int32_t, int64_t>;
};

template <class T>
struct Ieee;  // constants of a floating-point format
template <>
struct Ieee<float> {
  static constexpr int32_t kOne = 0x3f800000, kSign = INT32_MIN;
  static constexpr int kMantissa = 23;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kExpLowest = -104.0f;  // below it e^t rounds to 0
  static constexpr int kTerms = 7;              // Taylor terms of e^r - 1: the next is below 0.2 ulp
};
template <>
struct Ieee<double> {
  static constexpr int64_t kOne = 0x3ff0000000000000, kSign = INT64_MIN;
  static constexpr int kMantissa = 52;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kExpLowest = -746.0;
  static constexpr int kTerms = 13;
};

template <class To, class From>
FUSED_RNN_INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits() keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

constexpr double factorial(int n) { return n < 2 ? 1.0 : n * factorial(n - 1); }

// e^t = 2^n (1 + p) for t <= 0. `n` comes as the bits of 1.5 * 2^mantissa + n.
template <class V>
struct Exponential {
  typename Lane<V>::Int n;
  V p;
};

template <int kTerm, class V>
FUSED_RNN_INLINE V taylor(const V& r) {  // sum over k >= kTerm of r^(k - kTerm) / k!
  using T = typename Lane<V>::Scalar;
  constexpr T coefficient = T(1.0 / factorial(kTerm));
  if constexpr (kTerm == Ieee<T>::kTerms) {
    return V{} + coefficient;
  } else {
    return taylor<kTerm + 1>(r) * r + coefficient;
  }
}

template <class V>
FUSED_RNN_INLINE Exponential<V> exponential(const V& t) {
  using T = typename Lane<V>::Scalar;
  using F = Ieee<T>;
  const V shifted = t * T(1.4426950408889634) + F::kRound;
  const V n = shifted - F::kRound;
  const V r = (t - n * F::kLn2High) - n * F::kLn2Low;
  return {bits<typename Lane<V>::Int>(shifted), r + (r * r) * taylor<2>(r)};
}

template <class V, class I>
FUSED_RNN_INLINE V power_of_two(const I& n) {  // n as in Exponential; the constant's own bits are shifted out
  using F = Ieee<typename Lane<V>::Scalar>;
  return bits<V>((n << F::kMantissa) + F::kOne);
}

template <class V>
FUSED_RNN_INLINE V negative_magnitude(const V& x) {
  using F = Ieee<typename Lane<V>::Scalar>;
  return bits<V>(bits<typename Lane<V>::Int>(x) | F::kSign);
}

template <class V>
FUSED_RNN_INLINE V sigmoid(const V& x) {
  using T = typename Lane<V>::Scalar;
  using I = typename Lane<V>::Int;
  V t = negative_magnitude(x);
  t = t < Ieee<T>::kExpLowest ? V{} + Ieee<T>::kExpLowest : t;
  const Exponential<V> e = exponential(t);
  // 2^n may be subnormal: scale in two halves, whose exponents are normal.
  const I n = e.n - bits<I>(V{} + Ieee<T>::kRound), half = n >> 1;
  const V exp_t = (e.p + T(1)) * power_of_two<V>(half) * power_of_two<V>(n - half);
  return (x < T(0) ? exp_t : V{} + T(1)) / (exp_t + T(1));
}

template <class V>
FUSED_RNN_INLINE V tanh(const V& x) {
  using T = typename Lane<V>::Scalar;
  using I = typename Lane<V>::Int;
  using F = Ieee<T>;
  V t = negative_magnitude(x) * T(2);
  t = t < T(-40) ? V{} + T(-40) : t;  // |tanh| rounds to 1 long before
  const Exponential<V> e = exponential(t);
  const V scale = power_of_two<V>(e.n);
  const V expm1 = scale * e.p + (scale - T(1));
  const V magnitude = expm1 / (T(-2) - expm1);
  return bits<V>((bits<I>(magnitude) & ~F::kSign) | (bits<I>(x) & F::kSign));
}

// Derivatives, from the function's own value y.
template <class V>
FUSED_RNN_INLINE V sigmoid_slope(const V& y) {
  return y - y * y;
}
template <class V>
FUSED_RNN_INLINE V tanh_slope(const V& y) {
  return typename Lane<V>::Scalar(1) - y * y;
}

template <class V>
FUSED_RNN_INLINE V relu(const V& x) {  // relu(NaN) = NaN, as torch.relu
  using T = typename Lane<V>::Scalar;
  return x <= T(0) ? V{} : x;
}

}  // namespace math
}  // namespace fused_rnn
