"""Results are bitwise equal from run to run. Under torch.use_deterministic_algorithms(True) they also do not depend on
the other rows of the batch or on the number of threads; without it, both may change the rounding.

The gradient of a weight is a sum over the batch, so for it only the number of threads is varied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fused_rnn
from cases import Case
from test_isa import assert_same_rounding
from test_properties import padded

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}

# A row alone is below every limit from which forward packs weights or multiplies x beforehand; some of the batches are
# above. With more than 128 inputs or units, sums consist of several parts.
_SIZES = [
    dict(T=1, B=3, I=4, H=7),
    dict(T=1, B=17, I=20, H=33),
    dict(T=3, B=2, I=5, H=20),
    dict(T=9, B=5, I=140, H=33, L=2),
    dict(T=9, B=26, I=20, H=150, bidirectional=True),
    dict(T=3, B=4, I=300, H=140, bias=False, given_states=False),
    dict(T=6, B=4, I=20, H=48, L=2, bidirectional=True, lengths=(1, 6, 3, 3)),
    dict(T=9, B=9, I=7, H=40, batch_first=True, given_states=False, lengths=(9, 2, 1, 4, 4, 9, 8, 1, 3)),
]
CASES = [Case(cell, **size) for cell in ("RNN", "LSTM", "GRU") for size in _SIZES]
CASES += [Case("LSTM", T=5, B=9, I=10, H=150, proj_size=140), Case("LSTM", T=2, B=3, I=4, H=20, proj_size=9)]
CASES += [replace(CASES[3], nonlinearity="relu")]
WIDE = [Case(cell, T=2, B=3, I=20, H=1040) for cell in ("RNN", "LSTM", "GRU")]  # more than one depth of a panel


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def of_row(case: Case, data: list[Tensor], row: int) -> list[Tensor]:
    """x, h0 and c0 of one row, up to its own length."""
    x, *states = data
    length = case.lengths[row] if case.lengths else case.T
    x = x[row : row + 1, :length] if case.batch_first else x[:length, row : row + 1]
    return [x, *(s[:, row : row + 1] for s in states)]


def run(case: Case, module: torch.nn.Module, data: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs (padded) and states, gradients of the inputs, gradients of the weights; every row has the same loss."""
    data = [t.detach().requires_grad_() for t in data]
    x, *states = data
    output, finals = padded(case, module, x, states)
    results = [output, *finals]
    loss = sum((r * torch.linspace(-1, 2, r.size(-1), dtype=r.dtype)).sum() for r in results)
    grads = torch.autograd.grad(loss, [*data, *module.parameters()])
    return [r.detach() for r in results], list(grads[: len(data)]), list(grads[len(data) :])


def alone_and_in_the_batch(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, states and gradients of the inputs, of every row alone and in the batch."""
    _, module, _ = case.modules(dtype)
    data = case.data(dtype)
    results, grads, _ = run(case, module, data)
    time = replace(case, lengths=None)
    found, expected = [], []
    for row in range(case.B):
        y, dx, _ = run(time, module, of_row(case, data, row))
        found += [*y, *dx]
        expected += [*of_row(case, results, row), *of_row(case, grads, row)]
    return found, expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_is_the_same_in_any_batch(case: Case, dtype: str, deterministic: None) -> None:
    for alone, together in zip(*alone_and_in_the_batch(case, DTYPES[dtype]), strict=True):
        assert torch.equal(alone, together)


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_a_wide_row_is_the_same_in_any_batch(case: Case, deterministic: None) -> None:
    for alone, together in zip(*alone_and_in_the_batch(case, torch.float32), strict=True):
        assert torch.equal(alone, together)


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_the_switch_a_batch_changes_the_rounding_only(case: Case, dtype: str) -> None:
    assert_same_rounding(*alone_and_in_the_batch(case, DTYPES[dtype]))


# Enough work for several threads, split by rows, by units, or by directions.
LARGE = [
    dict(T=4, B=33, I=20, H=96),
    dict(T=9, B=34, I=20, H=96, lengths=tuple(1 + b % 9 for b in range(34))),
    dict(T=20, B=1, I=150, H=300),
    dict(T=20, B=7, I=33, H=200),
    dict(T=9, B=3, I=20, H=165, bidirectional=True),
    dict(T=1, B=5, I=300, H=500),
]
LARGE_CASES = [Case(cell, **size) for cell in ("RNN", "LSTM", "GRU") for size in LARGE]
LARGE_CASES += [Case("LSTM", T=9, B=33, I=20, H=96, proj_size=40), Case("LSTM", T=20, B=3, I=20, H=200, proj_size=70)]


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_any_number_of_threads(case: Case, dtype: str, deterministic: None) -> None:
    """Outputs, states and every gradient, including those of the weights."""
    _, module, _ = case.modules(DTYPES[dtype])
    data = case.data(DTYPES[dtype])
    first: list[Tensor] = []
    for threads in (1, 1, 2, 5):
        torch.set_num_threads(threads)
        results = [t for kind in run(case, module, data) for t in kind]
        first = first or results
        for found, expected in zip(results, first, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_a_row_of_a_cell(name: str, grad: bool, deterministic: None) -> None:
    torch.manual_seed(0)
    cell, x, h = getattr(fused_rnn, name)(33, 50), torch.randn(9, 33, requires_grad=True), torch.randn(9, 50)

    def call(rows: slice) -> list[Tensor]:
        with torch.set_grad_enabled(grad):
            result = cell(x[rows], (h[rows], h[rows]) if name == "LSTMCell" else h[rows])
        results = list(result) if isinstance(result, tuple) else [result]
        if grad:
            results += torch.autograd.grad(sum(r.sin().sum() for r in results), x, retain_graph=True)[0][rows, None]
        return results

    whole = call(slice(0, 9))
    for row in range(9):
        alone = call(slice(row, row + 1))
        for found, expected in zip(alone[: len(whole) - 9 * grad], whole, strict=False):
            assert torch.equal(found[0], expected[row])
        if grad:
            assert torch.equal(alone[-1], whole[len(whole) - 9 + row])


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_one_step_is_the_first_of_a_sequence(cell: str, deterministic: None) -> None:
    """`step` in a rollout is bitwise equal to forward in training."""
    torch.manual_seed(0)
    module, x = getattr(fused_rnn, cell)(20, 33, 2), torch.randn(4, 3, 20)
    with torch.no_grad():
        output, last = module(x)
        hx = None
        for t in range(4):
            y, hx = module.step(x[t], hx)
            assert torch.equal(y, output[t])
    for found, expected in zip(hx if cell == "LSTM" else [hx], last if cell == "LSTM" else [last], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_rows_with_resets_and_lengths(cell: str, deterministic: None) -> None:
    torch.manual_seed(0)
    T, B = 6, 5
    module = getattr(fused_rnn, cell)(10, 40, bidirectional=True)
    data, resets, lengths = torch.randn(T, B, 10), torch.rand(T, B) < 0.3, torch.tensor([6, 2, 6, 1, 4])

    def call(x: Tensor, resets: Tensor, lengths: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        output, last, states = module(x, resets=resets, lengths=lengths, return_state_sequence=True)
        results = [output, *(last if cell == "LSTM" else [last]), *(states if cell == "LSTM" else [states])]
        return [*results, *torch.autograd.grad(sum(r.sin().sum() for r in results), x)]

    whole = call(data, resets, lengths)
    for row in range(B):
        rows = slice(row, row + 1)
        for found, expected in zip(call(data[:, rows], resets[:, rows], lengths[rows]), whole, strict=True):
            dim = 1 if expected.dim() == 3 else 2
            assert torch.equal(found, expected.narrow(dim, row, 1))
