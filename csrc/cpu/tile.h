// The product at the heart of every step and of every gradient: rows x columns, with the sums in registers.
//
// Weights lie in panels: for each block of columns [K][C] vectors (the last block has as many as it needs), so that one
// step of k reads C consecutive vectors and one scalar of each of R rows for R * C multiply-adds. Forward's columns are
// all gates of one vector of units, so that the cell's equations find a unit's sums side by side. Few rows are not
// worth packing for: they take the weights as they lie. Each sum over a panel runs over k in the same order whatever R
// is: a row's result does not depend on its neighbours, but for the choice between packed and not.
#pragma once

#include "vec.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// Vectors of units in a block of G gates: enough columns to reuse a broadcast scalar, few enough for several rows.
template <int G>
constexpr int kUnitVectors = G > 1                              ? 1
                             : FUSED_RNN_VECTOR_REGISTERS == 32 ? 4
                                                                : 2;
// Rows of a tile of C columns: its sums fill up to three quarters of the vector registers. More than 8 row pointers
// would not fit the scalar ones.
template <int C>
constexpr int kTileRows = FUSED_RNN_VECTOR_REGISTERS * 3 / 4 / C < 8 ? FUSED_RNN_VECTOR_REGISTERS * 3 / 4 / C : 8;
// Column blocks that a single row takes at once: many sums hide the latency of a multiply-add, and long runs of weights
// are read as they come.
template <int C>
constexpr int kRowBlocks = FUSED_RNN_VECTOR_REGISTERS * 3 / 4 / C;
// Rows between two visits of the same part of a panel, and how many k such a part has: what fits a second-level cache.
constexpr int kChunk = 24;
constexpr int64_t kDepth = 1024;
// With fewer rows than this over all steps, packing costs more than it saves.
constexpr int64_t kRowsWorthPacking = 8;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Elements of a row of n in whole vectors, and vectors of the block of G gates that begins at `unit` of n.
template <class T>
constexpr int64_t in_vectors(int64_t n) {
  return ceil_div(n, kLanes<T>) * kLanes<T>;
}
template <class T, int G>
constexpr int block_vectors(int64_t n, int64_t unit) {
  return G * int(least(ceil_div(n - unit, kLanes<T>), kUnitVectors<G>));
}

// Rows [row, row + rows) and blocks [block, block + blocks); one of the two counts is 1. A slot is a row or a block.
struct Part {
  int64_t row, block;
  int rows, blocks;

  int slots() const { return rows * blocks; }
  int64_t row_of(int slot) const { return blocks == 1 ? row + slot : row; }
  int64_t block_of(int slot) const { return blocks == 1 ? block : block + slot; }
};

// A block's weights: vector c of step k lies at data + k * stride + c * lanes, the next block `distance` further on.
// The last block may have fewer than C vectors.
template <class T>
struct Panel {
  const T* data;
  int64_t stride, distance;
  int vectors;
};

template <class T, int C>
using Sums = Vec<T>[kChunk][C];

// sums[slot][c] += sum over k of row[k] * panel[k][c], for NB blocks or R rows.
// A run of k is summed in registers and then added, so that rounding grows as in a blocked BLAS, not with K.
template <class T, int NB, int R, int C, int kColumns>
__attribute__((noinline)) void multiply_tile(Vec<T> (*sums)[C], const T* const* row, const Panel<T>& panel, int64_t K) {
  constexpr int64_t kRun = 128;
  const T* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = row[r];
  for (int64_t begin = 0; begin < K; begin += kRun) {
    const int64_t end = least(begin + kRun, K);
    Vec<T> acc[NB][R][kColumns] = {};  // in registers: every index below is a constant once the loops are unrolled
    const T* w = panel.data + begin * panel.stride;
    for (int64_t k = begin; k < end; ++k, w += panel.stride) {
#pragma GCC unroll 8
      for (int nb = 0; nb < NB; ++nb) {
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
          const Vec<T> v = load(w + nb * panel.distance + c * kLanes<T>);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) acc[nb][r][c] += rows[r][k] * v;
        }
      }
    }
#pragma GCC unroll 8
    for (int nb = 0; nb < NB; ++nb) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) sums[nb + r][c] += acc[nb][r][c];
      }
    }
  }
}

template <class T, int C, int kColumns>
void multiply_rows(Vec<T> (*sums)[C], const T* const* rows, int n, const Panel<T>& panel, int64_t K) {
  // clang-format off
  switch (n) {
    case 1: return multiply_tile<T, 1, 1, C, kColumns>(sums, rows, panel, K);
    case 2: return multiply_tile<T, 1, 2, C, kColumns>(sums, rows, panel, K);
    case 3: return multiply_tile<T, 1, 3, C, kColumns>(sums, rows, panel, K);
    case 4: return multiply_tile<T, 1, kTileRows<C> < 4 ? 1 : 4, C, kColumns>(sums, rows, panel, K);
    case 5: return multiply_tile<T, 1, kTileRows<C> < 5 ? 1 : 5, C, kColumns>(sums, rows, panel, K);
    case 6: return multiply_tile<T, 1, kTileRows<C> < 6 ? 1 : 6, C, kColumns>(sums, rows, panel, K);
    case 7: return multiply_tile<T, 1, kTileRows<C> < 7 ? 1 : 7, C, kColumns>(sums, rows, panel, K);
    case 8: return multiply_tile<T, 1, kTileRows<C> < 8 ? 1 : 8, C, kColumns>(sums, rows, panel, K);
  }
  // clang-format on
}

// sums[slot][c] += rows x panel for the slots of a part; rows[0] alone if the part has several blocks.
template <class T, int C>
void multiply(Sums<T, C>& sums, const Part& part, const T* const* rows, const Panel<T>& panel, int64_t K) {
  if (part.blocks > 1) return multiply_tile<T, kRowBlocks<C>, 1, C, C>(sums, rows, panel, K);
  const int tiles = static_cast<int>(ceil_div(part.rows, kTileRows<C>));
  for (int64_t k = 0; k < K; k += kDepth) {
    const Panel<T> deep{panel.data + k * panel.stride, panel.stride, panel.distance, panel.vectors};
    const int64_t depth = least(kDepth, K - k);
    for (int tile = 0; tile < tiles; ++tile) {  // tiles of about the same height: a tile of one row waits for its loads
      const int begin = part.rows * tile / tiles, n = part.rows * (tile + 1) / tiles - begin;
      const T* from_k[8];
      for (int r = 0; r < n; ++r) from_k[r] = rows[begin + r] + k;
      Vec<T>(*of_tile)[C] = sums + begin;
      if constexpr (C == kUnitVectors<1>) {
        switch (panel.vectors) {
          case 1:
            multiply_rows<T, C, 1>(of_tile, from_k, n, deep, depth);
            continue;
          case 2:
            multiply_rows<T, C, 2>(of_tile, from_k, n, deep, depth);
            continue;
          case 3:
            multiply_rows<T, C, least(C, 3)>(of_tile, from_k, n, deep, depth);
            continue;
        }
      }
      multiply_rows<T, C, C>(of_tile, from_k, n, deep, depth);
    }
  }
}

// sums[r][c] += the scalar products of rows[r] with rows of W as they lie: lane j of column (g, u) of G gates is row
// g * H + unit + u * lanes + j of W [G * H, K].
template <class T, int G>
__attribute__((noinline)) void multiply_unpacked(Vec<T> (*sums)[G * kUnitVectors<G>], const T* const* rows, int n,
                                                 const T* W, int64_t H, int64_t K, int64_t unit) {
  constexpr int U = kUnitVectors<G>, kAtOnce = kLanes<T>;
  for (int c = 0; c < G * U; ++c) {
    const int64_t first = unit + c % U * kLanes<T>;
    if (first >= H) continue;
    const T* lanes[kAtOnce];
    for (int j = 0; j < kAtOnce; ++j) lanes[j] = W + (c / U * H + (first + j < H ? first + j : first)) * K;
    for (int r = 0; r < n; ++r) {
      Vec<T> acc[kAtOnce] = {};
      int64_t k = 0;
      for (; k + kLanes<T> <= K; k += kLanes<T>) {
        const Vec<T> x = load(rows[r] + k);
#pragma GCC unroll 16
        for (int j = 0; j < kAtOnce; ++j) acc[j] += x * load(lanes[j] + k);
      }
      if (k < K) {
        const Vec<T> x = load(rows[r] + k, K - k);
#pragma GCC unroll 16
        for (int j = 0; j < kAtOnce; ++j) acc[j] += x * load(lanes[j] + k, K - k);
      }
      sums[r][c] += sums_of_lanes<T>(acc);
    }
  }
}

// The units that one vector of a block covers: `count` of its lanes, from `unit` on.
struct Units {
  int64_t unit, count;
};

// For a lambda whose constants are to stay in registers from one vector to the next.
#define FUSED_RNN_INLINED __attribute__((always_inline))

// Calls f(slot, u, units) for each of a part's vectors of up to `limit` units, U vectors a block.
template <class T, int U, class F>
FUSED_RNN_INLINE void each_vector(const Part& part, int64_t limit, const F& f) {
  for (int slot = 0; slot < part.slots(); ++slot) {
    for (int u = 0; u < U; ++u) {
      const int64_t unit = (part.block_of(slot) * U + u) * kLanes<T>;
      if (unit >= limit) break;
      f(slot, u, Units{unit, least(limit - unit, kLanes<T>)});
    }
  }
}

// Calls run(part) so that every row meets every block once; the last block may be narrower than the others.
template <int C, class Run>
FUSED_RNN_INLINE void cover(int64_t row, int64_t row_end, int64_t block, int64_t block_end, bool narrow_end,
                            const Run& run) {
  if (row_end - row == 1) {
    for (; block + kRowBlocks<C> <= block_end - narrow_end; block += kRowBlocks<C>) {
      run(Part{row, block, 1, kRowBlocks<C>});
    }
  }
  for (; block < block_end; ++block) {
    for (int64_t r = row; r < row_end; r += kChunk) run(Part{r, block, int(least(kChunk, row_end - r)), 1});
  }
}

// panel[k][c] of one block, from row-major W [G * H, K] whose rows are the block's units: lane j of column (g, u)
// is W[g * H + unit + u * lanes + j][k]. Units past H are zero.
template <class T, int G>
void pack_rows(T* panel, const T* W, int64_t H, int64_t K, int64_t unit) {
  constexpr int n = kLanes<T>;
  const int vectors = block_vectors<T, G>(H, unit), U = vectors / G;
  for (int c = 0; c < vectors; ++c) {
    const int64_t first = unit + c % U * n, units = least(H - first, n);
    const T* row = W + (c / U * H + first) * K;
    for (int64_t k = 0; k < K; k += n) {
      const int64_t width = least(K - k, n);
      Vec<T> square[n];
      for (int j = 0; j < n; ++j) square[j] = j < units ? load(row + j * K + k, width) : Vec<T>{};
      transpose<T>(square);
      for (int64_t i = 0; i < width; ++i) store(panel + ((k + i) * vectors + c) * n, square[i]);
    }
  }
}

// Rows of a matrix, `stride` apart, in the order of `places`, or as they lie if that is null.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  const int64_t* places = nullptr;

  T* operator[](int64_t n) const { return data + (places ? places[n] : n) * stride; }
  Rows from(int64_t n) const { return places ? Rows{data, stride, places + n} : Rows{data + n * stride, stride}; }
};

// panel[k][u] of one block, from W [K, N] whose columns are the block's units: a copy.
template <class T>
void pack_columns(T* panel, const Rows<const T>& W, int64_t K, int64_t N, int64_t unit) {
  constexpr int n = kLanes<T>;
  const int vectors = block_vectors<T, 1>(N, unit);
  for (int64_t k = 0; k < K; ++k) {
    const T* row = W[k] + unit;
    for (int u = 0; u < vectors; ++u)
      store(panel + (k * vectors + u) * n, load(row + u * n, least(N - unit - u * n, n)));
  }
}

// out[m][k] = in[k][m]; rows of `in` are in_stride apart, those of `out` out_stride.
template <class T>
void pack_transposed(T* out, int64_t out_stride, const T* in, int64_t in_stride, int64_t M, int64_t K) {
  constexpr int n = kLanes<T>;
  for (int64_t m = 0; m < M; m += n) {
    const int64_t width = least(M - m, n);
    for (int64_t k = 0; k < K; k += n) {
      const int64_t depth = least(K - k, n);
      Vec<T> square[n];
      for (int j = 0; j < n; ++j) square[j] = j < depth ? load(in + (k + j) * in_stride + m, width) : Vec<T>{};
      transpose<T>(square);
      for (int64_t i = 0; i < width; ++i) store(out + (m + i) * out_stride + k, square[i], depth);
    }
  }
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
