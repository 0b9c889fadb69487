"""The record of one layer's options, in the order in which the operators take them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LayerOptions(NamedTuple):
    """What one layer computes beyond torch.nn's; the meaning of the fields is in `fused_rnn.reference.layer`.

    The operators take the first `OPERATOR_FIELDS` fields, behind the weights. `deterministic` makes a row's results
    independent of its batch; `tf32` multiplies float32 in TF32 on CUDA, `precision` is one of `fused_rnn.policy` for the
    CPU's products of float32. The last two fields are the autograd's: the
    operators receive the normalised product of the input instead of norm_ih.
    """

    batch_sizes: Tensor | None = None
    resets: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None
    c_sequence: bool = False
    drop_h: Tensor | None = None
    zone_h: Tensor | None = None
    zone_c: Tensor | None = None
    norm_hh: Tensor | None = None
    norm_c: Tensor | None = None
    norm_c_bias: Tensor | None = None
    deterministic: bool = False
    lengths: Tensor | None = None
    tf32: bool = False
    precision: int = 0
    norm_ih: Tensor | None = None
    recompute: bool = False


OPERATOR_FIELDS = LayerOptions._fields.index("norm_ih")
DIFFERENTIABLE = ("reset_h", "reset_c", "norm_ih", "norm_hh", "norm_c", "norm_c_bias")
"""The fields that may need a gradient."""
CONSTANT = ("batch_sizes", "resets", "lengths", "drop_h", "zone_h", "zone_c")
"""The fields that are tensors without a gradient."""
NO_OPTIONS = LayerOptions()
"""Singleton for calls without options, recognised with `is`: their operators take fewer arguments."""
