// A product of split operands on eight tile registers: the hardware's (amx.cpp) or the software's (emulated_tiles.cpp).
//
// A tile of sums is ready for its next product about 52 cycles after the last, which takes 16 (or, with the same tile
// of b as the product before, one for each row of a), and a tile of an operand loads in 8 from the first-level cache.
// So all tiles of sums take turns, and an operand's tile is loaded only where the registers do not hold it: Schedule
// finds out at compile time. Each sum is built in the same sequence of products, so that its bits do not depend on R
// and N.
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

// The products of one tile of k for R x N tiles of sums and P parts. The sums have the first registers, then come kA
// for a, and kB for b from kFirstB on.
template <int R, int N, int P>
struct Schedule {
  static constexpr int kSums = R * N;
  static constexpr int kA = kSums + R < 8 ? R : 1;
  static constexpr int kFirstB = kSums + kA, kB = 8 - kFirstB < N ? 8 - kFirstB : N;
  static constexpr int kDots = kSums * P * (P + 1) / 2;

  struct Dot {
    int r, n, part_a, part_b;
    bool loads_a, loads_b;

    constexpr int sum() const { return r * N + n; }
    constexpr int a() const { return kSums + r % kA; }
    constexpr int b() const { return kFirstB + n % kB; }
  };
  Dot dots[kDots] = {};

  // From one pair of parts to the next, one of the two changes. The sums take turns in the same order in each pair.
  constexpr Schedule() {
    int held[8] = {}, count = 0, part_a = 0;  // held: one more than the tile's index
    for (int part_b = P - 1; part_b >= 0; --part_b) {
      for (int i = 0; i < P - part_b; ++i) {
        if (i > 0) part_a = (part_a + 1) % (P - part_b);
        for (int n = 0; n < N; ++n) {
          for (int j = 0; j < R; ++j) {
            Dot& dot = dots[count++];
            dot = {n % 2 ? R - 1 - j : j, n, part_a, part_b, false, false};
            const int tile_a = 1 + dot.r * P + part_a, tile_b = 1 + n * P + part_b;
            dot.loads_a = held[dot.a()] != tile_a;
            dot.loads_b = held[dot.b()] != tile_b;
            held[dot.a()] = tile_a;
            held[dot.b()] = tile_b;
          }
        }
      }
    }
  }
};

// Tiles: configure(rows, first_b) gives the registers below first_b that many rows; load<t>(from, stride),
// store<t>(to, stride) with strides in bytes; dot<c, a, b>(): c += a b.
template <class Tiles, int R, int N, int P>
void multiply(Tiles& tiles, const Bf16Product& p, int64_t column) {
  static constexpr Schedule<R, N, P> kSchedule;
  constexpr int kBytes = kTileDepth * sizeof(Bf16);
  tiles.configure(p.rows, kSchedule.kFirstB);
  float* const sums = p.sums + column;
  const int64_t across = p.stride * sizeof(float);
  each<0, R * N>(
      [&](auto i) { tiles.template load<i>(sums + i / N * p.rows * p.stride + i % N * kTileWidth, across); });
  const int64_t columns = (p.columns + kTileWidth - 1) / kTileWidth, a_part = p.rows * kTileDepth;
  const int64_t depth = p.depth(), a_distance = depth * P * a_part, b_part = columns * kTileSize;
  const Bf16 *a = p.a, *b = p.b + column / kTileWidth * kTileSize;
  for (int64_t k = 0; k < depth; ++k, a += P * a_part, b += P * b_part) {
    each<0, kSchedule.kDots>([&](auto i) {
      constexpr auto dot = kSchedule.dots[i];
      if constexpr (dot.loads_b) tiles.template load<dot.b()>(b + dot.part_b * b_part + dot.n * kTileSize, kBytes);
      if constexpr (dot.loads_a) tiles.template load<dot.a()>(a + dot.r * a_distance + dot.part_a * a_part, kBytes);
      tiles.template dot<dot.sum(), dot.a(), dot.b()>();
    });
  }
  each<0, R * N>(
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
