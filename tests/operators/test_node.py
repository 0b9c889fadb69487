"""What the graph's nodes keep between forward and backward, and that they refuse contexts that are not theirs.

The derivatives of the node of all layers are tested in test_stack.py.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_rnn
from fused_rnn import _C
from fused_rnn.operators import TIME_FIRST

LAYERS, X, H0, C0 = 2, 0, 1, 2
CALL = (2, LAYERS, 1, True, False, TIME_FIRST, None, None)  # an LSTM
W_IH, W_HH, B_IH, B_HH = range(4)


def tensors_of_call() -> list[Any]:
    shapes = [(20, 4), (20, 5), (20,), (20,)], [(20, 5), (20, 5), (20,), (20,)]
    return [torch.randn(3, 2, 4), None, None, *[torch.randn(shape) for layer in shapes for shape in layer]]


def place(layer: int, weight: int) -> int:
    return 3 + 4 * layer + weight


def context(needs: set[int] | None = None) -> tuple[SimpleNamespace, list[Any], tuple[Tensor, ...]]:
    """A node's after forward, as torch hands it to backward; `needs`: the tensors that need a gradient, None is all."""
    tensors = tensors_of_call()
    needed = tuple(needs is None or i in needs for i in range(len(tensors)))
    ctx = SimpleNamespace(needs_input_grad=(False, *needed))
    results = _C.node_forward(ctx, CALL, *tensors)
    ctx.saved_tensors = ctx.to_save
    return ctx, tensors, results


@pytest.mark.parametrize(
    ("needs", "unread"),
    [
        (None, {place(layer, bias) for layer in range(LAYERS) for bias in (B_IH, B_HH)}),
        ({place(0, W_IH)}, {place(0, W_IH), *[place(layer, b) for layer in range(LAYERS) for b in (B_IH, B_HH)]}),
        ({X}, {X, *[place(layer, b) for layer in range(LAYERS) for b in (B_IH, B_HH)]}),
        ({H0}, {X, place(0, W_IH), *[place(layer, b) for layer in range(LAYERS) for b in (B_IH, B_HH)]}),
    ],
)
def test_what_the_first_derivative_reads_is_saved(needs: set[int] | None, unread: set[int]) -> None:
    ctx, tensors, _ = context(needs)
    assert {i for i, saved in enumerate(ctx.is_saved) if not saved} == unread
    assert all((ctx.aside[i] is tensor) == (i in unread) for i, tensor in enumerate(tensors) if tensor is not None)
    assert ctx.materialize_grads is False and len(ctx.to_save) == 2 + sum(ctx.is_saved)
    for again in (False, True):
        kept, constants, found = _C.node_saved(ctx, again)
        assert len(kept) == 2 and constants == ()
        assert all(a is b for a, b in zip(found, tensors, strict=True))


def test_what_only_a_second_derivative_reads_may_change_until_then() -> None:
    ctx, tensors, _ = context()
    tensors[place(1, B_HH)].add_(1)
    _C.node_saved(ctx, False)
    with pytest.raises(RuntimeError, match=r"second derivative has been modified .* version 1; expected version 0"):
        _C.node_saved(ctx, True)


def test_inference_tensors_have_no_version() -> None:
    with torch.inference_mode():
        inference, *others = tensors_of_call()
    ctx = SimpleNamespace(needs_input_grad=(False, False, False, False, *[True] * 5))
    _C.node_save(ctx, (), (), (inference, *[None] * 2, *others[2:6], None), 1, False)
    ctx.saved_tensors = ctx.to_save
    assert ctx.is_saved == (True, True, True, False, True, False, False, True) and ctx.versions == (None,) * 8
    assert _C.node_saved(ctx, True)[-1][0] is inference


@pytest.mark.parametrize("recompute", [True, False], ids=["one layer", "all layers"])
def test_an_argument_that_holds_the_node_is_freed_after_backward(recompute: bool) -> None:
    """Written to in place, x has a history with the node in it, and the node has x for second derivatives."""
    module, weight = (
        fused_rnn.GRU(4, 4, zoneout=0.1 * recompute).requires_grad_(False),
        torch.randn(4, requires_grad=True),
    )
    x = weight * torch.randn(3, 2, 4)
    held = weakref.ref(x)
    x += module(x)[0]
    x.sum().backward(retain_graph=True)
    x.sum().backward()
    assert weight.grad is not None
    del x
    assert held() is None


@pytest.mark.parametrize(
    "name", ["call", "kept", "constants", "is_saved", "aside", "versions", "needs_input_grad", "saved_tensors"]
)
def test_a_context_that_is_not_the_nodes_own_is_refused(name: str) -> None:
    _, _, grads = context()
    values = (
        None, 0, -1, 1, 3, 10**30, "abc", (), (0,), (-1,) * 11, (99,) * 6, ("a",) * 11, (None,) * 11, (True,) * 11,
        (False,) * 11, (True,) * 12, [1] * 6,
    )  # fmt: skip
    for value in values:
        ctx, tensors, _ = context()
        before = [None if t is None else t.clone() for t in tensors]
        same = name != "saved_tensors" and getattr(ctx, name) == value
        setattr(ctx, name, value)
        try:
            gradients = _C.node_backward(ctx, *grads)
        except (RuntimeError, TypeError, IndexError, KeyError, AttributeError):
            gradients = None
        assert same or gradients is None or name in ("needs_input_grad", "aside", "versions", "is_saved")
        assert all(a is b or torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    delattr(ctx, name)
    with pytest.raises(AttributeError):
        _C.node_backward(ctx, *grads)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        (None,),
        (None, None),
        (None, CALL, *[None] * 11),
        (SimpleNamespace(), CALL, *tensors_of_call()),
        (SimpleNamespace(needs_input_grad=()), CALL, *tensors_of_call()),
        (SimpleNamespace(needs_input_grad=(True,) * 4), CALL, *tensors_of_call()),
        (SimpleNamespace(needs_input_grad=[True] * 12), CALL, *tensors_of_call()),
        (SimpleNamespace(needs_input_grad=(True,) * 12), CALL[:7], *tensors_of_call()),
        (SimpleNamespace(needs_input_grad=(True,) * 12), list(CALL), *tensors_of_call()),
        (SimpleNamespace(needs_input_grad=(True,) * 12), (7, *CALL[1:]), *tensors_of_call()),
        (SimpleNamespace(needs_input_grad=(True,) * 12), ("lstm", *CALL[1:]), *tensors_of_call()),
        (SimpleNamespace(needs_input_grad=(True,) * 12), (2, 3, *CALL[2:]), *tensors_of_call()),
        (SimpleNamespace(needs_input_grad=(True,) * 12), CALL, *tensors_of_call()[:4]),
        (SimpleNamespace(needs_input_grad=(True,) * 12), CALL, *tensors_of_call()[:8]),
    ],
    ids=range(15),
)
def test_wrong_arguments_are_refused(arguments: tuple[Any, ...]) -> None:
    expected = RuntimeError, TypeError, IndexError, KeyError, AttributeError
    functions = _C.node_forward, _C.node_backward, _C.node_save, _C.node_saved, _C.node_is_again
    for function in functions:
        with pytest.raises(expected):
            function(*arguments)
    for count in range(8):
        for function in functions:
            with pytest.raises(expected):
                function(*[None] * count)
