// A cell by its number, its place in FUSED_RNN_CELLS, which costs an operator call less than a name.
#pragma once

#include "../cells/cell_info.h"
#include "check.h"

namespace fused_rnn {
namespace bindings {

inline const CellInfo& cell_by_number(int64_t number) {
  if (number >= 0 && number < kCellCount) return kCells[number];
  std::string names;
  for (const CellInfo& cell : kCells) {
    names += (names.empty() ? "" : ", ") + std::to_string(static_cast<int64_t>(cell.kind)) + " (" + cell.name + ")";
  }
  fail("unknown cell ", number, "; the cells are: ", names);
}

}  // namespace bindings
}  // namespace fused_rnn
