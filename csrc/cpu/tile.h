// The matrix product that every step and every gradient uses: some rows times some columns, with the sums in registers.
//
// Weights are packed into panels, one per block of columns: [K][C] vectors (fewer than C in the last block). One step
// of k then reads C consecutive vectors and one scalar of each of R rows, and does R * C multiply-adds. In forward the
// columns of a block are all gates of one vector of units, so that the cell has all sums of a unit at hand. If there
// are only a few rows, packing costs more than it saves, and the weights are read in their own layout.
// A sum over a panel runs over k in the same order for every R. The result of a row therefore does not depend on the
// other rows, except through the choice between packed and unpacked weights.
#pragma once

#include "vec.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// Vectors of units in a block of G gates: enough columns to reuse a broadcast scalar, and few enough to leave registers
// for several rows.
template <int G>
constexpr int kUnitVectors = G > 1                              ? 1
                             : FUSED_RNN_VECTOR_REGISTERS == 32 ? 4
                                                                : 2;
// Rows of a tile with C columns: its sums take up to three quarters of the vector registers. The limit of 8 keeps the
// row pointers in scalar registers.
template <int C>
constexpr int kTileRows = FUSED_RNN_VECTOR_REGISTERS * 3 / 4 / C < 8 ? FUSED_RNN_VECTOR_REGISTERS * 3 / 4 / C : 8;
// Column blocks that are multiplied together when there is a single row: many independent sums hide the latency of a
// multiply-add, and the weights are read in long runs.
template <int C>
constexpr int kRowBlocks = FUSED_RNN_VECTOR_REGISTERS * 3 / 4 / C;
// Rows that are multiplied by the same part of a panel before the next part, and the k of such a part: chosen so that
// the part stays in the second-level cache.
constexpr int kChunk = 24;
constexpr int64_t kDepth = 1024;
// With fewer rows than this over all steps, weights are not packed.
constexpr int64_t kRowsWorthPacking = 8;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// n rounded up to whole vectors.
template <class T>
constexpr int64_t in_vectors(int64_t n) {
  return ceil_div(n, kLanes<T>) * kLanes<T>;
}
// Vectors of the block of G gates that begins at `unit`, in a row of n units.
template <class T, int G>
constexpr int block_vectors(int64_t n, int64_t unit) {
  return G * int(least(ceil_div(n - unit, kLanes<T>), kUnitVectors<G>));
}

// Rows [row, row + rows) times blocks [block, block + blocks); one of the two counts is 1. A slot is one row of one
// block.
struct Part {
  int64_t row, block;
  int rows, blocks;

  int slots() const { return rows * blocks; }
  int64_t row_of(int slot) const { return blocks == 1 ? row + slot : row; }
  int64_t block_of(int slot) const { return blocks == 1 ? block : block + slot; }
};

// The weights of a block: vector c of step k is at data + k * stride + c * lanes, and the next block starts `distance`
// elements after this one. The last block may have fewer than C vectors.
template <class T>
struct Panel {
  const T* data;
  int64_t stride, distance;
  int vectors;
};

template <class T, int C>
using Sums = Vec<T>[kChunk][C];

// sums[slot][c] += sum over k of row[k] * panel[k][c], for NB blocks or R rows.
// Runs of kRun values of k are summed in registers and then added to sums, so that rounding errors grow with the number
// of runs plus the length of one, as in a blocked BLAS, and not with K.
template <class T, int NB, int R, int C, int kColumns>
__attribute__((noinline)) void multiply_tile(Vec<T> (*sums)[C], const T* const* row, const Panel<T>& panel, int64_t K) {
  constexpr int64_t kRun = 128;
  const T* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = row[r];
  for (int64_t begin = 0; begin < K; begin += kRun) {
    const int64_t end = least(begin + kRun, K);
    Vec<T> acc[NB][R][kColumns] = {};  // in registers: unrolled, every index is a constant
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

// sums[block][c] += rows[0] x panel for n blocks.
template <class T, int C, int N = kRowBlocks<C>>
void multiply_blocks(Vec<T> (*sums)[C], const T* const* rows, int n, const Panel<T>& panel, int64_t K) {
  if constexpr (N > 1) {
    if (n < N) return multiply_blocks<T, C, N - 1>(sums, rows, n, panel, K);
  }
  multiply_tile<T, N, 1, C, C>(sums, rows, panel, K);
}

// sums[slot][c] += rows x panel for all slots of a part. If the part has several blocks, it has one row, rows[0].
template <class T, int C>
void multiply(Sums<T, C>& sums, const Part& part, const T* const* rows, const Panel<T>& panel, int64_t K) {
  if (part.blocks > 1) return multiply_blocks<T, C>(sums, rows, part.blocks, panel, K);
  const int tiles = static_cast<int>(ceil_div(part.rows, kTileRows<C>));
  for (int64_t k = 0; k < K; k += kDepth) {
    const Panel<T> deep{panel.data + k * panel.stride, panel.stride, panel.distance, panel.vectors};
    const int64_t depth = least(kDepth, K - k);
    for (int tile = 0; tile < tiles;
         ++tile) {  // tiles of similar height: a single row has too few sums to hide latency
      const int begin = part.rows * tile / tiles, n = part.rows * (tile + 1) / tiles - begin;
      const T* from_k[8];
      for (int r = 0; r < n; ++r) from_k[r] = rows[begin + r] + k;
      Vec<T>(*tile_sums)[C] = sums + begin;
      if constexpr (C == kUnitVectors<1>) {
        switch (panel.vectors) {
          case 1:
            multiply_rows<T, C, 1>(tile_sums, from_k, n, deep, depth);
            continue;
          case 2:
            multiply_rows<T, C, 2>(tile_sums, from_k, n, deep, depth);
            continue;
          case 3:
            multiply_rows<T, C, least(C, 3)>(tile_sums, from_k, n, deep, depth);
            continue;
        }
      }
      multiply_rows<T, C, C>(tile_sums, from_k, n, deep, depth);
    }
  }
}

// sums[r][c] += the scalar products of rows[r] with rows of the unpacked W [G * H, K]: lane j of column (g, u) of G
// gates is row g * H + unit + u * lanes + j of W.
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

// The units [unit, unit + count) that one vector of a block holds.
struct Units {
  int64_t unit, count;
};

// Inlines a lambda, so that the values it captures stay in registers from one vector to the next.
#define FUSED_RNN_INLINED __attribute__((always_inline))

// Calls f(slot, u, units) for each vector of a part. A block has U vectors; units from `limit` on are left out.
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

// Splits rows [row, row_end) times blocks [block, block_end) into parts and calls run(part) for each. narrow_end: the
// last block has fewer vectors than the others, and so cannot be in a part of several blocks.
template <int C, class Run>
FUSED_RNN_INLINE void cover(int64_t row, int64_t row_end, int64_t block, int64_t block_end, bool narrow_end,
                            const Run& run) {
  if (row_end - row == 1) {
    while (block < block_end - narrow_end) {
      const int blocks = int(least(kRowBlocks<C>, block_end - narrow_end - block));
      run(Part{row, block, 1, blocks});
      block += blocks;
    }
  }
  for (; block < block_end; ++block) {
    for (int64_t r = row; r < row_end; r += kChunk) run(Part{r, block, int(least(kChunk, row_end - r)), 1});
  }
}

// Packs one block of W [G * H, K], whose rows are units, into a panel: lane j of column (g, u) of panel[k] is
// W[g * H + unit + u * lanes + j][k]; units past H are zero.
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

// Copies the biases of one block, [G * H], to the places that their columns have in a panel.
template <class T, int G>
void pack_bias(T* out, const T* bias, int64_t H, int64_t unit) {
  constexpr int U = kUnitVectors<G>;
  for (int c = 0; c < G * U; ++c) {
    const int64_t first = unit + c % U * kLanes<T>, n = least(H - first, kLanes<T>);
    store(out + c * kLanes<T>, bias && n > 0 ? load(bias + c / U * H + first, n) : Vec<T>{});
  }
}

// A view of the rows of a matrix, `stride` apart. Row n is row places[n] of the matrix, or row n if `places` is null.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  const int64_t* places = nullptr;

  T* operator[](int64_t n) const { return data + (places ? places[n] : n) * stride; }
  Rows from(int64_t n) const { return places ? Rows{data, stride, places + n} : Rows{data + n * stride, stride}; }
};

// Packs one block of W [K, N], whose columns are units, into a panel: panel[k][u] is a copy of a part of row k.
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

// out[m][k] = in[k][m] for m < M and k < K.
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
