// The state of the emulated GPU: the running blocks and warps, the threads that wait, and the operations of a thread.
//
// A warp runs until all of its lanes wait. The lane that arrives last at a meeting (a barrier, mma or shuffle) does the
// work for all lanes, whose registers it may write because they are suspended, and makes them ready again. A meeting
// thus costs one fiber switch per lane. A thread that polls is ready again in the next round.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "cluster.h"
#include "emulator.h"
#include "exchange.h"
#include "fiber.h"
#include "fragments.h"
#include "shared_check.h"

namespace fused_rnn {
namespace cuda {
namespace emulation {

constexpr int kPollsPerTurn = 256;  // after this many loads without relax() a thread waits for a round anyway
constexpr uint32_t kAllLanes = 0xffffffffu;

enum class Meeting { kSyncCluster, kSyncBlock, kSyncWarp, kShuffle, kBf16, kFp16, kTf32 };

struct Warp {
  int block;  // index in Emulator::blocks_
  int first;  // its first thread
  uint32_t time;
  uint32_t ready, polling, arrived, left;  // sets of lanes; left: have ended
  Meeting meeting;                         // where the arrived lanes wait
  Operands operands[kLanes];
};

struct Block {
  int index;
  uint32_t time =
      0;  // advanced by every barrier of the block or of one of its warps; begin() resets it before it overflows
  uint32_t interval = 0;  // the time of the last barrier of the whole block
  int waiting, left;      // numbers of threads that wait at a block's or cluster's barrier, and that have ended
  std::vector<Warp> warps;
  SharedMemory shared;
  Inbox inbox;                      // in a cluster
  std::vector<VectorClock> clocks;  // of each thread, in a cluster
};

class Random {  // xorshift64*
 public:
  explicit Random(uint64_t seed) : state_((seed + 1) * 0x9e3779b97f4a7c15u | 1) {}
  uint32_t below(uint32_t limit) {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>((((state_ * 0x2545f4914f6cdd1du) >> 32) * limit) >> 32);
  }

 private:
  uint64_t state_;
};

class Emulator {
 public:
  void run(const Grid& grid, const std::function<void()>& kernel);

  // Called by the running thread.
  void meet(Meeting kind, const Operands& operands);
  void relax() {
    warp_->ready &= ~(1u << lane_);
    warp_->polling |= 1u << lane_;
    suspend();
  }
  void count_poll() {
    if (++polls_ > kPollsPerTurn) relax();
  }
  Words load_exchanged(const void* from);
  void store_exchanged(void* to, uint32_t word);
  void reset_exchanged(void* to, uint32_t word);
  void fence() { exchange_.fence(block_index(), thread()); }
  void store_to_host(int32_t* to, int32_t value);
  void init(int arrivals);
  void expect(int arrivals, int bytes);
  bool complete(int arrivals, int parity);
  void push(int offset, const Words& v, int arrivals, int rank);
  unsigned char* shared_bytes(int64_t offset, int bytes, int alignment, Access access);
  int thread() const { return warp_->first + lane_; }
  int block_index() const { return blocks_[warp_->block].index; }
  int block_count() const { return grid_.blocks; }
  const Grid& grid() const { return grid_; }
  uint64_t clock() const { return clock_; }

  Random random{0};
  uint64_t nanoseconds_per_round = 1000;
  Device device = {132, 232448, 90};
  int32_t error_word = 0;

 private:
  static void thread_main();
  void leave();
  void run_together(const int* indices, int count);
  void begin(Block& block, int index, int slot);
  void unwind();
  bool visit(Warp& warp);
  void resume(Warp& warp, int lane);
  void suspend();
  void advance_clock();
  void end_interval(Block& block);
  void share(Block& block, int first, int count);
  void deliver_pushes();
  uint64_t random_delay();
  [[noreturn]] void fail(const std::string& what) const;
  std::string who_waits() const;
  int first_of_cluster() const { return warp_->block / grid_.cluster * grid_.cluster; }
  Exchange::Author author() const { return {block_index(), thread(), warp_->time}; }
  Fiber& fiber() { return fibers_[warp_->block * grid_.threads + thread()]; }

  Grid grid_{};
  const std::function<void()>* kernel_ = nullptr;
  std::deque<Block> blocks_;  // the blocks that run at the same time; their memory is kept for later launches
  std::deque<Fiber> fibers_;
  Stacks stacks_;
  std::vector<Warp*> order_;  // the warps that have not ended, in the order of their turns
  Exchange exchange_;
  Pushes pushes_;
  std::vector<int> cluster_waiting_;  // in each cluster, threads that wait at sync_cluster

  Warp* warp_ = nullptr;  // of the running thread
  int lane_ = 0;
  int polls_ = 0;
  bool progress_ = false, stopping_ = false;
  std::string error_, first_race_;
  uint64_t races_ = 0;
  uint64_t visits_ = 0;  // number of turns of warps: the clock by which words arrive
  uint64_t clock_ = 1, step_ = 0, idle_time_ = 0;
  int idle_rounds_ = 0;
};

Emulator& emulator();  // the one that everything runs on

}  // namespace emulation
}  // namespace cuda
}  // namespace fused_rnn
