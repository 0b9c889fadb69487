"""Regularised variants on the CUDA path under the emulator: recurrent dropout, zoneout and layer normalisation.

They are compared with the specification with the same masks in float64; the specification's error in the same dtype
sets the tolerance. Covers resets, lengths and packed rows, on resident kernels and those with one product per step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import emulated
import fused_rnn
from contract import tensors
from emulated import gpu as gpu
from emulated import patch_operators
from fused_rnn import layers, operators, policy, reference
from fused_rnn.options import EVERY_STEP, LayerOptions
from fused_rnn.reference import GATES
from operator_calls import by_name
from test_gpu import PRECISIONS, Precision, farther, rounded_to_tf32
from test_variants import NORMS
from tolerances import assert_as_accurate

pytestmark = emulated.marks


@dataclass(frozen=True)
class Variant:
    """The options of one layer. `zone` is "masks" or "expectation"; `rows` "padded", "segments", "packed" or "step"."""

    drop: bool = False
    zone: str = ""
    norms: str = ""  # letters of "ihc": norms of W_ih x, W_hh h, c
    rows: str = "padded"
    D: int = 1
    H: int = 20
    resident: bool = True

    def __str__(self) -> str:
        options = [("drop", self.drop), (f"zone {self.zone}", self.zone), (f"norms {self.norms}", self.norms)]
        names = [name for name, on in options if on]
        return ", ".join([*names, self.rows, f"D{self.D}H{self.H}", *([] if self.resident else ["steps"])])


VARIANTS = [
    Variant(drop=True),
    Variant(zone="masks", D=2),
    Variant(drop=True, zone="masks", rows="segments", D=2, H=37),
    Variant(drop=True, zone="masks", rows="segments", D=2, H=37, resident=False),
    Variant(drop=True, zone="masks", rows="packed", D=2, H=140),
    Variant(zone="expectation", rows="packed", resident=False),
    Variant(drop=True, zone="expectation", norms="i", rows="packed", D=2),
    Variant(norms="ihc", D=2, H=37),
    Variant(norms="h", rows="segments", D=2),
    Variant(norms="c", rows="segments", H=300),
    Variant(drop=True, zone="masks", norms="ihc", rows="segments", D=2, H=37),
    Variant(drop=True, zone="masks", norms="ihc", rows="packed", D=2),
    Variant(drop=True, zone="masks", norms="ihc", rows="step"),
]
CASES = [(cell, v) for cell in reference.CELLS for v in VARIANTS if cell == "lstm" or v.norms != "c"]
# f16 and f32 differ from other precisions only in the number format and need fewer cases.
EMULATED = [(*case, name) for name in PRECISIONS for case in (CASES[::3] if name in ("f16", "f32") else CASES)]
T, B, SIZE = 4, 6, 5


@dataclass(frozen=True)
class Inputs:
    """Inputs of one layer: differentiable tensors by name, and masks, resets and lengths."""

    cell: str
    tensors: dict[str, Tensor]
    steering: dict[str, Any]

    @staticmethod
    def drawn(cell: str, v: Variant, dtype: torch.dtype) -> Inputs:
        generator = torch.Generator().manual_seed(3)
        D, H, G, c = v.D, v.H, GATES[cell], cell == "lstm"
        sizes = torch.tensor([B, B - 1, 3, 2])
        shape = {"packed": (int(sizes.sum()),), "step": (B,)}.get(v.rows, (T, B))

        def draw(*sizes: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(sizes, generator=generator) * scale).to(dtype)

        def masks(*sizes: int, keep: float) -> Tensor:
            return torch.empty(sizes).bernoulli_(keep, generator=generator).to(dtype)

        state = (B, H) if v.rows == "step" else (D, B, H)
        tensors = {"x": draw(*shape, SIZE), "h0": draw(*state)} | ({"c0": draw(*state)} if c else {})
        steering: dict[str, Any] = {} if v.resident else {"instance": EVERY_STEP}
        if v.rows == "packed":
            steering["batch_sizes"] = sizes
        if v.rows in ("segments", "packed"):
            steering["resets"] = torch.rand(*shape, generator=generator) < 0.3
            per_step = (T,) if v.rows == "segments" else ()
            for name in ("reset_h", "reset_c")[: 1 + c]:
                tensors[name] = draw(*per_step, D, B, H)
        if v.rows == "segments":
            steering["lengths"] = torch.tensor([4, 0, 3, 4, 1, 2])
            steering["c_sequence"] = c
        if v.drop:
            steering["drop_h"] = masks(*state, keep=0.7) / 0.7
        for name in ("zone_h", "zone_c")[: 1 + c] if v.zone else ():
            steering[name] = (
                masks(*shape, D * H, keep=0.6) if v.zone == "masks" else torch.full((D * H,), 0.6, dtype=dtype)
            )
        for name, letter, size in (("ih", "i", G * H), ("hh", "h", G * H), ("c", "c", H)):
            if letter in v.norms and (c or letter != "c"):
                tensors[f"norm_{name}"] = 1 + draw(D, size, scale=0.3)
        if "norm_c" in tensors:
            tensors["norm_c_bias"] = draw(D, H, scale=0.3)
        for d in range(D):
            for name, *size in (("w_ih", G * H, SIZE), ("w_hh", G * H, H), ("b_ih", G * H), ("b_hh", G * H)):
                tensors[f"{name} {d}"] = draw(*size, scale=H**-0.5)
        return Inputs(cell, tensors, steering)

    def on(self, device: str) -> Inputs:
        def there(name: str, value: Any) -> Any:  # batch_sizes stay on the CPU, as in a PackedSequence
            return value.to(device) if isinstance(value, Tensor) and name != "batch_sizes" else value

        tensors = {name: t.to(device) for name, t in self.tensors.items()}
        return replace(self, tensors=tensors, steering={name: there(name, v) for name, v in self.steering.items()})

    def mapped(self, of_tensors: Callable[[Tensor], Tensor], of_masks: Callable[[Tensor], Tensor]) -> Inputs:
        def masked(value: Any) -> Any:
            return of_masks(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        tensors = {name: of_tensors(t) for name, t in self.tensors.items()}
        return replace(self, tensors=tensors, steering={name: masked(value) for name, value in self.steering.items()})

    def outputs(self, layer: Callable) -> dict[str, Tensor]:
        inputs = self.tensors
        D = sum(name.startswith("w_ih") for name in inputs)
        weights = [inputs.get(f"{w} {d}") for d in range(D) for w in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")]
        states = {name: inputs[name] for name in ("reset_h", "reset_c") if name in inputs}
        norms = {name: inputs[name] for name in NORMS if name in inputs}
        lengths = self.steering.get("lengths")
        x = inputs["x"]
        if lengths is not None:  # padding is zeroed, as the modules do
            x = torch.where((torch.arange(T, device=x.device).unsqueeze(1) < lengths).unsqueeze(2), x, 0.0)
        options = LayerOptions(**norms, **states, **self.steering)
        outputs = layer(self.cell, x, inputs["h0"], inputs.get("c0"), weights, options)
        return {name: o for name, o in zip(("y", "h_n", "c_n", "c_sequence"), outputs, strict=False) if o is not None}

    def results(self, layer: Callable, dtype: torch.dtype) -> dict[str, Tensor]:
        """Outputs and all gradients."""
        inputs = {name: t.detach().clone().requires_grad_() for name, t in self.tensors.items()}
        found = replace(self, tensors=inputs).outputs(layer)
        generator = torch.Generator().manual_seed(2)
        starts = [torch.randn(o.shape, generator=generator).to(dtype).to(o) for o in found.values()]
        grads = torch.autograd.grad(list(found.values()), list(inputs.values()), starts)
        found |= {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}
        return {name: value.detach() for name, value in found.items()}


def ways_taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list that each later call of an operator extends: True if a resident kernel ran."""
    found: list[bool] = []

    def noted(operator: Callable, *arguments: Any) -> Any:
        results = operator(*arguments)
        found.append(emulated.last_was_resident())
        return results

    patch_operators(
        monkeypatch, *(partial(noted, o) for o in (operators.forward_operator, operators.backward_operator))
    )
    return found


@pytest.mark.parametrize(("cell", "variant", "name"), EMULATED, ids=str)
def test_is_the_specification(cell: str, variant: Variant, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    precision = PRECISIONS[name]
    dtype = precision.dtype
    emulated.use(monkeypatch, tf32=precision.tf32)
    ways = ways_taken(monkeypatch)
    inputs = Inputs.drawn(cell, variant, dtype)
    actual = inputs.results(layers.layer, dtype)
    with torch.no_grad():
        inference = inputs.outputs(layers.layer)
    resident = variant.resident and variant.rows != "step" and not set(variant.norms) & set("hc")
    assert ways == [resident and (dtype.itemsize == 2 or precision.tf32)] * 3  # forward, backward, inference
    for (
        output,
        value,
    ) in inference.items():  # within rounding: torch's CPU products may depend on the alignment of memory
        torch.testing.assert_close(value, actual[output], msg=output)
    assert_is_the_specification(inputs, actual, precision)


def assert_is_the_specification(inputs: Inputs, actual: dict[str, Tensor], precision: Precision) -> None:
    """Compare `actual` with the specification on `inputs`, which are on the CPU."""
    cell, dtype = inputs.cell, precision.dtype
    expected = inputs.results(reference.layer, dtype)
    exact = inputs.mapped(Tensor.double, Tensor.double).results(reference.layer, dtype)
    if precision.tf32:
        rounded = inputs.mapped(lambda t: rounded_to_tf32(t).double(), Tensor.double).results(reference.layer, dtype)
        expected = {name: farther(expected[name], rounded[name].float(), exact[name]) for name in expected}
    assert actual.keys() == exact.keys()
    for name, value in exact.items():
        if name.startswith("d") and cell == "rnn_relu" and (dtype.itemsize == 2 or precision.tf32):
            continue  # near relu's kink, rounding decides on which side a value lies, and the gradient jumps
        if dtype is torch.float64:
            torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-11, msg=name)
        else:
            assert_as_accurate(actual[name], expected[name], value, name)


OPTIONS = [
    dict(zoneout=0.3, recurrent_dropout=0.4, num_layers=2),
    dict(layer_norm=True, bidirectional=True, recompute="full"),
    dict(layer_norm=True, zoneout=0.2, recurrent_dropout=0.3, weight_dropout=0.3, bidirectional=True, num_layers=2),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options))
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_modules(name: str, options: dict[str, Any], training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same seed, CPU and CUDA paths draw the same masks; first and second derivatives agree."""
    torch.manual_seed(0)
    module = getattr(fused_rnn, name)(SIZE, 12, **options, dtype=torch.float64, backend="fused").train(training)
    x = torch.randn(T, B, SIZE, dtype=torch.float64, requires_grad=True)
    lengths, resets = torch.tensor([4, 0, 3, 4, 1, 2]), torch.rand(T, B) < 0.3
    ways = ways_taken(monkeypatch)

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        outputs = tensors(module(x, lengths=lengths, resets=resets, return_state_sequence=True))
        weighed = sum((o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in outputs)
        inputs = [x, *module.parameters()]
        grads = torch.autograd.grad(weighed, inputs, retain_graph=True)
        (dx,) = torch.autograd.grad(weighed, x, create_graph=True)
        return [*outputs, *grads, *torch.autograd.grad(dx.square().sum(), inputs, allow_unused=True)]

    actual, calls = run(), len(ways)
    monkeypatch.setattr(policy, "fusible", lambda *tensors: False)
    expected = run()
    assert calls == len(ways) >= 2 * module.num_layers
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


def test_autocast_casts_the_gains() -> None:
    torch.manual_seed(0)
    module = fused_rnn.LSTM(SIZE, 12, layer_norm=True, zoneout=0.2, recurrent_dropout=0.2, backend="fused")
    with torch.autocast("cpu", torch.bfloat16):
        y, (h, c) = module(torch.randn(T, B, SIZE))
    assert y.dtype is h.dtype is c.dtype is torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype is torch.float32 and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("variant", [VARIANTS[2], VARIANTS[3], VARIANTS[-3]], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_fake_kernels_agree(cell: str, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake kernels and operators agree in shapes, strides and dtypes."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    def noted(name: str) -> Callable:
        operator = getattr(torch.ops.fused_rnn_emulator, name).default

        def call(*arguments: Any) -> Any:
            calls.append((operator, arguments))
            return operator(*arguments)

        return call

    patch_operators(monkeypatch, noted("forward"), noted("backward"))
    Inputs.drawn(cell, variant, torch.bfloat16).results(layers.layer, torch.bfloat16)
    assert len(calls) == 2
    for operator, arguments in calls:
        detached = tree_map_only(Tensor, Tensor.detach, arguments)
        torch.library.opcheck(operator, detached, test_utils="test_faketensor")


def test_bad_calls_raise() -> None:
    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(sizes).bfloat16()

    def call(cell: int = 2, **options: Any) -> Any:
        rows = GATES[reference.CELLS[cell]] * 5
        tensors = dict(x=zeros(2, 3, rows), h0=None, c0=None, w_ih=None, w_hh=zeros(rows, 5))
        return by_name(emulated.operator("forward"))(cell=cell, train=True, **tensors, **options)

    call(drop_h=zeros(1, 3, 5), zone_h=zeros(5), zone_c=zeros(2, 3, 5), norm_hh=zeros(1, 20), norm_c=zeros(1, 5))
    bad: list[dict[str, Any]] = [
        dict(instance=0, norm_hh=zeros(1, 20)),
        dict(drop_h=zeros(3, 5)),
        dict(zone_h=zeros(2, 3, 4)),
        dict(zone_h=zeros(4)),
        dict(cell=3, zone_c=zeros(5)),
        dict(cell=3, norm_c=zeros(1, 5)),
        dict(norm_c_bias=zeros(1, 5)),
        dict(norm_hh=zeros(1, 15)),
        dict(drop_h=torch.zeros(1, 3, 5)),
    ]
    for options in bad:
        with pytest.raises(RuntimeError):
            call(**options)
