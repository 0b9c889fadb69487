"""Outputs, final states and every gradient of the sequence modules, against torch.nn and a float64 reference."""

import pytest
import torch
from torch import Tensor

import fused_rnn
from cases import CASES, Case
from contract import plain_calls
from fused_rnn import layers, policy, reference
from fused_rnn.options import LayerOptions
from tolerances import assert_as_accurate


def _results(case: Case, module: torch.nn.Module, data: list[Tensor]) -> dict[str, Tensor]:
    """All results of one forward and backward pass, with fixed random weights on the outputs."""
    data = [t.clone().requires_grad_() for t in data]
    outputs = case.run(module, data)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    inputs = [*data, *module.parameters()]
    grads = torch.autograd.grad(sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)), inputs)
    names = ["x", "h0", "c0"][: len(data)] + [name for name, _ in module.named_parameters()]
    results = dict(zip(["output", "h_n", "c_n"], outputs, strict=False))
    return results | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}


DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_torch(case: Case, dtype: torch.dtype) -> None:
    theirs, ours, exact = case.modules(dtype)
    data = case.data(dtype)
    expected = _results(case, theirs, data)
    actual = _results(case, ours, data)
    # In float64 torch.nn's measured error is zero; allow one unit in the last place per step instead.
    slack = 1e-12 if dtype == torch.float64 else 0.0
    for name, value in _results(case, exact, [t.double() for t in data]).items():
        if name.startswith("d") and case.nonlinearity == "relu" and dtype.itemsize == 2:
            continue  # near relu's kink, rounding decides on which side a value lies, and the gradient jumps
        if slack:
            torch.testing.assert_close(actual[name], value, rtol=slack, atol=slack * 10, msg=name)
        else:
            assert_as_accurate(actual[name], expected[name], value, name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inference_equals_training(case: Case) -> None:
    """The same kernels run, bit for bit."""
    _, ours, _ = case.modules(torch.float32)
    data = case.data(torch.float32)
    with torch.no_grad():
        inference = case.run(ours, data)
    for a, b in zip(case.run(ours, data), inference, strict=True):
        assert not b.requires_grad
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_torch(case: Case) -> None:
    theirs, _, _ = case.modules(torch.float64)
    data = case.data(torch.float64)
    x, *states = data
    packed = case.pack(x)
    if not states:
        rows = case.L * (2 if case.bidirectional else 1)
        states = [torch.zeros(rows, case.B, case.proj_size or case.H, dtype=x.dtype)]
        states += [torch.zeros(rows, case.B, case.H, dtype=x.dtype)] if case.cell == "LSTM" else []
    batch_sizes = None
    if case.lengths:
        x, batch_sizes, sorted_indices, unsorted_indices = packed
        states = [s.index_select(1, sorted_indices) for s in states]
    elif case.batch_first:
        x = x.transpose(0, 1)
    h0, c0 = (*states, None)[:2]
    output, *finals = reference.stack(
        theirs.mode.lower(), x, h0, c0, theirs._flat_weights, case.bias, case.L, 2 if case.bidirectional else 1,
        options=LayerOptions(batch_sizes),
    )  # fmt: skip
    if case.lengths:
        finals = [s.index_select(1, unsorted_indices) for s in finals]
    elif case.batch_first:
        output = output.transpose(0, 1)
    for actual, expected in zip((output, *finals), case.run(theirs, data), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


KINDS = [("padded", 1), ("padded", 2), ("packed", 1), ("packed", 2), ("step", 1)]
GRADCHECKS = [(cell, *kind) for cell in reference.CELLS for kind in KINDS]
GRADCHECKS += [("lstm", "projected", 1), ("lstm", "projected", 2)]


@pytest.mark.parametrize(("cell", "kind", "D"), GRADCHECKS)
def test_gradcheck(cell: str, kind: str, D: int) -> None:
    """First and second derivatives against finite differences, in float64."""
    torch.manual_seed(3)
    H, P, B, size = 3, 2 if kind == "projected" else 3, 2, 2
    G = reference.GATES[cell]

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).requires_grad_()

    shapes = {"padded": (3, B, size), "packed": (4, size), "step": (B, size), "projected": (2, B, size)}
    state = (B,) if kind == "step" else (D, B)
    batch_sizes = torch.tensor([2, 1, 1]) if kind == "packed" else None
    x, h0 = tensor(*shapes[kind]), tensor(*state, P)
    c0 = tensor(*state, H) if cell == "lstm" else None
    weights = [
        w
        for _ in range(D)
        for w in (
            tensor(G * H, size), tensor(G * H, P), tensor(G * H), tensor(G * H),
            tensor(P, H) if kind == "projected" else None,
        )
    ]  # fmt: skip
    inputs = [x, h0, c0, *weights]
    present = [t for t in inputs if t is not None]

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        left = iter(given)
        x, h0, c0, *weights = (None if t is None else next(left) for t in inputs)
        return tuple(o for o in layers.layer(cell, x, h0, c0, weights, LayerOptions(batch_sizes)) if o is not None)

    assert torch.autograd.gradcheck(call, present, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, present, fast_mode=True)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("cell, B, H", [("LSTM", 4, 20), ("GRU", 9, 400), ("RNN", 9, 400)])
def test_bfloat16_where_torch_is_faster(
    cell: str, B: int, H: int, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accurate whether computed by the kernels or by torch.nn, which is chosen on processors with bfloat16 products."""
    monkeypatch.setattr(policy, "HAS_BF16_PRODUCTS", not kernels)
    if not kernels:
        monkeypatch.setattr(policy, "bf16_unit", lambda: "")  # as if the kernels did not use them
    case = Case(cell, T=3, B=B, I=5, H=H)
    theirs, ours, exact = case.modules(torch.bfloat16)
    data = case.data(torch.bfloat16)
    with torch.no_grad(), plain_calls() as by_kernels:
        results = (case.run(module, data) for module in (theirs, ours))
        for expected, actual, value in zip(*results, case.run(exact, [t.double() for t in data]), strict=True):
            assert_as_accurate(actual, expected, value, "result")
    assert by_kernels == [kernels]


def test_a_state_of_another_dtype_is_left_to_torch() -> None:
    """torch.nn's float64 LSTM takes a float32 c_0; so does a module of ours, with the same result."""
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(8, 8).double()
    ours = fused_rnn.from_torch(theirs)
    x, hx = torch.randn(5, 2, 8).double(), (torch.randn(1, 2, 8).double(), torch.randn(1, 2, 8))
    for a, b in zip((ours(x, hx)[0], *ours(x, hx)[1]), (theirs(x, hx)[0], *theirs(x, hx)[1]), strict=True):
        assert torch.equal(a, b)
