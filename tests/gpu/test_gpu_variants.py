"""Regularised variants on a GPU: layers against the specification with the same masks, in every precision.

The cases are those of the emulator tests. The reference is computed on the CPU.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

import fused_rnn
from contract import fused_calls, tensors
from fused_rnn import layers, reference
from gpu.timing import tf32_allowed
from test_cuda_variants import CASES, VARIANTS, Inputs, Variant, assert_is_the_specification
from test_gpu import (
    GPU,
    Precision,
    draw,
    each_precision,
    each_sequence,
    errors_belong_to_their_test,  # noqa: F401 - fixtures for every test here
    full_float32,  # noqa: F401
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

# Larger sizes: several blocks, a cluster, weights that do not fit on the chip.
_LARGER = [replace(VARIANTS[2], H=H, D=D) for H, D in ((128, 1), (512, 2), (1024, 1))]
_LARGER += [replace(VARIANTS[-3], H=H, D=1) for H in (512, 1024)]


@each_precision
@pytest.mark.parametrize(("cell", "variant"), [*CASES, *product(reference.CELLS, _LARGER)], ids=str)
def test_is_the_specification(cell: str, variant: Variant, precision: Precision) -> None:
    """Computed twice: the second time is bitwise equal."""
    inputs = Inputs.drawn(cell, variant, precision.dtype)

    def run() -> dict[str, Tensor]:
        found = inputs.on(GPU).results(layers.layer, precision.dtype)
        return {name: value.cpu() for name, value in found.items()}

    with tf32_allowed(precision.tf32):
        actual, again = run(), run()
    assert all(torch.equal(actual[name], again[name]) for name in actual)
    assert_is_the_specification(inputs, actual, precision)


@each_sequence
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_modules(name: str, layer_norm: bool, training: bool) -> None:
    """The fused kernels run; without random masks, the results equal those of torch's operations."""
    torch.manual_seed(0)
    options = dict(zoneout=0.2, recurrent_dropout=0.3, layer_norm=layer_norm, bidirectional=True, num_layers=2)
    module = getattr(fused_rnn, name)(16, 64, **options, device=GPU, backend="fused").train(training)
    x = draw(7, 5, 16).requires_grad_()
    with fused_calls() as calls:
        outputs = tensors(module(x))
        sum(o.square().sum() for o in outputs).backward()
    assert len(calls) >= 4, calls
    assert all(p.grad.isfinite().all() for p in module.parameters()) and x.grad.isfinite().all()
    if not training:
        module.backend = "torch"
        for actual, expected in zip(outputs, tensors(module(x)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@each_sequence
@pytest.mark.parametrize("layer_norm", [False, True])
def test_cuda_graph(name: str, layer_norm: bool) -> None:
    """Masks are drawn anew at every replay; without masks, a replay equals the call."""
    torch.manual_seed(0)
    options = dict(zoneout=0.2, recurrent_dropout=0.3, layer_norm=layer_norm)
    module = getattr(fused_rnn, name)(16, 64, **options, device=GPU, dtype=torch.bfloat16, backend="fused")
    x = draw(7, 5, 16, dtype=torch.bfloat16)

    def call() -> Tensor:
        with torch.no_grad():
            return module(x)[0]

    for training in (True, False):
        module.train(training)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        graph.replay()
        first = captured.clone()
        graph.replay()
        assert torch.equal(captured, first) == (not training)
        if not training:
            assert torch.equal(captured, call())
