"""Whether the CUDA kernels compute what torch.nn computes on a device: asked once, before their first use there.

A driver older than the CUDA runtime of the library, a new GPU without code for it, or a fault of a kernel would
otherwise raise errors or give wrong numbers in the middle of a training. Where the check fails, torch.nn computes, and
one warning says so. It runs a small layer of every cell on every kind of kernel, each in another dtype, forward and
backward, and long sequences in inference, where blocks exchange the state in a ring. The comparison takes about 50 ms.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fused_rnn import cuda
from fused_rnn.cell_info import GATES, NUMBER
from fused_rnn.options import EVERY_STEP

T, B, I, H = 4, 5, 8, 24  # noqa: E741 - the field's letters; more than one block of 16 units, less than a tile of 8 rows
RESIDENT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LONG = 33  # times T: more than two turns of the ring (kRingSteps in csrc/cuda/layout.h)
STEP_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RESULTS = ("y", "dx", "dw_ih", "dw_hh", "db_ih", "db_hh")

_results: dict[torch.device, str | None] = {}
_lock = threading.Lock()


def why_not(device: torch.device) -> str | None:
    """Why the kernels must not compute on `device`, or None if they may; the first call there runs the check.

    A call while a CUDA graph is captured runs no check, and leaves the kernels alone until there was one.
    """
    if device.type != "cuda":
        return None
    try:
        return _results[device]
    except KeyError:
        return _checked(device)


vars(why_not)["_dynamo_marked_constant"] = True  # a compiler takes the answer, and does not look into the check


def _checked(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return None  # a compiler's fake tensors on a machine without the device
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, and the kernels were not checked on this device before"
    if device.index is None:
        return why_not(torch.device("cuda", torch.cuda.current_device()))
    with _lock:
        if device not in _results:
            # No autocast, mode, transform or stream of the caller's reaches another thread.
            with ThreadPoolExecutor(1) as thread:
                fault = thread.submit(_find_fault_on, device).result()
            _results[device] = fault and f"the kernels failed their self-check on this device: {fault}"
            if fault:
                name = torch.cuda.get_device_name(device)
                warnings.warn(
                    f"fused_rnn's CUDA kernels failed their self-check on {name}, torch.nn computes there: {fault}",
                    stacklevel=4,
                )
        return _results[device]


def _find_fault_on(device: torch.device) -> str | None:
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")  # the check waits for its results
    try:
        with torch.cuda.device(device):
            return find_fault(device, cuda.device_properties(device))
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernels
    except Exception as error:  # of whatever kind: the caller has torch.nn
        return str(error).strip().partition("\n")[0] or type(error).__name__
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def find_fault(
    device: torch.device,
    properties: cuda.Properties,
    forward: Callable[..., Any] = torch.ops.fused_rnn.forward.default,
    backward: Callable[..., Any] = torch.ops.fused_rnn.backward.default,
) -> str | None:
    """Compare the operators on `device` with torch.nn on the CPU; the first difference beyond the tolerance, or None.

    A result passes if its distance from torch.nn's float64 result is at most four times (a gradient: eight times) that
    of torch.nn's result in the same dtype, plus two roundings. That is twice the tolerance of the tests: faults are
    larger by far, and a false alarm would turn the kernels off. A long inference is compared with the same in training.

    Raises:
        RuntimeError: an operator refuses, or the device reports an error.
    """
    for cell, number in NUMBER.items():
        operands = _operands(cell)
        exact = _torchs(cell, operands, torch.float64)
        for place, kernel in enumerate((*_kinds(cell, properties), "steps")):
            resident = kernel != "steps"
            dtype = RESIDENT_DTYPES[(number + place) % 3] if resident else STEP_DTYPES[number % 4]
            instances = [_instance(cell, dtype, kernel, of_backward, properties) for of_backward in (False, True)]
            on_device = [t.to(device, dtype) for t in operands]
            try:
                ours = _ours(number, on_device, resident, instances, forward, backward)
            except RuntimeError as refusal:
                if "cannot hold the recurrent weights" in str(refusal):  # the planner knows less than the operators
                    continue
                raise
            theirs = _torchs(cell, operands, dtype)
            in_tf32 = resident or torch.backends.cuda.matmul.fp32_precision == "tf32"  # a step's product is torch's
            tf32 = in_tf32 and dtype is torch.float32
            rounding = 2.0**-10 if tf32 else max(torch.finfo(dtype).eps, 1e-10)
            for name, *results, value in zip(RESULTS, ours, theirs, exact, strict=True):
                error, torchs = ((r.cpu().double() - value).abs().max().item() for r in results)
                limit = (8 if name.startswith("d") else 4) * torchs + 2 * rounding * max(value.abs().max().item(), 1.0)
                if not error <= limit:  # or NaN
                    return f"{name} of {cell} in {'tf32' if tf32 else str(dtype)[6:]} ({kernel}) is off by {error:.1e}"
            if resident:
                error = _error_of_inference(number, on_device, instances[0], forward)
                if not error <= 2 * rounding:
                    return f"y of {cell} in inference ({kernel}) is off by {error:.1e} over {LONG * T} steps"
    return None


def _error_of_inference(number: int, operands: list[Tensor], instance: int, forward: Callable[..., Any]) -> float:
    """How far y of a long sequence in inference is from y in training, by the same kernel."""
    x, w_ih, w_hh, b_ih, b_hh, _ = (t.detach() for t in operands)
    long, weights = x.repeat(LONG, 1, 1), (w_ih, w_hh / 16, b_ih, b_hh)  # smaller, so that no state grows
    inference, training = (
        forward(long, None, None, number, train, *weights, tf32=True, instance=instance)[0].double()
        for train in (False, True)
    )
    return float((inference - training).abs().max() / training.abs().max())


def _kinds(cell: str, properties: cuda.Properties) -> list[str]:
    """The kinds of resident kernels, by how blocks exchange the state, that the device has for such a layer."""
    return sorted({
        plan["kernel"]
        for of_backward in (False, True)
        for plan in cuda.plans(cell, torch.bfloat16, B, H, 1, of_backward, properties)
    })  # fmt: skip


def _instance(cell: str, dtype: torch.dtype, kernel: str, of_backward: bool, properties: cuda.Properties) -> int:
    """The kernel of this kind that the planner likes best, or of any kind, where one pass has none of this kind."""
    if kernel == "steps":
        return EVERY_STEP
    plans = cuda.plans(cell, dtype, B, H, 1, of_backward, properties)
    instances: list[int] = [plan["instance"] for plan in plans if plan["kernel"] == kernel]
    return instances[0] if instances else int(plans[0]["instance"])


def _operands(cell: str) -> list[Tensor]:
    """x, w_ih, w_hh, b_ih, b_hh and dy, float64 on the CPU, whose values every dtype can hold."""
    gates = GATES[cell]
    generator = torch.Generator().manual_seed(0)
    sizes = ((T, B, I), (gates * H, I), (gates * H, H), (gates * H,), (gates * H,), (T, B, H))
    operands = [torch.randn(size, generator=generator, device="cpu", dtype=torch.float64) / 4 for size in sizes]
    if cell == "rnn_relu":  # far from its kink, where rounding decides on the gradient
        operands = [t.abs() for t in operands]
    return [t.bfloat16().double() for t in operands]


def _torchs(cell: str, operands: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """RESULTS by torch.nn's function, called in a way that `fused_rnn.patched` leaves alone."""
    x, *weights, dy = (t.to(dtype) for t in operands)
    inputs = [t.requires_grad_() for t in (x, *weights)]
    h0 = torch.zeros(1, B, H, dtype=dtype, device="cpu")
    function = getattr(torch.ops.aten, cell).input
    y = function(inputs[0], [h0, h0] if cell == "lstm" else h0, inputs[1:], True, 1, 0.0, True, False, False)[0]
    # Of a sum, torch takes the gradient without loading torch.fx, which takes half a second.
    return [y.detach(), *torch.autograd.grad((y * dy).sum(), inputs)]


def _ours(
    number: int,
    operands: list[Tensor],
    tf32: bool,
    instances: list[int],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
) -> list[Tensor]:
    """RESULTS by the operators, with these kernels for forward and backward."""
    x, w_ih, w_hh, b_ih, b_hh, dy = operands
    y, _, _, reserve, _ = forward(x, None, None, number, True, w_ih, w_hh, b_ih, b_hh, tf32=tf32, instance=instances[0])
    needs = (True, False, True, True, True, False)  # all but those of the states and of a projection
    dx, _, _, *of_weights = backward(
        dy, None, None, x, reserve, number, *needs, w_ih, w_hh, tf32=tf32, instance=instances[1]
    )
    return [y, dx, *of_weights[:4]]
