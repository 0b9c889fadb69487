// The cost model of the planner and the list of its candidates.
#include "plan.h"

#include <algorithm>

#include "../cells/cell_info.h"

namespace fused_rnn {
namespace cuda {

namespace {

// Rates of an H200 (sm_90), in clock cycles of one multiprocessor unless stated otherwise. See plan.h for their
// sources.
struct Rates {
  double per_microsecond = 1900;  // cycles per microsecond
  double product = 1.66;          // one mma.sync of one warp
  double shared_bytes = 128;      // bytes read from shared memory per cycle
  double l2_bytes = 32;           // bytes read from L2 per cycle while every multiprocessor reads
  double per_value = 25;          // a warp's instructions for the cell of 32 values
  double sum = 2;                 // a warp's load of 32 partial sums from shared memory
  double barriers = 120;          // two barriers and the latency of shared memory between them
  double travel_l2 = 1100;        // latency from a store to its load in another multiprocessor
  double travel_alone = 60;       // the same within a block
  double travel_cluster = 400;    // latency from a push to the end of its phase in another multiprocessor
  double cluster_bytes = 32;      // bytes pushed to one multiprocessor per cycle
};
constexpr Rates kRates;

double cycles_per_step(const Instance& in, const Product& product, int tiles) {
  const Rates& r = kRates;
  const double warps = in.unit_warps * in.depth_warps;
  const double products = warps * in.row_tiles * product.pairs(in.depth_warps) * 2 * product.gates * r.product;
  const double weights =
      warps * in.row_tiles * product.shared_pairs(in.depth_warps) * product.gates * 1024. / r.shared_bytes;
  const double rows = double(in.rows()) * product.columns * product.element;
  const double read = rows * in.unit_warps / (in.exchange == Exchange::kThroughL2 ? r.l2_bytes : r.shared_bytes);
  const double values = double(in.rows()) * in.units() / 32;
  const double cell = values * (r.per_value + r.sum * product.gates * in.depth_warps);
  const double tile = std::max({products, weights, read}) + cell + r.barriers;
  const double travel = in.exchange == Exchange::kAlone       ? r.travel_alone
                        : in.exchange == Exchange::kThroughL2 ? r.travel_l2
                                                              : r.travel_cluster + rows / r.cluster_bytes;
  return tile * tiles + std::max(0., travel - tile * (tiles - 1));
}

// How many clusters can run at the same time. A cluster must fit into one group of multiprocessors (GPC); of a device
// that is not here, the estimate assumes 16 per group, though some groups have more.
int resident_clusters(int blocks, const Device& device) {
  if (device.capability < 90 || blocks < 2 || blocks > kMaxClusterBlocks) return 0;
  return device.clusters[1] ? device.clusters[blocks] : device.sms / 16 * (16 / blocks);
}

// How many teams, of all directions together, can run at the same time.
int resident_teams(Exchange exchange, int parts, const Device& device) {
  if (exchange == Exchange::kAlone && parts > 1) return 0;
  if (exchange != Exchange::kThroughCluster) return device.sms / parts;
  return resident_clusters(parts, device);
}

}  // namespace

std::vector<Plan> plans(const Problem& p, const Device& device) {
  std::vector<Plan> candidates;
  if (p.H < 1 || p.B < 0 || p.directions < 1 || p.directions > 2) return candidates;
  const int gates = static_cast<int>(cell_info(p.cell).gates), Hp = padded(p.H, p.element);
  const Product product =
      p.backward ? Product{1, gates * Hp, element_bytes(p.element)} : Product{gates, Hp, element_bytes(p.element)};
  int index = 0;
  const auto consider = [&](Instance in) {
    const int this_index = index++;
    if (p.instance >= 0 && p.instance != this_index) return;
    const int parts = (p.H + in.units() - 1) / in.units();
    const int64_t max_teams = resident_teams(in.exchange, parts, device) / p.directions;
    const int64_t all_tiles = std::max<int64_t>(1, (p.B + in.rows() - 1) / in.rows());
    if (max_teams == 0 || Layout(in, product, 1).total > device.shared_bytes) return;
    const int64_t teams = std::min(max_teams, all_tiles);
    const int64_t needed_tiles = (all_tiles + teams - 1) / teams;
    int tiles = 1;
    while (tiles < needed_tiles && Layout(in, product, tiles + 1).total <= device.shared_bytes) ++tiles;
    const int64_t rows = teams * tiles * in.rows();
    const int64_t launches = std::max<int64_t>(1, (p.B + rows - 1) / rows);
    candidates.push_back({this_index,
                          in,
                          {parts, static_cast<int>(teams), tiles},
                          rows,
                          Layout(in, product, tiles).total,
                          launches * cycles_per_step(in, product, tiles) / kRates.per_microsecond});
  };
#define FUSED_RNN_CONSIDER(exchange, unit_warps, depth_warps, row_tiles) \
  consider({Exchange::exchange, unit_warps, depth_warps, row_tiles});
  FUSED_RNN_INSTANCES(FUSED_RNN_CONSIDER)
#undef FUSED_RNN_CONSIDER
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Plan& a, const Plan& b) { return a.microseconds < b.microseconds; });
  return candidates;
}

std::optional<Plan> plan(const Problem& problem, const Device& device) {
  const std::vector<Plan> all = plans(problem, device);
  return all.empty() ? std::nullopt : std::optional<Plan>(all.front());
}

}  // namespace cuda
}  // namespace fused_rnn
