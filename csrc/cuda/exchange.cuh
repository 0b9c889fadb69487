// How units learn what the others have computed at the step before: three policies with the same members.
//
// ThroughL2: the data is the flag. Every word is written once, after the host has filled all of them with kNotYet; a
// reader loads a word again until it is there. A word is whole or not there, so no fence and no grid barrier is needed.
// ThroughCluster: the blocks of a team are a cluster and push their words into each other's shared memory, whose
// barriers count them.
// Alone: one block holds all units, the rows lie in its shared memory, and the block's own barriers order them.
//
// A kernel publishes a tile's rows of one time after those of the time before, each behind a barrier of the block that
// every warp has reached after it has read, through `source`, what it reads of the time before.
#pragma once

#include "block.cuh"

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

// Ends a wait for what never comes (no such case is known), which must not hang the GPU. A thread that has waited in
// vain waits no more: what is missing is NaN, which runs through to the results, and the host reports the error.
class Watchdog {
 public:
  FUSED_RNN_DEVICE explicit Watchdog(const Sequence& sequence) : error_(sequence.error), patience_(sequence.patience) {}

  FUSED_RNN_DEVICE void start() { turns_ = 0, since_ = 0; }  // neither lives on between waits, in registers
  FUSED_RNN_DEVICE bool gave_up() const { return gave_up_; }
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

 private:
  int32_t* error_;
  uint64_t patience_, since_;
  uint32_t turns_;
  bool gave_up_ = false;
};

template <class E, class Shape>
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
      exchange_.watchdog_.start();
      while (any_missing(v) && exchange_.watchdog_.keep_waiting()) v = load_exchanged(address(eight, column));
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

  FUSED_RNN_DEVICE ThroughL2(const Rows<E>& rows, const Block<Shape>& block, const Layout&, int64_t)
      : rows_(rows), watchdog_(block.sequence()) {}

  // What was published of these rows at time t.
  FUSED_RNN_DEVICE Source source(int64_t t, const Tile& tile, int row, int column) {
    return {*this, t, tile, row, column};
  }
  FUSED_RNN_DEVICE void publish(int64_t t, const Tile& tile, int row, int column, uint32_t word) const {
    store_exchanged(rows_.row(t, tile.first + row) + column, word);
  }

  FUSED_RNN_DEVICE void finish() const {}

 private:
  Rows<E> rows_;
  Watchdog watchdog_;
};

// What one lane reads of a tile in shared memory: its row of every eight, from its column on; zero where nothing is, or
// `otherwise`.
template <class E>
class SharedSource {
 public:
  FUSED_RNN_DEVICE SharedSource(int at, int stride, int rows, int columns, uint32_t otherwise)
      : at_(at), stride_(stride), rows_(rows), columns_(columns), otherwise_(otherwise) {}

  FUSED_RNN_DEVICE Words load(int eight, int column) const {
    if (kTileRows * eight >= rows_ || column >= columns_)
      return Words{{otherwise_, otherwise_, otherwise_, otherwise_}};
    return shared_memory<Words>(at_ + kTileRows * eight * stride_ + column * kBytes)[0];
  }
  FUSED_RNN_DEVICE void wait(Words&, int, int) const {}

 private:
  static constexpr int kBytes = sizeof(typename E::Stored);
  int at_, stride_, rows_, columns_;
  uint32_t otherwise_;
};

template <class E, class Shape>
class Alone {
 public:
  FUSED_RNN_DEVICE Alone(const Rows<E>& rows, const Block<Shape>&, const Layout& layout, int64_t)
      : rows_(rows), slots_(layout.slots), stride_(layout.slot_stride) {}

  FUSED_RNN_DEVICE SharedSource<E> source(int64_t, const Tile& tile, int row, int column) const {
    return {at(tile, row, column), stride_, tile.rows - row, rows_.columns - column, 0};
  }
  FUSED_RNN_DEVICE void publish(int64_t t, const Tile& tile, int row, int column, uint32_t word) const {
    if (rows_.at) *reinterpret_cast<uint32_t*>(rows_.row(t, tile.first + row) + column) = word;
    if (column >= rows_.offset) shared_memory<uint32_t>(at(tile, row, column - rows_.offset))[0] = word;
  }
  FUSED_RNN_DEVICE void finish() const {}

 private:
  // Byte of shared memory. One slot is enough: all have read it before the barrier behind which it is written.
  FUSED_RNN_DEVICE int at(const Tile& tile, int row, int column) const {
    return slots_ + (tile.index * Shape::kRows + row) * stride_ + column * static_cast<int>(sizeof(typename E::Stored));
  }

  Rows<E> rows_;
  int slots_, stride_;
};

// Each tile has two slots for rows in every block of the cluster, for even and odd times, and each slot a barrier that
// counts the bytes coming into it.
//
// Why two slots are enough, and no barrier of the cluster is needed at each step: a block pushes its words of a time
// when all its warps have read what they need of the time before (see above), and every block has words in every row
// that exists. So who has all words of a time knows that every block has done with the time before, and only then
// pushes words of the time after, into the slots of the time before. Tiles have slots and barriers of their own.
//
// A slot's barrier is told how many bytes to count when its phase before is over, and at the start, before any block
// can push. No phase can be over before all threads have seen the one before, as this block's own words count, too.
// Tiles without rows, behind the end of the batch, have nothing to count: nobody pushes or waits.
//
// The words of the last time are all waited for, so that none is on its way when a block is through, unless a thread
// has given up. It then pushes no more, whereupon the others give up as well; none may go while another, which was only
// late, still pushes: all leave together. Thread 0, which tells the barriers, pushes words itself: if it gives up, no
// block gets so far as to push what it has not told them about.
template <class E, class Shape>
class ThroughCluster {
 public:
  // `first`: the time of the first rows.
  FUSED_RNN_DEVICE ThroughCluster(const Rows<E>& rows, const Block<Shape>& block, const Layout& layout, int64_t first)
      : rows_(rows),
        first_(static_cast<int>(first)),
        slots_(layout.slots),
        stride_(layout.slot_stride),
        arrivals_(layout.arrivals),
        parts_(block.sequence().division.parts),
        watchdog_(block.sequence()) {
    if (thread_index() == 0) {
      for (int j = 0; j < block.sequence().division.tiles; ++j) {
        for (int64_t t = 0; t < 2; ++t) {
          arrivals(t, block.tile(j)).init();
          expect(t, block.tile(j));
        }
      }
    }
    sync_cluster();
  }

  FUSED_RNN_DEVICE SharedSource<E> source(int64_t t, const Tile& tile, int row, int column) {
    if (tile.rows > 0) wait(t, tile);
    const int at = slot(t, tile, row) + column * kBytes;
    if (watchdog_.gave_up()) return {at, stride_, 0, 0, kNotYet};
    return {at, stride_, tile.rows - row, rows_.columns - column, 0};
  }
  FUSED_RNN_DEVICE void publish(int64_t t, const Tile& tile, int row, int column, uint32_t word) const {
    const int read = column - rows_.offset;
    if (read >= 0 && read < rows_.columns && !watchdog_.gave_up()) {
      const int at = slot(t, tile, row) + read * kBytes;
      // Unrolled, it would take so many registers for addresses that others spill.
      FUSED_RNN_NO_UNROLL
      for (int rank = 0; rank < parts_; ++rank) push(at, word, arrivals(t, tile), rank);
    }
    if (rows_.at) *reinterpret_cast<uint32_t*>(rows_.row(t, tile.first + row) + column) = word;
  }
  FUSED_RNN_DEVICE void finish() const { sync_cluster(); }

 private:
  static constexpr int kBytes = sizeof(typename E::Stored);

  FUSED_RNN_DEVICE int buffer(int64_t t, const Tile& tile) const { return tile.index * 2 + static_cast<int>(t & 1); }
  FUSED_RNN_DEVICE Arrivals arrivals(int64_t t, const Tile& tile) const {
    return Arrivals(arrivals_ + buffer(t, tile) * 8);
  }
  // Byte of shared memory.
  FUSED_RNN_DEVICE int slot(int64_t t, const Tile& tile, int row) const {
    return slots_ + (buffer(t, tile) * Shape::kRows + row) * stride_;
  }

  // Each word of a row is some block's: blocks end with whole 16-byte loads.
  FUSED_RNN_DEVICE void expect(int64_t t, const Tile& tile) const {
    if (tile.rows > 0) arrivals(t, tile).expect(tile.rows * rows_.columns * kBytes);
  }
  FUSED_RNN_DEVICE void wait(int64_t t, const Tile& tile) {
    const int steps = static_cast<int>(t) - first_;
    const int parity = (steps < 0 ? -steps : steps) >> 1 & 1;  // a slot is used at every second time
    watchdog_.start();
    while (!arrivals(t, tile).complete(parity) && watchdog_.keep_waiting()) continue;
    if (thread_index() == 0 && !watchdog_.gave_up()) expect(t, tile);
  }

  Rows<E> rows_;
  int first_, slots_, stride_, arrivals_, parts_;
  Watchdog watchdog_;
};

template <class E, class Shape, Exchange kind = Shape::kExchange>
struct ExchangeOf {
  using Type = ThroughL2<E, Shape>;
};
template <class E, class Shape>
struct ExchangeOf<E, Shape, Exchange::kAlone> {
  using Type = Alone<E, Shape>;
};
template <class E, class Shape>
struct ExchangeOf<E, Shape, Exchange::kThroughCluster> {
  using Type = ThroughCluster<E, Shape>;
};

// Whether a kernel can run where it is compiled for.
constexpr bool can_run(Exchange exchange) { return exchange != Exchange::kThroughCluster || kHasClusters; }

}  // namespace cuda
}  // namespace fused_rnn
