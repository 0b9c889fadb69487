"""Backward of a long sequence, which is split into chunks of steps, has the gradients of the specification.

At these sizes every cell has two chunks (`chunks` in csrc/cpu/dispatch.cpp).
"""

from __future__ import annotations

import pytest
import torch

from test_variants import assert_as_specified, each_cell, of_layer

BATCH, HIDDEN = 104, 132


def size_of(cell: str) -> tuple[int, int, int, int]:
    return 20 if cell.startswith("rnn") else 11, BATCH, 3, HIDDEN


@pytest.mark.parametrize("threads", [1, 2])
@each_cell
def test_layer(cell: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_as_specified(cell, *of_layer(cell, size_of(cell), 1, set()))
    finally:
        torch.set_num_threads(before)


@each_cell
def test_zero_states(cell: str) -> None:
    (x, _, _, weights), more = of_layer(cell, size_of(cell), 1, set())
    assert_as_specified(cell, [x, None, None, weights], more)


@each_cell
def test_variants(cell: str) -> None:
    assert_as_specified(cell, *of_layer(cell, size_of(cell), 1, {"norm", "zone", "drop"}))


@pytest.mark.parametrize("per_step", [False, True], ids=["one state", "a state for each step"])
@each_cell
def test_resets_and_states_of_every_step(cell: str, per_step: bool) -> None:
    arguments, more = of_layer(cell, size_of(cell), 1, set())
    steps, lstm = size_of(cell)[0], cell == "lstm"
    shape = (*([steps] if per_step else []), 1, BATCH, HIDDEN)
    states = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    more |= {"reset_h": states[0], "reset_c": states[1] if lstm else None, "c_sequence": lstm}
    assert_as_specified(cell, arguments, more | {"resets": torch.rand(steps, BATCH) < 0.1})


@pytest.mark.parametrize("size", [(31, 104, 3, 132), (5650, 1, 2, 70)], ids=["several rows", "one row"])
def test_three_chunks(size: tuple[int, int, int, int]) -> None:
    """A chunk between two others, with weights that are read without packing."""
    assert_as_specified("rnn_tanh", *of_layer("rnn_tanh", size, 1, set()))


@pytest.mark.parametrize("P", [20, 150], ids=["narrower", "wider than H, as only the operator takes it"])
def test_projection(P: int) -> None:
    assert_as_specified("lstm", *of_layer("lstm", size_of("lstm"), 1, {"zone"}, P=P))
