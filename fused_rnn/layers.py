"""A stack of layers, one layer, and one step.

`stack` is the readable algorithm of torch.nn's RNN, LSTM and GRU: layers, directions, dropout between layers. `layer`
runs the operators of `fused_rnn.operators`, through `fused_rnn.autograd` if a gradient is needed.
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
    run: Callable[..., Any] | None = None,
) -> list[Tensor]:
    """Compute all layers of a torch.nn.RNN, LSTM or GRU.

    Args:
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        x: ``[T, B, I]``, or ``[N, I]`` with ``batch_sizes`` in the options, the data of a packed sequence.
        h0, c0: the initial states ``[L*D, B, P]`` and ``[L*D, B, H]``. None means zeros.
        weights: torch.nn's ``_flat_weights``: per layer and direction ``w_ih, w_hh[, b_ih, b_hh][, w_hr]``.
        has_biases, num_layers, directions: of the module.
        dropout: between the layers; 0 outside of training.
        options: of every layer.
        options_of: returns a layer's options from its index, its input and its weights, in place of `options`.
        sequences: whether to return the states of every step.
        widths: the sizes of h, and of c, in every layer, if the states of layers lie side by side in the last
            dimension.
        run: computes one layer; `layer` if None. `fused_rnn.reference.layer` makes this the specification.

    Returns:
        y ``[T, B, D*P]`` or ``[N, D*P]``, h_n ``[L*D, B, P]``, for the LSTM c_n ``[L*D, B, H]``, and with `sequences` h
        and for the LSTM c of every step ``[T, L*D, B, ...]`` or ``[N, L*D, ...]``.
    """
    run = layer if run is None else run
    trains = weights[0].requires_grad and torch.is_grad_enabled()  # nearly always all that there is to ask
    plain = options_of is None and options is NO_OPTIONS and widths is None and run is layer
    if plain and not (dropout > 0 or sequences or (trains and num_layers == 1)):
        results = _in_one_call(cell, x, h0, c0, weights, has_biases, num_layers, directions, trains)
        if results is not None:
            return results
    h_layers: Sequence[Tensor | None] = (h0,)
    c_layers: Sequence[Tensor | None] = (c0,)
    if num_layers > 1:
        h_layers, c_layers = by_layer(h0, widths, 0, num_layers), by_layer(c0, widths, 1, num_layers)
    h_n: list[Tensor] = []
    c_n: list[Any] = []
    steps: list[tuple[Tensor, ...]] = []
    for index in range(num_layers):
        if index > 0 and dropout > 0:
            x = torch.dropout(x, dropout, True)
        of_layer = layer_weights(weights, index, num_layers, directions, has_biases)
        if options_of is not None:
            options = options_of(index, x, of_layer)
        x, h, c, *c_steps = run(cell, x, h_layers[index], c_layers[index], of_layer, options)
        h_n.append(h)
        c_n.append(c)
        steps.append((x, *c_steps))
    dim = 0 if widths is None else -1
    results = [x, h_n[0] if num_layers == 1 else torch.cat(h_n, dim)]
    if cell == "lstm":
        results.append(c_n[0] if num_layers == 1 else torch.cat(c_n, dim))
    if sequences:
        results += [
            torch.cat([_by_direction(s, directions) for s in kind], dim or 1) for kind in zip(*steps, strict=True)
        ]
    return results


def _in_one_call(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    directions: int,
    trains: bool,
) -> list[Tensor] | None:
    """The results of `stack` on a CPU, from all layers at once; None if they have to be called in turn.

    In training, layers that share a node of the graph keep what backward reads until it has passed all of them. Large
    ones, to which a node's time is nothing, therefore have nodes of their own. So have layers on top of frozen ones,
    which then keep nothing, and layers under deterministic algorithms: that is an option, and only the node of one
    layer has options.
    """
    if torch.compiler.is_compiling() or policy.on_cuda(x) or x.dtype not in policy.KERNEL_DTYPES or policy.precision(x):
        return None
    if trains or (torch.is_grad_enabled() and any_requires_grad((x, h0, c0, *weights))):
        is_small = x.dim() == 3 and x.size(0) * x.size(1) * directions * weights[0].size(0) <= _SMALL
        if num_layers == 1 or not is_small or deterministic():
            return None
        if not (trains or any_requires_grad((x, h0, c0, *weights[: len(weights) // num_layers]))):
            return None
        all_weights = layer_weights(weights, 0, 1, num_layers * directions, has_biases)
        results: Any = autograd.apply(cell, num_layers, len(all_weights), NO_OPTIONS, x, h0, c0, *all_weights)
    else:
        projected = len(weights) > num_layers * directions * (4 if has_biases else 2)
        results = operators.stack(
            x, h0, c0, NUMBER[cell], num_layers, directions, weights, has_biases, projected, deterministic(), False
        )
    return None if results is None else list(results[: 3 if cell == "lstm" else 2])


_SMALL = 2**20  # elements of a layer's gates, in all steps and directions


def layer_weights(
    weights: Sequence[Tensor], index: int, num_layers: int, directions: int, has_biases: bool
) -> tuple[Tensor | None, ...]:
    """``w_ih, w_hh, b_ih, b_hh, w_hr`` of each direction of one layer, None for those that are absent."""
    count = len(weights) // (num_layers * directions)  # of a direction
    five: list[Tensor | None] = []
    for first in range(index * directions * count, (index + 1) * directions * count, count):
        w = weights[first : first + count]
        five += w if has_biases else (*w[:2], None, None, *w[2:])
        if count - 2 * has_biases == 2:
            five.append(None)
    return tuple(five)


def by_layer(
    state: Tensor | None, widths: Sequence[Sequence[int]] | None, which: int, num_layers: int
) -> Sequence[Tensor | None]:
    """``[..., D, B, size]`` of every layer, of h (`which` is 0) or c (1); `widths` as in `stack`."""
    if state is None:
        return (None,) * num_layers
    return state.chunk(num_layers, -3) if widths is None else state.split(list(widths[which]), -1)


def _by_direction(sequence: Tensor, D: int) -> Tensor:
    """``[T, B, D*P]`` as ``[T, D, B, P]``, ``[N, D*P]`` as ``[N, D, P]``."""
    rows: Tensor = sequence.unflatten(-1, (D, -1))
    return rows.transpose(1, 2) if rows.dim() == 4 else rows


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
        y, h_n, c_n = autograd.apply(cell, 1, len(weights), NO_OPTIONS, x, h0, c0, *weights)
        return y, y if x.dim() == 2 else h_n, c_n if cell == "lstm" else None
    else:
        y, h_n, c_n, _, _ = operators.forward_operator(x, h0, c0, NUMBER[cell], False, *weights)
        return y, y if x.dim() == 2 else h_n, c_n if cell == "lstm" else None
    is_step = options.batch_sizes is None and x.dim() == 2
    return y, y if is_step else h_n, c_n if cell == "lstm" else None, *more


def step(
    cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Compute one time step of one layer: ``[B, I]`` and states ``[B, ...]`` to h' and c' (empty but for the LSTM).

    Raises:
        RuntimeError: a tensor does not fit the others in shape, dtype or device.
    """
    if torch.is_grad_enabled() and any_requires_grad((x, h0, c0, *weights)):
        options = LayerOptions(deterministic=True) if deterministic() else NO_OPTIONS
        tensors = () if options is NO_OPTIONS else differentiable_of(options)
        h, _, c = autograd.apply(cell, 1, len(weights), options, x, h0, c0, *weights, *tensors)
        return h, c
    return operators.step(x, h0, c0, NUMBER[cell], *weights, deterministic())


def step_of_instance(
    instance: int, cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
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
            results: Sequence[Tensor] = autograd.apply(cell, 1, len(weights), options, x, h0, c0, *weights, *tensors)
            return results
    y, h_n, c_n, more, _ = autograd.run_forward(cell, autograd.Inputs(x, h0, c0, tuple(weights)), options, False)
    return [y, h_n, c_n, *more]
