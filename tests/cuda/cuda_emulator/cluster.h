// The words that the blocks of a cluster push into each other's shared memory, and the mbarriers that count them.
//
// A word is written when it arrives, after a delay of its own. Its place is checked for races from the moment of the
// push: no thread may access it until it has seen the end of the phase that counts the word, and accesses before the
// push must be ordered before it. Vector clocks track that order: a thread learns from its block's barriers, and from
// the words that it has waited for, which barriers the other blocks have passed.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <queue>
#include <string>
#include <vector>

#include "layout.h"

namespace fused_rnn {
namespace cuda {
namespace emulation {

// For each block of the cluster, the time of its latest barrier that a thread is ordered after.
using VectorClock = std::array<uint32_t, kMaxClusterBlocks>;

inline void merge(VectorClock& clock, const VectorClock& other) {
  for (size_t i = 0; i < clock.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

// The words in flight between blocks, in the order in which they arrive.
class Pushes {
 public:
  struct Push {
    uint64_t due, serial;
    int from, to;  // indices among the running blocks
    int offset;
    uint32_t word;
    int counter;
    VectorClock clock;  // of the thread that pushed
    bool operator<(const Push& other) const { return due != other.due ? due > other.due : serial > other.serial; }
  };

  bool empty() const { return pushes_.empty(); }
  void clear() { pushes_ = {}; }
  void add(Push push) {
    push.serial = ++serial_;
    pushes_.push(push);
  }
  bool any_due(uint64_t now) const { return !pushes_.empty() && pushes_.top().due <= now; }
  Push take() {
    const Push push = pushes_.top();
    pushes_.pop();
    return push;
  }

 private:
  std::priority_queue<Push> pushes_;
  uint64_t serial_ = 0;
};

// The mbarriers in a block's shared memory and the words that other blocks push there. Functions that return a string
// return a description of the error, empty if there is none.
class Inbox {
 public:
  void begin(int bytes, int threads) {
    words_.assign((bytes + 3) / 4, Word{});
    counters_.clear();
    threads_ = threads;
  }

  // ---- Barriers

  std::string init(int offset, uint32_t time) {
    if (offset < 0 || offset % 8 != 0 || offset / 4 + 2 > static_cast<int>(words_.size())) return "no place for one";
    if (counters_.count(offset) != 0) return "a second time";
    counters_[offset] = Counter{time, false, 0, 0, {}, {}, std::vector<uint32_t>(threads_)};
    words_[offset / 4].state = words_[offset / 4 + 1].state = State::kCounter;
    return "";
  }

  // Whether the mbarrier was initialized before the block's barrier at `time`.
  bool initialized_before(int offset, uint32_t time) const {
    const auto counter = counters_.find(offset);
    return counter != counters_.end() && counter->second.initialized < time;
  }

  std::string expect(int offset, int bytes) {
    if (counters_.count(offset) == 0) return "not initialized";
    Counter& counter = counters_[offset];
    if (counter.expects) return "twice in one phase";
    counter.expects = true;
    counter.missing += bytes;
    return end_if_complete(counter);
  }

  std::string complete(int offset, int thread, int parity, VectorClock& clock, bool& done) {
    if (counters_.count(offset) == 0) return "not initialized";
    Counter& counter = counters_[offset];
    done = static_cast<int>(counter.phase & 1) != parity;
    if (done) {
      counter.seen[thread] = counter.phase;
      merge(clock, counter.completed_clock);
    }
    return "";
  }

  // A barrier of `count` threads: each has then seen all phases that one of them has seen.
  void share(int first, int count) {
    for (auto& [offset, counter] : counters_) {
      const auto begin = counter.seen.begin() + first;
      std::fill(begin, begin + count, *std::max_element(begin, begin + count));
    }
  }

  // Checked when the block has ended.
  std::string left_over() const {
    for (const auto& [offset, counter] : counters_) {
      if (counter.missing < 0) return "bytes that nobody expected at the barrier at " + std::to_string(offset);
    }
    return "";
  }

  // ---- Words

  std::string announce(int offset) {
    Word& word = words_[offset / 4];
    if (word.state == State::kCounter) return "onto a barrier";
    if (word.in_flight) return "where another word is on its way";
    word.in_flight = true;
    return "";
  }

  std::string deliver(const Pushes::Push& push) {
    Counter& counter = counters_[push.counter];
    words_[push.offset / 4] = {State::kPushed, false, push.counter, counter.phase};
    counter.missing -= 4;
    merge(counter.current_clock, push.clock);
    return end_if_complete(counter);
  }

  // Checks an access of a thread of this block.
  std::string check(int offset, int bytes, int thread, bool writes) {
    for (int i = offset / 4; i <= (offset + bytes - 1) / 4; ++i) {
      Word& word = words_[i];
      const auto at = [i] { return "word at " + std::to_string(4 * i); };
      if (word.state == State::kCounter) return at() + " is a barrier's";
      if (word.in_flight) return at() + " while one pushed there is on its way";
      if (word.state == State::kPushed && counters_[word.counter].seen[thread] <= word.phase) {
        return at() + " was pushed, and the thread does not know that the phase is over";
      }
      if (writes) word.state = State::kOwn;
    }
    return "";
  }

 private:
  enum class State : uint8_t { kOwn, kPushed, kCounter };
  struct Word {
    State state = State::kOwn;
    bool in_flight = false;
    int counter = 0;     // kPushed: offset of the mbarrier that counted it
    uint32_t phase = 0;  // kPushed: the phase in which it was counted
  };
  struct Counter {
    uint32_t initialized;         // time of init()
    bool expects;                 // whether expect() was called in this phase
    int64_t missing;              // expected bytes minus arrived bytes; negative if bytes arrive before expect()
    uint32_t phase;               // number of phases that have ended
    VectorClock current_clock;    // merged from the threads whose words were counted in this phase
    VectorClock completed_clock;  // the same for all phases that have ended
    std::vector<uint32_t> seen;   // for each thread, the number of ended phases that it has seen
  };

  static std::string end_if_complete(Counter& counter) {
    if (!counter.expects || counter.missing > 0) return "";
    if (counter.missing < 0) return "more bytes than expected";
    counter.expects = false;
    ++counter.phase;
    merge(counter.completed_clock, counter.current_clock);
    return "";
  }

  std::vector<Word> words_;
  std::map<int, Counter> counters_;  // by offset
  int threads_ = 0;
};

}  // namespace emulation
}  // namespace cuda
}  // namespace fused_rnn
