"""One time step, and what torch.nn does not have: resets, rows that wait, results in given tensors.

In inference on the CPU one operator runs each layer, from the caller's tensors into the caller's tensors, and
allocates nothing. Everything else is `fused_rnn.call.run` on a sequence of one step, in which a row that waits has
length zero. A plain step, also one with nothing but `resets`, does without this file (`fused_rnn.modules`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fused_rnn import call, operators, policy, reference
from fused_rnn.spec import Spec, states_of


def refuse(name: str, bidirectional: bool, input: Any) -> NoReturn:
    """Raise the error of a module or an input that has no step.

    Raises:
        ValueError: the module is bidirectional.
        TypeError: input is not a tensor.
        RuntimeError: it has another number of dimensions.
    """
    if bidirectional:
        raise ValueError(f"{name}: expected bidirectional=False, got {bidirectional}")
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: expected input to be a Tensor, got {type(input).__name__}")
    raise RuntimeError(f"{name}: expected input to be 1-D or 2-D, got {input.dim()}-D tensor")


def check_hx(name: str, has_c: bool, input: Tensor, hx: Any) -> None:
    """Refuse a state whose structure does not fit a step of `input`; sizes are left to `forward`.

    Raises:
        TypeError: hx is not a tensor, or pair of tensors.
        RuntimeError: they have another number of dimensions.
    """
    _check_rank(name, "hx", _given(has_c, name, "hx", hx), input.dim() == 2)


@policy.runs_eagerly
def run(
    spec: Spec,
    input: Tensor,
    hx: Any,
    resets: Tensor | None,
    reset_state: Any,
    active: Tensor | None,
    out: Any,
) -> tuple[Tensor, Any]:
    """Compute `fused_rnn.LSTM.step` with any of its keyword arguments."""
    name = f"{spec.name}.step"
    states, fresh = _given(spec.has_c, name, "hx", hx), _given(spec.has_c, name, "reset_state", reset_state)
    results = () if out is None else _given_results(spec.has_c, name, out)
    differentiable = torch.is_grad_enabled() and policy.any_requires_grad(
        (input, *states, *fresh, *results, *spec._flat_weights)
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
    if not differentiable and _operator_takes(spec, input, states, resets, fresh, active, into):
        tensors = _in_place(spec, input, states, resets, fresh, active, into)
        increment_version(results)
    else:
        _check_rank(name, "hx", states, batched=True)
        tensors = _as_sequence(spec, input, states, resets, fresh, active)
        if results:
            _copy(name, tensors, into)
    if results:
        return out[0], out[1]
    y, *hidden = tensors if batched else (tensors[0].squeeze(0), *(h.squeeze(1) for h in tensors[1:]))
    return y, spec.pack(hidden)


def _operator_takes(
    spec: Spec,
    x: Tensor,
    states: Sequence[Any],
    resets: Any,
    fresh: Sequence[Any],
    active: Any,
    into: Sequence[Any],
) -> bool:
    """Whether the operator computes this step; shapes and dtypes that it would refuse are left to `fused_rnn.call`."""
    if (
        spec.checks is not None
        or policy.watched()
        or spec.backend == "torch"
        or torch.is_autocast_enabled("cpu")
        or x.dtype not in policy.KERNEL_DTYPES
    ):
        return False
    if (
        spec.side_by_side
        or spec.norms
        or spec.recompute
        or spec.recurrent_dropout
        or spec.weight_dropout
        or any(spec.zoneout)
    ):
        return False
    L, B, sizes = spec.num_layers, x.size(0), spec.state_sizes
    shapes = [(L, B, size) for size in sizes]
    if x.size(1) != spec.input_size:
        return False
    for tensor in (x, *states, *fresh, *into, *spec._flat_weights):
        if type(tensor) not in policy.PLAIN_TYPES or not tensor.is_cpu or tensor.dtype is not x.dtype:
            return False
    for mask in (resets, active):
        if mask is not None and not policy.plain(mask, 1):
            return False
    for given, shape in zip((*states, *into[1:]), (*shapes[: len(states)], *shapes), strict=False):
        if given.shape != shape:
            return False
    for given, (_, _, size) in zip(fresh, shapes, strict=False):
        if (
            given.dim() != 3
            or given.size(0) not in (1, L)
            or given.size(1) not in (1, B)
            or given.size(2) not in (1, size)
        ):
            return False
    if into:
        y, *hidden = into
        rows_fit = (
            y.shape == (B, sizes[0]) and (sizes[0] == 1 or y.stride(1) == 1) and (B < 2 or y.stride(0) >= sizes[0])
        )
        if not rows_fit or not all(s.is_contiguous() for s in hidden):
            return False
        # A state may be its own result; no other input may share memory with a result.
        inputs = [x, *fresh, *(s for s, h in zip(states, hidden, strict=False) if s.data_ptr() != h.data_ptr())]
        if len({t.untyped_storage().data_ptr() for t in (*into, *inputs)}) < len(into) + len(inputs):
            return not any(_share_memory(a, b) for a, b in (*combinations(into, 2), *product(into, inputs)))
    return True


def _in_place(
    spec: Spec,
    x: Tensor,
    states: Sequence[Tensor],
    resets: Tensor | None,
    fresh: Sequence[Tensor],
    active: Tensor | None,
    into: Sequence[Tensor],
) -> Sequence[Tensor]:
    """The results, y and each state, in `into` if that is given."""
    L, B, sizes = spec.num_layers, x.size(0), spec.state_sizes
    y, h, *rest = into = into or (x.new_empty(B, sizes[0]), *(x.new_empty(L, B, size) for size in sizes))
    c = rest[0] if rest else None
    h0, c0 = (*states, None, None)[:2]
    reset_h, reset_c = (*(s.expand(L, B, size) for s, size in zip(fresh, sizes, strict=False)), None, None)[:2]
    below: Tensor | None = x
    for index in range(L):
        weights = reference.layer_weights(spec._flat_weights, index, L, 1, spec.bias)
        operators.step_into(
            spec.cell, below, h0, c0, index, weights, (active, resets), (reset_h, reset_c), y, h, c,
            policy.deterministic(),
        )  # fmt: skip
        drops = spec.training and spec.dropout > 0 and index < L - 1
        below = torch.dropout(h[index], spec.dropout, True) if drops else None
    return into


def _as_sequence(
    spec: Spec,
    x: Tensor,
    states: Sequence[Tensor],
    resets: Tensor | None,
    fresh: Sequence[Tensor],
    active: Tensor | None,
) -> tuple[Tensor, ...]:
    """y and each state, from a sequence of one step."""
    time_dim = 1 if spec.batch_first else 0
    y, hidden = call.run(
        spec,
        None,
        x.unsqueeze(time_dim),
        spec.pack(states) if states else None,
        resets=None if resets is None else resets.unsqueeze(time_dim),
        reset_state=spec.pack(fresh) if fresh else None,
        lengths=None if active is None else active.to(torch.int32),
    )
    return y.squeeze(time_dim), *(spec.states(hidden) or ())


def _copy(name: str, results: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    for result, target in zip(results, into, strict=True):
        if target.shape != result.shape or target.dtype is not result.dtype or target.device != result.device:
            raise RuntimeError(
                f"{name}: expected out to hold a {result.dtype} tensor of shape {list(result.shape)} on "
                f"{result.device}, got a {target.dtype} tensor of shape {list(target.shape)} on {target.device}"
            )
    for a, b in combinations(into, 2):
        if not policy.watched() and _share_memory(a, b):
            raise RuntimeError(f"{name}: the tensors of out must not share memory")
    for result, target in zip(results, into, strict=True):
        target.copy_(result)


def _given(has_c: bool, name: str, argument: str, value: Any) -> tuple[Tensor, ...]:
    """The tensors of hx, or of what is shaped like it; none if it is None.

    Raises:
        TypeError: it is something else.
    """
    states = states_of(value, has_c)
    if states is None or not all(isinstance(s, Tensor) for s in states):
        expected = "a pair of tensors" if has_c else "a tensor"
        raise TypeError(f"{name}: expected {argument} to be {expected}, got {type(value).__name__}")
    return states


def _given_results(has_c: bool, name: str, out: Any) -> tuple[Tensor, ...]:
    """y and each state."""
    if not isinstance(out, (tuple, list)) or len(out) != 2 or not isinstance(out[0], Tensor) or out[1] is None:
        raise TypeError(f"{name}: expected out to be a pair (output, hx) like the results, got {type(out).__name__}")
    return out[0], *_given(has_c, name, "out[1]", out[1])


def _with_row(name: str, argument: str, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``[L, size]`` as ``[L, 1, size]``.

    Raises:
        RuntimeError: they have another number of dimensions.
    """
    _check_rank(name, argument, states, batched=False)
    return tuple(state.unsqueeze(1) for state in states)


def _check_rank(name: str, argument: str, states: Sequence[Tensor], batched: bool) -> None:
    for state in states:
        if state.dim() != (3 if batched else 2):
            kind, expected = ("batched 2-D", 3) if batched else ("unbatched 1-D", 2)
            raise RuntimeError(
                f"{name}: For {kind} input, {argument} should be {expected}-D, got {state.dim()}-D tensor"
            )


def _check_mask(name: str, argument: str, mask: Any, input: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        raise ValueError(f"{name}: expected {argument} to be a bool tensor, got {call.kind_of(mask)}")
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
