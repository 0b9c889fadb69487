"""Stress tests: many Python threads, thousands of calls, NaN and infinity at any place.

Concurrent calls must equal the same calls one after the other, memory must not grow, and special values must spread as
in torch.nn and within their row. Denormal numbers are tested in test_denormals.py, hostile arguments in test_fuzz.py,
forks in test_isa.py.
"""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fused_rnn
from processes import survives

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = ["RNN", "LSTM", "GRU"]


def pair(cell: str, *args: int, **options: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch.nn's module and ours, with the same weights."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, cell)(*args, **options)
    return theirs, fused_rnn.from_torch(theirs)


# Many Python threads


@pytest.mark.parametrize("threads_of_torch", [1, 2])
def test_python_threads_through_one_module_and_many(threads_of_torch: int) -> None:
    """Forward, backward, packed input, steps and cells at once, large and small, on shared and separate modules."""
    torch.set_num_threads(threads_of_torch)
    shared = [getattr(fused_rnn, cell)(16, 96, bidirectional=True) for cell in CELLS]
    shared_cell = fused_rnn.GRUCell(16, 32)

    def call(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        T, B = 1 + seed % 7, (1, 3, 8, 33)[seed % 4]
        x = torch.randn(T, B, 16, generator=generator).requires_grad_()
        module = shared[seed % 3]
        own = getattr(fused_rnn, CELLS[seed % 3])(16, 24, num_layers=2)
        with torch.no_grad():
            for weight in own.parameters():
                weight.copy_(torch.linspace(-0.2, 0.2, weight.numel()).view_as(weight))
        found = []
        for m in (module, own):
            output, _ = m(x, resets=torch.rand(T, B, generator=generator) < 0.2 if seed % 2 else None)
            found += [output.detach(), *torch.autograd.grad(output.sin().sum(), [x, *m.parameters()])]
        with torch.no_grad():
            found += [shared_cell(x[0]), own(x, lengths=torch.arange(B) % (T + 1))[0], own.step(x[0])[0]]
        return found

    expected = [call(seed) for seed in range(48)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            for found, wanted in zip(pool.map(call, range(48)), expected, strict=True):
                for a, b in zip(found, wanted, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Memory


def resident_kilobytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def leaks_nothing() -> None:
    """10,000 rounds of inference, training, resets and lengths, steps and errors, in a process of their own."""
    torch.set_num_threads(1)
    x, h, done, lengths = torch.randn(4, 3, 5), torch.zeros(2, 3, 7), torch.rand(4, 3) < 0.3, torch.tensor([4, 0, 2])
    modules = [(getattr(fused_rnn, c)(5, 7, bidirectional=True), getattr(fused_rnn, c)(5, 7)) for c in CELLS]

    def call(number: int) -> None:
        module, stepped = modules[number % 3]
        state = (h, h) if number % 3 == CELLS.index("LSTM") else h
        with torch.inference_mode():
            module(x)
            stepped.step(x[0])
        more = dict(resets=done, reset_state=state, lengths=lengths, return_state_sequence=True)
        module(x, state, **more if number % 2 else {})[0].sum().backward()
        module.zero_grad()
        with pytest.raises(RuntimeError):
            torch.ops.fused_rnn.forward(x, None, None, 2, True, x, x)

    sizes = []
    for number in range(10_001):
        call(number)
        if number in (2_000, 10_000):
            sizes.append(resident_kilobytes())
    assert sizes[1] - sizes[0] < 800, f"{sizes[0]} KB, then {sizes[1]} KB"  # 100 bytes per round


def test_no_leak() -> None:
    survives(leaks_nothing)


# NaN and infinity


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("T", "B"), [(1, 1), (1, 9), (3, 2), (9, 1), (6, 5), (4, 30)])
@pytest.mark.parametrize("cell", CELLS)
def test_special_values_in_weights(cell: str, T: int, B: int, value: float) -> None:
    """Zero states are multiplied, too: zero times infinity is NaN. In the first block of units, and in the last."""
    names = ("weight_ih_l0", "weight_hh_l0", "weight_hh_l0_reverse", "bias_hh_l0")
    for name, unit in product(names, (3, 139)):
        theirs, ours = pair(cell, 4, 140, bidirectional=True)
        with torch.no_grad():
            theirs.get_parameter(name)[unit] = value
        x = torch.randn(T, B, 4)
        torch.testing.assert_close(ours(x)[0], theirs(x)[0], equal_nan=True)
        with torch.no_grad():
            torch.testing.assert_close(ours(x)[0], theirs(x)[0], equal_nan=True)


@pytest.mark.parametrize("cell", ["RNNCell", "LSTMCell", "GRUCell"])
def test_special_values_in_a_cells_weights(cell: str) -> None:
    theirs, ours = pair(cell, 4, 20)
    with torch.no_grad():
        theirs.weight_hh[3, 5] = float("nan")
        for B in (1, 5, 40):
            x = torch.randn(B, 4)
            torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["x", "h", "dy"])
@pytest.mark.parametrize("B", [3, 30])
@pytest.mark.parametrize("cell", CELLS)
def test_a_row_with_special_values_leaves_the_others_alone(cell: str, B: int, what: str, value: float) -> None:
    """Outputs, states and input gradients of the other rows are bitwise unchanged."""
    _, module = pair(cell, 6, 20, bidirectional=True)
    x, h, dy = torch.randn(5, B, 6), torch.randn(2, B, 20), torch.randn(5, B, 40)
    tensors = {"x": x, "h": h, "dy": dy}

    def call() -> list[Tensor]:
        of_input, state = x.clone().requires_grad_(), h.clone().requires_grad_()
        output, last = module(of_input, (state, state) if cell == "LSTM" else state)
        grads = torch.autograd.grad([output], [of_input, state], [dy])
        return [output.detach(), *(last if cell == "LSTM" else [last]), *grads]

    expected = call()
    tensors[what][1 if what != "h" else 0, 1] = value
    found, others = call(), [b for b in range(B) if b != 1]
    assert not all(torch.equal(a[:, 1], b[:, 1]) for a, b in zip(found, expected, strict=True))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[:, others], b[:, others])
