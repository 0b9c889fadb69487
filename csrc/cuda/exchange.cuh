// How blocks exchange the results of a time step: three policies with the same members.
//
// ThroughL2: through global memory. Each word is its own ready flag: the host fills all of them with kNotReady, each is
// written once, and a reader loads it again until it is ready. Since a word is read either whole or not at all, this
// needs no fence and no grid barrier. For kThroughL2 and kSplitColumns. Inference of many steps reuses the rows as a
// ring; see below.
// ThroughCluster: the blocks of a team are a cluster. They push their words into each other's shared memory, where
// mbarriers count the bytes.
// Alone: one block has all units. The rows are in its shared memory, ordered by the block's barriers.
//
// A kernel publishes to a target(), which has computed the addresses. Whole warps call publish(), with the values of
// neighbouring units in their lanes; those that exist are published.
// Kernels publish the rows of a tile in the order of time. Between reading the rows of one time through `source` and
// publishing those of the next, all warps of the block meet at a barrier.
//
// In a ring through L2, the rows of a step lie where those of the step kRingSteps before it were. Behind the product of
// step s, a block resets to kNotReady what it will publish for step s + A, where A = kRingSteps / 2; those words were
// last read at step s - A. Every A / 2 steps, all threads execute a fence before they read anything of that step. This
// suffices, because a block reads words of every other block of its team at every step:
//
// - No reader at step s + A finds what was there before the reset. The author's next fence is at a step f with
//   s < f <= s + A/2. Behind it, the author publishes a word of step f + 1, which the reader reads at that step, and so
//   before its own fence at step f + A/2 <= s + A. Fence, store, a load of what was stored, fence: they order the reset
//   before the reader's loads of step s + A.
// - No reader at step s - A finds the reset. Its next fence is at a step f with s - A < f <= s - A/2. Behind it, its
//   block publishes words of step f + 1, which the author's block reads at that step, and so before its fence at step
//   f + A/2 <= s. They order the loads of step s - A before the reset.
// - Readers of the steps between load other words.
//
// Where thread and thread of one block differ (who reads and who publishes, who resets and who publishes there later),
// the barriers of the block order them: one is behind the product, and one at the end of every step.
//
// A thread that has timed out is not ordered by what it reads. All that it reads from then on counts as missing, so
// that its rows become NaN, and not what a late block left there at the ring's last turn.
#pragma once

#include "block.cuh"

namespace fused_rnn {
namespace cuda {

// The exchanged rows, each of `width` elements, of which other blocks read `columns` elements from `offset` on.
template <class E>
struct Rows {
  typename E::Stored* at;  // [T, B, width]
  int64_t B;
  int width, offset, columns;
  int ring = -1;  // the rows of time t are those at t & ring. kRingSteps - 1: `at` is [kRingSteps, B, width]

  FUSED_RNN_DEVICE bool is_ring() const { return ring != -1; }
  FUSED_RNN_DEVICE int64_t index(int64_t t, int64_t b) const { return ((t & ring) * B + b) * width; }
};

// Timeout for words that never arrive, so that a bug cannot hang the GPU (no such case is known). A thread that has
// timed out does not wait again: it goes on with the missing words, which are NaN, so that the results are NaN, and
// sets the error flag, which the host reports.
class Watchdog {
 public:
  FUSED_RNN_DEVICE explicit Watchdog(const Sequence& sequence) : error_(sequence.error), patience_(sequence.patience) {}

  FUSED_RNN_DEVICE void start() { turns_ = 0, since_ = 0; }  // so that neither occupies a register between waits
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
  // What one lane reads of a tile: in each group of kTileRows rows one row, from one column on.
  class Source {
   public:
    FUSED_RNN_DEVICE Source(ThroughL2& exchange, int64_t t, const Tile& tile, int row, int column)
        : exchange_(exchange),
          at_(exchange.rows_.at + exchange.rows_.index(t, tile.first + row) + exchange.rows_.offset + column),
          rows_(tile.rows - row),
          columns_(exchange.rows_.columns - column) {}

    FUSED_RNN_DEVICE Words load(int row_tile, int column) const {
      return kTileRows * row_tile < rows_ && column < columns_ ? load_exchanged(address(row_tile, column)) : Words{};
    }
    // Waits for the words that load() gave for `column` and the columns `step` apart behind it. Those that are missing
    // are loaded again together, in one latency.
    template <int kLoads>
    FUSED_RNN_DEVICE void wait(Words (&v)[kLoads], int row_tile, int column, int step) const {
      const bool lost = exchange_.rows_.is_ring() && exchange_.watchdog_.gave_up();
      if (!any_missing(v) && !lost) return;
      exchange_.watchdog_.start();
      while (any_missing(v) && exchange_.watchdog_.keep_waiting()) {
        FUSED_RNN_UNROLL
        for (int i = 0; i < kLoads; ++i) {
          if (is_missing(v[i])) v[i] = load_exchanged(address(row_tile, column + i * step));
        }
      }
      if (!exchange_.rows_.is_ring() || !exchange_.watchdog_.gave_up()) return;
      FUSED_RNN_UNROLL
      for (int i = 0; i < kLoads; ++i) v[i] = {{kNotReady, kNotReady, kNotReady, kNotReady}};
    }

   private:
    FUSED_RNN_DEVICE const void* address(int row_tile, int column) const {
      return at_ + static_cast<int64_t>(kTileRows * row_tile) * exchange_.rows_.width + column;
    }
    template <int kLoads>
    FUSED_RNN_DEVICE static bool any_missing(const Words (&v)[kLoads]) {
      bool missing = false;
      FUSED_RNN_UNROLL
      for (int i = 0; i < kLoads; ++i) missing = missing || is_missing(v[i]);
      return missing;
    }
    FUSED_RNN_DEVICE static bool is_missing(const Words& v) {
      return v.w[0] == kNotReady || v.w[1] == kNotReady || v.w[2] == kNotReady || v.w[3] == kNotReady;
    }

    ThroughL2& exchange_;
    const typename E::Stored* at_;
    int rows_, columns_;
  };

  FUSED_RNN_DEVICE ThroughL2(const Rows<E>& rows, const Block<Shape>& block, const Layout&, int64_t)
      : rows_(rows), watchdog_(block.sequence()) {}

  // The rows of time t. `row` and `column` are the first that the calling lane reads.
  FUSED_RNN_DEVICE Source source(int64_t t, const Tile& tile, int row, int column) {
    return {*this, t, tile, row, column};
  }
  // Where the calling thread publishes the rows of time t: `row` and `column` are its first.
  class Target {
   public:
    FUSED_RNN_DEVICE Target(const Rows<E>& rows, int64_t t, const Tile& tile, int row, int column)
        : rows_(rows), at_(rows.at + rows.index(t, tile.first + row) + column) {}
    // The value `row` rows below and `column` columns beside the first.
    FUSED_RNN_DEVICE void publish(int row, int column, float value, bool exists) const {
      const uint32_t word = packed_word<E>(value);
      if (exists && has_word<E>()) store_exchanged(at_ + row * rows_.width + column, word);
    }

   private:
    const Rows<E>& rows_;
    typename E::Stored* at_;
  };
  FUSED_RNN_DEVICE Target target(int64_t t, const Tile& tile, int row, int column) const {
    return {rows_, t, tile, row, column};
  }

  // Called by all threads before they read rows of this step.
  FUSED_RNN_DEVICE void begin(int64_t step) const {
    if (rows_.is_ring() && step % kFenceSteps == 0) fence();
  }
  // Called behind the product with the rows of time t: resets, in a ring, what the block publishes kAhead steps later,
  // whether times grow or fall.
  FUSED_RNN_DEVICE void reset(int64_t t, const Tile& tile, const Block<Shape>& block) const {
    constexpr int kElements = sizeof(Words) / sizeof(typename E::Stored);  // of a store
    if (!rows_.is_ring() || block.unit() >= rows_.columns || block.unit() % kElements != 0) return;
    FUSED_RNN_NO_UNROLL
    for (int row = block.row(0); row < tile.rows; row += Shape::kRowStep) {
      reset_exchanged(rows_.at + rows_.index(t ^ kAhead, tile.first + row) + block.unit(), kNotReady);
    }
  }
  FUSED_RNN_DEVICE void finish() const {}

 private:
  static constexpr int kAhead = kRingSteps / 2, kFenceSteps = kAhead / 2;
  Rows<E> rows_;
  Watchdog watchdog_;
};

// What one lane reads of a tile in shared memory: in each group of kTileRows rows one row, from one column on. Words
// beyond the rows or columns are `fill`.
template <class E>
class SharedSource {
 public:
  FUSED_RNN_DEVICE SharedSource(int at, int stride, int rows, int columns, uint32_t fill)
      : at_(at), stride_(stride), rows_(rows), columns_(columns), fill_(fill) {}

  FUSED_RNN_DEVICE Words load(int row_tile, int column) const {
    if (kTileRows * row_tile >= rows_ || column >= columns_) return Words{{fill_, fill_, fill_, fill_}};
    return shared_memory<Words>(at_ + kTileRows * row_tile * stride_ + column * kBytes)[0];
  }
  template <int kLoads>
  FUSED_RNN_DEVICE void wait(Words (&)[kLoads], int, int, int) const {}

 private:
  static constexpr int kBytes = sizeof(typename E::Stored);
  int at_, stride_, rows_, columns_;
  uint32_t fill_;
};

template <class E, class Shape>
class Alone {
 public:
  FUSED_RNN_DEVICE Alone(const Rows<E>& rows, const Block<Shape>&, const Layout& layout, int64_t)
      : rows_(rows), slots_(layout.slots), stride_(layout.slot_stride) {}

  FUSED_RNN_DEVICE SharedSource<E> source(int64_t, const Tile& tile, int row, int column) const {
    return {at(tile, row, column), stride_, tile.rows - row, rows_.columns - column, 0};
  }
  class Target {
   public:
    FUSED_RNN_DEVICE Target(const Alone& alone, int64_t t, const Tile& tile, int row, int column)
        : alone_(alone),
          at_(alone.rows_.index(t, tile.first + row) + column),
          slot_(alone.at(tile, row, column - alone.rows_.offset)),
          column_(column) {}
    FUSED_RNN_DEVICE void publish(int row, int column, float value, bool exists) const {
      const Rows<E>& rows = alone_.rows_;
      const uint32_t word = packed_word<E>(value);
      if (!exists || !has_word<E>()) return;
      if (column_ + column >= rows.offset) {
        shared_memory<uint32_t>(slot_ + row * alone_.stride_ + column * kBytes)[0] = word;
      }
      if (rows.at) *reinterpret_cast<uint32_t*>(rows.at + at_ + row * rows.width + column) = word;
    }

   private:
    const Alone& alone_;
    int64_t at_;
    int slot_, column_;
  };
  FUSED_RNN_DEVICE Target target(int64_t t, const Tile& tile, int row, int column) const {
    return {*this, t, tile, row, column};
  }
  FUSED_RNN_DEVICE void begin(int64_t) const {}
  FUSED_RNN_DEVICE void reset(int64_t, const Tile&, const Block<Shape>&) const {}
  FUSED_RNN_DEVICE void finish() const {}

 private:
  // Byte offset in shared memory. One slot for all times suffices: all warps have read it before the barrier after
  // which it is overwritten.
  FUSED_RNN_DEVICE int at(const Tile& tile, int row, int column) const {
    return slots_ + (tile.index * Shape::kRows + row) * stride_ + column * kBytes;
  }

  static constexpr int kBytes = sizeof(typename E::Stored);
  Rows<E> rows_;
  int slots_, stride_;
};

// In every block of the cluster, each tile has two slots for rows, one for even and one for odd times, and each slot
// has an mbarrier that counts the bytes arriving in it.
//
// Two slots suffice, without a cluster barrier at each step. A block pushes its words of time t only after all its
// warps have read the rows of the time before t (see above), and it has words in every row. A block that has received
// all words of time t therefore knows that every block has finished reading the slots of the time before t. It pushes
// words of the time after t, which go into those slots, only then.
//
// Thread 0 declares the expected bytes of a slot's next phase when the current phase has ended, and before the first
// push at the start. No phase can end before all threads of this block have seen the previous one end, because the
// block's own words count as well. Tiles beyond the end of the batch have no rows: nobody pushes into them or waits for
// them.
//
// A block waits for all words of the last time, so none is in flight when it ends, unless a thread has timed out. That
// thread pushes no more words, so the other blocks time out, too. A block must not end while another one, which was
// only late, still pushes into its memory; finish() therefore lets all blocks of a cluster end together. Thread 0
// pushes words itself: if it has timed out, no other block gets far enough to push words whose bytes thread 0 has not
// declared.
template <class E, class Shape>
class ThroughCluster {
  static constexpr int kBytes = sizeof(typename E::Stored);

 public:
  // first: the time of the first rows.
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
    if (watchdog_.gave_up()) return {at, stride_, 0, 0, kNotReady};
    return {at, stride_, tile.rows - row, rows_.columns - column, 0};
  }
  // Each lane pushes the 16 bytes with its own value, to every kLanes-th block of the cluster.
  class Target {
   public:
    FUSED_RNN_DEVICE Target(const ThroughCluster& cluster, int64_t t, const Tile& tile, int row, int column)
        : cluster_(cluster),
          at_(cluster.rows_.index(t, tile.first + row) + column - lane()),
          column_(column - lane() - cluster.rows_.offset),
          slot_(cluster.slot(t, tile, row) + column_ * kBytes),
          arrivals_(cluster.arrivals(t, tile)) {}
    FUSED_RNN_DEVICE void publish(int row, int column, float value, bool exists) const {
      const Rows<E>& rows = cluster_.rows_;
      const Words words = packed_words<E>(value);
      if (!exists) return;
      if (column_ + column >= 0 && column_ + column < rows.columns && !cluster_.watchdog_.gave_up()) {
        const int slot = slot_ + row * cluster_.stride_ + column * kBytes;
        // Not unrolled: the addresses would take so many registers that others spill.
        FUSED_RNN_NO_UNROLL
        for (int rank = lane(); rank < cluster_.parts_; rank += kLanes) push(slot, words, arrivals_, rank);
      }
      if (rows.at && lane() == 0) *reinterpret_cast<Words*>(rows.at + at_ + row * rows.width + column) = words;
    }

   private:
    static constexpr int kLanes = sizeof(Words) / kBytes;  // whose values a push holds
    FUSED_RNN_DEVICE static int lane() { return thread_index() % kLanes; }

    const ThroughCluster& cluster_;
    int64_t at_;
    int column_, slot_;
    Arrivals arrivals_;
  };
  FUSED_RNN_DEVICE Target target(int64_t t, const Tile& tile, int row, int column) const {
    return {*this, t, tile, row, column};
  }
  FUSED_RNN_DEVICE void begin(int64_t) const {}
  FUSED_RNN_DEVICE void reset(int64_t, const Tile&, const Block<Shape>&) const {}
  FUSED_RNN_DEVICE void finish() const { sync_cluster(); }

 private:
  FUSED_RNN_DEVICE int buffer(int64_t t, const Tile& tile) const { return tile.index * 2 + static_cast<int>(t & 1); }
  FUSED_RNN_DEVICE Arrivals arrivals(int64_t t, const Tile& tile) const {
    return Arrivals(arrivals_ + buffer(t, tile) * 8);
  }
  // Byte offset in shared memory.
  FUSED_RNN_DEVICE int slot(int64_t t, const Tile& tile, int row) const {
    return slots_ + (buffer(t, tile) * Shape::kRows + row) * stride_;
  }

  // All words of the row are pushed, those of the padding between H and Hp included.
  FUSED_RNN_DEVICE void expect(int64_t t, const Tile& tile) const {
    if (tile.rows > 0) arrivals(t, tile).expect(tile.rows * rows_.columns * kBytes);
  }
  FUSED_RNN_DEVICE void wait(int64_t t, const Tile& tile) {
    const int steps = static_cast<int>(t) - first_;
    const int parity = (steps < 0 ? -steps : steps) >> 1 & 1;  // a slot is used at every second step
    watchdog_.start();
    while (!arrivals(t, tile).complete(parity) && watchdog_.keep_waiting()) continue;
    if (thread_index() == 0 && !watchdog_.gave_up()) expect(t, tile);
  }

  Rows<E> rows_;
  int first_, slots_, stride_, arrivals_, parts_;
  Watchdog watchdog_;
};

template <class E, class Shape, Exchange kind = Shape::kExchange>
struct ExchangeFor {
  using Type = ThroughL2<E, Shape>;
};
template <class E, class Shape>
struct ExchangeFor<E, Shape, Exchange::kAlone> {
  using Type = Alone<E, Shape>;
};
template <class E, class Shape>
struct ExchangeFor<E, Shape, Exchange::kThroughCluster> {
  using Type = ThroughCluster<E, Shape>;
};

// Whether the architecture that is being compiled for has this exchange.
constexpr bool can_run(Exchange exchange) {
  return kHasClusters || (exchange != Exchange::kThroughCluster && exchange != Exchange::kSplitColumns);
}

}  // namespace cuda
}  // namespace fused_rnn
