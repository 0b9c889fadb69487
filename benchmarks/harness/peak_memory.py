"""Prints the peak memory of one training step in bytes; runs in a process of its own.

    python -m harness.peak_memory SIDE ROW    in benchmarks/, with the row's fields as JSON

The suite `memory` starts this once for every number. The result is the peak of the resident memory during
the step minus the resident memory before it. The module and its input exist before; the gradients, the
tensors that forward saves for backward, and scratch memory are counted.

Five effects would distort the difference:

- Memory freed by Python or an earlier step but kept by the allocator: the step would reuse it unnoticed. So
  malloc returns everything: blocks above 64 KiB are separate mappings, the rest is trimmed (ALLOCATOR, which
  malloc reads when the process starts), and no step of the row's shape has run before.
- The peak of starting Python and torch, which is far above the step's: the kernel's high-water mark
  (VmHWM) is reset just before the step by writing 5 to /proc/self/clear_refs.
- One-time allocations of libraries (threads, autograd, code caches): a step of a tiny shape runs first.
- Pages of the libraries' code that are read in when they first run: the growth of RssFile is subtracted.
- Huge pages, which count as 2 MiB when one byte is touched: switched off for this process.

The kernel counts pages per CPU and updates the sums only now and then, so differences below RESOLUTION
mean nothing.
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
    """A memory size in /proc/self/status, converted to bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def bytes_of_step(side: str, row: Row) -> int:
    """The peak memory of the row's training step, the first one of its shape in this process."""
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
    output = step()  # noqa: F841 - a model, too, holds the output until backward ends
    return resident("VmHWM") - before - (resident("RssFile") - files_before)


if __name__ == "__main__":
    side, fields = sys.argv[1], json.loads(sys.argv[2])
    print(bytes_of_step(side, Row(**{**fields, "shape": Shape(**fields["shape"])})))
