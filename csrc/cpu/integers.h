// Vectors of integers beside those of vec.h, and what rounding a row of float32 to integers needs to know of it.
#pragma once

#include "vec.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

typedef int32_t Ints __attribute__((vector_size(FUSED_RNN_VEC_BYTES)));
typedef int16_t Shorts __attribute__((vector_size(FUSED_RNN_VEC_BYTES)));
typedef int8_t HalfBytes __attribute__((vector_size(FUSED_RNN_VEC_BYTES / 2)));
typedef int16_t HalfShorts __attribute__((vector_size(FUSED_RNN_VEC_BYTES / 2)));
typedef uint8_t QuarterBytes __attribute__((vector_size(FUSED_RNN_VEC_BYTES / 4)));

template <class V>
FUSED_RNN_INLINE V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class V>
FUSED_RNN_INLINE void store_as(void* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
// The 32 bits at p in every lane.
FUSED_RNN_INLINE Ints broadcast(const void* p) { return load_as<int32_t>(p) - Ints{}; }

// The nearest integers, ties to even. v is in their range, or a NaN, which becomes any integer.
FUSED_RNN_INLINE Ints nearest(const Vec<float>& v) {
#if FUSED_RNN_VEC_BYTES == 64
  return (Ints)_mm512_cvtps_epi32((__m512)v);
#elif FUSED_RNN_VEC_BYTES == 32
  return (Ints)_mm256_cvtps_epi32((__m256)v);
#else
  Ints integers;
  for (int64_t i = 0; i < kLanes<float>; ++i) integers[i] = v[i] == v[i] ? int32_t(__builtin_rintf(v[i])) : 0;
  return integers;
#endif
}

// The largest magnitude among some numbers, infinite or NaN if one of them is: the bits of magnitudes have their order.
class Largest {
 public:
  FUSED_RNN_INLINE void add(const Vec<float>& v) {
    const Ints bits = (Ints)v & INT32_MAX;
    bits_ = bits > bits_ ? bits : bits_;
  }
  // Of each lane.
  Vec<float> lanes() const { return (Vec<float>)bits_; }
  // Of all lanes.
  float all() const {
    int32_t lanes[kLanes<float>];
    store_as(lanes, bits_);
    for (int half = kLanes<float> / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    }
    return math::bits<float>(lanes[0]);
  }

 private:
  Ints bits_{};
};

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
