// The SIMD vector of one instruction set: a GCC/Clang vector type of FUSED_RNN_VEC_BYTES bytes.
//
// The compiler provides arithmetic, comparison and selection. This file adds loads and stores (whole, and partial for
// the last units of a row), minimum and maximum, and, for packing and dot products, the transpose and the sums of
// lanes. Every function is in the namespace of the instruction set or specialised on its vector type, because the
// linker keeps only one copy of an inline function: a shared one might use instructions that the machine lacks. This
// requires that no two instruction sets have vectors of the same width.
#pragma once

#include <cstdint>

#include "../cells/math.h"
#include "../rnn_params.h"
#include "registers.h"

#if FUSED_RNN_VEC_BYTES >= 32
#include <immintrin.h>
#endif

namespace fused_rnn {
namespace FUSED_RNN_ISA {

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(FUSED_RNN_VEC_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(FUSED_RNN_VEC_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
constexpr int64_t kLanes = FUSED_RNN_VEC_BYTES / sizeof(T);

template <class T>
FUSED_RNN_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
FUSED_RNN_INLINE void store(T* p, const Vec<T>& v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// The bits of a vector of float32, and as many numbers of bfloat16.
typedef uint32_t Bits __attribute__((vector_size(FUSED_RNN_VEC_BYTES)));
typedef Bf16 Halves __attribute__((vector_size(FUSED_RNN_VEC_BYTES / 2)));

// Numbers of bfloat16, as float32. Of __builtin_convertvector GCC 12 makes five instructions, not one.
FUSED_RNN_INLINE Vec<float> load(const Bf16* p) {
  Halves halves;
  __builtin_memcpy(&halves, p, sizeof(halves));
#if FUSED_RNN_VEC_BYTES == 64
  const Bits bits = (Bits)_mm512_cvtepu16_epi32((__m256i)halves);
#elif FUSED_RNN_VEC_BYTES == 32
  const Bits bits = (Bits)_mm256_cvtepu16_epi32((__m128i)halves);
#else
  const Bits bits = __builtin_convertvector(halves, Bits);
#endif
  return (Vec<float>)(bits << 16);
}

#if FUSED_RNN_VEC_BYTES == 64
FUSED_RNN_INLINE Vec<float> load_first(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
FUSED_RNN_INLINE Vec<double> load_first(const double* p, int64_t n) {
  return (Vec<double>)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
}
FUSED_RNN_INLINE void store_first(float* p, const Vec<float>& v, int64_t n) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
}
FUSED_RNN_INLINE void store_first(double* p, const Vec<double>& v, int64_t n) {
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
}
#elif FUSED_RNN_VEC_BYTES == 32
FUSED_RNN_INLINE __m256i first_lanes32(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FUSED_RNN_INLINE __m256i first_lanes64(int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
FUSED_RNN_INLINE Vec<float> load_first(const float* p, int64_t n) {
  return (Vec<float>)_mm256_maskload_ps(p, first_lanes32(n));
}
FUSED_RNN_INLINE Vec<double> load_first(const double* p, int64_t n) {
  return (Vec<double>)_mm256_maskload_pd(p, first_lanes64(n));
}
FUSED_RNN_INLINE void store_first(float* p, const Vec<float>& v, int64_t n) {
  _mm256_maskstore_ps(p, first_lanes32(n), (__m256)v);
}
FUSED_RNN_INLINE void store_first(double* p, const Vec<double>& v, int64_t n) {
  _mm256_maskstore_pd(p, first_lanes64(n), (__m256d)v);
}
#else
template <class T>
FUSED_RNN_INLINE Vec<T> load_first(const T* p, int64_t n) {
  Vec<T> v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
template <class T>
FUSED_RNN_INLINE void store_first(T* p, const Vec<T>& v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
#endif

// Loads or stores the first n lanes, n in [0, kLanes]. A load sets the others to zero; their memory is not accessed.
template <class T>
FUSED_RNN_INLINE Vec<T> load(const T* p, int64_t n) {
  return n == kLanes<T> ? load(p) : load_first(p, n);
}
FUSED_RNN_INLINE Vec<float> load(const Bf16* p, int64_t n) {
  Bf16 first[kLanes<float>] = {};
  for (int64_t i = 0; i < n; ++i) first[i] = p[i];
  return load(first);
}
template <class T>
FUSED_RNN_INLINE void store(T* p, const Vec<T>& v, int64_t n) {
  if (n == kLanes<T>) {
    store(p, v);
  } else {
    store_first(p, v, n);
  }
}

}  // namespace FUSED_RNN_ISA

#if FUSED_RNN_VEC_BYTES >= 32
namespace math {
#define FUSED_RNN_EXTREMES(T, prefix, suffix)                                              \
  template <>                                                                              \
  struct Extremes<FUSED_RNN_ISA::Vec<T>> {                                                 \
    using V = FUSED_RNN_ISA::Vec<T>;                                                       \
    static FUSED_RNN_INLINE V larger(V a, V b) { return (V)prefix##_max_##suffix(a, b); }  \
    static FUSED_RNN_INLINE V smaller(V a, V b) { return (V)prefix##_min_##suffix(a, b); } \
  };
#if FUSED_RNN_VEC_BYTES == 64
FUSED_RNN_EXTREMES(float, _mm512, ps)
FUSED_RNN_EXTREMES(double, _mm512, pd)

// The divider takes 16 cycles for a vector of floats, and an LSTM would keep it busy for longer than the rest of its
// arithmetic takes. A reciprocal of 14 bits and one step of Newton's method do not wait for it.
template <>
struct Quotient<FUSED_RNN_ISA::Vec<float>> {
  using V = FUSED_RNN_ISA::Vec<float>;
  static FUSED_RNN_INLINE V of(const V& a, const V& b) {
    const V inverse = (V)_mm512_rcp14_ps(b), about = a * inverse;
    return improved(about, less(a, about, b), inverse);
  }
  static FUSED_RNN_INLINE V of(const V& a, const V& b, const V& lost) {
    const V inverse = (V)_mm512_rcp14_ps(b), about = a * inverse;
    return improved(about, less(less(a, about, b), about, lost), inverse);
  }

 private:
  static FUSED_RNN_INLINE V improved(V about, V missing, V inverse) {
    return (V)_mm512_fmadd_ps(missing, inverse, about);
  }
  static FUSED_RNN_INLINE V less(V a, V b, V c) { return (V)_mm512_fnmadd_ps(b, c, a); }  // a - b c, rounded once
};
#else
FUSED_RNN_EXTREMES(float, _mm256, ps)
FUSED_RNN_EXTREMES(double, _mm256, pd)
#endif
#undef FUSED_RNN_EXTREMES
}  // namespace math
#endif

namespace FUSED_RNN_ISA {

// a[offset], b[offset], a[offset + 1], b[offset + 1], ...
template <int offset, class T>
FUSED_RNN_INLINE Vec<T> interleave(const Vec<T>& a, const Vec<T>& b) {
#if defined(__clang__)
  Vec<T> v;
  for (int64_t i = 0; i < kLanes<T>; ++i) v[i] = (i % 2 ? b : a)[offset + i / 2];
  return v;
#else
  typename math::Lane<Vec<T>>::Int order;
  for (int64_t i = 0; i < kLanes<T>; ++i) order[i] = offset + i / 2 + (i % 2) * kLanes<T>;
  return __builtin_shuffle(a, b, order);
#endif
}

// Transposes m in place: interleaving the two halves of the rows log2(lanes) times gives the transpose.
template <class T>
FUSED_RNN_INLINE void transpose(Vec<T> (&m)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  for (int step = 1; step < n; step *= 2) {
    Vec<T> next[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave<0, T>(m[i], m[i + n / 2]);
      next[2 * i + 1] = interleave<n / 2, T>(m[i], m[i + n / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) m[i] = next[i];
  }
}

// Returns a vector whose lane i is the sum of the lanes of m[i]. It interleaves as transpose() does and adds the halves
// after each step. Overwrites m.
template <class T>
FUSED_RNN_INLINE Vec<T> sums_of_lanes(Vec<T> (&m)[kLanes<T>]) {
#pragma GCC unroll 8
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      m[i] = interleave<0, T>(m[i], m[i + half]) + interleave<kLanes<T> / 2, T>(m[i], m[i + half]);
    }
  }
  return m[0];
}

// Calls f(first, count) for each vector of a row of n elements; the last may be partial.
template <class T, class F>
FUSED_RNN_INLINE void each_lanes(int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += kLanes<T>) f(i, n - i < kLanes<T> ? n - i : kLanes<T>);
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
