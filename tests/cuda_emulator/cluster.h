// What the blocks of a cluster push into each other's shared memory, and the barriers that count it.
//
// A word is written when it arrives, after a delay of its own, but it is judged from the moment it is pushed: nobody
// may touch its place from then on until he knows that the phase is over in which it is counted, nor before without the
// pusher's knowing. Who knows what is kept exactly: of every block the number of its barriers that a thread knows have
// been passed, from its own barriers and from the words that it has waited for.
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

// Of each block of the cluster the time of its last barrier that somebody knows of.
using Known = std::array<uint32_t, kMaxClusterBlocks>;

inline void learn(Known& known, const Known& more) {
  for (size_t i = 0; i < known.size(); ++i) known[i] = std::max(known[i], more[i]);
}

// Words on their way between blocks.
class Pushes {
 public:
  struct Push {
    uint64_t due, serial;
    int from, to;  // which of the running blocks
    int offset;
    uint32_t word;
    int counter;
    Known known;  // to who pushes
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

// The barriers of a block's shared memory and the places of words that are pushed there. Functions that return a string
// say what is wrong, if anything.
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

  // Whether all who know that the block has passed a barrier at time `known` know that it has initialized this one.
  bool initialized_before(int offset, uint32_t known) const {
    const auto counter = counters_.find(offset);
    return counter != counters_.end() && counter->second.initialized < known;
  }

  std::string expect(int offset, int bytes) {
    if (counters_.count(offset) == 0) return "not initialized";
    Counter& counter = counters_[offset];
    if (counter.told) return "twice in one phase";
    counter.told = true;
    counter.missing += bytes;
    return end_if_complete(counter);
  }

  std::string complete(int offset, int thread, int parity, Known& known, bool& done) {
    if (counters_.count(offset) == 0) return "not initialized";
    Counter& counter = counters_[offset];
    done = static_cast<int>(counter.phase & 1) != parity;
    if (done) {
      counter.seen[thread] = counter.phase;
      learn(known, counter.come);
    }
    return "";
  }

  // A barrier of threads: each knows what the others do.
  void share(int first, int count) {
    for (auto& [offset, counter] : counters_) {
      const auto begin = counter.seen.begin() + first;
      std::fill(begin, begin + count, *std::max_element(begin, begin + count));
    }
  }

  // Behind the block's end.
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
    if (word.on_its_way) return "where another word is on its way";
    word.on_its_way = true;
    return "";
  }

  std::string deliver(const Pushes::Push& push) {
    Counter& counter = counters_[push.counter];
    words_[push.offset / 4] = {State::kPushed, false, push.counter, counter.phase};
    counter.missing -= 4;
    learn(counter.coming, push.known);
    return end_if_complete(counter);
  }

  // A thread's own access.
  std::string check(int offset, int bytes, int thread, bool writes) {
    for (int i = offset / 4; i <= (offset + bytes - 1) / 4; ++i) {
      Word& word = words_[i];
      const std::string at = "word at " + std::to_string(4 * i);
      if (word.state == State::kCounter) return at + " is a barrier's";
      if (word.on_its_way) return at + " while one pushed there is on its way";
      if (word.state == State::kPushed && counters_[word.counter].seen[thread] <= word.phase) {
        return at + " was pushed, and the thread does not know that the phase is over";
      }
      if (writes) word.state = State::kOwn;
    }
    return "";
  }

 private:
  enum class State : uint8_t { kOwn, kPushed, kCounter };
  struct Word {
    State state = State::kOwn;
    bool on_its_way = false;
    int counter = 0;  // that has counted it
    uint32_t phase = 0;
  };
  struct Counter {
    uint32_t initialized;        // when
    bool told;                   // how many bytes are to come in this phase
    int64_t missing;             // bytes; less than none if they come before that is told
    uint32_t phase;              // how many are over
    Known coming, come;          // what those know whose words were counted in this phase, and until it
    std::vector<uint32_t> seen;  // by thread: how many phases it knows are over
  };

  static std::string end_if_complete(Counter& counter) {
    if (!counter.told || counter.missing > 0) return "";
    if (counter.missing < 0) return "more bytes than expected";
    counter.told = false;
    ++counter.phase;
    learn(counter.come, counter.coming);
    return "";
  }

  std::vector<Word> words_;
  std::map<int, Counter> counters_;  // by offset
  int threads_ = 0;
};

}  // namespace emulation
}  // namespace cuda
}  // namespace fused_rnn
