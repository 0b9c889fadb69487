// AVX512-BF16: vdpbf16ps, which adds a pair of products to each of 16 sums.
#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bf16")
#endif

#include "registers.h"
#include "tiles.h"

namespace fused_rnn {
namespace cpu {

namespace {

// R rows of sums times N vectors of columns, in registers.
template <int R, int N>
void multiply_rows(const Bf16Product& p, float* sums, const Bf16* a) {
  __m512 acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = _mm512_loadu_ps(sums + r * p.stride + n * kTileWidth);
  }
  const Bf16* b = p.b;
  for (int64_t k = 0; k < p.K; k += kBf16Depth, a += p.rows * kBf16Depth, b += N * kBf16Tile) {
    const int depth = p.K - k < kBf16Depth ? int(p.K - k) : kBf16Depth;
    for (int pair = 0; pair < depth; pair += 2) {
      __m512bh column[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        column[n] = (__m512bh)_mm512_load_si512(b + n * kBf16Tile + pair * kTileWidth);
        if constexpr (R > 1) keep_in_register(column[n]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t both;
        __builtin_memcpy(&both, a + r * kBf16Depth + pair, sizeof(both));
        const __m512bh row = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[r][n] = _mm512_dpbf16_ps(acc[r][n], row, column[n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) _mm512_storeu_ps(sums + r * p.stride + n * kTileWidth, acc[r][n]);
  }
}

// Rows whose sums leave registers for a row and for N vectors of columns.
template <int N>
constexpr int kRows = 24 / N < 8 ? 24 / N : 8;

template <int N, int R = kRows<N>>
void multiply_group(int rows, const Bf16Product& p, float* sums, const Bf16* a) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_group<N, R - 1>(rows, p, sums, a);
  }
  multiply_rows<R, N>(p, sums, a);
}

template <int N = 4>
void multiply_tile(const Bf16Product& p, float* sums, const Bf16* a) {
  if constexpr (N > 1) {
    if (p.columns < N * kTileWidth) return multiply_tile<N - 1>(p, sums, a);
  }
  const int groups = (p.rows + kRows<N> - 1) / kRows<N>;
  for (int i = 0; i < groups; ++i) {  // of similar height
    const int begin = p.rows * i / groups, rows = p.rows * (i + 1) / groups - begin;
    multiply_group<N>(rows, p, sums + begin * p.stride, a + begin * kBf16Depth);
  }
}

void multiply(const Bf16Product& p, TileState&) {
  for (int tile = 0; tile < p.tiles; ++tile) {
    multiply_tile(p, p.sums + tile * p.rows * p.stride, p.a + tile * p.depth() * p.rows * kBf16Depth);
  }
}

bool available() { return true; }
void release(TileState&) {}

}  // namespace

const TileUnit kAvx512Bf16 = {"avx512_bf16", available, multiply, nullptr, release};

}  // namespace cpu
}  // namespace fused_rnn
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
