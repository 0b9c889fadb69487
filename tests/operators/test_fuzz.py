"""The operators called with damaged arguments: an exception, or the same results as for plain copies of them; no crash.

A valid call is damaged in a few places and made; FUSED_RNN_FUZZ_EXAMPLES is the number of calls. Under the address and
undefined-behaviour sanitizers (.ci/run) this also proves that no damaged call reads or writes outside of a tensor.
Specific hostile calls are in test_ops.py.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import fake_tensor

import fused_rnn
from fused_rnn import _C, reference
from fused_rnn.operators import BATCH_FIRST, UNBATCHED
from fused_rnn.options import LayerOptions, operator_tensors_of
from operator_calls import WAYS, dispatched
from test_ops import KINDS, backward_arguments, forward_arguments
from test_stack import ROWS, stack, stack_arguments

CELLS = list(reference.CELLS)
REFUSALS = (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, AssertionError)
EXAMPLES = int(os.environ.get("FUSED_RNN_FUZZ_EXAMPLES", "60"))
searched = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def shrunk(fresh: Tensor, share: float = 0.0) -> Tensor:
    """The tensor with only a share of its memory left."""
    storage = fresh.untyped_storage()
    storage.resize_(int(storage.nbytes() * share))
    return fresh


def of_bits(t: Tensor) -> Tensor:
    """A bool tensor whose bytes are neither 0 nor 1."""
    return torch.full(t.shape, 255, dtype=torch.uint8).view(torch.bool)


def negated_view(t: Tensor) -> Tensor:
    """A view that is negative only by torch's negation bit."""
    real = t.float() if t.dtype is torch.bfloat16 else t
    return torch.complex(real, real).conj().imag


def first_element(t: Tensor) -> Tensor:
    return t.reshape(-1)[:1] if t.numel() else t.new_zeros(1)


def huge(t: Tensor) -> Tensor:
    """So many rows that their size in bytes overflows, or that many empty rows."""
    rest = t.shape[1:]
    width = max(torch.Size(rest).numel(), 1)
    return first_element(t).expand(2**62 // width, *rest)


# Equal values in another representation: accepted or refused.
DISGUISES: dict[str, Callable[[Tensor], Any]] = {
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "column-major": lambda t: t.mT.contiguous().mT,
    "later in a buffer": lambda t: torch.cat([first_element(t), t.reshape(-1)])[1:].view(t.shape),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "requires grad": lambda t: t.detach().requires_grad_(),
    "sparse": lambda t: t.to_sparse(),
    "compressed": lambda t: t.to_sparse_csr(),
    "onednn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.as_nested_tensor(t, layout=torch.jagged),
    "fake": lambda t: torch._subclasses.FakeTensorMode().from_tensor(t),
}
# Other values or sizes, or no tensor.
DAMAGES: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda t: None,
    "number": lambda t: 1.0,
    "meta": lambda t: t.to("meta"),
    "one element": lambda t: first_element(t).expand(t.shape),
    "overlapping": lambda t: t.contiguous().as_strided(t.shape, (1,) * t.dim()),
    "transposed": lambda t: t.transpose(0, -1),
    "flat": lambda t: t.reshape(-1),
    "scalar": lambda t: first_element(t)[0],
    "one dimension more": lambda t: t.unsqueeze(0),
    "one dimension less": lambda t: t[0],
    "shorter": lambda t: t[1:],
    "narrower": lambda t: t[..., 1:],
    "longer": lambda t: torch.cat([t, t]),
    "wider": lambda t: torch.cat([t, t], -1),
    "no rows": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "nothing": lambda t: t.new_empty(0),
    "huge": huge,
    "huge and empty": lambda t: t.new_empty(0).expand(2**61, *[0] * (t.dim() - 1)),
    "no storage": lambda t: shrunk(t.clone()),
    "half a storage": lambda t: shrunk(t.clone(), 0.5),
    "strided without storage": lambda t: shrunk(t.repeat_interleave(2, -1)[..., ::2]),
    "negated view": negated_view,
    "zeros": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "NaN": lambda t: torch.full_like(t, float("nan")),
    "infinite": lambda t: torch.full_like(t, float("inf")),
    "largest": lambda t: torch.full_like(t, torch.finfo(t.dtype).max),
    "smallest": lambda t: torch.full_like(t, 1e-320),
    "bits": of_bits,
    "inverted": lambda t: ~t,
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
}
OTHER_DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
OTHER_DTYPES += [torch.float8_e4m3fn]
DAMAGES |= {f"{dtype}": (lambda t, dtype=dtype: t.to(dtype)) for dtype in OTHER_DTYPES}
NUMBERS = [-(2**63), -1, 0, 1, 2, 3, 4, 7, 2**31, 2**32 + 1, 2**63 - 1]


def of_step(forward: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `step` from those of `forward`."""
    without = ("train", "batch_sizes", "lengths")
    return {k: v for k, v in forward.items() if not k.endswith("_reverse") and k not in without}


def valid(operator: str) -> dict[str, Any]:
    forward = forward_arguments("lstm", "step" if operator == "step" else "padded")
    return (
        backward_arguments(forward) if operator == "backward" else of_step(forward) if operator == "step" else forward
    )


def with_options(arguments: dict[str, Any], kind: str, D: int, draw: Callable) -> dict[str, Any]:
    """Sometimes add options that torch.nn does not have."""
    arguments["deterministic"] = draw(st.booleans())
    if kind == "step" or not draw(st.booleans()):
        return arguments
    x, w_hh = arguments["x"], arguments["w_hh"]
    is_lstm = CELLS[arguments["cell"]] == "lstm"
    B, H, P = 2, w_hh.size(0) // reference.GATES[CELLS[arguments["cell"]]], w_hh.size(1)
    steps = () if kind == "packed" or draw(st.booleans()) else (x.size(0),)
    arguments["resets"] = torch.rand(x.shape[:-1]) < 0.5
    arguments["reset_h"] = torch.randn(*steps, D, B, P).to(x.dtype)
    if is_lstm:
        arguments["reset_c"] = torch.randn(*steps, D, B, H).to(x.dtype)
        arguments["want_c_sequence"] = draw(st.booleans())
    return arguments


def regularised(arguments: dict[str, Any], D: int, draw: Callable) -> dict[str, Tensor]:
    """Sometimes dropout of h and zoneout."""
    x, w_hh = arguments["x"], arguments["w_hh"]
    H, P = w_hh.size(0) // reference.GATES[CELLS[arguments["cell"]]], w_hh.size(1)
    is_step = x.dim() == 2 and arguments["batch_sizes"] is None
    rows = draw(st.sampled_from([(), x.shape[:-1]]))
    found = {"drop_h": torch.rand((2, P) if is_step else (D, 2, P)), "zone_h": torch.rand(*rows, D * P)}
    if CELLS[arguments["cell"]] == "lstm":
        found["zone_c"] = torch.rand(*rows, D * H)
    return {name: mask.to(x.dtype) for name, mask in found.items() if draw(st.booleans())}


@st.composite
def calls(draw: Callable, operator: str) -> dict[str, Any]:
    """Arguments of a valid call."""
    cell = draw(st.sampled_from(CELLS))
    kind, D = ("step", 1) if operator == "step" else draw(st.sampled_from([*KINDS, ("projected", 2)]))
    if kind == "projected":
        cell = "lstm"
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    arguments = forward_arguments(cell, kind, D, dtype)
    if operator == "step":
        return of_step(arguments) | dict(deterministic=draw(st.booleans()))
    arguments = with_options(arguments, kind, D, draw)
    if operator == "forward":
        return arguments | regularised(arguments, D, draw)
    if "resets" not in arguments:
        return backward_arguments(arguments)
    of_reset = arguments["reset_h"]
    steps = draw(st.sampled_from([0, -1 if of_reset.dim() == 4 else 1]))
    found = backward_arguments(arguments) | dict(resets=arguments["resets"], reset_steps=steps)
    if arguments.get("want_c_sequence"):
        found["dc_sequence"] = dispatched("forward")(**arguments)[4]
    return found


def damaged(data: st.DataObject, arguments: dict[str, Any]) -> dict[str, Any]:
    arguments = dict(arguments)
    names = data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=3, unique=True), "names")
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    for name in names:
        value = arguments[name]
        if isinstance(value, bool):
            arguments[name] = not value
        elif isinstance(value, int):
            arguments[name] = data.draw(st.sampled_from(NUMBERS), name)
        elif not isinstance(value, Tensor) or data.draw(st.integers(0, 9), "alias") == 0:
            arguments[name] = arguments[data.draw(st.sampled_from(tensors), name)]
        else:
            how = data.draw(st.sampled_from([*DISGUISES, *DAMAGES]), name)
            with suppress(*REFUSALS):  # not every tensor can be damaged in every way
                arguments[name] = {**DISGUISES, **DAMAGES}[how](value)
    return arguments


def is_readable(value: Any) -> bool:
    """Whether it can be copied: a dense tensor of moderate size whose memory exists."""
    if not isinstance(value, Tensor) or type(value) not in (Tensor, torch.nn.Parameter):
        return False
    if value.layout is not torch.strided or not value.is_cpu or value.is_quantized or value.is_nested:
        return False
    return (
        torch._is_zerotensor(value)
        or value.numel() == 0
        or (value.numel() < 2**20 and value.untyped_storage().nbytes() >= _bytes(value))
    )


def _bytes(t: Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (t.storage_offset() + last + 1) * t.element_size()


def check(operator: Any, arguments: dict[str, Any], which: slice = slice(None)) -> None:
    """Assert an error, or equal results (those in `which`) for plain copies, and that the call leaves nothing behind.

    The arguments are as before, and so is the state of torch's dispatcher.
    """
    before = {n: v.detach().clone() for n, v in arguments.items() if is_readable(v)}
    keys = torch._C._dispatch_tls_local_exclude_set().raw_repr()
    try:
        # torch refuses real tensors beside fake ones and prints them. If one lacks its memory, printing raises too, and
        # torch's dispatcher is left in the state it had in there: the next operation on zeros without memory crashes.
        with patch.object(fake_tensor, "render_call", lambda *_: "the operator"):
            results = operator(**arguments)
    except REFUSALS:
        results = None
    assert torch._C._dispatch_tls_local_exclude_set().raw_repr() == keys
    for name, value in before.items():
        torch.testing.assert_close(arguments[name].detach(), value, rtol=0, atol=0, equal_nan=True, msg=name)
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    if results is None or not all(is_readable(t) for t in tensors):
        return
    plain = {name: value.contiguous().resolve_neg() for name, value in before.items()}
    for found, expected in zip(results[which], operator(**arguments | plain)[which], strict=True):
        if found is None or found.numel() < 2**20:  # None: a gradient that was not requested
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        else:
            assert found.shape == expected.shape


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operator", ["forward", "backward", "step"])
@searched
@given(data=st.data())
def test_damaged_calls(operator: str, way: str, data: st.DataObject) -> None:
    check(WAYS[way](operator), damaged(data, data.draw(calls(operator), "call")))


def all_layers(**arguments: Any) -> Any:
    """`_C.stack` with every weight as an argument of its own, so that one can be damaged."""
    weights = [arguments.pop(name) for name in list(arguments) if name.startswith("weight")]
    return stack(**arguments, weights=weights)


def all_layers_backward(**arguments: Any) -> Any:
    """As `all_layers`; the gradients that nobody needs are None."""
    weights = [arguments.pop(name) for name in list(arguments) if name.startswith("weight")]
    first, last = [*arguments.values()][:6], [*arguments.values()][6:]
    return _C.stack_backward(*first, weights, *last)


@pytest.mark.parametrize("operator", [all_layers, all_layers_backward], ids=["forward", "backward"])
@searched
@given(data=st.data())
def test_damaged_calls_of_all_layers(operator: Callable[..., Any], data: st.DataObject) -> None:
    cell = data.draw(st.sampled_from(CELLS), "cell")
    layouts = [{"layout": layout} | more for layout in (BATCH_FIRST, UNBATCHED) for more in ({}, {"resets": True})]
    sizes = st.sampled_from([{}, {"D": 2}, {"T": 0}, {"count": 1}, {"biases": False}, {"P": 3}, *ROWS, *layouts])
    changes = data.draw(sizes, "changes")
    cell = "lstm" if "P" in changes else cell
    call = stack_arguments(cell, **changes) | {"train": True}
    weights = {f"weight {i}": w for i, w in enumerate(call.pop("weights"))}
    y, h_n, c_n, between, reserve = all_layers(**call, **weights)
    if operator is all_layers:
        check(operator, damaged(data, call | weights))
        return
    names = ("cell", "layers", "directions", "has_biases", "projected", "layout", "resets", "lengths")
    kept = {name: call[name] for name in names}
    needs = tuple(data.draw(st.lists(st.booleans(), min_size=3 + len(weights), max_size=3 + len(weights)), "needs"))
    given = dict(dy=y, dh_n=h_n, dc_n=c_n, x=call["x"], between=between, reserve=reserve) | kept | {"needs": needs}
    assert len(operator(**given, **weights)) == len(needs)
    check(operator, damaged(data, given | weights))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operator", ["forward", "backward", "step"])
@searched
@given(data=st.data())
def test_disguised_calls(operator: str, way: str, data: st.DataObject) -> None:
    """All tensors in valid but unusual representations: every call computes."""
    arguments = data.draw(calls(operator), "call")
    kept = ["every second", "column-major", "later in a buffer", "parameter", "requires grad"]
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.dtype.is_floating_point and value.numel():
            how = data.draw(st.sampled_from(kept), name)
            arguments[name] = DISGUISES[how](value) if value.dim() > 1 or how != "column-major" else value
    expected = {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    for found, wanted in zip(WAYS[way](operator)(**arguments), dispatched(operator)(**expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operator", ["forward", "backward", "step"])
@pytest.mark.parametrize("how", ["no storage", "half a storage", "strided without storage"])
def test_memory_that_was_taken_away(operator: str, how: str, way: str) -> None:
    """torch itself crashes on such tensors, which sharded training makes by resizing storages."""
    arguments = valid(operator)
    names = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.numel()]
    assert len(names) > 5
    for name in names:
        with pytest.raises(RuntimeError, match=f"{name} reaches beyond the end of its storage"):
            WAYS[way](operator)(**arguments | {name: DAMAGES[how](arguments[name])})


@pytest.mark.parametrize("cell", CELLS)
def test_any_number_of_steps_of_nothing(cell: str) -> None:
    """An empty batch or layer takes no time, whatever the number of steps."""
    G, steps = reference.GATES[cell], 2**45
    number, weights = CELLS.index(cell), [torch.randn(G * 5, 4), torch.randn(G * 5, 5)]
    for x, (w_ih, w_hh) in [
        (torch.empty(steps, 0, 4), weights),
        (torch.empty(steps, 2, 0), [torch.empty(0, 0)] * 2),
    ]:
        y, h_n, _, reserve, _ = torch.ops.fused_rnn.forward(x, None, None, number, True, w_ih, w_hh)
        assert y.numel() == h_n.numel() == 0
        needs = [True] * 6
        grads = torch.ops.fused_rnn.backward(None, None, None, x, reserve, number, *needs, w_ih, w_hh)
        assert grads[0].shape == x.shape
        assert not any(g.any() for g in grads[3:] if g is not None)
    with pytest.raises(RuntimeError, match="is too large"):
        torch.ops.fused_rnn.forward(torch.empty(2**31, 2**31, 0), None, None, number, True, w_ih, w_hh)
    with pytest.raises(RuntimeError, match="too large"):
        x, w_ih = torch.empty(1, 0, 2**63 - 1), torch.empty(0, 2**63 - 1)
        torch.ops.fused_rnn.forward(x, None, None, number, True, w_ih, torch.empty(0, 0))


def test_the_gains_of_an_empty_batch_have_no_gradient() -> None:
    """Their gradients are zero and not uninitialised memory."""
    garbage = [torch.full((2, 5), float("nan")) for _ in range(64)]
    lstm = fused_rnn.LSTM(4, 5, layer_norm=True)
    del garbage
    lstm(torch.empty(3, 0, 4))[0].sum().backward()
    assert not any(weight.grad.any() for weight in lstm.parameters() if weight.grad is not None)


@pytest.mark.parametrize("cell", CELLS)
def test_sizes_beyond_32_bits_have_shapes(cell: str) -> None:
    """Shapes are computed on the meta device."""
    G, T, B, H = reference.GATES[cell], 2**20, 2**8, 2**10
    x, w_ih, w_hh = (torch.empty(s, device="meta") for s in ((T, B, 3), (G * H, 3), (G * H, H)))
    number = CELLS.index(cell)
    for train in (False, True):
        y, h_n, _, reserve, _ = torch.ops.fused_rnn.forward(x, None, None, number, train, w_ih, w_hh)
        assert y.shape == (T, B, H) and h_n.shape == (1, B, H) and y.device.type == "meta"
    assert reserve.numel() > 2**31
    dx, dh0, *_ = torch.ops.fused_rnn.backward(y, h_n, None, x, reserve, number, *[True] * 6, w_ih, w_hh)
    assert dx.shape == x.shape and dh0.shape == h_n.shape
    h, _ = torch.ops.fused_rnn.step(torch.empty(2**32, 3, device="meta"), None, None, number, w_ih, w_hh)
    assert h.shape == (2**32, H)


@pytest.mark.parametrize("operator", ["forward", "backward", "step"])
def test_one_tensor_on_another_device(operator: str) -> None:
    """A fake kernel that ran with a real tensor among its arguments would return uninitialised memory."""
    arguments = valid(operator)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            with pytest.raises(RuntimeError, match="expected all tensors on one device, got cpu and meta"):
                dispatched(operator)(**arguments | {name: value.to("meta")})


def test_batch_sizes_that_change_during_the_call() -> None:
    """Another Python thread writes to them while the kernels run: the checked values must be the ones used."""
    T, B = 200, 8
    sizes = torch.full((T,), B)
    x, w_ih, w_hh = torch.randn(T * B, 4), torch.randn(20, 4), torch.randn(20, 5)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            sizes.fill_(2**40)
            sizes.fill_(B)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            try:
                y, *_ = torch.ops.fused_rnn.forward(
                    x, None, None, 2, True, w_ih, w_hh, options=operator_tensors_of(LayerOptions(sizes))
                )
            except RuntimeError:
                continue
            assert y.shape == (T * B, 5) and y.isfinite().all()
    finally:
        stop.set()
        writer.join()
