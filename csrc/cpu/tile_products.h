// Products on eight tile registers: the hardware's (amx.cpp) or the software's (emulated_tiles.cpp).
//
// A tile of sums is ready for its next product about 52 cycles after the last, which takes 16 (or, with the same tile
// of b as the product before, one for each row of a), and a tile of an operand loads in 8 from the first-level cache.
// So several tiles of sums take turns, and an operand's tile is loaded only where the registers do not hold it. Each
// sum is built in the same sequence of products, so that its bits do not depend on what is computed beside it.
//
// Tiles: configure(rows, first_b) gives the registers below first_b that many rows; load<t>(from, stride),
// store<t>(to, stride) with strides in bytes; zero<t>(); dot<c, a, b>() and dot_digits<c, a, b>(): c += a b.
#pragma once

#include <type_traits>

#include "tiles.h"

namespace fused_rnn {
namespace cpu {

// Calls f with the constants begin, ..., end - 1: a register's number must be a constant.
template <int begin, int end, class F>
inline __attribute__((always_inline)) void each(const F& f) {
  if constexpr (begin < end) {
    f(std::integral_constant<int, begin>());
    each<begin + 1, end>(f);
  }
}

// bfloat16: R x N tiles of sums at `column`. The sums have the first registers, then come those of a, one for each of
// its tiles if there are enough, and those of b. The tiles of a take turns there and back, so that the last one of a
// column is the first one of the next.
template <class Tiles, int R, int N>
void multiply(Tiles& tiles, const Bf16Product& p, int64_t column) {
  constexpr int kA = R * N, kAs = kA + R < 8 ? R : 1, kB = kA + kAs, kBs = 8 - kB < N ? 8 - kB : N;
  tiles.configure(p.rows, kB);
  float* const sums = p.sums + column;
  const int64_t across = p.stride * sizeof(float);
  const auto place = [&](int i) { return sums + i / N * p.rows * p.stride + i % N * kTileWidth; };
  each<0, R * N>([&](auto i) { tiles.template load<i>(place(i), across); });
  const int64_t columns = (p.columns + kTileWidth - 1) / kTileWidth, a_tile = p.rows * kBf16Depth, depth = p.depth();
  const Bf16 *a = p.a, *b = p.b + column / kTileWidth * kBf16Tile;
  for (int64_t k = 0; k < depth; ++k, a += a_tile, b += columns * kBf16Tile) {
    each<0, N>([&](auto n) {
      tiles.template load<kB + n % kBs>(b + n * kBf16Tile, kTileBytes);
      each<0, R>([&](auto turn) {
        constexpr int r = n % 2 ? R - 1 - turn : turn;
        constexpr bool held = n > 0 && (kAs == R || turn == 0);
        if constexpr (!held) tiles.template load<kA + r % kAs>(a + r * depth * a_tile, kTileBytes);
        tiles.template dot<r * N + n, kA + r % kAs, kB + n % kBs>();
      });
    });
  }
  each<0, R * N>([&](auto i) { tiles.template store<i>(place(i), across); });
}

// R tiles of rows. Two by four would leave no registers for the operands: they are multiplied in halves.
template <class Tiles, int R, int N = 4>
void multiply_columns(Tiles& tiles, const Bf16Product& p) {
  if constexpr (N > 1) {
    if (p.columns < N * kTileWidth) return multiply_columns<Tiles, R, N - 1>(tiles, p);
  }
  constexpr int kAtOnce = R * N < 8 ? N : N / 2;
  for (int n = 0; n < N; n += kAtOnce) multiply<Tiles, R, kAtOnce>(tiles, p, n * kTileWidth);
}

// Any product of bfloat16 whose columns fill their tiles.
template <class Tiles>
void multiply_tiles(Tiles& tiles, const Bf16Product& p) {
  p.tiles == 1 ? multiply_columns<Tiles, 1>(tiles, p) : multiply_columns<Tiles, 2>(tiles, p);
}

// D digits in L levels. The D + 1 sums have the first registers: the last of D levels has two, which take turns. Then
// come those of a, where as many of its digits as fit wait for their next product; b has the last one. Each digit of b
// meets those of a, first upwards, then always downwards, so that it begins with what the registers hold.
template <class Tiles, int D, int L>
void multiply_digits(Tiles& tiles, const DigitProduct& p) {
  constexpr int kA = D + 1, kB = 7, kAs = kB - kA;
  const int64_t a_tile = p.rows * kTileBytes;
  tiles.configure(p.rows, kB);
  each<0, D + 1>([&](auto sum) { tiles.template zero<sum>(); });
  const int8_t *a = p.a, *b = p.b;
  for (int k = 0; k < p.depth; ++k, a += p.planes * a_tile, b += p.planes * kDigitTile) {
    each<0, D>([&](auto j) {
      tiles.template load<kB>(b + j * kDigitTile, kTileBytes);
      constexpr int kMet = L - j < D ? L - j : D;
      each<0, kMet>([&](auto turn) {
        constexpr int i = j == 0 ? turn : kMet - 1 - turn, sum = i + j == D - 1 && L == D ? i + j + j % 2 : i + j;
        constexpr bool held = j > 1 || (j == 1 && i >= D - kAs);
        if constexpr (!held) tiles.template load<kA + i % kAs>(a + i * a_tile, kTileBytes);
        tiles.template dot_digits<sum, kA + i % kAs, kB>();
      });
    });
  }
  each<0, D + 1>([&](auto sum) { tiles.template store<sum>(p.sums + sum * kTileHeight * kTileWidth, kTileBytes); });
}

template <class Tiles>
void multiply_tile(Tiles& tiles, const DigitProduct& p) {
  p.products == 6   ? multiply_digits<Tiles, 3, 3>(tiles, p)
  : p.products == 8 ? multiply_digits<Tiles, 3, 4>(tiles, p)
                    : multiply_digits<Tiles, 4, 4>(tiles, p);
}

}  // namespace cpu
}  // namespace fused_rnn
