// Checks the CUDA kernels against a plain loop in double precision. The emulator runs them, without a GPU and torch.
//
//   cuda_check [--cell NAME] [--element bf16|fp16|tf32] [--seeds N] [--quick]
//
// By default it checks all instances, which are compiled in the .cu files. With -DCHECK_CELL and -DCHECK_ELEMENT it
// compiles a few instances of one cell and element itself and checks those, so that a mutant is built in seconds. At
// the first case that fails, prints the failure and exits with 1.

#include "cuda_check.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda_cases.h"

namespace fused_rnn {
namespace cuda {
namespace check {
namespace {

constexpr uint64_t kPatience = 10'000'000'000;

// ---- Cases ----------------------------------------------------------------------------------------------------------

// The instances of --quick: one block, exchange through L2 with one and with several tiles of rows and warps of units,
// a cluster, and clusters that split columns. -DCHECK_INSTANCES replaces them.
#if defined(CHECK_INSTANCES)
constexpr bool kAllMechanisms = false;
#else
constexpr bool kAllMechanisms = true;
#define CHECK_INSTANCES(X)    \
  X(kAlone, 8, 1, 1)          \
  X(kThroughL2, 1, 8, 1)      \
  X(kThroughL2, 2, 4, 2)      \
  X(kThroughCluster, 1, 8, 1) \
  X(kSplitColumns, 1, 8, 1)
#endif

const char* const kElementNames[] = {"bf16", "fp16", "tf32"};

#define CHECK_CELL_INFO(kind, policy, name)                                             \
  {CellKind::kind,       name,          policy::kGates, policy::kSaved, policy::kGrads, \
   policy::kHiddenGrads, policy::kHasC, policy::kUsesH},
const CellInfo kCells[] = {FUSED_RNN_CELLS(CHECK_CELL_INFO)};

#define CHECK_INSTANCE(exchange, unit_warps, depth_warps, row_tiles) \
  {Exchange::exchange, unit_warps, depth_warps, row_tiles},
const Instance kAllInstances[] = {FUSED_RNN_INSTANCES(CHECK_INSTANCE)};
const Instance kQuickInstances[] = {CHECK_INSTANCES(CHECK_INSTANCE)};

bool same(const Instance& a, const Instance& b) { return std::memcmp(&a, &b, sizeof a) == 0; }
bool is_quick(const Instance& instance) {
  return std::any_of(std::begin(kQuickInstances), std::end(kQuickInstances),
                     [&](const Instance& i) { return same(i, instance); });
}

#if defined(CHECK_CELL)
template <class F>
void with_compiled_shape(const Instance& instance, const F& f) {
#define CHECK_SHAPE(exchange, unit_warps, depth_warps, row_tiles)                 \
  if (same(instance, {Exchange::exchange, unit_warps, depth_warps, row_tiles})) { \
    return f(Shape<Exchange::exchange, unit_warps, depth_warps, row_tiles>{});    \
  }
  CHECK_INSTANCES(CHECK_SHAPE)
}
void run_forward(const CellInfo&, Element, const Plan& plan, const ForwardParams& params) {
  with_compiled_shape(plan.instance, [&](auto shape) {
    if constexpr (has_forward(decltype(shape)::kExchange)) {
      launch_parts(&forward<CHECK_CELL, CHECK_ELEMENT, decltype(shape)>, plan, params, nullptr);
    }
  });
}
void run_backward(const CellInfo&, Element, const Plan& plan, const BackwardParams& params) {
  with_compiled_shape(plan.instance, [&](auto shape) {
    launch_parts(&backward<CHECK_CELL, CHECK_ELEMENT, decltype(shape)>, plan, params, nullptr);
  });
}
bool is_compiled(const CellInfo& cell, Element element) {
#define CHECK_IS_CELL(kind_, policy, name) \
  if (std::is_same<CHECK_CELL, policy>::value && cell.kind != CellKind::kind_) return false;
  FUSED_RNN_CELLS(CHECK_IS_CELL)
  return element == (std::is_same<CHECK_ELEMENT, Bf16>::value   ? Element::kBf16
                     : std::is_same<CHECK_ELEMENT, Fp16>::value ? Element::kFp16
                                                                : Element::kTf32);
}
constexpr bool kFewInstances = true;
#else
void run_forward(const CellInfo& cell, Element element, const Plan& plan, const ForwardParams& params) {
  recurrence(cell.kind).forward(element, plan, params, nullptr);
}
void run_backward(const CellInfo& cell, Element element, const Plan& plan, const BackwardParams& params) {
  recurrence(cell.kind).backward(element, plan, params, nullptr);
}
bool is_compiled(const CellInfo&, Element) { return true; }
constexpr bool kFewInstances = false;
#endif

// ---- Runs -----------------------------------------------------------------------------------------------------------

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

Product product(const Layer& l, Exchange exchange, bool backward) {
  const int gates = static_cast<int>(l.cell.gates), Hp = static_cast<int>(l.Hp), bytes = element_bytes(l.element);
  return backward ? backward_product(exchange, gates * Hp, bytes) : Product{gates, Hp, bytes};
}

Problem problem(const Layer& l, int instance, bool backward) {
  return {l.cell.kind, l.element, l.B, static_cast<int>(l.H), static_cast<int>(l.D), backward, instance};
}

// The mechanisms of a launch. The cases must cover each of them.
enum { kAloneOnChip, kCluster, kClusters, kParts, kTeams, kTiles, kEmptyTile, kLaunches, kSharedColumns, kMechanisms };
const char* const kMechanismNames[] = {"a block alone",       "a cluster",        "several clusters in a team",
                                       "several parts",       "several teams",    "several tiles",
                                       "a tile without rows", "several launches", "columns in shared memory"};
int reached[kMechanisms];

void count_mechanisms(const Layer& l, const Plan& p, bool backward) {
  const Division& d = p.division;
  const int64_t tiles = (l.B + p.instance.rows() - 1) / p.instance.rows(), launches = (l.B + p.rows - 1) / p.rows;
  reached[kAloneOnChip] += p.instance.exchange == Exchange::kAlone;
  reached[kCluster] += p.instance.exchange == Exchange::kThroughCluster;
  reached[kClusters] += p.instance.exchange == Exchange::kSplitColumns && d.parts > kSplitBlocks;
  reached[kParts] += d.parts > 1, reached[kTeams] += d.teams > 1, reached[kTiles] += d.tiles > 1;
  reached[kEmptyTile] += launches == 1 && tiles < d.teams * d.tiles, reached[kLaunches] += launches > 1;
  reached[kSharedColumns] += product(l, p.instance.exchange, backward).shared_operands(p.instance.depth_warps) > 0;
}

// The instance of forward that goes with one of backward: if that has no forward, the same without splitting.
int forward_instance(int instance) {
  Instance in = kAllInstances[instance];
  if (!has_forward(in.exchange)) in.exchange = Exchange::kThroughL2;
  const auto equal = [&](const Instance& i) { return same(i, in); };
  return static_cast<int>(std::find_if(std::begin(kAllInstances), std::end(kAllInstances), equal) - kAllInstances);
}

Plan best_plan(const Problem& problem, const Device& device) {
  const std::vector<Plan> all = plans(problem, device);
  require(!all.empty(), "no plan");
  return all.front();
}

// The planner's plan for a device that has room for exactly these teams and tiles. A device always has room for two or
// more clusters; if that is too many, the plan is reduced afterwards.
Plan planned(const Layer& l, int instance, int teams, int tiles, bool backward) {
  const Instance& in = kAllInstances[instance];
  const int parts = in.parts(static_cast<int>(l.H)), all_teams = static_cast<int>(l.D) * teams;
  const int blocks = in.cluster(parts), clusters = all_teams * (parts / blocks);
  Device device = current_device();
  device.sms = blocks > 1 ? 16 * ((clusters + 16 / blocks - 1) / (16 / blocks)) : all_teams * parts;
  device.shared_bytes = Layout(in, product(l, in.exchange, backward), tiles).total;
  Plan result = best_plan(problem(l, instance, backward), device);
  if (blocks > 1 && result.division.teams > teams) {
    const int64_t all_tiles = (l.B + in.rows() - 1) / in.rows(), needed_tiles = (all_tiles + teams - 1) / teams;
    result.division.teams = teams, result.division.tiles = static_cast<int>(std::min<int64_t>(tiles, needed_tiles));
    result.rows = static_cast<int64_t>(teams) * result.division.tiles * in.rows();
    result.shared_bytes = Layout(in, product(l, in.exchange, backward), result.division.tiles).total;
  }
  count_mechanisms(l, result, backward);
  return result;
}

// Also sets the current device to one that has no more resources than the plan needs.
Sequence sequence(const Layer& l, const Plan& plan, uint64_t patience) {
  Device device = current_device();
  device.sms = plan.blocks(static_cast<int>(l.D)), device.shared_bytes = plan.shared_bytes;
  set_current_device(device);
  Sequence q{};
  q.T = l.T, q.B = l.B, q.H = static_cast<int>(l.H), q.directions = static_cast<int>(l.D);
  q.lengths = l.lengths.empty() ? nullptr : l.lengths.data();
  q.resets = l.resets.empty() ? nullptr : l.resets.data();
  q.error = error_word(), q.patience = patience;
  return q;
}

// ring: in place of the whole exchange, for each direction; not in training.
void forward_pass(const Layer& l, Inputs& in, Results& out, const Plan& plan, bool train, uint64_t patience,
                  Buffer* ring = nullptr) {
  ForwardParams params{sequence(l, plan, patience), {}, ring ? kRingSteps - 1 : -1};
  for (int d = 0; d < l.D; ++d) {
    ForwardDirection& p = params.direction[d];
    Buffer *const i = in[d], *const o = out.outputs[d];
    p.x_gates = i[kX].data(), p.w_hh = i[kW].data(), p.b_ih = i[kBih].data(), p.b_hh = i[kBhh].data();
    p.h0 = i[kH0].data(), p.c0 = i[kC0].data(), p.h_n = o[kHn].data(), p.c_n = o[kCn].data();
    p.y = out.outputs[0][kY].data(d * l.H), p.y_stride = l.D * l.H;
    p.reset = {i[kResetH].data(), i[kResetC].data(), l.reset_states > 1 ? l.B * l.H : 0};
    p.drop_h = i[kDrop].data();
    p.zones.h = {in[0][kZoneH].data(d * l.H), l.zone_stride()},
    p.zones.c = {in[0][kZoneC].data(d * l.H), l.zone_stride()};
    p.c_sequence = out.outputs[0][kCs].data(d * l.H);
    p.h_prev = ring ? ring[d].data() : train || through_l2(plan.instance.exchange) ? o[kHPrev].data() : nullptr;
    p.saved = train ? o[kSaved].data() : nullptr;
    p.state_prev = train ? static_cast<float*>(o[kStatePrev].data()) : nullptr;
  }
  run_forward(l.cell, l.element, plan, params);
}

void backward_pass(const Layer& l, Inputs& in, Results& out, const Plan& plan, uint64_t patience) {
  BackwardParams params{sequence(l, plan, patience), {}};
  for (int d = 0; d < l.D; ++d) {
    BackwardDirection& p = params.direction[d];
    Buffer *const i = in[d], *const o = out.outputs[d];
    p.w_hh_t = i[kWt].data(), p.h_prev = o[kHPrev].data(), p.saved = o[kSaved].data();
    p.state_prev = static_cast<const float*>(o[kStatePrev].data());
    p.dy = in[0][kDy].data(d * l.H), p.dy_stride = l.D * l.H, p.dh_n = i[kDhN].data(), p.dc_n = i[kDcN].data();
    p.dc_sequence = in[0][kDcs].data(d * l.H);
    p.drop_h = i[kDrop].data();
    p.zones.h = {in[0][kZoneH].data(d * l.H), l.zone_stride()},
    p.zones.c = {in[0][kZoneC].data(d * l.H), l.zone_stride()};
    p.dreset = {o[kDresetH].data(), o[kDresetC].data(), l.B * l.H};
    p.dgates = o[kDgates].data(), p.dh0 = o[kDh0].data(), p.dc0 = o[kDc0].data();
  }
  run_backward(l.cell, l.element, plan, params);
}

// ---- Comparison -----------------------------------------------------------------------------------------------------

struct Largest {
  double error = 0;
  std::string where = "nowhere";
};
Largest largest[3];  // for each element type, relative to the tolerance

// One unit in the last place: a value is rounded when it is stored, and one that was exchanged before may have been
// rounded in the other direction.
double tolerance(Element e) { return e == Element::kBf16 ? 0x1p-7 : 0x1p-10; }

void compare(const Layer& l, const std::string& what, const Buffer& actual, const Values& expected) {
  double magnitude = 0;
  for (double v : expected) magnitude = std::isfinite(v) ? std::max(magnitude, std::abs(v)) : magnitude;
  for (int64_t i = 0; i < actual.size(); ++i) {
    const std::string where = what + " at " + std::to_string(i);
    if (expected[i] == kUntouched) {
      require(actual.is_untouched(i), where + ": written");
    } else if (std::isnan(expected[i])) {
      require(std::isnan(actual[i]), where + ": " + std::to_string(actual[i]) + " instead of NaN");
    } else {
      const double error = std::abs(actual[i] - expected[i]), limit = tolerance(l.element) * magnitude;
      require(error <= limit, where + ": " + std::to_string(actual[i]) + ", not " + std::to_string(expected[i]));
      Largest& most = largest[static_cast<int>(l.element)];
      if (limit > 0 && error / limit > most.error) most = {error / limit, what};
    }
  }
}

template <class F>
void each_output(const Layer& l, const F& f) {
  for (int d = 0; d < l.D; ++d) {
    for (int k = 0; k < kOutputs; ++k) f(d, k, std::string(kOutputNames[k]) + (d ? " reverse" : ""));
  }
}

void check_memory(const Layer& l, const Results& out, Inputs& in, const Inputs& before) {
  require(*error_word() == 0, "a block has waited in vain");
  each_output(l, [&](int d, int k, const std::string& name) {
    require(out.outputs[d][k].guards_hold(), name + ": written beyond its memory");
    require((k != kHPrev && k != kDgates) || !out.outputs[d][k].holds_sentinel(), name + ": not all is published");
  });
  for (int i = 0; i < 2 * kInputs; ++i) {
    require(!(in[i / kInputs][i % kInputs] != before[i / kInputs][i % kInputs]), "an operand has changed");
  }
}

void check(const Layer& l, const Plan& forward, const Plan& backward, int seeds) {
  Inputs in, before;
  draw(l, in);
  draw(l, before);
  Expected expected;
  expect(l, in, expected);
  Results first(l);
  for (int seed = 0; seed < seeds; ++seed) {
    set_schedule_seed(seed);
    Results out(l);
    forward_pass(l, in, out, forward, true, kPatience);
    require(*error_word() == 0, "forward: a block has waited in vain");
    backward_pass(l, in, out, backward, kPatience);
    check_memory(l, out, in, before);
    each_output(l, [&](int d, int k, const std::string& name) {
      if (seed == 0) return compare(l, name, out.outputs[d][k], expected[d][k]);
      require(!(out.outputs[d][k] != first.outputs[d][k]),
              name + " depends on the schedule, seed " + std::to_string(seed));
    });
    if (seed == 0) first = out;
  }
  Results inference(l);
  forward_pass(l, in, inference, forward, false, kPatience);
  require(*error_word() == 0, "inference: a block has waited in vain");
  each_output(l, [&](int d, int k, const std::string& name) {
    if (k > kCn) return;
    require(!(inference.outputs[d][k] != first.outputs[d][k]), name + " is another in inference");
  });
}

// In a ring that turns more than twice, forward gives what it gives with rows for every step.
void check_ring(const CellInfo& cell, Element element, int instance, int seeds) {
  const Instance& in = kAllInstances[instance];
  const Layer l(cell, element, 2 * kRingSteps + 17, 2 * in.rows() + 1, in.units() + 5, 2, "bsle");
  const Plan plan = planned(l, instance, 1, 2, false);  // the second launch has one row
  Inputs inputs;
  draw(l, inputs);
  Results whole(l);
  forward_pass(l, inputs, whole, plan, false, kPatience);
  for (int seed = 0; seed < seeds; ++seed) {
    set_schedule_seed(seed);
    Results out(l);
    Buffer ring[2];
    for (Buffer& rows : ring) rows = Buffer(element, kRingSteps * l.B * l.Hp, Buffer::kOnes);
    forward_pass(l, inputs, out, plan, false, kPatience, ring);
    require(*error_word() == 0, "a block has waited in vain");
    require(ring[0].guards_hold() && ring[1].guards_hold(), "written beyond the ring");
    each_output(l, [&](int d, int k, const std::string& name) {
      require(k > kCn || !(out.outputs[d][k] != whole.outputs[d][k]), name + " is another");
    });
  }
}

// ---- The watchdog ---------------------------------------------------------------------------------------------------

// Requires NaN in the units that were computed without the missing part, and no writes to those of the missing part.
void require_nan(const Buffer& actual, int64_t H, int64_t units, const std::string& what) {
  for (int64_t i = 0; i < actual.size(); ++i) {
    if (i % H < units) require(std::isnan(actual[i]), what + " is not NaN although a part was missing");
    if (i % H >= units) require(actual.is_untouched(i), what + " of a part that is missing");
  }
}

uint64_t emulated_time() {
  uint64_t time = 0;
  run_emulated({1, 32, 0, false}, [&] { time = nanoseconds(); });
  return time;
}

// Launches without the block of one part, or without one cluster of a team. The other blocks must time out once, not at
// every step, set the error flag and store NaN.
void check_missing_part(const CellInfo& cell, Element element, int instance) {
  const int part_units = kAllInstances[instance].units(), missing = kAllInstances[instance].cluster(1);
  const Layer l(cell, element, 12, 2, 2 * missing * part_units + 5, 1, "bsd");
  Inputs in;
  draw(l, in);
  Plan forward = planned(l, forward_instance(instance), 1, 1, false), backward = planned(l, instance, 1, 1, true);
  Results whole(l);
  forward_pass(l, in, whole, forward, true, kPatience);
  require(*error_word() == 0, "a block has waited in vain");

  constexpr uint64_t round = 1'000'000, patience = 5 * round;
  set_nanoseconds_per_round(round);
  const int64_t units = --forward.division.parts * part_units;
  Results out(l);
  const uint64_t start = emulated_time();
  forward_pass(l, in, out, forward, true, patience);
  const uint64_t rounds = (emulated_time() - start) / round;  // the watchdog reads the clock every 64 turns
  require(rounds < 1000, "giving up took " + std::to_string(rounds) + " rounds");
  require(*error_word() == 1, "forward has not noticed that a part is missing");
  require_nan(out.outputs[0][kY], l.H, units, "y");
  require_nan(out.outputs[0][kHn], l.H, units, "h_n");
  *error_word() = 0;
  backward.division.parts -= missing;
  backward_pass(l, in, whole, backward, patience);
  require(*error_word() == 1, "backward has not noticed that a part is missing");
  require_nan(whole.outputs[0][kDh0], l.H, backward.division.parts * part_units, "dh0");
  *error_word() = 0;
  set_nanoseconds_per_round(1000);
}

// Many short waits must not time out, although together they are much longer than the timeout.
void check_short_waits(const CellInfo& cell, Element element, int instance) {
  const Layer l(cell, element, 150, 1, kAllInstances[instance].units() + 1, 1, "sd");
  Inputs in;
  draw(l, in);
  Results out(l);
  forward_pass(l, in, out, planned(l, forward_instance(instance), 1, 1, false), true, 50'000);
  backward_pass(l, in, out, planned(l, instance, 1, 1, true), 50'000);
  require(*error_word() == 0, "the watchdog has taken many short waits for a long one");
}

// ---- The program ----------------------------------------------------------------------------------------------------

// The plan for a real device, an H200.
void check_own_choice(const CellInfo& cell, Element element, const Device& device, int seeds) {
  const Layer l(cell, element, 2, 20, 40, 2, "bsd");
  check(l, best_plan(problem(l, -1, false), device), best_plan(problem(l, -1, true), device), seeds);
}

struct Options {
  std::string cell = "all", element = "all";
  int seeds = 2;
  bool quick = false;
  Device device = current_device();  // before a case sets a smaller one
};

std::string text(const Instance& i) {
  return std::string(std::array{"alone ", "shared out ", "cluster ", "split "}[static_cast<int>(i.exchange)]) +
         std::to_string(i.unit_warps) + "x" + std::to_string(i.depth_warps) + "x" + std::to_string(i.row_tiles);
}

// Calls f() and adds the name of the case to the message of its exception.
template <class F>
void named(const std::string& what, const F& f) {
  try {
    f();
  } catch (const std::exception& error) {
    throw std::runtime_error(what + ": " + error.what());
  }
}

// Checks all cases of one cell and element; returns their number.
int check_all(const CellInfo& cell, Element element, const Options& options) {
  const bool few = options.quick || kFewInstances;
  const std::string prefix = std::string(cell.name) + " " + kElementNames[static_cast<int>(element)] + " ";
  int cases = 0;
  for (int instance = 0; instance < static_cast<int>(std::size(kAllInstances)); ++instance) {
    const Instance& in = kAllInstances[instance];
    if (few && !is_quick(in)) continue;
    for (const Case& c : kCases) {
      if (!c.runs(in) || (options.quick && !c.has('q'))) continue;
      const Layer l(cell, element, c.T, c.tiles_of_rows * in.rows() + c.rows, c.units(in), c.directions, c.flags);
      named(prefix + text(in) + " H=" + std::to_string(l.H) + " B=" + std::to_string(l.B), [&] {
        const Plan forward = planned(l, forward_instance(instance), c.teams, c.tiles, false);
        check(l, forward, planned(l, instance, c.teams, c.tiles, true), options.seeds);
      });
      ++cases;
    }
    if (in.exchange == Exchange::kThroughL2 && in.row_tiles <= 2 && element != Element::kFp16) {
      named(prefix + text(in) + ", in a ring", [&] { check_ring(cell, element, instance, options.seeds); });
    }
    if (in.exchange == Exchange::kAlone || in.row_tiles > 1) continue;
    named(prefix + text(in) + ", a part missing", [&] { check_missing_part(cell, element, instance); });
    named(prefix + text(in) + ", short waits", [&] { check_short_waits(cell, element, instance); });
  }
  if (few) return cases;
  named(prefix + "as planned", [&] { check_own_choice(cell, element, options.device, options.seeds); });
  return cases + 1;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i], value = i + 1 < argc ? argv[i + 1] : "";
    if (argument == "--quick") {
      options.quick = true;
      continue;
    }
    ++i;
    if (argument == "--cell") options.cell = value;
    if (argument == "--element") options.element = value;
    if (argument == "--seeds") options.seeds = std::atoi(value.c_str());
  }
  return options;
}

int run(const Options& options) {
  const auto chosen = [](const std::string& option, const char* name) { return option == "all" || option == name; };
  int cases = 0;
  bool lstm = false;
  try {
    for (const CellInfo& cell : kCells) {
      for (const Element element : {Element::kBf16, Element::kFp16, Element::kTf32}) {
        const char* const name = kElementNames[static_cast<int>(element)];
        if (!chosen(options.cell, cell.name) || !chosen(options.element, name) || !is_compiled(cell, element)) continue;
        cases += check_all(cell, element, options);
        lstm = lstm || cell.kind == CellKind::kLstm;
      }
    }
    require(cases > 0, "nothing to check");
    for (int i = 0; i < kMechanisms; ++i) {  // other cells cannot reach all of them with these sizes
      require(reached[i] > 0 || !lstm || !kAllMechanisms, std::string("no case has ") + kMechanismNames[i]);
    }
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
  for (const Largest& l : largest) {
    if (l.error > 0) std::printf("largest error %.2f of the tolerance, in %s\n", l.error, l.where.c_str());
  }
  std::printf("%d cases, 0 failures\n", cases);
  return 0;
}

}  // namespace
}  // namespace check
}  // namespace cuda
}  // namespace fused_rnn

int main(int argc, char** argv) { return fused_rnn::cuda::check::run(fused_rnn::cuda::check::parse(argc, argv)); }
