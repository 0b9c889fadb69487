"""Every resident CUDA kernel on every shape: what the planner estimates against what the GPU takes.

    python benchmarks/gpu/sweep.py [--budget SECONDS] [--output DIR] [--cell lstm gru rnn] [--dtype bfloat16 tf32]

Measured is the recurrence alone, by replays of a CUDA graph; the products over all time steps around it are cuBLAS's.
A line of gpu_sweep.jsonl per kernel; the table says where the planner's choice is not the fastest, and by how much. The
constants of csrc/cuda/plan.cpp are fitted to it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fused_rnn import cuda, reference
from harness.shapes import GROUPS, Shape

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32}
CELLS = {"rnn": "rnn_tanh", "lstm": "lstm", "gru": "gru"}
REPLAYS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--budget", type=float, default=100.0, help="seconds")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or "benchmarks/results/gpu"))
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=["lstm", "gru"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "tf32"])
    options = parser.parse_args()
    if not cuda.available():
        parser.exit(1, "fused_rnn's CUDA kernels are not to be had here\n")
    options.output.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.allow_tf32 = True
    end = perf_counter() + options.budget
    rows = [(d, c, s) for d in options.dtype for s in GROUPS["gpu"] for c in options.cell]
    with (options.output / "gpu_sweep.jsonl").open("a") as file:
        for dtype, cell, shape in rows:
            if perf_counter() > end:
                print(f"no time was left for {shape.name} {cell} {dtype} and what follows")
                break
            for line in sweep(CELLS[cell], DTYPES[dtype], shape):
                file.write(json.dumps({"shape": shape.name, "cell": cell, "dtype": dtype, **line}) + "\n")
                file.flush()


def sweep(cell: str, dtype: torch.dtype, shape: Shape) -> list[dict[str, Any]]:
    """A line per kernel that fits, forward and backward."""
    D, G = 2 if shape.bi else 1, reference.GATES[cell]
    weights = [
        t if t is None else t.to("cuda", dtype)
        for _ in range(D)
        for t in (torch.randn(G * shape.H, shape.I), torch.randn(G * shape.H, shape.H) / shape.H**0.5, None, None, None)
    ]
    x = torch.randn(shape.T, shape.B, shape.I, device="cuda", dtype=dtype)
    properties = cuda.device_properties(x.device)
    lines = []
    for backward in (False, True):
        found = cuda.plans(cell, dtype, shape.B, shape.H, D, backward, properties)
        for rank, plan in enumerate(found):
            layer = cuda.Layer(cell, weights, True, True, plan["instance"])
            call = recurrence(cell, layer, x, backward)
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


def recurrence(cell: str, layer: cuda.Layer, x: torch.Tensor, backward: bool) -> Callable[[], object]:
    """The operator alone, on random operands."""
    T, B, _ = x.shape
    D, H, G = len(layer.directions), layer.H, layer.G
    x_gates, w_hh, number = x.new_empty(D, T, B, G * H).normal_(), layer.recurrent_weights(), cuda.NUMBER[cell]
    kept: list[torch.Tensor] = []

    def forward() -> None:
        operator = torch.ops.fused_rnn.recurrence_forward
        kept[:] = operator(x_gates, None, None, number, True, True, layer.instance, w_hh, None, None)

    if not backward:
        return forward
    layer.instance, instance = -1, layer.instance
    forward()
    dy, w_hh_t, of_forward = torch.randn_like(kept[0]), layer.transposed_recurrent_weights(), kept[3:8]
    operator = torch.ops.fused_rnn.recurrence_backward
    return lambda: operator(dy, None, None, *of_forward, number, True, instance, w_hh_t)


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
