"""Print how many bytes one training step takes at its peak, as a process of its own.

    python -m harness.peak_memory SIDE ROW    in benchmarks/, with the row's fields as JSON

The suite `memory` starts this once for every number it needs. What is printed is the peak of the
resident memory during the step, less the resident memory before it. The module and its input are
there before; the gradients, what forward keeps for backward, and scratch are what is counted.

Five things would spoil the difference:

- Memory that Python, or a step before, has freed, but that the allocator still has: the step would take
  it again without a trace. So malloc gives everything back: blocks above 64 KiB are mappings of their
  own, the rest is trimmed (ALLOCATOR, which malloc reads when the process starts), and nothing of the
  row's own shape has run before.
- The peak of starting Python and torch, which is far above the step's: the kernel's high-water mark
  (VmHWM) is reset just before the step by writing 5 to /proc/self/clear_refs.
- What libraries set up once: threads, autograd, code caches. A step of a tiny shape has done it before.
- Pages of the libraries' code that are read in when they first run: the growth of RssFile is taken off.
- Huge pages, which count as 2 MiB when one byte is touched: switched off for this process.

The kernel adds up pages per CPU and brings the sums together now and then, so that differences below
RESOLUTION mean nothing.
"""

import ctypes
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from harness.measurement import Row
from harness.shapes import Shape
from harness.workload import build_module, module_call

ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(64 * 1024),
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
}
RESOLUTION = 512 * 1024  # bytes
TINY = Shape("tiny", T=3, B=2, I=4, H=4, L=1)
PR_SET_THP_DISABLE = 41  # of Linux's prctl


def resident(name: str) -> int:
    """A size of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def bytes_of_step(side: str, row: Row) -> int:
    """The peak of the first training step of this process in the row's shape."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    torch.set_num_threads(row.threads)
    torch.mm(*torch.randn(2, 256, 256))  # starts the threads
    tiny = replace(row, shape=TINY)
    module_call(tiny, build_module(side, tiny))()

    step = module_call(row, build_module(side, row))
    gc.collect()
    libc.malloc_trim(0)
    before, files_before = resident("VmRSS"), resident("RssFile")
    Path("/proc/self/clear_refs").write_text("5")
    output = step()  # noqa: F841 - in a model, somebody holds it until backward is through
    return resident("VmHWM") - before - (resident("RssFile") - files_before)


if __name__ == "__main__":
    side, fields = sys.argv[1], json.loads(sys.argv[2])
    print(bytes_of_step(side, Row(**{**fields, "shape": Shape(**fields["shape"])})))
