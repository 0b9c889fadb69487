"""One layer on a CUDA device: the recurrence operators, and torch's own products over all time steps around them.

Forward:  x_gates = x W_ih^T  ->  recurrence  ->  y.
Backward: recurrence in reverse  ->  dgates  ->  one product each for dx, dW_ih and dW_hh, sums for the biases.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused_rnn import _C, reference

if TYPE_CHECKING:
    from fused_rnn.ops import Steering

NUMBER = {cell: number for number, cell in enumerate(reference.CELLS)}
"""How the operators name a cell."""

# Of what forward saves and of the gates' gradients: how many blocks of H there are; and which gates come first among
# the gradients of W_ih x (kSaved, kGrads and kInputShift in csrc/cells/; the blocks of W_hh h are the last ones).
_BLOCKS = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 4}
_SHIFT = {"rnn_tanh": 0, "rnn_relu": 0, "lstm": 0, "gru": 1}


MEASURED: frozenset[int] = frozenset()
"""Compute capabilities (10 * major + minor) of devices with results in benchmarks/results: none yet."""


def available() -> bool:
    """Whether the CUDA library was built, and this torch can use it. Loads it, which registers its operators."""
    return _load()


available._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, short of importing the compiler


@lru_cache(maxsize=1)
def _load() -> bool:
    library = Path(__file__).with_name("_cuda.so")
    if torch.version.cuda is None or not library.is_file():
        return False
    try:
        torch.ops.load_library(library)
    except OSError as error:
        warnings.warn(f"fused_rnn's CUDA kernels cannot be used, torch.nn's are: {error}", stacklevel=2)
        return False
    register_fakes("fused_rnn")
    return True


def tf32_allowed() -> bool:
    """Whether float32 layers may multiply in TF32: torch's switch for cuDNN's recurrent layers."""
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"


def is_resident(
    cell: str, dtype: torch.dtype, batch: int, hidden_size: int, directions: int, properties: tuple[int, int, int]
) -> bool:
    """Whether the kernels that keep the recurrent weights on the chip take such a layer."""
    if dtype is torch.float64 or (dtype is torch.float32 and not tf32_allowed()):
        return False
    return bool(
        plans(cell, dtype, batch, hidden_size, directions, False, properties)
        and plans(cell, dtype, batch, hidden_size, directions, True, properties)
    )


@lru_cache(maxsize=4096)
def plans(
    cell: str,
    dtype: torch.dtype,
    batch: int,
    hidden_size: int,
    directions: int,
    backward: bool,
    properties: tuple[int, int, int],
) -> list[dict[str, Any]]:
    """The resident kernels that could run a layer's recurrence, best first; `properties` as `device_properties`."""
    return _C.cuda_plans(NUMBER[cell], dtype.itemsize, batch, hidden_size, directions, backward, *properties)


def device_properties(device: torch.device) -> tuple[int, int, int]:
    """Multiprocessors, bytes of shared memory that a block may have, and 10 * major + minor compute capability."""
    return _properties(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _properties(index: int) -> tuple[int, int, int]:
    p = torch.cuda.get_device_properties(index)
    return p.multi_processor_count, p.shared_memory_per_block_optin, 10 * p.major + p.minor


def torch_is_faster(
    mode: str,
    dtype: torch.dtype,
    x: Sequence[int],
    hidden_size: int,
    num_layers: int,
    directions: int,
    properties: tuple[int, int, int],
) -> bool:
    """Whether cuDNN should run a module, by what is known of it; `x` is the input's shape, time first.

    On a device on which nothing was measured, it does. Elsewhere: it keeps the weights on the chip only for a float16
    LSTM of one layer and direction whose sizes suit it (torch's cudnn/RNN.cpp). Nothing else wins where a step is a
    product of its own, or there are few steps.
    """
    T, batch, input_size = x
    if properties[2] not in MEASURED:
        return True
    if T < 8 or not is_resident(mode.lower(), dtype, batch, hidden_size, directions, properties):
        return True
    return (
        mode == "LSTM"
        and dtype is torch.float16
        and num_layers == directions == 1
        and hidden_size % 128 == input_size % 128 == batch % 8 == 0
        and hidden_size <= 1024
        and batch <= 128
    )


def forward(
    steering: Steering, inputs: Sequence[Tensor | None], train: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """y, h_n, c_n as the operator ``fused_rnn::forward``'s, what else was asked for, and what `backward` needs.

    `steering` and the order of inputs are `fused_rnn.ops`'.
    """
    x, h0, c0, reset_h, reset_c, _, _, _, *weights = inputs
    assert x is not None and weights[1] is not None
    call = _Call(x, steering)
    layer = _layer(steering.cell, call, weights)
    h0, c0 = call.with_direction(h0), call.with_direction(c0)
    segments = Segments(call.lengths, call.resets, reset_h, reset_c)
    y, h_n, c_n, *kept, c_of_steps = layer.forward(call.padded(x), h0, c0, segments, train, steering.c_sequence)
    h_n = h_n.new_empty(0) if call.is_step else h_n
    c_n = c_n.squeeze(0) if call.is_step and steering.cell == "lstm" else c_n
    more = (call.unpadded(c_of_steps),) if steering.c_sequence else ()
    return call.unpadded(y), h_n, c_n, more, tuple(kept)


def backward(
    steering: Steering,
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the inputs; `grads` are those of forward's results, None for zeros."""
    x, _, _, reset_h, reset_c, _, _, _, *weights = inputs
    assert x is not None
    call = _Call(x, steering)
    layer = _layer(steering.cell, call, weights, kept)
    dy, dh_n, dc_n, *dc_sequence = grads
    dx, dh0, dc0, *rest = layer.backward(
        None if dy is None else call.padded(dy),
        None if dh_n is None or call.is_step else dh_n,
        call.with_direction(dc_n) if steering.cell == "lstm" else None,
        call.padded(x),
        kept,
        Segments(call.lengths, call.resets, reset_h, reset_c),
        needs,
        *(None if g is None else call.padded(g) for g in dc_sequence),
    )
    if call.is_step:
        dh0, dc0 = (None if g is None else g.squeeze(0) for g in (dh0, dc0))
    return [None if dx is None else call.unpadded(dx), dh0, dc0, *rest]


def _layer(cell: str, call: _Call, weights: Sequence[Tensor | None], kept: Sequence[Tensor] = ()) -> Layer:
    """`kept` tells backward which way forward took, whatever torch's switches say by now."""
    w_hh: Any = weights[1]
    directions = len(weights) // 5
    if kept:
        return Layer(cell, weights, kept[0].size(1) == call.steps, tf32_allowed())
    properties = device_properties(w_hh.device)
    batch = int(call.batch)  # the kernels differ by it: a compiler has to settle for one
    resident = call.steps > 1 and is_resident(cell, w_hh.dtype, batch, w_hh.size(1), directions, properties)
    return Layer(cell, weights, resident, tf32_allowed())


class _Call:
    """The shape of one call: a sequence ``[T, B, I]``, one step ``[B, I]``, or packed rows ``[N, I]``.

    The kernels take padded sequences; rows that have ended are left out by `lengths`.
    """

    def __init__(self, x: Tensor, steering: Steering) -> None:
        batch_sizes, lengths, resets = steering.batch_sizes, steering.lengths, steering.resets
        self.resets = resets
        self.is_step = batch_sizes is None and x.dim() == 2
        self.lengths = None if lengths is None else lengths.to(torch.int32).contiguous()
        self.rows = None
        if batch_sizes is None:
            self.steps, self.batch = (1, x.size(0)) if self.is_step else x.shape[:2]
            return
        self.steps, self.batch = batch_sizes.size(0), int(batch_sizes[0])
        present = torch.arange(self.batch) < batch_sizes.unsqueeze(1)  # [T, B]
        self.lengths = present.sum(0, dtype=torch.int32).to(x.device, non_blocking=True)
        self.rows = present.flatten().nonzero().squeeze(1).to(x.device, non_blocking=True)
        if resets is not None:
            self.resets = self.padded(resets.unsqueeze(1)).squeeze(2)

    def padded(self, x: Tensor) -> Tensor:
        """``[T, B, width]``; zeros where a row has ended."""
        if self.is_step:
            return x.unsqueeze(0)
        if self.rows is None:
            return x
        out = x.new_zeros(self.steps * self.batch, x.size(1))
        return out.index_copy_(0, self.rows, x).view(self.steps, self.batch, -1)

    def unpadded(self, y: Tensor) -> Tensor:
        if self.is_step:
            return y.squeeze(0)
        return y if self.rows is None else y.flatten(0, 1).index_select(0, self.rows)

    def with_direction(self, state: Tensor | None) -> Tensor | None:
        return state.unsqueeze(0) if self.is_step and state is not None else state


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


class Layer:
    """A layer's sizes and weights, arranged as the recurrence operators take them.

    Args:
        weights: as in `fused_rnn.reference.layer`, without projections.
        resident: by the kernels that keep the recurrent weights on the chip; else a product at every step.
        tf32: whether float32 products may be computed in TF32.
        instance: of the resident kernels, in the order of FUSED_RNN_INSTANCES; -1: the planner's choice.
    """

    def __init__(
        self, cell: str, weights: Sequence[Tensor | None], resident: bool, tf32: bool, instance: int = -1
    ) -> None:
        self.cell, self.resident, self.instance = cell, resident, instance
        self.directions = [weights[first : first + 5] for first in range(0, len(weights), 5)]
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
    ) -> tuple[Tensor, ...]:
        """y ``[T, B, D*H]``, h_n, c_n ``[D, B, H]``; h_prev, saved and c_prev for `backward`; c of every step."""
        h0, c0 = segments.enter(h0, segments.reset_h), segments.enter(c0, segments.reset_c)
        T, B, _ = x.shape
        with _products_in_tf32(self.tf32):
            flat = x.reshape(T * B, -1)
            x_gates = [torch.mm(flat, w[0].t()) for w in self.directions]  # type: ignore[union-attr]
            return _operators(x).recurrence_forward(
                _stack(x_gates).view(len(self.directions), T, B, -1),
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
            )

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
    ) -> list[Tensor | None]:
        """Gradients of the inputs in their order, of which `needs` says which are wanted."""
        h_prev, saved, c_prev = kept
        of_resets = needs[3:5]
        with _products_in_tf32(self.tf32):
            dgates, dh0, dc0, dreset_h, dreset_c = _operators(x).recurrence_backward(
                *(None if g is None else g.contiguous() for g in (dy, dh_n, dc_n)),
                h_prev,
                saved,
                c_prev,
                NUMBER[self.cell],
                self.resident,
                self.instance,
                self.transposed_recurrent_weights(),
                *segments.arguments()[:2],
                any(of_resets),
                None if dc_sequence is None else dc_sequence.contiguous(),
            )
        dh0 = segments.leave(dh0, dreset_h if any(of_resets) else None)
        dc0 = segments.leave(dc0, dreset_c if any(of_resets) else None) if dc0.numel() else dc0
        dresets = (
            None if state is None or not need else _of_steps(dstate, state)
            for state, dstate, need in zip(
                (segments.reset_h, segments.reset_c), (dreset_h, dreset_c), of_resets, strict=True
            )
        )
        of_norms = (None, None, None)
        grads: list[Tensor | None] = [None, dh0 if needs[1] else None, dc0 if needs[2] else None, *dresets, *of_norms]
        first = len(grads)
        T, B, _ = x.shape
        flat, width = x.reshape(T * B, -1), self.G * self.padded
        shift, dx = _SHIFT[self.cell], None
        with _products_in_tf32(self.tf32):
            for d, (w_ih, *_) in enumerate(self.directions):
                need_w_ih, need_w_hh, need_b_ih, need_b_hh, _ = needs[first + 5 * d : first + 5 * d + 5]
                all_gates = dgates[d].view(T * B, -1)
                of_input, of_hidden = all_gates[:, :width], all_gates[:, -width:]
                if needs[0]:
                    part = torch.mm(of_input, self._arranged(w_ih, shift))
                    dx = part if dx is None else dx.add_(part)
                # Where steps are products of their own, the reverse direction's states begin one further.
                before = h_prev[d].narrow(0, d * (h_prev.size(1) - T), T).reshape(T * B, -1)
                grads += [
                    self._restored(torch.mm(of_input.t(), flat), shift) if need_w_ih else None,
                    self._restored(torch.mm(of_hidden.t(), before), 0)[:, : self.H] if need_w_hh else None,
                    self._restored(of_input.sum(0), shift) if need_b_ih else None,
                    self._restored(of_hidden.sum(0), 0) if need_b_hh else None,
                    None,
                ]
        grads[0] = None if dx is None else dx.view_as(x)
        return grads

    def recurrent_weights(self) -> Tensor:
        """W_hh of all directions as forward takes it, ``[D, G*H, padded]``."""
        w_hh = self._stacked(1)
        return w_hh if self.padded == self.H else pad(w_hh, (0, self.padded - self.H))

    def transposed_recurrent_weights(self) -> Tensor:
        """W_hh of all directions as backward takes it, ``[D, H, G*padded]``."""
        return _stack([self._arranged(w[1], 0).t() for w in self.directions]).contiguous()

    def _stacked(self, which: int) -> Tensor:
        return _stack([w[which] for w in self.directions]).contiguous()  # type: ignore[misc]

    def _arranged(self, weight: Any, shift: int) -> Tensor:
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
    if not on or torch.backends.cuda.matmul.fp32_precision == "tf32":
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    if before == torch.backends.fp32_precision:
        before = "none"  # which follows torch's general setting
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


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

    def recurrence_forward(  # type: ignore[no-untyped-def]
        x_gates, h0, c0, cell, train, resident, instance, w_hh, b_ih, b_hh, lengths=None, resets=None, reset_h=None,
        reset_c=None, want_c_sequence=False,
    ):  # fmt: skip
        require_one_device(x_gates, h0, c0, w_hh, b_ih, b_hh, lengths, resets, reset_h, reset_c)
        cell = reference.CELLS[cell]
        D, T, B, width = x_gates.shape
        H, kept = width // reference.GATES[cell], D if train else 0
        of_c = D if cell == "lstm" else 0
        slots = T if resident else T + 1
        return (
            x_gates.new_empty((T, B, D * H)),
            x_gates.new_empty((D, B, H)),
            x_gates.new_empty((of_c, B, H)),
            x_gates.new_empty((kept, slots if train else T, B, w_hh.size(2))),
            x_gates.new_empty((kept, T, B, _BLOCKS[cell] * H)),
            x_gates.new_empty((of_c if train else 0, T, B, H), dtype=_arithmetic(x_gates.dtype)),
            x_gates.new_empty((T, B, D * H) if want_c_sequence else (0,)),
        )

    def recurrence_backward(  # type: ignore[no-untyped-def]
        dy, dh_n, dc_n, h_prev, saved, c_prev, cell, resident, instance, w_hh_t, lengths=None, resets=None,
        need_dreset=False, dc_sequence=None,
    ):  # fmt: skip
        require_one_device(dy, dh_n, dc_n, h_prev, saved, c_prev, w_hh_t, lengths, resets, dc_sequence)
        cell = reference.CELLS[cell]
        D, T, B, _ = saved.shape
        H, padded = w_hh_t.size(1), w_hh_t.size(2) // reference.GATES[cell]
        return (
            saved.new_empty((D, T, B, _BLOCKS[cell] * padded)),
            saved.new_empty((D, B, H)),
            saved.new_empty((D if cell == "lstm" else 0, B, H)),
            saved.new_empty((D if need_dreset else 0, T, B, H)),
            saved.new_empty((D if need_dreset and cell == "lstm" else 0, T, B, H)),
        )

    torch.library.register_fake(f"{namespace}::recurrence_forward")(recurrence_forward)
    torch.library.register_fake(f"{namespace}::recurrence_backward")(recurrence_backward)


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
