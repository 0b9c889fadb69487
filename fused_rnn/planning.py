"""What would run: the planners' choice for a layer, to look at and to test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fused_rnn import _C, cuda, eligibility
from fused_rnn.cell_info import NAMES, NUMBER


@dataclass(frozen=True)
class Plan:
    """Who computes a layer, and how.

    Attributes:
        backend: "fused" or "torch" (torch.nn's own forward).
        way: on the CPU "cpu"; on CUDA "resident" (the recurrent weights stay on the chip for the whole sequence) or
            "steps" (a product and a pointwise kernel per step); "torch" without fused kernels.
        forward: the kernel, its share of the work and, on CUDA, the estimated microseconds of a time step. Empty where
            nothing is to be said.
        backward: the same of backward.
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
        num_layers, bidirectional, backend: of the module.
        device: "cpu" or a CUDA device; None: CUDA where there is one.
        properties: of a CUDA device that need not be here: multiprocessors, bytes of shared memory that a block may
            have, 10 * major + minor compute capability. An H200: ``(132, 232448, 90)``.

    Returns:
        The plan; `Plan` says what is in it.

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
    if cell not in NUMBER:
        raise ValueError(f"unknown cell {cell!r}; the cells are: rnn, {', '.join(NAMES)}")
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
        shared = _C.cpu_plan(NUMBER[cell], T, B, I, H, H, directions, torch.get_num_threads())
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
