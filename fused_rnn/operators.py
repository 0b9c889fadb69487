"""The operators ``torch.ops.fused_rnn`` and the order of their arguments; `fused_rnn.options` has that of options.

They have no autograd kernels of their own; `fused_rnn.autograd` differentiates them. The schemas are in csrc/bindings.

On a CPU they are called without torch's dispatcher, which costs more than a small layer, unless a mode or this thread's
profiler watches it (csrc/bindings/direct.h).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import or_
from typing import Any

import torch
from torch import Tensor

from fused_rnn import _C, cuda
from fused_rnn.cell_info import NUMBER
from fused_rnn.options import NO_OPTIONS, LayerOptions, operator_tensors_of

NO_WEIGHTS = (None,) * 5
TIME_FIRST, BATCH_FIRST, UNBATCHED, STEP = range(4)
"""Layouts of x, y and resets, as in csrc/bindings/module_call.h."""

forward_operator: Callable[..., tuple[Tensor, ...]] = _C.forward
"""Arguments: x, h0, c0, the cell's number, whether backward follows, weights. With `forward`, also options."""
backward_operator: Callable[..., tuple[Any, ...]] = _C.backward
step: Callable[..., tuple[Tensor, Tensor]] = _C.step
"""One step of one layer: x, h0, c0, the cell's number, five weights, deterministic -> h, c."""
in_one_call: Callable[..., tuple[Any, ...] | None] = _C.in_one_call
"""y, h_n, c_n and more of all layers, in training through the node of `fused_rnn.autograd`: x, h0, c0, weights, the
cell's number, layers, directions, has_biases, projected, layout, resets, lengths; None if they have to be computed in
turn."""
plain: Callable[..., Any] = _C.plain
"""A plain call of a module or cell: input, hx, the input's dimensions, the cell's number, num_layers (0: a cell),
directions, bias, whether it is projected, batch_first, the parameters, a dict, the lists of the weights' names and of
the weights, resets, lengths -> what it returns; None if the call has to be looked at more closely."""
_step_into = torch.ops.fused_rnn.step_into.default


def forward(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    options: LayerOptions,
    train: bool,
) -> tuple[Tensor, ...]:
    """Compute one layer.

    Args:
        weights: five of each direction, as in `fused_rnn.reference.layer`; w_ih is None if x holds the input's product.
        train: whether `backward` follows.

    Returns:
        y, h_n, c_n, the reserve that `backward` reads, c of every step. h_n of a single step, c_n and c that nobody
        asked for are empty.

    Raises:
        RuntimeError: a tensor does not fit the others in shape, dtype or device.
    """
    if options is NO_OPTIONS:
        arguments: Sequence[object] = weights
    else:
        both = weights if len(weights) > 5 else (*weights, *NO_WEIGHTS)
        o = options
        arguments = (*both, operator_tensors_of(o), o.c_sequence, o.deterministic, o.tf32, o.precision, o.instance)
    operator = forward_operator if x.is_cpu else torch.ops.fused_rnn.forward.default
    run = partial(cuda.in_tf32, operator) if options.tf32 else operator
    return run(x, h0, c0, NUMBER[cell], train, *arguments)


def backward(
    cell: str,
    grads: Sequence[Tensor | None],
    x: Tensor,
    reserve: Tensor,
    weights: Sequence[Tensor | None],
    options: LayerOptions,
    needs: Sequence[bool],
    reset_steps: int,
) -> list[Tensor | None]:
    """Compute the gradients of one layer.

    Args:
        grads: of y, h_n, c_n and, with c_sequence, c of every step; None for those that are absent.
        needs: which gradients are needed, in the order of the result.
        reset_steps: 0 if no gradient of reset_h and reset_c is needed, 1 for one state for all steps, -1 for one each.

    Returns:
        Gradients of x, h0, c0, the weights of each direction, reset_h, reset_c, norm_hh, norm_c, norm_c_bias. Some that
        are not needed may be there.
    """
    dy, dh_n, dc_n, dc_sequence = (*grads, None)[:4]
    w_ih, w_hh, _, _, w_hr, *reverse = weights
    w_ih_reverse, w_hh_reverse, _, _, w_hr_reverse = reverse or NO_WEIGHTS
    count = len(weights)
    needs_of_weights = needs[3 : 3 + count]
    if reverse:  # the operator computes a gradient for both directions, or for neither
        needs_of_weights = list(map(or_, needs_of_weights[:5], needs_of_weights[5:]))
    need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_w_hr = needs_of_weights
    more: tuple[Any, ...] = ()
    if options is not NO_OPTIONS:
        flags = (options.deterministic, options.tf32, options.precision, options.instance)
        more = (operator_tensors_of(options), reset_steps, dc_sequence, *flags)
    operator = backward_operator if x.is_cpu else torch.ops.fused_rnn.backward.default
    run = partial(cuda.in_tf32, operator) if options.tf32 else operator
    dx, dh0, dc0, *rest = run(
        dy, dh_n, dc_n, x, reserve, NUMBER[cell], needs[0], needs[1] or needs[2], need_w_ih, need_w_hh,
        need_b_ih or need_b_hh, need_w_hr, w_ih, w_hh, w_hr, w_ih_reverse, w_hh_reverse, w_hr_reverse, *more,
    )  # fmt: skip
    of_weights, (dreset_h, dreset_c, dnorm_hh, dnorm_c) = rest[:count], rest[-4:]
    dnorms = dnorm_c.unbind(1) if options.norm_c is not None else (None, None)
    return [dx, dh0, dc0, *of_weights, dreset_h, dreset_c, dnorm_hh, *dnorms]


def step_into(
    cell: str,
    x: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    layer: int,
    weights: Sequence[Tensor | None],
    masks: tuple[Tensor | None, Tensor | None],
    reset_states: tuple[Tensor | None, Tensor | None],
    y: Tensor,
    h: Tensor,
    c: Tensor | None,
    deterministic: bool,
) -> None:
    """Compute one time step of one layer for inference, without allocating anything.

    Args:
        x: ``[B, I]``; None means h of the layer below.
        h0, c0: the states of all layers, ``[L, B, ...]``; None means zeros.
        layer: the index of this layer.
        masks: `active` and `resets`, bool ``[B]`` or None: the rows that take the step (the others keep their state),
            and those whose state is replaced before it.
        reset_states: the states that a reset sets, shaped like h0 and c0; None means zeros.
        y, h, c: the results. The last layer writes y ``[B, P]``, zeros where a row is not active. h may be h0, and c
            may be c0.

    Raises:
        RuntimeError: a tensor does not fit the others in shape, dtype or device, or shares memory with a result.
    """
    _step_into(x, h0, c0, layer, NUMBER[cell], *weights, *masks, *reset_states, y, h, c, deterministic)
