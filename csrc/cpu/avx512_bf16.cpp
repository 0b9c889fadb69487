// AVX512-BF16: vdpbf16ps, which adds a pair of products to each of 16 sums. It has one part only: with more it is
// slower than float32's own multiply-add.
#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bf16")
#endif

#include "bf16.h"

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
  for (int64_t k = 0; k < p.K; k += kTileDepth, a += p.rows * kTileDepth, b += N * kTileSize) {
    const int depth = p.K - k < kTileDepth ? int(p.K - k) : kTileDepth;
    for (int pair = 0; pair < depth; pair += 2) {
      __m512bh column[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) column[n] = (__m512bh)_mm512_load_si512(b + n * kTileSize + pair * kTileWidth);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t both;
        __builtin_memcpy(&both, a + r * kTileDepth + pair, sizeof(both));
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

template <int N>
void multiply_tile(const Bf16Product& p, float* sums, const Bf16* a) {
  constexpr int kMost = 24 / N < 8 ? 24 / N : 8;  // rows whose sums leave registers for a row and the columns
  const int groups = (p.rows + kMost - 1) / kMost;
  for (int i = 0; i < groups; ++i) {  // of similar height
    const int begin = p.rows * i / groups, rows = p.rows * (i + 1) / groups - begin;
    float* const to = sums + begin * p.stride;
    const Bf16* const from = a + begin * kTileDepth;
    switch (rows) {
      case 1:
        multiply_rows<1, N>(p, to, from);
        break;
      case 2:
        multiply_rows<2, N>(p, to, from);
        break;
      case 3:
        multiply_rows<3, N>(p, to, from);
        break;
      case 4:
        multiply_rows<4, N>(p, to, from);
        break;
      case 5:
        multiply_rows<5, N>(p, to, from);
        break;
      case 6:
        multiply_rows<6, N>(p, to, from);
        break;
      case 7:
        multiply_rows < kMost<7 ? 1 : 7, N>(p, to, from);
        break;
      default:
        multiply_rows < kMost<8 ? 1 : 8, N>(p, to, from);
    }
  }
}

void multiply(const Bf16Product& p, Bf16State&) {
  for (int tile = 0; tile < p.tiles; ++tile) {
    float* const sums = p.sums + tile * p.rows * p.stride;
    const Bf16* const a = p.a + tile * p.depth() * p.rows * kTileDepth;
    switch (p.columns / kTileWidth) {
      case 1:
        multiply_tile<1>(p, sums, a);
        break;
      case 2:
        multiply_tile<2>(p, sums, a);
        break;
      case 3:
        multiply_tile<3>(p, sums, a);
        break;
      default:
        multiply_tile<4>(p, sums, a);
    }
  }
}

bool available() { return true; }
void release(Bf16State&) {}

}  // namespace

const Bf16Unit kAvx512Bf16 = {"avx512_bf16", 1, available, multiply, release};

}  // namespace cpu
}  // namespace fused_rnn
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
