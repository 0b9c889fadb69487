#include "recurrence.h"

namespace fused_rnn {
namespace cuda {

const Recurrence& recurrence(CellKind cell) {
  switch (cell) {
    case CellKind::kRnnTanh:
      return kRnnTanh;
    case CellKind::kRnnRelu:
      return kRnnRelu;
    case CellKind::kGru:
      return kGru;
    default:
      return kLstm;
  }
}

}  // namespace cuda
}  // namespace fused_rnn
