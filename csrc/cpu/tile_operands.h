// The operands of products on tiles (tiles.h): blocks of weights, like those of tile.h, and rows, both in float32.
//
// Weights are packed once, rows when they come, at every step. What digits cannot hold is multiplied in float32: rows
// and blocks of weights with an infinity, a NaN or a number beyond 2^60; and rows too large for exact gates. Rows may
// be as small as float32 itself, as gradients of long sequences are; a right operand's column below 2^-88 counts as
// zeros.
#pragma once

#include "digits.h"
#include "pack.h"
#include "tile.h"
#include "tiles.h"
#include "worker.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

using cpu::kBf16Depth;
using cpu::kBf16Tile;
using cpu::kDigitDepth;
using cpu::kDigitTile;
using cpu::kTileBytes;
using cpu::kTileHeight;
using cpu::kTileWidth;

// The bits of v as the nearest bfloat16, ties to even. A NaN stays one.
FUSED_RNN_INLINE Bits rounded(const Vec<float>& v) {
  const Bits u = (Bits)v, up = u + 0x7fff + (u >> 16 & 1);
  return (v == v ? up : u | 0x00400000) >> 16;
}

// A block of weights in tiles. Of bfloat16: [depth][tiles of columns][kBf16Tile]. Of digits: a line, which says whether
// the block has tiles, the largest share of a column, and the largest number; what each column's sums are to be
// multiplied with; and then [tiles of columns][depth][digits][kDigitTile].
class SplitPanel {
 public:
  // Elements of memory, in float32; the panel begins at a multiple of 64 bytes.
  static int64_t size(int64_t K, int columns, Operands operands) {
    const int64_t tiles = ceil_div(columns, kTileWidth);
    if (operands == Operands::kBfloat16) return ceil_div(K, kBf16Depth) * tiles * kBf16Tile / 2;
    return kLineFloats + tiles * (kTileWidth + ceil_div(K, kDigitDepth) * cpu::digits_of(operands) * kDigitTile / 4);
  }

  SplitPanel(float* memory, int64_t K, int columns, Operands operands)
      : memory_(memory),
        depth_(ceil_div(K, operands == Operands::kBfloat16 ? kBf16Depth : kDigitDepth)),
        column_tiles_(int(ceil_div(columns, kTileWidth))),
        digits_(cpu::digits_of(operands)) {}

  // Of digits.
  bool has_tiles() const { return memory_[0] != 0; }
  float share() const { return memory_[1]; }
  float largest() const { return memory_[2]; }
  const float* column_scales() const { return memory_ + kLineFloats; }
  const int8_t* digits(int column_tile, int64_t depth) const {
    return digits() + (column_tile * depth_ + depth) * digits_ * kDigitTile;
  }
  const Bf16* halves() const { return reinterpret_cast<const Bf16*>(memory_); }

  // The block of W [G * H, K] at `unit`, whose rows are units; see pack_rows().
  template <int G>
  void pack_rows(const void* W, bool is_bf16, int64_t H, int64_t K, int64_t unit) const {
    is_bf16 ? pack_rows_of_bf16<G>(static_cast<const Bf16*>(W), H, K, unit)
            : pack_rows_of_float32<G>(static_cast<const float*>(W), H, K, unit);
  }

  // The block of W [K, N] at `unit`, whose columns are units; see pack_columns().
  void pack_columns(const Rows<const float>& W, int64_t K, int64_t N, int64_t unit) const {
    const int vectors = block_vectors<float, 1>(N, unit);
    const auto from = [&](int64_t k, int c) FUSED_RNN_INLINED {
      return k < K ? load(W[k] + unit + c * n, least(N - unit - c * n, n)) : Vec<float>{};
    };
    begin_notes();
    ColumnScales scales[kMostColumns];
    if (digits_) {
      Largest largest[kMostColumns];
      Vec<float> squares[kMostColumns] = {};
      for (int64_t k = 0; k < K; ++k) {
        for (int c = 0; c < vectors; ++c) {
          const Vec<float> v = from(k, c);
          largest[c].add(v);
          squares[c] += v * v;
        }
      }
      for (int c = 0; c < vectors; ++c) {
        for (int j = 0; j < n; ++j) scales[c].set(j, note(c * n + j, Extent(largest[c].lanes()[j], squares[c][j])));
      }
    }
    for (int64_t k = 0; k < padded_K(); k += 4) {
      for (int c = 0; c < vectors; ++c) {
        const Vec<float> four[] = {from(k, c), from(k + 1, c), from(k + 2, c), from(k + 3, c)};
        store_four(c, k, four, scales[c]);
      }
    }
  }

 private:
  static constexpr int64_t kLineFloats = 16;
  static constexpr int n = kLanes<float>;

  // Calls f(c, row, units) for each vector of columns: it has the rows of W [G * H, K] from `row` on.
  template <int G, class T, class F>
  static void each_column_vector(const T* W, int64_t H, int64_t K, int64_t unit, const F& f) {
    const int vectors = block_vectors<float, G>(H, unit), U = vectors / G;
    for (int c = 0; c < vectors; ++c) {
      const int64_t first = unit + c % U * n;
      f(c, W + (c / U * H + first) * K, least(H - first, n));
    }
  }

  // Two consecutive numbers of a row are a pair already.
  template <int G>
  void pack_rows_of_bf16(const Bf16* W, int64_t H, int64_t K, int64_t unit) const {
    each_column_vector<G>(W, H, K, unit, [&](int c, const Bf16* row, int64_t units) {
      for (int64_t k = 0; k < padded_K(); k += 2 * n) {
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
        for (int i = 0; i < n; ++i) __builtin_memcpy(halves(c, k + 2 * i), &square[i], sizeof(square[i]));
      }
    });
  }

  template <int G>
  void pack_rows_of_float32(const float* W, int64_t H, int64_t K, int64_t unit) const {
    begin_notes();
    each_column_vector<G>(W, H, K, unit, [&](int c, const float* row, int64_t units) {
      ColumnScales scales;
      for (int j = 0; j < n && digits_; ++j) {
        scales.set(j, note(c * n + j, j < units ? Extent::of(row + j * K, K) : Extent()));
      }
      for (int64_t k = 0; k < padded_K(); k += n) {
        const int64_t width = k < K ? least(K - k, n) : 0;
        Vec<float> square[n];
        for (int j = 0; j < n; ++j) square[j] = j < units ? load(row + j * K + k, width) : Vec<float>{};
        transpose<float>(square);
        for (int i = 0; i < n; i += 4) store_four(c, k + i, square + i, scales);
      }
    });
  }

  void begin_notes() const {
    if (digits_) memory_[0] = 1, memory_[1] = memory_[2] = 0;
  }
  // Notes what the sums of a column are to be multiplied with, its share, and whether digits cannot hold it.
  DigitScale note(int column, const Extent& extent) const {
    const DigitScale scale(extent.fits() && extent.largest >= kLeastColumn ? extent.largest : 0, digits_);
    memory_[kLineFloats + column] = scale.unit / (128 * 128);
    if (extent.share > memory_[1]) memory_[1] = extent.share;
    if (extent.largest > memory_[2]) memory_[2] = extent.largest;
    if (!extent.fits()) memory_[0] = 0;
    return scale;
  }

  // Of a vector of columns.
  struct ColumnScales {
    Vec<float> first{}, second{};

    void set(int j, const DigitScale& scale) { first[j] = scale.first, second[j] = scale.second; }
  };
  // A vector of columns at k to k + 3: four digits of a column, or two bfloat16, are 32 bits of a tile's row.
  FUSED_RNN_INLINE void store_four(int c, int64_t k, const Vec<float>* four, const ColumnScales& scales) const {
    if (!digits_) {
      for (int i = 0; i < 4; i += 2) store_as(halves(c, k + i), rounded(four[i]) | rounded(four[i + 1]) << 16);
      return;
    }
    Ints left[4];
    for (int i = 0; i < 4; ++i) left[i] = integers(four[i], scales.first, scales.second, digits_);
    for (int d = digits_ - 1; d >= 0; --d) {
      store_as(place(c, k, d), (left[0] & 255) | (left[1] & 255) << 8 | (left[2] & 255) << 16 | left[3] << 24);
      for (int i = 0; i < 4; ++i) left[i] = without_last_digit(left[i]);
    }
  }

  int64_t padded_K() const { return depth_ * (digits_ ? kDigitDepth : kBf16Depth); }
  int8_t* digits() const { return reinterpret_cast<int8_t*>(memory_ + kLineFloats + column_tiles_ * kTileWidth); }
  // Where digit d of a vector of columns at k to k + 3 lies.
  int8_t* place(int vector, int64_t k, int d) const {
    const int64_t column = vector * n;
    const int64_t tile = (column / kTileWidth * depth_ + k / kDigitDepth) * digits_ + d;
    return digits() + tile * kDigitTile + k % kDigitDepth * kTileWidth + column % kTileWidth * 4;
  }
  // Where a vector of columns at k and k + 1 lies.
  Bf16* halves(int vector, int64_t k) const {
    const int64_t column = vector * n, tile = k / kBf16Depth * column_tiles_ + column / kTileWidth;
    return reinterpret_cast<Bf16*>(memory_) + tile * kBf16Tile + k % kBf16Depth * kTileWidth + column % kTileWidth * 2;
  }

  float* const memory_;
  const int64_t depth_;
  const int column_tiles_, digits_;  // 0 digits: of bfloat16
};

// Some rows of K numbers in tiles of equal height: of bfloat16 [tiles][depth][height][kBf16Depth], of digits
// [tiles][depth][digits][height][kDigitDepth] and each row's unit (DigitScale) and share (Extent).
class SplitRows {
 public:
  // Elements of memory, in float32, for `rows` rows that any number of workers share.
  static int64_t size(int64_t rows, int64_t K, Operands operands) {
    return 2 * head(rows) + before(rows, tile_depth(K, operands), operands);
  }

  SplitRows() = default;
  // For rows [begin, end) of the `rows` rows that the memory is for. No other worker has a range that overlaps, unless
  // all have the same. most: of the largest products, see kMostOfGates.
  SplitRows(float* memory, int64_t rows, int64_t begin, int64_t end, int64_t K, Operands operands,
            float most = __builtin_inff())
      : most_(most / __builtin_sqrtf(float(K > 0 ? K : 1))),
        units_(memory),
        shares_(memory + head(rows)),
        begin_(begin),
        K_(K),
        depth_(tile_depth(K, operands)),
        height_(end > begin ? int(ceil_div(end - begin, ceil_div(end - begin, kTileHeight))) : 1),
        digits_(cpu::digits_of(operands)) {
    tiles_ = reinterpret_cast<char*>(memory + 2 * head(rows) + before(begin, depth_, operands));
  }

  int height() const { return height_; }
  int64_t depth() const { return depth_; }
  int digits() const { return digits_; }  // 0: of bfloat16
  const float* units() const { return units_; }
  float share(int64_t row) const { return shares_[row]; }
  // Whether digits hold the row (its tiles are zeros otherwise) and are exact enough for weights with this largest
  // number.
  bool fits(int64_t row, float largest) const { return units_[row] >= 0 && units_[row] * largest <= most_; }

  // Splits rows [begin(), end), of which this worker does its share if `shared`. row(b) points to row b.
  template <class Row>
  void split(int64_t end, const cpu::Worker& worker, bool shared, const Row& row) const {
    const int64_t tiles = ceil_div(end - begin_, height_);
    const int64_t first = shared ? worker.begin(tiles) : 0, last = shared ? worker.end(tiles) : tiles;
    for (int64_t b = begin_ + first * height_; b < least(end, begin_ + last * height_); ++b) {
      digits_ ? split(row(b), b) : round(row(b), b - begin_);
    }
  }

  // The tiles of the rows from `row` on, which begins a tile, and from a tile's depth on.
  template <class T>
  const T* tiles(int64_t row, int64_t depth = 0) const {
    return reinterpret_cast<const T*>(tiles_ + ((row - begin_) * depth_ + depth * height_) * planes() * kTileBytes);
  }
  cpu::Bf16Product operand(int64_t row, int rows) const {
    cpu::Bf16Product p{};
    p.tiles = int(ceil_div(rows, height_));
    p.rows = height_;
    p.a = tiles<Bf16>(row);
    p.K = K_;
    return p;
  }

 private:
  static constexpr int n = kLanes<float>;

  static int64_t tile_depth(int64_t K, Operands operands) {
    return ceil_div(K, operands == Operands::kBfloat16 ? kBf16Depth : kDigitDepth);
  }
  // Elements of the units, in whole cache lines, and of the shares.
  static int64_t head(int64_t rows) { return ceil_div(rows, 16) * 16; }
  // Elements of the tiles of the rows before this one. A worker's last tile may end up to a row for each 16 behind its
  // last row.
  static int64_t before(int64_t row, int64_t depth, Operands operands) {
    const int64_t planes = operands == Operands::kBfloat16 ? 1 : cpu::digits_of(operands);
    return (row + row / 16) * depth * planes * kTileBytes / int64_t(sizeof(float));
  }

  int64_t planes() const { return digits_ ? digits_ : 1; }
  // Where number `index` of the rows begins in its first tile; the next plane is `height_ * kTileBytes` behind.
  char* row_of_tile(int64_t index) const {
    return tiles_ + (index / height_ * depth_ * planes() * height_ + index % height_) * kTileBytes;
  }

  void round(const float* row, int64_t index) const {
    char* out = row_of_tile(index);
    for (int64_t k = 0; k < depth_ * kBf16Depth; k += kBf16Depth, out += height_ * kTileBytes) {
      for (int i = 0; i < kBf16Depth; i += n) {
        const int64_t left = K_ - k - i;
        const Vec<float> v = left > 0 ? load(row + k + i, least(left, n)) : Vec<float>{};
        store_as(out + i * 2, __builtin_convertvector(rounded(v), Halves));
      }
    }
  }

  void split(const float* row, int64_t b) const {
    const Extent extent = Extent::of(row, K_);
    const bool fits = extent.fits();
    const DigitScale scale(fits ? extent.largest : 0, digits_);
    units_[b] = fits ? scale.unit : -1;
    shares_[b] = extent.share;
    const int64_t digit = height_ * kTileBytes;
    char* out = row_of_tile(b - begin_);
    for (int64_t k = 0; k < depth_ * kDigitDepth; k += kDigitDepth, out += digits_ * digit) {
      for (int i = 0; i < kDigitDepth; i += n) {
        const int64_t width = K_ - k - i;
        Ints left{};
        if (fits && width > 0) left = integers(load(row + k + i, least(width, n)), scale.first, scale.second, digits_);
        for (int d = digits_ - 1; d >= 0; --d, left = without_last_digit(left)) {
          store_as(out + d * digit + i, __builtin_convertvector(left, QuarterBytes));
        }
      }
    }
  }

  char* tiles_ = nullptr;
  float most_ = 0;
  float *units_ = nullptr, *shares_ = nullptr;
  int64_t begin_ = 0, K_ = 0, depth_ = 0;
  int height_ = 1, digits_ = 0;
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
class TileProducts {
 public:
  explicit TileProducts(const cpu::TileUnit* unit) : unit_(unit) {}
  ~TileProducts() {
    if (unit_) unit_->release(state_);
  }
  TileProducts(const TileProducts&) = delete;
  TileProducts& operator=(const TileProducts&) = delete;

  // sums[r] += row r times the block, for one or two tiles. Calls float32(r) for each row that this leaves out.
  template <int C, class Float32>
  void add(Vec<float> (*sums)[C], int vectors, const SplitRows& split, int64_t row, int rows, const SplitPanel& panel,
           const Float32& float32) const {
    if (split.digits() == 0) {
      cpu::Bf16Product p = split.operand(row, rows);
      p.sums = reinterpret_cast<float*>(sums);
      p.stride = C * kLanes<float>;
      p.columns = vectors * kLanes<float>;
      p.b = panel.halves();
      return unit_->multiply(p, state_);
    }
    float units[kMostRows];  // 0 for rows that are left out
    const bool has_tiles = panel.has_tiles();
    for (int r = 0; r < rows; ++r) {
      const bool fits = has_tiles && split.fits(row + r, panel.largest());
      units[r] = fits ? split.units()[row + r] : 0;
      if (!fits) float32(r);
    }
    if (has_tiles) add_digits(sums, vectors, split, row, rows, panel, units);
  }

 private:
  template <int C>
  void add_digits(Vec<float> (*sums)[C], int vectors, const SplitRows& split, int64_t row, int rows,
                  const SplitPanel& panel, const float* units) const {
    constexpr int kVectors = kTileWidth / kLanes<float>, kRun = cpu::kDigitRun / kDigitDepth;
    const int height = split.height();
    int products[2];  // of each tile
    for (int begin = 0; begin < rows; begin += height) {
      float share = 0;
      for (int r = begin; r < rows && r < begin + height; ++r) {
        share = split.share(row + r) > share ? split.share(row + r) : share;
      }
      products[begin > 0] =
          split.digits() == 3 ? 6 : products_needed(share, panel.share(), split.depth() * kDigitDepth);
    }
    for (int64_t depth = 0; depth < split.depth(); depth += kRun) {
      const int run = int(least(kRun, split.depth() - depth));
      for (int c = 0; c < vectors; c += kVectors) {
        const int count = int(least(kVectors, vectors - c));
        const float* const scales = panel.column_scales() + c * kLanes<float>;
        for (int begin = 0; begin < rows; begin += height) {
          const int n = int(least(height, rows - begin));
          cpu::DigitProduct p{};
          p.planes = split.digits(), p.rows = height, p.depth = run;
          p.a = split.tiles<int8_t>(row + begin, depth), p.b = panel.digits(c / kVectors, depth);
          p.products = products[begin > 0];
          const auto add = [&](auto digits, auto levels) FUSED_RNN_INLINED {
            add_tile<digits, levels>(sums + begin, c, count, n, p, scales, units + begin);
          };
          constexpr std::integral_constant<int, 3> kThree{};
          constexpr std::integral_constant<int, 4> kFour{};
          p.products == 6 ? add(kThree, kThree) : p.products == 8 ? add(kThree, kFour) : add(kFour, kFour);
        }
      }
    }
  }

  // The first D digits, in L levels, of n rows and of `count` vectors of columns from c on.
  template <int D, int L, int C>
  void add_tile(Vec<float> (*sums)[C], int c, int count, int n, cpu::DigitProduct& p, const float* scales,
                const float* units) const {
    alignas(kTileBytes) int32_t parts[D + 1][kTileHeight][kTileWidth];
    p.sums = parts[0][0];
    unit_->multiply_digits(p, state_);
    for (int r = 0; r < n; ++r) {
      for (int v = 0; v < count; ++v) {
        const auto part = [&](int i) FUSED_RNN_INLINED { return load_as<Ints>(&parts[i][r][v * kLanes<float>]); };
        const Ints last = L > D ? part(D) : part(D - 1) + part(D);
        Vec<float> sum = __builtin_convertvector(last, Vec<float>);
        for (int i = L - 2; i >= 0; --i) sum = __builtin_convertvector(part(i), Vec<float>) + sum * (1.0f / 256);
        sums[r][c + v] += sum * load(scales + v * kLanes<float>) * units[r];
      }
    }
  }

  const cpu::TileUnit* const unit_;
  mutable cpu::TileState state_;  // of the thread
};

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
