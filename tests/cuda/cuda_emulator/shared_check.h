// A block's shared memory and the latest accesses to every two bytes of it, to detect races.
//
// Two accesses of different threads race if one of them is a write and no barrier orders them. That does not depend on
// the order in which the emulator happens to run the threads. Every barrier advances the block's time, so that the time
// of an access identifies its interval between two barriers of its warp as well as of its block.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator.h"
#include "fragments.h"

namespace fused_rnn {
namespace cuda {
namespace emulation {

class SharedMemory {
 public:
  struct Accessor {
    int thread;
    uint32_t warp_time;   // of the last barrier of its warp
    uint32_t block_time;  // of the last barrier of its block; at least 1
  };

  // Begins a new block, whose accesses must all have later times than those of the block before.
  void begin(int bytes) {
    bytes_.resize(bytes);
    for (size_t i = 0; i < bytes_.size(); ++i) bytes_[i] = static_cast<unsigned char>(kPoison >> i % 4 * 8);
    const size_t halves = (bytes_.size() + 1) / 2;
    if (halves_.size() < halves) halves_.resize(halves);
  }

  // Forgets all accesses, so that times can start from 0 again.
  void forget() { halves_.clear(); }

  int size() const { return static_cast<int>(bytes_.size()); }
  unsigned char* at(int offset) { return &bytes_[offset]; }

  // Records an access; returns a description of the race, empty if there is none.
  std::string check(int offset, int bytes, Access access, const Accessor& self) {
    std::string race;
    for (int i = offset / 2; i < (offset + bytes) / 2; ++i) {
      const Other other = access == Access::kRead ? read(halves_[i], self) : write(halves_[i], self);
      if (!other.access || !race.empty()) continue;
      race = "byte " + std::to_string(2 * i) + ", " + (access == Access::kRead ? "read" : "written") + " by thread " +
             std::to_string(self.thread) + ", " + other.access + " by " +
             (other.thread == kSeveral ? "several warps" : "thread " + std::to_string(other.thread)) +
             ", without a barrier between";
    }
    return race;
  }

  // Whether no thread has accessed these bytes at or after `time`.
  bool untouched_since(int offset, int bytes, uint32_t time) const {
    for (int i = offset / 2; i < (offset + bytes) / 2; ++i) {
      if (halves_[i].written >= time || halves_[i].read >= time) return false;
    }
    return true;
  }

 private:
  static constexpr uint32_t kPoison = 0x7fa5a5a5u;  // NaN as float and, in its upper half, as bf16 and fp16
  static constexpr int16_t kSeveral = -1;

  struct Accesses {
    uint32_t written, read;  // times of the last write and read
    uint32_t reading_lanes;  // lanes of reading_warp that have read since its last barrier
    int16_t reading_warp;    // kSeveral: more than one since the block's last barrier
    uint16_t writing_thread;
  };

  // An access that races with another's.
  struct Other {
    const char* access = nullptr;  // null: there is none
    int thread = 0;
  };

  // Whether no barrier orders an access of `warp` at `time` before an access of this thread.
  static bool unordered(int warp, uint32_t time, const Accessor& self) {
    return time >= (warp == self.thread / kLanes ? self.warp_time : self.block_time);
  }

  static Other other_write(const Accesses& last, const Accessor& self) {
    if (last.writing_thread == self.thread) return {};
    if (!unordered(last.writing_thread / kLanes, last.written, self)) return {};
    return {"written", last.writing_thread};
  }

  static Other read(Accesses& last, const Accessor& self) {
    const int warp = self.thread / kLanes;
    if (last.reading_warp != warp && last.reading_lanes != 0 && last.read >= self.block_time) {
      last.reading_warp = kSeveral;
    } else if (last.reading_warp != warp || last.read != self.warp_time) {
      last.reading_warp = static_cast<int16_t>(warp);
      last.reading_lanes = 0;
    }
    last.reading_lanes |= 1u << self.thread % kLanes;
    last.read = self.warp_time;
    return other_write(last, self);
  }

  static Other write(Accesses& last, const Accessor& self) {
    const Other other = other_write(last, self);
    last.written = self.warp_time;
    last.writing_thread = static_cast<uint16_t>(self.thread);
    uint32_t lanes = last.reading_lanes;
    if (last.reading_warp == self.thread / kLanes) lanes &= ~(1u << self.thread % kLanes);
    if (other.access || lanes == 0 || !unordered(last.reading_warp, last.read, self)) return other;
    if (last.reading_warp == kSeveral) return {"read", kSeveral};
    return {"read", last.reading_warp * kLanes + __builtin_ctz(lanes)};
  }

  std::vector<unsigned char> bytes_;
  std::vector<Accesses> halves_;
};

}  // namespace emulation
}  // namespace cuda
}  // namespace fused_rnn
