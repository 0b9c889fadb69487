"""The specification: every cell as a plain loop over time, in differentiable torch operations.

It is slow and meant to be read. The kernels, the modules and torch.nn are tested against it in float64, and the
second derivative of a layer is computed through it. It works in any floating-point dtype, on any device.

Names and orders are torch.nn's: gates ``i, f, g, o`` (LSTM) and ``r, z, n`` (GRU) stacked in the rows of ``w_ih`` and
``w_hh``; a packed sequence has ``batch_sizes[t]`` rows at step t, longest sequences first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")  # in the order of CellKind, csrc/rnn_params.h
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
"""Row blocks of ``w_ih`` and ``w_hh`` per cell."""


def step(
    cell: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One time step.

    Args:
        cell: one of ``CELLS``.
        x: ``[B, I]``.
        h: ``[B, P]``; P is H, or the projection's size.
        c: ``[B, H]`` for the LSTM, else None.
        w_ih, w_hh, b_ih, b_hh: ``[G*H, I]``, ``[G*H, P]``, ``[G*H]``, ``[G*H]``.
        w_hr: ``[P, H]``, the LSTM's projection (Sak et al. 2014), or None.

    Returns:
        h', c' (None but for the LSTM).
    """
    from_x, from_h = linear(x, w_ih, b_ih), linear(h, w_hh, b_hh)
    if cell == "lstm":  # Hochreiter and Schmidhuber 1997
        assert c is not None
        i, f, g, o = (from_x + from_h).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h if w_hr is None else linear(h, w_hr)), c
    if cell == "gru":  # Cho et al. 2014, the reset gate after the product
        x_r, x_z, x_n = from_x.chunk(3, dim=1)
        h_r, h_z, h_n = from_h.chunk(3, dim=1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        n = (x_n + r * h_n).tanh()
        return (1 - z) * n + z * h, None
    if cell == "rnn_tanh":  # Elman 1990
        return (from_x + from_h).tanh(), None
    if cell == "rnn_relu":
        return (from_x + from_h).relu(), None
    raise ValueError(f"unknown cell {cell!r}; the cells are: {', '.join(CELLS)}")


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer over a whole sequence, in one or two directions.

    Args:
        cell: one of ``CELLS``.
        x: ``[T, B, I]``; ``[N, I]`` with ``batch_sizes``; ``[B, I]`` for a single step, whose
            states and results have no time and direction dimension.
        h0, c0: ``[D, B, P]``, ``[D, B, H]``; None: zeros.
        weights: ``w_ih, w_hh, b_ih, b_hh, w_hr`` of the forward direction and, for a
            bidirectional layer, of the reverse one; None where absent.
        batch_sizes: int64 ``[T]``, rows of each step of a packed sequence, or None.

    Returns:
        y (shaped like x, ``D*P`` wide), h_n, c_n (None but for the LSTM), shaped like h0 and c0.
    """
    if x.dim() == 2 and batch_sizes is None:
        states = (None if s is None else s.unsqueeze(0) for s in (h0, c0))
        y, h_n, c_n = layer(cell, x.unsqueeze(0), *states, weights)
        return y[0], h_n[0], None if c_n is None else c_n[0]

    steps = list(x.unbind(0) if batch_sizes is None else x.split(batch_sizes.tolist()))
    batch = steps[0].size(0)
    outputs, h_last, c_last = [], [], []
    for direction, first in enumerate(range(0, len(weights), 5)):
        w = weights[first : first + 5]
        w_ih, w_hh = w[0], w[1]
        assert w_ih is not None and w_hh is not None
        hidden = w_hh.size(0) // GATES[cell]
        h = x.new_zeros(batch, w_hh.size(1)) if h0 is None else h0[direction]
        c = None
        if cell == "lstm":
            c = x.new_zeros(batch, hidden) if c0 is None else c0[direction]
        y: list[Tensor] = [x] * len(steps)
        order = range(len(steps)) if direction == 0 else reversed(range(len(steps)))
        for t in order:
            n = steps[t].size(0)  # the first n rows take this step, the others keep their state
            h_t, c_t = step(cell, steps[t], h[:n], None if c is None else c[:n], *w)
            y[t] = h_t
            h = torch.cat((h_t, h[n:]))
            c = None if c is None or c_t is None else torch.cat((c_t, c[n:]))
        outputs.append(torch.stack(y) if batch_sizes is None else torch.cat(y))
        h_last.append(h)
        c_last.append(c)
    c_n = None if c_last[0] is None else torch.stack(c_last)
    return torch.cat(outputs, dim=-1), torch.stack(h_last), c_n
