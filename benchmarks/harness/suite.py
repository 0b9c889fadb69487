"""A suite of measurements: its rows, its options, and how one row is measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from harness.measurement import Measurement, Row
from harness.roofline import Ceilings
from harness.shapes import Shape
from harness.timing import NORMAL, QUICK, Pace
from harness.workload import CLASSES, MODES

PATIENCE = 4  # times as many rounds for a row that seems behind
OPTIONS = frozenset({"threads", "dtype", "cell", "mode", "only", "check", "shape"})


def one_and_all(default: int) -> list[int]:
    """One thread, and the number that PyTorch chooses."""
    return [1] if default == 1 else [1, default]


@dataclass(frozen=True)
class Method:
    """The options of a run.

    Attributes:
        quick: for a first impression.
        competitors: besides torch.nn, names of `competitors.COMPETITORS`.
        ceilings: the machine's, by number of threads; empty if time is not measured.
        patient: with more rounds, to measure a row a second time.
    """

    quick: bool
    competitors: Sequence[str]
    ceilings: Mapping[int, Ceilings]
    patient: bool = False

    def pace(self, usual: Pace = NORMAL) -> Pace:
        pace = QUICK if self.quick else usual
        return pace.times(PATIENCE) if self.patient else pace


@dataclass(frozen=True)
class Suite:
    """The description of a suite.

    Attributes:
        quantity: the compared quantity, for headings, and its unit (see Measurement).
        shapes: the default shapes.
        options: the command line's options that only some suites take and this one does; most take OPTIONS.
        threads: the default numbers of threads, as a function of PyTorch's choice.
        calls: of fused_rnn; see Row.
        cells: the default cells.
        takes: whether a combination of shape, call, cell, mode and threads is a row.
        refusal: why a shape cannot be measured, or None if it can.
    """

    name: str
    quantity: str
    unit: str
    shapes: Sequence[Shape]
    measure: Callable[[Row, Method], Measurement]
    options: frozenset[str] = OPTIONS
    threads: Callable[[int], list[int]] = one_and_all
    calls: Sequence[str] = ("module",)
    modes: Sequence[str] = MODES
    cells: Sequence[str] = tuple(CLASSES)
    takes: Callable[[Row], bool] = lambda row: True
    refusal: Callable[[Shape], str | None] = lambda shape: None

    def rows(
        self,
        shapes: Sequence[Shape],
        cells: Sequence[str],
        modes: Sequence[str],
        threads: Sequence[int],
        dtype: str,
    ) -> list[Row]:
        """Every combination that is a row; the number of threads changes least often, because changing it is slow."""
        cells = [cell for cell in CLASSES if cell in cells]
        modes = [mode for mode in self.modes if mode in modes]
        combinations = product(threads, modes, shapes, self.calls, cells)
        rows = (Row(shape, call, cell, mode, count, dtype) for count, mode, shape, call, cell in combinations)
        return [row for row in rows if self.takes(row)]
