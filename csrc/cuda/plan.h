// Which kernel instance runs a layer, and how blocks share it. Host code alone: it needs no GPU and no CUDA.
//
// Every instance that fits the device is a candidate; the one with the least estimated time per step is taken. The
// estimate's constants are figures of one Hopper chip from data sheets and papers (kRates in plan.cpp), to be refitted
// where there is a measurement.
#pragma once

#include <optional>
#include <vector>

#include "../rnn_params.h"
#include "launch.h"
#include "layout.h"
#include "params.h"

namespace fused_rnn {
namespace cuda {

enum class Element : int { kBf16, kFp16, kTf32 };
inline int element_bytes(Element e) { return e == Element::kTf32 ? 4 : 2; }

struct Problem {
  CellKind cell;
  Element element;
  int64_t B;
  int H;
  int directions;
  bool backward;
  int instance = -1;  // in the order of FUSED_RNN_INSTANCES: the only one to consider; -1: all
};

struct Plan {
  int index;  // of the instance in FUSED_RNN_INSTANCES
  Instance instance;
  Division division;
  int64_t rows;         // of the batch in one launch; a larger batch takes several
  int shared_bytes;     // of a block
  double microseconds;  // estimated, per time step

  int blocks(int directions) const { return directions * division.teams * division.parts; }
};

// H rounded up to whole 16-byte loads.
inline int padded(int H, Element e) {
  const int whole = 16 / element_bytes(e);
  return (H + whole - 1) / whole * whole;
}

// Nothing if the device cannot hold the layer's recurrent weights.
std::optional<Plan> plan(const Problem& problem, const Device& device);
// Every candidate, best first.
std::vector<Plan> plans(const Problem& problem, const Device& device);

}  // namespace cuda
}  // namespace fused_rnn
