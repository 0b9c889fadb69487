// AMX's tile registers in software, bit for bit: every line that AMX runs through can be tested on any machine.
//
// tdpbf16ps (Intel's Software Developer's Manual, volume 2), verified against a processor: for each sum two chains of
// fused multiply-adds, over the even and over the odd k, each from +0 in the order of k; then sum + (even + odd). All
// round to nearest even. Operands that are subnormal are zeros of their sign, and so are results that would be, judged
// after rounding as if the exponent had no limit. The first operand that is a NaN is the result, made quiet; an invalid
// operation gives the default NaN. The thread's own settings (MXCSR) have no part in it. tdpbssd adds integers, which
// has one result.
#include <cstring>
#include <initializer_list>

#include "tile_products.h"

namespace fused_rnn {
namespace cpu {

namespace {

uint32_t bits(float number) {
  uint32_t u;
  std::memcpy(&u, &number, sizeof(u));
  return u;
}
float number(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}
float widened(Bf16 half) { return number(static_cast<uint32_t>(half) << 16); }

constexpr uint32_t kSign = 0x80000000, kExponent = 0x7f800000, kQuiet = 0x00400000, kDefaultNan = 0xffc00000;

bool is_nan(float f) { return (bits(f) & ~kSign) > kExponent; }
float flushed(float f) { return bits(f) & kExponent ? f : number(bits(f) & kSign); }

float add(float a, float b) {
  a = flushed(a), b = flushed(b);
  if (is_nan(a)) return number(bits(a) | kQuiet);
  if (is_nan(b)) return number(bits(b) | kQuiet);
  const float sum = a + b;  // exact where it could be tiny
  return is_nan(sum) ? number(kDefaultNan) : flushed(sum);
}

float multiply_add(float a, float b, float c) {
  a = flushed(a), b = flushed(b), c = flushed(c);
  for (const float operand : {a, b, c}) {
    if (is_nan(operand)) return number(bits(operand) | kQuiet);
  }
  // The product of two bfloat16 numbers fits a float32 unless its exponent does not.
  const float product = a * b;
  const uint32_t magnitude = bits(product) & ~kSign;
  if (magnitude > bits(0x1p-100f) && magnitude < kExponent) return add(product, c);
  const float sum = __builtin_fmaf(a, b, c);
  if (is_nan(sum)) return number(kDefaultNan);
  if (__builtin_fabsf(sum) == 0x1p-126f && __builtin_fabsf(a) < 0x1p60f) {
    // Rounded up to the least normal number, or really not tiny? Scaled, it is rounded to the same number of bits.
    const float scaled = __builtin_fmaf(a * 0x1p60f, b, c * 0x1p60f);
    if (__builtin_fabsf(scaled) < 0x1p-66f) return number(bits(sum) & kSign);
  }
  return flushed(sum);
}

class Tiles {
 public:
  void configure(int rows, int first_b) {
    for (int t = 0; t < 8; ++t) rows_[t] = t < first_b ? rows : kTileHeight;
  }
  template <int t>
  void load(const void* from, int64_t stride) {
    for (int r = 0; r < rows_[t]; ++r)
      std::memcpy(of_[t].bytes[r], static_cast<const char*>(from) + r * stride, kTileBytes);
  }
  template <int t>
  void store(void* to, int64_t stride) {
    for (int r = 0; r < rows_[t]; ++r) std::memcpy(static_cast<char*>(to) + r * stride, of_[t].bytes[r], kTileBytes);
  }
  template <int t>
  void zero() {
    std::memset(of_[t].bytes, 0, sizeof(of_[t].bytes));
  }
  template <int c, int a, int b>
  void dot() {
    for (int m = 0; m < rows_[c]; ++m) {
      for (int n = 0; n < kTileWidth; ++n) {
        float even = 0, odd = 0;
        for (int k = 0; k < kBf16Depth; k += 2) {
          even = multiply_add(widened(of_[a].halves[m][k]), widened(of_[b].halves[k / 2][2 * n]), even);
          odd = multiply_add(widened(of_[a].halves[m][k + 1]), widened(of_[b].halves[k / 2][2 * n + 1]), odd);
        }
        of_[c].sums[m][n] = add(of_[c].sums[m][n], add(even, odd));
      }
    }
  }
  template <int c, int a, int b>
  void dot_digits() {
    for (int m = 0; m < rows_[c]; ++m) {
      for (int n = 0; n < kTileWidth; ++n) {
        for (int k = 0; k < kDigitDepth; ++k) {
          of_[c].levels[m][n] += of_[a].digits[m][k] * of_[b].digits[k / 4][4 * n + k % 4];
        }
      }
    }
  }

 private:
  union {
    char bytes[kTileHeight][kTileBytes];
    Bf16 halves[kTileHeight][kBf16Depth];
    float sums[kTileHeight][kTileWidth];
    int8_t digits[kTileHeight][kDigitDepth];
    int32_t levels[kTileHeight][kTileWidth];
  } of_[8];
  int rows_[8];
};

// Blocks of narrow vectors do not fill their tiles, so that the sums pass through memory that does.
void multiply(const Bf16Product& product, TileState&) {
  Tiles tiles;
  float sums[2 * kTileHeight][4 * kTileWidth] = {};
  const int rows = product.tiles * product.rows;
  Bf16Product whole = product;
  whole.sums = sums[0];
  whole.stride = 4 * kTileWidth;
  whole.columns = (product.columns + kTileWidth - 1) / kTileWidth * kTileWidth;
  for (int r = 0; r < rows; ++r)
    std::memcpy(sums[r], product.sums + r * product.stride, product.columns * sizeof(float));
  multiply_tiles(tiles, whole);
  for (int r = 0; r < rows; ++r)
    std::memcpy(product.sums + r * product.stride, sums[r], product.columns * sizeof(float));
}

void multiply_digits(const DigitProduct& product, TileState&) {
  Tiles tiles;
  multiply_tile(tiles, product);
}

}  // namespace

const TileUnit kEmulatedTiles = {"amx_emulated", [] { return true; }, multiply, multiply_digits, [](TileState&) {}};

}  // namespace cpu
}  // namespace fused_rnn
