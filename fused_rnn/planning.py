"""`plan`: tells without running it how a layer would be computed, for users and tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fused_rnn import _C, cuda, eligibility, reference


@dataclass(frozen=True)
class Plan:
    """How a layer is computed.

    Attributes:
        backend: "fused", or "torch" for the forward of torch.nn.
        way: "cpu" on the CPU; on CUDA "resident" (one kernel for the whole sequence, which keeps the recurrent weights
            on the chip) or "steps" (a matrix product and a pointwise kernel for each step); "torch" for torch.nn.
        forward: on the CPU, the instruction set and how the threads share the work; for "resident", the kernel, how its
            blocks share the work, and the estimated microseconds of a time step. Otherwise empty.
        backward: the same for backward.
    """

    backend: str
    way: str
    forward: dict[str, Any] = field(default_factory=dict)
    backward: dict[str, Any] = field(default_factory=dict)


def plan(
    cell: str,
    dtype: torch.dtype = torch.float32,
    T: int = 1,
    B: int = 1,
    I: int = 1,  # noqa: E741 - the field's letter
    H: int = 1,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    backend: str = "auto",
    device: torch.device | str | None = None,
    properties: tuple[int, int, int] | None = None,
) -> Plan:
    """The plan for one layer of a module.

    Args:
        cell: "rnn" ("rnn_tanh", "rnn_relu"), "lstm" or "gru".
        dtype: of x and the weights.
        T, B, I, H: time steps, batch rows, input size, hidden size.
        num_layers, bidirectional, backend: as in the module.
        device: "cpu" or a CUDA device; None: CUDA if it is available or ``properties`` are given, else the CPU.
        properties: a CUDA device by its properties, so that it need not be present: number of multiprocessors, maximum
            bytes of shared memory of a block, and 10 * major + minor of its compute capability. An H200 is
            ``(132, 232448, 90)``.

    Returns:
        The plan.

    Raises:
        ValueError: cell, backend or dtype is unknown, or a size is not positive.

    Example:
        >>> import torch, fused_rnn
        >>> fused_rnn.plan("gru", T=100, B=8, I=64, H=256, device="cpu").backend
        'fused'
        >>> h200 = (132, 232448, 90)
        >>> fused_rnn.plan("gru", torch.bfloat16, 512, 64, 1024, 1024, backend="fused", properties=h200).way
        'resident'
    """
    cell = "rnn_tanh" if cell == "rnn" else cell
    if cell not in reference.CELLS:
        raise ValueError(f"unknown cell {cell!r}; the cells are: rnn, {', '.join(reference.CELLS)}")
    for letter, size in dict(T=T, B=B, I=I, H=H, num_layers=num_layers).items():
        if not 1 <= size < 2**31:
            raise ValueError(f"{letter} must be at least 1 and less than 2**31, got {size}")
    if dtype not in eligibility.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, eligibility.DTYPES))}, got {dtype}")
    if backend not in eligibility.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, eligibility.BACKENDS))}, got {backend!r}")
    directions = 2 if bidirectional else 1
    mode = cell.upper()
    if device is None:
        device = "cuda" if properties is not None or torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cpu":
        if backend == "torch" or (backend == "auto" and eligibility.torch_is_faster(mode, dtype, B, H)):
            return Plan("torch", "torch")
        shared = _C.cpu_plan(reference.CELLS.index(cell), T, B, I, H, H, directions, torch.get_num_threads())
        return Plan("fused", "cpu", shared, shared)

    properties = properties or cuda.device_properties(device)
    shape = (T, B, I)
    if backend == "torch" or (
        backend == "auto" and cuda.torch_is_faster(mode, dtype, shape, H, num_layers, directions, properties)
    ):
        return Plan("torch", "torch")
    if T == 1 or not cuda.is_resident(cell, dtype, B, H, directions, properties):
        return Plan("fused", "steps")
    chosen = (cuda.plans(cell, dtype, B, H, directions, backward, properties)[0] for backward in (False, True))
    return Plan("fused", "resident", *chosen)
