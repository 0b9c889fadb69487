"""The shapes of the operators' results, for torch's compilers and fake tensors, which run no kernel.

The arguments are the operators'; csrc/bindings/ops.cpp allocates the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn import reference
from fused_rnn.cuda_layer import require_one_device

_Maybe = Tensor | None  # an operator's "Tensor?"


def _forward(
    x: Tensor, h0: _Maybe, c0: _Maybe, cell: int, train: bool, w_ih: _Maybe, w_hh: Tensor, b_ih: _Maybe = None,
    b_hh: _Maybe = None, w_hr: _Maybe = None, w_ih_reverse: _Maybe = None, w_hh_reverse: _Maybe = None,
    b_ih_reverse: _Maybe = None, b_hh_reverse: _Maybe = None, w_hr_reverse: _Maybe = None,
    batch_sizes: _Maybe = None, resets: _Maybe = None, reset_h: _Maybe = None, reset_c: _Maybe = None,
    want_c_sequence: bool = False, drop_h: _Maybe = None, zone_h: _Maybe = None, zone_c: _Maybe = None,
    norm_hh: _Maybe = None, norm_c: _Maybe = None, norm_c_bias: _Maybe = None, deterministic: bool = False,
    lengths: _Maybe = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    weights = (w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse)
    variant = (drop_h, zone_h, zone_c, norm_hh, norm_c, norm_c_bias)
    require_one_device(x, h0, c0, *weights, resets, reset_h, reset_c, *variant)
    name = reference.CELLS[cell]
    H, P = w_hh.size(0) // reference.GATES[name], w_hh.size(1)
    D = 1 if w_hh_reverse is None else 2
    is_step = x.dim() == 2 and batch_sizes is None
    batch, rows = _batch_and_rows(x, h0, batch_sizes)
    state = (batch,) if is_step else (D, batch)
    y = x.new_empty((*x.shape[:-1], D * P))
    h_n = x.new_empty((0,) if is_step else (*state, P))
    c_n = x.new_empty((*state, H) if name == "lstm" else (0,))
    chained = reference.GATES[name] == 1 and all(t is None for t in (batch_sizes, resets, drop_h, zone_h, norm_hh))
    if lengths is not None:  # how many rows have steps is in the values
        rows, chained = torch.library.get_ctx().new_dynamic_size(), False
    width = H if chained else _reserve_width(name, H, P, w_hr, drop_h, norm_hh)
    reserve = x.new_empty((D if train else 0, rows + batch if chained else rows, width))
    if x.dtype in (torch.bfloat16, torch.float16):
        reserve = reserve.float()
    return y, h_n, c_n, reserve, x.new_empty((*x.shape[:-1], D * H) if want_c_sequence else (0,))


def _step(
    x: Tensor, h0: _Maybe, c0: _Maybe, cell: int, w_ih: _Maybe, w_hh: Tensor, b_ih: _Maybe = None,
    b_hh: _Maybe = None, w_hr: _Maybe = None, deterministic: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    require_one_device(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    h = x.new_empty((x.size(0), w_hh.size(1)))
    return h, x.new_empty((x.size(0), w_hh.size(0) // 4) if reference.CELLS[cell] == "lstm" else (0,))


def _step_into(*arguments: Any) -> None:
    pass


def _step_layers(
    x: Tensor, h0: _Maybe, c0: _Maybe, cell: int, layers: int, weights: Sequence[Tensor], has_biases: bool,
    projected: bool, deterministic: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    require_one_device(x, h0, c0, *weights)
    batch, (w_ih, w_hh) = x.size(0), weights[:2]
    h = x.new_empty((layers, batch, w_hh.size(1)))
    c = x.new_empty((layers, batch, w_ih.size(0) // 4) if reference.CELLS[cell] == "lstm" else (0,))
    return x.new_empty((batch, w_hh.size(1))), h, c


def _backward(
    dy: _Maybe, dh_n: _Maybe, dc_n: _Maybe, x: Tensor, reserve: Tensor, cell: int, need_dx: bool, need_dstate: bool,
    need_dw_ih: bool, need_dw_hh: bool, need_db: bool, need_dw_hr: bool, w_ih: _Maybe, w_hh: Tensor,
    w_hr: _Maybe = None, w_ih_reverse: _Maybe = None, w_hh_reverse: _Maybe = None, w_hr_reverse: _Maybe = None,
    batch_sizes: _Maybe = None, resets: _Maybe = None, reset_steps: int = 0, dc_sequence: _Maybe = None,
    drop_h: _Maybe = None, zone_h: _Maybe = None, zone_c: _Maybe = None, norm_hh: _Maybe = None,
    norm_c: _Maybe = None, norm_c_bias: _Maybe = None, lengths: _Maybe = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    weights = (w_ih, w_hh, w_hr, w_ih_reverse, w_hh_reverse, w_hr_reverse)
    variant = (drop_h, zone_h, zone_c, norm_hh, norm_c, norm_c_bias)
    require_one_device(dy, dh_n, dc_n, x, reserve, *weights, resets, dc_sequence, *variant)
    name = reference.CELLS[cell]
    H, P = w_hh.size(0) // reference.GATES[name], w_hh.size(1)
    D = 1 if w_hh_reverse is None else 2
    is_step = x.dim() == 2 and batch_sizes is None
    state = dh_n if dh_n is not None else dc_n
    if batch_sizes is not None and not (need_dstate or reset_steps):
        batch = 0  # not asked for: a size that nothing has would be an error
    else:
        batch, _ = _batch_and_rows(x, state, batch_sizes)
    rows = (batch,) if is_step else (D, batch)

    def wanted(shape: Sequence[int], need: bool) -> Tensor | None:
        return x.new_empty(shape) if need else None

    grads = [
        wanted(x.shape, need_dx),
        wanted((*rows, P), need_dstate),
        wanted((*rows, H), need_dstate and name == "lstm"),
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
    of_reset = (D, batch) if reset_steps == 1 else (x.size(0), D, batch)
    grads += [wanted((*of_reset, P), reset_steps != 0), wanted((*of_reset, H), reset_steps != 0 and name == "lstm")]
    normalised = norm_hh is not None
    grads += [wanted((D, w_hh.size(0)), normalised), wanted((D, 2, H), normalised and name == "lstm")]
    return tuple(grads)


def _batch_and_rows(x: Tensor, state: Tensor | None, batch_sizes: Tensor | None) -> tuple[Any, Any]:
    if batch_sizes is not None:
        batch = torch.library.get_ctx().new_dynamic_size() if state is None else state.size(-2)
        return batch, x.size(0)
    if x.dim() == 2:
        return x.size(0), x.size(0)
    return x.size(1), x.size(0) * x.size(1)


def _reserve_width(cell: str, H: int, P: int, w_hr: Any, drop_h: Any, norm_hh: Any) -> int:
    width = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 4}[cell] * H + P
    width += H if cell == "lstm" else 0
    width += H if w_hr is not None else 0
    width += P if drop_h is not None and cell == "gru" else 0
    return width + (reference.GATES[cell] * H + 1 if norm_hh is not None else 0)


torch.library.register_fake("fused_rnn::forward", _forward)
torch.library.register_fake("fused_rnn::step", _step)
torch.library.register_fake("fused_rnn::step_into", _step_into)
torch.library.register_fake("fused_rnn::step_layers", _step_layers)
torch.library.register_fake("fused_rnn::backward", _backward)
