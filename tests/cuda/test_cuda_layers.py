"""The CUDA path from the modules to the kernels, on the CPU: the emulator replaces the GPU.

Bindings, planner, launchers, kernels, autograd and packing are the real ones. Results are compared with torch.nn and
the specification. test_gpu.py repeats the comparison on a GPU.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import emulated
import fused_rnn
from cases import CASES, Case
from emulated import gpu as gpu
from fused_rnn import cuda, layers, policy, reference, tuned, tuning
from fused_rnn.options import EVERY_STEP, LayerOptions, operator_tensors_of
from test_amp import torchs_lstm_takes
from test_gpu import PRECISIONS, Precision, farther, results, rounded_to_tf32, tf32_results
from test_modules import GRADCHECKS
from test_modules import test_gradcheck as gradcheck_a_layer
from tolerances import assert_as_accurate

pytestmark = emulated.marks

# Several blocks and teams, more rows than the first launch takes, more columns than registers hold, odd sizes.
_LARGER = [
    dict(T=4, B=1, I=5, H=300),
    dict(T=3, B=70, I=5, H=130),
    dict(T=3, B=9, I=5, H=150, bidirectional=True, L=2),
    dict(T=5, B=6, I=7, H=137, bidirectional=True, lengths=(5, 1, 3, 3, 5, 2)),
    dict(T=2, B=3, I=4, H=610),
]
_CELLS = [dict(cell="RNN"), dict(cell="LSTM"), dict(cell="GRU")]
EMULATED = [case for case in CASES if case.T * case.B * case.H < 4000 and not case.proj_size]
EMULATED += [Case(**cell, **size) for cell in _CELLS for size in _LARGER]


def with_precision(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "tf32_allowed", lambda: precision.tf32)


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("case", EMULATED, ids=str)
def test_matches_torch(case: Case, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    with_precision(precision, monkeypatch)
    dtype = precision.dtype
    theirs, ours, exact = case.modules(dtype)
    ours.backend = "fused"
    data = case.data(dtype)
    expected = results(case, theirs, data, dtype)
    actual = results(case, ours, data, dtype)
    if precision.tf32:
        rounded = tf32_results(case, exact, data)
    else:  # torch.nn's own operations: the accuracy of oneDNN's LSTM depends on the processor
        with torch.backends.mkldnn.flags(enabled=False):
            rounded = results(case, theirs, data, dtype)
    for name, value in results(case, exact, [t.double() for t in data], dtype).items():
        if name.startswith("d") and case.nonlinearity == "relu" and (dtype.itemsize == 2 or precision.tf32):
            continue  # near relu's kink, rounding decides on which side a value lies, and the gradient jumps
        if dtype is torch.float64:
            torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-11, msg=name)
        else:
            assert_as_accurate(actual[name], farther(expected[name], rounded[name], value), value, name)


@pytest.mark.parametrize("case", EMULATED[::3], ids=str)
def test_inference_equals_training(case: Case) -> None:
    _, ours, _ = case.modules(torch.bfloat16)
    ours.backend = "fused"
    data = case.data(torch.bfloat16)
    with torch.no_grad():
        inference = case.run(ours, data)
    for a, b in zip(case.run(ours, data), inference, strict=True):
        assert not b.requires_grad
        assert torch.equal(a, b)


@pytest.mark.parametrize(("cell", "kind", "D"), [case for case in GRADCHECKS if case[1] != "projected"])
def test_gradcheck(cell: str, kind: str, D: int) -> None:
    gradcheck_a_layer(cell, kind, D)


def kernels() -> list[str]:
    """How the blocks of each resident kernel exchange rows, in the order of FUSED_RNN_INSTANCES."""
    return re.findall(r"^  X\((k\w+), \d", (emulated.ROOT / "csrc/cuda/layout.h").read_text(), re.MULTILINE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "tf32"])
@pytest.mark.parametrize("cell", reference.CELLS)
def test_every_kernel(cell: str, dtype: torch.dtype) -> None:
    """All instances compute the same layer, also those that the planner would not choose."""
    torch.manual_seed(0)
    T, B, size, H, G = 3, 21, 6, 75, reference.GATES[cell]  # units of several blocks, or of one
    weights = [
        w
        for _ in range(2)
        for w in (
            torch.randn(G * H, size),
            torch.randn(G * H, H) / H**0.5,
            torch.randn(G * H),
            torch.randn(G * H),
            None,
        )
    ]
    x, h0, c0 = torch.randn(T, B, size), torch.randn(2, B, H), torch.randn(2, B, H) if cell == "lstm" else None
    lengths = torch.randint(0, T + 1, (B,), dtype=torch.int32)
    x, h0, c0, *weights = [None if t is None else t.to(dtype) for t in (x, h0, c0, *weights)]
    # Round the operands as the tensor cores do, so that only sums differ.
    if dtype is torch.float32:
        weights = [None if w is None else rounded_to_tf32(w) for w in weights]

    number = reference.CELLS.index(cell)

    def run(instance: int) -> list[Tensor]:
        given = dict(options=operator_tensors_of(LayerOptions(lengths=lengths)), tf32=True)
        of_forward = 0 if kernels()[instance] == "kSplitColumns" else instance  # it has only backward
        results = emulated.operator("forward", **given, instance=of_forward)(x, h0, c0, number, True, *weights)
        y, h_n, c_n, reserve, _ = results
        grads = [torch.ones_like(y), torch.ones_like(h_n), torch.ones_like(c_n) if cell == "lstm" else None]
        w_ih, w_hh, _, _, _, w_ih_reverse, w_hh_reverse, *_ = weights
        found = emulated.operator("backward", **given, instance=instance)(
            *grads, x, reserve, number, True, True, True, True, True, False, w_ih, w_hh,
            w_ih_reverse=w_ih_reverse, w_hh_reverse=w_hh_reverse,
        )  # fmt: skip
        assert emulated.last_was_resident()
        return [y, h_n, c_n, *(g for g in found if g is not None)]

    assert len(kernels()) >= 13
    first = run(0)
    for instance in range(1, len(kernels())):
        for a, b in zip(run(instance), first, strict=True):
            assert a.isfinite().all()
            scale = max(b.abs().max().item(), 1.0) if b.numel() else 1.0
            step = 2.0**-10 if dtype is torch.float32 else torch.finfo(dtype).eps
            torch.testing.assert_close(a, b, rtol=0, atol=8 * step * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "tf32"])
@pytest.mark.parametrize("cell", reference.CELLS)
def test_not_a_number(cell: str, dtype: torch.dtype) -> None:
    """NaN stays NaN, affects only its row, and is not mistaken for a message that has not arrived."""
    torch.manual_seed(0)
    G, H = reference.GATES[cell], 150
    weights = [t.to(dtype) for t in (torch.randn(G * H, 4), torch.randn(G * H, H) / 12)] + [None] * 3
    x = torch.randn(4, 3, 4).to(dtype)
    x[1, 1] = torch.nan
    y, _, _ = layers.layer(cell, x, None, None, weights)
    assert y[1:, 1].isnan().all() or cell == "rnn_relu"
    assert y[:, [0, 2]].isfinite().all() and y[0].isfinite().all()


def test_products_around_the_recurrence_are_in_tf32() -> None:
    """TF32 is switched on only while the operator runs, and is switched off again after errors, too."""
    backends = torch.backends
    before = backends.cuda.matmul.fp32_precision
    assert before != "tf32"
    assert cuda.in_tf32(lambda: backends.cuda.matmul.fp32_precision) == "tf32"
    with pytest.raises(ZeroDivisionError):
        cuda.in_tf32(lambda x: 1 / x, 0)
    assert backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize(("T", "B", "H", "D"), [(1, 3, 20, 1), (2, 3, 20, 2), (2, 1, 2500, 1)])
def test_the_planner_says_what_runs(
    T: int, B: int, H: int, D: int, tf32: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated.use(monkeypatch, tf32=tf32)
    module = fused_rnn.GRU(4, H, bidirectional=D == 2, dtype=dtype, backend="fused")
    with torch.no_grad():
        module(torch.randn(T, B, 4, dtype=dtype))
    options = dict(bidirectional=D == 2, backend="fused", properties=emulated.H200)
    plan = fused_rnn.plan("gru", dtype, T, B, 4, H, **options)
    assert plan.way == ("resident" if emulated.last_was_resident() else "steps")


@pytest.mark.parametrize("cell", reference.CELLS)
def test_inference_exchanges_h_in_a_ring(cell: str) -> None:
    """Its memory does not grow with the number of steps, and it computes what training does with all of them."""
    B, H = 3, 40

    def run(T: int, train: bool) -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        rows = reference.GATES[cell] * H
        given = dict(x=torch.randn(T, B, rows).bfloat16(), w_hh=(torch.randn(rows, H) / H**0.5).bfloat16())
        given |= dict(h0=None, c0=None, w_ih=None, cell=reference.CELLS.index(cell), train=train)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            results = emulated.operator("forward", **given, tf32=True, instance=kernels().index("kThroughL2"))()
        events = profiler.profiler.kineto_results.events()
        y, *_ = results
        allocated = sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")
        return list(results[:3]), allocated - y.nbytes

    for a, b in zip(run(150, False)[0], run(150, True)[0], strict=True):
        assert torch.equal(a, b)
    before, full, longer = (run(T, False)[1] for T in (32, 64, 300))
    assert longer == full == before + 32 * B * H * 2


def test_bad_calls_raise() -> None:
    forward = emulated.operator("forward")
    x, w_ih, w_hh = torch.randn(2, 3, 4).bfloat16(), torch.randn(20, 4).bfloat16(), torch.randn(20, 5).bfloat16()
    good = dict(x=x, h0=None, c0=None, cell=2, train=True, w_ih=w_ih, w_hh=w_hh, tf32=True, instance=-1)
    forward(**good)
    doubles = dict(x=x.double(), w_ih=w_ih.double(), w_hh=w_hh.double())
    bad: list[dict[str, object]] = [
        dict(cell=9),  # no such cell
        dict(w_hh=w_hh[:, :4]),
        dict(instance=99),  # no such kernel
        dict(instance=-3),
        dict(h0=x[0]),  # wrong shape
        dict(w_hh=w_hh.float()),  # another dtype
        dict(doubles, instance=0),  # the resident kernels have no float64
        dict(x=x.float(), w_ih=w_ih.float(), w_hh=w_hh.float(), instance=0, tf32=False),  # nor float32 without TF32
        dict(lengths=torch.tensor([1.0, 2.0, 3.0])),
        dict(lengths=torch.tensor([1, 2])),
        dict(x=x[:0]),  # no steps
        dict(x=x[:, :0]),  # no rows
        dict(resets=torch.zeros(2, 3)),  # resets are bool
        dict(cell=0, w_ih=w_ih[:5], w_hh=w_hh[:5], c0=torch.zeros(1, 3, 5).bfloat16()),  # the RNN has no c
        dict(w_hh=w_hh[:, :3], w_hr=torch.zeros(3, 5).bfloat16()),  # no projection
    ]
    for change in bad:
        with pytest.raises(RuntimeError):
            forward(**good | change)


def test_autocast_casts_as_for_torch() -> None:
    """Inputs, states and weights are cast to autocast's dtype, which results have; gradients keep the parameters'."""
    case = Case("LSTM", T=4, B=3, I=5, H=12, L=2)
    theirs, ours, exact = case.modules(torch.float32)
    ours.backend = "fused"
    data = case.data(torch.float32)
    found = []
    for module in (theirs, ours):
        # oneDNN has no bfloat16 LSTM on some processors.
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.backends.mkldnn.flags(enabled=torchs_lstm_takes(torch.bfloat16)),
        ):
            found.append(case.run(module, data))
    for expected, actual, value in zip(*found, case.run(exact, [t.double() for t in data]), strict=True):
        assert actual.dtype is torch.bfloat16
        assert_as_accurate(actual, expected.to(actual.dtype), value, "result")
    found[1][0].float().sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in ours.parameters())


def parts_of(value: object) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in parts_of(v)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["zeros", "learned", "every step"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "tf32", "bf16"])
@pytest.mark.parametrize(("bidirectional", "H"), [(False, 20), (True, 20), (True, 140)])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_segments(
    name: str, bidirectional: bool, H: int, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resets, lengths and the states of every step, with all gradients, agree with the specification."""
    torch.manual_seed(0)
    T, B, D = 6, 11, 2 if bidirectional else 1
    module = getattr(fused_rnn, name)(5, H, bidirectional=bidirectional, dtype=dtype, backend="fused")
    exact = getattr(fused_rnn, name)(5, H, bidirectional=bidirectional, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())

    def states(*shape: int) -> tuple[Tensor, ...]:
        found = tuple(torch.randn(shape).to(dtype).requires_grad_() for _ in range(2 if name == "LSTM" else 1))
        return found

    x, hx = torch.randn(T, B, 5).to(dtype).requires_grad_(), states(D, B, H)
    fresh = () if kind == "zeros" else states(*([T] if kind == "every step" else []), D, B, H)
    resets, lengths = torch.rand(T, B) < 0.3, torch.tensor([6, 0, 3, 6, 1, 2, 6, 5, 4, 6, 3])

    def run(module: torch.nn.Module, x: Tensor, hx: tuple[Tensor, ...], fresh: tuple[Tensor, ...]) -> list[Tensor]:
        def pack(states: tuple[Tensor, ...]) -> object:
            return None if not states else states if name == "LSTM" else states[0]

        arguments = dict(resets=resets, reset_state=pack(fresh), lengths=lengths, return_state_sequence=True)
        outputs = parts_of(module(x, pack(hx), **arguments))
        generator = torch.Generator().manual_seed(2)
        weights = [torch.randn(o.shape, generator=generator).to(dtype).to(o) for o in outputs]
        grads = torch.autograd.grad(outputs, [x, *hx, *fresh, *module.parameters()], weights)
        return [*outputs, *grads]

    actual = run(module, x, hx, fresh)
    with monkeypatch.context() as patch:
        patch.setattr(policy, "fusible", lambda *tensors: False)
        x, *others = (t.detach().double().requires_grad_() for t in (x, *hx, *fresh))
        wanted = run(exact, x, tuple(others[: len(hx)]), tuple(others[len(hx) :]))
    rounding = {torch.float64: 1e-13, torch.float32: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    for a, w in zip(actual, wanted, strict=True):
        assert a.dtype is dtype and a.shape == w.shape
        scale = max(w.abs().max().item(), 1.0)
        assert (a.double() - w).abs().max() <= 8 * rounding * scale


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_a_tuned_kernel_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `fused_rnn.tune` found to be the fastest: another resident kernel than the planner's, or none."""
    module = getattr(fused_rnn, name)(5, 40, 2, dtype=torch.bfloat16)
    x = torch.randn(4, 3, 5, dtype=torch.bfloat16)
    cell = "rnn_tanh" if name == "RNN" else name.lower()
    instances = [plan["instance"] for plan in cuda.plans(cell, torch.bfloat16, 3, 40, 1, False, emulated.H200)]
    assert len(instances) >= 2
    expected = getattr(torch.nn, name).forward(module, x)[0]
    for instance in (*instances, EVERY_STEP):
        # The emulated device's tensors are the CPU's, where an instruction set takes the place of a kernel.
        monkeypatch.setattr(tuned, "instruction_sets", lambda instance=instance: {"": instance})
        with tuned.answering(lambda call, device: tuned.Result("fused")):
            y, _ = module(x)
            assert emulated.last_was_resident() == (instance >= 0)
            torch.testing.assert_close(y, expected, atol=0.02, rtol=0.02)
            y.float().sum().backward()
            assert emulated.last_was_resident() == (instance >= 0)


@pytest.mark.parametrize("cell", reference.CELLS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_tuning_accepts_the_kernels(cell: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a GPU would time computes what torch.nn does, in both passes."""
    monkeypatch.setattr(cuda, "device_properties", lambda device: emulated.H200)
    call = tuned.Call(cell, torch.bfloat16, None, 5, 3, 5, 40, 0, 2, 1, "packed" if packed else "sequence", True, 0)
    rivals = tuning._rivals(call, torch.device("cuda"))
    assert [rival.backend for rival in rivals.values()] == ["torch", "fused", "fused", "fused", "fused"]
    assert tuning._correct(rivals, tuning._Subject(call, torch.device("cpu"))) == rivals
