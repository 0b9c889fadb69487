"""The time of one row: every side is prepared, checked for the same result, and sampled in turns.

`measure_time` compares the outputs of the sides and leaves out sides that fail. `measure_ways` compares
several ways to compute the same training call, including their gradients.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.measurement import FUSED, TORCH, Measurement, Row
from harness.roofline import floor
from harness.suite import Method
from harness.timing import NORMAL, Pace, sample_in_turns
from harness.workload import dtype_of

# Outputs lie between -1 and 1. Wrong weights or equations differ by tenths; a float32 LSTM of a hundred
# steps differs by 1e-5 from one library to the other.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
ROUNDED_WEIGHTS = 0.2  # to 8 bits, over a hundred steps
REST = 0.01  # seconds, after which idle threads of OpenMP sleep


def measure_time(
    row: Row,
    prepare: Mapping[str, Callable[[], Callable[[], Tensor]]],
    method: Method,
    rounded: Container[str] = (),
) -> Measurement:
    """Sample the sides of a row in turns.

    Args:
        prepare: by side, in the order of the turns: does the one-time work and returns the call to time,
            which returns y. torch.nn comes first; if it raises, the row has no samples (torch.nn does not
            support every dtype). A competitor that raises is left out.
        rounded: sides whose weights are rounded, and whose results may therefore differ more.

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
        if difference <= (ROUNDED_WEIGHTS if side in rounded else TOLERANCES[dtype_of(row)]):
            calls[side] = call
        elif side == FUSED:
            raise RuntimeError(f"{row}: fused_rnn and torch.nn differ by {difference:.1g}")
        else:
            notes[side] = f"differs from torch.nn by {difference:.1g}"

    brings_threads = any(side.startswith("onnxruntime") for side in calls) and row.threads > 1
    samples = sample_in_turns(calls, method.pace(), REST if brings_threads else 0)
    return Measurement(row, "s", samples, floor=floor(row, method.ceilings[row.threads]), notes=notes)


@dataclass(frozen=True)
class Way:
    """One way to compute a row.

    Attributes:
        call: the call to time; it returns y.
        leaves: the tensors whose gradients it computes in training.
        of_torch: whether it uses torch.nn.
        same: whether its results must equal the others', or only its time is compared.
    """

    call: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    of_torch: bool = False
    same: bool = True

    def results(self) -> list[Tensor]:
        """y and the gradients."""
        y = self.call().detach()
        return [y, *[leaf.grad.clone() for leaf in self.leaves if leaf.grad is not None]]


def measure_ways(
    row: Row, ways: Mapping[str, Way], method: Method, pace: Pace = NORMAL, tolerance: float | None = None
) -> Measurement:
    """Sample the ways to compute a row in turns; the first one uses torch.nn and gives the expected results.

    Args:
        tolerance: of the results' relative difference; None is that of the dtype.

    Raises:
        RuntimeError: a way computes something else.
    """
    expected: list[Tensor] = []
    tolerance = TOLERANCES[dtype_of(row)] if tolerance is None else tolerance
    for name, way in ways.items():
        found = way.results()
        expected = expected or found
        if not way.same:
            continue
        for one, other in zip(found, expected, strict=True):
            difference = relative_difference(one, other)
            if not difference <= tolerance:
                raise RuntimeError(f"{row}: {name} differs by {difference:.1g}")
    calls = {name: way.call for name, way in ways.items()}
    samples = sample_in_turns(calls, method.pace(pace), shuffled=True)
    return Measurement(row, "s", samples, of_torch=[name for name, way in ways.items() if way.of_torch])


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference over the largest absolute value, or the former if the latter is 0."""
    return (found - expected).abs().max().item() / (expected.abs().max().item() or 1)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
