"""The instructions that multiply tiles, one tile at a time.

AMX's are emulated in software, which any machine can run; where there is AMX, both must agree bit for bit.
"""

from __future__ import annotations

import platform
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fused_rnn
from fused_rnn import _C

ISAS = _C.supported_cpu_isas()
needs_amx = pytest.mark.skipif("amx" not in ISAS, reason="needs a processor with AMX")
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
@pytest.mark.parametrize(("planes", "products"), [(3, 6), (4, 6), (3, 8), (4, 8), (4, 10)])
@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_levels_of_digits_are_exact(isa: str, planes: int, products: int, depth: int, rows: int) -> None:
    a, b = drawn_digits(planes, rows, depth)
    found = _C.digit_product(isa, a.numpy().tobytes(), b.numpy().tobytes(), planes, products, rows)
    digits, count = {6: (3, 3), 8: (3, 4), 10: (4, 4)}[products]
    levels = torch.frombuffer(bytearray(found), dtype=torch.int32).view(digits + 1, 16, 16)[:, :rows].long()
    if count == digits:  # the last level comes in two parts
        levels[digits - 1] += levels[digits]
    left = a.long().transpose(0, 1).transpose(1, 2).flatten(2)  # [digit, row, k]
    right = b.long().transpose(0, 1).transpose(3, 4).flatten(1, 3)  # [digit, k, column]
    for level in range(count):
        expected = sum(left[i] @ right[level - i] for i in range(digits) if 0 <= level - i < digits)
        assert torch.equal(levels[level], expected)
        assert expected.abs().max() <= 2**24


def test_digits_that_do_not_fit_a_tile_are_refused() -> None:
    a, b = (t.numpy().tobytes() for t in drawn_digits(3, 16, 4))
    more = a + a[: 3 * 1024], b + b[: 3 * 1024]
    for bad in (
        (a, b, 3, 6, 15),
        (a, b, 3, 6, 0),
        (a, b[: 3 * 1024], 4, 6, 16),
        (a[:-1], b, 3, 6, 16),
        (a, b[:-1], 3, 6, 16),
        (*more, 3, 6, 16),
    ):
        with pytest.raises(ValueError, match="a must be int8"):
            _C.digit_product("amx_emulated", *bad)
    for planes, products in ((5, 10), (3, 10), (2, 6), (3, 7), (3, 0)):
        with pytest.raises(ValueError, match="there are 6, 8 or 10 products"):
            _C.digit_product("amx_emulated", a, b, planes, products, 16)
    for isa in {"portable", "avx512_bf16"} & set(ISAS):
        with pytest.raises(ValueError, match=f"'{isa}' (does not multiply digits|multiplies nothing)"):
            _C.digit_product(isa, a, b, 3, 6, 16)


# What the compiler made of them


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
