// The structure of a block: its warps, its tile of units and rows, and the layout of its shared memory. The planner
// uses it on the host, the kernels on the device.
#pragma once

#include "../cells/math.h"

namespace fused_rnn {
namespace cuda {

constexpr int kTileUnits = 16;        // units of a warp: the rows of operand a of a tensor-core tile
constexpr int kTileRows = 8;          // batch rows of a tensor-core tile
constexpr int kWeightRegisters = 96;  // per thread

enum class Exchange : int { kAlone, kThroughL2, kThroughCluster };
constexpr int kMaxClusterBlocks = 8;  // the maximum on every device that has clusters

// A kernel instance. A block has unit_warps * depth_warps warps: unit_warps groups of kTileUnits units, and in each
// group depth_warps warps that split the columns of the weights. It computes row_tiles * kTileRows batch rows at a
// time.
struct Instance {
  Exchange exchange;
  int unit_warps, depth_warps, row_tiles;

  FUSED_RNN_INLINE constexpr int threads() const { return 32 * unit_warps * depth_warps; }
  FUSED_RNN_INLINE constexpr int units() const { return kTileUnits * unit_warps; }
  FUSED_RNN_INLINE constexpr int rows() const { return kTileRows * row_tiles; }
};

// The instances that are compiled, for every cell and element: X(exchange, unit_warps, depth_warps, row_tiles)
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
  X(kThroughCluster, 4, 2, 1)

// A 16-byte load of weights holds the operands of a pair of tensor-core steps. This many pairs of each gate stay in
// registers; the rest are in shared memory.
FUSED_RNN_INLINE constexpr int register_pairs(int gates) { return kWeightRegisters / (8 * gates); }

// The size of a step's product: `gates` rows of weights per unit, each of `columns` elements of `element` bytes.
struct Product {
  int gates, columns, element;

  FUSED_RNN_INLINE constexpr int pair_columns() const { return 64 / element; }
  // Pairs of tensor-core steps of each depth warp, and how many of them are in shared memory.
  FUSED_RNN_INLINE constexpr int pairs(int depth_warps) const {
    return (columns + depth_warps * pair_columns() - 1) / (depth_warps * pair_columns());
  }
  FUSED_RNN_INLINE constexpr int shared_pairs(int depth_warps) const {
    const int rest = pairs(depth_warps) - register_pairs(gates);
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

  FUSED_RNN_INLINE constexpr int width() const { return gates == 1 ? 1 : 4; }  // floats of a vector
  // Vectors of a warp.
  FUSED_RNN_INLINE constexpr int stride() const { return gates == 1 ? rows / 2 * 40 + 16 : rows * 17; }
  // The index of a vector.
  FUSED_RNN_INLINE constexpr int at(int warp, int row, int unit) const {
    return warp * stride() + (gates == 1 ? row / 2 * 40 + row % 2 * 16 : row * 17) + unit;
  }
  FUSED_RNN_INLINE constexpr int bytes(int warps) const { return warps * stride() * width() * 4; }
};

// Byte offsets in shared memory.
struct Layout {
  int weights;  // the pairs that are not in registers: [warp, pair, gate, 2, lane] of 16 bytes
  int sums;     // see PartialSums; the warps are [depth warp, unit warp]
  int state;    // [tile, 2, row, unit] floats: see State in block.cuh
  int slots;    // rows exchanged through shared memory, in bytes: [tile, row, slot_stride] for kAlone,
                // [tile, 2, row, slot_stride] for kThroughCluster
  int slot_stride;
  int arrivals;  // [tile, 2] mbarriers of 8 bytes, one for each slot of kThroughCluster
  int total;

  FUSED_RNN_INLINE constexpr Layout(Instance instance, Product product, int tiles)
      : weights(0), sums(0), state(0), slots(0), slot_stride(0), arrivals(0), total(0) {
    const int warps = instance.unit_warps * instance.depth_warps;
    sums = weights + warps * product.shared_pairs(instance.depth_warps) * product.gates * 2 * 32 * 16;
    state = sums + PartialSums{product.gates, instance.rows()}.bytes(warps);
    slots = state + tiles * 2 * instance.rows() * instance.units() * 4;
    // 64 bytes more than a multiple of 128, so that the eight lanes that load together use different banks.
    slot_stride = (product.columns * product.element + 127) / 128 * 128 + 64;
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
  static constexpr int kUnits = kTileUnits * unit_warps, kRows = kTileRows * row_tiles;
  static constexpr int kRowStep = kThreads / kUnits;  // a thread has one unit, and every kRowStep-th row
  static constexpr int kRowsPerThread = (kRows + kRowStep - 1) / kRowStep;
  FUSED_RNN_INLINE static constexpr int unit(int thread) { return thread % kUnits; }  // in the block
  FUSED_RNN_INLINE static constexpr int row(int thread, int i) { return thread / kUnits + i * kRowStep; }
  FUSED_RNN_INLINE static constexpr Instance instance() { return {exchange, unit_warps, depth_warps, row_tiles}; }
};

}  // namespace cuda
}  // namespace fused_rnn
