// One thread's part of a layer, and the barrier that the threads of one direction share.
#pragma once

#include <cstdint>

namespace fused_rnn {
namespace cpu {

// Spins for a moment, then sleeps until it is woken. Beside other processes on the same cores both extremes are slow:
// who spins keeps the core from the thread it waits for; who yields gets it back only after a stranger's time slice.
class Barrier {
 public:
  explicit Barrier(int64_t count) : count_(count) {}
  void wait();

 private:
  const int64_t count_;
  alignas(64) int64_t arrived_ = 0;
  alignas(64) int32_t generation_ = 0;  // what the sleepers' futex watches
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
    if (barrier) barrier->wait();
  }
  // Where this worker's share of n items begins; the next worker's beginning is its end.
  int64_t begin(int64_t n) const { return n * index / count; }
  int64_t end(int64_t n) const { return n * (index + 1) / count; }
};

}  // namespace cpu
}  // namespace fused_rnn
