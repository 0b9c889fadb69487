// The gradients of x, weights, biases and normalisation gains, from the gate gradients of a chunk of steps.
//
// Each is one matrix product or column sum. The threads split the rows and columns of the result, so that none waits
// for another. No sum depends on the number of threads, but for how many digits it has on tiles.
#pragma once

#include <type_traits>

#include "../cells/cells.h"
#include "column_sums.h"
#include "pack.h"
#include "tile.h"
#include "tile_operands.h"
#include "worker.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// The part of an M x N result that one thread computes: rows [row, row_end), column blocks [block, block_end).
struct Share {
  int64_t row, row_end, block, block_end;

  Share(int64_t M, int64_t N, int64_t block_columns, const cpu::Worker& worker) {
    const int64_t blocks = ceil_div(N, block_columns);
    // Arranges the threads in the grid whose shares have the fewest rows plus columns, because a thread packs both.
    int64_t across = 1, best = INT64_MAX;
    for (int64_t n = 1; n <= worker.count; ++n) {
      if (worker.count % n || n > blocks) continue;
      const int64_t cost = ceil_div(blocks, n) * block_columns + ceil_div(M, worker.count / n);
      if (cost < best) best = cost, across = n;
    }
    const int64_t down = worker.count / across, i = worker.index / across, j = worker.index % across;
    row = M * i / down, row_end = M * (i + 1) / down;
    block = blocks * j / across, block_end = blocks * (j + 1) / across;
  }
};

template <class T>
class Products {
 public:
  Products(const LayerShape& s, T* workspace, const cpu::Worker& worker)
      : operands_(s.operands), tile_products_(s.unit), workspace_(workspace), worker_(worker) {}

  // Workspace of the two products below, in elements.
  static int64_t rows_workspace(int64_t N, int64_t K, Operands operands) {
    if (operands == Operands::kPlain) return K * kBlock;
    return ceil_div(N, kBlock) * SplitPanel::size(K, kBlock, operands) + SplitRows::size(kMostRows, K, operands);
  }
  static int64_t transposed_workspace(int64_t N, int64_t K, Operands operands) {
    const int64_t depth = least(K, kRowsAtOnce), blocks = least(ceil_div(N, kBlock), kBlocksAtOnce);
    const int64_t plain = depth * blocks * kBlock + kColumnsAtOnce * column_size(depth);
    if (operands == Operands::kPlain) return plain;
    const int64_t split = kMostRows * column_size(depth) + blocks * SplitPanel::size(depth, kBlock, operands) +
                          SplitRows::size(kMostRows, depth, operands);
    return plain > split ? plain : split;
  }

  // out [M, N] = a b or out += a b, for row-major a [M, K] and b [K, N].
  void rows(const Rows<T>& out, const T* a, int64_t a_stride, const T* b, int64_t M, int64_t N, int64_t K,
            bool accumulate) {
    const Share share(M, N, kBlock, worker_);
    if constexpr (kSplits) {
      if (splits()) {
        const int64_t size = SplitPanel::size(K, kBlock, operands_);
        for (int64_t block = share.block; block < share.block_end; ++block) {
          split_panel(workspace_, block - share.block, block, K, N)
              .pack_columns(Rows<const T>{b, N}, K, N, block * kBlock);
        }
        T* const split = workspace_ + (share.block_end - share.block) * size;
        for (int64_t row = share.row; row < share.row_end; row += kMostRows) {
          const int count = int(least(kMostRows, share.row_end - row));
          const T* from[kMostRows];
          for (int r = 0; r < count; ++r) from[r] = a + (row + r) * a_stride;
          add_split(out, row, count, from, split, workspace_, share.block, share.block_end, Rows<const T>{b, N}, K, N,
                    accumulate);
        }
        return;
      }
    }
    const auto add_part = [&](const Part& part, const Panel<T>& panel) {
      const T* from[kChunk];
      for (int r = 0; r < part.rows; ++r) from[r] = a + (part.row + r) * a_stride;
      add(out, part, from, panel, K, N, accumulate);
    };
    int64_t block = share.block;
    if (M < rows_worth_copying(N * int64_t(sizeof(T)))) {
      // b is read unpacked, except for a partial last block, whose vectors would end beyond the row.
      const int64_t whole = least(N / kBlock, share.block_end);
      cover<U>(share.row, share.row_end, block, whole, false, false,
               [&](const Part& part) { add_part(part, {b + part.block * kBlock, N, kBlock, U}); });
      if (whole > block) block = whole;
    }
    for (; block < share.block_end; ++block) {
      pack_columns(workspace_, Rows<const T>{b, N}, K, N, block * kBlock);
      const Panel<T> panel = own_panel(workspace_, block, N);
      cover<U>(share.row, share.row_end, block, block + 1, true, false,
               [&](const Part& part) { add_part(part, panel); });
    }
  }

  // out [M, N] = a^T b or out += a^T b, for row-major a [K, M] and b [K, N].
  void transposed(T* out, const T* a, int64_t a_stride, const Rows<const T>& b, int64_t M, int64_t N, int64_t K,
                  bool accumulate) {
    const Share share(M, N, kBlock, worker_);
    if (share.row == share.row_end) return;
    if (K < kRowsWorthPacking) return add_outer_products(out, a, a_stride, b, share, N, K, accumulate);
    const bool on_tiles = splits() && fits_digits(b, share, N, K);
    const int chunk = on_tiles ? kMostRows : kChunk, at_once = on_tiles ? kMostRows : kColumnsAtOnce;
    T* const columns = workspace_;
    T* const panels = columns + at_once * column_size(least(K, kRowsAtOnce));
    for (int64_t begin = share.block; begin < share.block_end; begin += kBlocksAtOnce) {
      const int64_t end = least(begin + kBlocksAtOnce, share.block_end);
      for (int64_t k = 0; k < K; k += kRowsAtOnce) {
        const int64_t count = least(kRowsAtOnce, K - k), panel = count * kBlock, column = column_size(count);
        for (int64_t block = begin; block < end; ++block) {
          if constexpr (kSplits) {
            if (on_tiles) {
              split_panel(panels, block - begin, block, count, N).pack_columns(b.from(k), count, N, block * kBlock);
              continue;
            }
          }
          pack_columns(panels + (block - begin) * panel, b.from(k), count, N, block * kBlock);
        }
        for (int64_t row = share.row; row < share.row_end; row += at_once) {
          const int64_t height = least(at_once, share.row_end - row);
          pack_transposed(columns, column, a + k * a_stride + row, a_stride, height, count);
          for (int64_t first = 0; first < height; first += chunk) {
            const int rows = int(least(chunk, height - first));
            const T* from[kMostRows];
            for (int r = 0; r < rows; ++r) from[r] = columns + (first + r) * column;
            if constexpr (kSplits) {
              if (on_tiles) {
                T* const split = panels + (end - begin) * SplitPanel::size(count, kBlock, operands_);
                add_split(Rows<T>{out, N}, row + first, rows, from, split, panels, begin, end, b.from(k), count, N,
                          accumulate || k > 0);
                continue;
              }
            }
            for (int64_t block = begin; block < end; ++block) {
              const Panel<T> block_panel = own_panel(panels + (block - begin) * panel, block, N);
              add(Rows<T>{out, N}, Part{row + first, block, rows, 1}, from, block_panel, count, N, accumulate || k > 0);
            }
          }
        }
      }
    }
  }

 private:
  static constexpr int U = kUnitVectors<1>;
  static constexpr int64_t kBlock = U * kLanes<T>;
  // `transposed` packs b from kRowsWorthPacking rows on, so many rows and blocks at a time: about what the second-level
  // cache holds, and a bound of the workspace.
  static constexpr int64_t kRowsWorthPacking = 8, kRowsAtOnce = 512, kBlocksAtOnce = 8;
  // Columns of a that it transposes at once: two chunks of rows of the result, three cache lines of float32.
  static constexpr int kColumnsAtOnce = 2 * kChunk;
  // Elements from one of them to the next: a line more than it has, as columns a power of two apart would share few
  // sets of the cache.
  static constexpr int64_t column_size(int64_t rows) { return rows + kLine / int64_t(sizeof(T)); }
  static constexpr bool kSplits = sizeof(T) == sizeof(float);  // for tiles, if LayerShape::operands says so

  // a^T b for a K too small for packing: each element of the result is a sum of a few products, written once.
  static void add_outer_products(T* out, const T* a, int64_t a_stride, const Rows<const T>& b, const Share& share,
                                 int64_t N, int64_t K, bool accumulate) {
    const T* rows[kRowsWorthPacking];
    for (int64_t k = 0; k < K; ++k) rows[k] = b[k];
    const int64_t end = least(share.block_end * kBlock, N);
    for (int64_t m = share.row; m < share.row_end; ++m) {
      T* const to = out + m * N;
      // `vectors` of the result that begin at n, or `count` elements of one.
      const auto add = [&](int64_t n, auto vectors, auto... count) FUSED_RNN_INLINED {
        constexpr int kVectors = decltype(vectors)::value;
        Vec<T> sums[kVectors] = {};
        for (int64_t k = 0; k < K; ++k) {
          const T factor = a[k * a_stride + m];
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sums[v] += factor * load(rows[k] + n + v * kLanes<T>, count...);
        }
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          T* const sum = to + n + v * kLanes<T>;
          store(sum, accumulate ? sums[v] + load(sum, count...) : sums[v], count...);
        }
      };
      int64_t n = share.block * kBlock;
      for (; n + 4 * kLanes<T> <= end; n += 4 * kLanes<T>) add(n, std::integral_constant<int, 4>());
      for (; n + kLanes<T> <= end; n += kLanes<T>) add(n, std::integral_constant<int, 1>());
      if (n < end) add(n, std::integral_constant<int, 1>(), end - n);
    }
  }

  bool splits() const { return operands_ != Operands::kPlain; }

  // Whether digits hold what this worker reads of b [K, N] beside the largest number of a column. That may meet zeros:
  // an input out of all proportion, such as one that stands for a missing value, shuts the gates. So it is compared
  // with the mean of the numbers that are not zeros: digits end at 2^-31 of the largest, and float32 at 2^-24 of each.
  bool fits_digits(const Rows<const T>& b, const Share& share, int64_t N, int64_t K) const {
    if constexpr (kSplits) {
      if (cpu::digits_of(operands_) == 0) return true;
      const int64_t first = share.block * kBlock, count = least(share.block_end * kBlock, N) - first;
      Largest largest;
      Vec<float> sums{}, counts{};
      for (int64_t k = 0; k < K; ++k) {
        each_lanes<float>(count, [&](int64_t i, int64_t n) {
          const Vec<float> v = load(b[k] + first + i, n), size = v < 0 ? -v : v;
          largest.add(v);
          sums += size;
          counts -= __builtin_convertvector((Ints)(size > 0), Vec<float>);
        });
      }
      float sum = 0, numbers = 0;
      for (int64_t i = 0; i < kLanes<float>; ++i) sum += sums[i], numbers += counts[i];
      constexpr float kMostOfMean = 128;
      const float most = largest.all();
      return most <= kLargestOfDigits && most * numbers <= kMostOfMean * sum;  // not if one is NaN
    }
    return true;
  }

  static Panel<T> own_panel(const T* data, int64_t block, int64_t N) {
    const int vectors = block_vectors<T, 1>(N, block * kBlock);
    return {data, vectors * kLanes<T>, 0, vectors};
  }

  // Block `block` of N columns, whose panel is number `index` of the packed ones.
  SplitPanel split_panel(T* panels, int64_t index, int64_t block, int64_t K, int64_t N) const {
    T* const panel = panels + index * SplitPanel::size(K, kBlock, operands_);
    return {panel, K, block_vectors<T, 1>(N, block * kBlock) * int(kLanes<T>), operands_};
  }

  // out or out += rows [row, row + count) times blocks [block, end) of b, whose panels are packed; `split` is memory
  // for the rows' tiles.
  void add_split(const Rows<T>& out, int64_t row, int count, const T* const* rows, T* split, T* panels, int64_t block,
                 int64_t end, const Rows<const T>& b, int64_t K, int64_t N, bool accumulate) const {
    const SplitRows tiles(split, count, 0, count, K, operands_);
    tiles.split(count, worker_, false, [&](int64_t r) { return rows[r]; });
    for (int64_t index = 0; block + index < end; ++index) {
      const int64_t unit = (block + index) * kBlock;
      Sums<T, U> sums;
      clear<T, U>(sums, count);
      tile_products_.add(sums, block_vectors<T, 1>(N, unit), tiles, 0, count,
                         split_panel(panels, index, block + index, K, N),
                         [&](int r) { add_columns_in_float32(sums[r], rows[r], b, N, K, unit); });
      store_sums(out, Part{row, block + index, count, 1}, sums, N, accumulate);
    }
  }

  static void add(const Rows<T>& out, const Part& part, const T* const* rows, const Panel<T>& panel, int64_t K,
                  int64_t N, bool accumulate) {
    for (int slot = 0; slot < part.slots(); ++slot) {
      fetch<true>(out[part.row_of(slot)] + part.block_of(slot) * kBlock, kBlock);
    }
    // A whole block goes from the registers to its place. What is added to a result is summed apart, for accuracy.
    const bool whole = part.blocks == 1 && N - part.block * kBlock >= kBlock;
    if (whole && !accumulate && !out.places) {
      return multiply<T, U>(Output<T>(out[part.row] + part.block * kBlock, out.stride), kFromZero<T>, part, rows, panel,
                            K);
    }
    Sums<T, U> sums;
    multiply<T, U>(sums, kFromZero<T>, part, rows, panel, K);
    store_sums(out, part, sums, N, accumulate);
  }

  static FUSED_RNN_INLINE void store_sums(const Rows<T>& out, const Part& part, const Sums<T, U>& sums, int64_t N,
                                          bool accumulate) {
    each_vector<T, U>(part, N, [&](int slot, int u, Units units) {
      T* to = out[part.row_of(slot)] + units.unit;
      store(to, accumulate ? sums[slot][u] + load(to, units.count) : sums[slot][u], units.count);
    });
  }

  const Operands operands_;
  const TileProducts tile_products_;
  T* const workspace_;
  const cpu::Worker& worker_;
};

template <class Cell, class T>
class Gradients {
 public:
  Gradients(const BackwardParams& params, const cpu::Worker& worker)
      : p_(params),
        s_(params.shape),
        worker_(worker),
        products_(params.shape, at(params.workspace) + worker.index * workspace(params.shape), worker) {}

  // Elements of workspace for each thread.
  static int64_t workspace(const LayerShape& s) {
    const int64_t widest = s.I > s.P ? s.I : s.P;
    const int64_t dx = Products<T>::rows_workspace(s.gates_given ? 0 : s.I, Cell::kGates * s.H, s.operands);
    const int64_t dw = Products<T>::transposed_workspace(s.projected && s.H > widest ? s.H : widest, s.N, s.operands);
    return ceil_div(dx > dw ? dx : dw, 16) * 16;
  }

  void operator()() {
    for (int64_t direction = 0; direction < s_.directions; ++direction) {
      const BackwardDirection& d = p_.direction[direction];
      if (p_.dx) input(d, direction > 0);
      if (d.dw_ih) input_weights(d);
      if (d.dw_hh) {
        const T* grads = s_.normalised ? at(d.dproduct) : hidden_grads(d);
        products_.transposed(at(d.dw_hh), grads, (s_.normalised ? kRows : kWidth) * s_.H,
                             Rows<const T>{at(d.reserve.h_prev), d.reserve.stride}, kRows * s_.H, s_.P, s_.N,
                             p_.accumulate);
      }
      if (d.db_ih) biases(d);
      if (d.dnorm_hh) gains(d);
      if (d.dw_hr) {
        products_.transposed(at(d.dw_hr), at(d.dh_total), s_.P, Rows<const T>{at(d.reserve.hidden), d.reserve.stride},
                             s_.P, s_.H, s_.N, p_.accumulate);
      }
    }
  }

 private:
  // A row of dgates has kWidth blocks of H columns. The first kRows blocks are the gates of W_ih x, its last kShift
  // gates first; the kRows blocks from kHiddenGrads on are the gates of W_hh h. See csrc/cells/rnn.h.
  static constexpr int64_t kWidth = Cell::kGrads, kRows = Cell::kGates, kShift = Cell::kInputShift;

  static T* at(void* p) { return static_cast<T*>(p); }
  static const T* at(const void* p) { return static_cast<const T*>(p); }
  const T* hidden_grads(const BackwardDirection& d) const { return at(d.dgates) + Cell::kHiddenGrads * s_.H; }

  // Calls f(column, row, count) for each run of `count` columns of dgates that corresponds to a run of rows of W_ih.
  template <class F>
  void each_input_run(const F& f) const {
    if (kShift) f(0, (kRows - kShift) * s_.H, kShift * s_.H);
    f(kShift * s_.H, 0, (kRows - kShift) * s_.H);
  }

  // dx: the sum over both directions; with gates_given each direction has columns of its own.
  void input(const BackwardDirection& d, bool accumulate) {
    if (s_.gates_given) return input_gates(d);
    each_input_run([&](int64_t column, int64_t row, int64_t count) {
      products_.rows(Rows<T>{at(p_.dx), s_.I, s_.places}, at(d.dgates) + column, kWidth * s_.H, at(d.w_ih) + row * s_.I,
                     s_.N, s_.I, count, accumulate || column > 0);
    });
  }

  void input_gates(const BackwardDirection& d) {
    const int64_t width = kRows * s_.H, direction = &d - p_.direction;
    for (int64_t n = worker_.begin(s_.N); n < worker_.end(s_.N); ++n) {
      T* out = at(p_.dx) + (s_.place(n) * s_.directions + direction) * width;
      const T* grads = at(d.dgates) + n * kWidth * s_.H;
      each_input_run([&](int64_t column, int64_t row, int64_t count) {
        __builtin_memcpy(out + row, grads + column, count * sizeof(T));
      });
    }
  }

  void input_weights(const BackwardDirection& d) {
    each_input_run([&](int64_t column, int64_t row, int64_t count) {
      products_.transposed(at(d.dw_ih) + row * s_.I, at(d.dgates) + column, kWidth * s_.H,
                           Rows<const T>{at(d.x), s_.I, s_.places}, count, s_.I, s_.N, p_.accumulate);
    });
  }

  void biases(const BackwardDirection& d) {
    each_input_run([&](int64_t column, int64_t row, int64_t count) {
      sum(at(d.dgates) + column, kWidth * s_.H, count, at(d.db_ih) + row);
    });
    sum(hidden_grads(d), kWidth * s_.H, kRows * s_.H, at(d.db_hh));
  }

  void gains(const BackwardDirection& d) {
    sum(hidden_grads(d), kWidth * s_.H, kRows * s_.H, at(d.dnorm_hh), at(d.reserve.h_hat), d.reserve.stride);
    if (d.dnorm_c) sum(at(d.dnormal), 2 * s_.H, 2 * s_.H, at(d.dnorm_c));
  }

  void sum(const T* columns, int64_t stride, int64_t count, T* out, const T* by = nullptr, int64_t by_stride = 0) {
    const int64_t lines = ceil_div(count, 16), begin = worker_.begin(lines) * 16;
    const int64_t end = least(worker_.end(lines) * 16, count);
    if (begin >= end) return;
    column_sums(columns + begin, s_.N, end - begin, stride, by ? by + begin : nullptr, by_stride, out + begin,
                p_.accumulate);
  }

  const BackwardParams& p_;
  const LayerShape& s_;
  const cpu::Worker& worker_;
  Products<T> products_;
};

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
