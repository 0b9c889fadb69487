// The structure of a block: its warps, its tile of units and rows, and the layout of its shared memory. The planner
// uses it on the host, the kernels on the device.
#pragma once

#include "../cells/math.h"

namespace fused_rnn {
namespace cuda {

constexpr int kTileUnits = 16;        // units of a warp: the rows of operand a of a tensor-core tile
constexpr int kTileRows = 8;          // batch rows of a tensor-core tile
constexpr int kWeightRegisters = 96;  // per thread
constexpr int kChunkPairs = 4;        // pairs of tensor-core steps whose rows are loaded together
constexpr int kSplitChunkPairs = 2;   // the same for kSplitColumns, whose blocks have few columns

enum class Exchange : int { kAlone, kThroughL2, kThroughCluster, kSplitColumns };
constexpr int kMaxClusterBlocks = 8;  // the maximum on every device that has clusters
constexpr int kSplitBlocks = 8;       // blocks of a cluster of kSplitColumns
// Whether blocks exchange rows through global memory.
constexpr bool through_l2(Exchange e) { return e == Exchange::kThroughL2 || e == Exchange::kSplitColumns; }
constexpr int kRingSteps = 64;  // time steps of which a ring of exchanged rows holds the words; see ThroughL2
static_assert(kRingSteps >= 4 && (kRingSteps & (kRingSteps - 1)) == 0, "times are masked");
constexpr bool has_forward(Exchange e) { return e != Exchange::kSplitColumns; }

// A kernel instance. A block has unit_warps * depth_warps warps: unit_warps groups of kTileUnits units, and in each
// group depth_warps warps that split the columns of the weights. It computes row_tiles * kTileRows batch rows at a
// time.
struct Instance {
  Exchange exchange;
  int unit_warps, depth_warps, row_tiles;

  FUSED_RNN_INLINE constexpr int threads() const { return 32 * unit_warps * depth_warps; }
  FUSED_RNN_INLINE constexpr int units() const { return kTileUnits * unit_warps; }
  FUSED_RNN_INLINE constexpr int rows() const { return kTileRows * row_tiles; }
  // Blocks of a team; whole clusters, whose last blocks may have no units.
  constexpr int parts(int H) const {
    const int whole = exchange == Exchange::kSplitColumns ? kSplitBlocks : 1;
    return (H + units() * whole - 1) / (units() * whole) * whole;
  }
  constexpr int cluster(int parts) const {  // blocks of a cluster
    return exchange == Exchange::kThroughCluster ? parts : exchange == Exchange::kSplitColumns ? kSplitBlocks : 1;
  }
};

// The instances that are compiled, for every cell and element: X(exchange, unit_warps, depth_warps, row_tiles).
// kSplitColumns has only backward.
#define FUSED_RNN_INSTANCES(X) \
  X(kAlone, 8, 1, 1)           \
  X(kThroughL2, 1, 8, 1)       \
  X(kThroughL2, 1, 8, 2)       \
  X(kThroughL2, 1, 8, 4)       \
  X(kThroughL2, 2, 4, 1)       \
  X(kThroughL2, 2, 4, 2)       \
  X(kThroughL2, 2, 4, 4)       \
  X(kThroughCluster, 1, 8, 1)  \
  X(kThroughCluster, 2, 4, 1)  \
  X(kThroughCluster, 4, 2, 1)  \
  X(kSplitColumns, 1, 8, 1)    \
  X(kSplitColumns, 1, 8, 2)    \
  X(kSplitColumns, 1, 8, 4)

// A 16-byte load of weights holds the operands of a pair of tensor-core steps. A pair of each gate takes eight
// registers. This many stay there, in the order of pairs and then of gates; the rest are in shared memory.
constexpr int kRegisterOperands = kWeightRegisters / 8;

// The size of a step's product: `gates` rows of weights per unit, each of `columns` elements of `element` bytes.
struct Product {
  int gates, columns, element;

  FUSED_RNN_INLINE constexpr int pair_columns() const { return 64 / element; }
  // Pairs of tensor-core steps of each depth warp, and how many pairs of all gates are in shared memory.
  FUSED_RNN_INLINE constexpr int pairs(int depth_warps) const {
    return (columns + depth_warps * pair_columns() - 1) / (depth_warps * pair_columns());
  }
  FUSED_RNN_INLINE constexpr int shared_operands(int depth_warps) const {
    const int rest = pairs(depth_warps) * gates - kRegisterOperands;
    return rest > 0 ? rest : 0;
  }
};

// The row and unit, within a tensor-core tile, of the i-th (0..3) of the sums that a lane holds.
FUSED_RNN_INLINE constexpr int sum_row(int lane, int i) { return lane % 4 * 2 + i % 2; }
FUSED_RNN_INLINE constexpr int sum_unit(int lane, int i) { return lane / 4 + i / 2 * 8; }

// Where a block keeps the partial sums of its warps: for each warp, row and unit a vector of the gates' sums, which one
// instruction stores or loads. The padding avoids bank conflicts: warps store with the lanes' rows and units of
// sum_row() and sum_unit(), and load the units of a row, or of two.
struct PartialSums {
  int gates, rows;

  // kSplitColumns: the sums of the cluster's blocks, which take the place of the gates, are apart, and four units are
  // loaded together. Pairs of rows are rotated instead of padded.
  FUSED_RNN_INLINE constexpr bool apart() const { return gates == kSplitBlocks; }
  FUSED_RNN_INLINE constexpr int width() const { return gates == 1 || apart() ? 1 : 4; }  // floats of a vector
  // Vectors of a warp.
  FUSED_RNN_INLINE constexpr int stride() const {
    return apart() ? gates * rows * 16 : gates == 1 ? rows / 2 * 40 + 16 : rows * 17;
  }
  // The index of a vector; block: only if they are apart.
  FUSED_RNN_INLINE constexpr int at(int warp, int row, int unit, int block = 0) const {
    const int place = row % 2 * 16 + unit;
    return warp * stride() + (apart()      ? (block * rows + row) / 2 * 32 + (row / 2 * 8 + place) % 32
                              : gates == 1 ? row / 2 * 40 + place
                                           : row * 17 + unit);
  }
  FUSED_RNN_INLINE constexpr int bytes(int warps) const { return warps * stride() * width() * 4; }
};

// The product of a block in backward: `columns` gradients with the weights of its units. With kSplitColumns it is a
// share of the columns, in whole pairs, with the weights of all units of the cluster, whose blocks take the place of
// gates.
FUSED_RNN_INLINE constexpr Product backward_product(Exchange exchange, int columns, int element) {
  if (exchange != Exchange::kSplitColumns) return {1, columns, element};
  const int pair = Product{1, columns, element}.pair_columns();
  return {kSplitBlocks, (columns + kSplitBlocks * pair - 1) / (kSplitBlocks * pair) * pair, element};
}

// Byte offsets in shared memory.
struct Layout {
  int weights;  // the operands that are not in registers: [warp, pair and gate, 2, lane] of 16 bytes
  int sums;     // see PartialSums; the warps are [depth warp, unit warp]
  int state;    // [tile, 2, row, unit] floats: see State in block.cuh
  int slots;    // rows exchanged through shared memory, in bytes: [tile, row, slot_stride] for kAlone,
                // [tile, 2, row, slot_stride] for kThroughCluster. The partial sums from the cluster's blocks, for
                // kSplitColumns: [2, kSplitBlocks, row, unit] floats
  int slot_stride;
  int arrivals;  // mbarriers of 8 bytes, one for each slot: [tile, 2] for kThroughCluster, [2] for kSplitColumns
  int total;

  FUSED_RNN_INLINE constexpr Layout(Instance instance, Product product, int tiles)
      : weights(0), sums(0), state(0), slots(0), slot_stride(0), arrivals(0), total(0) {
    const int warps = instance.unit_warps * instance.depth_warps;
    sums = weights + warps * product.shared_operands(instance.depth_warps) * 2 * 32 * 16;
    state = sums + PartialSums{product.gates, instance.rows()}.bytes(warps);
    slots = state + tiles * 2 * instance.rows() * instance.units() * 4;
    // 64 bytes more than a multiple of 128, so that the eight lanes that load together use different banks.
    slot_stride = (product.columns * product.element + 127) / 128 * 128 + 64;
    if (instance.exchange == Exchange::kSplitColumns) {
      arrivals = slots + 2 * kSplitBlocks * instance.rows() * instance.units() * 4;
      total = arrivals + 2 * 8;
      return;
    }
    const bool cluster = instance.exchange == Exchange::kThroughCluster;
    const int buffers = cluster ? 2 : instance.exchange == Exchange::kAlone ? 1 : 0;
    arrivals = slots + tiles * buffers * instance.rows() * slot_stride;
    total = arrivals + (cluster ? tiles * buffers * 8 : 0);
  }
};

// An Instance as the template argument of a kernel.
template <Exchange exchange, int unit_warps, int depth_warps, int row_tiles>
struct Shape {
  static constexpr Exchange kExchange = exchange;
  static constexpr int kUnitWarps = unit_warps, kDepthWarps = depth_warps, kRowTiles = row_tiles;
  static constexpr int kThreads = 32 * unit_warps * depth_warps;
  // Blocks that split the columns of their units.
  static constexpr int kShares = exchange == Exchange::kSplitColumns ? kSplitBlocks : 1;
  static constexpr int kUnits = kTileUnits * unit_warps, kRows = kTileRows * row_tiles;
  static constexpr int kRowStep = kThreads / kUnits;  // a thread has one unit, and every kRowStep-th row
  static constexpr int kRowsPerThread = (kRows + kRowStep - 1) / kRowStep;
  FUSED_RNN_INLINE static constexpr int unit(int thread) { return thread % kUnits; }  // in the block
  FUSED_RNN_INLINE static constexpr int row(int thread, int i) { return thread / kUnits + i * kRowStep; }
  FUSED_RNN_INLINE static constexpr Instance instance() { return {exchange, unit_warps, depth_warps, row_tiles}; }
};

}  // namespace cuda
}  // namespace fused_rnn
