"""The record of one layer's options, in the order in which the operators take them."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor

PLANNED, EVERY_STEP = -1, -2
"""Which kernels compute a layer, its `instance`: the planner's choice, or on a CPU the process's instruction set; a
product for every step, on CUDA. Any other instance is the place of a CUDA kernel in FUSED_RNN_INSTANCES
(csrc/cuda/layout.h), or of a CPU's instruction set in ``_C.supported_cpu_isas()``."""


class LayerOptions(NamedTuple):
    """What one layer computes beyond torch.nn's; the meaning of the fields is in `fused_rnn.reference.layer`.

    The tensors come first: those without a gradient, then those that may need one. The operators take all of them but
    norm_ih, the last (csrc/bindings/options.h), in whose place they receive the normalised product of the input; what
    its gradient reads, csrc/bindings/node.cpp knows. `deterministic` makes a row's results independent of its batch;
    `tf32` multiplies float32 in TF32 on CUDA; `precision` is that of float32's products on a CPU (`fused_rnn.policy`);
    `recompute` is the autograd's; `instance` names the kernels.
    """

    batch_sizes: Tensor | None = None
    resets: Tensor | None = None
    lengths: Tensor | None = None
    drop_h: Tensor | None = None
    zone_h: Tensor | None = None
    zone_c: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None
    norm_hh: Tensor | None = None
    norm_c: Tensor | None = None
    norm_c_bias: Tensor | None = None
    norm_ih: Tensor | None = None
    c_sequence: bool = False
    deterministic: bool = False
    tf32: bool = False
    precision: int = 0
    recompute: bool = False
    instance: int = PLANNED


_place = LayerOptions._fields.index
# Parts of a LayerOptions, as tuples.
constants_of = itemgetter(slice(_place("reset_h")))
differentiable_of = itemgetter(slice(_place("reset_h"), _place("c_sequence")))
operator_tensors_of = itemgetter(slice(_place("norm_ih")))
flags_of = itemgetter(slice(_place("c_sequence"), None))
_TENSORS = _place("c_sequence")


def tensors_of(options: LayerOptions) -> tuple[Tensor | None, ...]:
    """The constants and the differentiable ones. torch.compile traces it, which it cannot do with an itemgetter."""
    fields: tuple[Any, ...] = options
    return fields[:_TENSORS]


NO_OPTIONS = LayerOptions()
"""Singleton for calls without options, recognised with `is`: their operators take fewer arguments."""
