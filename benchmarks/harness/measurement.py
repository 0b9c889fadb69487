"""One row and its samples: the data behind the table, the CSV file and the picture.

A row is one configuration. A measurement holds the samples of all its sides, taken in turns, in seconds
per call or in bytes. Less is better in both, so a ratio is always a competitor's sample over fused_rnn's:
above 1, fused_rnn is better.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, fsum, log
from statistics import median, quantiles

from harness.shapes import Shape

FUSED = "fused_rnn"
TORCH = "torch.nn"
MARGIN = 0.03  # torch.nn against itself has medians down to 0.97 (NOTES.md)


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        call: "module" (the whole sequence), "cell" or "step" (a loop over time); in the suite `rl` the whole
            module with a rate of resets, such as "1%".
        cell: "rnn", "lstm" or "gru".
        mode: "inference" or "training".
        dtype: the name of a torch dtype.
    """

    shape: Shape
    call: str
    cell: str
    mode: str
    threads: int
    dtype: str

    @property
    def name(self) -> str:
        return self.shape.name if self.call == "module" else f"{self.shape.name} {self.call}"

    @property
    def given_state(self) -> bool:
        """Whether the call starts from a given state, as single steps and rollouts do, or from zeros."""
        return self.call != "module" or self.shape.T == 1

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.name}, {self.cell}, {self.mode}, {threads}"


@dataclass(frozen=True)
class Quartiles:
    """The median and the lower and upper quartile of some samples."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Quartiles":
        if len(samples) == 1:
            return cls(*samples * 3)
        return cls(*quantiles(samples, n=4, method="inclusive"))

    def below_one(self, margin: float = 0.0) -> bool:
        """Whether ratios are below 1 beyond noise: three of four pairs agree, and the median is below 1 - margin."""
        return self.upper < 1 and self.median < 1 - margin


@dataclass(frozen=True)
class Floor:
    """The hardware's lower bound on the time of a row; see roofline.py.

    Attributes:
        operations, streamed: the least work of a call: operations, and bytes of weights from the caches.
        flops, bandwidth: the machine's measured rates: operations and bytes per second.
    """

    operations: int
    streamed: int
    flops: float
    bandwidth: float

    @property
    def seconds(self) -> float:
        return max(self.operations / self.flops, self.streamed / self.bandwidth)


@dataclass(frozen=True)
class Measurement:
    """The samples of a row's sides.

    Attributes:
        unit: of the samples, "s" or "B".
        samples: by side, one value per round. Sample n of every side was taken in round n.
        floor: the hardware's lower bound; None if it is unknown.
        notes: by side, the reason why it has no samples.
        of_torch: the sides that use torch.nn.
        resolution: smaller differences are within the error of the measuring method.
    """

    row: Row
    unit: str
    samples: dict[str, list[float]]
    floor: Floor | None = None
    notes: dict[str, str] = field(default_factory=dict)
    resolution: float = 0.0
    of_torch: Sequence[str] = (TORCH,)

    def typical(self, side: str) -> float | None:
        """The median of a side's samples."""
        return median(self.samples[side]) if self.samples.get(side) else None

    def ratio(self, competitor: str) -> Quartiles | None:
        """The quartiles of the pairwise ratios, competitor over fused_rnn; None if one of them has no samples."""
        theirs, ours = self.samples.get(competitor), self.samples.get(FUSED)
        if not theirs or not ours:
            return None
        return Quartiles.of([their / our for their, our in zip(theirs, ours, strict=True)])

    @property
    def fraction_of_floor(self) -> float | None:
        """The floor over fused_rnn's time: 1 is the speed that the hardware allows."""
        ours = self.typical(FUSED)
        return None if ours is None or self.floor is None else self.floor.seconds / ours

    @property
    def behind_torch(self) -> bool:
        """Whether fused_rnn is worse than any side that uses torch.nn, beyond noise.

        Beyond noise: even the upper quartile of the ratios is below 1, and the typical difference is above the
        resolution.
        """
        return any(self._behind(side) for side in self.of_torch)

    @property
    def fails_check(self) -> bool:
        """Whether, besides, the median is below 1 by more than two copies of the same module may differ."""
        return any(self._behind(side, MARGIN) for side in self.of_torch)

    def _behind(self, side: str, margin: float = 0.0) -> bool:
        ratio = self.ratio(side)
        if ratio is None or not ratio.below_one(margin):
            return False
        return self.typical(FUSED) - self.typical(side) > self.resolution


def geometric_mean(values: Sequence[float]) -> float | None:
    """The mean of ratios: 2 and 1/2 have the mean 1. None without values."""
    return exp(fsum(map(log, values)) / len(values)) if values else None


def mean_ratio(measurements: Sequence[Measurement], competitor: str) -> float | None:
    """The geometric mean of the ratios against a competitor, over the rows that have one."""
    ratios = [ratio.median for each in measurements if (ratio := each.ratio(competitor))]
    return geometric_mean(ratios)
