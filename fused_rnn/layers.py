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
        results = in_one_call(cell, x, h0, c0, weights, has_biases, num_layers, directions)
        if results is not None:
            return results
    return reference.stack(
        cell, x, h0, c0, weights, has_biases, num_layers, directions, dropout, options, options_of, sequences, widths,
        run=layer,
    )  # fmt: skip


@runs_eagerly
def stack_step(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    backend: str,
) -> Sequence[Tensor]:
    """Compute one step of all layers of a module without options, y ``[B, P]`` and the states, from x ``[B, I]``.

    The arguments are those of `stack`, and the module's backend, "auto" or "fused".
    """
    if (
        cell != "lstm"
        and backend == "auto"
        and torch.is_grad_enabled()
        and policy.torch_trains_steps(cell, x.dtype, x.size(0), weights[1].size(1))
        and any_requires_grad((x, h0, *weights))
    ):
        # Where products take most of the time, torch's are as fast, in spite of the views of states and results.
        states = (None,) * num_layers if h0 is None else h0.unbind()
        hidden: list[Tensor] = []
        for index, state in enumerate(states):
            if index > 0 and dropout > 0:
                x = torch.dropout(x, dropout, True)
            x = torchs_rnn_step(cell, x, state, reference.layer_weights(weights, index, num_layers, 1, has_biases))
            hidden.append(x)
        return x, torch.stack(hidden) if num_layers > 1 else x.unsqueeze(0)
    if dropout == 0 or num_layers == 1:
        results = in_one_call(cell, x, h0, c0, weights, has_biases, num_layers, 1)
        if results is not None:
            return results
    y, *finals = reference.stack(cell, x.unsqueeze(0), h0, c0, weights, has_biases, num_layers, 1, dropout, run=layer)
    return y.squeeze(0), *finals


def in_one_call(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    directions: int,
) -> list[Tensor] | None:
    """The results of `stack` on a CPU, from all layers at once; None if they have to be called in turn.

    x may be ``[B, I]``, one step of all layers, whose y is ``[B, P]``.

    In training, layers that share a node of the graph keep what backward reads until it has passed all of them. Large
    ones, to which a node's time is nothing, therefore have nodes of their own. So have layers on top of frozen ones,
    which then keep nothing, and layers under deterministic algorithms: that is an option, and only the node of one
    layer has options.
    """
    is_step = x.dim() == 2
    if torch.compiler.is_compiling() or policy.on_cuda(x) or x.dtype not in policy.KERNEL_DTYPES:
        return None
    if policy.precision(x, is_step or x.size(0) == 1):
        return None
    projected = len(weights) > num_layers * directions * (4 if has_biases else 2)
    results: Any
    if torch.is_grad_enabled() and (weights[0].requires_grad or any_requires_grad((x, h0, c0, *weights))):
        rows = x.size(0) if is_step else x.size(0) * x.size(1)
        if deterministic() or (num_layers > 1 and rows * directions * weights[0].size(0) > _SMALL):
            return None
        if not (weights[0].requires_grad or any_requires_grad((x, h0, c0, *weights[: len(weights) // num_layers]))):
            return None
        results = autograd.stack(cell, (num_layers, directions), has_biases, projected, x, h0, c0, *weights)
    else:
        results = operators.stack(
            x, h0, c0, NUMBER[cell], num_layers, directions, weights, has_biases, projected, deterministic(), False
        )
    return None if results is None else list(results[: 3 if cell == "lstm" else 2])


_SMALL = 2**20  # elements of a layer's gates, in all steps and directions


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
        options = LayerOptions(deterministic=True) if deterministic() else NO_OPTIONS
        if options is NO_OPTIONS and x.dtype in policy.KERNEL_DTYPES:
            given = [w for w in weights if w is not None]
            h, _, c = autograd.stack(cell, (0, 1), len(given) > 2, False, x, h0, c0, *given)
            return h, c
        tensors = () if options is NO_OPTIONS else differentiable_of(options)
        h, _, c = autograd.layer(cell, len(weights), options, x, h0, c0, *weights, *tensors)
        return h, c
    return operators.step(x, h0, c0, NUMBER[cell], *weights, deterministic())


def step_of_instance(
    instance: int, cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """`step` on these kernels (`fused_rnn.options`)."""
    h, _, c, *_ = layer_of_operators(cell, x, h0, c0, weights, LayerOptions(instance=instance))
    return h, c


def torchs_rnn_step(cell: str, x: Tensor, h0: Tensor | None, weights: Sequence[Tensor | None]) -> Tensor:
    """h' of `step` of an RNN, from torch's own function, whose autograd nodes cost less than ours."""
    w_ih, w_hh, b_ih, b_hh = weights[:4]
    h0 = x.new_zeros(x.size(0), w_hh.size(0)) if h0 is None else h0  # type: ignore[union-attr]  # never None
    return _TORCHS_RNN_CELL[cell](x, h0, w_ih, w_hh, b_ih, b_hh)


_TORCHS_RNN_CELL: dict[str, Callable[..., Tensor]] = {"rnn_tanh": torch.rnn_tanh_cell, "rnn_relu": torch.rnn_relu_cell}


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
