// Products with weights that were packed once, for inference: in float32, in bfloat16, or in 8-bit integers with a
// scale for each row of W. Fewer bytes stay in a nearer cache, and with few rows reading the weights is what takes the
// time.
//
// float32 has tile.h's panels and products. The other two have panels of the same blocks, in which kGroup values of
// consecutive k share a 32-bit lane: vector c of a group holds those of the units of column c.
//   bfloat16: a value is widened to the float32 with the same leading bits. The sums run over k as in tile.h, so that
//             the result is, bit for bit, that of float32 weights rounded to bfloat16.
//   int8:     W = scale * integer, and rows of x are rounded to 16-bit integers (rounded_rows.h). Integer sums over
//             kDepth8 values cannot overflow and are exact, hence the same for every instruction set.
//
// A format has multiply(), which adds the product of a part's rows, and names the class of Rows that it reads them
// from.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "layer_norm.h"
#include "pack.h"
#include "rounded_rows.h"
#include "tile.h"
#include "tile_operands.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// A matrix as the caller has it: W [gates * H, K], and for int8 the scale of each row.
struct PlainMatrix {
  const void* data;
  const float* scale;
  int64_t H, K;
};

// Calls f(c, lane, row) for every row of W that column c of the block at `unit` has in a lane.
template <int G, class F>
void each_weight(const PlainMatrix& m, int64_t unit, const F& f) {
  constexpr int U = kUnitVectors<G>;
  for (int c = 0; c < G * U; ++c) {
    for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
      const int64_t of_gate = unit + c % U * kLanes<float> + lane;
      if (of_gate < m.H) f(c, lane, c / U * m.H + of_gate);
    }
  }
}

struct Float32 {
  using Rows = SplitRows;  // if products are on tiles
  static constexpr bool kNarrow = false, kRoundsRows = false;

  template <int G>
  static int64_t panel_bytes(int64_t K) {
    return K * G * kUnitVectors<G> * FUSED_RNN_VEC_BYTES;
  }
  template <int G>
  static void pack(char* panel, const PlainMatrix& m, int64_t unit) {
    pack_rows<float, G>(reinterpret_cast<float*>(panel), static_cast<const float*>(m.data), m.H, m.K, unit);
  }
};

// Runs Format::tile for `n` slots: n rows of a block, or one row of n blocks.
template <class Format, int C, int N = Format::template kSlots<C>, class... Arguments>
FUSED_RNN_INLINE void run_tile(int n, bool of_rows, const Arguments&... arguments) {
  if constexpr (N > 1) {
    if (n < N) return run_tile<Format, C, N - 1>(n, of_rows, arguments...);
  }
  if (of_rows) {
    Format::template tile<1, N, C>(arguments...);
  } else {
    Format::template tile<N, 1, C>(arguments...);
  }
}

// Calls f(first, n) for tiles of similar size that cover the slots of a part.
template <int kMost, class F>
FUSED_RNN_INLINE void each_tile(const Part& part, const F& f) {
  const int slots = part.slots(), tiles = static_cast<int>(ceil_div(slots, kMost));
  for (int tile = 0; tile < tiles; ++tile) {
    const int first = slots * tile / tiles;
    f(first, slots * (tile + 1) / tiles - first);
  }
}

struct Bfloat16 {
  using Rows = SplitRows;  // never made
  static constexpr bool kNarrow = true, kRoundsRows = false;
  // Fewer than of float32: with more, GCC spills sums, as even and odd values take registers too.
  template <int C>
  static constexpr int kSlots = least(FUSED_RNN_VECTOR_REGISTERS * 9 / 16 / C, 8);

  template <int G>
  static int64_t panel_bytes(int64_t K) {
    return ceil_div(K, 2) * G * kUnitVectors<G> * FUSED_RNN_VEC_BYTES;
  }
  template <int G>
  static void pack(char* panel, const PlainMatrix& m, int64_t unit) {
    constexpr int C = G * kUnitVectors<G>;
    auto* const out = reinterpret_cast<uint16_t*>(panel);
    const auto* const W = static_cast<const uint16_t*>(m.data);
    each_weight<G>(m, unit, [&](int c, int64_t lane, int64_t row) {
      for (int64_t k = 0; k < m.K; ++k) out[((k / 2 * C + c) * kLanes<float> + lane) * 2 + k % 2] = W[row * m.K + k];
    });
  }

  template <int G>
  static void multiply(Sums<float, G * kUnitVectors<G>>& sums, const Part& part, const float* const* rows, const Rows&,
                       const char* panels, int64_t K) {
    constexpr int C = G * kUnitVectors<G>;
    const int64_t distance = panel_bytes<G>(K);
    const char* const panel = panels + part.block * distance;
    const bool of_rows = part.blocks == 1;
    each_tile<kSlots<C>>(part, [&](int first, int n) {
      run_tile<Bfloat16, C>(n, of_rows, sums + first, of_rows ? rows + first : rows,
                            of_rows ? panel : panel + first * distance, distance, K);
    });
  }

  template <int NB, int R, int C>
  static __attribute__((noinline)) void tile(Vec<float> (*sums)[C], const float* const* row, const char* panel,
                                             int64_t distance, int64_t K) {
    constexpr int64_t kRun = 128;  // as in multiply_tile
    const float* rows[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) rows[r] = row[r];
    for (int64_t begin = 0; begin < K; begin += kRun) {
      const int64_t end = least(begin + kRun, K);
      Vec<float> acc[NB][R][C] = {};
      const char* w = panel + begin / 2 * C * FUSED_RNN_VEC_BYTES;
      int64_t k = begin;
      // acc += values of k times weights(vector of pairs).
      const auto add = [&](int64_t k, const auto& weights) FUSED_RNN_INLINED {
#pragma GCC unroll 8
        for (int nb = 0; nb < NB; ++nb) {
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) {
            const auto v = (Vec<float>)weights(load_as<Ints>(w + nb * distance + c * FUSED_RNN_VEC_BYTES));
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[nb][r][c] += rows[r][k] * v;
          }
        }
      };
      const auto even = [](const Ints& pairs) FUSED_RNN_INLINED { return pairs << 16; };
      const auto odd = [](const Ints& pairs) FUSED_RNN_INLINED { return pairs & int32_t(0xffff0000); };
      for (; k + 2 <= end; k += 2, w += C * FUSED_RNN_VEC_BYTES) {
        add(k, even);
        asm volatile("" ::: "memory");  // else GCC keeps the pairs, and spills the sums
        add(k + 1, odd);
      }
      if (k < end) add(k, even);
      asm volatile("" ::: "memory");  // as in multiply_tile
#pragma GCC unroll 8
      for (int nb = 0; nb < NB; ++nb) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sums[nb + r][c] += acc[nb][r][c];
        }
      }
    }
  }
};

// sums += scale of the row * scale of the weights * integer sum.
template <int NB, int R, int C>
FUSED_RNN_INLINE void add_scaled(Vec<float> (*sums)[C], const Ints (&acc)[NB][R][C], const float* scales,
                                 const char* panel, int64_t distance) {
#pragma GCC unroll 8
  for (int nb = 0; nb < NB; ++nb) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const auto scale = load_as<Vec<float>>(panel + nb * distance + c * FUSED_RNN_VEC_BYTES);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sums[nb + r][c] += __builtin_convertvector(acc[nb][r][c], Vec<float>) * (scale * scales[r]);
      }
    }
  }
}

// p; if `again`, the compiler does not know that it is the p of before, so that it reads what lies there once more, and
// needs no register to keep it.
FUSED_RNN_INLINE const int8_t* anew(bool again, const int8_t* p) {
  if (again) asm volatile("" : "+r"(p));
  return p;
}

// Products of 16-bit integers, two at a time.
struct Pairs {
  static constexpr int kGroup = 2, kOffsets = 0;
  template <int C>
  static constexpr int kSlots = kRowBlocks<C> < 8 ? kRowBlocks<C> : 8;

  template <int NB, int R, int C>
  static __attribute__((noinline)) void tile(Vec<float> (*sums)[C], const int8_t* const* rows, const float* scales,
                                             const char* panel, int64_t chunk, int64_t distance, int64_t depth) {
    constexpr int kKept = FUSED_RNN_VECTOR_REGISTERS - NB * R * C - 2;  // beside weights and a product
    Ints acc[NB][R][C] = {};
    const char* w = panel + chunk;
    for (int64_t k = 0; k < depth; k += kGroup, w += C * FUSED_RNN_VEC_BYTES / 2) {
#pragma GCC unroll 8
      for (int nb = 0; nb < NB; ++nb) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const Shorts weights = widened(w + nb * distance + c * (FUSED_RNN_VEC_BYTES / 2));
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            acc[nb][r][c] += products(weights, (Shorts)broadcast(anew(r >= kKept, rows[r]) + 2 * k));
          }
        }
      }
    }
    add_scaled<NB, R, C>(sums, acc, scales, panel, distance);
  }

 private:
  // Bytes at p as 16-bit integers. Of __builtin_convertvector GCC 12 makes five instructions, not one.
  static FUSED_RNN_INLINE Shorts widened(const void* p) {
    const auto bytes = load_as<HalfBytes>(p);
#if FUSED_RNN_VEC_BYTES == 64
    return (Shorts)_mm512_cvtepi8_epi16((__m256i)bytes);
#elif FUSED_RNN_VEC_BYTES == 32
    return (Shorts)_mm256_cvtepi8_epi16((__m128i)bytes);
#else
    return __builtin_convertvector(bytes, Shorts);
#endif
  }
  // Lane i: a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1].
  static FUSED_RNN_INLINE Ints products(const Shorts& a, const Shorts& b) {
#if FUSED_RNN_VEC_BYTES == 64
    return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif FUSED_RNN_VEC_BYTES == 32
    return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return ((Ints)a << 16 >> 16) * ((Ints)b << 16 >> 16) + ((Ints)a >> 16) * ((Ints)b >> 16);
#endif
  }
};

#if FUSED_RNN_VEC_BYTES == 64
// Products of bytes, four at a time, with AVX-512 VNNI, whose first factor has no sign: the two bytes of an integer
// plus 2^15 are multiplied one by one. The panel of a chunk begins with 2^15 times the sums of its weights.
struct Quads {
  static constexpr int kGroup = 4, kOffsets = 1;
  template <int C>
  static constexpr int kSlots = kRowBlocks<C> / 2;

  template <int NB, int R, int C>
  static __attribute__((noinline)) void tile(Vec<float> (*sums)[C], const int8_t* const* rows, const float* scales,
                                             const char* panel, int64_t chunk, int64_t distance, int64_t depth) {
    Ints acc[NB][R][C] = {}, low[NB][R][C] = {};
    constexpr int kKept = FUSED_RNN_VECTOR_REGISTERS - 2 * NB * R * C - 1;  // beside weights
    const int64_t low_bytes = RoundedRows::width(depth);
    const char* w = panel + chunk + C * FUSED_RNN_VEC_BYTES;
    for (int64_t k = 0; k < depth; k += kGroup, w += C * FUSED_RNN_VEC_BYTES) {
#pragma GCC unroll 8
      for (int nb = 0; nb < NB; ++nb) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const Ints weights = load_as<Ints>(w + nb * distance + c * FUSED_RNN_VEC_BYTES);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const int8_t* const bytes = anew(2 * r + 2 > kKept, rows[r]) + k;
            add_products(acc[nb][r][c], broadcast(bytes), weights);
            add_products(low[nb][r][c], broadcast(bytes + low_bytes), weights);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int nb = 0; nb < NB; ++nb) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const Ints offset = load_as<Ints>(panel + chunk + nb * distance + c * FUSED_RNN_VEC_BYTES);
          acc[nb][r][c] = (acc[nb][r][c] << 8) + low[nb][r][c] - offset;
        }
      }
    }
    add_scaled<NB, R, C>(sums, acc, scales, panel, distance);
  }

 private:
  // sums += the four products of each lane; a has no sign. Of the intrinsic GCC 12 keeps the sums in memory.
  static FUSED_RNN_INLINE void add_products(Ints& sums, const Ints& a, const Ints& b) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
  }
};
#endif

// A block's panel: a vector of scales for each column; then, for each chunk of kDepth8 values of k, vectors of offsets
// and the weights.
template <class Step>
struct Int8Panels {
  template <int C>
  static constexpr int64_t chunk_bytes(int64_t depth) {
    return C * (Step::kOffsets * FUSED_RNN_VEC_BYTES + ceil_div(depth, Step::kGroup) * Step::kGroup * kLanes<float>);
  }
  template <int C>
  static int64_t panel_bytes(int64_t K) {
    return C * FUSED_RNN_VEC_BYTES + K / kDepth8 * chunk_bytes<C>(kDepth8) +
           (K % kDepth8 ? chunk_bytes<C>(K % kDepth8) : 0);
  }

  template <int G>
  static void pack(char* panel, const PlainMatrix& m, int64_t unit) {
    constexpr int C = G * kUnitVectors<G>;
    const auto* const W = static_cast<const int8_t*>(m.data);
    each_weight<G>(m, unit, [&](int c, int64_t lane, int64_t row) {
      const int64_t at = c * kLanes<float> + lane;
      reinterpret_cast<float*>(panel)[at] = m.scale[row];
      for (int64_t k = 0; k < m.K; ++k) {
        char* const chunk = panel + C * FUSED_RNN_VEC_BYTES + k / kDepth8 * chunk_bytes<C>(kDepth8);
        const int8_t weight = W[row * m.K + k];
        if (Step::kOffsets) reinterpret_cast<int32_t*>(chunk)[at] += 32768 * weight;
        const int64_t k8 = k % kDepth8, group = k8 / Step::kGroup * C * kLanes<float> + at;
        chunk[Step::kOffsets * C * FUSED_RNN_VEC_BYTES + group * Step::kGroup + k8 % Step::kGroup] = weight;
      }
    });
  }

  template <int C>
  static void multiply(Vec<float> (*sums)[C], const Part& part, const RoundedRows& rows, const char* panels,
                       int64_t K) {
    const int64_t distance = panel_bytes<C>(K);
    const char* const panel = panels + part.block * distance;
    const bool of_rows = part.blocks == 1;
    float scales[kChunk];
    for (int r = 0; r < part.rows; ++r) scales[r] = rows.scale(part.row + r);
    int64_t chunk = C * FUSED_RNN_VEC_BYTES;
    for (int64_t begin = 0; begin < K; begin += kDepth8, chunk += chunk_bytes<C>(kDepth8)) {
      const int8_t* integers[kChunk];
      for (int r = 0; r < part.rows; ++r) integers[r] = rows.integers(part.row + r, begin);
      each_tile<Step::template kSlots<C>>(part, [&](int first, int n) {
        const int row = of_rows ? first : 0;
        run_tile<Step, C>(n, of_rows, sums + first, integers + row, scales + row,
                          of_rows ? panel : panel + first * distance, chunk, distance, least(kDepth8, K - begin));
      });
    }
  }
};

// The better of the two on this machine.
struct Int8 {
  using Rows = RoundedRows;
  static constexpr bool kNarrow = true, kRoundsRows = true;

  template <int G>
  static int64_t panel_bytes(int64_t K) {
    return with([&](auto panels) { return panels.template panel_bytes<G * kUnitVectors<G>>(K); });
  }
  template <int G>
  static void pack(char* panel, const PlainMatrix& m, int64_t unit) {
    with([&](auto panels) { panels.template pack<G>(panel, m, unit); });
  }
  template <int G>
  static void multiply(Sums<float, G * kUnitVectors<G>>& sums, const Part& part, const float* const*, const Rows& rows,
                       const char* panels, int64_t K) {
    with([&](auto format) { format.template multiply<G * kUnitVectors<G>>(sums, part, rows, panels, K); });
  }

 private:
  template <class F>
  static FUSED_RNN_INLINE auto with(const F& f) {
#if FUSED_RNN_VEC_BYTES == 64
    if (has_vnni()) return f(Int8Panels<Quads>());
#endif
    return f(Int8Panels<Pairs>());
  }
};

// Packs the weights of one direction, biases included, and says where they are.
template <class Cell, class Format>
struct Freeze {
  static constexpr int G = Cell::kGates;
  char* const memory;  // null: only the size is wanted
  int64_t size = 0;

  // Returns the bytes that the packed weights take.
  int64_t operator()(const LayerShape& s, const cpu::PlainDirection& from, ForwardDirection& to) {
    to.w_ih = matrix<G>({from.w_ih, from.scale_ih, s.H, s.I});
    to.w_hh = matrix<G>({from.w_hh, from.scale_hh, s.H, s.P});
    to.w_hr = s.projected ? matrix<1>({from.w_hr, from.scale_hr, s.P, s.H}) : nullptr;
    constexpr int64_t kVectors = G * kUnitVectors<G> * kLanes<float>, kUnits = kUnitVectors<G> * kLanes<float>;
    const int64_t blocks = ceil_div(s.H, kUnits);
    auto* const bias = reinterpret_cast<float*>(take(blocks * 2 * kVectors * sizeof(float)));
    for (int64_t b = 0; memory && b < blocks; ++b) {
      pack_bias<float, G>(bias + b * 2 * kVectors, from.b_ih, s.H, b * kUnits);
      pack_bias<float, G>(bias + (b * 2 + 1) * kVectors, from.b_hh, s.H, b * kUnits);
    }
    to.b_ih = bias;
    return size;
  }

 private:
  char* take(int64_t bytes) {
    char* const taken = memory ? memory + size : nullptr;
    size += ceil_div(bytes, 64) * 64;
    return taken;
  }
  template <int Gates>
  char* matrix(const PlainMatrix& m) {
    constexpr int64_t kUnits = kUnitVectors<Gates> * kLanes<float>;
    const int64_t blocks = ceil_div(m.H, kUnits), bytes = Format::template panel_bytes<Gates>(m.K);
    char* const panels = take(blocks * bytes);
    for (int64_t b = 0; memory && b < blocks; ++b) Format::template pack<Gates>(panels + b * bytes, m, b * kUnits);
    return panels;
  }
};

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
