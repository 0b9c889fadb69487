"""The input's share of the gates where it is normalised: ``norm_ih * LN(W_ih x)``, which the kernels take in x's place.

Both ways are written out, to be a part of the layer's own autograd function: autograd would keep these gates, which no
first derivative reads, and could not compute them again with the layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from fused_rnn._C import NORM_EPS

KEPT = 3
"""How many tensors of each direction backward needs: W_ih x, and the mean and the inverse deviation of its rows."""


def forward(x: Tensor, norm_ih: Tensor, w_ih: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Gates of all directions side by side, ``[..., D*G*H]``, and what `backward` needs.

    Args:
        x: ``[..., I]``.
        norm_ih: ``[D, G*H]``.
        w_ih: of each direction ``[G*H, I]``.
    """
    gates, kept = [], []
    with torch.autocast(x.device.type, enabled=False):
        for weight, gain in zip(w_ih, norm_ih, strict=True):
            product = linear(x, weight)
            of_direction, mean, inverse = torch.native_layer_norm(product, gain.shape, gain, None, NORM_EPS)
            gates.append(of_direction)
            kept += [product, mean, inverse]
    return gates[0] if len(gates) == 1 else torch.cat(gates, -1), kept


def backward(
    dgates: Tensor | None,
    x: Tensor,
    norm_ih: Tensor,
    w_ih: Sequence[Tensor],
    kept: Sequence[Tensor],
    needs: tuple[bool, Sequence[bool], bool],
) -> tuple[Tensor | None, list[Tensor | None], Tensor | None]:
    """Gradients of x, the weights and norm_ih, where `needs` says that they are wanted; else None."""
    if dgates is None:  # nothing is wanted
        return None, [None] * len(w_ih), None
    need_x, need_w, need_norm = needs
    dx, dw, dnorm = None, [], []
    grads = dgates.chunk(len(w_ih), -1)
    with torch.autocast(x.device.type, enabled=False):
        for d, (weight, gain) in enumerate(zip(w_ih, norm_ih, strict=True)):
            product, mean, inverse = kept[KEPT * d : KEPT * (d + 1)]
            dproduct, dgain, _ = torch.ops.aten.native_layer_norm_backward(
                grads[d], product, gain.shape, mean, inverse, gain, None, [need_x or need_w[d], need_norm, False]
            )
            dnorm.append(dgain)
            if need_x:
                of_direction = dproduct @ weight
                dx = of_direction if dx is None else dx + of_direction
            dw.append(dproduct.flatten(0, -2).t() @ x.flatten(0, -2) if need_w[d] else None)
    return dx, dw, torch.stack(dnorm) if need_norm else None
