// Element types: how values are stored, in which type the cell computes, and how the tensor cores multiply: bf16 and
// fp16 directly, float32 rounded to TF32, all with float32 sums.
//
// A block publishes its results for other blocks as 32-bit words of one or two elements.
#pragma once

#include "../cells/math.h"
#include "device.h"

namespace fused_rnn {
namespace cuda {

// A word that no block has published yet. It cannot be a published value: it is a NaN with its sign bit set, and the
// conversions clear the sign bit of every NaN.
constexpr uint32_t kNotReady = 0xffffffffu;

struct Bf16 {
  using Stored = uint16_t;
  using Arithmetic = float;
  FUSED_RNN_DEVICE static float value(Stored bits) { return from_bf16(bits); }
  FUSED_RNN_DEVICE static Stored stored(float value) { return bf16_bits(value); }
  FUSED_RNN_DEVICE static uint32_t operand(uint32_t word) { return word; }
  FUSED_RNN_DEVICE static void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bf16(sums, a, b0, b1);
  }
};

struct Fp16 {
  using Stored = uint16_t;
  using Arithmetic = float;
  FUSED_RNN_DEVICE static float value(Stored bits) { return from_fp16(bits); }
  FUSED_RNN_DEVICE static Stored stored(float value) { return fp16_bits(value); }
  FUSED_RNN_DEVICE static uint32_t operand(uint32_t word) { return word; }
  FUSED_RNN_DEVICE static void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_fp16(sums, a, b0, b1);
  }
};

struct Tf32 {
  using Stored = float;
  using Arithmetic = float;
  FUSED_RNN_DEVICE static float value(Stored value) { return value; }
  FUSED_RNN_DEVICE static Stored stored(float value) { return value; }
  FUSED_RNN_DEVICE static uint32_t operand(uint32_t word) { return tf32_bits(math::bits<float>(word)); }
  FUSED_RNN_DEVICE static void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_tf32(sums, a, b0, b1);
  }
};

struct Float32 {  // without tensor cores
  using Stored = float;
  using Arithmetic = float;
  FUSED_RNN_DEVICE static float value(Stored value) { return value; }
  FUSED_RNN_DEVICE static Stored stored(float value) { return value; }
};

struct Float64 {
  using Stored = double;
  using Arithmetic = double;
  FUSED_RNN_DEVICE static double value(Stored value) { return value; }
  FUSED_RNN_DEVICE static Stored stored(double value) { return value; }
};

// Element `index` of an array; zero if the pointer is null.
template <class E>
FUSED_RNN_DEVICE typename E::Arithmetic value_or_zero(const void* at, int64_t index) {
  return at ? E::value(static_cast<const typename E::Stored*>(at)[index]) : typename E::Arithmetic(0);
}
template <class E>
FUSED_RNN_DEVICE void store_value(void* at, int64_t index, typename E::Arithmetic value) {
  static_cast<typename E::Stored*>(at)[index] = E::stored(value);
}

// An element that is loaded before it is needed; zero until load(). Only value() waits for the load, so that the loads
// of many elements are in flight together. A conversion or a branch behind each would make them wait for each other.
template <class E>
class Early {
 public:
  FUSED_RNN_DEVICE void load(const void* at, int64_t index) {
    bits_ = static_cast<const typename E::Stored*>(at)[index];
  }
  FUSED_RNN_DEVICE typename E::Arithmetic value() const {
    typename E::Stored bits = bits_;
    not_before(bits);
    return E::value(bits);
  }

 private:
  typename E::Stored bits_{};
};

template <class E>
constexpr int kElementsPerWord = 4 / sizeof(typename E::Stored);

// Packs the values of a warp's lanes, which are those of neighbouring units, into words. All lanes of the warp must
// call these functions.
//
// The word that begins with this lane's value; of two lanes that share a word, the first one has it.
template <class E>
FUSED_RNN_DEVICE uint32_t packed_word(float value) {
  if constexpr (kElementsPerWord<E> == 2) {
    const float next = shuffle_xor(value, 1);
    return E::stored(value) | static_cast<uint32_t>(E::stored(next)) << 16;
  } else {
    return tf32_bits(value);
  }
}
template <class E>
FUSED_RNN_DEVICE bool has_word() {
  return thread_index() % kElementsPerWord<E> == 0;
}
// The 16 bytes that contain this lane's value; every lane has them.
template <class E>
FUSED_RNN_DEVICE Words packed_words(float value) {
  const uint32_t word = packed_word<E>(value);
  Words v{{has_word<E>() ? word : word >> 16 | word << 16}};
  FUSED_RNN_UNROLL
  for (int words = 1; words < 4; words *= 2) {
    const int lanes = words * kElementsPerWord<E>;
    const bool upper = thread_index() & lanes;
    FUSED_RNN_UNROLL
    for (int i = 0; i < words; ++i) {
      const uint32_t own = v.w[i], other = shuffle_xor(own, lanes);
      v.w[i] = upper ? other : own, v.w[i + words] = upper ? own : other;
    }
  }
  return v;
}

}  // namespace cuda
}  // namespace fused_rnn
