// The words of store_exchanged() in flight: each becomes visible in memory after a delay of its own. Most of those of
// reset_exchanged() are held back for as long as a GPU may: a thread sees them only behind a fence of its own that
// comes after one of their author, or when a later word is stored in their place.
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
  // The thread that loads; `interval` is the time of its block's last barrier.
  struct Reader {
    int block, thread;
    uint32_t time, interval;
    bool sees(const Author& author) const {
      if (author.block != block) return false;
      if (author.thread == thread || author.time < interval) return true;
      return author.thread / 32 == thread / 32 && author.time < time;
    }
  };

  bool empty() const { return lines_.empty(); }

  // due: when the word arrives in memory, in the time of deliver().
  void store(void* to, uint32_t word, const Author& author, uint64_t due) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(to);
    const auto held = resets_.find(address);
    if (held != resets_.end()) {
      write(address, held->second.word);
      resets_.erase(held);
    }
    Pending& pending = lines_[address / sizeof(Words)].words[address % sizeof(Words) / sizeof(word)];
    if (pending.serial != 0) write(address, pending.word);  // an earlier store to the address arrives first
    pending = {++serial_, word, author};
    arrivals_.push({due, serial_, address});
  }

  void reset(void* to, uint32_t word, const Author& author) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(to);
    store(to, word, author, 0);  // what is in flight to the address arrives before it
    Line& line = lines_[address / sizeof(Words)];
    line.words[address % sizeof(Words) / sizeof(word)].serial = 0;
    if (line.empty()) lines_.erase(address / sizeof(Words));
    resets_[address] = {word, author, 0};
    unfenced_[thread_key(author.block, author.thread)].push_back(address);
  }
  void fence(int block, int thread) {
    const int64_t key = thread_key(block, thread);
    fences_[key] = ++serial_;
    for (const uintptr_t address : unfenced_[key]) {
      const auto held = resets_.find(address);
      if (held != resets_.end() && held->second.fence == 0) held->second.fence = serial_;
    }
    unfenced_[key].clear();
  }

  // The memory, updated with what the reader sees of the words in flight.
  Words load(const void* from, const Reader& reader) const {
    Words words;
    std::memcpy(&words, from, sizeof words);
    for (int i = 0; i < 4 && !resets_.empty(); ++i) {
      const auto held = resets_.find(reinterpret_cast<uintptr_t>(from) + i * sizeof(uint32_t));
      if (held != resets_.end() && sees(reader, held->second)) words.w[i] = held->second.word;
    }
    const auto line = lines_.find(reinterpret_cast<uintptr_t>(from) / sizeof words);
    if (line == lines_.end()) return words;
    for (int i = 0; i < 4; ++i) {
      const Pending& pending = line->second.words[i];
      if (pending.serial != 0 && reader.sees(pending.author)) words.w[i] = pending.word;
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

  // At the end of a launch.
  void deliver_all() {
    deliver(UINT64_MAX);
    for (const auto& held : resets_) write(held.first, held.second.word);
    resets_.clear(), unfenced_.clear(), fences_.clear();
  }

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

  struct Reset {
    uint32_t word;
    Author author;
    uint64_t fence;  // the serial number of the author's next fence; 0: none yet
  };

  static int64_t thread_key(int block, int thread) { return static_cast<int64_t>(block) << 32 | thread; }
  bool sees(const Reader& reader, const Reset& reset) const {
    if (reader.sees(reset.author)) return true;
    const auto last = fences_.find(thread_key(reader.block, reader.thread));
    return reset.fence != 0 && last != fences_.end() && last->second > reset.fence;
  }

  static void write(uintptr_t address, uint32_t word) {
    std::memcpy(reinterpret_cast<void*>(address), &word, sizeof word);
  }

  std::unordered_map<uintptr_t, Line> lines_;
  std::priority_queue<Arrival> arrivals_;
  std::unordered_map<uintptr_t, Reset> resets_;                   // by address
  std::unordered_map<int64_t, std::vector<uintptr_t>> unfenced_;  // by thread: its resets since its last fence
  std::unordered_map<int64_t, uint64_t> fences_;                  // by thread: the serial number of its last one
  uint64_t serial_ = 0;
};

}  // namespace emulation
}  // namespace cuda
}  // namespace fused_rnn
