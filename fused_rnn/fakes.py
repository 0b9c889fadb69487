"""The shapes of the operators' results, for torch's compilers and fake tensors, which run no kernel.

The arguments are the operators'; csrc/bindings allocates the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_rnn import policy
from fused_rnn.cell_info import CELLS, NAMES
from fused_rnn.options import NO_OPTIONS, LayerOptions, tensors_of

if TYPE_CHECKING:
    from fused_rnn._C import CellInfo

_Maybe = Tensor | None  # an operator's "Tensor?"


def _forward(
    x: Tensor, h0: _Maybe, c0: _Maybe, cell: int, train: bool, w_ih: _Maybe, w_hh: Tensor, b_ih: _Maybe = None,
    b_hh: _Maybe = None, w_hr: _Maybe = None, w_ih_reverse: _Maybe = None, w_hh_reverse: _Maybe = None,
    b_ih_reverse: _Maybe = None, b_hh_reverse: _Maybe = None, w_hr_reverse: _Maybe = None,
    options: Sequence[Any] | None = None, want_c_sequence: bool = False, deterministic: bool = False,
    tf32: bool = False, precision: int = 0, instance: int = -1,
) -> tuple[Tensor, ...]:  # fmt: skip
    weights = (w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse)
    o = NO_OPTIONS if options is None else LayerOptions(*options)
    require_one_device(x, h0, c0, *weights, *_on_device(o))
    info = CELLS[NAMES[cell]]
    H, P = w_hh.size(0) // info["gates"], w_hh.size(1)
    D = 1 if w_hh_reverse is None else 2
    is_step = x.dim() == 2 and o.batch_sizes is None
    batch, rows = _batch_and_rows(x, h0, o.batch_sizes)
    state = (batch,) if is_step else (D, batch)
    y = x.new_empty((*x.shape[:-1], D * P))
    h_n = x.new_empty((0,) if is_step else (*state, P))
    c_n = x.new_empty((*state, H) if info["has_c"] else (0,))
    kept = D if train else 0
    if policy.on_cuda(x):
        steps = 1 if is_step else x.size(0) if o.batch_sizes is None else o.batch_sizes.size(0)
        reserve = _cuda_reserve(x, info, (kept, steps, batch, H), o)
    else:
        chained = info["saves_h"] and all(t is None for t in options or ())
        if o.lengths is not None:  # how many rows have steps is in the values
            rows = torch.library.get_ctx().new_dynamic_size()
        width = H if chained else _reserve_width(info, H, P, w_hr, o)
        reserve = x.new_empty((kept, rows + batch if chained else rows, width))
        reserve = reserve if x.dtype in policy.KERNEL_DTYPES else reserve.float()
    return y, h_n, c_n, reserve, x.new_empty((*x.shape[:-1], D * H) if want_c_sequence else (0,))


def _step(
    x: Tensor, h0: _Maybe, c0: _Maybe, cell: int, w_ih: _Maybe, w_hh: Tensor, b_ih: _Maybe = None,
    b_hh: _Maybe = None, w_hr: _Maybe = None, deterministic: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    require_one_device(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    info = CELLS[NAMES[cell]]
    h = x.new_empty((x.size(0), w_hh.size(1)))
    return h, x.new_empty((x.size(0), w_hh.size(0) // info["gates"]) if info["has_c"] else (0,))


def _step_into(*arguments: Any) -> None:
    pass


def _backward(
    dy: _Maybe, dh_n: _Maybe, dc_n: _Maybe, x: Tensor, reserve: Tensor, cell: int, need_dx: bool, need_dstate: bool,
    need_dw_ih: bool, need_dw_hh: bool, need_db: bool, need_dw_hr: bool, w_ih: _Maybe, w_hh: Tensor,
    w_hr: _Maybe = None, w_ih_reverse: _Maybe = None, w_hh_reverse: _Maybe = None, w_hr_reverse: _Maybe = None,
    options: Sequence[Any] | None = None, reset_steps: int = 0, dc_sequence: _Maybe = None,
    deterministic: bool = False, tf32: bool = False, precision: int = 0, instance: int = -1,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    weights = (w_ih, w_hh, w_hr, w_ih_reverse, w_hh_reverse, w_hr_reverse)
    o = NO_OPTIONS if options is None else LayerOptions(*options)
    require_one_device(dy, dh_n, dc_n, x, reserve, *weights, dc_sequence, *_on_device(o))
    info = CELLS[NAMES[cell]]
    H, P = w_hh.size(0) // info["gates"], w_hh.size(1)
    D = 1 if w_hh_reverse is None else 2
    is_step = x.dim() == 2 and o.batch_sizes is None
    state = dh_n if dh_n is not None else dc_n
    if o.batch_sizes is not None and not (need_dstate or reset_steps):
        batch = 0  # not asked for: a size that nothing has would be an error
    else:
        batch, _ = _batch_and_rows(x, state, o.batch_sizes)
    rows = (batch,) if is_step else (D, batch)

    def wanted(shape: Sequence[int], need: bool) -> Tensor | None:
        return x.new_empty(shape) if need else None

    grads = [
        wanted(x.shape, need_dx),
        wanted((*rows, P), need_dstate),
        wanted((*rows, H), need_dstate and info["has_c"]),
    ]
    for direction in range(2):
        has = direction < D
        grads += [
            wanted((w_hh.size(0), x.size(-1)), has and need_dw_ih),
            wanted(w_hh.shape, has and need_dw_hh),
            wanted(w_hh.shape[:1], has and need_db),
            wanted(w_hh.shape[:1], has and need_db),
            wanted((P, H), has and need_dw_hr and w_hr is not None),
        ]
    steps = (x if o.batch_sizes is None else o.batch_sizes).size(0)
    of_reset = (D, batch) if reset_steps == 1 else (steps, D, batch)
    grads += [wanted((*of_reset, P), reset_steps != 0), wanted((*of_reset, H), reset_steps != 0 and info["has_c"])]
    grads += [wanted((D, w_hh.size(0)), o.norm_hh is not None), wanted((D, 2, H), o.norm_c is not None)]
    return tuple(grads)


def _frozen(
    model: Tensor, cell: int, layers: int, directions: int, hidden_size: int, proj_size: int, x: Tensor,
    h0: _Maybe = None, c0: _Maybe = None, batch_sizes: _Maybe = None, lengths: _Maybe = None, resets: _Maybe = None,
    reset_h: _Maybe = None, reset_c: _Maybe = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    require_one_device(model, x, h0, c0, resets, reset_h, reset_c)
    P, (batch, _) = proj_size or hidden_size, _batch_and_rows(x, h0, batch_sizes)
    h_n = x.new_empty((layers * directions, batch, P))
    c_n = x.new_empty((layers * directions, batch, hidden_size) if CELLS[NAMES[cell]]["has_c"] else (0,))
    return x.new_empty((*x.shape[:-1], directions * P)), h_n, c_n


def _batch_and_rows(x: Tensor, state: Tensor | None, batch_sizes: Tensor | None) -> tuple[Any, Any]:
    if batch_sizes is not None:
        batch = torch.library.get_ctx().new_dynamic_size() if state is None else state.size(-2)
        return batch, x.size(0)
    if x.dim() == 2:
        return x.size(0), x.size(0)
    return x.size(1), x.size(0) * x.size(1)


def _reserve_width(cell: CellInfo, H: int, P: int, w_hr: Any, o: LayerOptions) -> int:
    width = cell["saved"] * H + P
    width += H if cell["has_c"] else 0
    width += H if w_hr is not None else 0
    width += P if o.drop_h is not None and cell["uses_h"] else 0
    return width + (cell["gates"] * H + 1 if o.norm_hh is not None else 0)


def _cuda_reserve(x: Tensor, cell: CellInfo, sizes: tuple[Any, Any, Any, Any], o: LayerOptions) -> Tensor:
    """The parts as csrc/bindings/cuda_reserve.h lists them, each in whole 16 bytes."""
    D, T, B, H = sizes
    stored, arithmetic = x.dtype.itemsize, max(x.dtype.itemsize, 4)
    whole = 16 // stored
    rows = D * T * B
    parts = [D * (T + 1) * B * ((H + whole - 1) // whole * whole) * stored, rows * cell["saved"] * H * stored]
    if cell["has_c"] or (cell["uses_h"] and o.drop_h is not None):
        parts.append(rows * H * arithmetic)
    if o.norm_hh is not None:
        parts.append(rows * cell["gates"] * H * stored)
    if o.norm_hh is not None or o.norm_c is not None:
        parts.append(rows * 4 * arithmetic)
    return x.new_empty((sum((part + 15) // 16 * 16 for part in parts),), dtype=torch.uint8)


def _on_device(o: LayerOptions) -> Sequence[Any]:
    """The options that are where x is; batch_sizes is on the CPU, and lengths may be."""
    return tensors_of(o._replace(batch_sizes=None, lengths=None))


def require_one_device(*tensors: Tensor | None) -> None:
    """For fake kernels, which torch calls as soon as one tensor is on "meta".

    Raises:
        RuntimeError: another is on a real device; what a fake kernel returns there would be memory nobody wrote to.
    """
    devices = {str(t.device) for t in tensors if t is not None}
    if len(devices) > 1:
        raise RuntimeError(f"fused_rnn: expected all tensors on one device, got {' and '.join(sorted(devices))}")


def register(namespace: str) -> None:
    """For the operators that every device has."""
    torch.library.register_fake(f"{namespace}::forward", _forward)
    torch.library.register_fake(f"{namespace}::backward", _backward)


register("fused_rnn")
torch.library.register_fake("fused_rnn::step", _step)
torch.library.register_fake("fused_rnn::step_into", _step_into)
torch.library.register_fake("fused_rnn::frozen", _frozen)
