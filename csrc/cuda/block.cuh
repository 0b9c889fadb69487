// The part of the layer that a block computes, and the units and rows of each thread; used by forward and backward.
#pragma once

#include "element.h"
#include "layout.h"
#include "params.h"

namespace fused_rnn {
namespace cuda {

// The batch rows that a block computes together.
struct Tile {
  int index;      // in the team's list of tiles
  int64_t first;  // batch row
  int rows;       // 0 if the tile is beyond the end of the batch
};

template <class Shape>
class Block {
 public:
  FUSED_RNN_DEVICE explicit Block(const Sequence& sequence) : sequence_(sequence) {
    const Division& d = sequence.division;
    first_unit_ = block_index() % d.parts * Shape::kUnits;
    team_ = block_index() / d.parts % d.teams;
    direction_ = block_index() / (d.parts * d.teams);
  }

  FUSED_RNN_DEVICE const Sequence& sequence() const { return sequence_; }
  FUSED_RNN_DEVICE int direction() const { return direction_; }
  FUSED_RNN_DEVICE int first_unit() const { return first_unit_; }
  // This block's number among those that split columns.
  FUSED_RNN_DEVICE static int rank() { return block_index() % Shape::kShares; }
  // This thread's unit: its index in the block and in the layer. The latter may be H or more in the last block.
  FUSED_RNN_DEVICE int local_unit() const { return Shape::unit(thread_index()); }
  FUSED_RNN_DEVICE int unit() const { return first_unit_ + local_unit(); }
  // This thread's i-th row of a tile.
  FUSED_RNN_DEVICE int row(int i) const { return Shape::row(thread_index(), i); }

  FUSED_RNN_DEVICE Tile tile(int index) const {
    const int64_t first =
        sequence_.first_row + static_cast<int64_t>(team_ + index * sequence_.division.teams) * Shape::kRows;
    const int64_t left = sequence_.last_row - first;
    return {index, first, static_cast<int>(left < 0 ? 0 : left < Shape::kRows ? left : Shape::kRows)};
  }
  // The time of iteration `step`, in the order of the direction, or in the opposite order if `backwards`.
  FUSED_RNN_DEVICE int64_t time(int64_t step, bool backwards) const {
    return backwards != (direction_ == 1) ? sequence_.T - 1 - step : step;
  }

 private:
  const Sequence& sequence_;
  int first_unit_, team_, direction_;
};

// Two floats for each unit and row of a tile, which a block keeps in shared memory from step to step. Only the thread
// of the unit and row accesses them, so they need no barrier.
template <class Shape>
class State {
 public:
  FUSED_RNN_DEVICE State(Shared<float> shared, const Block<Shape>& block, const Tile& tile)
      : shared_(shared), first_(tile.index * 2 * kElements + block.local_unit()), row_(block.row(0)) {}
  FUSED_RNN_DEVICE float load(int which, int i) const { return shared_[at(which, i)]; }
  FUSED_RNN_DEVICE void store(int which, int i, float value) const { shared_[at(which, i)] = value; }

 private:
  static constexpr int kElements = Shape::kRows * Shape::kUnits;
  FUSED_RNN_DEVICE int at(int which, int i) const {
    return first_ + which * kElements + (row_ + i * Shape::kRowStep) * Shape::kUnits;
  }
  Shared<float> shared_;
  int first_, row_;
};

// H rounded up to a whole number of 16-byte loads.
template <class E>
FUSED_RNN_DEVICE int padded(int H) {
  constexpr int kElements = 16 / sizeof(typename E::Stored);
  return (H + kElements - 1) / kElements * kElements;
}

}  // namespace cuda
}  // namespace fused_rnn
