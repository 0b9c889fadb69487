"""What torch.autocast means for a layer: the dtype that it computes in, and the dtypes that it returns.

On CUDA torch.nn's layers do all in autocast's dtype, and so do ours. On a CPU torch.nn rounds what its products read,
and what it returns depends on the cell and on the states. The kernels widen 16-bit numbers anyway: on a CPU they
compute in float32, and only the results are rounded, to torch.nn's dtypes: nearer to the exact values than torch.nn.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fused_rnn import eligibility

_Tensor = TypeVar("_Tensor", Tensor, Tensor | None)
CASTABLE = (torch.float32, torch.bfloat16, torch.float16)


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


def dtype_on(device: torch.device) -> torch.dtype | None:
    """Autocast's dtype; None outside of it."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def left(device: torch.device) -> AbstractContextManager[Any]:
    """A block without autocast: all in it is cast already, and has one dtype."""
    return nullcontext() if dtype_on(device) is None else torch.autocast(device.type, enabled=False)


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
    half = dtype_on(x.device) if isinstance(x, Tensor) else None
    if half is None:
        return None
    if eligibility.on_cuda(x):
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


def torch_is_faster(cell: str, half: torch.dtype, steps: int, batch: int, hidden_size: int) -> bool:
    """Whether torch.nn under autocast beats float32 on this processor (measured; benchmarks/NOTES.md).

    Where the processor multiplies bfloat16 itself, large products pay for their casts.
    """
    if half is not torch.bfloat16 or not eligibility.HAS_BF16_PRODUCTS:
        return False
    if eligibility.deterministic():
        return False  # one way for any batch
    if cell == "lstm" and eligibility.lacks_threads():
        return False
    training = torch.is_grad_enabled()
    if steps == 1:
        return training and batch * hidden_size**2 >= 2**21
    if cell == "lstm":
        return steps * batch * hidden_size >= 8192 and (batch >= 3 or not training)
    return batch * hidden_size**2 >= 3 * 2**20
