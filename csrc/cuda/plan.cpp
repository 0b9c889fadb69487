// The cost model of the planner and the list of its candidates.
#include "plan.h"

#include <algorithm>
#include <iterator>

#include "../cells/cell_info.h"

namespace fused_rnn {
namespace cuda {

namespace {

// In clock cycles of one multiprocessor unless stated otherwise; those of an H100, but for the first three. See plan.h
// for their sources.
struct Rates {
  int capability;               // of the first devices that have them
  double per_microsecond;       // cycles per microsecond
  double product;               // one mma.sync of one warp
  double l2_bytes;              // bytes read from L2 per cycle while every multiprocessor reads
  double shared_bytes = 128;    // bytes from or to shared memory per cycle
  double l2_latency = 650;      // of the first load of a tile
  double per_value = 45;        // a warp's instructions for the cell of 32 values
  double sum = 2;               // a warp's load of 32 partial sums from shared memory
  double wide_sum = 1;          // the same in loads of 16 bytes
  double barriers = 120;        // two barriers and the latency of shared memory between them
  double travel_l2 = 450;       // latency from a store to its arrival in L2
  double travel_alone = 60;     // the same within a block, to the load
  double travel_cluster = 400;  // latency from a push to the end of its phase in another multiprocessor
  double cluster_bytes = 32;    // bytes pushed to one multiprocessor per cycle
};
constexpr Rates kRates[] = {
    {0, 1410, 2, 35},      // A100
    {86, 1695, 8, 16},     // RTX 3090
    {89, 2520, 8, 16},     // RTX 4090
    {90, 1755, 1.66, 28},  // H100; also for the B200
    {120, 2407, 8, 16},    // RTX 5090
};

const Rates& rates_of(const Device& device) {
  const auto later = [](int capability, const Rates& r) { return capability < r.capability; };
  return *(std::upper_bound(std::begin(kRates) + 1, std::end(kRates), device.capability, later) - 1);
}

// How long a block takes for its rows' sums after the product, but for the cell.
double sums_per_tile(const Instance& in, const Product& product, const Rates& r) {
  const double values = double(in.rows()) * in.units() / 32;
  if (in.exchange != Exchange::kSplitColumns) return values * r.sum * product.gates * in.depth_warps;
  // The sums of the block's warps are added and, at the same time, pushed; then those of the cluster's blocks are
  // added.
  const double added = values * kSplitBlocks * r.wide_sum;
  const double pushed = values * kSplitBlocks * 32 * 4 / r.cluster_bytes;
  return std::max(added * in.depth_warps, pushed) + r.travel_cluster + added;
}

double cycles_per_step(const Instance& in, const Product& product, int tiles, const Rates& r) {
  const bool l2 = through_l2(in.exchange);
  const double warps = in.unit_warps * in.depth_warps;
  const double products = warps * in.row_tiles * product.pairs(in.depth_warps) * 2 * product.gates * r.product;
  const double weights = product.shared_operands(in.depth_warps) * 1024., sums = product.gates * 512.;
  const double shared = warps * in.row_tiles * (weights + sums) / r.shared_bytes;
  const double rows = double(in.rows()) * product.columns * product.element;
  const double read = rows * in.unit_warps / (l2 ? r.l2_bytes : r.shared_bytes);
  const double cell = double(in.rows()) * in.units() / 32 * r.per_value + sums_per_tile(in, product, r);
  const double tile = (l2 ? r.l2_latency : 0) + std::max({products, shared, read}) + cell + r.barriers;
  // A block with several tiles computes others while the words of one travel.
  const double travel = l2                                ? r.travel_l2
                        : in.exchange == Exchange::kAlone ? r.travel_alone
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
int resident_teams(const Instance& in, int parts, const Device& device) {
  if (in.exchange == Exchange::kAlone && parts > 1) return 0;
  if (in.exchange == Exchange::kAlone || in.exchange == Exchange::kThroughL2) return device.sms / parts;
  const int blocks = in.cluster(parts);
  return resident_clusters(blocks, device) / (parts / blocks);
}

}  // namespace

std::vector<Plan> plans(const Problem& p, const Device& device) {
  std::vector<Plan> candidates;
  if (p.H < 1 || p.B < 0 || p.directions < 1 || p.directions > 2) return candidates;
  const int gates = static_cast<int>(cell_info(p.cell).gates), Hp = padded(p.H, p.element);
  const Rates& rates = rates_of(device);
  int index = 0;
  const auto consider = [&](Instance in) {
    const int this_index = index++;
    if (p.instance >= 0 && p.instance != this_index) return;
    if (!p.backward && !has_forward(in.exchange)) return;
    const Product product = p.backward ? backward_product(in.exchange, gates * Hp, element_bytes(p.element))
                                       : Product{gates, Hp, element_bytes(p.element)};
    const int parts = in.parts(p.H);
    const int64_t max_teams = resident_teams(in, parts, device) / p.directions;
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
                          launches * cycles_per_step(in, product, tiles, rates) / rates.per_microsecond});
  };
#define FUSED_RNN_CONSIDER(exchange, unit_warps, depth_warps, row_tiles) \
  consider({Exchange::exchange, unit_warps, depth_warps, row_tiles});
  FUSED_RNN_INSTANCES(FUSED_RNN_CONSIDER)
#undef FUSED_RNN_CONSIDER
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Plan& a, const Plan& b) { return a.microseconds < b.microseconds; });
  return candidates;
}

}  // namespace cuda
}  // namespace fused_rnn
