"""On a busy machine, with a computing process on every core, a layer on all threads slows down only by its fair share.

Where threads wait for one another after every step, one that has lost its processor delays the others. Depending on how
they wait, a call takes twice or hundreds of times as long; torch.nn's GRU spins and takes hundreds.

Marked `timing`, because it measures a time, and so run only by `pytest -m timing`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

import fused_rnn
from processes import survives

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
LIMIT = 10
"""Times the idle time. One process for every core beside ours leaves half of it: 2; threads that wait for each other
are also seldom on their processors at the same moment: 2 to 4 were seen, on idle cores and on loaded ones. A thread
that hands its processor back without sleeping gets it again after a time slice, at every step: 10 to 100 were seen."""

LAYERS = [  # few rows: the units are split, with a barrier after every step; many: the rows are split, without barriers
    (cell, T, B) for cell in ("GRU", "LSTM") for T, B in ((500, 1), (50, 32))
]


@contextmanager
def busy_cores() -> Iterator[None]:
    """Run a process on every core; each ends by itself if this process dies."""
    loop = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    others = [subprocess.Popen([sys.executable, "-S", "-c", loop]) for _ in range(CORES)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def mean_seconds(call: Callable[[], object], seconds: float) -> float:
    """The mean over the given time. The median would ignore the calls during which threads wait."""
    call()
    begin, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() < begin + seconds:
        call()
        calls += 1
    return (time.perf_counter() - begin) / calls


def measure(path: str, library: str = "fused_rnn") -> None:
    """Write [idle, busy] seconds per call for every layer, on as many threads as there are cores."""
    torch.set_num_threads(CORES)
    calls = {}
    for cell, T, B in LAYERS:
        module = getattr(fused_rnn if library == "fused_rnn" else torch.nn, cell)(64, 256)
        calls[f"{cell} T={T} B={B}"] = partial(module, torch.randn(T, B, 64))
    with torch.inference_mode():
        idle = {name: mean_seconds(call, 0.5) for name, call in calls.items()}
        with busy_cores():
            found = {name: [idle[name], mean_seconds(call, 1.5)] for name, call in calls.items()}
    Path(path).write_text(json.dumps(found))


@pytest.mark.timing
@pytest.mark.skipif(CORES < 2, reason="on a single core there is one thread, and none to wait for")
@pytest.mark.parametrize("policy", [None, "PASSIVE"])
def test_busy_cores_cost_a_fair_share(policy: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    else:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for _attempt in range(3):  # other load may start during the busy half of an attempt
        survives(measure, str(tmp_path / "seconds"))
        found = json.loads((tmp_path / "seconds").read_text())
        print({name: f"{idle * 1e3:.2f} -> {busy * 1e3:.2f} ms" for name, (idle, busy) in found.items()})
        slow = {name: busy / idle for name, (idle, busy) in found.items() if busy > LIMIT * idle}
        if not slow:
            return
    pytest.fail(f"more than {LIMIT} times as long as on idle cores: {slow}")
