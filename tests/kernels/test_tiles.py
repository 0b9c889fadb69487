"""Products of float32 on tiles: their instructions, digits of 8 bits, and layers that are computed with them.

AMX's tiles are emulated in software, which any machine can run; where there is AMX, both must agree bit for bit. The
layers run in processes of their own, which choose the instruction set `amx_emulated`.
"""

from __future__ import annotations

import os
import platform
import random
import re
import shutil
import signal
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
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


# The instruction for bfloat16


def number(bits: int) -> float:
    """The float32 with these bits."""
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def rounded(exact: Fraction, negative_zero: bool) -> float:
    """The nearest float32, ties to even; what is tiny after rounding is a zero of its sign."""
    if exact == 0:
        return -0.0 if negative_zero else 0.0
    sign, size = (-1 if exact < 0 else 1), abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    size = round(size / unit) * unit  # of Fraction: ties to even
    if size >= Fraction(2) ** 128:
        return sign * float("inf")
    return sign * (float(size) if size >= Fraction(2) ** -126 else 0.0)


def multiply_add(a: float, b: float, c: float) -> float:
    """a b + c, rounded once; subnormal operands are zeros."""
    a, b, c = (v if abs(v) >= 2.0**-126 or v != v else v * 0.0 for v in (a, b, c))
    if any(v != v or abs(v) == float("inf") for v in (a, b, c)):
        return a * b + c
    negative = struct.pack("<d", a * b)[7] >= 128 and struct.pack("<d", c)[7] >= 128
    return rounded(Fraction(a) * Fraction(b) + Fraction(c), negative)


def expected_tile(sums: list[float], a: list[float], b: list[float], rows: int) -> list[float]:
    """What tdpbf16ps is documented to compute."""
    result = []
    for m in range(rows):
        for n in range(16):
            even = odd = 0.0
            for k in range(16):
                even = multiply_add(a[m * 32 + 2 * k], b[k * 32 + 2 * n], even)
                odd = multiply_add(a[m * 32 + 2 * k + 1], b[k * 32 + 2 * n + 1], odd)
            result.append(multiply_add(1.0, multiply_add(1.0, even, odd), sums[m * 16 + n]))
    return result


def in_range(draw: random.Random, low: int, high: int) -> int:
    """A bfloat16 whose biased exponent is in the range."""
    return draw.getrandbits(1) << 15 | draw.randint(low, high) << 7 | draw.getrandbits(7)


# Biased exponents of a, of b, and of the sums.
KINDS: dict[str, tuple[Callable[[random.Random], int], Callable[[random.Random], int], tuple[int, int]]] = {
    "ordinary": (lambda d: in_range(d, 120, 134), lambda d: in_range(d, 120, 134), (120, 134)),
    "any": (lambda d: in_range(d, 0, 254), lambda d: in_range(d, 0, 254), (0, 254)),
    "nan": (lambda d: d.getrandbits(16), lambda d: d.getrandbits(16), (0, 255)),
    "tiny": (lambda d: in_range(d, 60, 72), lambda d: in_range(d, 50, 64), (0, 4)),
    "sparse": (
        lambda d: 0 if d.random() < 0.9 else in_range(d, 58, 66),
        lambda d: 0 if d.random() < 0.9 else in_range(d, 58, 66),
        (0, 4),
    ),
    "huge": (lambda d: in_range(d, 185, 195), lambda d: in_range(d, 185, 195), (254, 254)),
    "subnormal": (lambda d: in_range(d, 0, 1), lambda d: in_range(d, 120, 134), (0, 1)),
}


def drawn_tiles(kind: str, rows: int, seed: int) -> tuple[list[int], list[int], list[int]]:
    """The bits of sums, a and b."""
    draw = random.Random(seed)
    of_a, of_b, (low, high) = KINDS[kind]
    sums = [draw.getrandbits(1) << 31 | draw.randint(low, high) << 23 | draw.getrandbits(23) for _ in range(rows * 16)]
    return sums, [of_a(draw) for _ in range(rows * 32)], [of_b(draw) for _ in range(512)]


def tile_product(isa: str, sums: list[int], a: list[int], b: list[int]) -> list[int]:
    """The bits of sums + a b."""
    packed = [struct.pack(f"<{len(sums)}I", *sums), struct.pack(f"<{len(a)}H", *a), struct.pack(f"<{len(b)}H", *b)]
    found = _C.tile_product(isa, *packed)
    return list(struct.unpack(f"<{len(sums)}I", found))


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_emulation_computes_what_is_documented(kind: str, rows: int) -> None:
    sums, a, b = drawn_tiles(kind, rows, SEED)
    found = [number(bits) for bits in tile_product("amx_emulated", sums, a, b)]
    expected = expected_tile(
        [number(u) for u in sums], [number(u << 16) for u in a], [number(u << 16) for u in b], rows
    )
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        same = one != one if other != other else struct.pack("<f", one) == struct.pack("<f", other)
        assert same, (index, one, other)


def test_results_just_below_the_least_normal_number_are_zeros() -> None:
    """Tiny is judged after rounding to 24 bits: one last place below 2^-126 is tiny, half of one rounds up to it."""
    for exponent, expected in ((-149, 0.0), (-150, 0.0), (-151, 2.0**-126)):
        a, b = [0] * 32, [0] * 512
        a[0], b[0] = 1 << 7, 127 << 7  # 2^-126 * 1
        a[2], b[32] = 0x8000 | (127 + exponent + 60) << 7, (127 - 60) << 7  # -2^exponent
        found = number(tile_product("amx_emulated", [0] * 16, a, b)[0])
        assert found == expected, exponent


def test_a_nan_is_the_first_operand_made_quiet() -> None:
    a, b = [0x3F80] * 32, [0x3F80] * 512
    a[4] = 0x7F81  # signalling
    assert tile_product("amx_emulated", [0] * 16, a, b)[0] == 0x7FC10000
    a[4], b[4 // 2 * 32] = 0x7F80, 0  # infinity times zero
    assert tile_product("amx_emulated", [0] * 16, a, b)[0] == 0xFFC00000


@needs_amx
@pytest.mark.parametrize("kind", KINDS)
def test_the_processor_agrees_with_the_emulation(kind: str) -> None:
    for seed in range(200):
        for rows in (1, 7, 16):
            tiles = drawn_tiles(kind, rows, seed)
            assert tile_product("amx", *tiles) == tile_product("amx_emulated", *tiles), (seed, rows)


@pytest.mark.skipif("avx512_bf16" not in ISAS, reason="this processor has no AVX512-BF16")
@pytest.mark.parametrize("rows", range(1, 17))
def test_vector_instructions_multiply_the_same_tiles(rows: int) -> None:
    """In another order, whose rounding errors are small against the sum of the products' sizes."""
    sums, a, b = drawn_tiles("ordinary", rows, SEED)
    found = torch.tensor([number(u) for u in tile_product("avx512_bf16", sums, a, b)]).double().view(rows, 16)
    left = torch.tensor([number(u << 16) for u in a]).double().view(rows, 32)
    right = torch.tensor([number(u << 16) for u in b]).double().view(16, 16, 2).transpose(1, 2).reshape(32, 16)
    before = torch.tensor([number(u) for u in sums]).double().view(rows, 16)
    scale = before.abs() + left.abs() @ right.abs()
    assert ((found - (before + left @ right)).abs() <= 8 * 2.0**-24 * scale).all()


def test_what_does_not_fit_a_tile_is_refused() -> None:
    good = [bytes(16 * 4), bytes(32 * 2), bytes(512 * 2)]
    assert _C.tile_product("amx_emulated", *good) == good[0]
    for bad in ([bytes(17 * 64), bytes(17 * 64), good[2]], [b"", b"", good[2]], [good[0], good[1], bytes(1022)]):
        with pytest.raises(ValueError, match="sums must be float32"):
            _C.tile_product("amx_emulated", *bad)
    with pytest.raises(ValueError, match="'portable' multiplies nothing narrower"):
        _C.tile_product("portable", *good)


# The instruction for digits


def drawn_digits(digits: int, rows: int, depth: int) -> tuple[Tensor, Tensor]:
    """Digits of a, [depth, digit, row, k], and of b, [depth, digit, k / 4, column, k % 4]; the largest in some rows."""
    draw = torch.Generator().manual_seed(SEED)
    a = torch.randint(-128, 128, (depth, digits, rows, 64), dtype=torch.int8, generator=draw)
    b = torch.randint(-128, 128, (depth, digits, 16, 16, 4), dtype=torch.int8, generator=draw)
    a[:, :, 0], b[:, :, :, 0] = -128, -128
    return a, b


@pytest.mark.parametrize("isa", ["amx_emulated", pytest.param("amx", marks=needs_amx)])
@pytest.mark.parametrize("digits", [3, 4])
@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_levels_of_digits_are_exact(isa: str, digits: int, depth: int, rows: int) -> None:
    a, b = drawn_digits(digits, rows, depth)
    found = _C.digit_product(isa, a.numpy().tobytes(), b.numpy().tobytes(), digits, rows)
    levels = torch.frombuffer(bytearray(found), dtype=torch.int32).view(digits + 1, 16, 16)[:, :rows].long()
    levels[digits - 1] += levels[digits]  # the last level comes in two parts
    left = a.long().transpose(0, 1).transpose(1, 2).flatten(2)  # [digit, row, k]
    right = b.long().transpose(0, 1).transpose(3, 4).flatten(1, 3)  # [digit, k, column]
    for level in range(digits):
        expected = sum(left[i] @ right[level - i] for i in range(level + 1))
        assert torch.equal(levels[level], expected)
        assert expected.abs().max() <= 2**24


def test_digits_that_do_not_fit_a_tile_are_refused() -> None:
    a, b = (t.numpy().tobytes() for t in drawn_digits(3, 16, 4))
    more = a + a[: 3 * 1024], b + b[: 3 * 1024]
    for bad in (
        (a, b, 3, 15),
        (a, b, 3, 0),
        (a, b[: 3 * 1024], 4, 16),
        (a[:-1], b, 3, 16),
        (a, b[:-1], 3, 16),
        (*more, 3, 16),
    ):
        with pytest.raises(ValueError, match="a must be int8"):
            _C.digit_product("amx_emulated", *bad)
    with pytest.raises(ValueError, match="there are 3 or 4 digits"):
        _C.digit_product("amx_emulated", a, b, 5, 16)
    for isa in {"portable", "avx512_bf16"} & set(ISAS):
        with pytest.raises(ValueError, match=f"'{isa}' (does not multiply digits|multiplies nothing)"):
            _C.digit_product(isa, a, b, 3, 16)


# Layers. The functions below are run by processes of their own.


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
            lost = (y - x).abs() - x * 2.0**-22
            assert (lost[:-1] <= largest[:-1] * 2.0**-bits).all() and (
                lost[-1, 3:] <= largest[-1, 3:] * 2.0**-bits
            ).all()
        torch.set_float32_matmul_precision("medium")
        y, _ = module(x)
        error = ((y - x).abs() / x)[:-1].max().item()
        assert 2.0**-11 < error <= 2.0**-8, error


def is_accurate(cell: str) -> None:
    """Ten products of digits are as accurate as float32, six to 16 bits at least, one of bfloat16 to 8."""
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
        # torch's own function computes an RNN's step in training, and follows the switch on a processor with AMX.
        for grad in (False,) if cell == "RNN" else (False, True):
            with torch.set_grad_enabled(grad):
                for rows in (x, x[0]):
                    results += [module.step(rows)[0], of_cell(rows)]
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


def test_the_compiled_tile_instructions_are_valid() -> None:
    """The three tiles of a product differ; the processor refuses others."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed (Debian, Ubuntu: apt install binutils)")
    if platform.machine() != "x86_64":
        pytest.skip("this processor is not an x86-64, which alone has AMX")
    library = Path(fused_rnn.__file__).parent / "_cpu.so"
    text = subprocess.run(["objdump", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    products = re.findall(r"(tdpbf16ps|tdpbssd) +%tmm(\d),%tmm(\d),%tmm(\d)", text)
    assert {name for name, *_ in products} == {"tdpbf16ps", "tdpbssd"}
    assert all(len(set(tiles)) == 3 for _, *tiles in products)
    assert "tilerelease" in text


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
