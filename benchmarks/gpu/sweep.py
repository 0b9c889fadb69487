"""Times every resident CUDA kernel on every shape and compares them with the planner's estimates.

    python benchmarks/gpu/sweep.py [--budget SECONDS] [--output DIR] [--cell lstm gru rnn] [--dtype bfloat16 tf32]

Only the recurrence is timed, by replaying a CUDA graph: the layer is given W_ih x, and no gradient of a weight is
requested. With two directions, the time includes a copy of W_ih x.
gpu_sweep.jsonl gets one line per kernel; the table shows where the planner's choice is not the fastest, and by how
much. The constants of csrc/cuda/plan.cpp are fitted to these times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fused_rnn import cuda, reference
from fused_rnn.cell_info import NUMBER
from gpu.measure import OUTPUT
from harness.shapes import GROUPS, Shape

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32}
CELLS = {"rnn": "rnn_tanh", "lstm": "lstm", "gru": "gru"}
REPLAYS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--budget", type=float, default=100.0, help="seconds")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR", help="default: build/benchmarks/gpu")
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=["lstm", "gru"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "tf32"])
    options = parser.parse_args()
    if not cuda.available():
        parser.exit(1, "fused_rnn's CUDA kernels are not to be had here\n")
    options.output.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.allow_tf32 = True
    end = perf_counter() + options.budget
    rows = [(d, c, s) for d in options.dtype for s in GROUPS["gpu"] for c in options.cell]
    with (options.output / "gpu_sweep.jsonl").open("w") as file:
        for dtype, cell, shape in rows:
            if perf_counter() > end:
                print(f"no time was left for {shape.name} {cell} {dtype} and what follows")
                break
            for line in sweep(CELLS[cell], DTYPES[dtype], shape):
                file.write(json.dumps({"shape": shape.name, "cell": cell, "dtype": dtype, **line}) + "\n")
                file.flush()


def sweep(cell: str, dtype: torch.dtype, shape: Shape) -> list[dict[str, Any]]:
    """One line per kernel that fits the shape, forward and backward."""
    D, G = shape.directions, reference.GATES[cell]
    w_hh = [(torch.randn(G * shape.H, shape.H) / shape.H**0.5).to("cuda", dtype) for _ in range(D)]
    gates = torch.randn(shape.T, shape.B, D * G * shape.H, device="cuda", dtype=dtype)
    properties = cuda.device_properties(gates.device)
    lines = []
    for backward in (False, True):
        found = cuda.plans(cell, dtype, shape.B, shape.H, D, backward, properties)
        for rank, plan in enumerate(found):
            call = recurrence(cell, gates, w_hh, plan["instance"], backward)
            try:
                seconds = replay_time(call)
            except RuntimeError as error:
                print(f"{shape.name} {cell}: {plan}: {error}")
                continue
            lines.append({**plan, "backward": backward, "rank": rank, "measured": seconds / shape.T * 1e6})
        of_pass = [line for line in lines if line["backward"] == backward]
        if of_pass:
            best, chosen = min(of_pass, key=lambda line: line["measured"]), of_pass[0]
            way = "backward" if backward else "forward"
            print(
                f"{shape.name:16} {cell:8} {str(dtype)[6:]:8} {way:8} us/step: planned {kernel_name(chosen)} "
                f"{chosen['measured']:.2f} (estimate {chosen['microseconds']:.2f}), best {kernel_name(best)} "
                f"{best['measured']:.2f}"
            )
    return lines


def kernel_name(line: dict[str, Any]) -> str:
    return f"{line['kernel']} {line['unit_warps']}x{line['depth_warps']}x{line['row_tiles']}"


def recurrence(
    cell: str, gates: torch.Tensor, w_hh: list[torch.Tensor], instance: int, backward: bool
) -> Callable[[], object]:
    """The operator alone, run by one kernel."""
    operators, number = torch.ops.fused_rnn, NUMBER[cell]
    reverse = dict(w_hh_reverse=w_hh[1] if len(w_hh) > 1 else None)

    def forward() -> tuple[torch.Tensor, ...]:
        options = dict(**reverse, tf32=True, instance=instance)
        return operators.forward(gates, None, None, number, True, None, w_hh[0], **options)

    if not backward:
        return forward
    properties = cuda.device_properties(gates.device)
    sizes = (gates.size(1), w_hh[0].size(1), len(w_hh))
    instance, of_backward = cuda.plans(cell, gates.dtype, *sizes, False, properties)[0]["instance"], instance
    y, _, _, reserve, _ = forward()
    dy, needs = torch.randn_like(y), [False] * 6
    return lambda: operators.backward(
        dy, None, None, gates, reserve, number, *needs, None, w_hh[0], **reverse, tf32=True, instance=of_backward
    )


def replay_time(call: Callable[[], object]) -> float:
    """Median seconds of a replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return median(times)


if __name__ == "__main__":
    main()
