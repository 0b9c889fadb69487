"""When the kernels may be used, when torch.nn is faster, and who is watching.

Every way into the kernels asks here first; what is refused goes to torch.nn's own forward, or to the specification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from fused_rnn import cuda

BACKENDS = ("auto", "fused", "torch")
PLAIN_TYPES = (Tensor, torch.nn.Parameter)  # subclasses may mean something else by any operation
COMPILERS_TYPES = (*PLAIN_TYPES, FakeTensor, FunctionalTensor)  # what plain tensors are while a compiler looks
KERNEL_DTYPES = (torch.float32, torch.float64)  # on the CPU; the others are widened first
DTYPES = (*KERNEL_DTYPES, torch.bfloat16, torch.float16)
deterministic = torch.are_deterministic_algorithms_enabled
_Function = TypeVar("_Function", bound=Callable[..., Any])


def plain(tensor: Any, dim: int) -> bool:
    """Whether this is a tensor of so many dimensions on the CPU, and no subclass of torch's."""
    return type(tensor) in PLAIN_TYPES and tensor.dim() == dim and tensor.is_cpu


def fusible(x: Any, *others: Any) -> bool:
    """Whether the kernels may compute with these; if not, torch does.

    They take plain tensors of one supported dtype on one CPU or CUDA device, and only while nothing but a compiler
    watches or rewrites torch's operations: a tracer, a mode, a functorch transform.
    """
    compiling = torch.compiler.is_compiling()
    types = COMPILERS_TYPES if compiling else PLAIN_TYPES
    if type(x) not in types or (transformed() if compiling else watched()):
        return False
    dtype, device = x.dtype, x.device
    if dtype not in DTYPES or x.is_nested or not (x.is_cpu or (on_cuda(x) and cuda.available())):
        return False
    for t in (x, *others):
        if t is not None and (
            type(t) not in types or t.dtype is not dtype or t.device != device or t.layout is not torch.strided
        ):
            return False
    return True


def watched() -> bool:
    """Whether a compiler, a tracer, a mode or a functorch transform looks at torch's operations."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or transformed()
        or (torch._C._len_torch_function_stack() > 0 and _function_mode_matters())
    )


def transformed() -> bool:
    """Whether a functorch transform or a forward-mode derivative rewrites torch's operations."""
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0 or forward_ad._current_level >= 0


def _function_mode_matters() -> bool:
    # torch.set_default_device and `with torch.device(...)` are modes, too, but only steer factories.
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def on_cuda(x: Tensor | None) -> bool:
    """Whether the CUDA kernels compute with such tensors."""
    return x is not None and x.is_cuda


HAS_BF16_PRODUCTS = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def torch_is_faster(mode: str, dtype: torch.dtype, batch: int, hidden_size: int) -> bool:
    """Whether torch.nn beats the kernels on this processor (measured; benchmarks/NOTES.md).

    The kernels widen bfloat16 to float32. Where the processor multiplies bfloat16 at twice the speed,
    torch.nn's LSTM gains from it unless it runs row by row, its RNN and GRU where their products are large.
    """
    if dtype is not torch.bfloat16 or not HAS_BF16_PRODUCTS or deterministic():  # which takes one way for any batch
        return False
    return batch >= 3 if mode == "LSTM" else batch >= 8 and hidden_size >= 384


def runs_eagerly(function: _Function) -> _Function:
    """Keeps torch.compile from compiling `function` on its own when an eager frame calls it.

    So torch.nn's modules behave, whose files are on the compiler's list of skipped ones: the graph breaks at the
    module, and the module runs as it is. A frame that is being compiled can still inline the function. What a user can
    hand to torch.compile, `forward` and `step`, is not marked, but all that it calls is.
    """
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return function
