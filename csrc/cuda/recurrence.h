// The launchers of each cell's kernels, on a stream of the current device. All pointers are to that device's memory.
#pragma once

#include "../cells/cells.h"
#include "plan.h"

namespace fused_rnn {
namespace cuda {

enum class StoredType : int { kBf16, kFp16, kFloat32, kFloat64 };

// The launchers of one cell, defined in the cell's .cu file.
struct Recurrence {
  // All time steps in one launch. They set division, first_row and last_row of params.sequence from the plan.
  void (*forward)(Element, const Plan&, ForwardParams, void* stream);
  void (*backward)(Element, const Plan&, BackwardParams, void* stream);
  // One time step, after the library's product W_hh h (backward: after W_hh^T times the gate gradients).
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
