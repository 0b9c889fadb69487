"""One time step, and what torch.nn has not: resets, rows that wait, results in given tensors.

In inference on the CPU a plain step is one operator for all layers. With the rest one operator runs each layer, from
the caller's tensors into the caller's tensors, and allocates nothing. Everything else is `forward` on a sequence of
one, in which a row that waits has length zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fused_rnn import eligibility, functional, ops


@eligibility.runs_eagerly
def run(
    module: Any, input: Tensor, hx: Any, resets: Tensor | None, reset_state: Any, active: Tensor | None, out: Any
) -> tuple[Tensor, Any]:
    """`fused_rnn.modules.FusedRNNBase.step` with any of its keyword arguments; they are explained there."""
    name = f"{module._get_name()}.step"
    module._refresh_flat_weights()
    states, fresh = _given(module, name, "hx", hx), _given(module, name, "reset_state", reset_state)
    results = () if out is None else _given_results(module, name, out)
    differentiable = torch.is_grad_enabled() and ops.any_requires_grad(
        (input, *states, *fresh, *results, *module._flat_weights)
    )
    if differentiable and results:
        raise RuntimeError(
            f"{name}: functions with out=... arguments don't support automatic differentiation, but one of the "
            "arguments requires grad."
        )
    _check_mask(name, "resets", resets, input)
    _check_mask(name, "active", active, input)
    if fresh and resets is None:
        raise ValueError(f"{name}: reset_state needs resets, got None")

    batched = input.dim() == 2
    into = results
    if not batched:
        input = input.unsqueeze(0)
        resets, active = (None if mask is None else mask.unsqueeze(0) for mask in (resets, active))
        states, fresh = _with_row(name, "hx", states), _with_row(name, "reset_state", fresh)
        into = (results[0].unsqueeze(0), *_with_row(name, "out[1]", results[1:])) if results else ()
    found = None
    if (
        not differentiable
        and not eligibility.watched()
        and _is_usual(module, input, states, resets, fresh, active, into)
    ):
        with suppress(RuntimeError):  # if something does not fit, that is found out below
            found = _in_place(module, input, states, resets, fresh, active, into)
            increment_version(results)
    if found is None:
        found = _as_sequence(module, input, states, resets, fresh, active)
        if results:
            _copy(name, found, into)
    if results:
        return out[0], out[1]
    y, *hidden = found if batched else (found[0].squeeze(0), *(h.squeeze(1) for h in found[1:]))
    return y, module._pack_states(hidden)


@eligibility.runs_eagerly
def without_options(module: Any, input: Tensor, states: Any) -> Sequence[Tensor]:
    """y and each state of a plain step, which `FusedRNNBase._usual` has looked at.

    Raises:
        RuntimeError: the operators cannot compute this.
    """
    weights = module._flat_weights
    differentiable = torch.is_grad_enabled() and ops.any_requires_grad((input, *states, *weights))
    if differentiable or input.dtype not in eligibility.KERNEL_DTYPES or (module.training and module.dropout > 0):
        y, *hidden = module._stack(input.unsqueeze(0), states or (None, None))
        return y.squeeze(0), *hidden
    h0, c0 = (*states, None, None)[:2]
    projected = module.mode == "LSTM" and module.proj_size > 0
    return ops.step_layers(module.mode.lower(), input, h0, c0, module.num_layers, weights, module.bias, projected)


def _is_usual(
    module: Any,
    x: Tensor,
    states: Sequence[Any],
    resets: Any,
    fresh: Sequence[Any],
    active: Any,
    into: Sequence[Any],
) -> bool:
    """Whether every check that is left is made by the operator."""
    for mask in (resets, active):
        if mask is not None and not eligibility.plain(mask, 1):
            return False
    for state in (*fresh, *into[1:]):
        if not eligibility.plain(state, 3):
            return False
    return (
        not module._varied
        and x.dtype in eligibility.KERNEL_DTYPES
        and (not into or (eligibility.plain(into[0], 2) and into[1].size(0) == module.num_layers))
        and module._usual(x, 2, module._pack_states(states) if states else None)
    )


def _in_place(
    module: Any,
    x: Tensor,
    states: Sequence[Tensor],
    resets: Tensor | None,
    fresh: Sequence[Tensor],
    active: Tensor | None,
    into: Sequence[Tensor],
) -> Sequence[Tensor]:
    """The results, y and each state, in `into` if that is given.

    Raises:
        RuntimeError: the operator cannot compute this.
    """
    L, B, sizes = module.num_layers, x.size(0), module._state_sizes()
    y, h, *rest = into = into or (x.new_empty(B, sizes[0]), *(x.new_empty(L, B, size) for size in sizes))
    c = rest[0] if rest else None
    h0, c0 = (*states, None, None)[:2]
    reset_h, reset_c = (*(s.expand(L, B, size) for s, size in zip(fresh, sizes, strict=False)), None, None)[:2]
    cell = module.mode.lower()
    below: Tensor | None = x
    for index in range(L):
        weights = functional.weights_of_layer(module._flat_weights, index, L, 1, module.bias)
        ops.step_into(cell, below, h0, c0, index, weights, (active, resets), (reset_h, reset_c), y, h, c)
        drops = module.training and module.dropout > 0 and index < L - 1
        below = torch.dropout(h[index], module.dropout, True) if drops else None
    return into


def _as_sequence(
    module: Any,
    x: Tensor,
    states: Sequence[Tensor],
    resets: Tensor | None,
    fresh: Sequence[Tensor],
    active: Tensor | None,
) -> tuple[Tensor, ...]:
    """y and each state, by forward."""
    from fused_rnn import modules  # which is built on this file

    time_dim = 1 if module.batch_first else 0
    y, hidden = modules.FusedRNNBase.forward(
        module,
        x.unsqueeze(time_dim),
        module._pack_states(states) if states else None,
        resets=None if resets is None else resets.unsqueeze(time_dim),
        reset_state=module._pack_states(fresh) if fresh else None,
        lengths=None if active is None else active.to(torch.int32),
    )
    return y.squeeze(time_dim), *module._given_states(hidden)


def _copy(name: str, found: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    for result, target in zip(found, into, strict=True):
        if target.shape != result.shape or target.dtype is not result.dtype or target.device != result.device:
            raise RuntimeError(
                f"{name}: expected out to hold a {result.dtype} tensor of shape {list(result.shape)} on "
                f"{result.device}, got a {target.dtype} tensor of shape {list(target.shape)} on {target.device}"
            )
    for a, b in combinations(into, 2):
        if not eligibility.watched() and _share_memory(a, b):
            raise RuntimeError(f"{name}: the tensors of out must not share memory")
    for result, target in zip(found, into, strict=True):
        target.copy_(result)


def _given(module: Any, name: str, argument: str, value: Any) -> tuple[Tensor, ...]:
    """The tensors of hx, or of what is shaped like it; none if it is None.

    Raises:
        TypeError: it is something else.
    """
    states: tuple[Tensor, ...] | None = module._given_states(value)
    if states is None or not all(isinstance(s, Tensor) for s in states):
        expected = "a pair of tensors" if module.mode == "LSTM" else "a tensor"
        raise TypeError(f"{name}: expected {argument} to be {expected}, got {type(value).__name__}")
    return states


def _given_results(module: Any, name: str, out: Any) -> tuple[Tensor, ...]:
    """y and each state."""
    if not isinstance(out, (tuple, list)) or len(out) != 2 or not isinstance(out[0], Tensor) or out[1] is None:
        raise TypeError(f"{name}: expected out to be a pair (output, hx) like the results, got {type(out).__name__}")
    return out[0], *_given(module, name, "out[1]", out[1])


def _with_row(name: str, argument: str, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``[L, size]`` as ``[L, 1, size]``.

    Raises:
        RuntimeError: they have another number of dimensions.
    """
    for state in states:
        if state.dim() != 2:
            raise RuntimeError(f"{name}: For unbatched 1-D input, {argument} should be 2-D, got {state.dim()}-D tensor")
    return tuple(state.unsqueeze(1) for state in states)


def _check_mask(name: str, argument: str, mask: Any, input: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        got = f"a {mask.dtype} tensor" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name}: expected {argument} to be a bool tensor, got {got}")
    if mask.shape != input.shape[:-1]:
        raise RuntimeError(f"{name}: Expected {argument} of shape {list(input.shape[:-1])}, got {list(mask.shape)}")
    if mask.device != input.device:
        raise RuntimeError(f"{name}: expected {argument} on {input.device}, got {mask.device}")


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have bytes in common, or lie so close that they may."""
    (a_begin, a_end), (b_begin, b_end) = (
        (t.data_ptr(), t.data_ptr() + t.itemsize * sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))
        for t in (a, b)
    )
    return a.numel() > 0 < b.numel() and a_begin <= b_end and b_begin <= a_end
