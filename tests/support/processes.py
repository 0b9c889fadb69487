"""Starts Python, and ``python -m fused_rnn run``, in another process."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
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


def python(*args: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with these arguments and additional environment variables; after ten minutes it hangs."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env | environment, capture_output=True, text=True, timeout=600)


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    """The output of a process that must have ended normally."""
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def survives(function: Callable[..., None], *args: object, **environment: str) -> None:
    """Run a module-level function in a Python process of its own, which must end normally.

    Keywords are additional environment variables.
    """
    source = Path(str(inspect.getsourcefile(function)))
    code = f"import runpy; runpy.run_path({str(source)!r})[{function.__name__!r}](*{args!r})"
    # faulthandler prints where a process was that a signal ended.
    succeeded(python("-X", "faulthandler", "-c", code, cwd=source.parent, PYTHONPATH=this_path(), **environment))


def run(*args: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m fused_rnn run`` with these arguments."""
    return python("-m", "fused_rnn", "run", *args, cwd=cwd, **environment)


def this_path() -> str:
    """PYTHONPATH that finds what this process finds."""
    return os.pathsep.join(filter(None, sys.path))


def python_path(*folders: Path) -> str:
    """PYTHONPATH with these folders in front of the present ones."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
