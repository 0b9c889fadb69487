"""Shows what `fused_rnn.tune` does and finds: with rich where it is installed, else as plain lines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from fused_rnn.tuned import TORCH_NAMES, Call, Result

HAS_RICH = find_spec("rich") is not None


@contextlib.contextmanager
def progress(seconds: float) -> Iterator[Callable[[float], Any]]:
    """Context manager: a progress bar on stderr; yields a function that is told how many seconds have passed."""
    if not HAS_RICH:
        yield lambda passed: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=seconds)
        yield lambda passed: bar.advance(task, passed)


def show(results: Mapping[Call, Result], machines: Sequence[str], path: str | None) -> None:
    """Print results, the machines that they hold for, and where they are stored."""
    rows = [_row(call, result) for call, result in results.items()]
    heads = ("layer", "T,B,I,H,L", "torch.nn", "kernels", "speed-up", "chosen")
    stored = f"stored in {path}" if path else "stored in memory, for this process"
    if not HAS_RICH:
        print(*machines, sep="\n")
        for row in (heads, *rows):
            print("  ".join(row))
        print(stored)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="\n".join(machines), caption=stored)
    for head in heads:
        table.add_column(
            head, justify="right" if head in ("torch.nn", "kernels", "speed-up") else "left", no_wrap=head != "layer"
        )
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _row(call: Call, result: Result) -> tuple[str, ...]:
    layer = [call.cell, str(call.dtype).removeprefix("torch.")]
    if call.autocast is not None:
        layer.append(str(call.autocast).replace("torch.", "autocast "))
    if call.proj_size:
        layer.append(f"proj {call.proj_size}")
    layer += ["bidirectional"] * (call.directions == 2) + [call.kind] * (call.kind != "sequence")
    layer.append("training" if call.train else "inference")
    sizes = ",".join(map(str, (call.T, call.B, call.I, call.H, call.num_layers)))
    times = {"torch.nn": "", "kernels": ""}
    for name, seconds in sorted(result.seconds.items(), key=lambda item: -item[1]):
        times["torch.nn" if name in TORCH_NAMES else "kernels"] = _time(seconds)  # of the fastest kernel
    speedup = f"{result.speedup:.2f}" if all(times.values()) else "-"
    chosen = "torch.nn" if result.backend == "torch" else result.instruction_set or "kernels"
    return (" ".join(layer), sizes, *times.values(), speedup, chosen)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
