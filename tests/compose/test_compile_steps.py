"""torch.compile of single time steps: the cells, also in a Python loop, and `step`, also in a rollout.

Graphs are whole and compiled once, as in test_compile.py; a loop over time is unrolled.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract import CELL_MODULES, close, pair
from test_compile import HIDDEN, INPUT, built, drawn, same, whole
from test_compile import one_compiler as one_compiler

slow = pytest.mark.slow("torch.compile takes seconds a case")


@pytest.mark.parametrize("key", CELL_MODULES)
def test_cells(key: str) -> None:
    """Cells need no switch that allows recurrent modules in graphs."""
    _, cell = pair(key, sizes=(INPUT, HIDDEN))
    compiled, graphs = whole(cell)
    states = 2 if isinstance(cell, nn.LSTMCell) else 1
    with torch._dynamo.config.patch(allow_rnn=False):
        for B in (7, 8):
            h = [torch.randn(B, HIDDEN, requires_grad=True) for _ in range(states)]
            same(compiled, cell, torch.randn(B, INPUT, requires_grad=True), tuple(h) if states == 2 else h[0])
    assert (graphs.traced, graphs.forward, graphs.backward) == (
        ["layer.default"], ["forward.default"], ["backward.default"],
    )  # fmt: skip


@slow
@pytest.mark.parametrize("key", CELL_MODULES)
def test_a_loop_of_cells(key: str) -> None:
    """The loop is unrolled: one graph for any batch, one per number of steps."""
    _, cell = pair(key, sizes=(INPUT, HIDDEN))

    def loop(input: Tensor, h: Any) -> Any:
        for t in range(input.size(0)):
            h = cell(input[t], h)
        return h

    compiled, graphs = whole(loop)
    for B in (7, 8):
        h = torch.randn(B, HIDDEN)
        input, hx = torch.randn(4, B, INPUT), (h, h + 1) if isinstance(cell, nn.LSTMCell) else h
        close(compiled(input, hx), loop(input, hx))
    assert graphs.traced == ["layer.default"] * 4
    assert graphs.count == 1


def step_arguments(model: Any, B: int) -> tuple[Tensor, Any, dict[str, Any]]:
    _, hx, values = drawn(model, 9, B)
    masks = {"resets": torch.rand(B) < 0.5, "active": torch.rand(B) < 0.7}
    return torch.randn(B, INPUT, requires_grad=True), hx, masks | {"reset_state": values["learned"]}


@slow
@pytest.mark.parametrize(
    ("key", "names"),
    [("rnn_tanh", ""), ("lstm_batch_first", ""), ("gru", "resets"), ("lstm", "resets active reset_state")],
)
def test_step(key: str, names: str) -> None:
    """`module.step` itself is passed to torch.compile."""
    model = built(key).rnn
    compiled, graphs = whole(model.step)
    for B in (7, 8):
        input, hx, values = step_arguments(model, B)
        options = {name: values[name] for name in names.split()}
        close(compiled(input, hx, **options), model.step(input, hx, **options))
    assert graphs.traced == ["layer.default"] * model.num_layers
    assert graphs.backward == ["backward.default"] * model.num_layers


@slow
@pytest.mark.parametrize("key", ["lstm", "gru"])
def test_steps_in_a_rollout(key: str) -> None:
    model = built(key)

    class Rollout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input: Tensor, hx: Any, resets: Tensor, active: Tensor) -> Any:
            outputs = []
            for t in range(input.size(0)):
                y, hx = self.inner.rnn.step(self.inner.before(input[t]), hx, resets=resets[t], active=active[t])
                outputs.append(y)
            return torch.stack(outputs), hx

    rollout = Rollout()
    compiled, graphs = whole(rollout)
    for B in (7, 8):
        input, hx, _ = drawn(model.rnn, 2, B)
        same(compiled, rollout, input, hx, torch.rand(2, B) < 0.3, torch.rand(2, B) < 0.7)
    assert graphs.traced == ["layer.default"] * 2
    assert graphs.backward == ["backward.default"] * 2


@slow
def test_a_step_into_given_tensors() -> None:
    """A compiled step with `out` writes its results into the given tensors."""
    model = built("gru").rnn

    def step(input: Tensor, hx: Tensor, y: Tensor) -> Any:
        return model.step(2 * input, hx, out=(y, hx))

    compiled, graphs = whole(step)
    with torch.no_grad():
        for B in (7, 8):
            input, hx = torch.randn(B, INPUT), torch.randn(1, B, HIDDEN)
            wanted = model.step(2 * input, hx)
            y = torch.empty(B, HIDDEN)
            compiled(input, hx, y)
            close((y, hx), wanted)
    assert graphs.traced == ["layer.default"]
