"""Denormal numbers count as zeros inside the kernels, and only there.

On some processors an operation on a denormal number takes a hundred times as long (`benchmarks/denormals.py` measures
it). Results with denormal numbers must equal those with zeros, and torch's setting must be unchanged afterwards.
`kernel_check.cpp` checks the processor's control register itself, on every instruction set.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fused_rnn

CELLS = ["RNN", "LSTM", "GRU"]
SCALES = {torch.float32: 1e-39, torch.float64: 1e-309}
SIZES = {"rows": (16, 24, 64, 128), "units": (16, 1, 64, 256), "step": (1, 40, 64, 128)}  # T, B, I, H
"""Large enough for two threads; `rows` and `units` are what each thread has a share of."""


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Restore the number of threads and torch's setting."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def keeps_denormals(numbers: int) -> bool:
    """Whether torch computes with denormal numbers, on this thread (few `numbers`) or on all threads (many)."""
    return bool((torch.full((numbers,), 2e-39) * 0.5).bool().all())


def results(module: torch.nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Outputs, states and every gradient."""
    x = x.clone().requires_grad_()
    y, hidden = module(x)
    gradients = torch.autograd.grad([y], [x, *module.parameters()], [dy])
    return [y, *(hidden if isinstance(hidden, tuple) else [hidden]), *gradients]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", SCALES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_denormal_numbers_give_the_results_of_zeros(cell: str, dtype: torch.dtype, size: str, threads: int) -> None:
    torch.set_num_threads(threads)
    T, B, I, H = SIZES[size]  # noqa: E741 - the field's symbol
    torch.manual_seed(0)
    theirs = getattr(torch.nn, cell)(I, H, bias=False, dtype=dtype)
    module = fused_rnn.from_torch(theirs)
    x, dy = torch.randn(T, B, I, dtype=dtype), torch.randn(T, B, H, dtype=dtype)
    scale = SCALES[dtype]
    for a, b in (((scale * x, dy), (0 * x, dy)), ((x, scale * dy), (x, 0 * dy))):
        for found, expected in zip(results(module, *a), results(module, *b), strict=True):
            assert torch.equal(found, expected)
    with torch.no_grad():
        assert theirs(scale * x)[0].any()  # in torch.nn, denormal input has non-zero results
        assert not module(scale * x)[0].any()
        assert not module.step(scale * x[0])[0].any()
        for weight in module.parameters():
            weight.mul_(scale)
        assert not module(x)[0].any()
    assert not any(found.any() for found in results(module, x, scale * dy))
    assert keeps_denormals(1) and keeps_denormals(1_000_000)


@pytest.mark.parametrize("threads", [1, 2])
def test_torchs_own_setting_is_kept(threads: int) -> None:
    torch.set_num_threads(threads)
    module, x = fused_rnn.GRU(64, 128), torch.randn(16, 24, 64)
    for flushes in (True, False):
        if not torch.set_flush_denormal(flushes):
            pytest.skip("torch has no set_flush_denormal on this processor")
        assert keeps_denormals(1) != flushes
        module(x)[0].sum().backward()
        with torch.no_grad():
            module.step(x[0])
        assert keeps_denormals(1) != flushes
