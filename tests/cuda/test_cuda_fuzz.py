"""The CUDA operators under the emulator, called with damaged arguments: a Python exception or results, never a crash.

test_fuzz.py does the same with the CPU operators, and defines the kinds of damage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulated
from fused_rnn import policy, reference
from fused_rnn.options import EVERY_STEP, PLANNED
from operator_calls import OPTIONS, by_name, folded
from test_fuzz import DAMAGES, DISGUISES, check, damaged, searched

pytestmark = emulated.marks

CELLS = list(reference.CELLS)


@pytest.fixture(autouse=True)
def library() -> None:
    emulated.load_once()


def called(operator: str) -> Callable:
    return by_name(getattr(torch.ops.fused_rnn_emulator, operator))


def forward_arguments(
    cell: str, instance: int, D: int, dtype: torch.dtype, kind: str, more: bool, H: int = 8
) -> dict[str, Any]:
    """Arguments of a valid call with `kind` "padded", "packed" or "step", and with all options if `more`."""
    torch.manual_seed(0)
    T, B, size, G = 3, 2, 4, reference.GATES[cell]
    is_lstm, is_step = cell == "lstm", kind == "step"
    shape = {"packed": (5,), "step": (B,)}.get(kind, (T, B))
    state = (B, H) if is_step else (D, B, H)
    normalised = more and instance == EVERY_STEP

    def of(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    weights: dict[str, Tensor | None] = {}
    for suffix in ("", "_reverse"):
        for name, *rows in (("w_ih", G * H, size), ("w_hh", G * H, H), ("b_ih", G * H), ("b_hh", G * H)):
            weights[name + suffix] = of(*rows) if D == 2 or not suffix else None
    return weights | dict(
        x=of(*shape, size),
        h0=of(*state),
        c0=of(*state) if is_lstm else None,
        cell=CELLS.index(cell),
        train=True,
        batch_sizes=torch.tensor([2, 2, 1]) if kind == "packed" else None,
        lengths=torch.tensor([3, 1], dtype=torch.int32) if more and kind == "padded" else None,
        resets=torch.rand(shape) < 0.5 if more and not is_step else None,
        reset_h=of(T, D, B, H) if more and not is_step else None,
        reset_c=of(T, D, B, H) if more and is_lstm and not is_step else None,
        want_c_sequence=more and is_lstm,
        drop_h=of(*state) if more else None,
        zone_h=of(*shape, D * H) if more else None,
        zone_c=of(D * H) if more and is_lstm else None,
        norm_hh=of(D, G * H) if normalised else None,
        norm_c=of(D, H) if normalised and is_lstm else None,
        norm_c_bias=of(D, H) if normalised and is_lstm else None,
        tf32=True,
        instance=instance,
    )


def backward_arguments(given: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(1)
    y, h_n, c_n, reserve, c_sequence = called("forward")(**given)
    names = ("x", "w_ih", "w_hh", "w_ih_reverse", "w_hh_reverse", "cell", "tf32", "instance")
    names += tuple(name for name in OPTIONS if name not in ("reset_h", "reset_c"))  # backward does not read these
    needs = ("dx", "dstate", "dw_ih", "dw_hh", "db", "dw_hr")
    return {name: given[name] for name in names} | dict(
        dy=torch.randn_like(y),
        dh_n=torch.randn_like(h_n) if h_n.numel() else None,
        dc_n=torch.randn_like(c_n) if c_n.numel() else None,
        reserve=reserve,
        reset_steps=0 if given["resets"] is None else -1,
        dc_sequence=torch.randn_like(c_sequence) if c_sequence.numel() else None,
        **{f"need_{need}": True for need in needs},
    )


@st.composite
def calls(draw: Callable, operator: str) -> dict[str, Any]:
    instance = draw(st.sampled_from([PLANNED, EVERY_STEP, 0]))
    dtypes = [torch.float32, torch.bfloat16, torch.float16] + ([torch.float64] if instance == EVERY_STEP else [])
    kind = draw(st.sampled_from(["padded", "packed", "step"]))
    arguments = forward_arguments(
        draw(st.sampled_from(CELLS)),
        instance,
        1 if kind == "step" else draw(st.integers(1, 2)),
        draw(st.sampled_from(dtypes)),
        kind,
        draw(st.booleans()),
    )
    return backward_arguments(arguments) if operator == "backward" else arguments


@pytest.mark.parametrize("operator", ["forward", "backward"])
@settings(searched, max_examples=40)
@given(data=st.data())
def test_damaged_calls(operator: str, data: st.DataObject) -> None:
    call = called(operator)
    # After the end of a row, the values saved by forward are uninitialised memory.
    check(call, damaged(data, data.draw(calls(operator), "call")), slice(3) if operator == "forward" else slice(1, 3))


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize(("kind", "D"), [("padded", 1), ("padded", 2), ("packed", 2), ("step", 1)])
@pytest.mark.parametrize(
    ("instance", "dtype"),
    [
        (0, torch.bfloat16),
        (0, torch.float32),
        (EVERY_STEP, torch.float16),
        (EVERY_STEP, torch.float64),
    ],
)
@pytest.mark.parametrize("cell", CELLS)
def test_fake_kernels_give_what_the_operators_allocate(
    cell: str, instance: int, dtype: torch.dtype, kind: str, D: int, more: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake kernels and operators agree in shapes, strides and dtypes, for all kinds of kernels."""
    monkeypatch.setattr(policy, "on_cuda", lambda x: True)
    arguments = forward_arguments(cell, instance, D, dtype, kind, more, H=13)
    for train in (True, False):
        forward = arguments | dict(train=train)
        torch.library.opcheck(
            torch.ops.fused_rnn_emulator.forward.default,
            (),
            folded(forward),
            test_utils=("test_schema", "test_faketensor"),
        )
    backward = backward_arguments(arguments)
    torch.library.opcheck(
        torch.ops.fused_rnn_emulator.backward.default,
        (),
        folded(backward),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_weights_that_begin_anywhere(cell: str, dtype: torch.dtype) -> None:
    """The kernels load weights in aligned words of 16 bytes, but flat parameters may start at any address."""
    arguments = forward_arguments(cell, 0, 1, dtype, "padded", False)
    moved = DISGUISES["later in a buffer"](arguments["w_hh"])
    assert moved.data_ptr() % 16 and moved.is_contiguous()
    results = []
    for w_hh in (arguments["w_hh"], moved):
        forward = arguments | dict(w_hh=w_hh)
        of_backward = called("backward")(**backward_arguments(forward))
        results.append([*called("forward")(**forward)[:3], *of_backward])
    for found, expected in zip(*results, strict=True):
        assert found is expected or torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("instance", [EVERY_STEP, 0])
def test_autocast_around_a_call_changes_nothing(instance: int, kind: str) -> None:
    """backward may be called under autocast, which would change the dtype of torch's products inside it."""
    forward = forward_arguments("gru", instance, 2, torch.float32, kind, True)
    backward = backward_arguments(forward)
    for operator, arguments in (("forward", forward), ("backward", backward)):
        call = called(operator)
        with torch.autocast("cpu", torch.bfloat16):
            found = call(**arguments)
        for a, b in zip(found[:3], call(**arguments)[:3], strict=True):
            assert a is b or torch.equal(a, b)
        assert [None if t is None else t.dtype for t in found] == [
            None if t is None else t.dtype for t in call(**arguments)
        ]


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_parameters_are_taken_as_they_are(kind: str) -> None:
    """Direct calls with tensors that require gradients compute the same, as on the CPU."""
    forward = forward_arguments("lstm", EVERY_STEP, 2, torch.float32, kind, True)
    backward = backward_arguments(forward)
    for operator, arguments in (("forward", forward), ("backward", backward)):
        call = called(operator)
        differentiable = {
            name: value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in arguments.items()
        }
        results = zip(call(**differentiable)[:3], call(**arguments)[:3], strict=True)
        assert all(torch.equal(a, b) for a, b in results)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("lengths", [[-1, 2], [2**31 - 1, -(2**31)], [4, 0]])
@pytest.mark.parametrize("instance", [EVERY_STEP, 0])
def test_lengths_outside_of_the_sequence(instance: int, lengths: list[int]) -> None:
    """The host does not read the lengths; values outside of [0, T] are clamped."""
    forward = forward_arguments("lstm", instance, 2, torch.float32, "padded", True)
    inside = [min(max(length, 0), 3) for length in lengths]
    results = []
    for given_lengths in (lengths, inside):
        arguments = forward | dict(lengths=torch.tensor(given_lengths, dtype=torch.int32))
        results.append(
            [
                *called("forward")(**arguments)[:3],
                *called("backward")(**backward_arguments(arguments))[1:3],
            ]
        )
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("instance", [-(2**63), -3, 10, 13, 2**31, 2**32 + 1, 2**63 - 1])
def test_kernels_that_are_not_there(instance: int) -> None:
    arguments = forward_arguments("gru", instance, 1, torch.float32, "padded", False)
    with pytest.raises(RuntimeError, match=r"this kernel|there is no kernel"):
        called("forward")(**arguments)


def test_memory_that_was_taken_away() -> None:
    for instance in (EVERY_STEP, 0):
        forward = forward_arguments("lstm", instance, 2, torch.float32, "padded", True)
        for operator, arguments in (("forward", forward), ("backward", backward_arguments(forward))):
            for name in [name for name, value in arguments.items() if isinstance(value, Tensor)]:
                # The message names the weights of both directions alike.
                words = f"{name.removesuffix('_reverse')} reaches beyond the end of its storage"
                with pytest.raises(RuntimeError, match=words):
                    call = called(operator)
                    call(**arguments | {name: DAMAGES["no storage"](arguments[name])})
