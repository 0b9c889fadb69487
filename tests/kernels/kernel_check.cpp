// Checks the kernel tables against a plain reference in double precision, without torch or Python, so that the kernels
// can also run under the thread sanitizer, which does not understand libgomp, and in an emulator of another processor.
//
//   kernel_check [--quick] [--without-barrier] [table...]
//
// Every case runs on one thread and on teams of two and three that split rows or units. --quick runs only small cases,
// on two threads. --without-barrier removes the teams' barrier, to prove that the check detects that. Buffers have
// their exact size (workspaces: whole cache lines) and hold NaN wherever a kernel must write before it reads. Prints
// each table's largest error; prints the cases above the tolerance and then exits with 1.
//
// Also checks that denormal numbers count as zeros on every thread, and that every kernel restores the floating-point
// control register.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "kernel_reference.h"

namespace {

using namespace fused_rnn;
using namespace fused_rnn::check;

const Case kCases[] = {
    // Fewer than 8 rows in all: weights are read without packing.
    {"trlg", 1, 1, 1, 1, 0, "bsq"},
    {"trlg", 1, 7, 33, 20, 0, "bq"},
    {"trlg", 2, 3, 5, 7, 0, "2bsq"},
    {"trlg", 3, 2, 40, 65, 0, "2bspq"},
    {"trlg", 7, 1, 20, 33, 0, "2bfsq"},
    {"l", 2, 2, 3, 8, 7, "2bsq"},
    {"l", 1, 1, 5, 70, 33, "bs"},
    // One step of rows that are worth packing: all panels of a worker take one place.
    {"trlg", 1, 40, 70, 130, 0, "2bsq"},
    {"trlg", 1, 33, 9, 257, 0, "2bsp"},
    {"l", 1, 40, 9, 150, 70, "2bsq"},
    {"l", 1, 64, 20, 300, 130, "bs"},
    // One row per step: W_hh is read without packing, several blocks at once.
    {"trlg", 20, 1, 17, 70, 0, "2bsq"},
    {"trlg", 9, 1, 30, 130, 0, "s"},
    {"trlg", 8, 1, 5, 400, 0, "bs"},
    {"tr", 8, 1, 5, 790, 0, "2b"},
    {"l", 9, 1, 7, 70, 33, "2bsq"},
    // Few rows: x times W_ih is computed before the first step.
    {"trlg", 4, 2, 10, 65, 0, "2bsp"},
    {"trlg", 5, 5, 18, 77, 0, "2bspq"},
    {"trlg", 3, 3, 0, 5, 0, "2bs"},
    {"lg", 3, 4, 300, 220, 0, "b"},
    {"l", 5, 3, 7, 20, 9, "2bspq"},
    // More rows, up to several chunks of 24.
    {"trlg", 6, 7, 64, 64, 0, ""},
    {"trlg", 6, 8, 12, 96, 0, "bfsq"},
    {"trlg", 3, 13, 9, 50, 0, "2bspq"},
    {"trlg", 1, 16, 16, 32, 0, "2bs"},
    {"trlg", 5, 25, 34, 40, 0, "2bs"},
    {"trlg", 4, 60, 20, 30, 0, "2bspq"},
    {"l", 4, 26, 8, 66, 40, "2bsp"},
    // Long sums: more than 128, and more than 1024, terms or rows.
    {"trlg", 2, 9, 10, 300, 0, "2bs"},
    {"lg", 2, 2, 3, 400, 0, "bs"},
    {"trlg", 1, 9, 1100, 24, 0, "bs"},
    {"trlg", 2, 9, 1100, 24, 0, "2bsp"},
    {"trlg", 40, 30, 6, 10, 0, "2bs"},
    {"lg", 40, 15, 530, 9, 0, "b"},
    {"l", 3, 9, 5, 300, 140, "2bs"},
    {"l", 2, 8, 3, 1030, 5, "bs"},
};

// The thread's floating-point control register, which has a setting for denormal numbers.

#if defined(__x86_64__)
constexpr uint64_t kDenormalsAsZeros = 0x8040;
uint64_t control() { return __builtin_ia32_stmxcsr(); }
void set_control(uint64_t value) { __builtin_ia32_ldmxcsr(static_cast<uint32_t>(value)); }
#elif defined(__aarch64__)
constexpr uint64_t kDenormalsAsZeros = 1 << 24;
uint64_t control() {
  uint64_t value;
  __asm__ volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}
void set_control(uint64_t value) { __asm__ volatile("msr fpcr, %0" : : "r"(value)); }
#else
constexpr uint64_t kDenormalsAsZeros = 0;
uint64_t control() { return 0; }
void set_control(uint64_t) {}
#endif

std::atomic<int> changed_controls{0};  // calls that did not restore the register

// The kernels, called as csrc/bindings/ops.cpp and csrc/cpu/dispatch.cpp call them.

struct Team {
  int64_t workers;
  bool splits_units, both_directions;  // both_directions: at the same time, each with a team of its own
};

// Calls work(direction, worker) for all directions and workers. On every second thread denormal numbers already count
// as zeros.
template <class Work>
void run(int64_t directions, const Team& team, bool with_barrier, const Work& work) {
  const int64_t W = team.workers, teams = team.both_directions ? 2 : 1;
  cpu::Barrier barriers[2];
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < teams * W; ++i) {
    threads.emplace_back([&, i] {
      cpu::Barrier* const barrier = W == 1 || !with_barrier ? nullptr : &barriers[i / W];
      const cpu::Worker worker{i % W, W, team.splits_units, barrier};
      const uint64_t before = i % 2 ? control() | kDenormalsAsZeros : control() & ~kDenormalsAsZeros;
      set_control(before);
      for (int64_t d = i / W; d < directions; d += teams) {
        work(d, worker);
        changed_controls += control() != before;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

struct alignas(64) Line {
  char bytes[64];
};

template <class T>
Data<T> kernel_results(const cpu::Kernels& k, const Layer& layer, const Data<T>& in, const Team& team, bool train,
                       bool with_barrier) {
  LayerShape shape = layer.shape;
  shape.dtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
  shape.train = train;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const int64_t N = shape.N, B = shape.B, H = shape.H, P = shape.P, D = shape.directions;
  const bool chains = shape.chains_h(layer.G == 1), projected = shape.projected, states = layer.states;
  Data<T> out(layer, nan);
  out.of[kDcN] = in.of[kC0], out.of[kC0] = in.of[kDcN];

  std::vector<std::vector<Line>> workspaces;
  const auto workspace = [&](int64_t elements) {  // filled with NaN
    workspaces.emplace_back((elements * sizeof(T) + sizeof(Line) - 1) / sizeof(Line));
    std::memset(workspaces.back().data(), 0xff, workspaces.back().size() * sizeof(Line));
    return workspaces.back().data();
  };
  const int64_t after_h = layer.saved * H + P, whole = after_h + (layer.lstm ? H : 0) + (projected ? H : 0);
  std::vector<T> reserves[2], dgates[2], dh_totals[2];
  ForwardParams f{shape, {}};
  BackwardParams b{shape, {}, false, out.of[kX].data(), workspace(k.gradients_workspace(shape) * team.workers)};
  for (int64_t d = 0; d < D; ++d) {
    const std::vector<T>* const w = in.w[d];
    std::vector<T>* const dw = out.w[d];
    Reserve reserve{};
    if (train && chains) {
      reserves[d].assign((N + B) * H, nan);
      T *const first = reserves[d].data(), *const second = first + B * H;
      reserve.gates = d ? first : second, reserve.h_prev = d ? second : first, reserve.stride = H;
    } else if (train) {
      reserves[d].assign(N * whole, nan);
      T* const at = reserves[d].data();
      reserve.gates = at, reserve.h_prev = at + layer.saved * H, reserve.stride = whole;
      if (layer.lstm) reserve.c_prev = at + after_h;
      if (projected) reserve.hidden = at + after_h + H;
    }
    dgates[d].assign(N * layer.grads * H, nan);
    dh_totals[d].assign(projected ? N * P : 0, nan);

    ForwardDirection& p = f.direction[d];
    BackwardDirection& q = b.direction[d];
    p.x = q.x = in.of[kX].data();
    p.w_ih = q.w_ih = w[kWih].data();
    p.w_hh = q.w_hh = w[kWhh].data();
    p.w_hr = q.w_hr = projected ? w[kWhr].data() : nullptr;
    p.b_ih = layer.biases ? w[kBih].data() : nullptr;
    p.b_hh = layer.biases ? w[kBhh].data() : nullptr;
    p.reserve = q.reserve = reserve;
    p.y_stride = q.dy_stride = D * P;
    p.h0 = states ? &in.of[kH0][d * B * P] : nullptr;
    p.y = &out.of[kDy][d * P];
    p.h_n = states ? &out.of[kDhN][d * B * P] : nullptr;
    p.c = layer.lstm ? &out.of[kDcN][d * B * H] : nullptr;
    p.workspace = workspace(k.forward_workspace(shape));
    q.dy = layer.only_final ? nullptr : &in.of[kDy][d * P];
    q.dh_n = states ? &in.of[kDhN][d * B * P] : nullptr;
    q.dgates = dgates[d].data();
    q.dh_total = projected ? dh_totals[d].data() : nullptr;
    q.dh0 = states ? &out.of[kH0][d * B * P] : nullptr;
    q.dc = layer.lstm ? &out.of[kC0][d * B * H] : nullptr;
    q.dw_ih = dw[kWih].data(), q.dw_hh = dw[kWhh].data(), q.db_ih = dw[kBih].data(), q.db_hh = dw[kBhh].data();
    q.dw_hr = projected ? dw[kWhr].data() : nullptr;
    q.workspace = workspace(k.backward_workspace(shape));
  }
  run(D, team, with_barrier, [&](int64_t d, const cpu::Worker& worker) { k.forward(f, d, worker); });
  if (!train) return out;
  run(D, team, with_barrier, [&](int64_t d, const cpu::Worker& worker) { k.backward(b, d, worker); });
  run(1, {team.workers}, false, [&](int64_t, const cpu::Worker& worker) { k.gradients(b, worker); });
  return out;
}

// Comparison

struct Largest {
  double error = 0, limit = 1;
  std::string where = "nowhere";
};

// The largest difference, relative to the largest magnitude of the result; NaN counts as infinite.
template <class T>
double relative_error(const std::vector<T>& found, const Vector& expected) {
  double difference = 0, magnitude = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    const double d = std::abs(found[i] - expected[i]);
    difference = std::isnan(d) ? std::numeric_limits<double>::infinity() : std::max(difference, d);
    magnitude = std::max(magnitude, std::abs(expected[i]));
  }
  return difference == 0 ? 0 : difference / magnitude;
}

// The rounding errors of a sum of n terms add up like a random walk, to about sqrt(n) eps; gates and steps justify the
// factor 8.
template <class T>
double tolerance(const LayerShape& s, int64_t G) {
  const int64_t terms = std::max({s.I + s.P, G * s.H, s.N});
  return 8 * std::sqrt(double(terms)) * std::numeric_limits<T>::epsilon();
}

struct Options {
  bool quick = false, barrier = true;
};

// Checks one case on one table with all teams; returns the number of failures.
template <class T>
int check_values(const cpu::Kernels& k, const Layer& layer, const Options& options, Largest& largest) {
  std::mt19937_64 random(1);
  Data<T> in(layer, 0);
  in.each_given(layer, [&](double scale, std::vector<T>& v) {
    for (T& value : v) value = T((double(random() >> 11) / double(1ull << 52) - 1) * scale);
  });
  Data<double> exact(layer, 0);
  for (int i = 0; i < kStates; ++i) exact.of[i].assign(in.of[i].begin(), in.of[i].end());
  for (int i = 0; i < 2 * kWeights; ++i) {
    const std::vector<T>& w = in.w[i / kWeights][i % kWeights];
    exact.w[i / kWeights][i % kWeights].assign(w.begin(), w.end());
  }
  const Data<double> expected = reference(layer, exact);
  const double limit = tolerance<T>(layer.shape, layer.G);
  int failures = 0;
  const auto compare = [&](const std::string& what, const std::vector<T>& a, const Vector& b) {
    const double error = relative_error(a, b);
    if (error > limit && ++failures <= 20) {
      std::printf("FAILED: %s %s, error %.2g, tolerance %.2g\n", k.name, what.c_str(), error, limit);
    }
    if (error / limit > largest.error / largest.limit) largest = {error, limit, what};
  };
  for (const Team& team : {Team{1}, Team{2}, Team{2, true}, Team{3}, Team{3, true}, Team{1, false, true},
                           Team{2, false, true}, Team{2, true, true}}) {
    if (team.both_directions && layer.shape.directions == 1) continue;
    if (options.quick && team.workers * (team.both_directions ? 2 : 1) != 2) continue;
    const std::string how = std::to_string(team.workers) + (team.splits_units ? " on units" : " on rows") +
                            (team.both_directions ? " per direction" : "");
    for (const bool train : {true, false}) {
      const Data<T> found = kernel_results<T>(k, layer, in, team, train, options.barrier);
      const std::string where = std::string(sizeof(T) == 4 ? "float32 " : "float64 ") + layer.name +
                                ", workers: " + how + (train ? "" : ", inference") + ": ";
      for (int i = train ? kX : kDy; i < kStates; ++i) {
        if (layer.states || (i != kH0 && i != kDhN)) compare(where + kResultNames[i], found.of[i], expected.of[i]);
      }
      for (int i = 0; train && i < layer.shape.directions * kWeights; ++i) {
        const int d = i / kWeights, j = i % kWeights;
        compare(where + kGradientNames[j] + (d ? " reverse" : ""), found.w[d][j], expected.w[d][j]);
      }
    }
  }
  return failures;
}

// Without states and biases, so that the results would be denormal if the kernels did not change the setting.
const Case kDenormalCases[] = {
    {"trlg", 1, 1, 9, 20, 0, "q"},    {"trlg", 7, 1, 9, 40, 0, "q"}, {"trlg", 3, 12, 9, 40, 0, "2"},
    {"trlg", 3, 20, 40, 65, 0, "pq"}, {"l", 3, 9, 5, 40, 17, "2q"},
};

// Checks that a denormal x, weights or dy give the same results as zeros; returns the number of failures.
template <class T>
int check_denormals(const cpu::Kernels& k, const Layer& layer, const Options& options) {
  int failures = 0;
  for (const char* const part : {"x", "weights", "dy"}) {
    std::mt19937_64 random(1);
    Data<T> zeros(layer, 0), denormals(layer, 0);
    zeros.each_given(layer, [&](double scale, std::vector<T>& v) {
      for (T& value : v) value = T((double(random() >> 11) / double(1ull << 52) - 1) * scale);
    });
    denormals = zeros;
    const auto replace = [](std::vector<T>& zero, std::vector<T>& denormal) {
      for (T& value : denormal) value *= std::numeric_limits<T>::min() / 2;
      std::fill(zero.begin(), zero.end(), T(0));
    };
    if (*part != 'w') replace(zeros.of[*part == 'x' ? kX : kDy], denormals.of[*part == 'x' ? kX : kDy]);
    for (int i = 0; *part == 'w' && i < 2 * kWeights; ++i) {
      replace(zeros.w[i / kWeights][i % kWeights], denormals.w[i / kWeights][i % kWeights]);
    }
    for (const Team& team : {Team{1}, Team{2}, Team{2, true}}) {
      const Data<T> found = kernel_results<T>(k, layer, denormals, team, true, options.barrier);
      const Data<T> expected = kernel_results<T>(k, layer, zeros, team, true, options.barrier);
      const auto same = [](const std::vector<T>& a, const std::vector<T>& b) {
        return std::equal(a.begin(), a.end(), b.begin(), [](T x, T y) { return x == y || (x != x && y != y); });
      };
      bool all = true;
      for (int i = 0; i < kStates; ++i) all = all && same(found.of[i], expected.of[i]);
      for (int i = 0; i < 2 * kWeights; ++i) {
        all = all && same(found.w[i / kWeights][i % kWeights], expected.w[i / kWeights][i % kWeights]);
      }
      if (!all && ++failures) {
        std::printf("FAILED: %s denormal %s, %s, %d workers\n", k.name, part, layer.name.c_str(), int(team.workers));
      }
    }
  }
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--quick") {
      options.quick = true;
    } else if (argument == "--without-barrier") {
      options.barrier = false;
    } else {
      names.push_back(argument);
    }
  }
  int failures = 0, tables = 0;
  for (const cpu::Kernels* k : cpu::supported()) {
    if (!names.empty() && std::find(names.begin(), names.end(), k->name) == names.end()) continue;
    int cases = 0;
    Largest of[2];
    for (const Case& c : kCases) {
      if (options.quick && !c.has('q')) continue;
      for (const char* cell = c.cells; *cell; ++cell, ++cases) {
        const Layer layer(c, *cell);
        failures += check_values<float>(*k, layer, options, of[0]) + check_values<double>(*k, layer, options, of[1]);
      }
    }
    for (const Case& c : kDenormalCases) {
      if (options.quick && !c.has('q')) continue;
      for (const char* cell = c.cells; *cell; ++cell) {
        const Layer layer(c, *cell);
        failures += check_denormals<float>(*k, layer, options) + check_denormals<double>(*k, layer, options);
      }
    }
    if (const int changed = changed_controls.exchange(0)) {
      failures += changed;
      std::printf("FAILED: %s changed the floating-point control register in %d calls\n", k->name, changed);
    }
    for (const Largest& l : of) {
      std::printf("%s: %d cases, largest error %.2g of %.2g in %s\n", k->name, cases, l.error, l.limit,
                  l.where.c_str());
    }
    ++tables;
  }
  std::printf("%d tables, %d failures\n", tables, failures);
  return failures > 0 || tables == 0;
}
