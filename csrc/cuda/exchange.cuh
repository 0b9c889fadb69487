// How units learn what the others have computed at the step before: two policies with the same members.
//
// ThroughL2: the data is the flag. Every word is written once, after the host has filled all of them with kNotYet; a
// reader loads a word again until it is there. A word is whole or not there, so no fence and no grid barrier is needed.
// Alone: one block holds all units, the rows lie in its shared memory, and the block's own barriers order them.
#pragma once

#include "element.h"
#include "layout.h"
#include "params.h"

namespace fused_rnn {
namespace cuda {

// What is exchanged: rows of `width` elements, of which others read `columns` from `offset` on.
template <class E>
struct Rows {
  typename E::Stored* at;  // [T, B, width]
  int64_t B;
  int width, offset, columns;

  FUSED_RNN_DEVICE typename E::Stored* row(int64_t t, int64_t b) const { return at + (t * B + b) * width; }
};

// The batch rows that a block has in hand.
struct Tile {
  int index;      // among the team's
  int64_t first;  // row
  int rows;
};

template <class E>
class ThroughL2 {
 public:
  // What one lane reads of a tile: its row of every eight, from its column on.
  class Source {
   public:
    FUSED_RNN_DEVICE Source(ThroughL2& exchange, int64_t t, const Tile& tile, int row, int column)
        : exchange_(exchange),
          at_(exchange.rows_.row(t, tile.first + row) + exchange.rows_.offset + column),
          rows_(tile.rows - row),
          columns_(exchange.rows_.columns - column) {}

    FUSED_RNN_DEVICE Words load(int eight, int column) const {
      return kTileRows * eight < rows_ && column < columns_ ? load_exchanged(address(eight, column)) : Words{};
    }
    FUSED_RNN_DEVICE void wait(Words& v, int eight, int column) const {
      if (!any_missing(v)) return;
      exchange_.turns_ = 0;
      while (any_missing(v) && exchange_.keep_waiting()) v = load_exchanged(address(eight, column));
    }

   private:
    FUSED_RNN_DEVICE const void* address(int eight, int column) const {
      return at_ + static_cast<int64_t>(kTileRows * eight) * exchange_.rows_.width + column;
    }
    FUSED_RNN_DEVICE static bool any_missing(const Words& v) {
      return v.w[0] == kNotYet || v.w[1] == kNotYet || v.w[2] == kNotYet || v.w[3] == kNotYet;
    }

    ThroughL2& exchange_;
    const typename E::Stored* at_;
    int rows_, columns_;
  };

  FUSED_RNN_DEVICE ThroughL2(const Rows<E>& rows, const Sequence& sequence, const Layout&, int)
      : rows_(rows), error_(sequence.error), patience_(sequence.patience) {}

  // What was published of these rows at time t.
  FUSED_RNN_DEVICE Source source(int64_t t, const Tile& tile, int row, int column) {
    return {*this, t, tile, row, column};
  }
  FUSED_RNN_DEVICE void publish(int64_t t, const Tile& tile, int row, int column, uint32_t word) const {
    store_exchanged(rows_.row(t, tile.first + row) + column, word);
  }

 private:
  // The watchdog: a block that never comes (no such case is known) must not hang the GPU. Who has waited in vain waits
  // no more: what is missing is NaN, which runs through to the results, and the host reports the error.
  FUSED_RNN_DEVICE bool keep_waiting() {
    if (gave_up_) return false;
    relax();
    if (++turns_ % 64 != 0) return true;
    const uint64_t now = nanoseconds();
    if (turns_ == 64) since_ = now;
    if (now - since_ <= patience_) return true;
    gave_up_ = true;
    store_to_host(error_, 1);
    return false;
  }

  Rows<E> rows_;
  int32_t* error_;
  uint64_t patience_, since_ = 0;
  uint32_t turns_ = 0;
  bool gave_up_ = false;
};

template <class E>
class Alone {
 public:
  class Source {
   public:
    FUSED_RNN_DEVICE Source(const Alone& exchange, const Tile& tile, int row, int column)
        : at_(exchange.at(tile, row, column)),
          stride_(exchange.stride_),
          rows_(tile.rows - row),
          columns_(exchange.rows_.columns - column) {}

    FUSED_RNN_DEVICE Words load(int eight, int column) const {
      if (kTileRows * eight >= rows_ || column >= columns_) return Words{};
      return shared_memory<Words>(at_ + kTileRows * eight * stride_ + column * kBytes)[0];
    }
    FUSED_RNN_DEVICE void wait(Words&, int, int) const {}

   private:
    int at_, stride_, rows_, columns_;
  };

  FUSED_RNN_DEVICE Alone(const Rows<E>& rows, const Sequence&, const Layout& layout, int rows_of_tile)
      : rows_(rows), slots_(layout.slots), stride_(layout.slot_stride), rows_of_tile_(rows_of_tile) {}

  FUSED_RNN_DEVICE Source source(int64_t, const Tile& tile, int row, int column) const {
    return {*this, tile, row, column};
  }
  FUSED_RNN_DEVICE void publish(int64_t t, const Tile& tile, int row, int column, uint32_t word) const {
    if (rows_.at) *reinterpret_cast<uint32_t*>(rows_.row(t, tile.first + row) + column) = word;
    if (column >= rows_.offset) shared_memory<uint32_t>(at(tile, row, column - rows_.offset))[0] = word;
  }

 private:
  static constexpr int kBytes = sizeof(typename E::Stored);

  // Byte of shared memory. One slot is enough: all have read it before the barrier behind which it is written.
  FUSED_RNN_DEVICE int at(const Tile& tile, int row, int column) const {
    return slots_ + (tile.index * rows_of_tile_ + row) * stride_ + column * kBytes;
  }

  Rows<E> rows_;
  int slots_, stride_, rows_of_tile_;
};

template <class E, Exchange kind>
struct ExchangeOf {
  using Type = ThroughL2<E>;
};
template <class E>
struct ExchangeOf<E, Exchange::kAlone> {
  using Type = Alone<E>;
};

}  // namespace cuda
}  // namespace fused_rnn
