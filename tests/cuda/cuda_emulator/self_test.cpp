// Checks the emulator itself: it must run correct kernels correctly and report each kind of error.
//
// The tests of the kernels rely on the emulator's checks, so every check has a tiny kernel here that must fail it.
// Prints the failures and exits with 1 if there are any.
#include "self_test.h"

#include <cstdio>
#include <string>
#include <vector>

namespace {

using namespace self_test;

// ---- Barriers and shared memory -------------------------------------------------------------------------------------

enum class Sync { kNone, kWarp, kBlock };

struct Rotation {
  int32_t* sums;
  int threads, distance, rounds;
  Sync before_read, before_write;
};

void synchronize(Sync sync) {
  if (sync == Sync::kWarp) sync_warp();
  if (sync == Sync::kBlock) sync_block();
}

// In every round each thread adds the value that another thread has written.
FUSED_RNN_KERNEL(1024) rotate(Rotation p) {
  const Shared<uint32_t> values = shared_memory<uint32_t>(16);
  const int thread = thread_index();
  const int other = thread ^ p.distance;
  int32_t sum = 0;
  for (int round = 0; round < p.rounds; ++round) {
    values[thread] = static_cast<uint32_t>(1000 * round + thread);
    synchronize(p.before_read);
    sum += static_cast<int32_t>(values[other]);
    synchronize(p.before_write);
  }
  p.sums[block_index() * p.threads + thread] = sum;
}

void test_barriers() {
  for (const int threads : {32, 256, 1024}) {
    for (const bool cooperative : {false, true}) {
      std::vector<int32_t> sums(7 * threads);
      Rotation p{sums.data(), threads, threads / 2, 9, Sync::kBlock, Sync::kBlock};
      const Grid grid{7, threads, 16 + 4 * threads, cooperative};
      expect_success("rotate", rotate, grid, p);
      for (int i = 0; i < 7 * threads; ++i) {
        expect(sums[i] == 36000 + 9 * (i % threads ^ threads / 2), "sum " + std::to_string(i));
      }
    }
  }
  std::vector<int32_t> sums(128);
  const Grid grid{2, 64, 16 + 4 * 64, false};
  const Sync none = Sync::kNone, warp = Sync::kWarp, block = Sync::kBlock;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    set_schedule_seed(seed);
    // Threads 3 and 35 need a barrier of the block, threads 3 and 7 only one of the warp.
    expect_error("races", rotate, grid, Rotation{sums.data(), 64, 32, 2, none, block});
    expect_error("races", rotate, grid, Rotation{sums.data(), 64, 32, 2, block, none});
    expect_error("races", rotate, grid, Rotation{sums.data(), 64, 32, 2, warp, block});
    expect_error("races", rotate, grid, Rotation{sums.data(), 64, 32, 2, block, warp});
    expect_error("races", rotate, grid, Rotation{sums.data(), 64, 4, 2, none, warp});
    expect_error("races", rotate, grid, Rotation{sums.data(), 64, 4, 2, warp, none});
    expect_success("warp barriers", rotate, grid, Rotation{sums.data(), 64, 4, 5, warp, warp});
    expect_success("own word", rotate, grid, Rotation{sums.data(), 64, 0, 5, none, none});
  }
}

struct Offset {
  int offset;
};

// Two warps write the two halves of each word.
FUSED_RNN_KERNEL(64) write_halves(Offset p) {
  const Shared<uint16_t> halves = shared_memory<uint16_t>(p.offset);
  const int thread = thread_index();
  halves[2 * (thread % 32) + thread / 32] = static_cast<uint16_t>(thread);
}

FUSED_RNN_KERNEL(64) several_read(Offset p) {
  const Shared<float> value = shared_memory<float>(p.offset);
  const float read = value[0];
  if (thread_index() == 5 && read != read) value[0] = 1;
}

struct Pair {
  float a, b;
};

FUSED_RNN_KERNEL(32) use_types(Offset p) {
  const int thread = thread_index();
  shared_memory<double>(0)[thread] = 0.5 * thread;
  shared_memory<double>(0)[thread] += 1;
  shared_memory<Pair>(256)[thread] = Pair{1.f, 2.f};
  shared_memory<Words>(512)[thread] = Words{{1, 2, 3, 4}};
  const Words words = shared_memory<Words>(512)[thread];
  const Pair pair = shared_memory<Pair>(256)[thread];
  shared_memory<double>(0)[thread] = shared_memory<double>(0)[thread] + pair.b + words.w[3] + p.offset;
  const double sum = shared_memory<double>(0)[thread];
  if (sum != 0.5 * thread + 7) sync_block();  // a wrong sum ends in a deadlock, which the test sees as an error
}

void test_shared_memory() {
  expect_success("halves", write_halves, {1, 64, 128, false}, Offset{0});
  expect_error("beyond its 128 bytes", write_halves, {1, 64, 128, false}, Offset{2});
  expect_error("beyond its 128 bytes", write_halves, {1, 64, 128, false}, Offset{-2});
  expect_error("not aligned", write_halves, {1, 64, 256, false}, Offset{1});
  expect_error("not aligned", several_read, {1, 64, 256, false}, Offset{2});
  expect_error("races", several_read, {1, 64, 4, false}, Offset{0});  // also: memory starts as NaN
  expect_success("types", use_types, {1, 32, 1024, false}, Offset{0});
}

enum class Mistake { kEndsEarly, kOtherMeeting, kLaneMissing, kWaitsForever, kMisaligned, kThrows };

struct Mistaken {
  Mistake mistake;
  uint32_t* words;
};

FUSED_RNN_KERNEL(64) make_mistake(Mistaken p) {
  const int thread = thread_index();
  switch (p.mistake) {
    case Mistake::kEndsEarly:
      if (thread != 40) sync_block();
      break;
    case Mistake::kOtherMeeting:
      if (thread == 3) {
        sync_warp();
      } else {
        shuffle_xor(1.f, 1);
      }
      break;
    case Mistake::kLaneMissing:
      if (thread != 3) sync_warp();
      break;
    case Mistake::kWaitsForever:
      if (thread == 3) {
        while (load_exchanged(p.words).w[0] == 0) relax();
      }
      sync_block();
      break;
    case Mistake::kMisaligned:
      load_exchanged(p.words + 1);
      break;
    case Mistake::kThrows:
      if (thread == 3) throw 3;
      sync_block();
      break;
  }
}

void test_mistakes() {
  alignas(16) uint32_t words[8] = {};
  const Grid grid{2, 64, 0, true};
  for (uint64_t seed = 0; seed < 8; ++seed) {
    set_schedule_seed(seed);
    expect_error("sync_block", make_mistake, grid, Mistaken{Mistake::kEndsEarly, words});
    expect_error("of its warp waits at", make_mistake, grid, Mistaken{Mistake::kOtherMeeting, words});
    expect_error("sync_warp", make_mistake, grid, Mistaken{Mistake::kLaneMissing, words});
    expect_error("thread 3 polling", make_mistake, grid, Mistaken{Mistake::kWaitsForever, words});
    expect_error("not aligned", make_mistake, grid, Mistaken{Mistake::kMisaligned, words});
    expect_error("no std::exception", make_mistake, grid, Mistaken{Mistake::kThrows, words});
    std::vector<int32_t> sums(128);
    expect_success("after a mistake", rotate, {2, 64, 16 + 4 * 64, true},
                   Rotation{sums.data(), 64, 32, 3, Sync::kBlock, Sync::kBlock});
  }
  const Mistaken none{Mistake::kOtherMeeting, words};
  expect_error("refused", make_mistake, {1, 33, 0, false}, none);
  expect_error("refused", make_mistake, {1, 32, 1 << 20, false}, none);
  const Device device = current_device();
  expect(device.sms == 132 && device.shared_bytes == 232448 && device.capability == 90, "the initial device");
  set_current_device({1, 49152, 80});
  expect(current_device().capability == 80, "another device");
  expect_error("refused", make_mistake, {2, 32, 0, true}, none);
  set_current_device(device);
}

// ---- Between blocks -------------------------------------------------------------------------------------------------

struct Exchange {
  uint32_t* words;  // [round][block][4]: 0 until written
  int rounds;
  bool relaxes;
  int* mixed;  // counts loads that saw some of their four words, but not all
};

// Blocks wait for each other's four words, round by round.
FUSED_RNN_KERNEL(32) exchange(Exchange p) {
  const int blocks = block_count(), thread = thread_index();
  uint32_t value = static_cast<uint32_t>(block_index()) + 1;
  for (int round = 0; round < p.rounds; ++round) {
    uint32_t* const words = p.words + round * blocks * 4;
    if (thread < 4) store_exchanged(words + block_index() * 4 + thread, value);
    uint32_t sum = 0;
    for (int block = 0; block < blocks; ++block) {
      for (;;) {
        const Words got = load_exchanged(words + block * 4);
        int present = 0;
        for (const uint32_t word : got.w) present += word != 0;
        if (present == 4) {
          sum += got.w[thread % 4];
          break;
        }
        if (present != 0) ++*p.mixed;
        if (p.relaxes) relax();
      }
    }
    value = sum % 1000 + 1;
  }
}

struct Local {
  uint32_t* words;
  int* wrong;
};

// A thread sees its own stores immediately; its warp and its block see them after a barrier.
FUSED_RNN_KERNEL(64) exchange_locally(Local p) {
  const int thread = thread_index();
  for (uint32_t round = 1; round < 20; ++round) {
    store_exchanged(p.words + thread, round);
    if (load_exchanged(p.words + thread / 4 * 4).w[thread % 4] != round) ++*p.wrong;
    sync_warp();
    for (const uint32_t word : load_exchanged(p.words + (thread ^ 4) / 4 * 4).w) *p.wrong += word != round;
    sync_block();
    for (const uint32_t word : load_exchanged(p.words + (thread ^ 32) / 4 * 4).w) *p.wrong += word != round;
    sync_block();
  }
}

// Counts in `wrong` the words that have not arrived in memory one turn later.
FUSED_RNN_KERNEL(32) store_last(Local p) {
  const int thread = thread_index();
  if (thread >= 4) return;
  store_exchanged(p.words + thread, 1);
  relax();
  *p.wrong += p.words[thread] == 0;
}

struct alignas(16) Line {
  uint32_t words[4];
};

void test_exchange() {
  int mixed = 0;
  std::vector<uint32_t> first;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    for (const bool relaxes : {true, false}) {
      std::vector<Line> lines(20 * 5);
      set_schedule_seed(seed);
      const Exchange p{lines[0].words, 20, relaxes, &mixed};
      expect_success("exchange", exchange, {5, 32, 0, true}, p);
      uint32_t sum = 15;
      for (int round = 1; round < 20; ++round) {
        const uint32_t value = sum % 1000 + 1;
        for (int block = 0; block < 5; ++block) {
          for (const uint32_t word : lines[round * 5 + block].words) expect(word == value, "an exchanged word");
        }
        sum = 5 * value;
      }
    }
  }
  expect(mixed > 100, "that words of one load arrive apart");
  const int before = mixed;
  int again[2] = {};
  for (int& count : again) {
    std::vector<Line> lines(20 * 5);
    set_schedule_seed(3);
    expect_success("exchange", exchange, {5, 32, 0, true}, Exchange{lines[0].words, 20, true, &count});
  }
  expect(again[0] == again[1] && again[0] < before, "that a seed repeats a run");
  std::vector<Line> lines(16);
  int wrong = 0, delayed = 0;
  expect_success("local exchange", exchange_locally, {1, 64, 0, true}, Local{lines[0].words, &wrong});
  expect(wrong == 0, "that a block sees its own words");
  // The last words of a launch arrive although no thread waits for them.
  for (uint64_t seed = 0; seed < 20; ++seed) {
    set_schedule_seed(seed);
    std::vector<Line> last(1);
    int late = 0;
    expect_success("last words", store_last, {1, 32, 0, false}, Local{last[0].words, &late});
    delayed += late;
    for (const uint32_t word : last[0].words) expect(word == 1, "that the last words arrive");
  }
  expect(delayed > 0, "that words arrive late");
  // Blocks that wait for each other without a cooperative launch can hang on a GPU.
  std::vector<Line> others(5);
  expect_error("deadlock", exchange, {5, 32, 0, false}, Exchange{others[0].words, 1, true, &mixed});
}

struct Watchdog {
  uint32_t* words;
  int32_t* error;
  uint64_t limit;
};

FUSED_RNN_KERNEL(64) watch(Watchdog p) {
  const uint64_t start = nanoseconds();
  while (load_exchanged(p.words).w[0] == 0) {
    if (nanoseconds() - start > p.limit) {
      store_to_host(p.error, 1 + block_index());
      return;
    }
    relax();
  }
}

void test_watchdog() {
  Line line{};
  for (const uint64_t step : {1000u, 2000000000u}) {
    set_nanoseconds_per_round(step);
    *error_word() = 0;
    expect_success("watchdog", watch, {3, 64, 0, true}, Watchdog{line.words, error_word(), 2000000000u});
    expect(*error_word() != 0, "that the watchdog ends the kernel");
  }
  set_nanoseconds_per_round(1000);
  expect_error("deadlock", watch, {3, 64, 0, true}, Watchdog{line.words, error_word(), UINT64_MAX});
}

struct Shuffle {
  float* values;
};

FUSED_RNN_KERNEL(64) shuffle(Shuffle p) {
  const int thread = thread_index();
  float sum = static_cast<float>(thread);
  p.values[thread] = shuffle_xor(sum, 5);
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  p.values[64 + thread] = sum;
}

void test_shuffle() {
  std::vector<float> values(128);
  expect_success("shuffle", shuffle, {1, 64, 0, false}, Shuffle{values.data()});
  for (int i = 0; i < 64; ++i) {
    expect(values[i] == static_cast<float>(i ^ 5), "shuffle_xor");
    expect(values[64 + i] == (i < 32 ? 496.f : 1520.f), "sum by shuffles");
  }
}

}  // namespace

int main() {
  test_barriers();
  test_shared_memory();
  test_mistakes();
  test_exchange();
  test_watchdog();
  test_shuffle();
  self_test::test_races();
  self_test::test_words_on_their_way();
  self_test::test_resets();
  self_test::test_ring();
  self_test::test_products();
  self_test::test_conversions();
  self_test::test_clusters();
  std::printf(failures == 0 ? "the emulator is right\n" : "%d failures\n", failures);
  return failures != 0;
}
