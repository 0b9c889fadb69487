"""module.step, called for one time step after the other, gives the results of forward on the whole sequence.

Also its keywords: resets, rows that wait, and results written into given tensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_rnn
from contract import tensors
from fused_rnn import operators, policy, steps

SIZES = [dict(B=1, I=4, H=5), dict(B=3, I=7, H=20, num_layers=2), dict(B=9, I=33, H=77, batch_first=True)]
CELLS = [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {}), ("LSTM", {"proj_size": 3}), ("GRU", {})]
each_module = pytest.mark.parametrize("cell, options", CELLS, ids=lambda value: str(value))
each_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"B{size['B']}H{size['H']}")


def build(cell: str, options: dict[str, Any], size: dict[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    rest = {name: value for name, value in size.items() if name not in ("B", "I", "H")}
    return getattr(fused_rnn, cell)(size["I"], size["H"], **options, **rest, dtype=dtype)


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
    with torch.no_grad():  # in training, torch.nn computes an RNN's step
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
    plain = operators.plain
    monkeypatch.setattr(operators, "plain", lambda *args: calls.append(plain(*args)) or calls[-1])
    module.step(x)
    assert calls[0] is not None


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l0", "bias_hh_l0"])
def test_weights_written_in_place_are_seen(name: str) -> None:
    """No copy of the weights is kept between calls, so changes that bypass `_version` (numpy) are seen."""
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
        if name != "weight_hh_l0":  # with a zero state, W_hh has no effect
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
        (lambda m: m.step([1.0]), TypeError, "GRU.step: expected input to be a Tensor, got list"),
        (lambda m: m.step(torch.randn(3, 5)), RuntimeError, r"input.size\(-1\) must be equal to input_size"),
        (lambda m: m.step(torch.randn(3, 4), torch.randn(1, 2, 5)), RuntimeError, r"Expected hidden size"),
        (lambda m: m.step(torch.randn(3, 4), torch.randn(2, 3, 5)), RuntimeError, r"Expected hidden size"),
        (lambda m: m.step(torch.randn(3, 4).double()), ValueError, r"dtype"),
    ],
)
def test_wrong_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(fused_rnn.GRU(4, 5))


@pytest.mark.parametrize("way", ["plain", "resets", "zoneout", "frozen"])
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_wrong_states(cell: str, way: str) -> None:
    """In every way that a step is computed, a state of another structure gives the same documented error."""
    module = getattr(fused_rnn, cell)(4, 5, **({"zoneout": 0.1} if way == "zoneout" else {}))
    module = fused_rnn.freeze(module) if way == "frozen" else module
    more = {"resets": torch.tensor([True, False])} if way == "resets" else {}
    h, pair = torch.zeros(1, 2, 5), cell == "LSTM"
    for hx in (3, "hc", [h], (h, None), (h, 3), (h, h, h), h if pair else (h, h), torch.stack([h, h]) if pair else [h]):
        expected = "a pair of tensors" if pair else "a tensor"
        for input in (torch.randn(2, 4), torch.randn(4)):
            if input.dim() == 2 or not more:
                with pytest.raises(TypeError, match=rf"{cell}.step: expected hx to be {expected}, got \w+$"):
                    module.step(input, hx, **more)
    for input, state, text in (
        (torch.randn(2, 4), h[0], "batched 2-D input, hx should be 3-D, got 2-D"),
        (torch.randn(4), h, "unbatched 1-D input, hx should be 2-D, got 3-D"),
    ):
        if input.dim() == 2 or not more:
            with pytest.raises(RuntimeError, match=f"{cell}.step: For {text} tensor"):
                module.step(input, (state, state) if pair else state, **more)
    with pytest.raises(TypeError, match=f"{cell}.step: expected input to be a Tensor, got list"):
        module.step([1.0])


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
    """A silent fallback would only show as slowness."""
    monkeypatch.setattr("fused_rnn.call.run", None)
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


def state_of(module: Any, B: int, **options: Any) -> Any:
    sizes = [module.proj_size or module.hidden_size] + [module.hidden_size] * (module.mode == "LSTM")
    dtype = module.weight_ih_l0.dtype
    states = [torch.randn(module.num_layers, B, size).to(dtype).requires_grad_(**options) for size in sizes]
    return tuple(states) if len(states) == 2 else states[0]


def copied(state: Any) -> Any:
    return tuple(s.clone() for s in state) if isinstance(state, tuple) else state.clone()


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@each_size
@each_module
def test_out_holds_the_results(
    cell: str, options: dict[str, Any], size: dict[str, Any], dtype: torch.dtype, in_place: bool
) -> None:
    module = build(cell, options, size, dtype)
    x, hx = torch.randn(size["B"], size["I"]).to(dtype), state_of(module, size["B"], requires_grad=False)
    with torch.no_grad():
        expected, final = module.step(x, hx)
        before = copied(hx)
        out = torch.full_like(expected, torch.nan), hx if in_place else copied(hx)
        y, state = module.step(x, hx, out=out)
    assert y is out[0] and state is out[1]
    # On processors with bfloat16 products, a step without `out` may run on torch.nn.
    close = dict(rtol=0.02, atol=0.01) if dtype is torch.bfloat16 and policy.HAS_BF16_PRODUCTS else dict(rtol=0, atol=0)
    for a, b in zip((y, *tensors(state)), (expected, *tensors(final)), strict=True):
        torch.testing.assert_close(a, b, **close)
    if not in_place:
        assert all(torch.equal(a, b) for a, b in zip(tensors(hx), tensors(before), strict=True))


@each_module
def test_a_loop_in_place_is_forward(cell: str, options: dict[str, Any]) -> None:
    """Outputs are written into a buffer of either layout; the state is updated in place."""
    module = build(cell, options, SIZES[1])
    x = torch.randn(6, 3, 7, dtype=torch.float64)
    with torch.no_grad():
        expected, final = module(x)
        for buffer in (torch.empty_like(expected), torch.empty_like(expected.transpose(0, 1)).transpose(0, 1)):
            hx = copied(final)
            for state in tensors(hx):
                state.zero_()
            for t in range(6):
                module.step(x[t], hx, out=(buffer[t], hx))
            torch.testing.assert_close(buffer, expected, rtol=1e-12, atol=1e-12)
            for a, b in zip(tensors(hx), tensors(final), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def allocations(call: Any) -> int:
    """How often torch allocates memory on the CPU."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    names = [event.name() for event in profiler.profiler.kineto_results.events()]
    return names.count("[memory]")


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(("cell", "H"), [("RNN", 20), ("GRU", 20), ("LSTM", 20), ("LSTM", 200)])
def test_with_out_nothing_is_allocated(cell: str, H: int, num_layers: int, unbatched: bool) -> None:
    module = getattr(fused_rnn, cell)(7, H, num_layers)
    hx, learned = state_of(module, 3, requires_grad=False), state_of(module, 1, requires_grad=False)
    x, y = torch.randn(3, 7), torch.empty(3, H)
    masks = dict(active=torch.tensor([True, False, True]), resets=torch.tensor([False, True, True]))
    if unbatched:
        x, y, *states = x[0], y[0], *(s[:, 0].contiguous() for s in (*tensors(hx), *tensors(learned)))
        hx, learned = (tuple(states[:2]), tuple(states[2:])) if cell == "LSTM" else states
        masks = {name: mask[0] for name, mask in masks.items()}
    with torch.no_grad():
        assert allocations(lambda: module.step(x, hx)) > 0
        assert allocations(lambda: module.step(x, hx, out=(y, hx))) == 0
        assert allocations(lambda: module.step(x, hx, **masks, out=(y, hx))) == 0
        assert allocations(lambda: module.step(x, hx, **masks, reset_state=learned, out=(y, hx))) == 0


def expected_of(module: Any, x: Tensor, hx: Any, active: Tensor, resets: Tensor, reset_state: Any) -> Any:
    """torch.nn's result on the active rows only."""
    theirs = module.to_torch()
    zeros = [torch.zeros_like(h) for h in tensors(hx)]
    fresh = tensors(reset_state) if reset_state is not None else zeros
    replaced = [torch.where(resets.unsqueeze(1), f, h) for f, h in zip(fresh, tensors(hx), strict=True)]
    states = [h[:, active] for h in replaced]
    time_dim = 1 if module.batch_first else 0
    y, final = theirs(x[active].unsqueeze(time_dim), tuple(states) if isinstance(hx, tuple) else states[0])
    y_all = x.new_zeros(len(x), y.size(-1)).index_put((active,), y.squeeze(time_dim))
    return y_all, [h.index_copy(1, active.nonzero()[:, 0], s) for h, s in zip(tensors(hx), tensors(final), strict=True)]


MASKS = [([True, False, True], [True, True, False]), ([False] * 3, [True] * 3), ([True] * 3, [False] * 3)]


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("active", "resets"), MASKS)
@each_module
def test_rows_that_wait(
    cell: str, options: dict[str, Any], active: list[bool], resets: list[bool], learned: bool
) -> None:
    """Inactive rows keep their state for any input; the others step as if alone. With all derivatives."""
    module = build(cell, options, SIZES[1])
    x, hx = torch.randn(3, 7, dtype=torch.float64), state_of(module, 3)
    reset_state = state_of(module, 1) if learned else None
    masks = dict(active=torch.tensor(active), resets=torch.tensor(resets))
    x[~masks["active"]] = torch.nan
    x.requires_grad_()
    expected, final = expected_of(module, x.nan_to_num(), hx, **masks, reset_state=reset_state)
    inputs = [*tensors(hx), *(tensors(reset_state) if learned else ()), *module.parameters()]
    found = module.step(x, hx, **masks, reset_state=reset_state)

    def gradients(y: Tensor, states: Any) -> Any:
        total = sum((t * torch.arange(1, t.numel() + 1).view_as(t)).sum() for t in (y, *states))
        return torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)

    with torch.no_grad():
        y, state = torch.full_like(expected, torch.nan), copied(hx)
        module.step(x, state, **masks, reset_state=reset_state, out=(y, state))
        fresh = module.step(x, hx, **masks, reset_state=reset_state)
    for results in (found, (y, state), fresh):
        for a, b in zip((results[0], *tensors(results[1])), (expected, *final), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            assert a is results[0] or torch.equal(a[:, ~masks["active"]], b[:, ~masks["active"]])
    for a, b in zip(gradients(found[0], tensors(found[1])), gradients(expected, final), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_what_the_operator_does_not_take_is_right() -> None:
    """Strided states, torch.nn's own forward, an output in the input's memory: computed elsewhere and copied."""
    hx = torch.randn(2, 3, 7)
    for module in (
        fused_rnn.GRU(7, 7, 2),
        fused_rnn.GRU(7, 7, 2, backend="torch"),
        fused_rnn.GRU(7, 7, 2, zoneout=0.5),
    ):
        module.eval()
        x, active = torch.randn(3, 7), torch.tensor([True, False, True])
        with torch.no_grad():
            expected, final = module.step(x, hx, active=active)
            for y, state in ((torch.empty(7, 3).T, torch.empty(7, 3, 2).permute(2, 1, 0)), (x, hx.clone())):
                module.step(x, hx, active=active, out=(y, state))
                torch.testing.assert_close(y, expected)
                torch.testing.assert_close(state, final)


def test_writing_to_out_is_seen_by_autograd() -> None:
    module, w = fused_rnn.GRU(4, 5), torch.ones(1, 3, 5, requires_grad=True)
    hx = torch.randn(1, 3, 5)
    total = (w * hx).sum()
    with torch.no_grad():
        module.step(torch.randn(3, 4), hx, out=(torch.empty(3, 5), hx))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("name", ["weight", "input", "hx", "out"])
def test_out_has_no_derivative(name: str) -> None:
    module = fused_rnn.GRU(4, 5).requires_grad_(name == "weight")
    x, hx, y = torch.randn(3, 4), torch.zeros(1, 3, 5), torch.empty(3, 5)
    {"input": x, "hx": hx, "out": y}.get(name, x).requires_grad_(name != "weight")
    with pytest.raises(RuntimeError, match=r"GRU.step: functions with out=... arguments don't support automatic diff"):
        module.step(x, hx, out=(y, torch.empty(1, 3, 5)))


Y, H_N = torch.empty(3, 5), torch.empty(1, 3, 5)
BAD = [
    (dict(out=Y), TypeError, "expected out to be a pair .* got Tensor"),
    (dict(out=(Y,)), TypeError, "expected out to be a pair .* got tuple"),
    (dict(out=(Y, None)), TypeError, "expected out to be a pair"),
    (dict(out=(Y, (H_N, H_N))), TypeError, r"expected out\[1\] to be a tensor, got tuple"),
    (dict(out=(Y[:2], H_N)), RuntimeError, r"out to hold .* of shape \[3, 5\] on cpu, got .* of shape \[2, 5\]"),
    (
        dict(out=(Y, H_N[:, :2])),
        RuntimeError,
        r"shape \[1, 3, 5\] on cpu, got a torch.float32 tensor of shape \[1, 2, 5",
    ),
    (dict(out=(Y, H_N.expand(2, 3, 5))), RuntimeError, r"of shape \[1, 3, 5\]"),
    (dict(out=(Y.double(), H_N)), RuntimeError, "expected out to hold a torch.float32 tensor.*got a torch.float64"),
    (dict(out=(H_N[0], H_N)), RuntimeError, "the tensors of out must not share memory"),
    (dict(active=torch.ones(3)), ValueError, "expected active to be a bool tensor, got a torch.float32 tensor"),
    (dict(active=[True] * 3), ValueError, "expected active to be a bool tensor, got list"),
    (dict(active=torch.ones(2, dtype=torch.bool)), RuntimeError, r"Expected active of shape \[3\], got \[2\]"),
    (dict(resets=torch.ones(3, 1, dtype=torch.bool)), RuntimeError, r"Expected resets of shape \[3\], got \[3, 1\]"),
    (dict(reset_state=H_N), ValueError, "reset_state needs resets, got None"),
    (dict(resets=torch.ones(3, dtype=torch.bool), reset_state=0.0), TypeError, "reset_state to be a tensor, got float"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD)
def test_wrong_keywords(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    module = fused_rnn.GRU(4, 5).requires_grad_(False)
    with pytest.raises(error, match="GRU.step: .*" + text):
        module.step(torch.randn(3, 4), **arguments)


def test_the_usual_step_with_keywords_needs_no_second_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_as_sequence", None)
    for cell, options in CELLS:
        for size in SIZES:
            module, mask = build(cell, options, size), torch.ones(size["B"], dtype=torch.bool)
            x, hx = torch.randn(size["B"], size["I"], dtype=torch.float64), state_of(module, size["B"])
            with torch.no_grad():
                out = module.step(x, hx, resets=mask, reset_state=state_of(module, 1))
                module.step(x, hx, active=mask, out=out)
                module.step(x, out=out)


def test_results_that_share_memory_with_inputs() -> None:
    """A state may be its own result. Overlap with any other input gives correct results, too."""
    torch.manual_seed(0)
    gru, x, h = fused_rnn.GRU(5, 5), torch.randn(3, 5), torch.randn(1, 3, 5)
    resets = torch.tensor([True, False, True])
    with torch.no_grad():
        expected = gru.step(x, h, resets=resets, reset_state=h + 1)
        buffer, fresh = h.clone(), h + 1
        actual = gru.step(x, buffer, resets=resets, reset_state=fresh, out=(torch.empty(3, 5), fresh))
        torch.testing.assert_close(actual, expected)
        actual = gru.step(buffer[0], h, out=(torch.empty(3, 5), buffer))
        torch.testing.assert_close(actual, gru.step(h[0], h))
        lstm, h, c = fused_rnn.LSTM(5, 5), torch.randn(1, 3, 5), torch.randn(1, 3, 5)
        y, expected = lstm.step(x, (h, c))
        actual = lstm.step(x, (h, c), out=(torch.empty(3, 5), (c, h)))
        torch.testing.assert_close(actual, (y, expected))


def test_own_checks_with_keywords() -> None:
    """Overridden checks of torch.nn run in every kind of step."""

    def refuse(*args: Any) -> None:
        raise ValueError("refused")

    module = type("Strict", (fused_rnn.GRU,), {"check_input": refuse})(4, 5)
    for keywords in ({}, {"active": torch.ones(3, dtype=torch.bool)}, {"resets": torch.ones(3, dtype=torch.bool)}):
        with torch.no_grad(), pytest.raises(ValueError, match="refused"):
            module.step(torch.randn(3, 4), **keywords)
