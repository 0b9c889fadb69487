"""``python -m fused_rnn run``: starts Python anew, with the script and with ``startup/sitecustomize.py`` in reach.

Python imports a module named ``sitecustomize`` at its start. The one in the folder ``startup``, first on PYTHONPATH,
patches torch.nn once torch has been imported. Environment variables are inherited, so child processes of every kind
are treated as the script itself is, and the script runs in a Python that nothing else has run in.

This file does not import torch: the script may set variables, such as OMP_NUM_THREADS, that torch reads on import.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import NoReturn

STARTUP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "startup")


def requested() -> bool:
    """Whether Python is about to run ``python -m fused_rnn run``, for which it imports the package first.

    While Python looks for the module that follows ``-m``, sys.argv[0] is "-m"; sys.orig_argv has the module's name.
    """
    return sys.argv[:2] == ["-m", "run"] and re.fullmatch(r"(-\w*m)?fused_rnn", _orig_argv()[-1]) is not None


def parser() -> argparse.ArgumentParser:
    """The command line of ``python -m fused_rnn``."""
    parser = argparse.ArgumentParser(prog="python -m fused_rnn", description="torch.nn on the fused kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser(
        "run",
        help="run a script with the fused kernels under torch.nn",
        description="Runs a script, or a module, as Python does, with the fused kernels under torch.nn in the process "
        "and in its child processes.",
    )
    runner.add_argument("-m", dest="module", action="store_true", help="the target is a module, as for python -m")
    runner.add_argument(
        "--verbose",
        action="store_true",
        help="every process says at its end how many calls of torch.nn's recurrent modules ran fused",
    )
    runner.add_argument("target", help="a script, a zip file or folder with a __main__.py, or a module")
    runner.add_argument("args", nargs=argparse.REMAINDER, help="the target's own arguments")
    runner.set_defaults(error=runner.error)
    commands.add_parser("info", help="versions and the choices that were made on this machine")
    tuner = commands.add_parser(
        "tune",
        help="time torch.nn and the fused kernels on this machine, for backend='auto'",
        description="Times a layer on torch.nn and on the fused kernels, and stores who is faster on this machine: "
        "modules with backend='auto' follow it.",
    )
    tuner.add_argument("--cell", choices=["rnn", "rnn_relu", "lstm", "gru"], required=True)
    tuner.add_argument(
        "--shape", type=_shape, required=True, metavar="T,B,I,H[,L]",
        help="time steps, batch rows, input size, hidden size, layers",
    )  # fmt: skip
    tuner.add_argument("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32")
    tuner.add_argument("--train", action="store_true", help="forward and backward instead of inference")
    tuner.add_argument("--bidirectional", action="store_true")
    tuner.add_argument("--seconds", type=_seconds, default=10.0, help="about how long to measure (default: 10)")
    tuner.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        help="default: cuda where its kernels can run",
    )
    tuner.set_defaults(error=tuner.error)
    return parser


def _shape(text: str) -> tuple[int, ...]:
    sizes = [int(size) if size.isdecimal() else 0 for size in text.split(",")]
    if len(sizes) not in (4, 5) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected T,B,I,H or T,B,I,H,L, got {text!r}")
    return (*sizes, 1)[:5]


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return seconds


def run(options: argparse.Namespace) -> NoReturn:
    """Replaces this process by one that runs the target as ``python [-m] target args`` does.

    Args:
        options: the result of `parser`, with the command ``run``.

    Raises:
        SystemExit: with status 2, if Python was started with an option that makes it ignore PYTHONPATH.
    """
    if sys.flags.ignore_environment or sys.flags.no_site:
        options.error("the script is out of reach under Python's options -E, -I and -S")
    # argparse drops a "--" that belongs to the script.
    args = sys.argv[sys.argv.index(options.target, 2) :]
    command = [sys.executable, *_interpreter_options(), *(["-m"] if options.module else []), *args]
    os.execve(sys.executable, command, os.environ | _variables(options.verbose))


def _variables(verbose: bool) -> dict[str, str]:
    """The environment variables by which startup/sitecustomize.py is found and steered."""
    path = os.environ.get("PYTHONPATH", "")
    folders = path.split(os.pathsep) if path else []  # an empty entry would mean the working directory
    folders = [STARTUP, *(folder for folder in folders if folder != STARTUP)]  # without that of an outer run
    return {"PYTHONPATH": os.pathsep.join(folders), "FUSED_RNN_RUN": "verbose" if verbose else "1"}


def _interpreter_options() -> list[str]:
    """Python's own options: ["-X", "dev", "-u"] of ``python -X dev -um fused_rnn run``."""
    *options, last = _orig_argv()
    if last == "fused_rnn":
        last = options.pop() + last
    flags = re.fullmatch(r"(-\w*)mfused_rnn", last)
    if flags is None:
        return []  # not started by python -m fused_rnn, but by a debugger or the like
    return options if flags[1] == "-" else [*options, flags[1]]


def _orig_argv() -> list[str]:
    """The command line of this Python, from its options to the module's name."""
    return sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1] or [""]
