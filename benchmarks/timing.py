"""Interleaved timing: two computations advance in turns, and each turn is timed.

A computer does not run at one speed: its clock rate changes with heat, and other programs take
their share of its caches and cores. Timing all of one side and then all of the other counts such
changes for or against one side. In turns (A B A B ...) both sides meet the same conditions, and
the ratio of neighbouring turns is hardly disturbed; the median of these ratios ignores the few
turns in which something did interrupt.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import torch


@dataclass
class TimedSide:
    """What one side returned in each round, and how long each round took it, in seconds."""

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
        """How many times as fast as the first side the second is."""
        ratios = [first / second for first, second in zip(self.first.seconds, self.second.seconds, strict=True)]
        return median(ratios[self.warm_up :])


def time_interleaved(
    first: Callable[[], Any],
    second: Callable[[], Any],
    rounds: int,
    warm_up: int,
    after_round: Callable[[], None] = lambda: None,
) -> InterleavedTiming:
    """Call `first` and `second` in turns, `rounds` times each, and time every call.

    Each side has its own random state, which starts as the present one, so that each draws the
    numbers it would draw if it ran alone. To time a generator, pass `partial(next, generator)`.
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
