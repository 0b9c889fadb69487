"""One layer as one operator, ``torch.ops.fused_rnn.layer``: what torch.compile and torch.export put into their graphs.

The operator is composed of others. An eager call computes what `fused_rnn.layers.layer` does, derivatives of any order
included, so that an exported program can be trained. A compiler lowers it to ``fused_rnn::forward`` and ``backward``,
which need no Python. Nothing here reads a tensor's values or decides by a size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn import layers, lowering, policy, reference
from fused_rnn.options import LayerOptions

_library = torch.library.Library("fused_rnn", "FRAGMENT")
# Arguments and results are those of `fused_rnn.layers.layer`, except that a result it leaves out is empty here.
_library.define(
    "layer(str cell, Tensor x, Tensor? h0, Tensor? c0, Tensor?[] weights, Tensor?[] options, bool c_sequence, "
    "int precision, bool recompute) -> Tensor[]"
)


def _options(tensors: Sequence[Any], c_sequence: bool, precision: int, recompute: bool) -> LayerOptions:
    """The options from the operator's arguments behind the weights."""
    return LayerOptions(*tensors)._replace(c_sequence=c_sequence, precision=precision, recompute=recompute)


def _layer(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    *arguments: Any,
) -> Sequence[Tensor]:
    if policy.transformed():
        y, h_n, c_n, *more = reference.layer(cell, x, h0, c0, weights, _options(*arguments))
        return [y, h_n, x.new_empty(0) if c_n is None else c_n, *more]
    if lowering.in_run_decompositions(x):
        return lowering.decomposed(cell, x, h0, c0, weights, _options(*arguments))
    return layer_of_operators(cell, x, h0, c0, weights, *arguments)


def layer_of_operators(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    *arguments: Any,
) -> Sequence[Tensor]:
    """``fused_rnn::layer`` on the kernels: ``fused_rnn::forward``, and ``backward`` where a gradient is recorded."""
    options = _options(*arguments)
    if options.lengths is not None and not policy.on_cuda(x):
        return _with_lengths(cell, x, h0, c0, weights, options, options.lengths)
    return layers.layer_of_operators(cell, x, h0, c0, weights, options)


_library.impl("layer", _layer, "CompositeImplicitAutograd")


def operator_decompositions() -> Any:
    """The table for ``program.run_decompositions`` that lowers to the operators of `fused_rnn.OPERATORS_LIBRARY`.

    The lowered program runs on the fused kernels in a process that has loaded that library and no Python package.

    Example:
        >>> import torch, fused_rnn
        >>> program = torch.export.export(fused_rnn.GRU(3, 5), (torch.randn(7, 2, 3),))
        >>> lowered = program.run_decompositions(fused_rnn.operator_decompositions())
        >>> [str(node.target) for node in lowered.graph.nodes if "fused_rnn" in str(node.target)]
        ['fused_rnn.forward.default']
    """
    table = torch.export.default_decompositions()
    table[torch.ops.fused_rnn.layer.default] = layer_of_operators
    return table


def _with_lengths(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    options: LayerOptions,
    lengths: Tensor,
) -> list[Tensor]:
    """Rows that end, without the kernels' own `lengths`: what those keep for backward has a size that only values tell.

    Behind its end a row is reset at every step, so the reverse direction begins at the end, and with the initial state.
    The forward direction's final state is looked up among those of every step.
    """
    T, D, wants_c = x.size(0), len(weights) // 5, options.c_sequence
    t = torch.arange(T, device=x.device).unsqueeze(1)
    ended = t >= lengths
    # A state comes in at step t in the forward direction, in the reverse one between t + 1 and t.
    resets, reset_h, reset_c = options.resets, options.reset_h, options.reset_c
    behind = torch.stack([ended, t + 1 >= lengths][:D], 1).unsqueeze(-1)  # [T, D, B, 1]
    if resets is None:
        reset_h, reset_c, resets = h0, c0, ended
    else:
        reset_h, reset_c = (
            None if a is None and b is None else _where(behind, a, b, x) for a, b in ((h0, reset_h), (c0, reset_c))
        )
        resets = resets | ended
    options = options._replace(resets=resets, reset_h=reset_h, reset_c=reset_c, c_sequence=cell == "lstm", lengths=None)
    y, h_n, c_n, *c_steps = layers.layer_of_operators(cell, x, h0, c0, weights, options)
    last = (lengths - 1).clamp(0, T - 1).long().view(1, -1, 1)
    taken = (lengths > 0).unsqueeze(1)

    def final(of_steps: Tensor, state: Tensor, initial: Tensor | None) -> Tensor:
        of_end = of_steps.narrow(2, 0, state.size(2)).gather(0, last.expand(1, -1, state.size(2)))
        return _where(~taken, initial, torch.cat((of_end, state[1:])), x)

    sequences = [_where(ended.unsqueeze(2), None, s, x) for s in (y, *c_steps)]
    states = [final(s, state, initial) for s, state, initial in zip((y, *c_steps), (h_n, c_n), (h0, c0), strict=False)]
    if cell != "lstm":
        return [sequences[0], states[0], c_n]
    return [sequences[0], *states, *sequences[1 : 1 + wants_c]]


def _where(condition: Tensor, this: Tensor | None, other: Tensor | None, like: Tensor) -> Tensor:
    """torch.where; None stands for zeros like those of `like`."""
    zero = like.new_zeros(())
    return torch.where(condition, zero if this is None else this, zero if other is None else other)
