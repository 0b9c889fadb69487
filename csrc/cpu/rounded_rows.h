// Rows of float32 rounded to 16-bit integers, for the products with int8 weights in frozen.h: x = scale * integer, with
// the largest magnitude of a row at kLevels. A row is rounded once, for all blocks of weights that it is multiplied by.
// One with a NaN or an infinity gives NaN.
#pragma once

#include "integers.h"
#include "tile.h"
#include "worker.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// Whether bytes are multiplied, not pairs of 16 bits.
inline bool has_vnni() {
#if FUSED_RNN_VEC_BYTES == 64
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

constexpr int64_t kDepth8 = 512;  // values of k whose products are summed as integers
constexpr float kLevels = 32767;
static_assert(127.0 * kLevels * kDepth8 < 2147483648.0, "integer sums must not overflow");

class RoundedRows {
 public:
  // Elements of memory, in float32, for `rows` rows of K numbers.
  static int64_t size(int64_t rows, int64_t K) { return rows * row_bytes(K) / int64_t(sizeof(float)); }

  RoundedRows() = default;
  // For rows from `begin` on of those that the memory is for. Takes what SplitRows takes.
  RoundedRows(float* memory, int64_t, int64_t begin, int64_t, int64_t K, Operands, float = 0)
      : memory_(reinterpret_cast<int8_t*>(memory)), begin_(begin), K_(K), bytes_(row_bytes(K)) {}

  // Rounds rows [begin, end), of which this worker does its share if `shared`. row(b) points to row b.
  template <class Row>
  void split(int64_t end, const cpu::Worker& worker, bool shared, const Row& row) const {
    const int64_t count = end - begin_;
    const int64_t first = shared ? worker.begin(count) : 0, last = shared ? worker.end(count) : count;
    for (int64_t b = begin_ + first; b < begin_ + last; ++b) round(row(b), memory_ + b * bytes_);
  }

  static int height() { return 0; }  // they are not in tiles
  float scale(int64_t row) const { return load_as<float>(memory_ + row * bytes_); }
  // Of the chunk that begins at k: 16-bit integers; or with VNNI the high bytes of them plus 2^15, and width() bytes
  // behind each the low one.
  const int8_t* integers(int64_t row, int64_t k) const { return memory_ + row * bytes_ + kHead + 2 * k; }
  // Values that a chunk of `depth` has room for: all of it in whole cache lines.
  static constexpr int64_t width(int64_t depth) { return ceil_div(depth, kHead / 2) * (kHead / 2); }

 private:
  static constexpr int64_t kHead = 64;  // a cache line, which begins with the scale

  static int64_t row_bytes(int64_t K) { return kHead + width(K) * 2; }  // chunks but the last one have kDepth8

  void round(const float* x, int8_t* out) const {
    Largest largest;
    each_lanes<float>(K_, [&](int64_t k, int64_t n) { largest.add(load(x + k, n)); });
    const float most = largest.all();
    constexpr float kLeast = kLevels * 1.2e-38f;  // below it the inverse would overflow: the row counts as zeros
    const bool counts = most > kLeast;            // not if it is NaN
    const float inverse = counts ? kLevels / most : 0;
    store_as(out, most - most + (counts ? most / kLevels : 0));  // most - most is NaN if it is not finite
    // The bits of a float that is so large that its unit is 1.
    constexpr float kRound = math::Ieee<float>::kRound;
    const bool bytes = has_vnni();
    each_lanes<float>(K_, [&](int64_t k, int64_t n) {
      const Ints integers = (Ints)(load(x + k, n) * inverse + kRound) - (Ints)(Vec<float>{} + kRound);
      const int64_t i = k % kDepth8, begin = k - i;
      int8_t* const chunk = out + kHead + 2 * begin;
      if (bytes) {
        const Ints positive = integers + 32768;
        store_as(chunk + i, __builtin_convertvector(positive >> 8, QuarterBytes));
        store_as(chunk + width(least(kDepth8, K_ - begin)) + i, __builtin_convertvector(positive, QuarterBytes));
      } else {
        store_as(chunk + 2 * i, __builtin_convertvector(integers, HalfShorts));
      }
    });
  }

  int8_t* memory_ = nullptr;
  int64_t begin_ = 0, K_ = 0, bytes_ = 0;
};

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
