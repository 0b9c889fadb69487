"""From one layer to the whole: layers, directions, dropout between layers.

This is the readable algorithm of torch.nn's RNN, LSTM and GRU; `fused_rnn.ops.layer` makes it fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_rnn import ops


def stack(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_sizes: Tensor | None = None,
    layer: Callable = ops.layer,
) -> tuple[Tensor, ...]:
    """All layers of a torch.nn.RNN, LSTM or GRU.

    Args:
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        x: ``[T, B, I]``, or ``[N, I]`` with ``batch_sizes`` (a packed sequence's data).
        states: h0 ``[L*D, B, P]``, and for the LSTM c0 ``[L*D, B, H]``; None for zeros.
        weights: torch.nn's ``_flat_weights``: per layer and direction ``w_ih, w_hh[, b_ih, b_hh][, w_hr]``.
        has_biases, num_layers, dropout, bidirectional: as in torch.nn; dropout only acts with ``train``.
        batch_sizes: int64 ``[T]`` or None.
        layer: what computes one layer; `fused_rnn.reference.layer` makes this the specification.

    Returns:
        y ``[T, B, D*P]`` (or ``[N, D*P]``), h_n ``[L*D, B, P]`` and for the LSTM c_n ``[L*D, B, H]``.
    """
    D = 2 if bidirectional else 1
    h0, c0 = (_by_layer(state, num_layers) for state in (*states, None)[:2])
    count = len(weights) // (num_layers * D)  # of a direction
    h_n, c_n = [], []
    for index in range(num_layers):
        if index > 0 and train and dropout > 0:
            x = torch.dropout(x, dropout, True)
        start = index * D * count
        of_layer = _five(weights[start : start + count], has_biases)
        if bidirectional:
            of_layer += _five(weights[start + count : start + 2 * count], has_biases)
        x, h, c = layer(cell, x, h0[index], c0[index], of_layer, batch_sizes)
        h_n.append(h)
        c_n.append(c)
    return (x, _join(h_n), _join(c_n)) if cell == "lstm" else (x, _join(h_n))


def _five(weights: Sequence[Tensor], has_biases: bool) -> tuple[Tensor | None, ...]:
    """``w_ih, w_hh, b_ih, b_hh, w_hr``, None where absent."""
    if not has_biases:
        weights = [*weights[:2], None, None, *weights[2:]]
    return tuple(weights) if len(weights) == 5 else (*weights, None)


def _by_layer(state: Tensor | None, num_layers: int) -> Sequence[Tensor | None]:
    """``[D, B, ...]`` of every layer."""
    return (state,) * num_layers if state is None or num_layers == 1 else state.chunk(num_layers)


def _join(states: list[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(states)
