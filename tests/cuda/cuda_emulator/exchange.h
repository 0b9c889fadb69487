// The words of store_exchanged() in flight: each becomes visible in memory after a delay of its own.
//
// A GPU does not order relaxed stores, not even of neighbouring words. It does guarantee two things, and so does this
// class: stores to one address arrive in order, and a thread sees its own earlier stores and those that a barrier of
// its warp or block orders before its load.
#pragma once

#include <cstdint>
#include <cstring>
#include <queue>
#include <unordered_map>
#include <vector>

#include "emulator.h"

namespace fused_rnn {
namespace cuda {
namespace emulation {

class Exchange {
 public:
  // The thread that stored a word. `time` is the time of its warp, which every barrier advances.
  struct Author {
    int block;
    int thread;
    uint32_t time;
  };

  bool empty() const { return lines_.empty(); }

  // due: when the word arrives in memory, in the time of deliver().
  void store(void* to, uint32_t word, const Author& author, uint64_t due) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(to);
    Pending& pending = lines_[address / sizeof(Words)].words[address % sizeof(Words) / sizeof(word)];
    if (pending.serial != 0) write(address, pending.word);  // an earlier store to the address arrives first
    pending = {++serial_, word, author};
    arrivals_.push({due, serial_, address});
  }

  // The memory, updated with those words in flight for which sees(author) is true.
  template <class Sees>
  Words load(const void* from, const Sees& sees) const {
    Words words;
    std::memcpy(&words, from, sizeof words);
    const auto line = lines_.find(reinterpret_cast<uintptr_t>(from) / sizeof words);
    if (line == lines_.end()) return words;
    for (int i = 0; i < 4; ++i) {
      const Pending& pending = line->second.words[i];
      if (pending.serial != 0 && sees(pending.author)) words.w[i] = pending.word;
    }
    return words;
  }

  // Writes the words that are due; returns whether there were any.
  bool deliver(uint64_t now) {
    bool any = false;
    for (; !arrivals_.empty() && arrivals_.top().due <= now; arrivals_.pop()) {
      const Arrival& arrival = arrivals_.top();
      const auto line = lines_.find(arrival.address / sizeof(Words));
      if (line == lines_.end()) continue;
      Pending& pending = line->second.words[arrival.address % sizeof(Words) / sizeof(uint32_t)];
      if (pending.serial != arrival.serial) continue;  // a later store to the same address has already written it
      write(arrival.address, pending.word);
      pending.serial = 0;
      any = true;
      if (line->second.empty()) lines_.erase(line);
    }
    return any;
  }

  void deliver_all() { deliver(UINT64_MAX); }

 private:
  struct Pending {
    uint64_t serial;  // 0: none
    uint32_t word;
    Author author;
  };

  struct Line {  // the 16 bytes of one load_exchanged()
    Pending words[4] = {};
    bool empty() const { return (words[0].serial | words[1].serial | words[2].serial | words[3].serial) == 0; }
  };

  struct Arrival {
    uint64_t due, serial;
    uintptr_t address;
    // The serial number makes the order of equal times reproducible.
    bool operator<(const Arrival& other) const { return due != other.due ? due > other.due : serial > other.serial; }
  };

  static void write(uintptr_t address, uint32_t word) {
    std::memcpy(reinterpret_cast<void*>(address), &word, sizeof word);
  }

  std::unordered_map<uintptr_t, Line> lines_;
  std::priority_queue<Arrival> arrivals_;
  uint64_t serial_ = 0;
};

}  // namespace emulation
}  // namespace cuda
}  // namespace fused_rnn
