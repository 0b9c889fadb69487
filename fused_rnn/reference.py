"""The specification: every cell as a plain loop over time, and the loop over layers, in differentiable operations.

It is slow, and written to be read; the loop over layers runs the kernels' layers, too. The kernels, the modules and
torch.nn are tested against it in float64, and second derivatives of a layer are computed through it. It works with any
floating-point dtype, on any device.

Names and orders are those of torch.nn. The gates ``i, f, g, o`` (LSTM) and ``r, z, n`` (GRU) are stacked in the rows of
``w_ih`` and ``w_hh``. A packed sequence has ``batch_sizes[t]`` rows at step t, longest sequences first.

The following options are not in torch.nn. They work alone and together. LN is layer normalisation over the G*H sums, or
the H units, of a row.

- Layer normalisation (Ba, Kiros and Hinton 2016; the LayerNormLSTM and LayerNormGRU of the haste library): the two
  products become ``norm_ih * LN(W_ih x) + b_ih`` and ``norm_hh * LN(W_hh h) + b_hh``, and the LSTM's output
  ``h' = o * tanh(norm_c * LN(c') + norm_c_bias)``. The next step receives c' without normalisation.
- Zoneout (Krueger et al. 2017): a state becomes ``zone * new + (1 - zone) * old``, where `zone` is a random mask of
  zeros and ones in training, and its expectation in evaluation. The LSTM computes h from the new c, before mixing.
- Recurrent dropout (Gal and Ghahramani 2016): W_hh multiplies ``drop_h * h``, with the same mask at every step.
- Weight dropout (Wan et al. 2013, DropConnect; Merity et al. 2018) passes another W_hh, and needs no code here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from fused_rnn.options import NO_OPTIONS, LayerOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
"""All cells, in the order of CellKind in csrc/rnn_params.h."""
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
"""Row blocks of ``w_ih`` and ``w_hh`` per cell."""
NORM_EPS = 1e-5
"""Added to the variance in layer normalisation, as in torch.nn.LayerNorm."""


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
    norm_ih: Tensor | None = None,
    norm_hh: Tensor | None = None,
    norm_c: Tensor | None = None,
    norm_c_bias: Tensor | None = None,
    drop_h: Tensor | None = None,
    zone_h: Tensor | None = None,
    zone_c: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute one time step.

    Args:
        cell: one of `CELLS`.
        x: ``[B, I]``. If `w_ih` is None, ``[B, G*H]``: the product of the input and W_ih.
        h: ``[B, P]``. P is H, or the size of the projection.
        c: ``[B, H]`` for the LSTM, else None.
        w_ih, w_hh, b_ih, b_hh: weights ``[G*H, I]``, ``[G*H, P]`` and biases ``[G*H]``; the biases may be None.
        w_hr: ``[P, H]``, the LSTM's projection (Sak et al. 2014), or None.
        norm_ih, norm_hh: ``[G*H]``, gains of layer normalisation, or None.
        norm_c, norm_c_bias: ``[H]``, gain and bias of the normalisation of the LSTM's c, or None.
        drop_h: ``[B, P]``, the mask of recurrent dropout, or None.
        zone_h, zone_c: ``[B, P]`` and ``[B, H]``, or ``[P]`` and ``[H]``, the masks of zoneout, or None.

    Returns:
        h' and c'; c' is None except for the LSTM.

    Raises:
        ValueError: cell is unknown; or c is None and the cell an LSTM.
        RuntimeError: sizes or dtypes do not match.
    """
    from_x = x if w_ih is None else linear(x, w_ih)
    from_h = linear(h if drop_h is None else h * drop_h, w_hh)
    from_x, from_h = _normalised(from_x, norm_ih), _normalised(from_h, norm_hh)
    from_x, from_h = from_x if b_ih is None else from_x + b_ih, from_h if b_hh is None else from_h + b_hh
    if cell == "lstm":  # Hochreiter and Schmidhuber 1997
        if c is None:
            raise ValueError("step: expected c to be a tensor for an LSTM, got None")
        i, f, g, o = (from_x + from_h).chunk(4, dim=1)
        c_new = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h_new = o.sigmoid() * _normalised(c_new, norm_c, norm_c_bias).tanh()
        h_new = h_new if w_hr is None else linear(h_new, w_hr)
        return _mixed(h, h_new, zone_h), _mixed(c, c_new, zone_c)
    if cell == "gru":  # Cho et al. 2014, the reset gate after the product
        x_r, x_z, x_n = from_x.chunk(3, dim=1)
        h_r, h_z, h_n = from_h.chunk(3, dim=1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        n = (x_n + r * h_n).tanh()
        return _mixed(h, (1 - z) * n + z * h, zone_h), None
    if cell == "rnn_tanh":  # Elman 1990
        return _mixed(h, (from_x + from_h).tanh(), zone_h), None
    if cell == "rnn_relu":
        return _mixed(h, (from_x + from_h).relu(), zone_h), None
    raise ValueError(f"unknown cell {cell!r}; the cells are: {', '.join(CELLS)}")


def _normalised(rows: Tensor, gain: Tensor | None, bias: Tensor | None = None) -> Tensor:
    return rows if gain is None else layer_norm(rows, gain.shape, gain, bias, NORM_EPS)


def _mixed(old: Tensor, new: Tensor, zone: Tensor | None) -> Tensor:
    return new if zone is None else old + zone * (new - old)


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    options: LayerOptions = NO_OPTIONS,
) -> tuple[Tensor, Tensor, Tensor | None, Unpack[tuple[Tensor, ...]]]:
    """Compute one layer over a whole sequence, in one or two directions.

    Args:
        cell: one of `CELLS`.
        x: ``[T, B, I]``; or ``[N, I]`` with `batch_sizes`; or ``[B, I]`` for a single step, whose states and results
            have no time and no direction dimension.
        h0, c0: initial states ``[D, B, P]`` and ``[D, B, H]``. None means zeros.
        weights: ``w_ih, w_hh, b_ih, b_hh, w_hr`` of the forward direction and, for a bidirectional layer, of the
            reverse direction; None for those that are absent. If w_ih is None, x is the product of the input and W_ih
            of each direction, ``D*G*H`` wide.
        options: fields of `LayerOptions`, of which recompute and deterministic have no meaning here:

        batch_sizes: int64 ``[T]``, the rows of each step of a packed sequence, or None.
        resets: bool ``[T, B]`` (``[N]`` with `batch_sizes`), or None. True at step t ends a sequence before x[t] and
            begins another: the state is replaced before x[t] is consumed. The reverse direction starts anew at the
            same borders.
        reset_h, reset_c: the states that a reset sets, shaped like h0 and c0, or ``[T, D, B, ...]`` with a state for
            every step. None means zeros.
        c_sequence: whether to return c of every step; LSTM only.
        lengths: integers ``[B]``, or None. Row b ends before step lengths[b]: its outputs from there on are zero, its
            final state is that of its last step, and the reverse direction begins there. Not with `batch_sizes`.
        norm_ih, norm_hh, norm_c, norm_c_bias: as in `step`, with an additional first dimension D, or None.
        drop_h: ``[D, B, P]``, the mask of recurrent dropout, or None.
        zone_h, zone_c: the masks of zoneout, shaped like y and like c of every step, or ``[D*P]`` and ``[D*H]`` for
            all steps and rows, or None.

    Returns:
        y, shaped like x but ``D*P`` wide; h_n and c_n, shaped like h0 and c0 (c_n is None except for the LSTM); with
        `options.c_sequence`, also c of every step, shaped like x but ``D*H`` wide.

    Raises:
        ValueError: cell is unknown; or weights are not five for each of one or two directions, or lack a w_hh; or there
            are no time steps.
        RuntimeError: sizes or dtypes do not match.

    Example:
        >>> import torch
        >>> from fused_rnn import reference
        >>> weights = [torch.randn(15, 3), torch.randn(15, 5), None, None, None]
        >>> y, h_n, _ = reference.layer("gru", torch.randn(7, 2, 3), None, None, weights)
        >>> y.shape, h_n.shape
        (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """
    if cell not in CELLS:
        raise ValueError(f"layer: unknown cell {cell!r}; the cells are: {', '.join(CELLS)}")
    if len(weights) not in (5, 10) or weights[1] is None or weights[-4] is None:
        raise ValueError(
            "layer: expected weights to be w_ih, w_hh, b_ih, b_hh, w_hr of one or two directions, with a w_hh each, "
            f"got {len(weights)}: {', '.join('None' if w is None else str(list(w.shape)) for w in weights)}"
        )
    batch_sizes, resets, lengths = options.batch_sizes, options.resets, options.lengths
    drop_h, zone_h, zone_c = options.drop_h, options.zone_h, options.zone_c
    if x.dim() == 2 and batch_sizes is None:
        h0, c0, drop_h = (None if s is None else s.unsqueeze(0) for s in (h0, c0, drop_h))
        zone_h, zone_c = (z if z is None or z.dim() == 1 else z.unsqueeze(0) for z in (zone_h, zone_c))
        options = options._replace(drop_h=drop_h, zone_h=zone_h, zone_c=zone_c)
        y, h_n, c_n, *_ = layer(cell, x.unsqueeze(0), h0, c0, weights, options)
        return y[0], h_n[0], None if c_n is None else c_n[0]

    if lengths is not None:
        x = without_what_follows(x, lengths)

    def by_step(rows: Tensor) -> list[Tensor]:
        return list(rows.unbind(0) if batch_sizes is None else rows.split(batch_sizes.tolist()))

    def zone_at(zone: Tensor | None, direction: int, width: int) -> Sequence[Tensor | None]:
        of_direction = None if zone is None else zone.narrow(-1, direction * width, width)
        return [of_direction] * len(steps) if of_direction is None or of_direction.dim() == 1 else by_step(of_direction)

    steps = by_step(x)
    if not steps:
        raise ValueError(f"layer: expected x to have time steps, got shape {list(x.shape)}")
    batch = steps[0].size(0)
    outputs, h_last, c_last, c_outputs = [], [], [], []
    for direction, first in enumerate(range(0, len(weights), 5)):
        w_ih, w_hh, b_ih, b_hh, w_hr = weights[first : first + 5]
        assert w_hh is not None  # for mypy
        hidden = w_hh.size(0) // GATES[cell]
        norm_ih, norm_hh, norm_c, norm_c_bias = (
            None if norm is None else norm[direction]
            for norm in (options.norm_ih, options.norm_hh, options.norm_c, options.norm_c_bias)
        )
        zones_h, zones_c = zone_at(zone_h, direction, w_hh.size(1)), zone_at(zone_c, direction, hidden)
        h = x.new_zeros(batch, w_hh.size(1)) if h0 is None else h0[direction]
        c = None
        if cell == "lstm":
            c = x.new_zeros(batch, hidden) if c0 is None else c0[direction]
        h_steps = [x] * len(steps)
        c_steps: list[Any] = [x] * len(steps)
        order = range(len(steps)) if direction == 0 else reversed(range(len(steps)))
        for t in order:
            n = steps[t].size(0)  # the first n rows take this step, the others keep their state
            if resets is not None:
                begins = _begins(by_step(resets), t, direction)
                if lengths is not None:
                    begins = begins & (t < lengths if direction == 0 else t + 1 < lengths)
                h = _replaced(h, begins, options.reset_h, t, direction)
                c = None if c is None else _replaced(c, begins, options.reset_c, t, direction)
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
                norm_ih,
                norm_hh,
                norm_c,
                norm_c_bias,
                drop,
                zones_h[t],
                zones_c[t],
            )
            h_steps[t], c_steps[t] = h_t, c_t
            if lengths is not None:
                goes_on = (t < lengths).unsqueeze(1)
                zero = h_t.new_zeros(())
                h_steps[t], h_t = torch.where(goes_on, h_t, zero), torch.where(goes_on, h_t, h)
                if c is not None and c_t is not None:
                    c_steps[t], c_t = torch.where(goes_on, c_t, zero), torch.where(goes_on, c_t, c)
            h = torch.cat((h_t, h[n:]))
            c = None if c is None or c_t is None else torch.cat((c_t, c[n:]))
        join = torch.stack if batch_sizes is None else torch.cat
        outputs.append(join(h_steps))
        c_outputs += [join(c_steps)] if options.c_sequence else []
        h_last.append(h)
        c_last += [] if c is None else [c]
    c_n = torch.stack(c_last) if c_last else None
    of_steps = (torch.cat(c_outputs, dim=-1),) if options.c_sequence else ()
    return torch.cat(outputs, dim=-1), torch.stack(h_last), c_n, *of_steps


def without_what_follows(x: Tensor, lengths: Tensor) -> Tensor:
    """Return `x` ``[T, B, I]`` with zeros after the end of each row, where NaN times zero would reach a gradient."""
    present = torch.arange(x.size(0), device=x.device).unsqueeze(1) < lengths
    return torch.where(present.unsqueeze(2), x, x.new_zeros(()))


def _begins(resets: list[Tensor], t: int, direction: int) -> Tensor:
    """Which of the rows of step t are the first of a sequence, in the order of the direction."""
    if direction == 0:
        return resets[t]
    after = resets[t + 1] if t + 1 < len(resets) else resets[t][:0]
    return torch.cat((after, after.new_zeros(resets[t].size(0) - after.size(0))))


def _replaced(state: Tensor, begins: Tensor, by: Tensor | None, t: int, direction: int) -> Tensor:
    """`state` ``[B, ...]`` with the state of resets in those of its first rows that begin."""
    n = begins.size(0)
    new = torch.zeros_like(state) if by is None else (by if by.dim() == 3 else by[t])[direction]
    return torch.cat((torch.where(begins.unsqueeze(1), new[:n], state[:n]), state[n:]))


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
    run: Callable[..., Any] = layer,
) -> list[Tensor]:
    """Compute all layers of a torch.nn.RNN, LSTM or GRU: layers, directions, dropout between layers.

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
        run: computes one layer, as `layer` does.

    Returns:
        y ``[T, B, D*P]`` or ``[N, D*P]``, h_n ``[L*D, B, P]``, for the LSTM c_n ``[L*D, B, H]``, and with `sequences` h
        and for the LSTM c of every step ``[T, L*D, B, ...]`` or ``[N, L*D, ...]``.
    """
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


def layer_weights(
    weights: Sequence[Any], index: int, num_layers: int, directions: int, has_biases: bool
) -> tuple[Any, ...]:
    """``w_ih, w_hh, b_ih, b_hh, w_hr`` of each direction of one layer, None for those that are absent."""
    count = len(weights) // (num_layers * directions)  # of a direction
    five: list[Any] = []
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
