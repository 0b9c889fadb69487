// Checks the race detector and the words in flight, one access after another. Kernels alone would not show which of two
// checks has detected a race, nor in which order words have arrived.
#include <vector>

#include "exchange.h"
#include "self_test.h"
#include "shared_check.h"

namespace self_test {
namespace {

using emulation::Access;
using emulation::SharedMemory;

struct Step {
  Access access;
  int thread;
  uint32_t warp_time, block_time;
};

// Whether the last of some accesses to the same word is a race; the earlier ones must not be.
bool last_races(const std::vector<Step>& steps) {
  SharedMemory memory;
  memory.begin(64);
  bool races = false;
  for (const Step& step : steps) {
    expect(!races, "no race before the last step");
    races = !memory.check(8, 4, step.access, {step.thread, step.warp_time, step.block_time}).empty();
  }
  return races;
}

}  // namespace

void test_races() {
  const Access read = Access::kRead, write = Access::kWrite;
  // Threads 1 and 2 are in one warp, 33 (the same lane as 1) and 70 in two others. Time 1 means that there was no
  // barrier.
  for (const int other : {2, 33}) {
    expect(last_races({{write, 1, 1, 1}, {read, other, 1, 1}}), "read after write");
    expect(last_races({{read, 1, 1, 1}, {write, other, 1, 1}}), "write after read");
    expect(last_races({{write, 1, 1, 1}, {write, other, 1, 1}}), "write after write");
    expect(!last_races({{read, 1, 1, 1}, {read, other, 1, 1}}), "read after read");
    // The same with a barrier of the block.
    expect(!last_races({{write, 1, 1, 1}, {read, other, 2, 2}}), "read after write, barrier");
    expect(!last_races({{read, 1, 1, 1}, {write, other, 2, 2}}), "write after read, barrier");
    expect(!last_races({{write, 1, 1, 1}, {write, other, 2, 2}}), "write after write, barrier");
    // The same with a barrier of the first thread's warp.
    const bool races = other == 33;
    const uint32_t time = races ? 1 : 2;
    expect(last_races({{write, 1, 1, 1}, {read, other, time, 1}}) == races, "read after write, warp");
    expect(last_races({{read, 1, 1, 1}, {write, other, time, 1}}) == races, "write after read, warp");
    expect(last_races({{write, 1, 1, 1}, {write, other, time, 1}}) == races, "write after write, warp");
    // A barrier of a warp that comes later does not order what another warp did before it.
    expect(last_races({{write, 1, 1, 1}, {read, other, 5, 1}}) == races, "read after write, later");
    expect(last_races({{read, 1, 1, 1}, {write, other, 5, 1}}) == races, "write after read, later");
  }
  for (const Access first : {read, write}) {
    for (const Access second : {read, write}) {
      expect(!last_races({{first, 1, 1, 1}, {second, 1, 1, 1}}), "a thread with itself");
    }
  }
  expect(last_races({{read, 1, 1, 1}, {read, 33, 1, 1}, {write, 1, 1, 1}}), "the earlier of two readers writes");
  expect(last_races({{read, 1, 1, 1}, {read, 33, 1, 1}, {write, 33, 1, 1}}), "the later of two readers writes");
  expect(last_races({{read, 1, 1, 1}, {read, 33, 1, 1}, {write, 70, 1, 1}}), "who has not read writes");
  expect(last_races({{read, 1, 1, 1}, {read, 2, 1, 1}, {write, 2, 1, 1}}), "one of two lanes writes");
  expect(!last_races({{read, 1, 1, 1}, {read, 2, 1, 1}, {write, 2, 3, 1}}), "one of two lanes, barrier");
  expect(!last_races({{read, 1, 1, 1}, {read, 33, 1, 1}, {read, 1, 2, 2}, {write, 1, 2, 2}}), "alone after a barrier");
  expect(!last_races({{read, 33, 1, 1}, {read, 1, 2, 2}, {write, 1, 2, 2}}), "another reader before the barrier");
  expect(last_races({{read, 1, 1, 1}, {read, 2, 2, 1}, {write, 33, 1, 1}}),
         "readers before and after a warp's barrier");
  expect(last_races({{read, 1, 1, 1}, {write, 1, 1, 1}, {read, 2, 1, 1}}), "read, written, read by another");
}

void test_words_on_their_way() {
  emulation::Exchange exchange;
  Words memory[2] = {};
  const emulation::Exchange::Author author{3, 7, 1};
  const emulation::Exchange::Reader other{4, 7, 1, 1}, self{3, 7, 1, 1};
  const auto seen = [&](int i) { return exchange.load(&memory[1], other).w[i]; };
  exchange.store(&memory[1].w[2], 10, author, 5);
  exchange.store(&memory[1].w[1], 20, author, 4);
  expect(!exchange.deliver(3) && seen(1) == 0 && seen(2) == 0, "nothing arrives early");
  const Words own = exchange.load(&memory[1], self);
  expect(own.w[0] == 0 && own.w[1] == 20 && own.w[2] == 10 && own.w[3] == 0, "who may sees words on their way");
  expect(exchange.deliver(4) && seen(1) == 20 && seen(2) == 0, "a later word overtakes an earlier one");
  exchange.store(&memory[1].w[2], 11, author, 9);
  expect(seen(2) == 10, "the earlier word of an address arrives before the later");
  expect(!exchange.deliver(5) && seen(2) == 10, "the later word keeps its own time");
  expect(!exchange.empty() && exchange.deliver(9) && seen(2) == 11 && exchange.empty(), "and then arrives");
  exchange.store(&memory[0].w[3], 12, author, 1000);
  exchange.deliver_all();
  expect(memory[0].w[3] == 12 && exchange.empty(), "all arrive in the end");
}

void test_resets() {
  emulation::Exchange exchange;
  Words memory = {{1, 2, 3, 4}};
  const emulation::Exchange::Author author{0, 7, 1};
  const auto seen = [&](int block, int thread, uint32_t time = 1, uint32_t interval = 1) {
    return exchange.load(&memory, {block, thread, time, interval}).w[1];
  };
  exchange.store(&memory.w[1], 20, author, 5);
  exchange.reset(&memory.w[1], 9, author);
  exchange.deliver(100);
  expect(exchange.empty() && seen(1, 0) == 20, "a word in flight arrives before the reset, which is held back");
  expect(seen(0, 7) == 9 && seen(0, 8) == 20, "its author sees it");
  expect(seen(0, 8, 2) == 9 && seen(0, 40, 2) == 20 && seen(0, 40, 2, 2) == 9, "others do behind a barrier");
  exchange.fence(1, 0), exchange.fence(0, 8);
  expect(seen(1, 0) == 20, "no fence of the author");
  exchange.fence(0, 7);
  expect(seen(1, 0) == 20 && seen(1, 1) == 20, "no fence of the reader behind it");
  exchange.fence(1, 0);
  expect(seen(1, 0) == 9 && seen(1, 1) == 20 && memory.w[1] == 20, "only who has had a fence sees it");
  exchange.store(&memory.w[1], 30, author, 200);
  expect(seen(1, 1) == 9, "a later word follows the reset");
  exchange.reset(&memory.w[2], 9, author);
  exchange.deliver_all();
  expect(memory.w[1] == 30 && memory.w[2] == 9, "all arrive in the end");
}

}  // namespace self_test
