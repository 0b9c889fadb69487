"""Mixed precision: autocast, GradScaler, 16-bit parameters and mixed dtypes behave as in torch.nn, on our kernels.

On a CPU the kernels compute in float32 under autocast and round their results. Results are therefore compared with
float64: their error must not exceed torch.nn's. Autocast on a GPU is tested in test_gpu.py and at the end of this file.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from cases import Case
from contract import CELLS, NAMES, SEQUENCES, close, error_of, fused_calls, tensors, twins
from fused_rnn import functional, policy
from tolerances import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = {"bf16": BF16, "f16": F16, "f32": F32, "f64": F64}

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
each_name = pytest.mark.parametrize("name", NAMES)
each_sequence = pytest.mark.parametrize("name", SEQUENCES)
each_half = pytest.mark.parametrize("half", [BF16, F16], ids=["bf16", "f16"])


@functools.cache
def torchs_lstm_takes(half: torch.dtype, training: bool = False) -> bool:
    """Whether torch.nn's LSTM runs under autocast to `half`: it needs oneDNN, which raises on some processors."""
    try:
        with torch.autocast("cpu", half), torch.set_grad_enabled(training):
            nn.LSTM(4, 4)(torch.randn(2, 2, 4))
    except RuntimeError:
        return False
    return True


@pytest.fixture(autouse=True)
def nothing_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every call on the kernels; otherwise the processor would decide which calls go to torch.nn."""
    monkeypatch.setattr(policy, "HAS_BF16_PRODUCTS", False)


def dtypes_of(module: nn.Module, half: torch.dtype, x: Tensor, hx: object) -> list[torch.dtype] | None:
    """Dtypes of the results under autocast, or None if the call raises."""
    try:
        with torch.no_grad(), torch.autocast("cpu", half):
            return [t.dtype for t in tensors(module(x, hx))]
    except (RuntimeError, ValueError):
        return None


@each_half
@pytest.mark.parametrize(
    ("name", "options", "packed"),
    [
        *((name, {}, False) for name in CELLS),
        *((name, {}, packed) for name in SEQUENCES for packed in (False, True)),
        ("LSTM", {"proj_size": 2}, False),
        ("LSTM", {"proj_size": 2}, True),
        ("GRU", {"num_layers": 2, "bidirectional": True}, False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_every_mix_of_dtypes_returns_torchs(name: str, options: dict, packed: bool, half: torch.dtype) -> None:
    """Weights, input and states in every dtype: wherever torch.nn returns a result, ours has the same dtypes."""
    rows = 4 if options.get("num_layers") else 1
    lead = (4,) if name in CELLS else (rows, 4)
    compared = 0
    for weights, of_x, of_h, of_c in product(DTYPES.values(), DTYPES.values(), [None, *DTYPES.values()], [F32, half]):
        theirs, ours = twins(name, 3, 5, dtype=weights, **options)
        x = torch.ones(*((4, 3) if name in CELLS else (3, 4, 3)), dtype=of_x)
        hx = None
        if of_h is not None:
            h, c = torch.zeros(*lead, options.get("proj_size", 5), dtype=of_h), torch.zeros(*lead, 5, dtype=of_c)
            hx = (h, c) if "LSTM" in name else h
        elif of_c is half:
            continue
        sequence = pack_padded_sequence(x, torch.tensor([3, 2, 2, 1])) if packed else x
        wanted = dtypes_of(theirs, half, sequence, hx)
        if wanted is not None:
            compared += 1
            assert dtypes_of(ours, half, sequence, hx) == wanted, (weights, of_x, of_h, of_c)
    assert compared > 20


RAGGED = [
    dict(T=5, B=3, I=7, H=20, L=2, batch_first=True),
    dict(T=4, B=17, I=10, H=77, bidirectional=True),
    dict(T=7, B=1, I=33, H=33, given_states=False),
    dict(T=6, B=4, I=20, H=48, L=2, bidirectional=True, lengths=(1, 6, 3, 3)),
]
CASES = [Case(cell, **size) for cell in SEQUENCES for size in RAGGED] + [
    Case("LSTM", T=6, B=9, I=5, H=33, proj_size=20),
    Case("RNN", T=5, B=3, I=7, H=20, nonlinearity="relu"),
]


@pytest.mark.parametrize("of_input", [F32, BF16], ids=["f32-input", "bf16-input"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_farther_from_the_exact_ones(case: Case, of_input: torch.dtype) -> None:
    """Results and gradients are as accurate as torch.nn's, have the expected dtypes, and come from the kernels."""
    theirs, ours, exact = case.modules(F32)
    data = [t.to(of_input) for t in case.data(F32)]

    def run(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in inputs]
        outputs = case.run(module, inputs)
        weights = [torch.linspace(-1, 2, o.numel()).view_as(o) for o in outputs]
        value = sum((o.to(F64) * w).sum() for o, w in zip(outputs, weights, strict=True))
        return [*outputs, *torch.autograd.grad(value, [*inputs, *module.parameters()])]

    wanted = run(exact, [t.double() for t in data])
    with torch.autocast("cpu", BF16):
        with torch.backends.mkldnn.flags(enabled=torchs_lstm_takes(BF16)):
            expected = run(theirs, data)
        with fused_calls() as calls:
            actual = run(ours, data)
    assert any("forward" in call for call in calls) and any("backward" in call for call in calls)
    results = 3 if case.cell == "LSTM" else 2
    for index, (a, e, w) in enumerate(zip(actual, expected, wanted, strict=True)):
        assert_as_accurate(a, e.to(a.dtype), w, f"{'d' if index >= results else ''}{index}")


@pytest.mark.parametrize("name", CELLS)
def test_cells_no_farther_from_the_exact_ones(name: str) -> None:
    theirs, ours = twins(name, 10, 33)
    (exact, _) = twins(name, 10, 33, dtype=F64)
    exact.load_state_dict(theirs.state_dict())
    x, h, c = torch.randn(7, 10), torch.randn(7, 33), torch.randn(7, 33)

    def run(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
        outputs = tensors(module(inputs[0], inputs[1:] if name == "LSTMCell" else inputs[1]))
        return [*outputs, *torch.autograd.grad(sum(o.to(F64).square().sum() for o in outputs), module.parameters())]

    wanted = run(exact, x.double(), h.double(), c.double())
    with torch.autocast("cpu", BF16):
        expected = run(theirs, x, h, c)
        with fused_calls() as calls:
            actual = run(ours, x, h, c)
    assert calls
    for index, (a, e, w) in enumerate(zip(actual, expected, wanted, strict=True)):
        assert_as_accurate(a, e, w, f"d{index}")


@each_sequence
@each_device
def test_what_torch_does_not_have(name: str, device: str) -> None:
    """Resets, lengths, the states of every step, `step` and functions: dtypes as in forward, values within rounding."""
    _, ours = twins(name, 6, 20, num_layers=2, device=device)
    ours.backend = "fused"
    x = torch.randn(5, 3, 6, device=device)
    fresh = tuple(torch.randn(2, 1, 20, device=device) for _ in range(2 if name == "LSTM" else 1))
    options = dict(
        resets=torch.rand(5, 3, device=device) < 0.3,
        reset_state=fresh if name == "LSTM" else fresh[0],
        lengths=torch.tensor([5, 0, 3], device=device),
        return_state_sequence=True,
    )
    wanted = tensors(ours(x, **options))
    for of_x in (F32, BF16):
        with torch.autocast(device, BF16), fused_calls() as calls:
            plain = tensors(ours(x.to(of_x)))
            actual = tensors(ours(x.to(of_x), **options))
            weights = list(ours.parameters())
            function = tensors(getattr(functional, name.lower())(x.to(of_x), weights, **options))
            steps = tensors(ours.step(x[0].to(of_x), resets=options["resets"][0], reset_state=options["reset_state"]))
        assert len(calls) >= 8
        of_h, of_c = plain[0].dtype, plain[-1].dtype
        states = [of_h, of_c] if name == "LSTM" else [of_h]
        assert [t.dtype for t in actual] == [of_h, *states, *states]
        close(function, actual)
        for a, w in zip(actual, wanted, strict=True):
            torch.testing.assert_close(a.float(), w, rtol=0, atol=3e-2)
        assert all(torch.isfinite(t).all() for t in steps)


@each_sequence
@pytest.mark.parametrize("options", [{"layer_norm": True, "zoneout": 0.2}, {"recompute": "full"}], ids=str)
def test_regularised_variants(name: str, options: dict) -> None:
    """Autocast casts the parameters of the options, too, and does not act inside the layers."""
    ours = getattr(fused_rnn, name)(6, [20, 7], **options).eval()
    x = torch.randn(5, 3, 6)
    wanted = [t.detach() for t in tensors(ours(x))]
    for ours.backend, of_x in product(("fused", "torch"), (F32, BF16)):
        with torch.autocast("cpu", BF16), fused_calls() as calls:
            actual = tensors(ours(x.to(of_x)))
            sum(t.float().sum() for t in actual).backward()
        assert bool(calls) == (ours.backend == "fused")
        for a, w in zip(actual, wanted, strict=True):
            torch.testing.assert_close(a.float(), w, rtol=0, atol=3e-2)
        assert all(p.grad.dtype is F32 for p in ours.parameters())


@each_sequence
def test_without_kernels_the_dtypes_stay(name: str) -> None:
    """backend="torch" returns the same dtypes; it runs the specification for options that torch.nn does not have."""
    _, ours = twins(name, 6, 20)
    x, lengths = torch.randn(5, 3, 6), torch.tensor([5, 0, 3])
    found = []
    for ours.backend in ("fused", "torch"):
        with torch.autocast("cpu", BF16):
            found.append(tensors(ours(x, lengths=lengths, return_state_sequence=True)))
    for a, e in zip(*found, strict=True):
        assert a.dtype is e.dtype
        torch.testing.assert_close(a.float(), e.float(), rtol=0, atol=3e-2)


@each_name
def test_gradient_penalty(name: str) -> None:
    """A second derivative inside autocast, computed by the specification, whose products autocast rounds."""
    theirs, ours = twins(name, 4, 8)
    penalties = []
    for module in (theirs.double(), ours):
        torch.manual_seed(1)
        x = torch.randn(*((3, 4) if name in CELLS else (5, 3, 4))).to(next(module.parameters()).dtype).requires_grad_()
        with torch.autocast("cpu", BF16):
            output = tensors(module(x))[0]
            (dx,) = torch.autograd.grad(output.float().square().sum(), x, create_graph=True)
            dx.square().sum().backward()
        penalties.append([p.grad for p in module.parameters()])
    for a, e in zip(penalties[1], penalties[0], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=2e-2 * max(e.abs().max().item(), 1.0))


@each_sequence
def test_dropout_draws_the_same_mask(name: str) -> None:
    if name == "LSTM" and not torchs_lstm_takes(BF16):
        pytest.skip("oneDNN has no bfloat16 LSTM on this processor, and torch.nn's raises")
    theirs, ours = twins(name, 4, 64, num_layers=2, dropout=0.5)
    x, found = torch.randn(5, 3, 4), []
    for module in (theirs, ours):
        torch.manual_seed(3)
        with torch.autocast("cpu", BF16):
            found.append(module(x)[0].float())
    torch.testing.assert_close(*found, rtol=0, atol=3e-2)


@each_sequence
@each_half
def test_grad_scaler_on_the_cpu(name: str, half: torch.dtype) -> None:
    """Three training steps; the last one overflows and is skipped with both libraries."""
    trained = []
    theirs, ours = twins(name, 6, 20)
    for module in (ours, theirs):
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for number in range(3):
            torch.manual_seed(number)
            optimiser.zero_grad()
            # Without oneDNN's LSTM in this dtype torch.nn raises.
            raises = module is theirs and name == "LSTM" and not torchs_lstm_takes(half, training=True)
            with torch.autocast("cpu", half, enabled=not raises):
                output, _ = module(torch.randn(5, 3, 6))
            value = output.float().square().mean() * (float("inf") if number == 2 else 1.0)
            scaler.scale(value).backward()
            scaler.step(optimiser)
            scaler.update()
        assert scaler.get_scale() == 512.0
        trained.append([p.detach() for p in module.parameters()])
    for a, e in zip(*trained, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=2e-3)


@each_name
@each_half
@each_device
def test_parameters_of_16_bits(name: str, half: torch.dtype, device: str) -> None:
    """Without autocast: results and gradients in the parameters' dtype, as accurate as torch.nn's against float64."""
    theirs, ours = twins(name, 10, 33, dtype=half, device=device)
    if name in SEQUENCES:
        ours.backend = "fused"
    exact = twins(name, 10, 33, dtype=F64)[0]
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(*((7, 10) if name in CELLS else (4, 7, 10))).to(half)
    found = []
    for module, input in ((ours, x.to(device)), (theirs, x.to(device)), (exact, x.double())):
        outputs = tensors(module(input))
        grads = torch.autograd.grad(sum((o * o.detach()).sum() for o in outputs), module.parameters())
        found.append([t.cpu() for t in (*outputs, *grads)])
    for index, (a, e, w) in enumerate(zip(*found, strict=True)):
        assert_as_accurate(a, e, w, f"d{index}")


@each_name
@each_device
def test_mixed_dtypes_are_rejected_as_torch_does(name: str, device: str) -> None:
    """Without autocast: the same error for every mix that torch.nn rejects, the same dtypes for one it accepts."""
    rejected = 0
    for weights, of_x, of_h, of_c in product([F32, BF16, F64], repeat=4):
        if len({weights, of_x, of_h, of_c}) == 1:
            continue
        theirs, ours = twins(name, 3, 5, dtype=weights, device=device)
        x = torch.ones(*((4, 3) if name in CELLS else (3, 4, 3)), dtype=of_x, device=device)
        states = [torch.zeros(*(() if name in CELLS else (1,)), 4, 5, dtype=d, device=device) for d in (of_h, of_c)]
        hx = tuple(states) if "LSTM" in name else states[0]
        try:
            wanted = [t.dtype for t in tensors(theirs(x, hx))]
        except (RuntimeError, ValueError) as error:
            rejected += 1
            assert error_of(ours, x, hx) == (type(error), str(error))
            continue
        assert [t.dtype for t in tensors(ours(x, hx))] == wanted
    assert rejected > 20


def test_where_torch_is_faster_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that the policy gives to torch.nn run there under autocast, too; test_policy.py tests the rules."""
    monkeypatch.setattr(policy, "choose", lambda *args, **options: policy.Choice(False, "tested"))
    with torch.autocast("cpu", BF16), fused_calls() as calls:
        for name in NAMES:
            with suppress(RuntimeError):  # oneDNN's LSTM does not support bfloat16 on every processor
                twins(name, 4, 8)[1](torch.randn(*((3, 4) if name in CELLS else (5, 3, 4))))
    assert not calls
