"""The suite `memory`: the peak memory of a training step, on torch.nn and on fused_rnn.

Every number comes from a fresh process, because a process reuses freed memory without a trace; how
memory is counted is explained in harness/peak_memory.py.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from harness.measurement import FUSED, TORCH, Measurement, Row
from harness.peak_memory import ALLOCATOR, RESOLUTION
from harness.shapes import cpu_shapes
from harness.suite import OPTIONS, PATIENCE, Method, Suite

BENCHMARKS = Path(__file__).parents[1]
ROUNDS = 3  # processes per side; the numbers hardly vary


def measure(row: Row, method: Method) -> Measurement:
    samples: dict[str, list[float]] = {TORCH: [], FUSED: []}
    rounds = (1 if method.quick else ROUNDS) * (PATIENCE if method.patient else 1)
    for _ in range(rounds):
        for side, peaks in samples.items():
            try:
                peaks.append(peak_bytes(side, row))
            except subprocess.CalledProcessError as error:
                if side == FUSED:
                    raise RuntimeError(error.stderr) from error
                return Measurement(row, "B", {}, notes={side: error.stderr.strip().splitlines()[-1]})
    return Measurement(row, "B", samples, resolution=RESOLUTION)


def peak_bytes(side: str, row: Row) -> int:
    """The peak memory of one training step in a fresh process, at least the resolution."""
    finished = subprocess.run(
        [sys.executable, "-m", "harness.peak_memory", side, json.dumps(asdict(row))],
        cwd=BENCHMARKS,
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
    options=OPTIONS - {"mode"},
    threads=lambda default: [default],
    modes=("training",),
)
