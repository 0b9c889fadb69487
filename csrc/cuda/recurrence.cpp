// The launchers of a cell, by its kind.
#include "recurrence.h"

#include <stdexcept>

#include "../cells/cells.h"

namespace fused_rnn {
namespace cuda {

const Recurrence& recurrence(CellKind cell) {
  switch (cell) {
#define FUSED_RNN_CASE(kind, policy, name) \
  case CellKind::kind:                     \
    return kind;
    FUSED_RNN_CELLS(FUSED_RNN_CASE)
#undef FUSED_RNN_CASE
  }
  throw std::logic_error("fused_rnn: unknown cell");
}

}  // namespace cuda
}  // namespace fused_rnn
