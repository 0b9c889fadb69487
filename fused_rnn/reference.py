"""The specification: every cell as a plain loop over time, in differentiable torch operations.

It is written to be read, not to be fast. The kernels, the modules and torch.nn are tested against it in float64, and
the second derivative of a layer is computed through it. It works in any floating-point dtype and on any device.

Dimension letters: T time steps, B batch rows, I inputs, H hidden units, P size of h (H, or the projection's size), G
gates of the cell, D directions, N rows of a packed sequence.

Names and orders are those of torch.nn. The gates ``i, f, g, o`` (LSTM) and ``r, z, n`` (GRU) are stacked in the rows of
``w_ih`` and ``w_hh``. A packed sequence has ``batch_sizes[t]`` rows at step t, with the longest sequences first.

A step first computes the products ``W_ih x`` and ``W_hh h`` of all gates and adds the biases; `step` has the equations
of each cell. The following options, which torch.nn does not have, can be combined:

- Layer normalisation (Ba, Kiros and Hinton 2016; as in the LayerNormLSTM and LayerNormGRU of the haste library): the
  two products become ``norm_ih * LN(W_ih x) + b_ih`` and ``norm_hh * LN(W_hh h) + b_hh``, and the LSTM's output becomes
  ``h' = o * tanh(norm_c * LN(c') + norm_c_bias)``. LN normalises a row, of G*H sums or of the H units of c', to mean 0
  and variance 1. The next step reads c' without normalisation.
- Zoneout (Krueger et al. 2017): the new state becomes ``zone * new + (1 - zone) * old``, where `zone` is a random mask
  of zeros and ones in training and its expectation in evaluation. The LSTM computes h' from c' before zoneout.
- Recurrent dropout (Gal and Ghahramani 2016): W_hh multiplies ``drop_h * h``, with the same mask at every step.

Weight dropout (DropConnect, Wan et al. 2013; Merity et al. 2018) changes only the W_hh that is passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

if TYPE_CHECKING:
    from typing_extensions import Unpack

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
"""The cells, in the order of CellKind in csrc/rnn_params.h."""
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
"""Number of gates of each cell: the row blocks of ``w_ih`` and ``w_hh``."""
NORM_EPS = 1e-5
"""The epsilon that layer normalisation adds to the variance, as torch.nn.LayerNorm does."""


class Norms(NamedTuple):
    """Gains of the layer normalisation of W_ih x and W_hh h, ``[G*H]``, and the LSTM's gain and bias for c, ``[H]``.

    None where there is no normalisation.
    """

    ih: Tensor | None = None
    hh: Tensor | None = None
    c: Tensor | None = None
    c_bias: Tensor | None = None


NO_NORMS = Norms()


def step(
    cell: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    norms: Norms = NO_NORMS,
    drop_h: Tensor | None = None,
    zone_h: Tensor | None = None,
    zone_c: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One time step.

    Args:
        cell: one of ``CELLS``.
        x: ``[B, I]``; if ``w_ih`` is None, the product W_ih x itself, ``[B, G*H]``.
        h: ``[B, P]``.
        c: ``[B, H]`` for the LSTM, else None.
        w_ih, w_hh, b_ih, b_hh: ``[G*H, I]``, ``[G*H, P]``, ``[G*H]``, ``[G*H]``; None for zero biases.
        w_hr: ``[P, H]``, the LSTM's projection (Sak et al. 2014), or None.
        norms: gains of layer normalisation.
        drop_h: recurrent dropout, ``[B, P]``, or None.
        zone_h, zone_c: zoneout, ``[B, P]`` and ``[B, H]``, or ``[P]`` and ``[H]`` for all rows; or None.

    Returns:
        h' and c'; c' is None except for the LSTM.

    Raises:
        ValueError: cell is unknown.
    """
    wx = x if w_ih is None else linear(x, w_ih)
    wh = linear(h if drop_h is None else h * drop_h, w_hh)
    wx, wh = _normalised(wx, norms.ih), _normalised(wh, norms.hh)
    wx, wh = wx if b_ih is None else wx + b_ih, wh if b_hh is None else wh + b_hh
    if cell == "lstm":  # Hochreiter and Schmidhuber 1997
        assert c is not None
        i, f, g, o = (wx + wh).chunk(4, dim=1)
        c_new = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h_new = o.sigmoid() * _normalised(c_new, norms.c, norms.c_bias).tanh()
        h_new = h_new if w_hr is None else linear(h_new, w_hr)
        return _zoneout(h, h_new, zone_h), _zoneout(c, c_new, zone_c)
    if cell == "gru":  # Cho et al. 2014; the reset gate acts on W_hn h, as in torch.nn
        wx_r, wx_z, wx_n = wx.chunk(3, dim=1)
        wh_r, wh_z, wh_n = wh.chunk(3, dim=1)
        r, z = (wx_r + wh_r).sigmoid(), (wx_z + wh_z).sigmoid()
        n = (wx_n + r * wh_n).tanh()
        return _zoneout(h, (1 - z) * n + z * h, zone_h), None
    if cell == "rnn_tanh":  # Elman 1990
        return _zoneout(h, (wx + wh).tanh(), zone_h), None
    if cell == "rnn_relu":
        return _zoneout(h, (wx + wh).relu(), zone_h), None
    raise ValueError(f"unknown cell {cell!r}; the cells are: {', '.join(CELLS)}")


def _normalised(rows: Tensor, gain: Tensor | None, bias: Tensor | None = None) -> Tensor:
    return rows if gain is None else layer_norm(rows, gain.shape, gain, bias, NORM_EPS)


def _zoneout(old: Tensor, new: Tensor, zone: Tensor | None) -> Tensor:
    return new if zone is None else old + zone * (new - old)


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    c_sequence: bool = False,
    lengths: Tensor | None = None,
    norms: Sequence[Tensor | None] = (),
    drop_h: Tensor | None = None,
    zone_h: Tensor | None = None,
    zone_c: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Unpack[tuple[Tensor, ...]]]:
    """One layer over a whole sequence, in one or two directions.

    Args:
        cell: one of ``CELLS``.
        x: ``[T, B, I]``, or ``[N, I]`` with ``batch_sizes``, or ``[B, I]`` for a single step, whose states and results
            have no dimensions for time and direction.
        h0, c0: initial states, ``[D, B, P]`` and ``[D, B, H]``; None: zeros.
        weights: ``w_ih, w_hh, b_ih, b_hh, w_hr`` of the forward direction and, for a bidirectional layer, of the
            reverse one; None where absent. If w_ih is None, x is the product W_ih x of all directions, ``D*G*H`` wide.
        batch_sizes: int64 ``[T]``, the rows of each step of a packed sequence, or None.
        resets: bool ``[T, B]`` (``[N]`` with ``batch_sizes``), or None. True at step t means that a new sequence begins
            with x[t]: the states are replaced before this step. The reverse direction restarts at the same border, that
            is, before step t - 1.
        reset_h, reset_c: the states that replace h and c, shaped like h0 and c0, or with a different one for each step
            that reads it, ``[T, D, B, ...]``; None: zeros.
        c_sequence: whether to return c of every step as well; LSTM.
        lengths: integers ``[B]``; row b has lengths[b] steps. Its later outputs are zero, its final states are those
            of its last step, and the reverse direction begins there. Not with ``batch_sizes``.
        norms: `Norms` with a first dimension D each; empty: no normalisation.
        drop_h: recurrent dropout, ``[D, B, P]``, or None.
        zone_h, zone_c: zoneout, shaped like y and like c of every step, or ``[D*P]`` and ``[D*H]`` for all steps and
            rows; or None.

    Returns:
        y, shaped like x and ``D*P`` wide; h_n and c_n, shaped like h0 and c0 (c_n is None except for the LSTM); with
        `c_sequence` also c of every step, shaped like x and ``D*H`` wide.

    Example:
        >>> import torch
        >>> from fused_rnn import reference
        >>> weights = [torch.randn(15, 3), torch.randn(15, 5), None, None, None]
        >>> y, h_n, _ = reference.layer("gru", torch.randn(7, 2, 3), None, None, weights)
        >>> y.shape, h_n.shape
        (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """
    if x.dim() == 2 and batch_sizes is None:
        h0, c0, drop_h = (None if s is None else s.unsqueeze(0) for s in (h0, c0, drop_h))
        zone_h, zone_c = (z if z is None or z.dim() == 1 else z.unsqueeze(0) for z in (zone_h, zone_c))
        y, h_n, c_n, *_ = layer(
            cell, x.unsqueeze(0), h0, c0, weights, norms=norms, drop_h=drop_h, zone_h=zone_h, zone_c=zone_c
        )
        return y[0], h_n[0], None if c_n is None else c_n[0]

    if lengths is not None:
        x = without_what_follows(x, lengths)

    def by_step(rows: Tensor) -> list[Tensor]:
        return list(rows.unbind(0) if batch_sizes is None else rows.split(batch_sizes.tolist()))

    def zone_by_step(zone: Tensor | None, direction: int, width: int) -> Sequence[Tensor | None]:
        zone = None if zone is None else zone.narrow(-1, direction * width, width)
        return [zone] * len(steps) if zone is None or zone.dim() == 1 else by_step(zone)

    steps = by_step(x)
    batch = steps[0].size(0)
    outputs, h_last, c_last, c_outputs = [], [], [], []
    for direction, first in enumerate(range(0, len(weights), 5)):
        w_ih, w_hh, b_ih, b_hh, w_hr = weights[first : first + 5]
        assert w_hh is not None
        hidden = w_hh.size(0) // GATES[cell]
        direction_norms = Norms(*(None if norm is None else norm[direction] for norm in norms))
        zones_h, zones_c = zone_by_step(zone_h, direction, w_hh.size(1)), zone_by_step(zone_c, direction, hidden)
        h = x.new_zeros(batch, w_hh.size(1)) if h0 is None else h0[direction]
        c = None
        if cell == "lstm":
            c = x.new_zeros(batch, hidden) if c0 is None else c0[direction]
        h_steps = [x] * len(steps)
        c_steps: list[Any] = [x] * len(steps)
        order = range(len(steps)) if direction == 0 else reversed(range(len(steps)))
        for t in order:
            n = steps[t].size(0)  # only the first n rows have this step; the others keep their states
            if resets is not None:
                begins = _begins(by_step(resets), t, direction)
                if lengths is not None:
                    begins = begins & (t < lengths if direction == 0 else t + 1 < lengths)
                h = _replaced(h, begins, reset_h, t, direction)
                c = None if c is None else _replaced(c, begins, reset_c, t, direction)
            x_t = steps[t] if w_ih is not None else steps[t].narrow(-1, direction * w_hh.size(0), w_hh.size(0))
            drop = None if drop_h is None else drop_h[direction, :n]
            h_t, c_t = step(
                cell,
                x_t,
                h[:n],
                None if c is None else c[:n],
                w_ih,
                w_hh,
                b_ih,
                b_hh,
                w_hr,
                direction_norms,
                drop,
                zones_h[t],
                zones_c[t],
            )
            h_steps[t], c_steps[t] = h_t, c_t
            if lengths is not None:
                active = (t < lengths).unsqueeze(1)
                zero = h_t.new_zeros(())
                h_steps[t], h_t = torch.where(active, h_t, zero), torch.where(active, h_t, h)
                if c is not None and c_t is not None:
                    c_steps[t], c_t = torch.where(active, c_t, zero), torch.where(active, c_t, c)
            h = torch.cat((h_t, h[n:]))
            c = None if c is None or c_t is None else torch.cat((c_t, c[n:]))
        join = torch.stack if batch_sizes is None else torch.cat
        outputs.append(join(h_steps))
        c_outputs += [join(c_steps)] if c_sequence else []
        h_last.append(h)
        c_last += [] if c is None else [c]
    c_n = torch.stack(c_last) if c_last else None
    c_sequences = (torch.cat(c_outputs, dim=-1),) if c_sequence else ()
    return torch.cat(outputs, dim=-1), torch.stack(h_last), c_n, *c_sequences


def without_what_follows(x: Tensor, lengths: Tensor) -> Tensor:
    """`x` ``[T, B, I]`` with zeros beyond each row's length.

    The padding may hold NaN, and a gradient of zero times NaN would be NaN.
    """
    present = torch.arange(x.size(0), device=x.device).unsqueeze(1) < lengths
    return torch.where(present.unsqueeze(2), x, x.new_zeros(()))


def _begins(resets: list[Tensor], t: int, direction: int) -> Tensor:
    """Whether the states of each row of step t are replaced before the step, in the order of the direction."""
    if direction == 0:
        return resets[t]
    next_resets = resets[t + 1] if t + 1 < len(resets) else resets[t][:0]
    return torch.cat((next_resets, next_resets.new_zeros(resets[t].size(0) - next_resets.size(0))))


def _replaced(state: Tensor, begins: Tensor, by: Tensor | None, t: int, direction: int) -> Tensor:
    """`state` ``[B, ...]``, with the reset states `by` in those of its first rows for which `begins` is true."""
    n = begins.size(0)
    new = torch.zeros_like(state) if by is None else (by if by.dim() == 3 else by[t])[direction]
    return torch.cat((torch.where(begins.unsqueeze(1), new[:n], state[:n]), state[n:]))
