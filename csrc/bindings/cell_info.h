// A cell by its number, as Python names it.
#pragma once

#include "../cells/cells.h"
#include "tensors.h"

namespace fused_rnn {
namespace bindings {

// What the operators need to know of a cell; from the policies, which say it once.
struct CellInfo {
  CellKind kind;
  int64_t gates, saved, grads;
  bool has_c, saves_h, uses_h;
};

// `cell` is a place in the list of cells, which costs an operator call less than a name.
inline CellInfo cell_info(int64_t cell) {
  switch (cell) {
#define FUSED_RNN_INFO(kind, policy, label)                                                                      \
  case static_cast<int64_t>(CellKind::kind): {                                                                   \
    using Cell = policy;                                                                                         \
    return {CellKind::kind, Cell::kGates, Cell::kSaved, Cell::kGrads, Cell::kHasC, Cell::kSavesH, Cell::kUsesH}; \
  }
    FUSED_RNN_CELLS(FUSED_RNN_INFO)
#undef FUSED_RNN_INFO
  }
  std::string names;
#define FUSED_RNN_NAME(kind, policy, label) \
  names += (names.empty() ? "" : ", ") + std::to_string(static_cast<int64_t>(CellKind::kind)) + " (" label ")";
  FUSED_RNN_CELLS(FUSED_RNN_NAME)
#undef FUSED_RNN_NAME
  fail("unknown cell ", cell, "; the cells are: ", names);
}

}  // namespace bindings
}  // namespace fused_rnn
