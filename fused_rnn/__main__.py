"""``python -m fused_rnn run script.py [args]`` and ``python -m fused_rnn info``."""

from __future__ import annotations

import argparse
import builtins
import io
import os
import platform
import sys
import types

import torch

import fused_rnn
from fused_rnn import _C, cuda


def run(script: str, args: list[str]) -> None:
    """Run a script as ``python script.py args`` does, with torch.nn patched to use the fused kernels.

    Raises:
        SystemExit: the script cannot be read; the exit status is 2.
    """
    path = os.path.abspath(script)
    try:
        with io.open_code(path) as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
    except OSError as error:
        print(f"can't open file '{path}': {error.strerror}", file=sys.stderr)
        sys.exit(2)
    main = types.ModuleType("__main__")
    main.__file__ = path
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    sys.argv = [script, *args]
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    with fused_rnn.patched():
        exec(code, main.__dict__)


def info() -> dict[str, str]:
    """Return versions and settings for a bug report."""
    build = _C.build_info()
    return {
        "fused_rnn": f"{fused_rnn.__version__} in {os.path.dirname(fused_rnn.__file__)}",
        "built with": f"torch {build['torch']}, compiler {build['compiler']}, OpenMP {build['openmp']}",
        "torch": torch.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "cpu": f"{_cpu_name()}, {os.cpu_count()} logical processors",
        "instruction set": f"{_chosen_isa()} (this machine has: {', '.join(_C.supported_cpu_isas())})",
        "threads": str(torch.get_num_threads()),
        "cuda kernels": "built" if cuda.available() else "not built, or torch has no CUDA",
        "torch's cuda": torch.version.cuda or "none",
    }


def _chosen_isa() -> str:
    try:
        return _C.cpu_isa()
    except RuntimeError as error:  # FUSED_RNN_CPU_ISA names one that is not there
        return str(error)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """Parse the command line, and run the command."""
    parser = argparse.ArgumentParser(prog="python -m fused_rnn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="run a script with the fused kernels under torch.nn")
    runner.add_argument("script")
    runner.add_argument("args", nargs=argparse.REMAINDER, help="the script's own arguments")
    commands.add_parser("info", help="versions and what was chosen on this machine")
    options = parser.parse_args()
    if options.command == "run":
        # argparse drops a "--" that belongs to the script.
        run(options.script, sys.argv[sys.argv.index(options.script, 2) + 1 :])
    else:
        for name, value in info().items():
            print(f"{name + ':':<17} {value}")


if __name__ == "__main__":
    main()
