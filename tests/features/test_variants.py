"""One layer with layer normalisation, zoneout and recurrent dropout, against the specification with the same masks.

The modules are tested in test_variant_modules.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_rnn import layers, reference
from fused_rnn.options import LayerOptions
from tolerances import assert_as_accurate

each_cell = pytest.mark.parametrize("cell", reference.CELLS)

NORMS = ("norm_ih", "norm_hh", "norm_c", "norm_c_bias")
VARIANTS = {
    "norm": {"norm"},
    "zone": {"zone"},
    "constant zone": {"constant zone"},
    "drop": {"drop"},
    "all": {"norm", "zone", "drop"},
}
SIZES = [(5, 3, 4, 7), (4, 17, 3, 33), (1, 2, 3, 5), (12, 1, 4, 40), (3, 26, 5, 80)]


def of_layer(
    cell: str, size: tuple[int, int, int, int], D: int, variant: set[str], P: int = 0, dtype: Any = torch.float64
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments (x, h0, c0, weights) and keywords of `reference.layer`; differentiable tensors require gradients."""
    torch.manual_seed(0)
    T, B, input_size, H = size
    G, P = reference.GATES[cell], P or H

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    weights: list[Tensor | None] = []
    for _ in range(D):
        weights += [draw(G * H, input_size, scale=0.5), draw(G * H, P, scale=P**-0.5), draw(G * H), draw(G * H)]
        weights.append(draw(P, H, scale=H**-0.5) if P != H else None)
    lstm = cell == "lstm"
    more: dict[str, Any] = {}
    if "norm" in variant:
        of_c = [draw(D, H), draw(D, H)] if lstm else [None, None]
        more |= dict(zip(NORMS, (draw(D, G * H), draw(D, G * H), *of_c), strict=True))
    if "drop" in variant:
        more["drop_h"] = torch.bernoulli(torch.full((D, B, P), 0.7, dtype=dtype)) / 0.7
    if "zone" in variant or "constant zone" in variant:
        rows = (T, B) if "zone" in variant else ()
        more["zone_h"] = torch.rand(*rows, D * P, dtype=dtype)
        if lstm:
            more["zone_c"] = torch.rand(*rows, D * H, dtype=dtype)
    return [draw(T, B, input_size), draw(D, B, P), draw(D, B, H) if lstm else None, weights], more


def differentiable(arguments: list[Any], more: dict[str, Any]) -> list[Tensor]:
    x, h0, c0, weights = arguments
    found = [x, h0, c0, *weights, *(more.get(name) for name in (*NORMS, "reset_h", "reset_c"))]
    return [t for t in found if t is not None]


def everything(layer: Any, cell: str, arguments: list[Any], more: dict[str, Any]) -> list[Tensor]:
    """Results and gradients."""
    outputs = [o for o in layer(cell, *arguments, LayerOptions(**more)) if o is not None]
    generator = torch.Generator().manual_seed(3)
    seeds = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    return outputs + list(torch.autograd.grad(outputs, differentiable(arguments, more), seeds))


def assert_as_specified(cell: str, arguments: list[Any], more: dict[str, Any]) -> None:
    actual = everything(layers.layer, cell, arguments, more)
    expected = everything(reference.layer, cell, arguments, {k: v for k, v in more.items() if k != "recompute"})
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
@each_cell
def test_layer(cell: str, size: tuple[int, int, int, int], D: int, variant: set[str]) -> None:
    assert_as_specified(cell, *of_layer(cell, size, D, variant))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_projection(variant: set[str]) -> None:
    assert_as_specified("lstm", *of_layer("lstm", (5, 9, 4, 33), 2, variant, P=20))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@each_cell
def test_resets_and_states_of_every_step(cell: str, variant: set[str]) -> None:
    arguments, more = of_layer(cell, (7, 5, 4, 19), 2, variant)
    more |= {"resets": torch.rand(7, 5) < 0.3, "c_sequence": cell == "lstm"}
    for per_step in ((), (7,)):
        states = [torch.randn(*per_step, 2, 5, 19, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        more |= {"reset_h": states[0], "reset_c": states[1] if cell == "lstm" else None}
        assert_as_specified(cell, arguments, more)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@each_cell
def test_packed(cell: str, variant: set[str]) -> None:
    arguments, more = of_layer(cell, (4, 5, 3, 17), 2, variant)
    sizes = torch.tensor([5, 3, 3, 1])
    present = torch.arange(5) < sizes.unsqueeze(1)
    packed = lambda rows: rows if rows.dim() < 3 else rows[present]  # noqa: E731
    arguments[0] = arguments[0].detach()[present].requires_grad_()
    more |= {name: packed(more[name]) for name in ("zone_h", "zone_c") if name in more}
    assert_as_specified(cell, arguments, more | {"batch_sizes": sizes})


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@each_cell
def test_single_step(cell: str, variant: set[str]) -> None:
    (x, h0, c0, weights), more = of_layer(cell, (1, 6, 3, 9), 1, variant)
    more |= {name: more[name][0] for name in ("drop_h",) if name in more}
    more |= {name: more[name].reshape(-1, 9) for name in ("zone_h", "zone_c") if name in more and more[name].dim() == 3}
    first = [None if t is None else t.detach()[0].requires_grad_() for t in (x, h0, c0)]
    assert_as_specified(cell, [*first, weights], more)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@each_cell
def test_recompute(cell: str, variant: set[str]) -> None:
    arguments, more = of_layer(cell, (5, 3, 4, 7), 2, variant)
    assert_as_specified(cell, arguments, more | {"recompute": True})


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@each_cell
def test_precision(cell: str, variant: set[str], dtype: torch.dtype, threads: int) -> None:
    """As accurate as the specification in torch's own operations, by the rule of tolerances.py."""
    arguments, more = of_layer(cell, (6, 24, 10, 70), 2, variant, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = everything(layers.layer, cell, arguments, more)
    finally:
        torch.set_num_threads(before)
    theirs = everything(reference.layer, cell, arguments, more)
    exact = everything(reference.layer, cell, *in_double(arguments, more))
    results = len(ours) - len(differentiable(arguments, more))
    for index, (a, t, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_as_accurate(a, t, e, f"d{index}" if index >= results else f"result {index}")


def in_double(arguments: list[Any], more: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    def double(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().double().requires_grad_(value.requires_grad)
        return [double(v) for v in value] if isinstance(value, list) else value

    return double(arguments), {name: double(value) for name, value in more.items()}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@each_cell
def test_gradcheck(cell: str, variant: set[str]) -> None:
    """First and second derivatives by finite differences, with fixed masks."""
    (x, h0, c0, weights), more = of_layer(cell, (2, 2, 2, 2), 1, variant)
    inputs = differentiable([x, h0, c0, weights], more)

    def run(*tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        take = lambda t: None if t is None else next(given)  # noqa: E731
        of_call = [take(x), take(h0), take(c0), [take(w) for w in weights]]
        norms = {name: take(more[name]) for name in NORMS if name in more}
        return [o for o in layers.layer(cell, *of_call, LayerOptions(**(more | norms))) if o is not None]

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("D", [1, 2])
@each_cell
def test_gradients_of_some(cell: str, D: int, recompute: bool) -> None:
    """Each gain, each weight and x alone, with the others frozen: first and second derivatives."""
    arguments, more = of_layer(cell, (4, 3, 4, 7), D, {"norm"})
    inputs = differentiable(arguments, more)
    for only in inputs:
        for t in inputs:
            t.requires_grad_(t is only)
        results = []
        for layer, options in ((layers.layer, {"recompute": recompute}), (reference.layer, {})):
            y = layer(cell, *arguments, LayerOptions(**more, **options))[0]
            (first,) = torch.autograd.grad(y.square().sum(), only, create_graph=True)
            plain = torch.autograd.grad(
                layer(cell, *arguments, LayerOptions(**more, **options))[0].square().sum(), only
            )[0]
            (second,) = torch.autograd.grad(first.square().sum(), only)
            results.append((plain, first, second))
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@each_cell
def test_inference(cell: str, variant: set[str]) -> None:
    """Nothing is saved for backward; also with an empty batch."""
    for size in [(5, 9, 4, 33), (5, 0, 4, 33), (1, 1, 1, 1)]:
        arguments, more = of_layer(cell, size, 2, variant)
        with torch.no_grad():
            found, expected = (f(cell, *arguments, LayerOptions(**more)) for f in (layers.layer, reference.layer))
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


@each_cell
def test_masks_whose_strides_say_nothing(cell: str) -> None:
    """With one row per step, a tensor is contiguous whatever its stride between rows."""
    arguments, more = of_layer(cell, (5, 1, 3, 4), 1, {"zone"})
    more = {name: zone.as_strided((5, 1, 4), (4, 1, 1)) for name, zone in more.items()}
    assert all(zone.is_contiguous() for zone in more.values())
    assert_as_specified(cell, arguments, more)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(cell="foo"), "unknown cell 'foo'; the cells are: rnn_tanh, rnn_relu, lstm, gru"),
        (dict(weights=[]), "weights to be w_ih, w_hh, .* of one or two directions, .* got 0"),
        (dict(weights=[torch.zeros(5, 3), None, None, None, None]), r"with a w_hh each, got 5: \[5, 3\], None, None"),
        (dict(x=torch.zeros(0, 2, 3)), r"x to have time steps, got shape \[0, 2, 3\]"),
    ],
    ids=["cell", "no weights", "no w_hh", "no steps"],
)
def test_wrong_arguments_of_the_specification(changes: dict[str, Any], text: str) -> None:
    right = dict(cell="rnn_tanh", x=torch.zeros(7, 2, 3), h0=None, c0=None)
    right["weights"] = [torch.zeros(5, 3), torch.zeros(5, 5), None, None, None]
    with pytest.raises(ValueError, match=text):
        reference.layer(**(right | changes))


def test_wrong_arguments_of_a_step_of_the_specification() -> None:
    x, h, w_ih, w_hh = torch.zeros(2, 3), torch.zeros(2, 5), torch.zeros(20, 3), torch.zeros(20, 5)
    with pytest.raises(ValueError, match="step: expected c to be a tensor for an LSTM, got None"):
        reference.step("lstm", x, h, None, w_ih, w_hh)
    with pytest.raises(ValueError, match="unknown cell 'foo'"):
        reference.step("foo", x, h, None, w_ih, w_hh)
