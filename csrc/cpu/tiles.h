// Products of float32 by instructions that multiply narrower numbers, several times as many at once.
//
// kBfloat16: both operands are rounded to bfloat16; products are added in float32 (AMX, AVX512-BF16).
//
// kDigits4, kDigits3: float32's accuracy from products of 8-bit integers (AMX). Every row of the left operand and every
// column of the right one is scaled, so that its largest number is about 127 x 256^(D - 1), and rounded to integers of
// D = 4 or 3 digits: v = sum over i of digit i x 256^(D - 1 - i), each digit from -128 to 127. Of the products of
// digits i and j those of i + j < D are computed, 10 or 6, or 8 of three digits, i + j < 4: the others are below the
// rounding. Their sums are integers and exact, one for each i + j (a level); only the sum of the levels is rounded.
// Ootomo, Ozaki and Yokota (2024), "DGEMM on Integer Matrix Multiplication Unit", https://arxiv.org/abs/2306.11975.
//
// Four digits lose what is below 2^-31 of the largest number, three what is below 2^-23 of it. When that is as little
// as the rounding of float32's own sums, digits.h finds out.
//
// The operands lie in tiles as AMX's instructions load them: up to 16 rows of 64 bytes. A tile of the left one has rows
// of consecutive k. A row of a tile of the right one has, for each of 16 columns, the 2 or 4 consecutive k that fill 32
// bits.
#pragma once

#include <cstdint>

#include "../rnn_params.h"

namespace fused_rnn {
namespace cpu {

constexpr int kTileHeight = 16, kTileWidth = 16, kTileBytes = 64;     // rows, 32-bit columns, bytes of a row
constexpr int kBf16Depth = kTileBytes / 2, kDigitDepth = kTileBytes;  // values of k in a tile
constexpr int kBf16Tile = kTileHeight * kBf16Depth, kDigitTile = kTileHeight * kDigitDepth;  // numbers in it
// Values of k whose sums are added up as integers: 4 x 2^14 x 256 is 2^24, so that float32 holds them. A part of an
// operand so deep stays in the first-level cache.
constexpr int kDigitRun = 256;
constexpr int kMostDigits = 4;
// The most that the largest numbers of a row of inputs and of the weights may be, multiplied with each other and with
// sqrt(K). The error of digits is then 2^-25 of a gate before its activation, with three digits 2^-17.
constexpr float kMostOfGates = 128;
constexpr int digits_of(Operands operands) {
  return operands == Operands::kDigits4 ? 4 : operands == Operands::kDigits3 ? 3 : 0;
}

// sums[r][c] += sum over k of a[r][k] * b[k][c], for one or two tiles of rows of bfloat16. The result of a row does not
// depend on the other rows, nor on how many there are.
struct Bf16Product {
  float* sums;      // [tiles * rows][stride]
  int64_t stride;   // elements from one row of sums to the next
  int columns;      // at most 4 * kTileWidth
  int tiles, rows;  // of a: one or two, of at most kTileHeight rows
  const Bf16* a;    // [tiles][depth][rows][kBf16Depth]
  const Bf16* b;    // [depth][tiles of columns][kTileHeight][kTileWidth][2]; zeros from k = K on
  int64_t K;

  int64_t depth() const { return (K + kBf16Depth - 1) / kBf16Depth; }  // in tiles
};

// The levels of one tile of sums: level n, [r][c], is the sum over k and over i + j = n of digit i of a[r][k] times
// digit j of b[k][c].
struct DigitProduct {
  // [4, or 5 of four digits][kTileHeight][kTileWidth], of which the first `rows` rows of each are written: the levels.
  // Of 6 and 10 products the last level has the most. Each waits for the one before, so that two sums take turns.
  int32_t* sums;
  int products;     // 6 or 8, of the first three digits, or 10, of four
  int planes;       // digits that a and b have
  int rows;         // of a, at most kTileHeight
  const int8_t* a;  // [depth][planes][rows][kDigitDepth]
  const int8_t* b;  // [depth][planes][kTileHeight][kTileWidth][4]
  int depth;        // tiles, at most kDigitRun / kDigitDepth
};

// What a thread has set up in its processor, between its first product and release().
struct TileState {
  int rows = 0, first_b = 0;
};

// The instructions of one kind of processor.
struct TileUnit {
  const char* name;
  bool (*available)();  // whether the operating system permits their use; the first call asks it to
  void (*multiply)(const Bf16Product& product, TileState& state);
  void (*multiply_digits)(const DigitProduct& product, TileState& state);  // null: not these
  void (*release)(TileState& state);  // to be called by each thread that has multiplied, before it returns
};

extern const TileUnit kEmulatedTiles;
#if defined(__x86_64__)
extern const TileUnit kAmxTiles;
extern const TileUnit kAvx512Bf16;
#endif

}  // namespace cpu
}  // namespace fused_rnn
