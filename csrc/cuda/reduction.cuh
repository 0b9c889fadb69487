// How backward adds up its product: two policies with the same members.
//
// BlockSums: the block has multiplied all columns, and the sums of its warps are in its shared memory.
// ClusterSums (kSplitColumns): the blocks of a cluster have multiplied a share of the columns each, for the units of
// all of them. So a block loads only its share of the rows through L2. It adds up the sums of its warps and pushes
// them to the blocks that own the units, 16 bytes at a time; those add up what they received, in the order of the
// blocks, so that results do not depend on the order of arrival.
#pragma once

#include "exchange.cuh"
#include "product.cuh"

namespace fused_rnn {
namespace cuda {

template <class Weights, class Shape>
class BlockSums {
 public:
  FUSED_RNN_DEVICE BlockSums(const Block<Shape>&, const Layout& layout)
      : sums_(shared_memory<typename Weights::Sums>(layout.sums)) {}

  // Called by all threads, between the barrier behind a product and sum().
  FUSED_RNN_DEVICE void exchange() {}
  // The product of a row with the weights of this block's unit.
  FUSED_RNN_DEVICE float sum(int row, int unit) const {
    float total[1] = {};
    Weights::add(sums_, row, unit, total);
    return total[0];
  }
  // Called by all threads at the end.
  FUSED_RNN_DEVICE void finish() const {}

 private:
  Shared<typename Weights::Sums> sums_;
};

// Products alternate between two slots, each with an mbarrier that counts the bytes arriving in it; whole tiles are
// pushed, so that their number is always the same.
//
// Two slots suffice. A block pushes the sums of a product only after all its threads have read those of the product
// before, because a barrier lies between. A block that has received all sums of a product therefore knows that every
// block has read the sums of the product before it, and only then pushes those of the product after it, which go into
// the same slot.
//
// Thread 0 declares the expected bytes of a slot's next phase when the current one has ended. The block's own bytes
// count as well, so that no phase ends before all its threads have seen the previous one end. A thread that has timed
// out pushes no more and its sums are NaN; see ThroughCluster for why that and finish() are necessary. A thread that
// has timed out in ThroughL2 keeps up with its cluster and pushes NaN.
template <class Shape>
class ClusterSums {
 public:
  FUSED_RNN_DEVICE ClusterSums(const Block<Shape>& block, const Layout& layout)
      : sums_(layout.sums), slots_(layout.slots), arrivals_(layout.arrivals), watchdog_(block.sequence()) {
    if (thread_index() == 0) {
      for (int slot = 0; slot < 2; ++slot) {
        arrivals(slot).init();
        arrivals(slot).expect(kSlotBytes);
      }
    }
    sync_cluster();
  }

  FUSED_RNN_DEVICE void exchange() {
    const int slot = ++products_ & 1, parity = products_ >> 1 & 1;
    if (!watchdog_.gave_up()) {
      FUSED_RNN_UNROLL
      for (int tile = 0; tile < Shape::kRowTiles; ++tile) push_sums(slot, tile);
    }
    watchdog_.start();
    while (!arrivals(slot).complete(parity) && watchdog_.keep_waiting()) continue;
    if (thread_index() == 0 && !watchdog_.gave_up()) arrivals(slot).expect(kSlotBytes);
  }
  FUSED_RNN_DEVICE float sum(int row, int unit) const {
    if (watchdog_.gave_up()) return math::bits<float>(uint32_t{kNotReady});
    float total = 0;
    FUSED_RNN_UNROLL
    for (int from = 0; from < kSplitBlocks; ++from)
      total += shared_memory<float>(at(products_ & 1, from, row, unit))[0];
    return total;
  }
  FUSED_RNN_DEVICE void finish() const { sync_cluster(); }

 private:
  static_assert(Shape::kUnitWarps == 1 && Shape::kDepthWarps == kSplitBlocks, "each warp pushes to one block");
  static constexpr int kSlotBytes = kSplitBlocks * Shape::kRows * Shape::kUnits * 4;

  FUSED_RNN_DEVICE Arrivals arrivals(int slot) const { return Arrivals(arrivals_ + slot * 8); }
  // Byte offset in shared memory.
  FUSED_RNN_DEVICE int at(int slot, int from, int row, int unit) const {
    return slots_ + slot * kSlotBytes + ((from * Shape::kRows + row) * Shape::kUnits + unit) * 4;
  }

  // Each warp pushes to the block of its number; a lane has four units of a row.
  FUSED_RNN_DEVICE void push_sums(int slot, int tile) const {
    const int to = thread_index() / 32, lane = thread_index() % 32;
    const int row = kTileRows * tile + lane / 4, unit = lane % 4 * 4;
    constexpr PartialSums kPartial{kSplitBlocks, Shape::kRows};
    float total[4] = {};
    FUSED_RNN_UNROLL
    for (int depth = 0; depth < Shape::kDepthWarps; ++depth) {
      const Words sums = shared_memory<Words>(sums_ + 4 * kPartial.at(depth, row, unit, to))[0];
      FUSED_RNN_UNROLL
      for (int i = 0; i < 4; ++i) total[i] += math::bits<float>(sums.w[i]);
    }
    Words words;
    FUSED_RNN_UNROLL
    for (int i = 0; i < 4; ++i) words.w[i] = math::bits<uint32_t>(total[i]);
    push(at(slot, Block<Shape>::rank(), row, unit), words, arrivals(slot), to);
  }

  int sums_, slots_, arrivals_;
  int products_ = -1;  // the number of the latest product
  Watchdog watchdog_;
};

template <class Weights, class Shape, bool split = Shape::kExchange == Exchange::kSplitColumns>
struct SumsFor {
  using Type = BlockSums<Weights, Shape>;
};
template <class Weights, class Shape>
struct SumsFor<Weights, Shape, true> {
  using Type = ClusterSums<Shape>;
};

}  // namespace cuda
}  // namespace fused_rnn
