"""The time of one row: every side is prepared, checked for the same result, and sampled in turns."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from measurement import FUSED, TORCH, Measurement, Row
from roofline import floor_seconds
from suite import Method
from timing import NORMAL, QUICK, sample_in_turns
from workload import dtype_of

# Outputs lie between -1 and 1. Wrong weights or equations differ by tenths; a float32 LSTM of a hundred
# steps differs by 1e-5 from one library to the other.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
REST = 0.01  # seconds, after which idle threads of OpenMP sleep


def measure_time(row: Row, prepare: Mapping[str, Callable[[], Callable[[], Tensor]]], method: Method) -> Measurement:
    """Sample the sides of a row in turns.

    Args:
        prepare: by side, in the order of the turns: does what happens once, and returns the call to
            time, which returns y. torch.nn comes first, and what it raises leaves the row without
            samples (it does not compute every dtype). What a competitor raises leaves that one out.

    Raises:
        RuntimeError: fused_rnn computes something else than torch.nn.
    """
    calls: dict[str, Callable[[], Any]] = {}
    notes: dict[str, str] = {}
    expected = None
    for side, prepare_call in prepare.items():
        try:
            call = prepare_call()
            y = call().detach()
        except Exception as error:
            if side == FUSED:
                raise
            notes[side] = first_line(error)
            if side == TORCH:
                return Measurement(row, "s", {}, notes=notes)
            continue
        expected = y if side == TORCH else expected
        difference = (y.double() - expected.double()).abs().max().item()
        if difference <= TOLERANCES[dtype_of(row)]:
            calls[side] = call
        elif side == FUSED:
            raise RuntimeError(f"{row}: fused_rnn and torch.nn differ by {difference:.1g}")
        else:
            notes[side] = f"differs from torch.nn by {difference:.1g}"

    brings_threads = "onnxruntime" in calls and row.threads > 1
    pace = QUICK if method.quick else NORMAL
    samples = sample_in_turns(calls, pace, REST if brings_threads else 0)
    return Measurement(row, "s", samples, floor=floor_seconds(row, method.ceilings[row.threads]), notes=notes)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
