"""CUDA, as far as Python decides: whether the operators are there, TF32, and when cuDNN is faster.

The operators are those of the CPU, ``torch.ops.fused_rnn.forward`` and ``backward``, registered for CUDA tensors by
csrc/bindings/cuda_ops.cpp.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from fused_rnn import _C
from fused_rnn.cell_info import NUMBER

_Results = TypeVar("_Results")

Properties = tuple[int, int, int]
"""Multiprocessors, bytes of shared memory that a block may have, and 10 * major + minor compute capability."""

MEASURED: frozenset[int] = frozenset()
"""Compute capabilities (10 * major + minor) of devices with results in benchmarks/results: none yet."""

UNMEASURED = "nobody has measured such a GPU yet: `python -m fused_rnn tune` does"


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
    return True


def tf32_allowed() -> bool:
    """Whether float32 layers may multiply in TF32: torch's switch for cuDNN's recurrent layers."""
    rnn: Any = torch.backends.cudnn.rnn  # for type checkers the module that it replaces
    return bool(rnn.fp32_precision == "tf32")


def is_resident(
    cell: str, dtype: torch.dtype, batch: int, hidden_size: int, directions: int, properties: Properties
) -> bool:
    """Whether the kernels that keep the recurrent weights on the chip take such a layer, of more than one step.

    The operators decide the same (csrc/bindings/cuda_layer.h).
    """
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
    properties: Properties,
) -> list[dict[str, Any]]:
    """The resident kernels that could run a layer's recurrence, best first; `properties` as `device_properties`."""
    return _C.cuda_plans(NUMBER[cell], dtype.itemsize, batch, hidden_size, directions, backward, *properties)


def device_properties(device: torch.device) -> Properties:
    """Multiprocessors, bytes of shared memory that a block may have, and 10 * major + minor compute capability."""
    return _properties(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _properties(index: int) -> Properties:
    p: Any = torch.cuda.get_device_properties(index)  # torch's stub leaves some properties out
    return p.multi_processor_count, p.shared_memory_per_block_optin, 10 * p.major + p.minor


def why_cudnn(
    cell: str,
    dtype: torch.dtype,
    T: int,
    B: int,
    I: int,  # noqa: E741 - the field's letter
    H: int,
    num_layers: int,
    directions: int,
    properties: Properties,
    packed: bool = False,
) -> str | None:
    """Why cuDNN should run a module, or None if the kernels should.

    The kernels gain nothing where a step is a product of its own, where there are few steps, or where cuDNN keeps the
    weights on the chip, too.
    """
    if properties[2] not in MEASURED:
        return UNMEASURED
    if T < 8:
        return "there are few time steps"
    if not is_resident(cell, dtype, B, H, directions, properties):
        return "the weights do not fit on the chip"
    if not packed and cudnn_is_resident(cell, dtype, B, I, H, num_layers, directions, properties):
        return "cuDNN keeps the weights on the chip, too"
    return None


def cudnn_is_resident(
    cell: str,
    dtype: torch.dtype,
    B: int,
    I: int,  # noqa: E741 - the field's letter
    H: int,
    num_layers: int,
    directions: int,
    properties: Properties,
) -> bool:
    """Whether torch asks cuDNN for one of its persistent algorithms, for a sequence that is not packed.

    `get_algo` in torch's aten/src/ATen/native/cudnn/RNN.cpp: PERSIST_STATIC_SMALL_H, or else PERSIST_STATIC. In
    backward, SMALL_H ends at two thirds of these sizes.
    """
    if dtype is torch.float64:
        return False
    if H <= 192 or (H <= 384 and cell.startswith("rnn")):
        return True
    sms, _, capability = properties
    return (
        dtype is torch.float16
        and cell != "gru"
        and num_layers == directions == 1
        and H % 128 == I % 128 == B % 8 == 0
        and H <= 1024
        and B <= 128
        and (cell == "lstm" or B < 96 or H < 896)
        and sms >= 98
        and capability % 10 != 6
    )


def in_tf32(operator: Callable[..., _Results], *arguments: Any) -> _Results:
    """`operator` with torch's products in TF32, as cuDNN computes those around a recurrence.

    The resident kernels are told by an argument; the products over all time steps, which the operators leave to torch,
    follow torch's switch for products. A compiled graph calls the operators without this, and then they are as precise
    as the switch says.
    """
    backends: Any = torch.backends  # for type checkers the module that it replaces
    if backends.cuda.matmul.fp32_precision == "tf32":
        return operator(*arguments)
    before = backends.cuda.matmul.fp32_precision
    if before == backends.fp32_precision:
        before = "none"  # which follows torch's general setting
    backends.cuda.matmul.fp32_precision = "tf32"
    try:
        return operator(*arguments)
    finally:
        backends.cuda.matmul.fp32_precision = before
