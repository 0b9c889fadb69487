"""Counts calls for ``python -m fused_rnn run --verbose``, and reports them when the process ends."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import sys
import threading
from collections import Counter
from multiprocessing import util


class Tally:
    """The calls of torch.nn's recurrent modules in this process, by class.

    Threads may count at the same time.
    """

    def __init__(self) -> None:
        self._start()

    def report_at_exit(self) -> None:
        """Has this process and its forked children, which count from zero, call `report` when they end."""
        os.register_at_fork(after_in_child=self._start)
        atexit.register(self.report)
        # Children that multiprocessing forks leave by os._exit, without atexit; it runs its own finalizers.
        self._finalize()
        util.register_after_fork(self, Tally._finalize)

    def _start(self) -> None:
        self._lock = threading.Lock()  # a new one: another thread may have held it at the fork
        self._calls: Counter[str] = Counter()
        self._handed_over: Counter[str] = Counter()
        self._reported = False

    def _finalize(self) -> None:
        util.Finalize(None, self.report, exitpriority=0)

    def call(self, name: str) -> None:
        """Counts a call of this class of torch.nn."""
        with self._lock:
            self._calls[name] += 1

    def hand_over(self, name: str) -> None:
        """Counts a call that torch.nn computed, in addition to `call`."""
        with self._lock:
            self._handed_over[name] += 1

    def __str__(self) -> str:
        with self._lock:
            fused, handed_over = self._calls - self._handed_over, self._handed_over.copy()
        return f"{_listed(fused)} ran fused, {_listed(handed_over)} ran on torch.nn"

    def report(self) -> None:
        """Writes one line to stderr, once per process; none in a worker of multiprocessing that made no calls."""
        if self._reported or (multiprocessing.parent_process() is not None and not self._calls):
            return
        self._reported = True
        line = f"fused_rnn: process {os.getpid()}, torch.nn's recurrent modules: {self}\n"
        with contextlib.suppress(AttributeError, OSError, ValueError):  # without stderr, or with a closed one
            sys.stderr.write(line)


def _listed(calls: Counter[str]) -> str:
    number = calls.total()
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(calls.items()))
    return f"{number} call{'' if number == 1 else 's'}" + (f" ({kinds})" if kinds else "")
