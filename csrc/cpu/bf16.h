// Products of float32 by instructions that multiply bfloat16 and add in float32 (AMX, AVX512-BF16).
//
// An operand is split into parts: a float32 is, but for its last bits, the sum of its value rounded to bfloat16, of the
// rest rounded to bfloat16, and so on. The product of two operands of P parts is the sum of the products of part i of
// one with part j of the other for i + j < P: one product for one part (bfloat16's own accuracy), three for two (16
// bits), six for three (float32's accuracy). Henry, Tang and Heinecke (2019), "Leveraging the bfloat16 Artificial
// Intelligence Datatype For Higher-Precision Computations", https://arxiv.org/abs/1904.06376.
//
// Both operands lie in tiles as AMX's instructions load them. A tile of the left one has up to kTileHeight rows of
// kTileDepth consecutive k. A tile of the right one has kTileDepth / 2 rows of kTileWidth pairs (k, k + 1).
#pragma once

#include <cstdint>

namespace fused_rnn {
namespace cpu {

using Bf16 = uint16_t;

constexpr int kTileHeight = 16, kTileWidth = 16, kTileDepth = 32;
constexpr int kTileSize = kTileDepth * kTileWidth;  // of a tile of the right operand
constexpr int kMostParts = 3;

// sums[r][c] += sum over k of a[r][k] * b[k][c], for one or two tiles of rows. The result of a row does not depend on
// the other rows, nor on how many there are.
struct Bf16Product {
  float* sums;      // [tiles * rows][stride]
  int64_t stride;   // elements from one row of sums to the next
  int columns;      // at most 4 * kTileWidth
  int tiles, rows;  // of a: one or two, of at most kTileHeight rows
  const Bf16* a;    // [tiles][depth()][parts][rows][kTileDepth]
  const Bf16* b;    // [depth()][parts][tiles of columns][kTileSize]; zeros from k = K on
  int64_t K;
  int parts;  // at most kMostParts

  int64_t depth() const { return (K + kTileDepth - 1) / kTileDepth; }  // in tiles
};

// What a thread has set up in its processor, between its first product and release().
struct Bf16State {
  int rows = 0, first_b = 0;
};

// The instructions of one kind of processor.
struct Bf16Unit {
  const char* name;
  int parts;            // the most parts that it is used for
  bool (*available)();  // whether the operating system permits their use; the first call asks it to
  void (*multiply)(const Bf16Product& product, Bf16State& state);
  void (*release)(Bf16State& state);  // to be called by each thread that has multiplied, before it returns
};

extern const Bf16Unit kEmulatedTiles;
#if defined(__x86_64__)
extern const Bf16Unit kAmxTiles, kAmxTilesForFloat32;
extern const Bf16Unit kAvx512Bf16;
#endif

}  // namespace cpu
}  // namespace fused_rnn
