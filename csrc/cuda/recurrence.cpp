#include "recurrence.h"

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
  __builtin_unreachable();  // the bindings take no number that is not a cell's
}

}  // namespace cuda
}  // namespace fused_rnn
