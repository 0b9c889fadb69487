// A product of split operands on eight tile registers: the hardware's (amx.cpp) or the software's (emulated_tiles.cpp).
//
// A tile of b stays while the tiles of a pass by: AMX takes 16 cycles for a product with a new b, and one for each row
// of a with the same b. Where all tiles of a at one k fit the registers, they are loaded once.
// In both orders each sum is built in the same sequence of products, so that its bits do not depend on the order.
#pragma once

#include <type_traits>

#include "bf16.h"

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

// How R x N tiles of sums, the tiles of a and those of b share the registers: sums first, then a's, and b's from
// kFirstB on.
template <int R, int N, int P>
struct Registers {
  static constexpr int kSums = R * N;
  static constexpr bool kAStays = kSums + R * P < 8;
  static constexpr int kA = kAStays ? R * P : kSums + R + N <= 8 ? R : 7 - kSums;
  static constexpr int kFirstB = kSums + kA, kB = 8 - kFirstB;
};

// Tiles: configure(rows, first_b) gives the registers below first_b that many rows; load<t>(from, stride),
// store<t>(to, stride) with strides in bytes; dot<c, a, b>(): c += a b.
template <class Tiles, int R, int N, int P>
void multiply(Tiles& tiles, const Bf16Product& p, int64_t column) {
  using Use = Registers<R, N, P>;
  constexpr int kBytes = kTileDepth * sizeof(Bf16);
  tiles.configure(p.rows, Use::kFirstB);
  float* const sums = p.sums + column;
  const int64_t across = p.stride * sizeof(float);
  each<0, Use::kSums>(
      [&](auto i) { tiles.template load<i>(sums + i / N * p.rows * p.stride + i % N * kTileWidth, across); });
  const int64_t columns = (p.columns + kTileWidth - 1) / kTileWidth, a_part = p.rows * kTileDepth;
  const int64_t depth = p.depth(), a_distance = depth * P * a_part, b_part = columns * kTileSize;
  const Bf16 *a = p.a, *b = p.b + column / kTileWidth * kTileSize;
  for (int64_t k = 0; k < depth; ++k, a += P * a_part, b += P * b_part) {
    if constexpr (Use::kAStays) {
      each<0, R * P>(
          [&](auto i) { tiles.template load<Use::kSums + i>(a + i / P * a_distance + i % P * a_part, kBytes); });
    }
    each<0, P>([&](auto pb) {
      each<0, N>([&](auto n) {
        constexpr int B = Use::kFirstB + (pb * N + n) % Use::kB;
        tiles.template load<B>(b + pb * b_part + n * kTileSize, kBytes);
        each<0, P - pb>([&](auto pa) {
          each<0, R>([&](auto r) {
            constexpr int A = Use::kSums + (Use::kAStays ? r * P + pa : r % Use::kA);
            if constexpr (!Use::kAStays) tiles.template load<A>(a + r * a_distance + pa * a_part, kBytes);
            tiles.template dot<r * N + n, A, B>();
          });
        });
      });
    });
  }
  each<0, Use::kSums>(
      [&](auto i) { tiles.template store<i>(sums + i / N * p.rows * p.stride + i % N * kTileWidth, across); });
}

// R tiles of rows. Two by four would leave no registers for the operands: they are multiplied in halves.
template <class Tiles, int R, int P, int N = 4>
void multiply_columns(Tiles& tiles, const Bf16Product& p) {
  if constexpr (N > 1) {
    if (p.columns < N * kTileWidth) return multiply_columns<Tiles, R, P, N - 1>(tiles, p);
  }
  constexpr int kAtOnce = R * N < 8 ? N : N / 2;
  for (int n = 0; n < N; n += kAtOnce) multiply<Tiles, R, kAtOnce, P>(tiles, p, n * kTileWidth);
}

template <class Tiles, int P>
void multiply_rows(Tiles& tiles, const Bf16Product& p) {
  p.tiles == 1 ? multiply_columns<Tiles, 1, P>(tiles, p) : multiply_columns<Tiles, 2, P>(tiles, p);
}

// Any product whose columns fill their tiles.
template <class Tiles>
void multiply_tiles(Tiles& tiles, const Bf16Product& p) {
  switch (p.parts) {
    case 1:
      return multiply_rows<Tiles, 1>(tiles, p);
    case 2:
      return multiply_rows<Tiles, 2>(tiles, p);
    default:
      return multiply_rows<Tiles, 3>(tiles, p);
  }
}

}  // namespace cpu
}  // namespace fused_rnn
