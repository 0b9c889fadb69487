"""The layer normalisation of the input product, ``norm_ih * LN(W_ih x)``, which the kernels then read instead of x.

Forward and backward are explicit functions that the layer's autograd function calls. Autograd itself would save the
normalised gates, which no first derivative reads, and could not recompute them together with the layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from fused_rnn._C import NORM_EPS

KEPT = 3
"""Tensors of each direction that `backward` needs: W_ih x, and the mean and 1 / sqrt(variance + eps) of its rows."""


def forward(x: Tensor, norm_ih: Tensor, w_ih: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The normalised gates of all directions, concatenated to ``[..., D*G*H]``, and the tensors that `backward` needs.

    Args:
        x: ``[..., I]``.
        norm_ih: ``[D, G*H]``.
        w_ih: ``[G*H, I]`` for each direction.
    """
    gates, kept = [], []
    with torch.autocast(x.device.type, enabled=False):
        for weight, gain in zip(w_ih, norm_ih, strict=True):
            product = linear(x, weight)
            normalised, mean, rstd = torch.native_layer_norm(product, gain.shape, gain, None, NORM_EPS)
            gates.append(normalised)
            kept += [product, mean, rstd]
    return gates[0] if len(gates) == 1 else torch.cat(gates, -1), kept


def backward(
    dgates: Tensor | None,
    x: Tensor,
    norm_ih: Tensor,
    w_ih: Sequence[Tensor],
    kept: Sequence[Tensor],
    needs: tuple[bool, Sequence[bool], bool],
) -> tuple[Tensor | None, list[Tensor | None], Tensor | None]:
    """The gradients of x, of the weights and of norm_ih, from the gradient of the gates, ``[..., D*G*H]``.

    `kept` is the second result of `forward`. `needs` tells which gradients are needed; the others are None.
    """
    if dgates is None:  # none is needed
        return None, [None] * len(w_ih), None
    need_x, need_w, need_norm = needs
    dx, dw, dnorm = None, [], []
    grads = dgates.chunk(len(w_ih), -1)
    with torch.autocast(x.device.type, enabled=False):
        for d, (weight, gain) in enumerate(zip(w_ih, norm_ih, strict=True)):
            product, mean, rstd = kept[KEPT * d : KEPT * (d + 1)]
            dproduct, dgain, _ = torch.ops.aten.native_layer_norm_backward(
                grads[d], product, gain.shape, mean, rstd, gain, None, [need_x or need_w[d], need_norm, False]
            )
            dnorm.append(dgain)
            if need_x:
                dx_direction = dproduct @ weight
                dx = dx_direction if dx is None else dx + dx_direction
            dw.append(dproduct.flatten(0, -2).t() @ x.flatten(0, -2) if need_w[d] else None)
    return dx, dw, torch.stack(dnorm) if need_norm else None
