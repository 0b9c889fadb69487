// The matrix product that every step and every gradient uses: some rows times some columns, with the sums in registers.
//
// Weights are read from panels (pack.h), one per block of columns: [K][C] vectors (fewer than C in the last block). One
// step of k then reads C consecutive vectors and one scalar of each of R rows, and does R * C multiply-adds. In forward
// the columns of a block are all gates of one vector of units, so that the cell has all sums of a unit at hand. If
// there are few rows, packing costs more than it saves, and the weights are read in their own layout, tile by tile,
// too.
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
// Rows of a tile with C columns: its sums take up to three quarters of the vector registers, which leaves some for C
// vectors or R scalars, whichever is less, and one more. The limit of 8 keeps the row pointers in scalar registers.
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
// The most rows of a part: two tiles of AMX.
constexpr int kMostRows = 32;
constexpr int64_t kLine = 64;  // bytes of a cache line, on most processors

// Fetches a block's part of a row: rows are too far apart for the hardware to do so.
template <bool for_writing = false, class T>
FUSED_RNN_INLINE void fetch(const T* part, int64_t count) {
  for (int64_t i = 0; i < count; i += kLine / int64_t(sizeof(T))) __builtin_prefetch(part + i, for_writing);
  __builtin_prefetch(part + count - 1, for_writing);  // a row may begin within a line
}

// Inlines a lambda, so that the values it captures stay in registers from one vector to the next.
#define FUSED_RNN_INLINED __attribute__((always_inline))

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
  const T* next = nullptr;  // the panel that is read after this one, to fetch into the cache meanwhile; null: none
};

template <class T, int C>
using Sums = Vec<T>[kMostRows][C];
template <class T, int C>
void clear(Sums<T, C>& sums, int slots) {
  for (int slot = 0; slot < slots; ++slot) {
    for (int c = 0; c < C; ++c) sums[slot][c] = Vec<T>{};
  }
}

// What the sums of a product begin with: slot s with the vectors at data + s * distance.
template <class T>
struct Start {
  const T* data = nullptr;  // null: with what the sums hold
  int64_t distance = 0;

  Start from(int64_t slot) const { return {data ? data + slot * distance : nullptr, distance}; }
};
constexpr int kMostColumns = 4;  // of a block
template <class T>
constexpr T kZeros[kMostColumns * kLanes<T>] = {};
template <class T>
constexpr Start<T> kFromZero{kZeros<T>, 0};

// Where a product's sums lie: those of slot s from data + s * stride on.
template <class T>
struct Output {
  T* data;
  int64_t stride;

  Output(T* first, int64_t distance) : data(first), stride(distance) {}
  template <int C>
  explicit Output(Vec<T> (*sums)[C]) : data(reinterpret_cast<T*>(sums)), stride(C * kLanes<T>) {}
  T* operator[](int64_t slot) const { return data + slot * stride; }
  Output from(int64_t slot) const { return {(*this)[slot], stride}; }
};

// Values of k: [begin, end).
struct Depth {
  int64_t begin, end;
};

// sums[slot][c] = start + sum over some k of row[k] * panel[k][c], for NB blocks or R rows.
// Runs of kRun values of k are summed in registers and then added to sums, so that rounding errors grow with the number
// of runs plus the length of one, as in a blocked BLAS, and not with K. kNext: fetches line k of panel.next into the
// second-level cache with every k. kAhead: fetches into the first-level cache what is read 16 k later.
template <class T, int NB, int R, int kColumns, bool kNext = false, bool kAhead = false>
__attribute__((noinline)) void multiply_tile(Output<T> sums, Start<T> start, const T* const* row, const Panel<T>& panel,
                                             Depth depth) {
  static_assert(kColumns <= kMostColumns);
  constexpr int64_t kRun = 128;
  const Start<T> own{sums.data, sums.stride};
  if (!start.data) start = own;
  const T* rows[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) keep_in_register(rows[r] = row[r]);
  // Once even if there is no k.
  for (int64_t begin = depth.begin; begin == depth.begin || begin < depth.end; begin += kRun) {
    const int64_t end = least(begin + kRun, depth.end);
    Vec<T> acc[NB][R][kColumns] = {};  // in registers: unrolled, every index is a constant
    const T* w = panel.data + begin * panel.stride;
#pragma GCC unroll 4
    for (int64_t k = begin; k < end; ++k, w += panel.stride) {
      if constexpr (kNext) __builtin_prefetch(reinterpret_cast<const char*>(panel.next) + k * kLine, 0, 2);
      if constexpr (kAhead) __builtin_prefetch(w + 16 * panel.stride);
#pragma GCC unroll 8
      for (int nb = 0; nb < NB; ++nb) {
        const T* const columns = w + nb * panel.distance;
        if constexpr (R > kColumns) {
          Vec<T> v[kColumns];
#pragma GCC unroll 4
          for (int c = 0; c < kColumns; ++c) keep_in_register(v[c] = load(columns + c * kLanes<T>));
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < kColumns; ++c) acc[nb][r][c] += rows[r][k] * v[c];
          }
        } else {
#pragma GCC unroll 4
          for (int c = 0; c < kColumns; ++c) {
            Vec<T> v = load(columns + c * kLanes<T>);
            if constexpr (R > 1) keep_in_register(v);  // a single row's load is its operand
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[nb][r][c] += rows[r][k] * v;
          }
        }
      }
    }
    asm volatile("" ::: "memory");  // else GCC loads the sums before the loop, and spills them
#pragma GCC unroll 8
    for (int nb = 0; nb < NB; ++nb) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
          const T* const from = start.data + (nb + r) * start.distance + c * kLanes<T>;
          store(sums[nb + r] + c * kLanes<T>, load(from) + acc[nb][r][c]);
        }
      }
    }
    start = own;
  }
}

template <class T, int kColumns, bool kNext, bool kAhead>
void multiply_rows(const Output<T>& sums, const Start<T>& start, const T* const* rows, int n, const Panel<T>& panel,
                   Depth depth) {
  constexpr int kRows = kTileRows<kColumns>;
  // clang-format off
  switch (n) {
    case 1: return multiply_tile<T, 1, 1, kColumns, kNext, kAhead>(sums, start, rows, panel, depth);
    case 2: return multiply_tile<T, 1, 2, kColumns, kNext, kAhead>(sums, start, rows, panel, depth);
    case 3: return multiply_tile<T, 1, 3, kColumns, kNext, kAhead>(sums, start, rows, panel, depth);
    case 4: return multiply_tile<T, 1, least(kRows, 4), kColumns, kNext, kAhead>(sums, start, rows, panel, depth);
    case 5: return multiply_tile<T, 1, least(kRows, 5), kColumns, kNext, kAhead>(sums, start, rows, panel, depth);
    case 6: return multiply_tile<T, 1, least(kRows, 6), kColumns, kNext, kAhead>(sums, start, rows, panel, depth);
    case 7: return multiply_tile<T, 1, least(kRows, 7), kColumns, kNext, kAhead>(sums, start, rows, panel, depth);
    case 8: return multiply_tile<T, 1, least(kRows, 8), kColumns, kNext, kAhead>(sums, start, rows, panel, depth);
  }
  // clang-format on
}

// sums[block][c] = start + rows[0] x panel for n blocks.
template <class T, int C, int N = kRowBlocks<C>>
void multiply_blocks(const Output<T>& sums, const Start<T>& start, const T* const* rows, int n, const Panel<T>& panel,
                     int64_t K) {
  if constexpr (N > 1) {
    if (n < N) return multiply_blocks<T, C, N - 1>(sums, start, rows, n, panel, K);
  }
  multiply_tile<T, N, 1, C>(sums, start, rows, panel, {0, K});
}

// sums[slot][c] = start + rows x panel for all slots of a part of one block, whose panel has kColumns vectors, of C
// that a block has. The tiles share the lines of panel.next, which is taken to be as long as this panel. kHalf: the
// panel is half of one, so its lines are not one after the other, and the first tile, which brings them into the
// first-level cache, fetches ahead.
template <class T, int C, int kColumns, bool kHalf = false>
void multiply_block(const Output<T>& sums, Start<T> start, const Part& part, const T* const* rows,
                    const Panel<T>& panel, int64_t K) {
  constexpr int64_t kWidth = C * sizeof(Vec<T>);
  constexpr bool kWhole = C == kColumns;
  const int tiles = static_cast<int>(ceil_div(part.rows, kTileRows<kColumns>));
  for (int64_t k = 0; k == 0 || k < K; k += kDepth, start = {}) {
    const Depth depth{k, least(k + kDepth, K)};
    for (int tile = 0; tile < tiles; ++tile) {  // of similar height: a single row has too few sums to hide latency
      const int begin = part.rows * tile / tiles, n = part.rows * (tile + 1) / tiles - begin;
      const auto to = sums.from(begin);
      const auto from = start.from(begin);
      if (kWhole && panel.next && tile * kLine < kWidth) {
        Panel<T> fetching = panel;
        fetching.next += tile * K * kLine / int64_t(sizeof(T));
        multiply_rows<T, kColumns, kWhole, kHalf>(to, from, rows + begin, n, fetching, depth);
      } else if (kHalf && tile == 0) {
        multiply_rows<T, kColumns, false, kHalf>(to, from, rows + begin, n, panel, depth);
      } else {
        multiply_rows<T, kColumns, false, false>(to, from, rows + begin, n, panel, depth);
      }
    }
  }
}

// The same, the first half of the columns before the second.
template <class T, int C>
void multiply_halves(const Output<T>& sums, const Start<T>& start, const Part& part, const T* const* rows,
                     const Panel<T>& panel, int64_t K) {
  static_assert(C % 2 == 0);
  constexpr int kHalf = C / 2;
  for (int64_t at = 0; at < C * kLanes<T>; at += kHalf * kLanes<T>) {
    Panel<T> half = panel;
    half.data += at;
    if (panel.next) half.next += at * K;
    multiply_block<T, kHalf, kHalf, true>(
        {sums.data + at, sums.stride}, {start.data ? start.data + at : nullptr, start.distance}, part, rows, half, K);
  }
}

// sums[slot][c] = start + rows x panel for all slots of a part. If the part has several blocks, it has one row,
// rows[0].
template <class T, int C>
void multiply(const Output<T>& sums, const Start<T>& start, const Part& part, const T* const* rows,
              const Panel<T>& panel, int64_t K) {
  if (part.blocks > 1) return multiply_blocks<T, C>(sums, start, rows, part.blocks, panel, K);
  if constexpr (C == kUnitVectors<1>) {  // a last block may be narrower
    if (panel.vectors == 1) return multiply_block<T, C, 1>(sums, start, part, rows, panel, K);
    if (panel.vectors == 2) return multiply_block<T, C, least(C, 2)>(sums, start, part, rows, panel, K);
    if (panel.vectors == 3) return multiply_block<T, C, least(C, 3)>(sums, start, part, rows, panel, K);
  }
  // With 16 registers: tiles of six rows and half the columns read the panel half as often as tiles of three rows. That
  // is faster where they lack one or two rows in all; where they lack none, tiles of three are as fast.
  if constexpr (C == 4 && kTileRows<C> == 3) {
    if (part.rows % 6 >= 4) return multiply_halves<T, C>(sums, start, part, rows, panel, K);
  }
  multiply_block<T, C, C>(sums, start, part, rows, panel, K);
}

template <class T, int C>
void multiply(Sums<T, C>& sums, const Start<T>& start, const Part& part, const T* const* rows, const Panel<T>& panel,
              int64_t K) {
  multiply<T, C>(Output<T>(sums), start, part, rows, panel, K);
}

// Rows of W that are multiplied at once by R rows: a power of two, with the sums of a tile in registers. Eight are
// enough to hide the latency of a multiply-add, and in large weights every row is in another page.
template <class T, int R>
constexpr int dot_columns() {
  int n = 1;
  while (n * 2 * R <= FUSED_RNN_VECTOR_REGISTERS * 3 / 4 && n < least(kLanes<T>, 8)) n *= 2;
  return n;
}

// sums[r][c] += the scalar products of R rows with the rows of W that begin at `lanes`, one for each lane.
template <class T, int R, int C, class Weight>
__attribute__((noinline)) void multiply_lanes(Vec<T> (*sums)[C], int c, const T* const* row, const Weight* const* lanes,
                                              int64_t K) {
  constexpr int kAtOnce = dot_columns<T, R>();
  const T* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = row[r];
  Vec<T> dots[R][kLanes<T>];
  for (int begin = 0; begin < kLanes<T>; begin += kAtOnce) {
    Vec<T> acc[R][kAtOnce] = {};
    const Weight* w[kAtOnce];
    for (int j = 0; j < kAtOnce; ++j) w[j] = lanes[begin + j];
    const auto add = [&](int64_t k, auto... count) FUSED_RNN_INLINED {
      Vec<T> x[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) x[r] = load(rows[r] + k, count...);
#pragma GCC unroll 8
      for (int j = 0; j < kAtOnce; ++j) {
        Vec<T> v = load(w[j] + k, count...);
        if constexpr (R > 1) keep_in_register(v);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r][j] += x[r] * v;
      }
    };
    int64_t k = 0;
    for (; k + kLanes<T> <= K; k += kLanes<T>) add(k);
    if (k < K) add(k, K - k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kAtOnce; ++j) dots[r][begin + j] = acc[r][j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r][c] += sums_of_lanes<T>(dots[r]);
}

// sums[r][c] += the scalar products of rows[r] with rows of the unpacked W [G * H, K]: lane j of column (g, u) of G
// gates is row g * H + unit + u * lanes + j of W, of T or of bfloat16. A sum does not depend on the other rows.
template <class T, int G, class Weight>
void multiply_unpacked(Vec<T> (*sums)[G * kUnitVectors<G>], const T* const* rows, int n, const Weight* W, int64_t H,
                       int64_t K, int64_t unit) {
  constexpr int U = kUnitVectors<G>, C = G * U, kRows = kTileRows<4>;
  const int tiles = static_cast<int>(ceil_div(n, kRows));
  for (int c = 0; c < C; ++c) {
    const int64_t first = unit + c % U * kLanes<T>;
    if (first >= H) continue;
    const Weight* lanes[kLanes<T>];
    for (int j = 0; j < kLanes<T>; ++j) lanes[j] = W + (c / U * H + (first + j < H ? first + j : first)) * K;
    for (int tile = 0; tile < tiles; ++tile) {
      const int begin = n * tile / tiles;
      Vec<T>(*tile_sums)[C] = sums + begin;
      const T* const* from = rows + begin;
      // clang-format off
      switch (n * (tile + 1) / tiles - begin) {
        case 1: multiply_lanes<T, 1, C>(tile_sums, c, from, lanes, K); break;
        case 2: multiply_lanes<T, 2, C>(tile_sums, c, from, lanes, K); break;
        case 3: multiply_lanes<T, 3, C>(tile_sums, c, from, lanes, K); break;
        case 4: multiply_lanes<T, least(kRows, 4), C>(tile_sums, c, from, lanes, K); break;
        case 5: multiply_lanes<T, least(kRows, 5), C>(tile_sums, c, from, lanes, K); break;
        case 6: multiply_lanes<T, least(kRows, 6), C>(tile_sums, c, from, lanes, K); break;
      }
      // clang-format on
    }
  }
}

// The units [unit, unit + count) that one vector of a block holds.
struct Units {
  int64_t unit, count;
};

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

// Splits rows [row, row_end) times blocks [block, block_end) into parts and calls run(part) for each, from the last
// block to the first if `backwards`. narrow_end: the last block has fewer vectors than the others, and so cannot be in
// a part of several blocks. tiles: of how many rows a part is, of one block, where tiles.h's tiles are multiplied; else
// 0.
template <int C, class Run>
FUSED_RNN_INLINE void cover(int64_t row, int64_t row_end, int64_t block, int64_t block_end, bool narrow_end,
                            bool backwards, const Run& run, int tiles = 0) {
  const bool single = row_end - row == 1 && block < block_end && !tiles;
  const int64_t grouped = single ? block_end - block - narrow_end : 0;
  const int64_t groups = ceil_div(grouped, kRowBlocks<C>);
  const int64_t first = block + grouped, count = groups + block_end - first;
  const int chunk = tiles ? tiles : kChunk;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = backwards ? count - 1 - i : i;
    if (n < groups) {
      const int64_t begin = n * kRowBlocks<C>;
      run(Part{row, block + begin, 1, int(least(kRowBlocks<C>, grouped - begin))});
      continue;
    }
    for (int64_t r = row; r < row_end; r += chunk) {
      run(Part{r, first + n - groups, int(least(chunk, row_end - r)), 1});
    }
  }
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
