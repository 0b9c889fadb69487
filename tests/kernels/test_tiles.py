"""Layers whose products of float32 are computed on tiles, by digits of 8 bits or in bfloat16.

They run in processes of their own, which choose the instruction set `amx_emulated` or, where there is AMX, `amx`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import _C
from processes import python, succeeded, survives
from tolerances import assert_as_accurate

ISAS = _C.supported_cpu_isas()
needs_amx = pytest.mark.skipif("amx" not in ISAS, reason="needs a processor with AMX")
CELLS = ("RNN", "LSTM", "GRU")
SEED = 7


# The functions below are run by processes of their own.


EMULATED = {"FUSED_RNN_CPU_ISA": "amx_emulated"}


def products(precision: str) -> str:
    """The products that a plan names under one of torch's precisions."""
    torch.set_float32_matmul_precision(precision)
    return fused_rnn.plan("lstm", T=4, B=8, I=8, H=16, device="cpu").forward["products"]


def pair(cell: str, *sizes: int, **options: object) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """torch.nn's module, ours and the exact one, of the same weights."""
    torch.manual_seed(SEED)
    theirs = getattr(torch.nn, cell)(*sizes, **options)
    ours = getattr(fused_rnn, cell)(*sizes, **options)
    exact = getattr(torch.nn, cell)(*sizes, **options).double()
    for module in (ours, exact):
        module.load_state_dict(theirs.state_dict())
    return theirs, ours, exact


def results(module: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """The output and the gradients of the input and of the weights, of rows of different lengths."""
    x = x.clone().requires_grad_()
    T, B, _ = x.shape
    packed = pack_padded_sequence(x, torch.tensor([T - b * T // B for b in range(B)]))
    y = module(packed)[0].data
    y.backward(torch.linspace(-1, 2, y.numel()).to(y.dtype).view(y.shape))
    return [y.detach(), x.grad, *[p.grad for p in module.parameters()]]


def digits_add_up() -> None:
    """Through a layer that hands on its input: a value loses what is below 30, or 22, bits of its row's largest."""
    draw = torch.Generator().manual_seed(SEED)
    x = torch.exp2(torch.rand(3, 40, 33, generator=draw) * 24) * (1 + torch.rand(3, 40, 33, generator=draw))
    x = x * torch.exp2(torch.rand(3, 40, 1, generator=draw) * 180 - 110)  # 2^-110 to 2^96
    x[-1, 0, :2] = torch.tensor([0.0, 3.38e38])
    x[-1, 1], x[-1, 2, 3], x[-1, 3] = 0, torch.inf, 1.2e-38
    module = fused_rnn.RNN(33, 33, nonlinearity="relu", bias=False)
    largest = x.amax(-1, keepdim=True)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(33))
        module.weight_hh_l0.zero_()
        for precision, bits in (("highest", 30), ("high", 22)):
            torch.set_float32_matmul_precision(precision)
            y, _ = module(x)
            assert torch.equal(y[-1, :2], x[-1, :2])
            assert y[-1, 2, 3] == torch.inf and y[-1, 2].isnan().sum() == 32  # zero times infinity, as in float32
            kept = (y - x).abs() - x * 2.0**-22 <= largest * 2.0**-bits
            assert kept[:-1].all() and kept[-1, 3:].all()
        torch.set_float32_matmul_precision("medium")
        y, _ = module(x)
        error = ((y - x).abs() / x)[:-1].max().item()
        assert 2.0**-11 < error <= 2.0**-8, error


def is_accurate(cell: str) -> None:
    """Products of four digits are as accurate as float32, of three to 16 bits at least, one of bfloat16 to 8."""
    sizes = [(5, 3, 7, 20), (3, 33, 20, 96), (40, 1, 9, 33), (6, 18, 5, 34)]
    for bidirectional in (False, True):
        for T, B, width, H in sizes:
            theirs, ours, exact = pair(cell, width, H, bidirectional=bidirectional)
            x = torch.randn(T, B, width)
            reference, expected = results(exact, x.double()), results(theirs, x)
            for precision, bound in (("highest", None), ("high", 3e-5), ("medium", 2e-2)):
                torch.set_float32_matmul_precision(precision)
                ours.zero_grad()
                found = results(ours, x)
                for index, (a, b, c) in enumerate(zip(found, expected, reference, strict=True)):
                    what = f"{'d' if index else ''}{index} of {cell} {T, B, width, H}"
                    if bound is None:
                        assert_as_accurate(a, b, c, what)
                        continue
                    error = ((a - c).abs().max() / c.abs().max()).item()
                    assert error < bound and (error > 1e-5 or precision == "high"), (precision, what, error)


def inputs_of(kind: str, T: int, B: int, width: int) -> Tensor:
    if kind == "one-hot":
        return torch.nn.functional.one_hot(torch.randint(width, (T, B)), width).float()
    x = torch.randn(T, B, width)
    if kind == "outliers":
        return x * torch.randn(T, B, width).mul(1.5).exp()
    if kind in UNITS:
        rows = x[1, 1::2] if "some rows" in kind else x
        rows[..., 0] *= UNITS[kind]
    if kind == "a missing value":
        x[1, 2, 3] = 1e7
    if kind == "a large feature beside padding":
        x[:, :-3] = 0
    return x


# Of a feature whose weights are as much smaller, as training makes them.
UNITS = {
    "a large feature": 1e3,
    "a very large feature": 1e6,
    "a large feature in some rows": 1e6,
    "a large feature beside padding": 1e6,
}
KINDS_OF_INPUT = ("dense", "one-hot", "outliers", "a missing value", "loss at the end", *UNITS)


def is_exact_for_any_input(cell: str) -> None:
    """Whether three digits are enough, or four, or none are."""
    sizes = [(64, 32, 64, 256), (35, 32, 28, 200)] if _C.cpu_isa() == "amx" else [(8, 20, 64, 72)]
    for T, B, width, H in sizes:
        for kind in KINDS_OF_INPUT:
            theirs, ours, exact = pair(cell, width, H)
            with torch.no_grad():
                for module in (theirs, ours, exact):
                    weight = module.weight_ih_l0
                    weight[:, 0] = (weight[:, 0].float() / UNITS.get(kind, 1)).to(weight.dtype)
            x, dy = inputs_of(kind, T, B, width), torch.randn(T, B, H)
            if kind == "loss at the end":
                dy[:-1] = 0
            found = []
            for module in (theirs, ours, exact):
                of_dtype = x.to(module.weight_hh_l0.dtype).requires_grad_()
                y = module(of_dtype)[0]
                found.append([y, *torch.autograd.grad((y * dy).sum(), [of_dtype, *module.parameters()])])
            for index, (a, b, c) in enumerate(zip(*found, strict=True)):
                what = f"{'d' if index else ''}{index} of {cell} {T, B, width, H}, {kind}"
                assert_as_accurate(b, a, c, what)


def treats_special_values_as_torch(cell: str) -> None:
    """An infinity, a NaN or a huge number in the input, the state or a weight, in one row of many."""
    T, B, width, H = 2, 19, 9, 34
    for value in (float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 3e38, 1e-40, 1e-30):
        for place in ("x", "h", "w_ih", "w_hh"):
            theirs, ours, _ = pair(cell, width, H)
            x, h = torch.randn(T, B, width), torch.randn(1, B, H)
            with torch.no_grad():
                for module in (theirs, ours):
                    dict(w_ih=module.weight_ih_l0, w_hh=module.weight_hh_l0).get(place, torch.zeros(9, 9))[3, 5] = value
                {"x": x[1], "h": h[0]}.get(place, torch.zeros(9, 9))[4, 5] = value
                hx = (h, torch.zeros(1, B, H)) if cell == "LSTM" else h
                for precision in ("highest", "high"):
                    torch.set_float32_matmul_precision(precision)
                    found, expected = ours(x, hx)[0], theirs(x, hx)[0]
                    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6, equal_nan=True)


def rows_are_independent(cell: str) -> None:
    """Bit for bit, whatever else is in the batch, of deterministic layers."""
    torch.use_deterministic_algorithms(True)
    _, module, _ = pair(cell, 20, 40)
    x = torch.randn(2, 50, 20)
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        with torch.no_grad():
            whole = module(x)[0]
            for rows in (slice(0, 1), slice(7, 24), slice(17, 50)):
                assert torch.equal(module(x[:, rows].contiguous())[0], whole[:, rows])


def follows_torchs_switches() -> None:
    """The general one, and before it the one for recurrent layers."""
    switch = torch.backends.mkldnn.rnn
    assert [products(p) for p in ("highest", "high", "medium")] == ["int8x10", "int8x6", "bfloat16"]
    module, x = fused_rnn.LSTM(8, 16), torch.randn(4, 8, 8)
    outputs = {}
    with torch.no_grad():
        for own in ("ieee", "tf32", "bf16"):
            switch.fp32_precision = own
            outputs[own] = module(x)[0]
        assert products("medium") == "bfloat16"
        switch.fp32_precision = "ieee"
        assert products("medium") == "int8x10"
        switch.fp32_precision = "none"
        for general, own in (("highest", "ieee"), ("high", "tf32"), ("medium", "bf16")):
            torch.set_float32_matmul_precision(general)
            assert torch.equal(module(x)[0], outputs[own])
    assert len({tuple(y.flatten().tolist()) for y in outputs.values()}) == 3
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # torch then refuses get_float32_matmul_precision()
    assert torch.equal(module(x)[0], outputs["ieee"])
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    assert torch.equal(module(x)[0], outputs["bf16"])
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    for dtype, expected in ((torch.bfloat16, "bfloat16"), (torch.float64, "float64"), (torch.float16, "int8x10")):
        assert fused_rnn.plan("gru", dtype, 4, 8, 8, 16, device="cpu").forward["products"] == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_rnn.plan("gru", T=4, B=8, I=8, H=16, device="cpu").forward["products"] == "bfloat16"
        halves = module(x)[0]
    assert halves.dtype is torch.bfloat16 and torch.equal(halves, outputs["bf16"].bfloat16())
    with pytest.raises(RuntimeError, match="precision must be between 0 and 2, got 3"):
        torch.ops.fused_rnn.forward(x, None, None, 2, False, *module._flat_weights, precision=3)


def single_steps_keep_float32(cell: str) -> None:
    """In modules and cells, with and without a gradient, batched or not: the same as at the highest precision."""
    module, of_cell = getattr(fused_rnn, cell)(40, 40), getattr(fused_rnn, f"{cell}Cell")(40, 40)
    x = torch.randn(9, 40)
    found = []
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        results: list[object] = [module(x.unsqueeze(0))[0]]
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                for rows in (x, x[0]):
                    results.append(module.step(rows)[0])
                    # torch's own function trains an RNN's cell, and follows the switch on a processor with AMX.
                    if not (grad and cell == "RNN"):
                        results.append(of_cell(rows))
        found.append(results)
        for kind in ("step", "cell", "sequence"):
            plan = fused_rnn.plan(cell.lower(), T=1, B=9, I=40, H=40, kind=kind, requires_grad=False, device="cpu")
            assert plan.forward["products"] == "int8x10"
    for results in found[1:]:
        torch.testing.assert_close(results, found[0], rtol=0, atol=0)


def test_digits_add_up() -> None:
    survives(digits_add_up, **EMULATED)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("isa", ["amx_emulated", pytest.param("amx", marks=needs_amx)])
def test_layers_are_exact_for_any_input(isa: str, cell: str) -> None:
    survives(is_exact_for_any_input, cell, FUSED_RNN_CPU_ISA=isa, OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def checks() -> Iterator[dict[tuple[str, str], Future[None]]]:
    """The checks of each cell, in processes of one thread, of which two run at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            (check.__name__, cell): pool.submit(survives, check, cell, **EMULATED, OMP_NUM_THREADS="1")
            for check in (is_accurate, treats_special_values_as_torch, rows_are_independent, single_steps_keep_float32)
            for cell in CELLS
        }


@pytest.mark.parametrize("cell", CELLS)
def test_layers_are_as_accurate_as_asked(cell: str, checks: dict[tuple[str, str], Future[None]]) -> None:
    checks["is_accurate", cell].result()


@pytest.mark.parametrize("cell", CELLS)
def test_special_values(cell: str, checks: dict[tuple[str, str], Future[None]]) -> None:
    checks["treats_special_values_as_torch", cell].result()


@pytest.mark.parametrize("cell", CELLS)
def test_a_row_does_not_depend_on_the_others(cell: str, checks: dict[tuple[str, str], Future[None]]) -> None:
    checks["rows_are_independent", cell].result()


@pytest.mark.parametrize("cell", CELLS)
def test_single_steps_keep_float32(cell: str, checks: dict[tuple[str, str], Future[None]]) -> None:
    checks["single_steps_keep_float32", cell].result()


def test_torchs_switches() -> None:
    survives(follows_torchs_switches, **EMULATED)


@pytest.mark.slow("runs the tests of all options of a layer on emulated tiles")
def test_options_of_a_layer() -> None:
    tests = [Path(__file__).parents[1] / "features" / f"test_{name}.py" for name in ("variants", "segments")]
    succeeded(python("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, **EMULATED))


# The processor's own tiles


def tiles_survive_forks_threads_and_signals() -> None:
    """The permission is inherited, every thread has tiles of its own, and a signal handler may use them, too."""
    torch.set_num_threads(1)
    layer, x = fused_rnn.LSTM(64, 256), torch.randn(8, 32, 64)
    plan = fused_rnn.plan("lstm", T=8, B=32, I=64, H=256, device="cpu").forward
    assert (plan["instruction_set"], plan["products"]) == ("amx", "int8x10")

    def output() -> Tensor:
        with torch.no_grad():
            return layer(x)[0]

    expected = output()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(output(), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    right: list[bool] = []

    def compare() -> None:
        right.extend(torch.equal(output(), expected) for _ in range(50))

    def handle(*_: object) -> None:
        right.append(torch.equal(output(), expected))
        signal.setitimer(signal.ITIMER_REAL, 0.001)  # not a repeating timer: on a busy machine, handlers would nest

    threads = [threading.Thread(target=compare) for _ in range(4)]
    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    for thread in threads:
        thread.start()
    compare()
    for thread in threads:
        thread.join()
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    assert len(right) > 250 and all(right)


@needs_amx
def test_tiles_survive_forks_threads_and_signals() -> None:
    survives(tiles_survive_forks_threads_and_signals, FUSED_RNN_CPU_ISA="amx")
