"""The slowdown of a training step when its numbers are denormal, for torch.nn and for fused_rnn.

    python benchmarks/denormals.py [--quick]

On many processors an operation that reads or makes a denormal number takes a hundred times as long. The kernels count
such numbers as zeros (csrc/cpu/denormals.h); torch.nn does so only after torch.set_flush_denormal(True). Each row makes
one of x, the weights and the gradient of the output denormal. One thread; the four sides of a row are timed in turns.
The exit status is 1 if fused_rnn slows down by more than LIMIT.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

import fused_rnn
from harness.timing import NORMAL, QUICK, Pace, sample_in_turns

LIMIT = 1.2
T, B, I, H = 16, 12, 64, 128  # noqa: E741 - the project's letter
SCALE = 1e-39  # the smallest normal float32 is 1.2e-38
CELLS = ("RNN", "LSTM", "GRU")
PARTS = ("x", "weights", "dy")


def training_step(library: object, cell: str, denormal: str | None) -> Callable[[], None]:
    """Forward and backward, with normal numbers if `denormal` is None, else with one of PARTS denormal."""
    torch.manual_seed(0)
    module: nn.Module = getattr(library, cell)(I, H)
    x, dy = torch.randn(T, B, I), torch.randn(T, B, H)
    scaled = {"x": [x], "weights": list(module.parameters()), "dy": [dy], None: []}[denormal]
    with torch.no_grad():
        for tensor in scaled:
            tensor.mul_(SCALE)
    return partial(step, module, x, dy)


def step(module: nn.Module, x: Tensor, dy: Tensor) -> None:
    module.zero_grad()
    module(x)[0].backward(dy)


def slowdowns(cell: str, part: str, pace: Pace) -> Mapping[str, float]:
    """By library: the median, over rounds, of the time with denormal numbers divided by the time with normal ones."""
    libraries = {"torch.nn": nn, "fused_rnn": fused_rnn}
    sides = {
        f"{name} {denormal}": training_step(library, cell, denormal)
        for name, library in libraries.items()
        for denormal in (part, None)
    }
    seconds = sample_in_turns(sides, pace, shuffled=True)
    rounds = {name: zip(seconds[f"{name} {part}"], seconds[f"{name} None"], strict=True) for name in libraries}
    return {name: median(denormal / usual for denormal, usual in pairs) for name, pairs in rounds.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    pace = QUICK if parser.parse_args(arguments).quick else NORMAL
    torch.set_num_threads(1)
    slow = []
    print(f"{'cell':6}{'denormal':10}{'torch.nn':>10}{'fused_rnn':>11}")
    for cell in CELLS:
        for part in PARTS:
            found = slowdowns(cell, part, pace)
            print(f"{cell:6}{part:10}{found['torch.nn']:10.2f}{found['fused_rnn']:11.2f}", flush=True)
            if found["fused_rnn"] > LIMIT:
                slow.append(f"{cell} {part}")
    if slow:
        sys.exit(f"more than {LIMIT} times as long with denormal numbers: {', '.join(slow)}")


if __name__ == "__main__":
    main()
