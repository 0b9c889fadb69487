"""All layers of a module, one layer, and one step, on the kernels.

They call the operators of `fused_rnn.operators`, in training through `fused_rnn.autograd`. `fused_rnn.reference` says
what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_rnn import autograd, cuda, operators, policy, reference
from fused_rnn.cell_info import NUMBER
from fused_rnn.options import NO_OPTIONS, LayerOptions, differentiable_of, tensors_of
from fused_rnn.policy import any_requires_grad, deterministic, runs_eagerly

if TYPE_CHECKING:
    from typing_extensions import Unpack


@runs_eagerly
def stack(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    directions: int,
    dropout: float = 0.0,
    options: LayerOptions = NO_OPTIONS,
    options_of: Callable[[int, Tensor, Sequence[Tensor | None]], LayerOptions] | None = None,
    sequences: bool = False,
    widths: Sequence[Sequence[int]] | None = None,
) -> list[Tensor]:
    """Compute all layers of a module; arguments and results are those of `fused_rnn.reference.stack`."""
    compiling = torch.compiler.is_compiling()  # torch 2.10's compiler cannot compare options
    plain = not compiling and options is NO_OPTIONS and options_of is None and widths is None and not sequences
    if plain and (dropout == 0 or num_layers == 1):
        projected = len(weights) > num_layers * directions * (4 if has_biases else 2)
        layout = operators.STEP if x.dim() == 2 else operators.TIME_FIRST
        call = NUMBER[cell], num_layers, directions, has_biases, projected, layout, None, None
        if (results := operators.in_one_call(x, h0, c0, weights, *call)) is not None:
            return list(results[: 3 if cell == "lstm" else 2])
    return reference.stack(
        cell, x, h0, c0, weights, has_biases, num_layers, directions, dropout, options, options_of, sequences, widths,
        run=layer,
    )  # fmt: skip


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    options: LayerOptions = NO_OPTIONS,
) -> tuple[Tensor, Tensor, Tensor | None, Unpack[tuple[Tensor, ...]]]:
    """Compute one layer over a whole sequence; arguments and results are those of `fused_rnn.reference.layer`.

    Raises:
        RuntimeError: a tensor does not fit the others in shape, dtype or device.
    """
    if torch.compiler.is_compiling():  # one operator, defined in fused_rnn/compiled.py
        y, h_n, c_n, *more = torch.ops.fused_rnn.layer.default(
            cell, x, h0, c0, weights, tensors_of(options), options.c_sequence, options.precision, options.recompute
        )
    elif options is not NO_OPTIONS or deterministic() or policy.on_cuda(x) or policy.precision(x):
        y, h_n, c_n, *more = layer_of_operators(cell, x, h0, c0, weights, options)
    elif torch.is_grad_enabled() and any_requires_grad((x, h0, c0, *weights)):
        y, h_n, c_n = autograd.layer(cell, len(weights), NO_OPTIONS, x, h0, c0, *weights)
        return y, y if x.dim() == 2 else h_n, c_n if cell == "lstm" else None
    else:
        y, h_n, c_n, _, _ = operators.forward_operator(x, h0, c0, NUMBER[cell], False, *weights)
        return y, y if x.dim() == 2 else h_n, c_n if cell == "lstm" else None
    is_step = options.batch_sizes is None and x.dim() == 2
    return y, y if is_step else h_n, c_n if cell == "lstm" else None, *more


def step(
    cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Compute one time step of one layer: ``[B, I]`` and states ``[B, ...]`` to h' and, for the LSTM, c'.

    c' of another cell is empty or None.

    Raises:
        RuntimeError: a tensor does not fit the others in shape, dtype or device.
    """
    if torch.is_grad_enabled() and any_requires_grad((x, h0, c0, *weights)):
        if deterministic():
            options = LayerOptions(deterministic=True)
            h, _, c = autograd.layer(cell, len(weights), options, x, h0, c0, *weights, *differentiable_of(options))
            return h, c
        given = [w for w in weights if w is not None]
        call = NUMBER[cell], 0, 1, len(given) > 2, False, operators.STEP, None, None
        h, _, c = autograd.stack(call, x, h0, c0, *given)
        return h, c
    return operators.step(x, h0, c0, NUMBER[cell], *weights, deterministic())


def step_of_instance(
    instance: int, cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """`step` on these kernels (`fused_rnn.options`)."""
    h, _, c, *_ = layer_of_operators(cell, x, h0, c0, weights, LayerOptions(instance=instance))
    return h, c


def layer_of_operators(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    options: LayerOptions,
) -> Sequence[Tensor]:
    """`layer`, except that h_n of a single step is empty, and c_n unless the cell is an LSTM."""
    if options.norm_ih is not None and options.lengths is not None:
        x = reference.without_what_follows(x, options.lengths)
    if deterministic():
        options = options._replace(deterministic=True)
    if x.dtype is torch.float32 and policy.on_cuda(x) and cuda.tf32_allowed():
        options = options._replace(tf32=True)
    if options.precision == policy.HIGHEST:
        steps = x if options.batch_sizes is None else options.batch_sizes
        precision = policy.precision(x, single_step=steps.dim() == 2 or steps.size(0) == 1)
        options = options if precision == policy.HIGHEST else options._replace(precision=precision)
    if torch.is_grad_enabled():
        tensors: tuple[Any, ...] = () if options is NO_OPTIONS else differentiable_of(options)
        if any_requires_grad((x, h0, c0, *weights, *tensors)):
            results: Sequence[Tensor] = autograd.layer(cell, len(weights), options, x, h0, c0, *weights, *tensors)
            return results
    y, h_n, c_n, more, _ = autograd.run_forward(cell, autograd.Inputs(x, h0, c0, tuple(weights)), options, False)
    return [y, h_n, c_n, *more]
