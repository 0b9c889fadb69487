// The words of store_exchanged on their way: each becomes visible after a delay of its own.
//
// A GPU promises no order between relaxed stores, not even of neighbouring words. What it does promise is kept: stores
// to one address arrive in their order, and a thread sees the stores that came before it, its own or those that a
// barrier of its warp or block has ordered.
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
  // Who has stored a word: `time` is that of his warp, which every barrier advances.
  struct Author {
    int block;
    int thread;
    uint32_t time;
  };

  bool empty() const { return lines_.empty(); }

  // `due`: when, in the time of deliver(), the word arrives in memory.
  void store(void* to, uint32_t word, const Author& author, uint64_t due) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(to);
    Pending& pending = lines_[address / sizeof(Words)].words[address % sizeof(Words) / sizeof(word)];
    if (pending.serial != 0) write(address, pending.word);  // its order before the new word
    pending = {++serial_, word, author};
    arrivals_.push({due, serial_, address});
  }

  // What is in memory, with the words on their way for which sees(author) is true.
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

  // Writes what is due; true if there was anything.
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

  struct Line {  // what one load_exchanged reads
    Pending words[4] = {};
    bool empty() const { return (words[0].serial | words[1].serial | words[2].serial | words[3].serial) == 0; }
  };

  struct Arrival {
    uint64_t due, serial;
    uintptr_t address;
    // By serial among equals, so that a run can be repeated.
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
