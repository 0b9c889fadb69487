"""The choice between kernels and torch.nn: `plan` predicts it for thousands of calls, and each rule has its effect."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from contract import fused_calls
from fused_rnn import autograd, operators, policy
from tuned_calls import set_outrun_mkl as set_outrun_mkl

pytestmark = pytest.mark.usefixtures("one_thread")

BF16, F16 = torch.bfloat16, torch.float16
SEED_COUNT, CALLS = 4, 600


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the operators that computed something so far."""
    names: list[str] = []

    def counted(name: str, operator: Any) -> Any:
        def run(*arguments: Any) -> Any:
            results = operator(*arguments)
            if (results is not None or name == "_step_into") and not is_torchs_step(results):
                names.append(name)
            return results

        return run

    def is_torchs_step(results: Any) -> bool:
        y = results[0] if isinstance(results, tuple) else None
        return isinstance(y, torch.Tensor) and type(y.grad_fn).__name__ in ("TanhBackward0", "ReluBackward0")

    for name in ("plain", "in_one_call", "forward_operator", "step", "_step_into"):
        monkeypatch.setattr(operators, name, counted(name, getattr(operators, name)))
    monkeypatch.setattr(autograd, "stack", counted("stack", autograd.stack))
    yield names


def drawn_call(draw: random.Random) -> tuple[dict[str, Any], Any]:
    """Random arguments of `plan`, and the matching call; sizes lie on both sides of every rule's limits."""
    name, kind = draw.choice(("RNN", "LSTM", "GRU")), draw.choice(("sequence", "packed", "step", "cell"))
    dtype = draw.choice((torch.float32, torch.float32, torch.float64, BF16, BF16, F16))
    T = 1 if kind in ("step", "cell") else draw.choice((1, 2, 4, 9))
    B, H = draw.choice((1, 2, 3, 8, 9)), draw.choice((4, 64, 128, 400, 640))
    backend = "auto" if kind == "cell" else draw.choice(("auto", "auto", "auto", "fused", "torch"))
    directions = 1 if kind in ("step", "cell") else draw.choice((1, 2))
    options: dict[str, Any] = {} if kind == "cell" else {"backend": backend, "bidirectional": directions == 2}
    module = getattr(fused_rnn, f"{name}Cell" if kind == "cell" else name)(5, H, dtype=dtype, **options)
    frozen = draw.random() < 0.3
    module.requires_grad_(not frozen)
    x = torch.randn(T, B, 5, dtype=dtype)
    if kind == "packed":
        x = pack_padded_sequence(x, torch.full((B,), T))
    call = (lambda: module.step(x[0])) if kind == "step" else (lambda: module(x[0] if kind == "cell" else x))
    cell = "rnn_tanh" if name == "RNN" else name.lower()
    question = dict(cell=cell, dtype=dtype, T=T, B=B, I=5, H=H, kind=kind, bidirectional=directions == 2)
    return question | {"backend": backend, "requires_grad": not frozen, "device": "cpu"}, call


@pytest.mark.parametrize("seed", range(SEED_COUNT))
def test_plan_names_what_runs(seed: int, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    # Drawing random weights would take half of this test's time.
    monkeypatch.setattr(torch.nn.init, "uniform_", lambda weight, *_: torch.nn.init.zeros_(weight))
    seen = set()
    for _ in range(CALLS):
        monkeypatch.setattr(policy, "HAS_BF16_PRODUCTS", draw.random() < 0.7)
        unit = draw.choice(("", "", "avx512_bf16", "amx"))
        monkeypatch.setattr(policy, "bf16_unit", lambda unit=unit: unit)
        question, call = drawn_call(draw)
        half = draw.choice((None, None, BF16, F16))
        deterministic, grad = draw.random() < 0.15, draw.random() < 0.6
        torch.use_deterministic_algorithms(deterministic)
        try:
            with (
                torch.set_grad_enabled(grad),
                nullcontext() if half is None else torch.autocast("cpu", half),
            ):
                plan = fused_rnn.plan(**question)
                ran.clear()
                with suppress(RuntimeError):  # from torch.nn: oneDNN does not support every dtype on every processor
                    call()
        finally:
            torch.use_deterministic_algorithms(False)
        context = f"{question}, autocast {half}, deterministic {deterministic}, grad {grad}: {plan}, ran {set(ran)}"
        assert (plan.backend == "fused") == bool(ran), context
        assert plan.reason, context
        seen.add((question["kind"], half is None, plan.backend))
    assert len([case for case in seen if case[1]]) == 8  # without autocast, each kind ran on both
    assert any(backend == "torch" for _, plain, backend in seen if not plain)


def test_a_profiler_sees_the_same() -> None:
    """The operators that the test above counts are all that exist."""
    draw = random.Random(9)
    for _ in range(40):
        question, call = drawn_call(draw)
        plan = fused_rnn.plan(**question)
        with fused_calls() as calls, suppress(RuntimeError):
            call()
        assert (plan.backend == "fused") == bool(calls), (question, plan, calls)


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_rules_for_cells_in_training(cell: str, set_outrun_mkl: Callable[[bool], None]) -> None:
    """torch's own function where its autograd nodes decide: small cells of an RNN, or all where MKL is as fast."""
    is_rnn = cell.startswith("rnn")
    for outrun in (True, False):
        set_outrun_mkl(outrun)
        for B in (1, 16, 23, 24, 64):
            by_torch = is_rnn and not (outrun and B >= 24)  # which counts as 32
            for kind, expected in (("cell", by_torch), ("step", False)):  # with torch's, a step would have two views
                plan = fused_rnn.plan(cell, torch.float32, 1, B, 8, 64, kind=kind, device="cpu")
                assert plan.backend == ("torch" if expected else "fused")
            of_16_bits = fused_rnn.plan(cell, torch.bfloat16, 1, B, 8, 64, kind="cell", device="cpu")
            assert of_16_bits.backend == ("torch" if is_rnn and B == 1 else "fused")  # torch multiplies those slowly
            if is_rnn:
                for cells in (fused_rnn, torch.nn):
                    with fused_calls() as calls, fused_rnn.patched():
                        cells.RNNCell(8, 64, nonlinearity=cell[4:])(torch.randn(B, 8))
                    assert len(calls) == (not by_torch)
                for num_layers in (1, 2):
                    rnn, x = fused_rnn.RNN(8, 64, num_layers, nonlinearity=cell[4:]), torch.randn(B, 8)
                    with fused_calls() as calls:
                        y, h = rnn.step(x, torch.zeros(num_layers, B, 64))
                    assert calls
                    expected_y, expected_h = rnn(x[None])
                    torch.testing.assert_close((y, h), (expected_y[0], expected_h))


def test_rules_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors with bfloat16 products that the kernels do not use, torch.nn computes large layers."""

    def backend(cell: str, T: int, B: int, H: int, **options: Any) -> str:
        return fused_rnn.plan(cell, torch.float32, T, B, 8, H, device="cpu", **options).backend

    monkeypatch.setattr(policy, "bf16_unit", lambda: "")  # of the kernels
    for products, expected in ((True, "torch"), (False, "fused")):
        monkeypatch.setattr(policy, "HAS_BF16_PRODUCTS", products)
        with torch.autocast("cpu", BF16):
            assert backend("lstm", 50, 64, 256) == expected
            assert backend("gru", 50, 64, 1024) == expected
            assert backend("lstm", 5, 1, 64) == "fused"
            assert backend("gru", 50, 4, 256) == "fused"
            assert backend("gru", 1, 64, 512, kind="cell") == expected  # in training
            assert backend("gru", 1, 64, 512, kind="cell", requires_grad=False) == "fused"
        with torch.autocast("cpu", F16):
            assert backend("gru", 50, 64, 1024) == "fused"


def test_rules_for_kernels_that_multiply_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """They leave little to torch.nn: oneDNN's LSTM on one thread."""

    def backend(cell: str, H: int, B: int = 64, **options: Any) -> str:
        return fused_rnn.plan(cell, BF16, 50, B, 8, H, device="cpu", **options).backend

    monkeypatch.setattr(policy, "HAS_BF16_PRODUCTS", True)
    for unit, expected in (
        ("avx512_bf16", "torch"),
        ("amx", "torch"),
        ("amx_emulated", "fused"),
    ):
        monkeypatch.setattr(policy, "bf16_unit", lambda unit=unit: unit)
        assert backend("lstm", 128) == expected
        assert backend("lstm", 512, requires_grad=False) == expected
        assert backend("lstm", 544) == backend("lstm", 128, B=2) == backend("gru", 1024) == "fused"
        assert backend("rnn", 512, requires_grad=False) == "fused"
    monkeypatch.setattr(policy, "bf16_unit", lambda: "amx")
    assert backend("lstm", 100) == "fused"  # oneDNN has no tiles for such widths


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind must be one of 'sequence', 'packed', 'step', 'cell', got 'loop'"):
        fused_rnn.plan("lstm", kind="loop")
