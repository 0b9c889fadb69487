// The product of a block's recurrent weights with the published rows of all units. The weights stay on the chip for the
// whole sequence: in registers, and in shared memory where registers do not suffice.
//
// The weights are the tensor cores' operand a (16 units by columns), the published rows operand b (columns by 8 batch
// rows). Lane l loads 16 bytes of row l / 4 and uses them in a pair of tensor-core steps. Both operands are loaded in
// the same way, so that columns of a and b match whatever their order within the pair.
#pragma once

#include "element.h"
#include "layout.h"

namespace fused_rnn {
namespace cuda {

template <class E, int kGates, class Shape>
class ResidentProduct {
 public:
  using Stored = typename E::Stored;
  static constexpr int kWidth = PartialSums{kGates, Shape::kRows}.width();
  struct alignas(4 * kWidth) Sums {  // of the gates of a row and unit
    float of[kWidth];
  };

  // weights: [kGates * H, columns] in rows `stride` apart; the units begin at first_unit. If blocks split columns,
  // their units take the place of the gates: the weights are [H, columns].
  FUSED_RNN_DEVICE ResidentProduct(const Stored* weights, int H, int stride, int columns, int first_unit,
                                   Shared<Words> shared)
      : columns_(columns),
        pairs_(Product{kGates, columns, sizeof(Stored)}.pairs(Shape::kDepthWarps)),
        first_column_(warp() / Shape::kUnitWarps * pairs_ * kPairColumns + lane() % 4 * kLaneColumns),
        shared_(shared) {
    const int shared_operands = Product{kGates, columns, sizeof(Stored)}.shared_operands(Shape::kDepthWarps);
    first_shared_ = warp() * shared_operands * 2 * 32 + lane();
    const int unit = first_unit + warp() % Shape::kUnitWarps * kTileUnits + lane() / 4;
    FUSED_RNN_UNROLL
    for (int i = 0; i < kRegisterOperands; ++i) {
      load_pair(weights, H, stride, unit, i % kGates, i / kGates, registers_[i]);
    }
    for (int i = kRegisterOperands; i < pairs_ * kGates; ++i) {
      Words a[2];
      load_pair(weights, H, stride, unit, i % kGates, i / kGates, a);
      FUSED_RNN_UNROLL
      for (int step = 0; step < 2; ++step) shared_[shared_index(i, step)] = a[step];
    }
    sync_warp();
  }

  // The first row of a tile and the first column that this lane loads.
  FUSED_RNN_DEVICE int lane_row() const { return lane() / 4; }
  FUSED_RNN_DEVICE int lane_column() const { return first_column_; }

  // Multiplies the weights by the rows of `source`, kRowTiles tiles of them, over this warp's columns, and stores the
  // sums in shared memory; after a barrier, sum() adds those of all warps. The loads of a chunk are in flight while the
  // previous chunk is multiplied.
  template <class Source>
  FUSED_RNN_DEVICE void multiply(const Source& source, Shared<Sums> shared) const {
    Words b[kChunk];
    start(source, 0, 0, b);
    for (int tile = 0; tile < Shape::kRowTiles; ++tile) {
      float sums[kGates * kSplit][4] = {};
      const auto in_shared = [&](int pair, int gate, int step) -> Words {
        return shared_[shared_index(pair * kGates + gate, step)];
      };
      FUSED_RNN_UNROLL
      for (int first = 0; first < kRegisterChunks * kChunk; first += kChunk) {
        if (first >= pairs_) break;
        multiply_chunk(source, tile, first, b, sums, [&](int pair, int gate, int step) -> Words {
          const int i = pair * kGates + gate;
          return i < kRegisterOperands ? registers_[i][step] : in_shared(pair, gate, step);
        });
      }
      for (int first = kRegisterChunks * kChunk; first < pairs_; first += kChunk) {
        multiply_chunk(source, tile, first, b, sums, in_shared);
      }
      store(shared, tile, sums);
    }
  }

  // Adds the products of a row with the weights of a unit's gates, summed over the depth warps.
  FUSED_RNN_DEVICE static void add(Shared<Sums> shared, int row, int unit, float (&total)[kGates]) {
    FUSED_RNN_UNROLL
    for (int depth = 0; depth < Shape::kDepthWarps; ++depth) {
      const int warp = depth * Shape::kUnitWarps + unit / kTileUnits;
      const Sums part = shared[PartialSums{kGates, Shape::kRows}.at(warp, row, unit % kTileUnits)];
      FUSED_RNN_UNROLL
      for (int gate = 0; gate < kGates; ++gate) total[gate] += part.of[gate];
    }
  }

 private:
  static constexpr bool kSplits = Shape::kShares > 1 && kGates == Shape::kShares;
  static constexpr int kChunk = kSplits ? kSplitChunkPairs : kChunkPairs;  // pairs of a chunk
  static constexpr int kRegisterChunks = (kRegisterOperands + kChunk * kGates - 1) / (kChunk * kGates);
  static constexpr int kSplit = kGates == 1 ? 4 : 1;  // independent sums per gate, to hide the latency of mma
  static constexpr int kLaneColumns = 16 / sizeof(Stored);
  static constexpr int kPairColumns = 4 * kLaneColumns;

  FUSED_RNN_DEVICE static int lane() { return thread_index() % 32; }
  FUSED_RNN_DEVICE static int warp() { return thread_index() / 32; }

  FUSED_RNN_DEVICE int column(int pair) const { return first_column_ + pair * kPairColumns; }
  FUSED_RNN_DEVICE int shared_index(int i, int step) const {
    return first_shared_ + ((i - kRegisterOperands) * 2 + step) * 32;
  }

  FUSED_RNN_DEVICE void load_pair(const Stored* weights, int H, int stride, int unit, int gate, int pair,
                                  Words (&a)[2]) const {
    FUSED_RNN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = unit + half * 8 + (kSplits ? gate * Shape::kUnits : 0);
      Words v{};
      if (pair < pairs_ && row < H && column(pair) < columns_) {
        const int64_t first = kSplits ? 0 : static_cast<int64_t>(gate) * H;
        v = *reinterpret_cast<const Words*>(weights + (first + row) * stride + column(pair));
      }
      FUSED_RNN_UNROLL
      for (int step = 0; step < 2; ++step) {
        a[step].w[half] = E::operand(v.w[2 * step]);
        a[step].w[half + 2] = E::operand(v.w[2 * step + 1]);
      }
    }
  }

  template <class Source>
  FUSED_RNN_DEVICE void start(const Source& source, int tile, int first, Words (&b)[kChunk]) const {
    FUSED_RNN_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      b[i] = first + i < pairs_ ? source.load(tile, (first + i) * kPairColumns) : Words{};
    }
  }

  // Multiplies the chunk in b and replaces b by the next one. weight(pair, gate, step) returns operand a.
  template <class Source, class Weight>
  FUSED_RNN_DEVICE void multiply_chunk(const Source& source, int tile, int first, Words (&b)[kChunk],
                                       float (&sums)[kGates * kSplit][4], const Weight& weight) const {
    Words next[kChunk];
    if (first + kChunk < pairs_) {
      start(source, tile, first + kChunk, next);
    } else if (tile + 1 < Shape::kRowTiles) {
      start(source, tile + 1, 0, next);
    }
    source.wait(b, tile, first * kPairColumns, kPairColumns);
    sync_warp();
    FUSED_RNN_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      if (first + i >= pairs_) break;
      FUSED_RNN_UNROLL
      for (int step = 0; step < 2; ++step) {
        FUSED_RNN_UNROLL
        for (int gate = 0; gate < kGates; ++gate) {
          const Words a = weight(first + i, gate, step);
          E::multiply(sums[gate * kSplit + (2 * i + step) % kSplit], a.w, b[i].w[2 * step], b[i].w[2 * step + 1]);
        }
      }
    }
    FUSED_RNN_UNROLL
    for (int i = 0; i < kChunk; ++i) b[i] = next[i];
  }

  FUSED_RNN_DEVICE static void store(Shared<Sums> shared, int tile, const float (&sums)[kGates * kSplit][4]) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < 4; ++i) {
      constexpr PartialSums kPartial{kGates, Shape::kRows};
      const int row = kTileRows * tile + sum_row(lane(), i), unit = sum_unit(lane(), i);
      Sums total{};
      FUSED_RNN_UNROLL
      for (int gate = 0; gate < kGates; ++gate) {
        float& sum = total.of[kSplits ? 0 : gate];
        sum = sums[gate * kSplit][i];
        FUSED_RNN_UNROLL
        for (int k = 1; k < kSplit; ++k) sum += sums[gate * kSplit + k][i];
        if (kSplits) shared[kPartial.at(warp(), row, unit, gate)] = total;
      }
      if (!kSplits) shared[kPartial.at(warp(), row, unit)] = total;
    }
  }

  int columns_, pairs_, first_column_, first_shared_;
  Shared<Words> shared_;
  Words registers_[kRegisterOperands][2];
};

}  // namespace cuda
}  // namespace fused_rnn
