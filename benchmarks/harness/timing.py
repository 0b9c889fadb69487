"""Interleaved timing: computations advance in turns, and each turn is timed.

A computer does not run at one speed: its clock rate changes with heat, and other programs take
their share of its caches and cores. Timing all of one side and then all of the other counts such
changes for or against one side. In turns (A B A B ...) all sides meet the same conditions, and
the ratio of neighbouring turns is hardly disturbed; the median of these ratios ignores the few
turns that were interrupted.

`time_interleaved` is for trainings: every turn does one step, returns a result that is kept, and
draws random numbers. `sample_in_turns` is for calls that do the same every time; it keeps only
the times, so that calls of microseconds can be timed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from random import Random
from statistics import median
from time import perf_counter, sleep
from typing import Any

import torch


@dataclass
class TimedSide:
    """The results and the times (in seconds) of one side, round by round."""

    results: list[Any] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class InterleavedTiming:
    """Both sides of an interleaved timing. The first `warm_up` rounds do not count."""

    first: TimedSide
    second: TimedSide
    warm_up: int
    threads: int

    @property
    def first_median(self) -> float:
        return median(self.first.seconds[self.warm_up :])

    @property
    def second_median(self) -> float:
        return median(self.second.seconds[self.warm_up :])

    @property
    def speed_up(self) -> float:
        """The speed of the second side divided by that of the first."""
        return median(self.ratios)

    @property
    def ratios(self) -> list[float]:
        """The first side's time over the second's, round by round."""
        pairs = zip(self.first.seconds, self.second.seconds, strict=True)
        return [first / second for first, second in pairs][self.warm_up :]


def time_interleaved(
    first: Callable[[], Any],
    second: Callable[[], Any],
    rounds: int,
    warm_up: int,
    after_round: Callable[[], None] = lambda: None,
) -> InterleavedTiming:
    """Call `first` and `second` in turns, `rounds` times each, and time every call.

    Each side has its own random state, a copy of the present one, so that each draws the same
    numbers as if it ran alone. To time a generator, pass `partial(next, generator)`.
    A call that starts work on a GPU must itself wait for the end of that work.
    """
    if not 0 <= warm_up < rounds:
        raise ValueError(f"warm_up must be at least 0 and less than rounds={rounds}, got {warm_up}")
    sides = [TimedSide(), TimedSide()]
    random_states = [torch.get_rng_state()] * 2
    for _ in range(rounds):
        for side, call in enumerate((first, second)):
            torch.set_rng_state(random_states[side])
            start = perf_counter()
            result = call()
            sides[side].seconds.append(perf_counter() - start)
            sides[side].results.append(result)
            random_states[side] = torch.get_rng_state()
        after_round()
    return InterleavedTiming(*sides, warm_up, torch.get_num_threads())


@dataclass(frozen=True)
class Pace:
    """The length of a sampling: rounds until `budget` seconds are over, within the two bounds."""

    budget: float
    least_rounds: int
    most_rounds: int = 101

    def times(self, factor: int) -> "Pace":
        return Pace(factor * self.budget, factor * self.least_rounds, factor * self.most_rounds)


NORMAL = Pace(budget=1.5, least_rounds=5)
QUICK = Pace(budget=0.3, least_rounds=3)
LEAST_SAMPLE = 2e-3  # seconds; far above the clock's resolution and the interpreter's jitter
WARM_UP_CALLS = 2


def sample_in_turns(
    calls: Mapping[str, Callable[[], Any]], pace: Pace, rest: float = 0.0, shuffled: bool = False
) -> dict[str, list[float]]:
    """Sample every side in turns.

    A sample is the mean over a batch of calls, large enough that the slowest side needs LEAST_SAMPLE. All
    sides get the same batch. At the normal pace, sides that together take 100 ms per call get
    15 rounds; slower ones get fewer.

    Args:
        calls: by side; each has been called before, so that one-time work is done.
        rest: seconds to sleep before each turn. Idle threads of a pool spin for some milliseconds
            before they sleep, which would slow down a side that has its own pool. Each turn then
            starts with an untimed call that wakes the side's own threads.
        shuffled: whether every round has its own order. A side similar to the one before it finds its
            code in the caches; with shuffling, all have this advantage equally often.

    Returns:
        By side, the seconds per call of every round.
    """
    batch = max(1, ceil(LEAST_SAMPLE / max(map(quickest_call, calls.values()))))
    seconds: dict[str, list[float]] = {side: [] for side in calls}
    turns, random = list(calls.items()), Random(1)
    began = perf_counter()
    for finished in range(pace.most_rounds):
        if finished >= pace.least_rounds and perf_counter() - began > pace.budget:
            break
        if shuffled:
            random.shuffle(turns)
        for side, call in turns:
            if rest:
                sleep(rest)
                call()
            seconds[side].append(seconds_per_call(call, batch))
    return seconds


def quickest_call(call: Callable[[], Any]) -> float:
    """Seconds of the quickest of a few calls, which also warm up."""
    return min(seconds_per_call(call, 1) for _ in range(WARM_UP_CALLS))


def seconds_per_call(call: Callable[[], Any], batch: int) -> float:
    start = perf_counter()
    for _ in range(batch):
        call()
    return (perf_counter() - start) / batch
