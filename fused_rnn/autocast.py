"""What torch.autocast means for a layer: the dtype that it computes in, and the dtypes that it returns.

On CUDA torch.nn's layers do all in autocast's dtype, and so do ours. On a CPU torch.nn rounds what its products read,
and what it returns depends on the cell and on the states. On a CPU the kernels compute in float32, with products of
bfloat16 where the processor multiplies those faster, and the results are rounded to torch.nn's dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fused_rnn import policy
from fused_rnn.policy import CASTABLE, autocast_dtype

_Tensor = TypeVar("_Tensor", Tensor, Tensor | None)


@dataclass(frozen=True)
class Casts:
    """What one call is cast to: all that goes in, h (and outputs), and c."""

    inputs: torch.dtype
    h: torch.dtype
    c: torch.dtype

    def into(self, tensors: Sequence[_Tensor]) -> tuple[_Tensor, ...]:
        """Inputs, None for what is absent."""
        return tuple(_to(t, self.inputs) if t is not None and t.dtype in CASTABLE else t for t in tensors)

    def out_of(self, states: Sequence[Tensor]) -> list[Tensor]:
        """h, or h and c."""
        return [_to(state, dtype) for state, dtype in zip(states, (self.h, self.c), strict=False)]


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)  # asking costs a tenth of what `to` does


def casts(
    cell: str,
    x: Any,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    padded: bool = False,
    projected: bool = False,
) -> Casts | None:
    """What autocast has this call cast; None: nothing, or it is for torch.nn to raise an error.

    Args:
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        x, states, weights: of the call; a state may be None for zeros.
        padded: whether this is a padded sequence, not a packed one and not a cell's step.
        projected: whether this is an LSTM with projections.
    """
    half = autocast_dtype(x.device) if isinstance(x, Tensor) else None
    if half is None:
        return None
    if policy.on_cuda(x):
        return Casts(half, half, half)
    dtypes = {t.dtype for t in (x, *states, *weights) if isinstance(t, Tensor)}
    if dtypes == {half} or not dtypes <= set(CASTABLE):
        return None
    # Outside its products torch.nn works in the wider of half and the last state's dtype (of zeros: x's).
    state = states[-1] if states and states[-1] is not None else x
    c = torch.promote_types(state.dtype, half)
    if cell == "lstm" and padded and not projected and _onednn_takes(x):
        return Casts(torch.float32, half, half)
    return Casts(torch.float32, half if projected or cell.startswith("rnn") else c, c)


# Asked here, as a compiler would put the question into its graph.
_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_ONEDNN_TAKES_FP16: bool = _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_fp16_supported()
_ONEDNN_TAKES_BF16: bool = _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _onednn_takes(x: Tensor) -> bool:
    """Whether torch.nn's LSTM runs on oneDNN, which computes and returns autocast's dtype."""
    if not (_HAS_ONEDNN and torch.backends.mkldnn.enabled) or x.numel() == 0:
        return False
    if x.dtype is torch.float16:
        return _ONEDNN_TAKES_FP16 and not torch.is_grad_enabled()
    return x.dtype is torch.float32 or _ONEDNN_TAKES_BF16
