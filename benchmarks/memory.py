"""The suite `memory`: what a training step takes at its peak, on torch.nn and on fused_rnn.

Every number comes from a fresh process, because memory that a process has taken once it takes again
at no cost; how it is counted is in peak_memory.py.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from measurement import FUSED, TORCH, Measurement, Row
from peak_memory import ALLOCATOR, RESOLUTION
from shapes import cpu_shapes
from suite import Method, Suite

SCRIPT = Path(__file__).with_name("peak_memory.py")
ROUNDS = 3  # of a process for each side; the numbers hardly vary


def measure(row: Row, method: Method) -> Measurement:
    samples: dict[str, list[float]] = {TORCH: [], FUSED: []}
    for _ in range(1 if method.quick else ROUNDS):
        for side, peaks in samples.items():
            try:
                peaks.append(peak_bytes(side, row))
            except subprocess.CalledProcessError as error:
                if side == FUSED:
                    raise RuntimeError(error.stderr) from error
                return Measurement(row, "B", {}, notes={side: error.stderr.strip().splitlines()[-1]})
    return Measurement(row, "B", samples, resolution=RESOLUTION)


def peak_bytes(side: str, row: Row) -> int:
    """One training step in a process of its own; less than can be told from nothing counts as that much."""
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), side, json.dumps(asdict(row))],
        env={**os.environ, **ALLOCATOR},
        capture_output=True,
        text=True,
        check=True,
    )
    return max(int(finished.stdout), RESOLUTION)


SUITE = Suite(
    name="memory",
    quantity="peak memory",
    unit="B",
    shapes=cpu_shapes(),
    measure=measure,
    options=frozenset({"threads", "dtype", "cell", "only", "check", "shape"}),
    threads=lambda default: [default],
    modes=("training",),
)
