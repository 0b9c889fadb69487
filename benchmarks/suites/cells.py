"""The suite `cells`: one step at a time in a Python loop, as in reinforcement learning and streaming.

A loop over torch.nn's RNNCell, LSTMCell or GRUCell is compared with two others: a loop over fused_rnn's
cell of the same name ("cell" in the name of the row), and one over `step` of fused_rnn's RNN, LSTM or GRU.
The state is given; training goes back through the whole loop.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from harness.measurement import FUSED, TORCH, Measurement, Row
from harness.shapes import Shape
from harness.speed import measure_time
from harness.suite import Method, Suite
from harness.workload import build_cell, build_module, one_call, random_input, random_state, state_sizes

STEPS = 32
SHAPES = [Shape(f"b{B}_h{H}", T=STEPS, B=B, I=H, H=H, L=1) for B in (1, 16, 64) for H in (16, 64, 256)]


def cell_loop(row: Row, side: str) -> Callable[[], Tensor]:
    """A call that runs a cell for one step after the other."""
    cell = build_cell(side, row)
    steps = random_input(row).unbind(0)
    state = random_state(row, state_sizes(row.shape)[1:])
    is_lstm = row.cell == "lstm"

    def loop() -> Tensor:
        hx = state
        outputs = []
        for x_t in steps:
            hx = cell(x_t, hx)
            outputs.append(hx[0] if is_lstm else hx)
        return torch.stack(outputs)

    return one_call(row, cell, loop)


def step_loop(row: Row) -> Callable[[], Tensor]:
    """A call that runs `step` of fused_rnn's module for one step after the other."""
    module = build_module(FUSED, row)
    give_weights_of_cell(module, build_cell(TORCH, row))
    steps = random_input(row).unbind(0)
    state = random_state(row, state_sizes(row.shape))

    def loop() -> Tensor:
        hx = state
        outputs = []
        for x_t in steps:
            y, hx = module.step(x_t, hx)
            outputs.append(y)
        return torch.stack(outputs)

    return one_call(row, module, loop)


def give_weights_of_cell(module: nn.Module, cell: nn.Module) -> None:
    """Copy a cell's weights into a module of one layer, whose parameters are called weight_ih_l0 and so on."""
    module.load_state_dict({f"{name}_l0": weight for name, weight in cell.state_dict().items()})


def measure(row: Row, method: Method) -> Measurement:
    fused = partial(cell_loop, row, FUSED) if row.call == "cell" else partial(step_loop, row)
    return measure_time(row, {TORCH: partial(cell_loop, row, TORCH), FUSED: fused}, method)


def refusal(shape: Shape) -> str | None:
    """Why a requested shape cannot be measured; None if it can."""
    return "a cell has one layer and one direction" if shape.L > 1 or shape.bidirectional else None


SUITE = Suite(
    name="cells",
    quantity="time",
    unit="s",
    shapes=SHAPES,
    measure=measure,
    calls=("cell", "step"),
    refusal=refusal,
)
