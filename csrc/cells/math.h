// sigmoid and tanh for any lane type V: a SIMD vector, a float or a double; at most 2.5 ulp from the exact value.
//
// Both come from one exponential, e^t = 2^n (1 + p) with n = round(t / ln 2): a polynomial of
// |r| <= ln(2) / 2, no table, no branch, so a vector costs what a scalar costs. Keeping p apart from the 1 is what
// lets tanh be exact for small arguments. NaN stays NaN, +-inf saturate; a subnormal sigmoid is 0, as torch's.
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
  static constexpr float kExpLimit = 88.0f;  // |t| up to which 2^n neither overflows nor counts
  static constexpr int kTerms = 8;           // Taylor terms of e^r - 1: the next is far below an ulp
};
template <>
struct Ieee<double> {
  static constexpr int64_t kOne = 0x3ff0000000000000, kSign = INT64_MIN;
  static constexpr int kMantissa = 52;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kExpLimit = 709.0;
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

// e^t = 2^n (1 + p). `n` comes as the bits of 1.5 * 2^mantissa + n.
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
FUSED_RNN_INLINE V clamp(const V& x, typename Lane<V>::Scalar lowest, typename Lane<V>::Scalar highest) {
  const V y = x < lowest ? V{} + lowest : x;  // NaN fails both comparisons and stays
  return y > highest ? V{} + highest : y;
}

template <class V>
FUSED_RNN_INLINE V sigmoid(const V& x) {
  using T = typename Lane<V>::Scalar;
  constexpr T kLimit = Ieee<T>::kExpLimit;
  const Exponential<V> e = exponential(clamp(-x, -kLimit, kLimit));
  const V scale = power_of_two<V>(e.n);
  const V one_plus_exp = scale * e.p + (scale + T(1));
  return x < -kLimit ? V{} : T(1) / one_plus_exp;
}

template <class V>
FUSED_RNN_INLINE V tanh(const V& x) {
  using T = typename Lane<V>::Scalar;
  using I = typename Lane<V>::Int;
  using F = Ieee<T>;
  const V magnitude = bits<V>(bits<I>(x) & ~F::kSign);
  const Exponential<V> e = exponential(clamp(magnitude * T(2), T(0), T(40)));  // |tanh| rounds to 1 long before 20
  const V scale = power_of_two<V>(e.n);
  const V expm1 = scale * e.p + (scale - T(1));
  const V y = expm1 / (expm1 + T(2));
  return bits<V>(bits<I>(y) | (bits<I>(x) & F::kSign));
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
