"""``python -m fused_rnn run script.py [args]``, ``python -m fused_rnn info`` and ``python -m fused_rnn tune``."""

from __future__ import annotations

import argparse
import os
import platform

import torch

import fused_rnn
from fused_rnn import _C, cuda, launch, policy, self_check, tuned


def info() -> dict[str, str]:
    """Return the versions and choices that a bug report should contain."""
    build = _C.build_info()
    return {
        "fused_rnn": f"{fused_rnn.__version__} in {os.path.dirname(fused_rnn.__file__)}",
        "built with": f"torch {build['torch']}, compiler {build['compiler']}, OpenMP {build['openmp']}",
        "torch": torch.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "cpu": f"{tuned.cpu_name()}, {os.cpu_count()} logical processors",
        "instruction set": f"{_chosen_isa()} (this machine has: {', '.join(_C.supported_cpu_isas())})",
        "precision": _precision(),
        "threads": str(torch.get_num_threads()),
        "cuda kernels": _cuda_kernels(),
        "torch's cuda": torch.version.cuda or "none",
        "tuned": _tuned(),
    }


def _cuda_kernels() -> str:
    if not cuda.available():
        return "not built, or torch has no CUDA"
    if not torch.cuda.is_available():
        return "built; torch sees no GPU"
    try:
        fault = self_check.why_not(torch.device("cuda"))
    except torch.OutOfMemoryError:
        return "built; the GPU has no memory left for their self-check"
    return f"built; {fault or f'right on this {torch.cuda.get_device_name()}, by their self-check'}"


def _chosen_isa() -> str:
    try:
        return _C.cpu_isa()
    except RuntimeError as error:  # FUSED_RNN_CPU_ISA names one that is not there
        return str(error)


def _precision() -> str:
    try:
        names = ("highest", "high", "medium")
        return f"{names[policy.precision(policy.FLOAT32)]}, of products of float32 on the CPU"
    except RuntimeError:
        return "unknown, as the instruction set"


def _tuned() -> str:
    devices = [torch.device("cpu")]
    if cuda.available() and torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    try:
        counts = [f"{len(tuned.table.of(tuned.machine(device)))} calls on {device.type}" for device in devices]
    except RuntimeError:
        return "unknown, as the instruction set"
    text = f"{', '.join(counts)}, in {tuned.table.path or 'memory'}"
    if len(devices) > 1 and cuda.device_properties(devices[1])[2] not in cuda.MEASURED:
        text += "; nobody measured this GPU: where it is not tuned, cuDNN computes"
    return text


def tune(options: argparse.Namespace) -> None:
    """Tune the call that the command line describes."""
    T, B, I, H, L = options.shape  # noqa: E741
    has_gpu = torch.cuda.is_available() and cuda.available()
    if options.device == "cuda" and not has_gpu:
        options.error("--device cuda needs a CUDA device and a build with the CUDA kernels")
    device = torch.device(options.device or ("cuda" if has_gpu else "cpu"))
    dtype = getattr(torch, options.dtype)
    more = {"nonlinearity": "relu"} if options.cell == "rnn_relu" else {}
    make = getattr(fused_rnn, options.cell.split("_")[0].upper())
    try:
        module = make(I, H, L, bidirectional=options.bidirectional, device=device, dtype=dtype, **more)
        with torch.set_grad_enabled(options.train):
            fused_rnn.tune(module, torch.zeros(T, B, I, device=device, dtype=dtype), options.seconds)
    except RuntimeError as error:  # no memory, most likely
        options.error(str(error))


def main() -> None:
    """Parse the command line, and run the command."""
    options = launch.parser().parse_args()
    if options.command == "run":
        launch.run(options)
    if options.command == "tune":
        tune(options)
        return
    for name, value in info().items():
        print(f"{name + ':':<17} {value}")


if __name__ == "__main__":
    main()
