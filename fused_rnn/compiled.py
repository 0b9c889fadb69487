"""One layer as one operator, ``torch.ops.fused_rnn.layer``: what torch.compile and torch.export put into their graphs.

It is composed of others. Called eagerly it does what `fused_rnn.ops.layer` does, derivatives of any order included, so
that an exported program can be trained; lowered by a compiler, it leaves ``fused_rnn::forward`` and ``backward``, which
need no Python. Nothing here reads a tensor's values, and nothing but a CUDA layer's batch decides by a size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn import eligibility, lowering, ops, reference

_library = torch.library.Library("fused_rnn", "FRAGMENT")
# The arguments are `fused_rnn.ops.layer`'s; the results, too, but that what that leaves out is empty here.
_library.define(
    "layer(str cell, Tensor x, Tensor? h0, Tensor? c0, Tensor?[] weights, Tensor? batch_sizes, Tensor? resets, "
    "Tensor? reset_h, Tensor? reset_c, bool c_sequence, Tensor? lengths, Tensor?[] norms, Tensor? drop_h, "
    "Tensor? zone_h, Tensor? zone_c, bool recompute) -> Tensor[]"
)


def _layer(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    c_sequence: bool,
    lengths: Tensor | None,
    *variant: Any,
) -> Sequence[Tensor]:
    layer, of_resets = (cell, x, h0, c0, weights), (resets, reset_h, reset_c)
    if eligibility.transformed():
        y, h_n, c_n, *more = reference.layer(*layer, batch_sizes, *of_resets, c_sequence, lengths, *variant[:-1])
        return [y, h_n, x.new_empty(0) if c_n is None else c_n, *more]
    if lowering.in_run_decompositions(x):
        return lowering.decomposed(*layer, batch_sizes, *of_resets, c_sequence, lengths, *variant[:-1])
    return layer_of_operators(*layer, batch_sizes, *of_resets, c_sequence, lengths, *variant)


def layer_of_operators(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    c_sequence: bool,
    lengths: Tensor | None,
    *variant: Any,
) -> Sequence[Tensor]:
    """``fused_rnn::layer`` on the kernels: ``fused_rnn::forward``, and ``backward`` where a gradient is recorded."""
    layer, of_resets = (cell, x, h0, c0, weights), (resets, reset_h, reset_c)
    if lengths is not None and not eligibility.on_cuda(x):
        return _with_lengths(*layer, *of_resets, c_sequence, lengths, *variant)
    return ops.layer_of_kernels(*layer, batch_sizes, *of_resets, c_sequence, lengths, *variant)


_library.impl("layer", _layer, "CompositeImplicitAutograd")


def _with_lengths(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    c_sequence: bool,
    lengths: Tensor,
    *variant: Any,
) -> list[Tensor]:
    """Rows that end, without the kernels' own `lengths`: what those keep for backward has a size that only values tell.

    Behind its end a row is reset at every step, so the reverse direction begins at the end, and with the initial state.
    The forward direction's final state is looked up among those of every step.
    """
    T, D = x.size(0), len(weights) // 5
    t = torch.arange(T, device=x.device).unsqueeze(1)
    ended = t >= lengths
    # A state comes in at step t in the forward direction, in the reverse one between t + 1 and t.
    behind = torch.stack([ended, t + 1 >= lengths][:D], 1).unsqueeze(-1)  # [T, D, B, 1]
    if resets is None:
        reset_h, reset_c, resets = h0, c0, ended
    else:
        reset_h, reset_c = (
            None if a is None and b is None else _where(behind, a, b, x) for a, b in ((h0, reset_h), (c0, reset_c))
        )
        resets = resets | ended
    y, h_n, c_n, *c_steps = ops.layer_of_kernels(
        cell, x, h0, c0, weights, None, resets, reset_h, reset_c, cell == "lstm", None, *variant
    )
    last = (lengths - 1).clamp(0, T - 1).long().view(1, -1, 1)
    taken = (lengths > 0).unsqueeze(1)

    def final(of_steps: Tensor, state: Tensor, initial: Tensor | None) -> Tensor:
        of_end = of_steps.narrow(2, 0, state.size(2)).gather(0, last.expand(1, -1, state.size(2)))
        return _where(~taken, initial, torch.cat((of_end, state[1:])), x)

    sequences = [_where(ended.unsqueeze(2), None, s, x) for s in (y, *c_steps)]
    states = [final(s, state, initial) for s, state, initial in zip((y, *c_steps), (h_n, c_n), (h0, c0), strict=False)]
    if cell != "lstm":
        return [sequences[0], states[0], c_n]
    return [sequences[0], *states, *sequences[1 : 1 + c_sequence]]


def _where(condition: Tensor, this: Tensor | None, other: Tensor | None, like: Tensor) -> Tensor:
    """torch.where; None stands for zeros like those of `like`."""
    zero = like.new_zeros(())
    return torch.where(condition, zero if this is None else this, zero if other is None else other)
