// Choice of instruction set, of threads and of the chunks of steps that backward takes, and the parallel region that
// the workers run in.
#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <linux/futex.h>
#include <omp.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <stdexcept>

#include "../cells/cell_info.h"

namespace fused_rnn {
namespace cpu {

namespace {

// A moment of a thread that spins: 10 to 50 ns.
void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // `yield` does nothing on most processors
#endif
}

}  // namespace

bool Barrier::spin(int32_t generation) const {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::microseconds kSpin(50);
  constexpr int kRelaxesPerLook = 16;  // at the clock, which costs about as much as two
  Clock::time_point end{};
  for (;;) {
    for (int i = 0; i < kRelaxesPerLook; ++i) {
      if (__atomic_load_n(&generation_, __ATOMIC_ACQUIRE) != generation) return true;
      relax();
    }
    const Clock::time_point now = Clock::now();
    if (end == Clock::time_point{}) {
      end = now + kSpin;
    } else if (now >= end) {
      return false;
    }
  }
}

void Barrier::sleep(int32_t generation) {
  // Sequentially consistent, as the accesses of wait(): one of the two sides sees the other.
  __atomic_add_fetch(&sleepers_, 1, __ATOMIC_SEQ_CST);
  while (__atomic_load_n(&generation_, __ATOMIC_SEQ_CST) == generation) {
    syscall(SYS_futex, &generation_, FUTEX_WAIT_PRIVATE, generation, nullptr, nullptr, 0);
  }
  __atomic_sub_fetch(&sleepers_, 1, __ATOMIC_SEQ_CST);
}

void Barrier::wait(int64_t count) {
  constexpr unsigned kPatience = 3, kProbe = 16;
  thread_local unsigned late = 0;  // this thread's waits since the last spin that ended in time
  const int32_t generation = __atomic_load_n(&generation_, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == count) {
    __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&generation_, generation + 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&sleepers_, __ATOMIC_SEQ_CST) > 0) {
      syscall(SYS_futex, &generation_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    }
  } else if ((late < kPatience || late % kProbe == 0) && spin(generation)) {
    late = 0;
  } else {
    ++late;
    sleep(generation);
  }
}

namespace {

#if defined(__x86_64__)
// Whether the processor has AMX for bfloat16 and for bytes, and the system saves the tiles: XCR0.
bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAmxBf16 = 1 << 22, kAmxTile = 1 << 24, kAmxInt8 = 1 << 25, kTileState = 3 << 17;
  constexpr unsigned kAll = kAmxBf16 | kAmxTile | kAmxInt8;
  if ((d & kAll) != kAll) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kTileState) == kTileState;
}
#endif

}  // namespace

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
  const Kernels* plain = &kPortable;  // the best without a unit
#if defined(__x86_64__)
  __builtin_cpu_init();  // these ask the operating system's XCR0 too
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  static const Kernels amx = kAvx512.with(kAmxTiles), avx512_bf16 = kAvx512.with(kAvx512Bf16);
  const bool has_bf16 = avx512 && __builtin_cpu_supports("avx512bf16"), has_tiles = avx512 && has_amx();
  if (has_tiles) found.push_back(&amx);
  if (has_bf16) found.push_back(&avx512_bf16);
  if (avx512) found.push_back(&kAvx512);
  if (avx2) found.push_back(&kAvx2);
  if (!found.empty()) plain = avx512 ? &kAvx512 : &kAvx2;
#endif
  static const Kernels emulated = plain->with(kEmulatedTiles);
  found.push_back(&kPortable);
  found.push_back(&emulated);  // for tests: never the first choice
  return found;
}

namespace {

const Kernels& choose() {
  const std::vector<const Kernels*> found = supported();
  const char* const variable = std::getenv("FUSED_RNN_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  if (wanted.empty()) return *found.front();
  std::string names;
  for (const Kernels* k : found) {
    if (wanted == k->name) return *k;
    names += (names.empty() ? "" : ", ") + std::string(k->name);
  }
  throw std::runtime_error("FUSED_RNN_CPU_ISA=" + wanted +
                           " is not supported on this machine; choose one of: " + names);
}

// OpenMP's threads do not survive a fork, and waiting for them would hang: in a child process the kernels use one.
// (torch's BLAS waits for them nevertheless unless torch.set_num_threads(1) is called, as data-loader workers do.)
bool forked = false;
const int fork_watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Runs work(thread, how many there are) on all threads, also where only some have a part: GCC's OpenMP ends threads
// that a smaller region leaves out, and the next larger one, torch's or ours, has to start them again, at 40 us each.
template <class Work>
void in_parallel(int64_t threads, const Work& work) {
#pragma omp parallel num_threads(static_cast<int>(threads))
  work(omp_get_thread_num(), omp_get_num_threads());
}

// Runs work(direction, worker) for every direction and worker of the plan.
template <class Work>
void run(const Kernels& k, const LayerShape& shape, bool backward, int64_t threads, const Work& work) {
  if (omp_in_parallel() || forked) threads = 1;
  Barrier barriers[2];  // of each team
  const auto take_part = [&](int64_t thread, const Plan& plan) {
    const int64_t team = thread / plan.workers;
    if (team >= plan.teams) return;
    Barrier* const barrier = plan.workers > 1 ? &barriers[team] : nullptr;
    const Worker worker{thread % plan.workers, plan.workers, plan.splits_units, barrier};
    for (int64_t d = team; d < shape.directions; d += plan.teams) work(d, worker);
  };
  const Plan wish = plan(k, shape, backward, threads);
  const int64_t count = wish.teams * wish.workers;
  if (count == 1) return take_part(0, wish);
  in_parallel(threads, [&](int64_t thread, int64_t given) {
    // OpenMP may give fewer threads than asked for; the plan is then made for those, as nobody does the others' part.
    take_part(thread, given >= count ? wish : plan(k, shape, backward, given));
  });
}

// Bytes of a core's second-level cache.
int64_t second_level_cache() {
  static const int64_t bytes = [] {
    long found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return found > 0 ? found : 1 << 20;  // some systems do not say
  }();
  return bytes;
}

// How many of n items the busiest of some workers takes.
int64_t most_of(int64_t n, int64_t workers) { return (n + workers - 1) / workers; }

// The same of units in blocks, of which the last may be narrow. It is the last worker's, who has as many as any other.
int64_t most_units(int64_t units, int64_t block, int64_t workers) {
  const int64_t blocks = most_of(units, block), most = most_of(blocks, workers);
  const bool only_the_last = blocks - workers * (most - 1) == 1;
  return only_the_last ? std::max((most - 1) * block, units - (blocks - most) * block) : most * block;
}

// Whether so many columns of a direction's weights outgrow a core's cache, by a factor.
bool outgrow_cache(const LayerShape& shape, int64_t columns, double factor) {
  const double rows = double(cell_info(shape.cell).gates) * double(shape.H);
  return rows * double(columns) * (shape.dtype == Dtype::kFloat32 ? 4 : 8) > factor * double(second_level_cache());
}

// Columns of the weights that every step reads. W_ih x of few rows comes beforehand; how few depends on the instruction
// set (forward_workspace.h), and 8 is about right for all.
int64_t columns_of_a_step(const LayerShape& s) { return s.P + (s.T > 1 && s.B < 8 ? 0 : s.I); }

// Whether the weights that a direction reads at every step outgrow a core's cache by far, so that each worker should
// read a share of them for all rows. The rows must be few beside the weights, and the shares of the units even.
bool shares_weights(const LayerShape& shape, int64_t gates, int64_t block, int64_t workers) {
  return !shape.whole_rows() && outgrow_cache(shape, columns_of_a_step(shape), 1.25) && 4 * shape.B < gates * shape.H &&
         most_units(shape.H, block, workers) * workers * 15 <= shape.H * 16;
}

// Of a plain sequence, which alone can be cut anywhere: in one direction, with every row there until the end.
int64_t chunks(const LayerShape& s) {
  // A chunk has at least so many rows and gates' gradients: as deep as a product should be, and worth a parallel
  // region.
  constexpr int64_t kRows = 512, kElements = 1 << 17;
  if (s.directions > 1 || s.batch_sizes || s.N == 0 || s.H == 0) return 1;
  const int64_t width = s.H * cell_info(s.cell).grads;
  return std::clamp<int64_t>(s.N / std::max(kRows, kElements / width), 1, s.T);
}

// Steps [begin, end) as a sequence of its own.
BackwardParams chunk(const BackwardParams& params, int64_t begin, int64_t end) {
  BackwardParams part = params;
  LayerShape& s = part.shape;
  BackwardDirection& d = part.direction[0];
  const int64_t row = begin * s.B, element = s.dtype == Dtype::kFloat32 ? 4 : 8;
  const auto skip = [&](auto*& at, int64_t elements) {  // const void* or void*
    if (at) at = const_cast<char*>(static_cast<const char*>(at)) + elements * element;
  };
  if (s.resets) s.resets += row;
  skip(part.dx, row * s.I);
  skip(d.x, row * s.I);
  skip(d.dy, row * d.dy_stride);
  skip(d.dc_sequence, row * s.H);
  for (Zone* zone : {&d.variant.zones.h, &d.variant.zones.c}) skip(zone->at, row * zone->stride);
  for (void** kept : {&d.reserve.gates, &d.reserve.h_prev, &d.reserve.c_prev, &d.reserve.hidden, &d.reserve.h_direct,
                      &d.reserve.h_hat}) {
    skip(*kept, row * d.reserve.stride);
  }
  skip(d.dreset.h, begin * d.dreset.step_h);
  skip(d.dreset.c, begin * d.dreset.step_c);
  // Its gradient of h comes from the chunk behind it, and goes to the one before.
  part.accumulate = end < s.T;
  if (part.accumulate) d.dh_n = d.dh_chunk;
  if (begin > 0) d.dh0 = d.dh_chunk;
  s.T = end - begin;
  s.N = s.T * s.B;
  return part;
}

void backward_chunk(const Kernels& k, const BackwardParams& params, int64_t threads, int64_t gradient_workers) {
  if (params.shape.N > 0 && params.shape.P > 0) {  // else there may be any number of steps, and nothing in them
    run(k, params.shape, true, threads, [&](int64_t d, const Worker& worker) { k.backward(params, d, worker); });
  }
  if (gradient_workers == 1) return k.gradients(params, Worker{0, 1, false, nullptr});
  in_parallel(threads, [&](int64_t thread, int64_t given) {
    // Fewer threads than asked for share the work alike: no worker waits for another.
    const int64_t workers = std::min(gradient_workers, given);
    if (thread < workers) k.gradients(params, Worker{thread, workers, false, nullptr});
  });
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const Kernels& kernels(int64_t place) {
  if (place < 0) return kernels();
  static const std::vector<const Kernels*> all = supported();
  if (place < static_cast<int64_t>(all.size())) return *all[place];
  throw std::runtime_error("there is no instruction set " + std::to_string(place) + " on this machine");
}

namespace {

// Units that a worker takes at least where a team splits them: a block of the kernels, and a cache line, which no two
// workers then share. Backward multiplies by one gate after the other.
int64_t least_units(const Kernels& k, const LayerShape& shape, bool backward) {
  const int64_t element = shape.dtype == Dtype::kFloat32 ? 4 : 8;
  return std::max<int64_t>(k.block(backward ? 1 : cell_info(shape.cell).gates, element), 64 / element);
}

// What each thread adds to a parallel region, in nanoseconds and in multiply-adds.
constexpr double kThread = 200, kThreadProducts = 50 * kThread;

// The plan of frozen weights. A step of theirs is so short that waits for the other threads count, so the plans are
// compared by the time that they take. It is estimated in nanoseconds, too short rather than too long where a thread
// works alone, for sharing must not make a call slower; and waits as on a machine that is slow at them.
Plan frozen_plan(const Kernels& k, const LayerShape& s, int64_t threads) {
  constexpr double kProducts = 1.4, kBytes = 1.75;  // of a nanosecond, for each byte of a vector
  constexpr double kActivation = 32;                // of a unit: as many products
  constexpr double kWait = 1000;                    // a barrier
  constexpr double kGain = 0.8;                     // sharing must take less than this part of the time alone
  const double region = 4600 + kThread * double(threads);
  const bool rounds = s.weights == WeightFormat::kInt8;
  const int64_t units = cell_info(s.cell).gates * s.H;
  const int64_t size = rounds ? 1 : s.weights == WeightFormat::kBfloat16 ? 2 : 4;
  const double row = units * ((s.P + s.I) * (rounds ? 0.5 : 1) + kActivation) / (kProducts * k.vector_bytes);
  const double weights = units * columns_of_a_step(s) * size / (kBytes * k.vector_bytes);
  const double waits = kWait * (1 + rounds) * (1 + s.projected);
  const int64_t blocks = most_of(s.H, least_units(k, s, false));
  Plan best{1, 1, false};
  double least = kGain * s.directions * s.T * (s.B * row + weights);
  const auto consider = [&](const Plan& plan, double step) {
    const double time = region + s.directions / plan.teams * s.T * step;
    if (time < least) best = plan, least = time;
  };
  if (least < region) return best;
  for (int64_t teams = 1; teams <= s.directions; ++teams) {
    for (int64_t n = teams == 1 ? 2 : 1; n * teams <= threads; ++n) {
      if (n <= s.B) consider({teams, n, false}, most_of(s.B, n) * row + weights);
      const double share = (s.B * row + weights) * most_of(blocks, n) / blocks;
      if (n > 1 && n <= blocks && share >= kWait) consider({teams, n, true}, share + waits);
    }
  }
  return best;
}

}  // namespace

Plan plan(const Kernels& k, const LayerShape& shape, bool backward, int64_t threads) {
  if (shape.frozen()) return frozen_plan(k, shape, threads);
  // All times are in multiply-adds, 50 to a nanosecond.
  constexpr double kRegion = 3.8e5;  // a parallel region: below it, sharing costs more than it saves
  constexpr double kWait = 2.6e4;    // a barrier after every step,
  constexpr double kArrival = 2e3;   // at which each worker takes a cache line from another core
  constexpr double kStep = 3e4;      // a worker's least part of a step with a barrier
  constexpr double kForeign = 1.5;   // of the time of a single step, if other cores have packed most of its weights
  constexpr double kNear = 4;        // reading the weights of a step, in rows, from a core's own cache,
  constexpr double kFar = 8;         // and from one that it shares
  constexpr int64_t kRows = 8;       // beside which reading the weights counts for little, wherever they lie
  // The multiply-adds of a step in one direction. An activation counts as some tens of them.
  const int64_t gates = cell_info(shape.cell).gates;
  const double step = double(gates) * shape.H * double(shape.B) * (shape.P + shape.I + 32);
  // Reading a weight for a single step takes as long as two. That counts in training, where the other threads are
  // awake, because the gradients are shared, too.
  const double reading = shape.T == 1 && shape.train && shape.B > 0 ? 2 * step / double(shape.B) : 0;
  const double total = (step * shape.T + reading) * shape.directions;
  if (threads <= 1 || total < kRegion + kThreadProducts * double(threads)) return {1, 1, false};
  const int64_t block = least_units(k, shape, backward), blocks = most_of(shape.H, block);
  if (step >= kStep * threads && shares_weights(shape, gates, block, threads)) return {1, threads, true};
  const int64_t teams = shape.directions == 2 ? 2 : 1;
  const int64_t most = threads / teams;
  if (most <= 1) return {teams, 1, false};
  const bool packs_its_own = shape.T == 1 && shape.H >= most * block;  // if units are split
  if (shape.B >= most * kRows && !packs_its_own) return {teams, most, false};
  if (shape.whole_rows()) return {teams, std::min(most, std::max<int64_t>(shape.B, 1)), false};
  // By rows no worker waits for another, but each reads all weights: of a single step most of them from other cores.
  const double row = step / double(shape.B);
  const bool is_far = outgrow_cache(shape, backward ? shape.P : shape.P + shape.I, 1);
  const double weights = shape.T == 1 ? 0 : row * (is_far ? kFar : kNear);
  const int64_t by_rows = packs_its_own ? 1 : shape.T == 1 ? shape.B / kRows : shape.B;
  Plan best{teams, 1, false};
  double least = step + weights;
  const auto consider = [&](const Plan& plan, double time) {
    if (time < least) best = plan, least = time;
  };
  for (int64_t n = 2; n <= most; ++n) {
    const double rows = row * double(most_of(shape.B, n)) + weights;
    if (n <= by_rows) consider({teams, n, false}, shape.T == 1 ? kForeign * rows : rows);
    const double part = (step + weights) * double(most_units(shape.H, block, n)) / double(shape.H);
    if (n <= blocks && part >= kStep) consider({teams, n, true}, part + kWait + kArrival * double(n));
  }
  return best;
}

void forward(const Kernels& k, const ForwardParams& params, int64_t threads) {
  run(k, params.shape, false, threads, [&](int64_t d, const Worker& worker) { k.forward(params, d, worker); });
}

namespace {

// Whether products of digits on AMX are faster than float32's own: rows fill much of a tile, and packing takes little
// beside them. Measured on a core that served another thread, too, where AMX runs at half its speed.
bool digits_pay(const Kernels& k, const LayerShape& shape, Precision precision, int64_t threads) {
  const Plan p = plan(k, shape, false, threads);
  const int64_t rows = p.splits_units ? shape.B : (shape.B + p.workers - 1) / p.workers;
  if (shape.T == 1 || shape.N < 192) return false;
  if (precision == Precision::kHigh) return rows >= 8 && shape.H >= 128;
  return (rows >= 16 && shape.H >= 192) || (rows >= 32 && shape.H >= 128 && shape.cell == CellKind::kLstm);
}

}  // namespace

void choose_products(const Kernels& k, LayerShape& shape, Precision precision, int64_t threads) {
  const TileUnit* const unit = k.unit;
  const auto operands = [&] {
    if (!unit || shape.dtype != Dtype::kFloat32 || shape.frozen()) return Operands::kPlain;
    if (precision == Precision::kMedium) return Operands::kBfloat16;
    // How many digits of a row are multiplied depends on the rows in its tile, and whether any are, on how many there
    // are.
    if (!unit->multiply_digits || shape.deterministic) return Operands::kPlain;
    if (unit != &kEmulatedTiles && !digits_pay(k, shape, precision, threads)) return Operands::kPlain;
    return precision == Precision::kHigh ? Operands::kDigits3 : Operands::kDigits4;
  }();
  const bool runs = operands != Operands::kPlain && unit->available();
  shape.operands = runs ? operands : Operands::kPlain;
  shape.unit = runs ? unit : nullptr;
}

void reconsider_products(LayerShape& shape, const void* x, const void* w_ih) {
  if (digits_of(shape.operands) == 0 || shape.gates_given || shape.N == 0 || shape.H == 0) return;
  constexpr int64_t kSample = 16;
  const auto largest = [&](const void* rows, int64_t count, bool of_x) {
    float most = 0;
    for (int64_t sample = 0; sample < kSample; ++sample) {
      const int64_t row = (count - 1) * sample / (kSample - 1);
      const float* const from = static_cast<const float*>(rows) + (of_x ? shape.place(row) : row) * shape.I;
      for (int64_t i = 0; i < shape.I; ++i) most = std::max(most, std::fabs(from[i]));
    }
    return most;
  };
  const float of_weights = largest(w_ih, cell_info(shape.cell).gates * shape.H, false);
  if (largest(x, shape.N, true) * of_weights * std::sqrt(static_cast<float>(shape.I)) <= kMostOfGates) return;
  shape.operands = Operands::kPlain;
  shape.unit = nullptr;
}

int64_t gradient_workers(const LayerShape& shape, int64_t threads) {
  if (omp_in_parallel() || forked) return 1;
  // A product is worth a parallel region, whose threads are awake, and each thread a part that is worth packing for.
  // Writing an element of the result takes as long as some multiply-adds.
  const double work = double(shape.N + 4) * double(shape.H) * double(shape.I + shape.P) * double(shape.directions);
  return std::clamp<int64_t>(int64_t((work - kThreadProducts * double(threads)) / 1e5), 1, threads);
}

LayerShape chunk_shape(const LayerShape& shape) {
  const int64_t count = chunks(shape);
  if (count == 1) return shape;
  LayerShape longest = shape;
  longest.T = (shape.T + count - 1) / count;
  longest.N = longest.T * longest.B;
  return longest;
}

void backward(const Kernels& k, const BackwardParams& params, int64_t threads, int64_t gradient_workers) {
  const int64_t count = chunks(params.shape), T = params.shape.T;
  if (count == 1) return backward_chunk(k, params, threads, gradient_workers);
  for (int64_t i = count; i-- > 0;) {
    backward_chunk(k, chunk(params, T * i / count, T * (i + 1) / count), threads, gradient_workers);
  }
}

}  // namespace cpu
}  // namespace fused_rnn
