// The constants of a cell as values, taken from its policy, for code that meets a cell as a number: the planners, the
// bindings and, through them, Python. A kernel takes them from its template argument instead.
//
// A new cell needs nothing here. This is checked by the compiler: every switch over CellKind is generated from
// FUSED_RNN_CELLS, and -Werror=switch (setup.py) refuses an enumerator that the list lacks.
#pragma once

#include "cells.h"

namespace fused_rnn {

struct CellInfo {
  CellKind kind;
  const char* name;
  int64_t gates;         // row blocks of W_ih and W_hh
  int64_t saved;         // values per unit kept for backward
  int64_t grads;         // gradient blocks that backward gives
  int64_t input_shift;   // how many of the last gates come first in the gradients of W_ih x
  int64_t hidden_grads;  // first gradient block that belongs to W_hh h
  bool has_c;            // a second state
  bool uses_h;           // h enters other than through W_hh h
  bool saves_h;          // h' itself is what is kept
};

inline constexpr CellInfo kCells[] = {
#define FUSED_RNN_INFO(kind, policy, name)                                                                   \
  {CellKind::kind,       name,          policy::kGates, policy::kSaved, policy::kGrads, policy::kInputShift, \
   policy::kHiddenGrads, policy::kHasC, policy::kUsesH, policy::kSavesH},
    FUSED_RNN_CELLS(FUSED_RNN_INFO)
#undef FUSED_RNN_INFO
};
constexpr int64_t kCellCount = sizeof(kCells) / sizeof(*kCells);

constexpr bool listed_in_order() {
  for (int64_t i = 0; i < kCellCount; ++i) {
    if (static_cast<int64_t>(kCells[i].kind) != i) return false;
  }
  return true;
}
static_assert(listed_in_order(), "FUSED_RNN_CELLS must list the cells in the order of CellKind");

constexpr const CellInfo& cell_info(CellKind kind) {
  switch (kind) {
#define FUSED_RNN_CASE(kind, policy, name) case CellKind::kind:
    FUSED_RNN_CELLS(FUSED_RNN_CASE)
#undef FUSED_RNN_CASE
    break;
  }
  return kCells[static_cast<int64_t>(kind)];
}

}  // namespace fused_rnn
