"""A layer as the CUDA operators take it: operands arranged for them, and torch's own products over all time steps.

Forward:  x_gates = x W_ih^T  ->  recurrence  ->  y.
Backward: recurrence in reverse  ->  dgates  ->  one product each for dx, dW_ih and dW_hh, sums for the biases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused_rnn import reference

_Maybe = Tensor | None  # an operator's "Tensor?"
NUMBER = {cell: number for number, cell in enumerate(reference.CELLS)}
"""How the operators name a cell."""

# Of what forward saves and of the gates' gradients: how many blocks of H there are; and which gates come first among
# the gradients of W_ih x (kSaved, kGrads and kInputShift in csrc/cells/; the blocks of W_hh h are the last ones).
_BLOCKS = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 4}
_SHIFT = {"rnn_tanh": 0, "rnn_relu": 0, "lstm": 0, "gru": 1}


@dataclass(frozen=True)
class Segments:
    """Where rows begin and end; `lengths` is int32, the others are as in `fused_rnn.reference.layer`."""

    lengths: Tensor | None = None
    resets: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None

    def arguments(self) -> tuple[Tensor | None, ...]:
        """For the forward operator: the states ``[D, S, B, H]``, S = 1 or T."""
        states = (self.reset_h, self.reset_c)
        shaped = (None if s is None else s.unsqueeze(1) if s.dim() == 3 else s.transpose(0, 1) for s in states)
        resets = None if self.resets is None else self.resets.contiguous()
        return self.lengths, resets, *(None if s is None else s.contiguous() for s in shaped)

    def first(self) -> Tensor | None:
        """Rows ``[B, 1]`` that begin anew at the first step: the kernels leave those to the host."""
        if self.resets is None:
            return None
        begins = self.resets[0] if self.lengths is None else self.resets[0] & (self.lengths > 0)
        return begins.unsqueeze(1)

    def enter(self, state: Tensor | None, fresh: Tensor | None) -> Tensor | None:
        """`state` ``[D, B, H]`` (None: zeros) as the first step consumes it; only direction 0 begins there."""
        begins = self.first()
        if begins is None or (state is None and fresh is None):
            return state
        like = state if state is not None else fresh
        assert like is not None
        of_first = like.new_zeros(()) if fresh is None else (fresh if fresh.dim() == 3 else fresh[0])[0]
        state = like.new_zeros(like.shape[-3:]) if state is None else state
        return torch.cat((torch.where(begins, of_first, state[0]).unsqueeze(0), state[1:]))

    def leave(self, dstate: Tensor, dfresh: Tensor | None) -> Tensor:
        """The gradient of the initial state from that of what was consumed; the rest goes to dfresh, [D, T, B, H]."""
        begins = self.first()
        if begins is None:
            return dstate
        zero = dstate.new_zeros(())
        if dfresh is not None:
            dfresh[0, 0] = torch.where(begins, dstate[0], zero)
        return torch.cat((torch.where(begins, zero, dstate[0]).unsqueeze(0), dstate[1:]))


@dataclass(frozen=True)
class Regularisation:
    """Recurrent dropout ``[D, B, H]``, zoneout ``[T, B, D*H]`` or ``[D*H]``, and norms with a first dimension D."""

    drop_h: Tensor | None = None
    zone_h: Tensor | None = None
    zone_c: Tensor | None = None
    norm_hh: Tensor | None = None
    norm_c: Tensor | None = None
    norm_c_bias: Tensor | None = None

    def normalises(self) -> bool:
        """Whether h's share of the gates or c is normalised, which the resident kernels do not take."""
        return self.norm_hh is not None or self.norm_c is not None

    def arguments(self) -> tuple[Tensor | None, ...]:
        """For both operators."""
        given = (self.drop_h, self.zone_h, self.zone_c, self.norm_hh, self.norm_c, self.norm_c_bias)
        return tuple(None if t is None else t.contiguous() for t in given)


NO_REGULARISATION = Regularisation()


class Layer:
    """A layer's sizes and weights, arranged as the recurrence operators take them.

    Args:
        weights: as in `fused_rnn.reference.layer`, without projections. Where w_ih is None, x holds the input's share
            of the gates.
        resident: by the kernels that keep the recurrent weights on the chip; else a product at every step.
        tf32: whether float32 products may be computed in TF32.
        instance: of the resident kernels, in the order of FUSED_RNN_INSTANCES; -1: the planner's choice.
    """

    def __init__(
        self, cell: str, weights: Sequence[Tensor | None], resident: bool, tf32: bool, instance: int = -1
    ) -> None:
        self.cell, self.resident, self.instance = cell, resident, instance
        self.directions: list[Any] = [weights[first : first + 5] for first in range(0, len(weights), 5)]
        w_hh: Any = weights[1]
        self.G, self.H = reference.GATES[cell], w_hh.size(1)
        # Rows that the resident kernels exchange are whole 16-byte loads.
        whole = 16 // w_hh.dtype.itemsize
        self.padded = -(-self.H // whole) * whole if resident else self.H
        self.tf32 = tf32 and w_hh.dtype is torch.float32 and w_hh.is_cuda

    def forward(
        self,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        segments: Segments,
        train: bool,
        c_sequence: bool = False,
        regularisation: Regularisation = NO_REGULARISATION,
    ) -> tuple[Tensor, ...]:
        """y ``[T, B, D*H]``, h_n, c_n ``[D, B, H]``; what `backward` is to be given; c of every step."""
        h0, c0 = segments.enter(h0, segments.reset_h), segments.enter(c0, segments.reset_c)
        with _products_in_tf32(self.tf32):
            results: tuple[Tensor, ...] = _operators(x).recurrence_forward(
                self._x_gates(x),
                None if h0 is None else h0.contiguous(),
                None if c0 is None else c0.contiguous(),
                NUMBER[self.cell],
                train,
                self.resident,
                self.instance,
                self.recurrent_weights(),
                None if self.directions[0][2] is None else self._stacked(2),
                None if self.directions[0][3] is None else self._stacked(3),
                *segments.arguments(),
                c_sequence,
                *regularisation.arguments(),
                reference.NORM_EPS,
            )
        return results

    def backward(
        self,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        x: Tensor,
        kept: Sequence[Tensor],
        segments: Segments,
        needs: Sequence[bool],
        dc_sequence: Tensor | None = None,
        regularisation: Regularisation = NO_REGULARISATION,
    ) -> list[Tensor | None]:
        """Gradients of the inputs in their order, of which `needs` says which are wanted."""
        of_resets = needs[3:5]
        with _products_in_tf32(self.tf32):
            dgates, dh0, dc0, dreset_h, dreset_c, dh_gates, dnorm_hh, dnorm_c = _operators(x).recurrence_backward(
                *(None if g is None else g.contiguous() for g in (dy, dh_n, dc_n)),
                *kept,
                NUMBER[self.cell],
                self.resident,
                self.instance,
                self.transposed_recurrent_weights(),
                *segments.arguments()[:2],
                any(of_resets),
                None if dc_sequence is None else dc_sequence.contiguous(),
                *regularisation.arguments(),
            )
        dh0 = segments.leave(dh0, dreset_h if any(of_resets) else None)
        dc0 = segments.leave(dc0, dreset_c if any(of_resets) else None) if dc0.numel() else dc0
        dresets = (
            None if state is None or not need else _of_steps(dstate, state)
            for state, dstate, need in zip(
                (segments.reset_h, segments.reset_c), (dreset_h, dreset_c), of_resets, strict=True
            )
        )
        # The operator gives each batch row's part, in the precision it computes in.
        of_rows = (dnorm_hh, *dnorm_c.chunk(2, 2))
        of_norms = (g.sum(1).to(x.dtype) if need else None for g, need in zip(of_rows, needs[5:8], strict=True))
        grads: list[Tensor | None] = [None, dh0 if needs[1] else None, dc0 if needs[2] else None, *dresets, *of_norms]
        first = len(grads)
        T, B, _ = x.shape
        flat, width = x.reshape(T * B, -1), self.G * self.padded
        shift, dx = _SHIFT[self.cell], []
        with _products_in_tf32(self.tf32):
            for d, (w_ih, *_) in enumerate(self.directions):
                need_w_ih, need_w_hh, need_b_ih, need_b_hh, _ = needs[first + 5 * d : first + 5 * d + 5]
                all_gates = dgates[d].view(T * B, -1)
                of_input, of_hidden = all_gates[:, :width], all_gates[:, -width:]
                of_product = dh_gates[d].view(T * B, -1) if dh_gates.numel() else of_hidden
                if needs[0]:
                    dx.append(
                        self._restored(of_input.t(), shift).t()
                        if w_ih is None
                        else torch.mm(of_input, self._arranged(w_ih, shift))
                    )
                # Where steps are products of their own, the reverse direction's states begin one further.
                h_prev = kept[0][d]
                before = h_prev.narrow(0, d * (h_prev.size(0) - T), T).reshape(T * B, -1)
                grads += [
                    self._restored(torch.mm(of_input.t(), flat), shift) if need_w_ih else None,
                    self._restored(torch.mm(of_product.t(), before), 0)[:, : self.H] if need_w_hh else None,
                    self._restored(of_input.sum(0), shift) if need_b_ih else None,
                    self._restored(of_hidden.sum(0), 0) if need_b_hh else None,
                    None,
                ]
        if dx:
            side_by_side = self.directions[0][0] is None
            of_both = torch.cat(dx, 1) if side_by_side else dx[0] if len(dx) == 1 else dx[0].add_(dx[1])
            grads[0] = of_both.view_as(x)
        return grads

    def _x_gates(self, x: Tensor) -> Tensor:
        """The input's share of the gates, ``[D, T, B, G*H]``."""
        T, B, _ = x.shape
        D = len(self.directions)
        if self.directions[0][0] is None:
            return x.reshape(T, B, D, -1).permute(2, 0, 1, 3).contiguous()
        flat = x.reshape(T * B, -1)
        x_gates = [torch.mm(flat, w[0].t()) for w in self.directions]
        return _stack(x_gates).view(D, T, B, -1)

    def recurrent_weights(self) -> Tensor:
        """W_hh of all directions as forward takes it, ``[D, G*H, padded]``."""
        w_hh = self._stacked(1)
        return w_hh if self.padded == self.H else pad(w_hh, (0, self.padded - self.H))

    def transposed_recurrent_weights(self) -> Tensor:
        """W_hh of all directions as backward takes it, ``[D, H, G*padded]``."""
        return _stack([self._arranged(w[1], 0).t() for w in self.directions]).contiguous()

    def _stacked(self, which: int) -> Tensor:
        return _stack([w[which] for w in self.directions]).contiguous()

    def _arranged(self, weight: Tensor, shift: int) -> Tensor:
        """Rows ``[G*H, ...]`` in the order and padding of the gates' gradients, ``[G*padded, ...]``."""
        if shift == 0 and self.padded == self.H:
            return weight
        gates = weight.view(self.G, self.H, -1).roll(shift, 0)
        return pad(gates, (0, 0, 0, self.padded - self.H)).view(self.G * self.padded, -1)

    def _restored(self, rows: Tensor, shift: int) -> Tensor:
        """The inverse of `_arranged`."""
        if shift == 0 and self.padded == self.H:
            return rows
        gates = rows.view(self.G, self.padded, *rows.shape[1:])[:, : self.H].roll(-shift, 0)
        return gates.reshape(self.G * self.H, *rows.shape[1:])


def _of_steps(dstate: Tensor, state: Tensor) -> Tensor:
    """``[D, T, B, H]`` as the state is: one for each step, or one for all."""
    return dstate.transpose(0, 1) if state.dim() == 4 else dstate.sum(1)


def _stack(of_directions: list[Tensor]) -> Tensor:
    return of_directions[0].unsqueeze(0) if len(of_directions) == 1 else torch.stack(of_directions)


def _operators(tensor: Tensor) -> Any:
    # The emulator of the test suite registers the same operators for tensors on the CPU.
    return torch.ops.fused_rnn if tensor.is_cuda else torch.ops.fused_rnn_emulator


@contextmanager
def _products_in_tf32(on: bool) -> Iterator[None]:
    """torch.mm in TF32, as cuDNN computes these products; otherwise as torch's switch for products says."""
    backends: Any = torch.backends  # for type checkers the module that it replaces
    if not on or backends.cuda.matmul.fp32_precision == "tf32":
        yield
        return
    before = backends.cuda.matmul.fp32_precision
    if before == backends.fp32_precision:
        before = "none"  # which follows torch's general setting
    backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        backends.cuda.matmul.fp32_precision = before


def require_one_device(*tensors: Tensor | None) -> None:
    """For fake kernels, which torch calls as soon as one tensor is on "meta".

    Raises:
        RuntimeError: another is on a real device; what a fake kernel returns there would be memory nobody wrote to.
    """
    devices = {str(t.device) for t in tensors if t is not None}
    if len(devices) > 1:
        raise RuntimeError(f"fused_rnn: expected all tensors on one device, got {' and '.join(sorted(devices))}")


def register_fakes(namespace: str) -> None:
    """Tells torch's compilers the shapes of the recurrence operators' results."""

    def recurrence_forward(
        x_gates: Tensor, h0: _Maybe, c0: _Maybe, number: int, train: bool, resident: bool, instance: int, w_hh: Tensor,
        b_ih: _Maybe, b_hh: _Maybe, lengths: _Maybe = None, resets: _Maybe = None, reset_h: _Maybe = None,
        reset_c: _Maybe = None, want_c_sequence: bool = False, drop_h: _Maybe = None, zone_h: _Maybe = None,
        zone_c: _Maybe = None, norm_hh: _Maybe = None, norm_c: _Maybe = None, norm_c_bias: _Maybe = None,
        norm_eps: float = 0.0,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        require_one_device(
            x_gates, h0, c0, w_hh, b_ih, b_hh, lengths, resets, reset_h, reset_c, drop_h, zone_h, zone_c, norm_hh,
            norm_c, norm_c_bias,
        )  # fmt: skip
        cell = reference.CELLS[number]
        D, T, B, width = x_gates.shape
        H, kept = width // reference.GATES[cell], D if train else 0
        of_c = D if cell == "lstm" else 0
        of_state = kept if cell == "lstm" or (cell == "gru" and drop_h is not None) else 0
        slots = T if resident else T + 1
        arithmetic = _arithmetic(x_gates.dtype)
        return (
            x_gates.new_empty((T, B, D * H)),
            x_gates.new_empty((D, B, H)),
            x_gates.new_empty((of_c, B, H)),
            x_gates.new_empty((kept, slots if train else T, B, w_hh.size(2))),
            x_gates.new_empty((kept, T, B, _BLOCKS[cell] * H)),
            x_gates.new_empty((of_state, T, B, H), dtype=arithmetic),
            x_gates.new_empty((0 if norm_hh is None else kept, T, B, width)),
            x_gates.new_empty((0 if norm_hh is None and norm_c is None else kept, T, B, 4), dtype=arithmetic),
            x_gates.new_empty((T, B, D * H) if want_c_sequence else (0,)),
        )

    def recurrence_backward(
        dy: _Maybe, dh_n: _Maybe, dc_n: _Maybe, h_prev: Tensor, saved: Tensor, state_prev: Tensor, h_gates: Tensor,
        statistics: Tensor, number: int, resident: bool, instance: int, w_hh_t: Tensor, lengths: _Maybe = None,
        resets: _Maybe = None, need_dreset: bool = False, dc_sequence: _Maybe = None, drop_h: _Maybe = None,
        zone_h: _Maybe = None, zone_c: _Maybe = None, norm_hh: _Maybe = None, norm_c: _Maybe = None,
        norm_c_bias: _Maybe = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        require_one_device(
            dy, dh_n, dc_n, h_prev, saved, state_prev, h_gates, statistics, w_hh_t, lengths, resets, dc_sequence,
            drop_h, zone_h, zone_c, norm_hh, norm_c, norm_c_bias,
        )  # fmt: skip
        cell = reference.CELLS[number]
        D, T, B, _ = saved.shape
        H, G = w_hh_t.size(1), reference.GATES[cell]
        padded = w_hh_t.size(2) // G
        return (
            saved.new_empty((D, T, B, _BLOCKS[cell] * padded)),
            saved.new_empty((D, B, H)),
            saved.new_empty((D if cell == "lstm" else 0, B, H)),
            saved.new_empty((D if need_dreset else 0, T, B, H)),
            saved.new_empty((D if need_dreset and cell == "lstm" else 0, T, B, H)),
            saved.new_empty((0 if norm_hh is None else D, T, B, G * H)),
            saved.new_empty((0 if norm_hh is None else D, B, G * H), dtype=_arithmetic(saved.dtype)),
            saved.new_empty((0 if norm_c is None else D, B, 2 * H), dtype=_arithmetic(saved.dtype)),
        )

    torch.library.register_fake(f"{namespace}::recurrence_forward")(recurrence_forward)
    torch.library.register_fake(f"{namespace}::recurrence_backward")(recurrence_backward)


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
