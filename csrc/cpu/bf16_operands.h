// Float32 operands of a product split into bfloat16 parts, in the tiles of bf16.h.
//
// Weights are split and packed once, in blocks of columns like those of tile.h; rows are split when they come, at every
// step. Splitting is exact but for the last bits of what it leaves over, as long as a part does not overflow: an
// infinity minus its own first part would be NaN. So with more than one part
//   - a row with a value that rounds to an infinity, or with a NaN, is zeros for the tiles, and
//   - a block of weights with such a value has no tiles,
// and what these lack is added in float32. The least parts of tiny numbers vanish, because the instructions take
// subnormal numbers for zeros: rows and blocks whose largest value is below 2^-50 are left to float32, too. Gradients
// may well be that small, so that their rows are scaled by powers of two, and their products scaled back.
#pragma once

#include "bf16.h"
#include "tile.h"
#include "worker.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

using cpu::Bf16;
using cpu::kTileDepth;
using cpu::kTileHeight;
using cpu::kTileSize;
using cpu::kTileWidth;

typedef uint32_t Bits __attribute__((vector_size(FUSED_RNN_VEC_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(FUSED_RNN_VEC_BYTES / 2)));

// v to the nearest bfloat16, ties to even. A NaN stays one.
FUSED_RNN_INLINE Vec<float> rounded(const Vec<float>& v) {
  const Bits u = (Bits)v, up = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000;
  return (Vec<float>)(v == v ? up : (u | 0x00400000) & 0xffff0000);
}

// Whether parts of such numbers are what they should be; for one part they always are.
class Range {
 public:
  FUSED_RNN_INLINE void add(const Vec<float>& v) {
    const Bits size = (Bits)v & 0x7fffffff;
    largest_ = size > largest_ ? size : largest_;
  }
  bool splits() const { return scale(false) != 0; }
  // The power of two to multiply the numbers with, 0 if they do not split. It is 1 unless they `may_scale`.
  float scale(bool may_scale) const {
    uint32_t largest = 0;
    for (int64_t i = 0; i < kLanes<float>; ++i) largest = largest_[i] > largest ? largest_[i] : largest;
    if (largest >= kHuge) return 0;
    if (largest == 0 || largest >= kTiny) return 1;
    return may_scale ? math::bits<float>((254u << 23) - (largest & 0x7f800000)) : 0;
  }

 private:
  // The bits of 2^-50: the least part of a product of two such numbers, 2^-24 of it, is still a normal number. And of
  // the least number that rounds to an infinity, 3.39e38.
  static constexpr uint32_t kTiny = (127 - 50) << 23, kHuge = 0x7f7f8000;
  Bits largest_{};
};

// A column vector of a block of weights: units [first, first + units) at two consecutive k become pairs.
FUSED_RNN_INLINE void store_pairs(Bf16* out, int64_t part, int parts, Vec<float> even, Vec<float> odd) {
  for (int p = 0; p < parts; ++p, out += part) {
    const Vec<float> e = rounded(even), o = rounded(odd);
    const Bits pairs = (Bits)e >> 16 | (Bits)o;
    __builtin_memcpy(out, &pairs, sizeof(pairs));
    even -= e, odd -= o;
  }
}

// A block of weights in tiles: its range, and then [depth][parts][tiles of columns][kTileSize].
class SplitPanel {
 public:
  // Elements of memory, in float32; the panel begins at a multiple of 64 bytes.
  static int64_t size(int64_t K, int columns, int parts) {
    return kHead + ceil_div(K, kTileDepth) * parts * ceil_div(columns, kTileWidth) * kTileSize / 2;
  }

  SplitPanel(float* memory, int columns, int parts)
      : memory_(memory), parts_(parts), column_tiles_(int(ceil_div(columns, kTileWidth))) {}

  const Bf16* tiles() const { return reinterpret_cast<const Bf16*>(memory_ + kHead); }
  bool splits() const { return memory_[0] != 0; }

  // The block of W [G * H, K] at `unit`, whose rows are units; see pack_rows().
  template <int G>
  void pack_rows(const float* W, int64_t H, int64_t K, int64_t unit) const {
    constexpr int n = kLanes<float>;
    const int vectors = block_vectors<float, G>(H, unit), U = vectors / G;
    Range range;
    for (int c = 0; c < vectors; ++c) {
      const int64_t first = unit + c % U * n, units = least(H - first, n);
      const float* row = W + (c / U * H + first) * K;
      for (int64_t k = 0; k < in_tiles(K); k += n) {
        const int64_t width = k < K ? least(K - k, n) : 0;
        Vec<float> square[n];
        for (int j = 0; j < n; ++j) {
          square[j] = j < units ? load(row + j * K + k, width) : Vec<float>{};
          range.add(square[j]);
        }
        transpose<float>(square);
        for (int i = 0; i < n; i += 2) store(c, k + i, square[i], square[i + 1]);
      }
    }
    note(range);
  }

  // The same of bfloat16 weights, which have one part: two consecutive numbers of a row are a pair already.
  template <int G>
  void pack_rows(const Bf16* W, int64_t H, int64_t K, int64_t unit) const {
    constexpr int n = kLanes<float>;
    const int vectors = block_vectors<float, G>(H, unit), U = vectors / G;
    for (int c = 0; c < vectors; ++c) {
      const int64_t first = unit + c % U * n, units = least(H - first, n);
      const Bf16* row = W + (c / U * H + first) * K;
      for (int64_t k = 0; k < in_tiles(K); k += 2 * n) {
        const int64_t width = k < K ? least(K - k, 2 * n) : 0;
        Vec<float> square[n];
        for (int j = 0; j < n; ++j) {
          square[j] = Vec<float>{};
          if (j >= units) continue;
          if (width == 2 * n) {
            __builtin_memcpy(&square[j], row + j * K + k, sizeof(square[j]));
          } else {
            Bf16 last[2 * n] = {};
            for (int64_t i = 0; i < width; ++i) last[i] = row[j * K + k + i];
            __builtin_memcpy(&square[j], last, sizeof(last));
          }
        }
        transpose<float>(square);
        for (int i = 0; i < n; ++i) __builtin_memcpy(place(c, k + 2 * i), &square[i], sizeof(square[i]));
      }
    }
    memory_[0] = 1;
  }

  // The same of W in either type.
  template <int G>
  void pack_rows(const void* W, bool is_bf16, int64_t H, int64_t K, int64_t unit) const {
    if (is_bf16) {
      pack_rows<G>(static_cast<const Bf16*>(W), H, K, unit);
    } else {
      pack_rows<G>(static_cast<const float*>(W), H, K, unit);
    }
  }

  // The block of W [K, N] at `unit`, whose columns are units; see pack_columns().
  void pack_columns(const Rows<const float>& W, int64_t K, int64_t N, int64_t unit) const {
    constexpr int n = kLanes<float>;
    const int vectors = block_vectors<float, 1>(N, unit);
    Range range;
    for (int64_t k = 0; k < in_tiles(K); k += 2) {
      for (int c = 0; c < vectors; ++c) {
        const int64_t first = unit + c * n, width = least(N - first, n);
        const Vec<float> even = k < K ? load(W[k] + first, width) : Vec<float>{};
        const Vec<float> odd = k + 1 < K ? load(W[k + 1] + first, width) : Vec<float>{};
        range.add(even), range.add(odd);
        store(c, k, even, odd);
      }
    }
    note(range);
  }

 private:
  static constexpr int64_t kHead = 16;  // a cache line, whose first number says whether the block splits

  static int64_t in_tiles(int64_t K) { return ceil_div(K, kTileDepth) * kTileDepth; }

  FUSED_RNN_INLINE void store(int vector, int64_t k, const Vec<float>& even, const Vec<float>& odd) const {
    store_pairs(place(vector, k), column_tiles_ * kTileSize, parts_, even, odd);
  }
  // Where the pairs of a vector of columns at k and k + 1 lie, in the first part.
  Bf16* place(int vector, int64_t k) const {
    const int64_t column = vector * kLanes<float>;
    const int64_t tile = k / kTileDepth * parts_ * column_tiles_ + column / kTileWidth;
    return reinterpret_cast<Bf16*>(memory_ + kHead) + tile * kTileSize + k % kTileDepth * kTileWidth +
           column % kTileWidth * 2;
  }
  void note(const Range& range) const { memory_[0] = parts_ == 1 || range.splits() ? 1 : 0; }

  float* const memory_;
  const int parts_, column_tiles_;
};

// Some rows of K numbers in tiles of equal height.
class SplitRows {
 public:
  // Elements of memory, in float32, for `rows` rows that any number of workers share.
  static int64_t size(int64_t rows, int64_t K, int parts) { return head(rows) + before(rows, K, parts); }

  SplitRows() = default;
  // For rows [begin, end) of the `rows` rows that the memory is for. No other worker has a range that overlaps, unless
  // all have the same. `may_scale`: whether the sums are zeros before the product.
  SplitRows(float* memory, int64_t rows, int64_t begin, int64_t end, int64_t K, int parts, bool may_scale = false)
      : tiles_(reinterpret_cast<Bf16*>(memory + head(rows) + before(begin, K, parts))),
        scales_(memory),
        may_scale_(may_scale),
        begin_(begin),
        K_(K),
        depth_(ceil_div(K, kTileDepth)),
        parts_(parts),
        height_(end > begin ? int(ceil_div(end - begin, ceil_div(end - begin, kTileHeight))) : 1) {}

  int height() const { return height_; }
  // What the tiles hold is the row times this; 0: zeros.
  float scale(int64_t row) const { return scales_[row]; }

  // Splits rows [begin(), end), of which this worker does its share if `shared`. row(b) points to row b.
  template <class Row>
  void split(int64_t end, const cpu::Worker& worker, bool shared, const Row& row) const {
    const int64_t tiles = ceil_div(end - begin_, height_);
    const int64_t first = shared ? worker.begin(tiles) : 0, last = shared ? worker.end(tiles) : tiles;
    for (int64_t b = begin_ + first * height_; b < least(end, begin_ + last * height_); ++b) {
      const float* const from = row(b);
      scales_[b] = parts_ > 1 ? range(from).scale(may_scale_) : 1;
      split_row(scales_[b] != 0 ? from : nullptr, scales_[b], b - begin_);
    }
  }

  // The tiles of rows [row, row + rows), as a product's left operand. `row` begins a tile.
  cpu::Bf16Product operand(int64_t row, int rows) const {
    cpu::Bf16Product p{};
    p.tiles = int(ceil_div(rows, height_));
    p.rows = height_;
    p.a = tiles_ + (row - begin_) * depth_ * parts_ * kTileDepth;
    p.K = K_;
    p.parts = parts_;
    return p;
  }

 private:
  // Elements of the scales, in whole cache lines.
  static int64_t head(int64_t rows) { return ceil_div(rows, 16) * 16; }
  // Elements of the tiles of the rows before this one. A worker's last tile may end up to a row for each 16 behind its
  // last row.
  static int64_t before(int64_t row, int64_t K, int parts) {
    return (row + row / 16) * ceil_div(K, kTileDepth) * parts * kTileDepth / 2;
  }

  Range range(const float* row) const {
    Range range;
    for (int64_t k = 0; k < K_; k += kLanes<float>) range.add(load(row + k, least(K_ - k, kLanes<float>)));
    return range;
  }

  void split_row(const float* row, float scale, int64_t index) const {
    constexpr int n = kLanes<float>;
    const int64_t tile = index / height_, part = height_ * kTileDepth;
    Bf16* out = tiles_ + tile * depth_ * parts_ * part + index % height_ * kTileDepth;
    for (int64_t k = 0; k < depth_ * kTileDepth; k += kTileDepth, out += parts_ * part) {
      for (int i = 0; i < kTileDepth; i += n) {
        const int64_t left = K_ - k - i;
        Vec<float> v = row && left > 0 ? load(row + k + i, least(left, n)) * scale : Vec<float>{};
        for (int p = 0; p < parts_; ++p) {
          const Vec<float> r = rounded(v);
          const Halves narrow = __builtin_convertvector((Bits)r >> 16, Halves);
          __builtin_memcpy(out + p * part + i, &narrow, sizeof(narrow));
          v -= r;
        }
      }
    }
  }

  Bf16* tiles_ = nullptr;
  float* scales_ = nullptr;
  bool may_scale_ = false;
  int64_t begin_ = 0, K_ = 0, depth_ = 0;
  int parts_ = 0, height_ = 1;
};

// What the tiles leave out, in float32: sums[c] += row times the block of W [G * H, K] at `unit`.
template <int G, int C>
void add_rows_in_float32(Vec<float> (&sums)[C], const float* row, const float* W, int64_t H, int64_t K, int64_t unit) {
  constexpr int n = kLanes<float>, U = C / G;
  for (int c = 0; c < C; ++c) {
    const int64_t first = unit + c % U * n;
    for (int64_t j = 0; j < n && first + j < H; ++j) {
      const float* w = W + (c / U * H + first + j) * K;
      Vec<float> products{};
      for (int64_t k = 0; k < K; k += n) products += load(row + k, least(K - k, n)) * load(w + k, least(K - k, n));
      for (int i = 0; i < n; ++i) sums[c][j] += products[i];
    }
  }
}

// The same for W [K, N], whose columns are units.
template <int C>
void add_columns_in_float32(Vec<float> (&sums)[C], const float* row, const Rows<const float>& W, int64_t N, int64_t K,
                            int64_t unit) {
  constexpr int n = kLanes<float>;
  for (int64_t k = 0; k < K; ++k) {
    for (int c = 0; c < C && unit + c * n < N; ++c) {
      sums[c] += row[k] * load(W[k] + unit + c * n, least(N - unit - c * n, n));
    }
  }
}

// One worker's use of the unit.
class Bf16Products {
 public:
  explicit Bf16Products(const cpu::Bf16Unit* unit) : unit_(unit) {}
  ~Bf16Products() {
    if (unit_) unit_->release(state_);
  }
  Bf16Products(const Bf16Products&) = delete;
  Bf16Products& operator=(const Bf16Products&) = delete;

  // sums[r] += row r times the block, for one or two tiles. Calls float32(r) for each row that this leaves out.
  template <int C, class Float32>
  void add(Vec<float> (*sums)[C], int vectors, const SplitRows& split, int64_t row, int rows, const SplitPanel& panel,
           const Float32& float32) const {
    const bool splits = panel.splits();
    if (splits) {
      cpu::Bf16Product p = split.operand(row, rows);
      p.sums = reinterpret_cast<float*>(sums);
      p.stride = C * kLanes<float>;
      p.columns = vectors * kLanes<float>;
      p.b = panel.tiles();
      unit_->multiply(p, state_);
    }
    for (int r = 0; r < rows; ++r) {
      const float scale = splits ? split.scale(row + r) : 0;
      if (scale == 1) continue;
      if (scale == 0) {
        float32(r);
      } else {
        for (int c = 0; c < C; ++c) sums[r][c] *= 1 / scale;
      }
    }
  }

 private:
  const cpu::Bf16Unit* const unit_;
  mutable cpu::Bf16State state_;  // of the thread
};

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
