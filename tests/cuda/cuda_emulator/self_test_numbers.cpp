// Checks the emulator's arithmetic: the matrix products of a warp and the conversions between number types.
//
// The references share no code with the emulator. They follow the definitions of the types, in double precision.
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "self_test.h"

namespace self_test {
namespace {

struct Product {
  const float *a, *b;  // [16][k], [8][k]
  float* c;            // [16][8]
  int type;            // 0: bf16, 1: fp16, 2: TF32
};

// Loads the fragments as the PTX manual describes them.
FUSED_RNN_KERNEL(32) multiply(Product p) {
  const int group = thread_index() >> 2, place = thread_index() & 3;
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = p.c[(i < 2 ? group : group + 8) * 8 + place * 2 + (i & 1)];
  uint32_t a[4], b[2];
  for (int i = 0; i < 6; ++i) {
    uint32_t& to = i < 4 ? a[i] : b[i - 4];
    const int row = i < 4 && i % 2 == 1 ? group + 8 : group;
    const bool upper = i == 2 || i == 3 || i == 5;
    if (p.type == 2) {
      const float value = (i < 4 ? p.a : p.b)[row * 8 + place + (upper ? 4 : 0)];
      to = tf32_bits(value) | 0x1fff;  // bits that the tensor cores ignore
    } else {
      const float* const from = (i < 4 ? p.a : p.b) + row * 16 + place * 2 + (upper ? 8 : 0);
      const auto bits = p.type == 0 ? bf16_bits : fp16_bits;
      to = bits(from[0]) | static_cast<uint32_t>(bits(from[1])) << 16;
    }
  }
  const auto mma = p.type == 0 ? mma_bf16 : p.type == 1 ? mma_fp16 : mma_tf32;
  mma(sums, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) p.c[(i < 2 ? group : group + 8) * 8 + place * 2 + (i & 1)] = sums[i];
}

}  // namespace

void test_products() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (int type = 0; type < 3; ++type) {
    const int depth = type == 2 ? 8 : 16;
    std::vector<float> a(16 * depth), b(8 * depth), c(16 * 8);
    for (auto* values : {&a, &b}) {
      for (float& value : *values) {
        value = normal(random);
        value = type == 0   ? from_bf16(bf16_bits(value))
                : type == 1 ? from_fp16(fp16_bits(value))
                            : emulation::same_bits<float>(tf32_bits(value));
      }
    }
    for (float& value : c) value = normal(random);
    std::vector<double> sums(c.begin(), c.end());
    for (int i = 0; i < 16 * 8; ++i) {
      for (int k = 0; k < depth; ++k) sums[i] += double(a[i / 8 * depth + k]) * b[i % 8 * depth + k];
    }
    expect_success("multiply", multiply, {1, 32, 0, false}, Product{a.data(), b.data(), c.data(), type});
    for (int i = 0; i < 16 * 8; ++i)
      expect(std::fabs(c[i] - sums[i]) < 1e-5, "product of type " + std::to_string(type));
  }
}

namespace {

// The nearest number of a format with `digits` bits after the leading one and the smallest normal number 2^lowest.
double nearest(double value, int digits, int lowest, bool ties_to_even, double largest) {
  if (value == 0 || std::isinf(value)) return value;
  const double unit = std::ldexp(1., std::max(std::ilogb(value), lowest) - digits);
  const double scaled = value / unit;
  const double rounded = (ties_to_even ? std::nearbyint(scaled) : std::round(scaled)) * unit;
  return std::fabs(rounded) > largest ? std::copysign(HUGE_VAL, value) : rounded;
}

}  // namespace

void test_conversions() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {  // every fp16 number, by its definition
    const int exponent = bits >> 10 & 31, digits = bits & 1023;
    double value = exponent == 0 ? std::ldexp(digits, -24) : std::ldexp(1024 + digits, exponent - 25);
    if (exponent == 31) value = digits == 0 ? HUGE_VAL : std::numeric_limits<double>::quiet_NaN();
    if (bits >> 15 != 0) value = -value;
    const float got = from_fp16(static_cast<uint16_t>(bits));
    const bool same = std::isnan(value) ? std::isnan(got) : got == value && std::signbit(got) == std::signbit(value);
    expect(same, "from_fp16 of " + std::to_string(bits));
    if (!std::isnan(value)) expect(fp16_bits(got) == bits, "fp16_bits of fp16 number " + std::to_string(bits));
  }
  std::mt19937 random(2);
  std::vector<uint32_t> numbers = {0, 1, 0x7f800000, 0x7f800001, 0x7fc00000, 0x7fffffff, 0x7f7fffff, 0x00400000};
  for (int exponent = 0; exponent < 255; ++exponent) {
    for (int i = 0; i < 64; ++i) {  // ties, their neighbours, and random numbers
      const uint32_t any = random();
      for (const int dropped : {13, 16}) {
        const uint32_t half = (any & 0x7fffff) >> dropped << dropped | 1u << (dropped - 1);
        for (const uint32_t tie : {half - 1, half, half + 1}) numbers.push_back(exponent << 23 | tie);
      }
      numbers.push_back(exponent << 23 | (any & 0x7fffff));
    }
    for (int shift = 0; shift < 23; ++shift) numbers.push_back(exponent << 23 | 1u << shift);
  }
  for (const uint32_t number : numbers) {
    for (const uint32_t sign : {0u, 0x80000000u}) {
      const float value = emulation::same_bits<float>(number | sign);
      const std::string what = std::to_string(value) + " (" + std::to_string(number | sign) + ")";
      if (std::isnan(value)) {
        expect(bf16_bits(value) == 0x7fff && fp16_bits(value) == 0x7fff && tf32_bits(value) == 0x7fffffff, what);
        continue;
      }
      const float bf16 = from_bf16(bf16_bits(value)), fp16 = from_fp16(fp16_bits(value));
      const float tf32 = emulation::same_bits<float>(tf32_bits(value));
      expect(bf16 == nearest(value, 7, -126, true, 0x1.fep127), "bf16 of " + what);
      expect(fp16 == nearest(value, 10, -14, true, 65504), "fp16 of " + what);
      expect(tf32 == nearest(value, 10, -126, false, 0x1.ffcp127), "TF32 of " + what);
      expect((tf32_bits(value) & 0x1fff) == 0, "the unused bits of TF32");
      const bool negative = std::signbit(value);
      expect(std::signbit(bf16) == negative && std::signbit(fp16) == negative && std::signbit(tf32) == negative, what);
    }
  }
}

}  // namespace self_test
