// The scheduler, the meetings and the memory operations of the emulated GPU; machine.h describes its state.
//
// An error is thrown in the thread that makes it. The other threads are then resumed to throw as well, so that all
// stacks are unwound before the next launch.
#include "emulator.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "machine.h"

namespace fused_rnn {
namespace cuda {
namespace emulation {
namespace {

// After kPatience rounds without progress the clock runs faster and faster; a watchdog must then time out within
// kDeadlock.
constexpr int kPatience = 200;
constexpr uint64_t kSecond = 1000000000u;
constexpr uint64_t kDeadlock = 20 * kSecond;

struct Stopped {};  // thrown in the other threads when a launch has failed

const char* name(Meeting meeting) {
  static const char* const names[] = {"sync_cluster", "sync_block", "sync_warp", "shuffle_xor",
                                      "mma_bf16",     "mma_fp16",   "mma_tf32"};
  return names[static_cast<int>(meeting)];
}

std::string text(int64_t number) { return std::to_string(number); }

}  // namespace

Emulator& emulator() {
  static Emulator& one = *new Emulator;  // never destroyed, as destructors at exit may launch kernels
  return one;
}

void Emulator::fail(const std::string& what) const {
  throw std::runtime_error("block " + text(block_index()) + " thread " + text(thread()) + ": " + what);
}

// ---- Launches -------------------------------------------------------------------------------------------------------

void Emulator::run(const Grid& grid, const std::function<void()>& kernel) {
  const auto refuse = [](const char* why) { throw std::runtime_error(std::string("launch refused: ") + why); };
  if (grid.blocks < 1 || grid.threads < 1 || grid.threads > 1024) refuse("blocks or threads");
  if (grid.threads % kLanes != 0) refuse("threads are not whole warps");
  if (grid.shared_bytes < 0 || grid.shared_bytes > device.shared_bytes) refuse("shared memory");
  if (grid.cooperative && grid.blocks > device.sms) refuse("more blocks than can run at the same time");
  if (grid.cluster < 1 || grid.cluster > kMaxClusterBlocks || grid.blocks % grid.cluster != 0) refuse("clusters");
  if (grid.cluster > 1 && device.capability < 90) refuse("clusters here");
  grid_ = grid, kernel_ = &kernel;
  error_.clear();
  races_ = 0;

  const int together = grid.cooperative ? grid.blocks : grid.cluster;
  std::vector<int> order(grid.blocks / grid.cluster);  // of the clusters
  for (int i = 0; i < static_cast<int>(order.size()); ++i) {
    order[i] = i;
    std::swap(order[i], order[random.below(i + 1)]);
  }
  std::vector<int> indices(grid.blocks);
  for (int i = 0; i < grid.blocks; ++i) indices[i] = order[i / grid.cluster] * grid.cluster + i % grid.cluster;
  for (int i = 0; i < grid.blocks && error_.empty(); i += together) run_together(&indices[i], together);
  exchange_.deliver_all();

  if (races_ != 0) {
    error_ += (error_.empty() ? "" : "\n") + text(races_) + " races on shared memory; the first: " + first_race_;
  }
  if (!error_.empty()) throw std::runtime_error(error_);
}

void Emulator::begin(Block& block, int index, int slot) {
  if (block.time > UINT32_MAX / 2) {  // leaves room for the barriers of any launch
    block.time = 0;
    block.shared.forget();
  }
  block.index = index;
  block.interval = ++block.time;
  block.waiting = block.left = 0;
  block.warps.resize(grid_.threads / kLanes);
  for (size_t i = 0; i < block.warps.size(); ++i) {
    Warp& warp = block.warps[i];
    warp.block = slot;
    warp.first = static_cast<int>(i) * kLanes;
    warp.time = block.time;
    warp.ready = kAllLanes;
    warp.polling = warp.arrived = warp.left = 0;
    order_.push_back(&warp);
  }
  block.shared.begin(grid_.shared_bytes);
  if (grid_.cluster > 1) {
    block.inbox.begin(grid_.shared_bytes, grid_.threads);
    block.clocks.assign(grid_.threads, VectorClock{});
    for (VectorClock& clock : block.clocks) clock[slot % grid_.cluster] = block.interval;
  }
  for (int thread = 0; thread < grid_.threads; ++thread) {
    const size_t i = static_cast<size_t>(slot) * grid_.threads + thread;
    fibers_[i].start(stacks_.at(i), i, thread_main);
  }
}

void Emulator::run_together(const int* indices, int count) {
  if (blocks_.size() < static_cast<size_t>(count)) blocks_.resize(count);
  const size_t threads = static_cast<size_t>(count) * grid_.threads;
  if (fibers_.size() < threads) fibers_.resize(threads);
  order_.clear();
  pushes_.clear();
  cluster_waiting_.assign(count / grid_.cluster, 0);
  for (int i = 0; i < count; ++i) begin(blocks_[i], indices[i], i);
  step_ = nanoseconds_per_round;
  idle_rounds_ = 0;
  idle_time_ = 0;

  while (!order_.empty()) {
    for (size_t i = 1; i < order_.size(); ++i) {
      std::swap(order_[i], order_[random.below(static_cast<uint32_t>(i) + 1)]);
    }
    progress_ = false;
    bool any_ran = false;
    for (Warp* warp : order_) {
      if (exchange_.deliver(++visits_)) progress_ = true;
      deliver_pushes();
      if (!error_.empty()) return unwind();
      if (visit(*warp)) any_ran = true;
      if (!error_.empty()) return unwind();
    }
    if (!any_ran) error_ = "deadlock: every thread waits at a barrier" + who_waits();
    advance_clock();
    if (!error_.empty()) return unwind();
    const auto finished = [](const Warp* warp) { return warp->left == kAllLanes; };
    order_.erase(std::remove_if(order_.begin(), order_.end(), finished), order_.end());
  }
  if (!pushes_.empty()) error_ = "a pushed word is on its way to a block that has ended";
  for (int i = 0; i < count && grid_.cluster > 1 && error_.empty(); ++i) {
    const std::string left = blocks_[i].inbox.left_over();
    if (!left.empty()) error_ = "block " + text(blocks_[i].index) + " ends with " + left;
  }
}

void Emulator::unwind() {
  stopping_ = true;
  for (Warp* warp : order_) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((warp->left >> lane & 1) == 0) resume(*warp, lane);
    }
  }
  stopping_ = false;
}

void Emulator::advance_clock() {
  if (progress_ || !exchange_.empty() || !pushes_.empty()) {
    step_ = nanoseconds_per_round;
    idle_rounds_ = 0;
    idle_time_ = 0;
  } else if (++idle_rounds_ > kPatience) {
    step_ = std::max(nanoseconds_per_round, std::min(2 * step_ + 1, kSecond));
    idle_time_ += step_;
    if (idle_time_ > kDeadlock) error_ = "deadlock: those that poll get nothing" + who_waits();
  }
  clock_ += step_;
}

std::string Emulator::who_waits() const {
  std::string waiting;
  int lines = 0;
  const auto add = [&](const Warp& warp, uint32_t lanes, const std::string& where) {
    if (lanes == 0 || ++lines > 9) return;
    if (lines == 9) waiting += "\n  and others";
    if (lines == 9) return;
    const int others = __builtin_popcount(lanes) - 1;
    waiting += "\n  block " + text(blocks_[warp.block].index) + " thread " + text(warp.first + __builtin_ctz(lanes));
    if (others > 0) waiting += " and " + text(others) + " others of its warp";
    waiting += where;
  };
  for (const Warp* warp : order_) {
    add(*warp, warp->arrived, std::string(" at ") + name(warp->meeting));
    add(*warp, warp->polling, " polling");
  }
  return waiting;
}

// ---- Threads --------------------------------------------------------------------------------------------------------

// Runs the ready lanes of a warp, from a random lane on, for a random number of turns, to vary the interleaving.
bool Emulator::visit(Warp& warp) {
  warp.ready |= warp.polling;
  warp.polling = 0;
  const bool any = warp.ready != 0;
  uint32_t turn = random.below(kLanes);
  for (uint32_t turns = kLanes * (1 + random.below(64)); warp.ready != 0 && turns != 0 && error_.empty(); --turns) {
    const uint32_t rotated = warp.ready >> turn | warp.ready << (kLanes - turn) % kLanes;
    const int lane = static_cast<int>((turn + __builtin_ctz(rotated)) % kLanes);
    resume(warp, lane);
    turn = (lane + 1) % kLanes;
  }
  return any;
}

void Emulator::resume(Warp& warp, int lane) {
  warp_ = &warp;
  lane_ = lane;
  polls_ = 0;
  fiber().resume();
  warp_ = nullptr;
}

void Emulator::suspend() {
  fiber().suspend();
  if (stopping_) throw Stopped();
}

void Emulator::thread_main() {
  Emulator& self = emulator();
  try {
    if (!self.stopping_) {
      (*self.kernel_)();
      self.leave();
    }
  } catch (const Stopped&) {
  } catch (const std::exception& error) {
    if (self.error_.empty()) self.error_ = error.what();
  } catch (...) {
    if (self.error_.empty()) self.error_ = "a thread has thrown what is no std::exception";
  }
  self.warp_->ready &= ~(1u << self.lane_);
  self.warp_->left |= 1u << self.lane_;
  self.fiber().suspend(true);
}

void Emulator::leave() {
  Block& block = blocks_[warp_->block];
  if (warp_->arrived != 0) fail(std::string("ends while its warp waits for it at ") + name(warp_->meeting));
  if (block.waiting != 0) fail("ends while its block waits for it at sync_block");
  if (cluster_waiting_[warp_->block / grid_.cluster] != 0) fail("ends while its cluster waits for it at sync_cluster");
  ++block.left;
  progress_ = true;
}

void Emulator::meet(Meeting kind, const Operands& operands) {
  Warp& warp = *warp_;
  Block& block = blocks_[warp.block];
  const bool whole_cluster = kind == Meeting::kSyncCluster, whole_block = kind == Meeting::kSyncBlock;
  // The blocks [first, last) of which all threads must meet; none if only the warp meets.
  const int first = whole_cluster ? first_of_cluster() : warp.block;
  const int last = whole_cluster ? first + grid_.cluster : whole_block ? warp.block + 1 : warp.block;
  int& waiting = whole_cluster ? cluster_waiting_[warp.block / grid_.cluster] : block.waiting;
  bool ended = warp.left != 0;
  for (int i = first; i < last; ++i) ended = ended || blocks_[i].left != 0;
  if (ended) fail(std::string("at ") + name(kind) + ", but others ended");
  if (warp.arrived != 0 && warp.meeting != kind) {
    fail(std::string("at ") + name(kind) + ", but thread " + text(warp.first + __builtin_ctz(warp.arrived)) +
         " of its warp waits at " + name(warp.meeting));
  }
  warp.meeting = kind;
  warp.arrived |= 1u << lane_;
  warp.operands[lane_] = operands;
  if (last > first ? ++waiting < (last - first) * grid_.threads : warp.arrived != kAllLanes) {
    warp.ready &= ~(1u << lane_);
    return suspend();
  }

  progress_ = true;
  if (last > first) {
    waiting = 0;
    VectorClock all{};
    for (int i = first; i < last; ++i) {
      end_interval(blocks_[i]);
      if (grid_.cluster > 1) merge(all, blocks_[i].clocks[0]);
    }
    for (int i = first; i < last && whole_cluster && grid_.cluster > 1; ++i) {
      std::fill(blocks_[i].clocks.begin(), blocks_[i].clocks.end(), all);
    }
    return;
  }
  warp.arrived = 0;
  warp.ready = kAllLanes;
  switch (kind) {
    case Meeting::kSyncWarp:
      warp.time = ++block.time;  // the only one of them that orders memory
      share(block, warp.first, kLanes);
      break;
    case Meeting::kShuffle:
      shuffle(warp.operands);
      break;
    case Meeting::kBf16:
      multiply<2, bf16_number>(warp.operands);
      break;
    case Meeting::kFp16:
      multiply<2, fp16_number>(warp.operands);
      break;
    case Meeting::kTf32:
      multiply<1, tf32_number>(warp.operands);
      break;
    case Meeting::kSyncBlock:
    case Meeting::kSyncCluster:
      break;
  }
}

// After a barrier of the whole block: begins a new interval and makes all threads ready.
void Emulator::end_interval(Block& block) {
  block.interval = ++block.time;
  for (Warp& warp : block.warps) {
    warp.time = block.time;
    warp.arrived = 0;
    warp.ready = kAllLanes;
  }
  if (grid_.cluster == 1) return;
  const int rank = block.warps.front().block % grid_.cluster;
  for (VectorClock& clock : block.clocks) clock[rank] = block.interval;
  share(block, 0, grid_.threads);
}

// After a barrier of these threads: merges their clocks.
void Emulator::share(Block& block, int first, int count) {
  if (grid_.cluster == 1) return;
  VectorClock all{};
  for (int i = first; i < first + count; ++i) merge(all, block.clocks[i]);
  for (int i = first; i < first + count; ++i) block.clocks[i] = all;
  block.inbox.share(first, count);
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

Words Emulator::load_exchanged(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Words) != 0) fail("load_exchanged is not aligned");
  count_poll();
  const Block& block = blocks_[warp_->block];
  return exchange_.load(from, {block.index, thread(), warp_->time, block.interval});
}

// A delay in visits: mostly up to four rounds, so that words overtake each other, and for a few words much longer.
uint64_t Emulator::random_delay() {
  const uint32_t rounds = random.below(64) == 0 ? 16 : 4;
  return random.below(rounds * static_cast<uint32_t>(order_.size()));
}

void Emulator::store_exchanged(void* to, uint32_t word) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof word != 0) fail("store_exchanged is not aligned");
  static_cast<void>(*static_cast<volatile unsigned char*>(to));  // an invalid address must fault here, not at delivery
  exchange_.store(to, word, author(), visits_ + 1 + random_delay());
  progress_ = true;
}

void Emulator::reset_exchanged(void* to, uint32_t word) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Words) != 0) fail("reset_exchanged is not aligned");
  for (int i = 0; i < 4; ++i) {
    uint32_t* const at = static_cast<uint32_t*>(to) + i;
    random.below(4) == 0 ? store_exchanged(at, word) : exchange_.reset(at, word, author());
  }
}

void Emulator::store_to_host(int32_t* to, int32_t value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof value != 0) fail("store_to_host is not aligned");
  __atomic_store_n(to, value, __ATOMIC_RELAXED);
  progress_ = true;
}

void Emulator::init(int arrivals) {
  if (grid_.cluster == 1) fail("Arrivals outside of a cluster");
  Block& block = blocks_[warp_->block];
  const std::string error = block.inbox.init(arrivals, block.time);
  if (!error.empty()) fail("Arrivals::init, " + error);
}

void Emulator::expect(int arrivals, int bytes) {
  const std::string error = blocks_[warp_->block].inbox.expect(arrivals, bytes);
  if (!error.empty()) fail("Arrivals::expect, " + error);
  progress_ = true;
}

bool Emulator::complete(int arrivals, int parity) {
  count_poll();
  Block& block = blocks_[warp_->block];
  bool done = false;
  const std::string error = block.inbox.complete(arrivals, thread(), parity, block.clocks[thread()], done);
  if (!error.empty()) fail("Arrivals::complete, " + error);
  return done;
}

void Emulator::push(int offset, const Words& v, int arrivals, int rank) {
  const auto where = [&] { return "push to byte " + text(offset) + " of the cluster's block " + text(rank); };
  if (rank < 0 || rank >= grid_.cluster || grid_.cluster == 1) fail(where() + ": there is no such block");
  const int bytes = sizeof v;
  if (offset < 0 || offset + bytes > grid_.shared_bytes || offset % bytes != 0) fail(where() + ": not words of it");
  const int to = first_of_cluster() + rank;
  Block& target = blocks_[to];
  const VectorClock& clock = blocks_[warp_->block].clocks[thread()];
  if (!target.inbox.initialized_before(arrivals, clock[rank])) fail(where() + ": its barrier may not be ready");
  if (!target.shared.untouched_since(offset, bytes, clock[rank])) fail(where() + ": it may still be in use there");
  for (int i = 0; i < 4; ++i) {  // each word arrives on its own
    const int at = offset + 4 * i;
    const std::string error = target.inbox.announce(at);
    if (!error.empty()) fail(where() + ": " + error);
    pushes_.add({visits_ + 1 + random_delay(), 0, warp_->block, to, at, v.w[i], arrivals, clock});
  }
  progress_ = true;
}

void Emulator::deliver_pushes() {
  while (pushes_.any_due(visits_) && error_.empty()) {
    const Pushes::Push push = pushes_.take();
    Block& target = blocks_[push.to];
    progress_ = true;
    std::memcpy(target.shared.at(push.offset), &push.word, sizeof push.word);
    const std::string error = target.left == grid_.threads ? "that has ended" : target.inbox.deliver(push);
    if (error.empty()) continue;
    error_ = "block " + text(blocks_[push.from].index) + " has pushed to byte " + text(push.offset) + " of block " +
             text(target.index) + ": " + error;
  }
}

unsigned char* Emulator::shared_bytes(int64_t offset, int bytes, int alignment, Access access) {
  Block& block = blocks_[warp_->block];
  const auto range = [&] { return "shared memory, " + text(bytes) + " bytes at " + text(offset); };
  const int64_t size = block.shared.size();
  if (offset < 0 || offset + bytes > size) fail(range() + ": beyond its " + text(size) + " bytes");
  if (offset % alignment != 0) fail(range() + ": not aligned");
  if (grid_.cluster > 1) {
    const std::string error = block.inbox.check(static_cast<int>(offset), bytes, thread(), access == Access::kWrite);
    if (!error.empty()) fail(range() + ": the " + error);
  }
  const SharedMemory::Accessor self{thread(), warp_->time, block.interval};
  const std::string race = block.shared.check(static_cast<int>(offset), bytes, access, self);
  if (!race.empty() && races_++ == 0) first_race_ = "block " + text(block.index) + ", " + race;
  return block.shared.at(static_cast<int>(offset));
}

unsigned char* shared_bytes(int64_t offset, int bytes, int alignment, Access access) {
  return emulator().shared_bytes(offset, bytes, alignment, access);
}

}  // namespace emulation

using emulation::emulator;
using emulation::Meeting;

void set_schedule_seed(uint64_t seed) { emulator().random = emulation::Random(seed); }
void set_nanoseconds_per_round(uint64_t nanoseconds) { emulator().nanoseconds_per_round = nanoseconds; }
void set_current_device(const Device& device) { emulator().device = device; }
Device current_device() { return emulator().device; }
int32_t* error_word() { return &emulator().error_word; }
void fill_with_ones(void* at, int64_t bytes, void*) { std::memset(at, 0xff, bytes); }

void run_emulated(const Grid& grid, const std::function<void()>& kernel) {
  static std::mutex launching;
  const std::lock_guard<std::mutex> lock(launching);
  emulator().run(grid, kernel);
}

int thread_index() { return emulator().thread(); }
int block_index() { return emulator().block_index(); }
int block_count() { return emulator().block_count(); }
void relax() { emulator().relax(); }
void sync_block() { emulator().meet(Meeting::kSyncBlock, {}); }
void sync_warp() { emulator().meet(Meeting::kSyncWarp, {}); }
void sync_cluster() { emulator().meet(Meeting::kSyncCluster, {}); }
void trap() { throw std::runtime_error("trap"); }
void Arrivals::init() const { emulator().init(offset_); }
void Arrivals::expect(int bytes) const { emulator().expect(offset_, bytes); }
bool Arrivals::complete(int parity) const { return emulator().complete(offset_, parity); }
void push(int offset, const Words& v, const Arrivals& arrivals, int rank) {
  emulator().push(offset, v, arrivals.offset(), rank);
}

float shuffle_xor(float value, int lanes) {
  emulator().meet(Meeting::kShuffle, {&value, {static_cast<uint32_t>(lanes) % 32}, {}});
  return value;
}
uint32_t shuffle_xor(uint32_t value, int lanes) {
  return emulation::same_bits<uint32_t>(shuffle_xor(emulation::same_bits<float>(value), lanes));
}

Words load_exchanged(const void* from) { return emulator().load_exchanged(from); }
void store_exchanged(void* to, uint32_t word) { emulator().store_exchanged(to, word); }
void reset_exchanged(void* to, uint32_t word) { emulator().reset_exchanged(to, word); }
void fence() { emulator().fence(); }
void store_to_host(int32_t* to, int32_t value) { emulator().store_to_host(to, value); }
uint64_t nanoseconds() {
  emulator().count_poll();
  return emulator().clock();
}

#define FUSED_RNN_MMA(name, kind)                                              \
  void name(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    emulator().meet(Meeting::kind, {c, {a[0], a[1], a[2], a[3]}, {b0, b1}});   \
  }
FUSED_RNN_MMA(mma_bf16, kBf16)
FUSED_RNN_MMA(mma_fp16, kFp16)
FUSED_RNN_MMA(mma_tf32, kTf32)
#undef FUSED_RNN_MMA

}  // namespace cuda
}  // namespace fused_rnn
