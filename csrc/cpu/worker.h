// One thread's part of a layer, and the barrier that the threads of one direction share.
#pragma once

#include <cstdint>

namespace fused_rnn {
namespace cpu {

// Where the `count` workers of a team wait for one another. A wait spins for kSpin, about the time that a sleeping
// thread takes to wake up: a shorter spin would let two workers put each other to sleep at every step. On a busy
// machine the awaited worker has lost its core, and a spin is lost time; so a thread whose spins were in vain kPatience
// times running sleeps at once, and spins again at every kProbe-th wait, until a spin ends in time.
class Barrier {
 public:
  void wait(int64_t count);

 private:
  bool spin(int32_t generation) const;
  void sleep(int32_t generation);

  alignas(64) int64_t arrived_ = 0;
  alignas(64) int32_t generation_ = 0;  // the futex of the sleepers
  int32_t sleepers_ = 0;
};

// The team of a direction splits either the batch (no thread waits for another after packing) or the hidden units
// (each thread's weights stay in its own cache; one barrier after every product).
struct Worker {
  int64_t index;
  int64_t count;
  bool splits_units;
  Barrier* barrier;  // null with count == 1

  void wait() const {
    if (barrier) barrier->wait(count);
  }
  // Whether no other worker multiplies by the blocks of units that this one does.
  bool owns_blocks() const { return splits_units || count == 1; }
  // Where this worker's share of n items begins; the next worker's beginning is its end.
  int64_t begin(int64_t n) const { return n * index / count; }
  int64_t end(int64_t n) const { return n * (index + 1) / count; }
  // Of n blocks of units, those that it computes: its share if the team splits units, else all.
  int64_t first(int64_t n) const { return splits_units ? begin(n) : 0; }
  int64_t last(int64_t n) const { return splits_units ? end(n) : n; }
};

}  // namespace cpu
}  // namespace fused_rnn
