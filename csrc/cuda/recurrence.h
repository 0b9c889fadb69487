// The launchers: a layer's recurrence on one stream of the current device. All pointers are to that device's memory.
#pragma once

#include "../cells/cells.h"
#include "plan.h"

namespace fused_rnn {
namespace cuda {

enum class StoredType : int { kBf16, kFp16, kFloat32, kFloat64 };

// The instances of one cell, each cell's in a file of its own so that they compile side by side.
struct Recurrence {
  // All steps at once; params.sequence's division and rows are set here, as the plan says.
  void (*forward)(Element, const Plan&, ForwardParams, void* stream);
  void (*backward)(Element, const Plan&, BackwardParams, void* stream);
  // One step, behind its product.
  void (*step_forward)(StoredType, const StepForwardParams&, void* stream);
  void (*step_backward)(StoredType, const StepBackwardParams&, void* stream);
  void (*normalised_forward)(StoredType, const NormalisedForwardParams&, void* stream);
  void (*normalised_backward)(StoredType, const NormalisedBackwardParams&, void* stream);
};

const Recurrence& recurrence(CellKind cell);

#define FUSED_RNN_DECLARE(kind, policy, name) extern const Recurrence kind;
FUSED_RNN_CELLS(FUSED_RNN_DECLARE)
#undef FUSED_RNN_DECLARE

}  // namespace cuda
}  // namespace fused_rnn
