// How rows and columns of float32 become digits of 8 bits (tiles.h), and how many digits their products need.
//
// Three digits are as exact as float32's own product if no number is much of its row or column (products_needed). Where
// one is, four digits are multiplied, if the operands have them. An error of theirs is 2^-32 of the largest products,
// which is below the rounding of any sum that has them. It is not if every large number meets small weights, as those
// of a feature in other units do. So inputs are watched: where the largest products could matter to a gate, float32's
// own product is taken (kMostOfGates).
#pragma once

#include "integers.h"
#include "tiles.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

constexpr float kLargestOfDigits = 0x1p60f, kLeastColumn = 0x1p-88f;

// What is asked of a row or a column before it becomes digits.
struct Extent {
  float largest = 0;  // infinite or NaN if a number is
  float share = 0;    // of the largest in the root of the sum of squares; 1 if that is beyond float32

  Extent() = default;
  Extent(float most, float squares) : largest(most) {
    if (most > 0) share = squares > 0 && squares < __builtin_inff() ? most / __builtin_sqrtf(squares) : 1;
  }
  static Extent of(const float* row, int64_t K) {
    Largest largest;
    Vec<float> squares{};
    each_lanes<float>(K, [&](int64_t k, int64_t n) {
      const Vec<float> v = load(row + k, n);
      largest.add(v);
      squares += v * v;
    });
    float sum = 0;
    for (int64_t i = 0; i < kLanes<float>; ++i) sum += squares[i];
    return {largest.all(), sum};
  }

  bool fits() const { return largest <= kLargestOfDigits; }  // not if it is NaN
};
// How many products of digits (tiles.h) rows and columns of K numbers with these shares need. The rounding of three
// digits is 2^-24 of the largest numbers, against which a sum of K products of usual size rounds by some sqrt(K) 2^-24:
// hence the sum of the squares. What 6 products leave out of 8, digits 1 times digits 2, is 2^-24 of the largest
// product each: hence the shares' product. Measured: errors are then at most twice those of MKL's sgemm.
inline int products_needed(float row, float column, int64_t K) {
  const float r = row * row, c = column * column;
  if (r + c > 0.25f) return 10;
  return row + column <= 0.5f && r * c * float(K) <= 1 ? 6 : 8;
}

// How numbers become integers of digits. The factor that they are multiplied with has 8 bits, so that the product with
// it and its inverse round by half of float32's last place at most. It may be beyond float32, hence two factors.
struct DigitScale {
  float first = 0, second = 0;  // zeros, if all numbers are zeros
  float unit = 0;               // what 128 is in the first digit: about the largest number

  DigitScale() = default;
  DigitScale(float largest, int digits) {
    if (!(largest >= 0x1p-126f)) return;  // zeros to the kernels
    const float places = digits == 4 ? 0x1p24f : 0x1p16f;
    first = largest < 0x1p-60f ? 0x1p64f : 1;
    second = math::bits<float>(math::bits<uint32_t>(127 * places / (largest * first)) & 0xffff0000);
    unit = 128 * places / second / first;
  }
};

// Numbers as integers of digits. A float32 has one bit more than three digits, so that the fourth is often exactly half
// of the third's unit: 128, which as a byte is -128 and one more of the third. Left out, it would round all of these
// up, and a row's numbers would err together. So where the third digit is even, 127 takes its place.
template <class Factor>
FUSED_RNN_INLINE Ints integers(const Vec<float>& v, const Factor& first, const Factor& second, int digits) {
  const Ints integers = nearest(v * first * second);
  return digits == 4 ? integers + ((integers & 511) == 128) : integers;
}
// The low byte is the last digit; this leaves the digits before it.
FUSED_RNN_INLINE Ints without_last_digit(const Ints& integers) { return (integers + 128) >> 8; }

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
