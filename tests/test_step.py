"""module.step: one time step at a time gives what forward gives on the whole sequence, and on a sequence of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_rnn
from fused_rnn import ops

SIZES = [dict(B=1, I=4, H=5), dict(B=3, I=7, H=20, num_layers=2), dict(B=9, I=33, H=77, batch_first=True)]
CELLS = [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {}), ("LSTM", {"proj_size": 3}), ("GRU", {})]
each_module = pytest.mark.parametrize("cell, options", CELLS, ids=lambda value: str(value))
each_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"B{size['B']}H{size['H']}")


def build(cell: str, options: dict[str, Any], size: dict[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    rest = {name: value for name, value in size.items() if name not in ("B", "I", "H")}
    return getattr(fused_rnn, cell)(size["I"], size["H"], **options, **rest, dtype=dtype)


def tensors(hx: Any) -> tuple[Tensor, ...]:
    return hx if isinstance(hx, tuple) else (hx,)


@each_size
@each_module
def test_steps_equal_forward(cell: str, options: dict[str, Any], size: dict[str, Any]) -> None:
    module = build(cell, options, size)
    x = torch.randn(6, size["B"], size["I"], dtype=torch.float64)
    expected, final = module(x.transpose(0, 1) if module.batch_first else x)
    expected = expected.transpose(0, 1) if module.batch_first else expected
    hx = None
    for t in range(6):
        y, hx = module.step(x[t], hx)
        torch.testing.assert_close(y, expected[t], rtol=1e-12, atol=1e-12)
    for a, b in zip(tensors(hx), tensors(final), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@each_size
@each_module
def test_a_step_is_a_sequence_of_one(
    cell: str, options: dict[str, Any], size: dict[str, Any], dtype: torch.dtype
) -> None:
    module = build(cell, options, size, dtype)
    x = torch.randn(size["B"], size["I"]).to(dtype)
    time_dim = 1 if module.batch_first else 0
    _, hx = module(x.unsqueeze(time_dim))
    expected, final = module(x.unsqueeze(time_dim), hx)
    y, stepped = module.step(x, hx)
    assert torch.equal(y, expected.squeeze(time_dim))
    for a, b in zip(tensors(stepped), tensors(final), strict=True):
        assert torch.equal(a, b)


@each_module
def test_unbatched(cell: str, options: dict[str, Any]) -> None:
    module = build(cell, options, SIZES[1])
    x = torch.randn(SIZES[1]["I"], dtype=torch.float64)
    expected, final = module.step(x[None])
    y, hx = module.step(x)
    torch.testing.assert_close(y, expected[0], rtol=1e-12, atol=1e-12)
    for a, b in zip(tensors(hx), tensors(final), strict=True):
        torch.testing.assert_close(a, b[:, 0], rtol=1e-12, atol=1e-12)


@each_module
def test_gradients_flow_through_steps(cell: str, options: dict[str, Any]) -> None:
    module = build(cell, options, SIZES[1])
    x = torch.randn(4, 3, 7, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    expected = torch.autograd.grad(module(x)[0].pow(2).sum(), inputs)
    hx, total = None, torch.zeros((), dtype=torch.float64)
    for t in range(4):
        y, hx = module.step(x[t], hx)
        total = total + y.pow(2).sum()
    for a, b in zip(torch.autograd.grad(total, inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_dropout_acts_between_layers_in_training() -> None:
    module = fused_rnn.GRU(4, 5, num_layers=2, dropout=0.5)
    x = torch.randn(3, 4)
    torch.manual_seed(5)
    expected, _ = module(x[None])
    torch.manual_seed(5)
    assert torch.equal(module.step(x)[0], expected[0])


def test_it_runs_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = fused_rnn.GRU(4, 5), torch.randn(3, 4)
    calls = []
    layer = ops.layer
    monkeypatch.setattr(ops, "layer", lambda *args: calls.append(args) or layer(*args))
    monkeypatch.setattr(module, "_stack", lambda *args: calls.append(args) or type(module)._stack(module, *args))
    module.step(x)
    assert calls


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l0", "bias_hh_l0"])
def test_weights_written_in_place_are_seen(name: str) -> None:
    """Nothing of the weights is kept between calls: neither `_version` nor numpy has to tell."""
    for module, call in [
        (fused_rnn.LSTM(4, 5), lambda m, x: m.step(x)[0]),
        (fused_rnn.GRU(64, 64), lambda m, x: m.step(x.repeat(3, 16))[0]),
    ]:
        x = torch.randn(3, 4)
        with torch.no_grad():
            before = call(module, x)
            getattr(module, name).data.mul_(1.5).add_(0.25)
            changed = call(module, x)
            getattr(module, name).detach().numpy()[:] = 0
            zeroed = call(module, x)
        if name != "weight_hh_l0":  # from a zero state, W_hh does not matter
            assert not torch.equal(before, changed)
            assert not torch.equal(changed, zeroed)
        _, hx = module.step(x if module.input_size == 4 else x.repeat(3, 16))
        first = module.step(x if module.input_size == 4 else x.repeat(3, 16), hx)[0]
        module.weight_hh_l0.data.add_(0.5)
        assert not torch.equal(module.step(x if module.input_size == 4 else x.repeat(3, 16), hx)[0], first)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.step(torch.randn(2, 3, 4)), RuntimeError, r"GRU.step: expected input to be 1-D or 2-D, got 3-D"),
        (lambda m: m.step(torch.randn(3, 5)), RuntimeError, r"input.size\(-1\) must be equal to input_size"),
        (lambda m: m.step(torch.randn(3, 4), torch.randn(1, 2, 5)), RuntimeError, r"Expected hidden size"),
        (lambda m: m.step(torch.randn(3, 4), torch.randn(2, 3, 5)), RuntimeError, r"Expected hidden size"),
        (lambda m: m.step(torch.randn(3, 4), torch.randn(3, 5)), RuntimeError, r"hx should also be 3-D"),
        (lambda m: m.step(torch.randn(3, 4).double()), ValueError, r"dtype"),
    ],
)
def test_wrong_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(fused_rnn.GRU(4, 5))


def test_two_directions_have_no_step() -> None:
    module = fused_rnn.GRU(4, 5, bidirectional=True)
    with pytest.raises(ValueError, match=r"GRU.step: expected bidirectional=False, got True"):
        module.step(torch.randn(3, 4))


@pytest.mark.parametrize("name", ["check_input", "check_forward_args", "check_hidden_size", "permute_hidden"])
def test_a_subclass_may_check_more(name: str) -> None:
    def refuse(self: Any, *args: Any) -> None:
        raise ValueError("refused")

    module = type("Strict", (fused_rnn.LSTM,), {name: refuse})(4, 5)
    hx = (torch.zeros(1, 3, 5), torch.zeros(1, 3, 5))
    with pytest.raises(ValueError, match="refused"):
        module(torch.randn(2, 3, 4), hx)
    with pytest.raises(ValueError, match="refused"):
        module.step(torch.randn(3, 4), hx)


def test_the_usual_call_needs_no_second_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What falls back silently would only be seen as slow."""
    monkeypatch.setattr(fused_rnn.modules.FusedRNNBase, "_checked", None)
    for cell, options in CELLS:
        for size in SIZES:
            module = build(cell, options, size)
            x = torch.randn(2, size["B"], size["I"], dtype=torch.float64)
            _, hx = module(x.transpose(0, 1) if module.batch_first else x)
            module(x.transpose(0, 1) if module.batch_first else x, hx)
            module.step(x[0], hx)


def test_hooks_are_forwards_alone() -> None:
    module = fused_rnn.GRU(4, 5)
    calls: list[Any] = []
    module.register_forward_hook(lambda *args: calls.append(args))
    module.step(torch.randn(3, 4))
    module.step(torch.randn(4))
    assert not calls
