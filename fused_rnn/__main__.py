"""``python -m fused_rnn run script.py [args]`` and ``python -m fused_rnn info``."""

from __future__ import annotations

import os
import platform

import torch

import fused_rnn
from fused_rnn import _C, cuda, launch, policy, self_check


def info() -> dict[str, str]:
    """Return the versions and choices that a bug report should contain."""
    build = _C.build_info()
    return {
        "fused_rnn": f"{fused_rnn.__version__} in {os.path.dirname(fused_rnn.__file__)}",
        "built with": f"torch {build['torch']}, compiler {build['compiler']}, OpenMP {build['openmp']}",
        "torch": torch.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "cpu": f"{_cpu_name()}, {os.cpu_count()} logical processors",
        "instruction set": f"{_chosen_isa()} (this machine has: {', '.join(_C.supported_cpu_isas())})",
        "precision": _precision(),
        "threads": str(torch.get_num_threads()),
        "cuda kernels": _cuda_kernels(),
        "torch's cuda": torch.version.cuda or "none",
    }


def _cuda_kernels() -> str:
    if not cuda.available():
        return "not built, or torch has no CUDA"
    if not torch.cuda.is_available():
        return "built; torch sees no GPU"
    fault = self_check.why_not(torch.device("cuda", torch.cuda.current_device()))
    return f"built; {fault or f'right on this {torch.cuda.get_device_name()}, by their self-check'}"


def _chosen_isa() -> str:
    try:
        return _C.cpu_isa()
    except RuntimeError as error:  # FUSED_RNN_CPU_ISA names one that is not there
        return str(error)


def _precision() -> str:
    try:
        names = ("highest", "high", "medium")
        return f"{names[policy.precision(torch.empty(0))]}, of products of float32 on the CPU"
    except RuntimeError:
        return "unknown, as the instruction set"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """Parse the command line, and run the command."""
    options = launch.parser().parse_args()
    if options.command == "run":
        launch.run(options)
    for name, value in info().items():
        print(f"{name + ':':<17} {value}")


if __name__ == "__main__":
    main()
