// sigmoid and tanh for any lane type V: a SIMD vector, a float or a double; at most 2 ulp from the exact value.
//
// Both use one exponential, e^t = 2^n (1 + p) with n = round(t / ln 2) and a polynomial p of |r| <= ln(2) / 2. It has
// no table and no branch, so that a vector takes as many instructions as a scalar. p is kept separate from the 1, which
// makes tanh accurate for small arguments; the rounding error of adding 1 or 2 is computed and corrected. NaN stays
// NaN, infinities saturate, and a sigmoid that would be subnormal is 0, as in torch.
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
  static constexpr int32_t kSign = INT32_MIN;
  static constexpr int kMantissa = 23;
  static constexpr float kBias = 127;           // of the exponent
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kExpLimit =
      88.0f;  // clamp of |t|: below it 2^n does not overflow, beyond it sigmoid saturates
  // (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2: minimax polynomial with an error of 2^-30.
  static constexpr float kExp[] = {0.5f, 0.16666666f, 0.04166636f, 0.0083333924f, 0.0013940848f, 0.00019843827f};
};
template <>
struct Ieee<double> {
  static constexpr int64_t kSign = INT64_MIN;
  static constexpr int kMantissa = 52;
  static constexpr double kBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kExpLimit = 709.0;
  static constexpr double kExp[] = {1.0 / 2,       1.0 / 6,         1.0 / 24,        1.0 / 120,
                                    1.0 / 720,     1.0 / 5040,      1.0 / 40320,     1.0 / 362880,
                                    1.0 / 3628800, 1.0 / 39916800., 1.0 / 479001600, 1.0 / 6227020800};  // Taylor
};

template <class To, class From>
FUSED_RNN_INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits() keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// (e^r - 1 - r) / r^2, from term kTerm on. Horner's rule on pairs of terms: its chain is half as long. Processors look
// ahead only so far, and a shorter chain lets them compute more activations at a time.
template <int kTerm = 0, class V>
FUSED_RNN_INLINE V exp_polynomial(const V& r, const V& r2) {
  using F = Ieee<typename Lane<V>::Scalar>;
  const V pair = r * F::kExp[kTerm + 1] + F::kExp[kTerm];
  if constexpr (kTerm + 2 == sizeof(F::kExp) / sizeof(F::kExp[0])) {
    return pair;
  } else {
    return exp_polynomial<kTerm + 2>(r, r2) * r2 + pair;
  }
}

template <class V>
struct Exponential {  // 2^n (1 + p)
  V power, p;
};

// e^t for t = kFactor x, which takes no operation of its own.
template <int kFactor, class V>
FUSED_RNN_INLINE Exponential<V> exponential(const V& x) {
  using T = typename Lane<V>::Scalar;
  using I = typename Lane<V>::Int;
  using F = Ieee<T>;
  constexpr T kShift = F::kRound + F::kBias;
  const V shifted = x * T(kFactor * 1.4426950408889634) + kShift;
  const V n = shifted - kShift, t = kFactor == 2 ? x + x : x * T(kFactor);
  const V r = (t - n * F::kLn2High) - n * F::kLn2Low;
  const V r2 = r * r;
  const V power = bits<V>(bits<I>(shifted) << F::kMantissa);  // of the bits of kShift + n, n + kBias stays
  return {power, r2 * exp_polynomial(r, r2) + r};
}

// Maximum and minimum; they return b if a or b is NaN, as the x86 instructions do.
template <class V>
struct Extremes {
  static FUSED_RNN_INLINE V larger(const V& a, const V& b) { return a > b ? a : b; }
  static FUSED_RNN_INLINE V smaller(const V& a, const V& b) { return a < b ? a : b; }
};

// At most 0.6 ulp from the exact quotient if that and the divisor are normal. Processors may have a faster way than to
// divide.
template <class V>
struct Quotient {
  static FUSED_RNN_INLINE V of(const V& a, const V& b) { return a / b; }
  // a / (b + lost), where b is a + 2, and lost what rounding it lost.
  static FUSED_RNN_INLINE V of(const V& a, const V& b, const V& lost) {
    using T = typename Lane<V>::Scalar;
    const V quotient = a / b;
    const V inverse = Extremes<V>::larger(V{}, T(0.5) - T(0.6) * quotient);  // about 1 / b; 0 where it has no effect
    return quotient - (quotient * lost) * inverse;
  }
};

template <class V>
FUSED_RNN_INLINE V sigmoid(const V& x) {
  using T = typename Lane<V>::Scalar;
  constexpr T kLimit = Ieee<T>::kExpLimit;
  const V t = Extremes<V>::smaller(V{} + kLimit, Extremes<V>::larger(V{} - kLimit, x));
  const Exponential<V> e = exponential<-1>(t);
  const V rounded = e.power + T(1);
  const V lost = (e.power - rounded) + T(1);  // rounding error of power + 1
  const V one_plus_exp = (e.power * e.p + lost) + rounded;
  return x < -kLimit ? V{} : Quotient<V>::of(V{} + T(1), one_plus_exp);
}

template <class V>
FUSED_RNN_INLINE V tanh(const V& x) {
  using T = typename Lane<V>::Scalar;
  using I = typename Lane<V>::Int;
  using F = Ieee<T>;
  const V magnitude = bits<V>(bits<I>(x) & ~F::kSign);
  const V t = Extremes<V>::smaller(V{} + T(20), magnitude);  // from there on, tanh rounds to 1
  const Exponential<V> e = exponential<2>(t);
  const V expm1 = e.power * e.p + (e.power - T(1));
  const V rounded = expm1 + T(2);
  const V lost = expm1 - (rounded - T(2));  // rounding error of expm1 + 2; beyond 2^23 it no longer matters
  const V y = Quotient<V>::of(expm1, rounded, lost);
  return bits<V>(bits<I>(y) | (bits<I>(x) & F::kSign));
}

// Derivatives as functions of the result y.
template <class V>
FUSED_RNN_INLINE V sigmoid_slope(const V& y) {
  return y - y * y;
}
template <class V>
FUSED_RNN_INLINE V tanh_slope(const V& y) {
  return typename Lane<V>::Scalar(1) - y * y;
}

// a where the weight is 0, b where it is 1.
template <class V>
FUSED_RNN_INLINE V between(const V& a, const V& b, const V& weight) {
  return a + weight * (b - a);
}

template <class V>
FUSED_RNN_INLINE V relu(const V& x) {  // relu(NaN) = NaN, as torch.relu
  using T = typename Lane<V>::Scalar;
  return x <= T(0) ? V{} : x;
}

}  // namespace math
}  // namespace fused_rnn
