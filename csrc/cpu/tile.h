// The product at the heart of every step, rows x panel, with its accumulators in registers.
//
// Weights are packed once per call into panels: for each block of columns [K][C] vectors, so that one step of k reads
// C consecutive vectors and one scalar of each of R rows for R * C multiply-adds. Forward's columns are all gates of
// one vector of units, so that the cell's equations run on the accumulators and nothing is stored in between.
// Each sum runs over k in the same order whatever R is: a row's result does not depend on the rows beside it.
#pragma once

#include "vec.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// Half to three quarters of the vector registers; the rest hold a row of the panel and a broadcast scalar.
constexpr int kAccumulators = FUSED_RNN_VECTOR_REGISTERS == 32 ? 24 : 12;
// Vectors of units in a block of G gates: enough columns to reuse a broadcast scalar, few enough for several rows.
template <int G>
constexpr int kUnitVectors = G == 1 ? 2 : 1;
// Rows of a tile of C columns. More than 8 row pointers would not fit the scalar registers.
template <int C>
constexpr int kTileRows = kAccumulators / C < 8 ? kAccumulators / C : 8;
// Column blocks that a single row takes at once: 8 independent sums hide the latency of a multiply-add.
template <int C>
constexpr int kRowBlocks = C >= 8 ? 1 : 8 / C;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// sums[nb][r][c] += sum over k of rows[r][k] * panel nb's [k][c]; panels lie one after the other.
// A run of k is summed in registers and then added, so that rounding grows as in a blocked BLAS, not with K.
template <class T, int NB, int R, int C>
FUSED_RNN_INLINE void multiply(Vec<T> (&sums)[NB][R][C], const T* const (&rows)[R], const T* panel, int64_t K) {
  constexpr int64_t kRun = 128;
  for (int64_t begin = 0; begin < K; begin += kRun) {
    const int64_t end = begin + kRun < K ? begin + kRun : K;
    Vec<T> acc[NB][R][C] = {};  // in registers: every index below is a constant once the loops are unrolled
    for (int64_t k = begin; k < end; ++k) {
#pragma GCC unroll 4
      for (int nb = 0; nb < NB; ++nb) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const Vec<T> w = load(panel + ((nb * K + k) * C + c) * kLanes<T>);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) acc[nb][r][c] += rows[r][k] * w;
        }
      }
    }
#pragma GCC unroll 4
    for (int nb = 0; nb < NB; ++nb) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sums[nb][r][c] += acc[nb][r][c];
      }
    }
  }
}

// The units that one vector of a block covers: `count` of its lanes, from `unit` on.
struct Units {
  int64_t unit, count;
};

// Calls f(nb, u, units) for each of the U vectors of the NB blocks from `block` on, up to `limit` units.
template <class T, int NB, int U, class F>
FUSED_RNN_INLINE void each_vector(int64_t block, int64_t limit, const F& f) {
  for (int nb = 0; nb < NB; ++nb) {
    for (int u = 0; u < U; ++u) {
      const int64_t unit = ((block + nb) * U + u) * kLanes<T>;
      if (unit >= limit) return;
      f(nb, u, Units{unit, limit - unit < kLanes<T> ? limit - unit : kLanes<T>});
    }
  }
}

// Calls tile.template run<NB, R>(row, block) so that every row meets every block once.
template <int C, class Tile>
FUSED_RNN_INLINE void cover(const Tile& tile, int64_t row_begin, int64_t row_end, int64_t block, int64_t block_end) {
  constexpr int kMost = kTileRows<C>;
  if (row_end - row_begin == 1) {
    for (; block + kRowBlocks<C> <= block_end; block += kRowBlocks<C>) {
      tile.template run<kRowBlocks<C>, 1>(row_begin, block);
    }
  }
  for (; block < block_end; ++block) {
    int64_t row = row_begin;
    // Eight rows are better done as 4 + 4 than as 6 + 2: a tile of two waits for its loads.
    while (row_end - row >= kMost && !(kMost == 6 && row_end - row == 8)) {
      tile.template run<1, kMost>(row, block), row += kMost;
    }
    if constexpr (kMost > 4) {
      while (row_end - row >= 4) tile.template run<1, 4>(row, block), row += 4;
    }
    if constexpr (kMost > 2) {
      if (row_end - row >= 2) tile.template run<1, 2>(row, block), row += 2;
    }
    for (; row < row_end; ++row) tile.template run<1, 1>(row, block);
  }
}

// panel[k][c] of one block, from row-major W [G * H, K] whose rows are the block's units: lane j of column (g, u)
// is W[g * H + unit + u * lanes + j][k]. Units past H are zero.
template <class T, int G>
void pack_rows(T* panel, const T* W, int64_t H, int64_t K, int64_t unit) {
  constexpr int U = kUnitVectors<G>, n = kLanes<T>;
  for (int g = 0; g < G; ++g) {
    for (int u = 0; u < U; ++u) {
      const int64_t first = unit + u * n;
      for (int64_t k = 0; k < K; k += n) {
        const int64_t width = K - k < n ? K - k : n;
        Vec<T> square[n];
        for (int j = 0; j < n; ++j) {
          square[j] = first + j < H ? load(W + (g * H + first + j) * K + k, width) : Vec<T>{};
        }
        transpose<T>(square);
        for (int64_t i = 0; i < width; ++i) store(panel + ((k + i) * G * U + g * U + u) * n, square[i]);
      }
    }
  }
}

// panel[k][u] of one block, from row-major W [K, N] whose columns are the block's units: a copy.
template <class T>
void pack_columns(T* panel, const T* W, int64_t K, int64_t N, int64_t unit) {
  constexpr int U = kUnitVectors<1>, n = kLanes<T>;
  for (int64_t k = 0; k < K; ++k) {
    for (int u = 0; u < U; ++u) {
      const int64_t left = N - (unit + u * n);
      const int64_t width = left < 0 ? 0 : left < n ? left : n;
      store(panel + (k * U + u) * n, width ? load(W + k * N + unit + u * n, width) : Vec<T>{});
    }
  }
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
