#include "plan.h"

#include <algorithm>

#include "../cells/cell_info.h"

namespace fused_rnn {
namespace cuda {

namespace {

// One H200 (sm_90), clock cycles of one multiprocessor unless said. None was measured by this project yet.
struct Rates {
  double per_microsecond = 1900;  // cycles
  double product = 1.66;          // one tensor-core step of one warp, mma.sync
  double shared_bytes = 128;      // read per cycle
  double l2_bytes = 32;           // read per cycle with every multiprocessor reading
  double per_value = 25;          // instructions of the cell for one unit and row, a warp's share
  double sum = 2;                 // one partial sum read from shared memory, a warp's share
  double barriers = 120;          // two barriers, the way of a value through shared memory
  double travel_l2 = 1100;        // from a store to its being read in another multiprocessor
  double travel_alone = 60;
  double travel_cluster = 400;  // from a push to the end of its phase in another multiprocessor
  double cluster_bytes = 32;    // pushed to one multiprocessor per cycle
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

// How many teams of all directions have their blocks on multiprocessors at the same time. A cluster lies within one of
// the chip's groups of multiprocessors; some of them have more than 16.
int resident_teams(Exchange exchange, int parts, const Device& device) {
  if (exchange == Exchange::kAlone && parts > 1) return 0;
  if (exchange != Exchange::kThroughCluster) return device.sms / parts;
  if (device.capability < 90 || parts < 2 || parts > kMostOfCluster) return 0;
  return device.sms / 16 * (16 / parts);
}

}  // namespace

std::vector<Plan> plans(const Problem& p, const Device& device) {
  std::vector<Plan> found;
  if (p.H < 1 || p.B < 0 || p.directions < 1 || p.directions > 2) return found;
  const int gates = static_cast<int>(cell_info(p.cell).gates), Hp = padded(p.H, p.element);
  const Product product =
      p.backward ? Product{1, gates * Hp, element_bytes(p.element)} : Product{gates, Hp, element_bytes(p.element)};
  int index = 0;
  const auto consider = [&](Instance in) {
    const int this_index = index++;
    if (p.instance >= 0 && p.instance != this_index) return;
    const int parts = (p.H + in.units() - 1) / in.units();
    const int64_t most_teams = resident_teams(in.exchange, parts, device) / p.directions;
    const int64_t all_tiles = std::max<int64_t>(1, (p.B + in.rows() - 1) / in.rows());
    if (most_teams == 0 || Layout(in, product, 1).total > device.shared_bytes) return;
    const int64_t teams = std::min(most_teams, all_tiles);
    const int64_t wanted = (all_tiles + teams - 1) / teams;
    int tiles = 1;
    while (tiles < wanted && Layout(in, product, tiles + 1).total <= device.shared_bytes) ++tiles;
    const int64_t rows = teams * tiles * in.rows();
    const int64_t launches = std::max<int64_t>(1, (p.B + rows - 1) / rows);
    found.push_back({this_index,
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
  std::stable_sort(found.begin(), found.end(),
                   [](const Plan& a, const Plan& b) { return a.microseconds < b.microseconds; });
  return found;
}

std::optional<Plan> plan(const Problem& problem, const Device& device) {
  const std::vector<Plan> all = plans(problem, device);
  return all.empty() ? std::nullopt : std::optional<Plan>(all.front());
}

}  // namespace cuda
}  // namespace fused_rnn
