// Checks the emulation of clusters: their barriers, the words that blocks push to each other, and the mbarriers that
// count them. Also checks that the kernels' exchanges through a cluster end if one of its blocks is too late.
#include <string>
#include <vector>

#include "cluster.h"
#include "exchange.cuh"
#include "reduction.cuh"
#include "self_test.h"

namespace self_test {
namespace {

enum class Fault {
  kNone,
  kNoClusterBarrierAtStart,
  kNotInitialized,
  kNothingExpected,
  kTooLittleExpected,
  kTooMuchExpected,
  kExpectedTwice,
  kOtherParity,
  kNotWaited,
  kOneSlot,
  kNoBlockBarrier,
  kWrittenOnTheWay,
  kBeyondTheBlock,
  kNotAligned,
  kOntoABarrier,
  kNoSuchBlock,
  kEndsEarly,
  kEndsAtBarrier,
};

struct Ring {
  Fault fault;
  int rounds;
  uint32_t* sums;  // [block, thread]
};

constexpr int kRingThreads = 64;
constexpr int ring_bytes(int cluster) { return 16 + 2 * cluster * kRingThreads * 16; }

// In every round each thread adds a word that a thread of the previous block has pushed. Every block pushes to all
// blocks, so that a block that has received all words of a round knows that all blocks have finished the round before.
FUSED_RNN_KERNEL(kRingThreads) pass_around(Ring p, int cluster) {
  const int thread = thread_index(), rank = block_index() % cluster, before = (rank + cluster - 1) % cluster;
  const auto fault = [&](Fault f) { return p.fault == f && rank == 1; };
  const auto slot = [&](int round, int from) {
    return 16 + ((fault(Fault::kOneSlot) ? 0 : round % 2) * cluster + from) * kRingThreads * 16;
  };
  const auto arrivals = [&](int round) { return Arrivals(round % 2 * 8); };
  const auto expect = [&](int round) {
    const int extra = fault(Fault::kTooLittleExpected) ? -16 : fault(Fault::kTooMuchExpected) ? 16 : 0;
    if (!fault(Fault::kNothingExpected)) arrivals(round).expect(cluster * kRingThreads * 16 + extra);
    if (fault(Fault::kExpectedTwice)) arrivals(round).expect(0);
  };
  const auto send = [&](int round, uint32_t value) {
    int to = slot(round, rank) + thread * 16;
    const Words words{{value, value + 1, value + 2, value + 3}};
    if (fault(Fault::kBeyondTheBlock) && thread == 5) to += ring_bytes(cluster);
    if (fault(Fault::kNotAligned) && thread == 5) to += 4;
    if (fault(Fault::kOntoABarrier) && thread == 5) to = 0;
    for (int i = 0; i < cluster; ++i) push(to, words, arrivals(round), fault(Fault::kNoSuchBlock) ? cluster : i);
  };
  if (thread == 0) {
    for (int round = 0; round < 2; ++round) {
      if (!fault(Fault::kNotInitialized)) arrivals(round).init();
      expect(round);
    }
  }
  if (p.fault != Fault::kNoClusterBarrierAtStart) sync_cluster();
  uint32_t value = static_cast<uint32_t>(block_index() * kRingThreads + thread);
  send(0, value);
  if (fault(Fault::kEndsEarly)) return;
  for (int round = 0; round < p.rounds; ++round) {
    const int parity = round / 2 % 2 ^ (fault(Fault::kOtherParity) ? 1 : 0);
    if (!fault(Fault::kNotWaited)) {
      while (!arrivals(round).complete(parity)) relax();
      if (thread == 0) expect(round);
    }
    if (fault(Fault::kWrittenOnTheWay)) shared_memory<uint32_t>(slot(round + 1, before))[4 * thread] = 0;
    value += shared_memory<uint32_t>(slot(round, before))[4 * (thread ^ 33) + thread % 4];
    if (!fault(Fault::kNoBlockBarrier)) sync_block();
    if (round + 1 < p.rounds) send(round + 1, value);
  }
  p.sums[block_index() * kRingThreads + thread] = value;
  if (!fault(Fault::kEndsAtBarrier)) sync_cluster();
}

template <int kCluster>
FUSED_RNN_KERNEL(kRingThreads)
ring(Ring p) {
  pass_around(p, kCluster);
}

template <int kCluster>
void test_ring() {
  const int blocks = 3 * kCluster, rounds = 7;
  std::vector<uint32_t> sums(blocks * kRingThreads), expected(sums.size());
  for (size_t i = 0; i < sums.size(); ++i) expected[i] = static_cast<uint32_t>(i);
  for (int round = 0; round < rounds; ++round) {
    const std::vector<uint32_t> last = expected;
    for (int block = 0; block < blocks; ++block) {
      const int before = block / kCluster * kCluster + (block + kCluster - 1) % kCluster;
      for (int thread = 0; thread < kRingThreads; ++thread) {
        expected[block * kRingThreads + thread] += last[before * kRingThreads + (thread ^ 33)] + thread % 4;
      }
    }
  }
  const Grid grid{blocks, kRingThreads, ring_bytes(kCluster), false, kCluster};
  for (uint64_t seed = 0; seed < 20; ++seed) {
    set_schedule_seed(seed);
    expect_success("ring", ring<kCluster>, grid, Ring{Fault::kNone, rounds, sums.data()});
    expect(sums == expected, "the sums of a ring");
    // All clusters at the same time.
    sums.assign(sums.size(), 0);
    expect_success("rings", ring<kCluster>, {blocks, kRingThreads, ring_bytes(kCluster), true, kCluster},
                   Ring{Fault::kNone, rounds, sums.data()});
    expect(sums == expected, "the sums of rings");
    // These faults are detected when a word is pushed, when it is read, or at expect(), whichever comes first.
    const auto fails = [&](Fault fault, std::vector<const char*> messages = {"push to byte", "the word at", "expect"}) {
      const std::string error = error_of(ring<kCluster>, grid, Ring{fault, rounds, sums.data()});
      bool detected = false;
      for (const char* message : messages) detected = detected || error.find(message) != std::string::npos;
      expect(detected, "fault " + std::to_string(static_cast<int>(fault)) + " to be found, got '" + error + "'");
    };
    fails(Fault::kNoClusterBarrierAtStart, {"may not be ready"});
    fails(Fault::kNotInitialized, {"not initialized"});
    fails(Fault::kNothingExpected, {"deadlock"});
    fails(Fault::kTooLittleExpected);
    fails(Fault::kTooMuchExpected, {"deadlock"});
    fails(Fault::kExpectedTwice, {"twice in one phase"});
    fails(Fault::kOtherParity);
    fails(Fault::kNotWaited);
    fails(Fault::kOneSlot);
    fails(Fault::kNoBlockBarrier, {"in use"});
    fails(Fault::kWrittenOnTheWay);
    fails(Fault::kBeyondTheBlock, {"not words of it"});
    fails(Fault::kNotAligned, {"not words of it"});
    fails(Fault::kOntoABarrier, {"barrier"});
    fails(Fault::kNoSuchBlock, {"no such block"});
    fails(Fault::kEndsEarly, {"ended"});
    fails(Fault::kEndsAtBarrier, {"sync_cluster"});
  }
  expect_error("refused", ring<kCluster>, {blocks + 1, kRingThreads, ring_bytes(kCluster), false, kCluster}, Ring{});
  expect_error("refused", ring<kCluster>, {36, kRingThreads, ring_bytes(kCluster), false, 9}, Ring{});
  const Device device = current_device();
  set_current_device({132, 166912, 80});
  expect_error("refused", ring<kCluster>, grid, Ring{});
  set_current_device(device);
}

// ---- Mbarriers and words, one event after another -------------------------------------------------------------------

void test_inbox() {
  using emulation::Inbox;
  using emulation::VectorClock;
  Inbox inbox;
  inbox.begin(64, 2);
  const auto push = [&](int offset, uint32_t known) {
    const std::string error = inbox.announce(offset);
    return error.empty() ? inbox.deliver({0, 0, 1, 0, offset, 7, 8, VectorClock{0, known}}) : error;
  };
  const auto complete = [&](int thread, int parity, VectorClock& known) {
    bool done = false;
    expect(inbox.complete(8, thread, parity, known, done).empty(), "that a barrier can be asked");
    return done;
  };
  VectorClock first{}, second{};
  expect(
      !inbox.init(4, 3).empty() && !inbox.init(64, 3).empty() && inbox.init(8, 3).empty() && !inbox.init(8, 3).empty(),
      "where barriers can be");
  expect(!inbox.initialized_before(8, 3) && inbox.initialized_before(8, 4), "when a barrier is ready");
  expect(!inbox.check(12, 4, 0, false).empty(), "that nobody touches a barrier");
  expect(push(16, 5).empty() && inbox.left_over() != "", "that bytes may come before they are expected");
  expect(!complete(0, 0, first) && complete(0, 1, first) && first == VectorClock{}, "that the first phase is not over");
  expect(inbox.expect(8, 8).empty() && !inbox.expect(8, 8).empty(), "that a phase expects once");
  expect(!complete(0, 0, first) && push(20, 4).empty(), "that a phase waits for all bytes");
  expect(complete(0, 0, first) && !complete(0, 1, first) && first == VectorClock{0, 5}, "that who waits learns");
  expect(inbox.check(16, 8, 0, false).empty() && !inbox.check(16, 8, 1, false).empty(), "that each thread waits");
  inbox.share(0, 2);
  expect(inbox.check(16, 8, 1, false).empty() && second == VectorClock{}, "or meets who has waited");
  expect(inbox.announce(16).empty() && !inbox.announce(16).empty(), "that words do not meet on their way");
  expect(!inbox.check(16, 2, 0, false).empty() && inbox.check(20, 4, 0, true).empty(), "nor anybody else");
  expect(inbox.expect(8, 4).empty() && push(24, 1).empty() && complete(0, 1, first), "the second phase");
  expect(push(28, 1).empty() && push(32, 1).empty() && !inbox.expect(8, 4).empty(), "that more comes than expected");
}

// ---- The kernels' exchange ------------------------------------------------------------------------------------------

using RowsShape = Shape<Exchange::kThroughCluster, 1, 2, 1>;

struct Exchanged {
  Sequence sequence;
  uint32_t* rows;  // [T, B, 2H], of which the upper half is read
  int late_block;  // waits at step late_step for delay nanoseconds
  int64_t late_step;
  uint64_t delay;
  int* missing_words;  // counts the words that were not ready when their reader timed out
};

// Every block of the cluster reads all rows. Each value encodes its time, row and unit.
FUSED_RNN_KERNEL(64) exchange_rows(Exchanged p) {
  const Sequence& q = p.sequence;
  const Block<RowsShape> block(q);
  const Layout layout(RowsShape::instance(), {1, q.H, 4}, q.division.tiles);
  ThroughCluster<Tf32, RowsShape> exchange({reinterpret_cast<float*>(p.rows), q.B, 2 * q.H, q.H, q.H}, block, layout,
                                           block.time(0, false));
  const auto value = [&](int64_t t, int64_t b, int unit) {  // TF32 has eleven digits
    return static_cast<float>(((t * q.B + b) * q.H + unit) % 2039);
  };
  const auto publish = [&](int64_t t) {
    for (int j = 0; j < q.division.tiles; ++j) {
      const Tile tile = block.tile(j);
      const auto target = exchange.target(t, tile, block.row(0), block.unit());
      for (int i = 0; i < RowsShape::kRowsPerThread; ++i) {
        const bool exists = block.row(i) < tile.rows && block.unit() < q.H;
        target.publish(i * RowsShape::kRowStep, 0, 1, exists);
        target.publish(i * RowsShape::kRowStep, q.H, value(t, tile.first + block.row(i), block.unit()), exists);
      }
    }
  };
  publish(block.time(0, false));
  sync_block();
  for (int64_t step = 0; step < q.T; ++step) {
    const int64_t t = block.time(step, false);
    for (int j = 0; j < q.division.tiles; ++j) {
      const Tile tile = block.tile(j);
      const int row = thread_index() % 32 / 4;
      const auto source = exchange.source(t, tile, row, 0);
      for (int column = thread_index() % 4 * 4; column < q.H; column += 16) {
        const Words words = source.load(0, column);
        for (int i = 0; i < 4; ++i) {
          const uint32_t expected = row < tile.rows ? tf32_bits(value(t, tile.first + row, column + i)) : 0;
          if (words.w[i] == kNotReady) ++*p.missing_words;
          expect(words.w[i] == expected || words.w[i] == kNotReady, "a word of a row");
        }
      }
    }
    sync_block();
    if (block_index() == p.late_block && step == p.late_step) {
      const uint64_t start = nanoseconds();
      while (nanoseconds() - start < p.delay) relax();
    }
    if (step + 1 < q.T) publish(block.time(step + 1, false));
  }
  exchange.finish();
}

void test_exchange_of_rows() {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    set_schedule_seed(seed);
    for (const int directions : {1, 2}) {
      for (const int tiles : {1, 3}) {  // the last tiles have one row, or none
        for (const bool late : {false, true}) {
          Sequence q{};
          q.T = 5, q.B = 17, q.last_row = 17, q.H = 36, q.directions = directions;
          q.division = {3, 2, tiles};
          q.error = error_word(), q.patience = 50000;  // a round of the emulator takes 1000
          const int blocks = 6 * directions;
          if (tiles == 1) q.last_row = 9;
          std::vector<uint32_t> rows(q.T * q.B * 2 * q.H);
          int missing_words = 0;
          const Exchanged p{q, rows.data(), late ? 1 : -1, 2, 1000000, &missing_words};
          *error_word() = 0;
          const Layout layout(RowsShape::instance(), {1, q.H, 4}, tiles);
          expect_success("rows", exchange_rows, {blocks, 64, layout.total, false, 3}, p);
          expect((*error_word() != 0) == late && (missing_words != 0) == late, "that only a late block is given up");
        }
      }
    }
  }
  *error_word() = 0;
}

// ---- The kernels' sums ----------------------------------------------------------------------------------------------

using SumsShape = Shape<Exchange::kSplitColumns, 1, 8, 2>;

struct Reduced {
  Sequence sequence;
  int late_block, late_product;  // waits before this product for delay nanoseconds
  uint64_t delay;
  int* missing_sums;  // counts the sums whose reader timed out
};

// A warp's sums depend on its block and number, on the product, and on the block, row and unit that they are for.
FUSED_RNN_KERNEL(256) reduce(Reduced p) {
  const Block<SumsShape> block(p.sequence);
  const Layout layout(SumsShape::instance(), {kSplitBlocks, 64, 4}, 1);
  ClusterSums<SumsShape> reduction(block, layout);
  const int rank = block.rank(), warp = thread_index() / 32;
  for (int product = 0; product < 5; ++product) {
    if (block_index() == p.late_block && product == p.late_product) {
      const uint64_t start = nanoseconds();
      while (nanoseconds() - start < p.delay) relax();
    }
    for (int i = thread_index() % 32; i < kSplitBlocks * SumsShape::kRows * SumsShape::kUnits; i += 32) {
      const int to = i / (SumsShape::kRows * SumsShape::kUnits), unit = i % SumsShape::kUnits,
                row = i / SumsShape::kUnits % SumsShape::kRows;
      shared_memory<float>(layout.sums)[PartialSums{kSplitBlocks, SumsShape::kRows}.at(warp, row, unit, to)] =
          static_cast<float>(((product * 8 + to) * 16 + row) * 16 + unit + 1000 * (warp - rank));
    }
    sync_block();
    reduction.exchange();
    for (int i = 0; i < SumsShape::kRowsPerThread; ++i) {
      const float sum = reduction.sum(block.row(i), block.local_unit());
      if (sum != sum) ++*p.missing_sums;
      const int expected = 64 * (((product * 8 + rank) * 16 + block.row(i)) * 16 + block.local_unit());
      expect(sum != sum || sum == static_cast<float>(expected), "the sum of a row and unit");
    }
    sync_block();
  }
  reduction.finish();
}

void test_sums() {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    set_schedule_seed(seed);
    for (const bool late : {false, true}) {
      Sequence q{};
      q.division = {2 * kSplitBlocks, 1, 1};
      q.error = error_word(), q.patience = 50000;  // a round of the emulator takes 1000
      int missing_sums = 0;
      *error_word() = 0;
      const Layout layout(SumsShape::instance(), {kSplitBlocks, 64, 4}, 1);
      expect_success("sums", reduce, {2 * kSplitBlocks, 256, layout.total, true, kSplitBlocks},
                     Reduced{q, late ? 9 : -1, 2, 1000000, &missing_sums});
      expect((*error_word() != 0) == late && (missing_sums != 0) == late, "that only a late block is given up");
    }
  }
  *error_word() = 0;
}

}  // namespace

void test_clusters() {
  test_inbox();
  test_ring<2>();
  test_ring<5>();
  test_exchange_of_rows();
  test_sums();
}

}  // namespace self_test
