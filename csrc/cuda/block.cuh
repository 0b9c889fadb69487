// What forward and backward share: which part of the layer a block has, and which units and rows a thread.
#pragma once

#include "element.h"
#include "layout.h"
#include "params.h"

namespace fused_rnn {
namespace cuda {

// The batch rows that a block has in hand.
struct Tile {
  int index;      // among the team's
  int64_t first;  // row
  int rows;
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
  // This thread's unit, of the block and of the layer.
  FUSED_RNN_DEVICE int unit_of_block() const { return thread_index() % Shape::kUnits; }
  FUSED_RNN_DEVICE int unit() const { return first_unit_ + unit_of_block(); }
  // This thread's i-th row of a tile.
  FUSED_RNN_DEVICE int row(int i) const { return thread_index() / Shape::kUnits + i * Shape::kRowStep; }

  FUSED_RNN_DEVICE Tile tile(int index) const {
    const int64_t first =
        sequence_.first_row + static_cast<int64_t>(team_ + index * sequence_.division.teams) * Shape::kRows;
    const int64_t left = sequence_.last_row - first;
    return {index, first, static_cast<int>(left < 0 ? 0 : left < Shape::kRows ? left : Shape::kRows)};
  }
  // When step `step` of a walk along or against the direction is.
  FUSED_RNN_DEVICE int64_t time(int64_t step, bool backwards) const {
    return backwards != (direction_ == 1) ? sequence_.T - 1 - step : step;
  }
  // Whether row b takes part at time t.
  FUSED_RNN_DEVICE bool active(int64_t t, int64_t b) const { return !sequence_.lengths || t < sequence_.lengths[b]; }

  // Whether row b, when it comes to time t, begins a sequence: at the borders that both directions share, but for the
  // direction's first step.
  FUSED_RNN_DEVICE bool begins(int64_t t, int64_t b) const {
    if (!sequence_.resets) return false;
    const int64_t later = direction_ == 0 ? t : t + 1;  // of the two steps that the border is between
    return later > 0 && later < sequence_.T && active(later, b) && sequence_.resets[later * sequence_.B + b];
  }

 private:
  const Sequence& sequence_;
  int first_unit_, team_, direction_;
};

// Two floats of each unit and row that a block carries from step to step. Each is its own thread's.
template <class Shape>
class State {
 public:
  FUSED_RNN_DEVICE State(Shared<float> shared, const Block<Shape>& block, const Tile& tile)
      : shared_(shared), first_(tile.index * 2 * kElements + block.unit_of_block()), row_(block.row(0)) {}
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

// H rounded up to whole 16-byte loads.
template <class E>
FUSED_RNN_DEVICE int padded(int H) {
  constexpr int kElements = 16 / sizeof(typename E::Stored);
  return (H + kElements - 1) / kElements * kElements;
}

}  // namespace cuda
}  // namespace fused_rnn
