"""The cells as the kernels know them: their numbers and constants, which csrc/cells states.

The specification, `fused_rnn.reference`, has its own list and gate counts; a test compares the two.
"""

from __future__ import annotations

from fused_rnn import _C

CELLS = {info["name"]: info for info in _C.cells()}
"""Each cell's constants by its name, in the order of the cells' numbers."""

NAMES = tuple(CELLS)
"""A cell's name by its number."""

NUMBER = {name: number for number, name in enumerate(NAMES)}
"""How the operators name a cell."""

GATES = {name: info["gates"] for name, info in CELLS.items()}
"""Row blocks of ``w_ih`` and ``w_hh`` per cell."""
