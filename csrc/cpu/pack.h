// Packing: copies of weights, and of what gradients multiply, in the layout that the product of tile.h reads, and from
// how many rows on they are worth making. A thread packs what it multiplies, or its share of what all do.
//
// A panel holds one block of columns, [K][C] vectors. Weights whose rows are units (forward) are transposed by squares
// of one vector in both directions, which stay in registers; weights whose columns are units (backward, gradients) are
// copied a part of a row at a time.
#pragma once

#include "tile.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// The rows, over all steps, from which weights with rows of so many bytes are worth copying into panels. Where a block
// has no more than a cache line of each row, and the rows are half a page apart, whatever multiplies by it again, a
// tile or a step, takes longer to read them as they lie.
constexpr int64_t rows_worth_copying(int64_t row_bytes) {
  const bool is_scattered = kUnitVectors<1> * FUSED_RNN_VEC_BYTES <= kLine && row_bytes >= 2048;
  return is_scattered ? kTileRows<kUnitVectors<1>> + 1 : 32;
}
// The rows, over all steps of B rows, from which panels that transpose rows of K weights are worth packing. The product
// without them sums the lanes of every result, which costs less per weight the larger K is; measured for 8 and for 16
// lanes. With more than two tiles to a step it reads the weights so often that from `most` rows on packing pays for any
// K; measured for 8 lanes, and taken to be twice as many rows for 16.
template <class T>
constexpr int64_t rows_worth_transposing(int64_t K, int64_t B) {
  const int64_t rows = 2 * K / kLanes<T>, most = kLanes<T> > 8 ? 160 : 80;
  if (B > 2 * kTileRows<4> && rows > most) return most;
  return rows < 8 ? 8 : rows;
}

// Packs one block of W [G * H, K], of T or of bfloat16, whose rows are units, into a panel: lane j of column (g, u) of
// panel[k] is W[g * H + unit + u * lanes + j][k]; units past H are zero.
template <class T, int G, class Weight>
void pack_rows(T* panel, const Weight* W, int64_t H, int64_t K, int64_t unit) {
  constexpr int n = kLanes<T>;
  const int vectors = block_vectors<T, G>(H, unit), U = vectors / G;
  for (int c = 0; c < vectors; ++c) {
    const int64_t first = unit + c % U * n, units = least(H - first, n);
    const Weight* const row = W + (c / U * H + first) * K;
    T* const column = panel + c * n;
    int64_t k = 0;
    for (; units == n && k + n <= K; k += n) {  // without a test in between, a square stays in registers
      Vec<T> square[n];
#pragma GCC unroll 16
      for (int j = 0; j < n; ++j) {
        __builtin_prefetch(row + j * K + k + 2 * kLine / int64_t(sizeof(Weight)));
        __builtin_prefetch(row + (n + j) * K + k, 0, 2);  // what the next vector of this gate's units reads
        square[j] = load(row + j * K + k);
      }
      transpose<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) store(column + (k + i) * vectors * n, square[i]);
    }
    for (; k < K; k += n) {
      const int64_t width = least(K - k, n);
      Vec<T> square[n];
      for (int j = 0; j < n; ++j) square[j] = j < units ? load(row + j * K + k, width) : Vec<T>{};
      transpose<T>(square);
      for (int64_t i = 0; i < width; ++i) store(column + (k + i) * vectors * n, square[i]);
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
  constexpr int n = kLanes<T>, U = kUnitVectors<1>;
  constexpr int64_t kAhead = 16;  // rows
  const int vectors = block_vectors<T, 1>(N, unit);
  const bool is_whole = N - unit >= U * n;
  for (int64_t k = 0; k < K; ++k) {
    const T* const row = W[k] + unit;
    if (k + kAhead < K) fetch(W[k + kAhead] + unit, U * n);
    if (is_whole) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) store(panel + (k * U + u) * n, load(row + u * n));
    } else {
      for (int u = 0; u < vectors; ++u) {
        store(panel + (k * vectors + u) * n, load(row + u * n, least(N - unit - u * n, n)));
      }
    }
  }
}

// out[m][k] = in[k][m] for m < M and k < K. Rows of `in` are read once, and fetched ahead.
template <class T>
void pack_transposed(T* out, int64_t out_stride, const T* in, int64_t in_stride, int64_t M, int64_t K) {
  constexpr int n = kLanes<T>;
  for (int64_t k = 0; k < K; k += n) {
    const int64_t depth = least(K - k, n);
    for (int64_t ahead = k + n; ahead < least(k + 2 * n, K); ++ahead) fetch(in + ahead * in_stride, M);
    for (int64_t m = 0; m < M; m += n) {
      const int64_t width = least(M - m, n);
      Vec<T> square[n];
      for (int j = 0; j < n; ++j) square[j] = j < depth ? load(in + (k + j) * in_stride + m, width) : Vec<T>{};
      transpose<T>(square);
      for (int64_t i = 0; i < width; ++i) store(out + (m + i) * out_stride + k, square[i], depth);
    }
  }
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
