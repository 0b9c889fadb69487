// A block's shared memory, with the last accesses to every two bytes of it.
//
// A race is an access that no barrier orders with another thread's, one of the two a write: whether or not the order
// in which the emulator runs the threads happens to give the right result. Time advances with the barriers, so that
// one number per access tells both in which interval of its warp and in which of its block it was.
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

  // For a block that starts, later than all earlier accesses.
  void begin(int bytes) {
    bytes_.resize(bytes);
    for (size_t i = 0; i < bytes_.size(); ++i) bytes_[i] = static_cast<unsigned char>(kPoison >> i % 4 * 8);
    const size_t halves = (bytes_.size() + 1) / 2;
    if (halves_.size() < halves) halves_.resize(halves);
  }

  // All earlier accesses, so that time can start anew.
  void forget() { halves_.clear(); }

  int size() const { return static_cast<int>(bytes_.size()); }
  unsigned char* at(int offset) { return &bytes_[offset]; }

  // Notes an access; says which race it is, if any.
  std::string check(int offset, int bytes, Access access, const Accessor& self) {
    std::string race;
    for (int i = offset / 2; i < (offset + bytes) / 2; ++i) {
      const std::string other = access == Access::kRead ? read(halves_[i], self) : write(halves_[i], self);
      if (other.empty() || !race.empty()) continue;
      race = "byte " + std::to_string(2 * i) + ", " + (access == Access::kRead ? "read" : "written") + " by thread " +
             std::to_string(self.thread) + ", " + other + ", without a barrier between";
    }
    return race;
  }

  // Whether nobody has accessed these bytes since `time`.
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
    uint32_t written, read;  // when
    uint32_t reading_lanes;  // of the warp that reads, since its last barrier
    int16_t reading_warp;    // or kSeveral, since the block's last barrier
    uint16_t writing_thread;
  };

  // Whether what a warp did then can be unordered with what this thread does now.
  static bool unordered(int warp, uint32_t time, const Accessor& self) {
    return time >= (warp == self.thread / kLanes ? self.warp_time : self.block_time);
  }

  static std::string other_write(const Accesses& last, const Accessor& self) {
    if (last.writing_thread == self.thread) return "";
    if (!unordered(last.writing_thread / kLanes, last.written, self)) return "";
    return "written by thread " + std::to_string(last.writing_thread);
  }

  static std::string read(Accesses& last, const Accessor& self) {
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

  static std::string write(Accesses& last, const Accessor& self) {
    std::string other = other_write(last, self);
    last.written = self.warp_time;
    last.writing_thread = static_cast<uint16_t>(self.thread);
    uint32_t lanes = last.reading_lanes;
    if (last.reading_warp == self.thread / kLanes) lanes &= ~(1u << self.thread % kLanes);
    if (!other.empty() || lanes == 0 || !unordered(last.reading_warp, last.read, self)) return other;
    if (last.reading_warp == kSeveral) return "read by several warps";
    return "read by thread " + std::to_string(last.reading_warp * kLanes + __builtin_ctz(lanes));
  }

  std::vector<unsigned char> bytes_;
  std::vector<Accesses> halves_;
};

}  // namespace emulation
}  // namespace cuda
}  // namespace fused_rnn
