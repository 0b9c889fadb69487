// The planner: which kernel instance runs a layer, and how the blocks share it. It is host code and needs no GPU.
//
// Every instance that fits the device is a candidate; the one with the shortest estimated time per step is chosen. The
// constants of the estimate (kRates in plan.cpp) are from data sheets and papers about one Hopper chip, the H100 at
// 1.755 GHz, and fitted to a count of cycles in its machine code: forward of an LSTM with 64 rows of 1024 units takes
// 3.1 us per step, with 16 rows of 512 units 1.1 and of 768 units 1.2, of a GRU with 64 rows of 1024 units 2.9, and
// backward of the first LSTM, without kSplitColumns, 6.5. The estimates agree with these to 10 %. Nothing has been
// measured on a GPU yet.
//
// Of other architectures, three constants are their own:
// - The clock is the boost clock of NVIDIA's data sheets. An L4, an RTX A6000 and others of an architecture run slower.
// - Cycles of an mma.sync follow from the data sheets' dense bfloat16 operations with float32 sums: 312 TFLOP/s of the
//   A100's 108 multiprocessors, 71 of the RTX 3090's 82, 165 of the RTX 4090's 128, 210 of the RTX 5090's 170. The
//   professional chips of the last three architectures need half as many cycles. The H100 reaches 62 % of its rate
//   without wgmma (arXiv 2402.13499); that the B200 has the H100's constants is assumed.
// - Bytes from L2: A100 and H100 (that of 114 multiprocessors) both read about 5.5 TB/s (te42kyfo/gpu-benches).
//   For the RTX nothing was found that could be used; half of the H100's is assumed.
// Latency in cycles is taken to be the H100's everywhere: 279 cycles on average for a load from L2 on an L40 (arXiv
// 2606.22588), where that of an H100 is about the same.
#pragma once

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
  int instance = -1;  // the index in FUSED_RNN_INSTANCES of the only one to consider; -1: all
};

struct Plan {
  int index;  // of `instance` in FUSED_RNN_INSTANCES
  Instance instance;
  Division division;
  int64_t rows;         // batch rows of one launch; a larger batch takes several launches
  int shared_bytes;     // of each block
  double microseconds;  // estimated, per time step

  int blocks(int directions) const { return directions * division.teams * division.parts; }
};

// H rounded up to a whole number of 16-byte loads.
inline int padded(int H, Element e) {
  const int whole = 16 / element_bytes(e);
  return (H + whole - 1) / whole * whole;
}

// All candidates, best first; none if the device cannot hold the layer's recurrent weights.
std::vector<Plan> plans(const Problem& problem, const Device& device);

}  // namespace cuda
}  // namespace fused_rnn
