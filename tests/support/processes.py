"""Starts Python, and ``python -m fused_rnn run``, as a user does, in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KERNELS = """
import torch

def kernels(*_):
    with torch.autograd.profiler.profile() as profiler:  # torch.profiler's would import the compilers
        torch.nn.LSTM(3, 5)(torch.ones(2, 1, 3))
    names = {event.name for event in profiler.function_events}
    print(sorted(name for name in names if name.startswith("fused_rnn::")), flush=True)
"""
"""Source of a function that prints the package's operators under a call of torch.nn.LSTM."""

FUSED, PLAIN = "['fused_rnn::forward']\n", "[]\n"  # printed by kernels()


def python(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with these arguments and additional environment variables."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env | environment, capture_output=True, text=True, timeout=120
    )


def run(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m fused_rnn run`` with these arguments."""
    return python("-m", "fused_rnn", "run", *args, cwd=cwd, **environment)


def python_path(*folders: Path) -> str:
    """PYTHONPATH with these folders in front of the present ones."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
