"""What would run: the planners' choice for a layer, to look at and to test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import torch

from fused_rnn import _C, cuda, policy
from fused_rnn.cell_info import NUMBER
from fused_rnn.options import EVERY_STEP, PLANNED


@dataclass(frozen=True)
class Plan:
    """The answer of `plan`: who computes a layer, and with which kernel.

    Attributes:
        backend: "fused" (the fused kernels) or "torch" (torch.nn's own forward).
        way: "cpu" on a CPU. On CUDA "resident" (the recurrent weights stay on the chip for the whole sequence) or
            "steps" (one product and one pointwise kernel per time step). "torch" if torch.nn computes.
        reason: why.
        source: where the answer comes from: "tuned" (`fused_rnn.tune` measured it on this machine), "shipped" (the
            rules of this package and the module's settings), or "model" (besides, the planner's cost model chose the
            resident kernel).
        forward: for the forward pass, the kernel, how the work is split, and on CUDA the estimated microseconds of a
            time step. Empty for "steps" and "torch".
        backward: the same for the backward pass.
    """

    backend: str
    way: str
    reason: str = ""
    forward: dict[str, Any] = field(default_factory=dict)
    backward: dict[str, Any] = field(default_factory=dict)
    source: str = "shipped"


def plan(
    cell: str,
    dtype: torch.dtype = torch.float32,
    T: int = 1,
    B: int = 1,
    I: int = 1,  # noqa: E741 - the field's letter
    H: int = 1,
    *,
    kind: policy.Kind = "sequence",
    num_layers: int = 1,
    bidirectional: bool = False,
    backend: str = "auto",
    requires_grad: bool = True,
    device: torch.device | str | None = None,
    properties: tuple[int, int, int] | None = None,
) -> Plan:
    """Say who would compute one layer of a module, and with which kernel, without running it.

    Args:
        cell: "rnn" (the same as "rnn_tanh"), "rnn_relu", "lstm" or "gru".
        dtype: dtype of the input and the weights.
        T, B, I, H: time steps, batch rows, input size, hidden size.
        kind: "sequence", "packed", "step" for a module's `step`, or "cell" for the forward of an RNNCell and so on.
        num_layers, bidirectional, backend: the module's arguments of these names.
        requires_grad: whether the input or a weight requires a gradient. Whether one is recorded, and the dtype under
            autocast, are those of the moment: ask within the contexts in which the module is called.
        device: "cpu" or a CUDA device. None means CUDA if torch has a CUDA device or `properties` are given, else the
            CPU.
        properties: properties of a CUDA device that need not be in this machine: the number of multiprocessors, the
            bytes of shared memory that a block may use, and the compute capability as 10 * major + minor. An H200 has
            ``(132, 232448, 90)``.

    Returns:
        The plan.

    Raises:
        ValueError: cell, dtype, kind or backend is unknown; or a size is not positive; or device is neither the CPU nor
            a CUDA device that is here or has `properties`; or those are not three.
        TypeError: a size or property is not an int.
        RuntimeError: torch knows no such device.

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
        raise ValueError(f"unknown cell {cell!r}; the cells are: rnn, {', '.join(NUMBER)}")
    sizes = dict(T=T, B=B, I=I, H=H, num_layers=num_layers)
    if properties is not None:
        if not isinstance(properties, tuple) or len(properties) != 3:
            raise ValueError(
                "properties must be a tuple of three ints (multiprocessors, bytes of shared memory, compute "
                f"capability), got {properties!r}"
            )
        sizes |= {f"properties[{index}]": value for index, value in enumerate(properties)}
    for name, size in sizes.items():
        if not hasattr(size, "__index__"):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if not 1 <= size < 2**31:
            raise ValueError(f"{name} must be at least 1 and less than 2**31, got {size}")
    if dtype not in policy.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, policy.DTYPES))}, got {dtype}")
    policy.check_backend(backend)
    if kind not in get_args(policy.Kind):
        raise ValueError(f"kind must be one of {', '.join(map(repr, get_args(policy.Kind)))}, got {kind!r}")
    directions = 2 if bidirectional else 1
    if device is None:
        device = "cuda" if properties is not None or torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or a CUDA device, got '{device}'")
    if device.type == "cuda" and properties is None:
        try:
            cuda.device_properties(device)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"device must be here or come with properties, got '{device}': {error}") from None
    half = policy.autocast_dtype(device)
    choice = policy.choose(
        cell,
        dtype,
        *((T * B, 1) if kind == "packed" else (T, B)),
        I,
        H,
        kind=kind,
        num_layers=num_layers,
        directions=directions,
        backend=backend,
        differentiable=torch.is_grad_enabled() and requires_grad,
        half=half,
        on_gpu=device.type != "cpu",
        device=device,
        steps=T,
        properties=properties,
        may_measure=False,
    )
    if not choice.fused:
        return Plan("torch", "torch", choice.reason, source=choice.source)
    if device.type == "cpu":
        forward, backward = (
            _C.cpu_plan(
                NUMBER[cell], T, B, I, H, H, directions, torch.get_num_threads(), dtype is torch.float64,
                policy.layer_precision(dtype, half, T == 1), policy.deterministic(), instance=choice.instance,
                backward=backward,
            )
            for backward in (False, True)
        )  # fmt: skip
        return Plan("fused", "cpu", choice.reason, forward, backward, choice.source)
    properties = properties or cuda.device_properties(device)
    if choice.instance == EVERY_STEP or (
        choice.instance == PLANNED and (T == 1 or not cuda.is_resident(cell, dtype, B, H, directions, properties))
    ):
        return Plan("fused", "steps", choice.reason, source=choice.source)
    forward, backward = (
        next((p for p in plans if choice.instance in (PLANNED, p["instance"])), {})  # it may have no backward
        for plans in (cuda.plans(cell, dtype, B, H, directions, backward, properties) for backward in (False, True))
    )
    source = "tuned" if choice.source == "tuned" else "model"
    return Plan("fused", "resident", choice.reason, forward, backward, source)
