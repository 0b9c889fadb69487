"""The way of one layer to the CUDA operators: whether they are there, which kernels take it, and calls of every shape.

What happens around the operators is in `fused_rnn.cuda_layer`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_rnn import _C
from fused_rnn.cuda_layer import NUMBER, Layer, Regularisation, Segments, register_fakes

if TYPE_CHECKING:
    from fused_rnn.ops import Steering

MEASURED: frozenset[int] = frozenset()
"""Compute capabilities (10 * major + minor) of devices with results in benchmarks/results: none yet."""


def available() -> bool:
    """Whether the CUDA library was built, and this torch can use it. Loads it, which registers its operators."""
    return _load()


vars(available)["_dynamo_marked_constant"] = True  # assume_constant_result, short of importing the compiler


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
    rnn: Any = torch.backends.cudnn.rnn  # for type checkers the module that it replaces
    return bool(rnn.fp32_precision == "tf32")


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
    p: Any = torch.cuda.get_device_properties(index)  # torch's stub leaves some properties out
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
    x, h0, c0, reset_h, reset_c, *norms = inputs[:8]
    assert x is not None
    call, regularisation = _arranged(x, steering, norms)
    layer = _layer(steering.cell, call, inputs[8:], regularisation)
    h0, c0 = call.with_direction(h0), call.with_direction(c0)
    segments = Segments(call.lengths, call.resets, reset_h, reset_c)
    y, h_n, c_n, *kept, c_of_steps = layer.forward(
        call.padded(x), h0, c0, segments, train, steering.c_sequence, regularisation
    )
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
    x, _, _, reset_h, reset_c, *norms = inputs[:8]
    assert x is not None
    call, regularisation = _arranged(x, steering, norms)
    layer = _layer(steering.cell, call, inputs[8:], regularisation, kept)
    dy, dh_n, dc_n, *dc_sequence = grads
    dx, dh0, dc0, *rest = layer.backward(
        None if dy is None else call.padded(dy),
        None if dh_n is None or call.is_step else dh_n,
        call.with_direction(dc_n) if steering.cell == "lstm" else None,
        call.padded(x),
        kept,
        Segments(call.lengths, call.resets, reset_h, reset_c),
        needs,
        None if not dc_sequence or dc_sequence[0] is None else call.padded(dc_sequence[0]),
        regularisation,
    )
    if call.is_step:
        dh0, dc0 = (None if g is None else g.squeeze(0) for g in (dh0, dc0))
    return [None if dx is None else call.unpadded(dx), dh0, dc0, *rest]


def _arranged(x: Tensor, steering: Steering, norms: Sequence[Tensor | None]) -> tuple[_Call, Regularisation]:
    call = _Call(x, steering)
    zones = (
        zone if zone is None or zone.dim() == 1 else call.padded(zone) for zone in (steering.zone_h, steering.zone_c)
    )
    return call, Regularisation(call.with_direction(steering.drop_h), *zones, *norms)


def _layer(
    cell: str,
    call: _Call,
    weights: Sequence[Tensor | None],
    regularisation: Regularisation,
    kept: Sequence[Tensor] = (),
) -> Layer:
    """`kept` tells backward which way forward took, whatever torch's switches say by now."""
    w_hh: Any = weights[1]
    directions = len(weights) // 5
    if kept:
        return Layer(cell, weights, kept[0].size(1) == call.steps, tf32_allowed())
    properties = device_properties(w_hh.device)
    batch = int(call.batch)  # the kernels differ by it: a compiler has to settle for one
    resident = (
        call.steps > 1
        and not regularisation.normalises()
        and is_resident(cell, w_hh.dtype, batch, w_hh.size(1), directions, properties)
    )
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
