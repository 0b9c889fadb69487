"""Measures one row of measure.py.

The calls are those of harness/workload.py (x needs no gradient, zero states, gradients into fresh memory), on a GPU.
Modules of both libraries have the same weights and get the same random input. Each row is timed in two ways:

    events   CUDA events around a batch of eager calls: a user's time, with the cost of Python and of launches
    graph    CUDA events around replays of a CUDA graph of one call: the time of the kernels

Both alternate between the sides (A B A B ...), for the reasons in harness/timing.py, in two passes: the difference of
the two medians shows how much of a ratio is noise. On a CPU (to try this file without a GPU) a clock replaces both.

This file needs fused_rnn only for fused_rnn's side of a row, so torch.nn can be measured before anything is built.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, isfinite
from statistics import median
from time import perf_counter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from harness.measurement import FUSED, TORCH, Measurement
from harness.shapes import Shape
from harness.timing import Pace, seconds_per_call

CLASSES = {"rnn": "RNN", "lstm": "LSTM", "gru": "GRU"}
MODES = ("inference", "training")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
"""tf32 is float32 with torch's switches for it on; float32 has them off."""

SEED = 1
NORMAL, QUICK = Pace(budget=0.12, least_rounds=3, most_rounds=25), Pace(budget=0.04, least_rounds=2, most_rounds=5)
LEAST_SAMPLE = 2e-3  # seconds; far above the resolution of events
WARM_UP_CALLS = 3
MOST_KERNELS = 8  # kernel names kept per row, longest running first
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class GpuRow:
    """One configuration; `dtype` is a name of DTYPES. A packed row has sequences of T/2 to T steps."""

    shape: Shape
    cell: str
    dtype: str
    mode: str
    packed: bool = False

    @property
    def name(self) -> str:
        return f"{self.shape.name}_packed" if self.packed else self.shape.name

    @property
    def steps(self) -> int:
        """Sequential time steps, counted in one direction."""
        return self.shape.T * self.shape.L

    def __str__(self) -> str:
        return f"{self.name}, {self.cell}, {self.dtype}, {self.mode}"


@dataclass(frozen=True)
class GpuMethod:
    """The options of a run.

    Attributes:
        libraries: by side, torch.nn first; without fused_rnn, torch.nn is measured alone.
        backend: the `backend` of fused_rnn's modules.
        kernels: whether to record the names of torch.nn's kernels.
        timed: whether to measure times, or only to compare results.
    """

    device: torch.device
    libraries: Mapping[str, ModuleType]
    backend: str = "auto"
    pace: Pace = NORMAL
    kernels: bool = False
    timed: bool = True


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Set both of torch's TF32 switches: cuDNN's (on by default) and the one for matrix products (off by default)."""
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = allowed
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def measure(row: GpuRow, method: GpuMethod) -> dict[str, Any]:
    """All results of one row, as the columns of a table.

    A side that raises is left out, and its error becomes a note.
    """
    with tf32_allowed(row.dtype == "tf32"):
        try:
            return measure_sides(row, method)
        finally:
            release_memory(method.device)


def measure_sides(row: GpuRow, method: GpuMethod) -> dict[str, Any]:
    shape = row.shape
    line: dict[str, Any] = {
        "suite": "gpu", "row": row.name, "cell": row.cell, "mode": row.mode, "T": shape.T, "B": shape.B, "I": shape.I,
        "H": shape.H, "L": shape.L, "bidirectional": shape.bidirectional, "packed": row.packed, "dtype": row.dtype,
    }  # fmt: skip
    notes: dict[str, str] = {}
    calls: dict[str, Call] = {}
    x, dy = random_input(row, method.device)
    weights: dict[str, Tensor] | None = None
    exact: list[Tensor] = []
    for side, library in method.libraries.items():
        try:
            module = build_module(library, row, method.device, weights)
            if weights is None:
                weights = module.state_dict()
                exact = exact_results(row, weights, x, dy)
            if side == FUSED and method.backend != "auto":
                module.backend = method.backend
            call = one_call(row, module, x, dy)
            results, line[f"{side} memory"] = with_peak_memory(call, module, method.device)
            line |= errors_of(side, results, exact, notes)
            calls[side] = call
        except Exception as error:
            notes[side] = first_line(error)
    del exact
    if FUSED in method.libraries:
        line |= {"backend": method.backend, "plan": plan_text(method.libraries[FUSED], row, method)}
        line["wrong"] = FUSED not in calls or is_wrong(row, line)
    if TORCH in calls and method.kernels:
        line["kernels"] = kernel_names(calls[TORCH], method.device)
    if calls and method.timed:
        line |= times(row, calls, method, notes)
    return line | {"notes": "; ".join(f"{side}: {note}" for side, note in notes.items())}


# Calls


def build_module(
    library: ModuleType, row: GpuRow, device: torch.device, weights: Mapping[str, Tensor] | None, **options: Any
) -> nn.Module:
    """The row's module, with `weights` if they are given."""
    shape = row.shape
    options = {"dtype": DTYPES[row.dtype], "bidirectional": shape.bidirectional, "device": device, **options}
    torch.manual_seed(SEED)
    module = getattr(library, CLASSES[row.cell])(shape.I, shape.H, shape.L, **options)
    if weights is not None:
        module.load_state_dict(weights)
    return module.train(row.mode == "training")


def random_input(row: GpuRow, device: torch.device) -> tuple[Tensor | PackedSequence, Tensor]:
    """x and the gradient that backward starts from. Never zeros: they hide unwritten outputs and can run faster."""
    shape, dtype = row.shape, DTYPES[row.dtype]
    generator = torch.Generator(device).manual_seed(SEED)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device).to(dtype)

    x: Tensor | PackedSequence = draw(shape.T, shape.B, shape.I)
    steps = (shape.T, shape.B)
    if row.packed:
        lengths = torch.linspace(shape.T, max(shape.T // 2, 1), shape.B).long()
        x = pack_padded_sequence(x, lengths)
        steps = (x.data.size(0),)
    return x, draw(*steps, shape.directions * shape.H)


def one_call(row: GpuRow, module: nn.Module, x: Tensor | PackedSequence, dy: Tensor) -> Call:
    def forward() -> Tensor:
        y = module(x)[0]
        return y.data if row.packed else y

    def infer() -> Tensor:
        with torch.inference_mode():
            return forward()

    def train() -> Tensor:
        module.zero_grad(set_to_none=True)
        y = forward()
        y.backward(dy)
        return y

    return infer if row.mode == "inference" else train


# Accuracy


def results_of(call: Call, module: nn.Module) -> list[Tensor]:
    """y and, in training, every gradient."""
    y = call().detach()
    return [y, *(p.grad for p in module.parameters() if p.grad is not None)]


def exact_results(row: GpuRow, weights: Mapping[str, Tensor], x: Tensor | PackedSequence, dy: Tensor) -> list[Tensor]:
    """torch.nn's results in float64 from the same rounded weights and inputs."""
    module = build_module(torch.nn, row, dy.device, weights, dtype=torch.float64)
    return results_of(one_call(row, module, x.double(), dy.double()), module)


def errors_of(
    side: str, results: Sequence[Tensor], exact: Sequence[Tensor], notes: dict[str, str]
) -> dict[str, float | None]:
    """The relative error of y and the largest one of a gradient, as norms; None where a value is not finite."""
    errors: list[float | None] = []
    for result, value in zip(results, exact, strict=True):
        norm = torch.linalg.vector_norm
        error = (norm(result.double() - value) / norm(value).clamp_min(1e-300)).item()
        errors.append(error if isfinite(error) else None)
    if None in errors:
        notes[side] = "results are not finite"
    gradients = errors[1:]
    columns = {f"{side} error": errors[0]}
    if gradients:
        columns[f"{side} gradient error"] = None if None in gradients else max(gradients)
    return columns


def is_wrong(row: GpuRow, line: Mapping[str, Any]) -> bool:
    """The rule of tests/support/tolerances.py for norms: a multiple of torch.nn's own error plus one rounding."""
    rounding = 2**-10 if row.dtype == "tf32" else torch.finfo(DTYPES[row.dtype]).eps
    for quantity, factor in (("error", 2), ("gradient error", 4)):
        if f"{FUSED} {quantity}" not in line:
            continue
        ours, theirs = line[f"{FUSED} {quantity}"], line.get(f"{TORCH} {quantity}")
        if ours is None or ours > factor * (theirs or 0.0) + rounding:
            return True
    return False


# Time


def times(row: GpuRow, calls: Mapping[str, Call], method: GpuMethod, notes: dict[str, str]) -> dict[str, Any]:
    """The columns of both ways to time; the ratio is that of the graphs if every side could be captured."""
    on_gpu = method.device.type == "cuda"
    columns: dict[str, Any] = {}
    samples = sample_in_passes(calls, seconds_by_events if on_gpu else seconds_per_call, method.pace)
    if on_gpu:
        columns |= {f"{side} eager": median(flat(passes)) for side, passes in samples.items()}
    way = "events" if on_gpu else "clock"
    replays: dict[str, Call] = {}
    for side, call in calls.items() if on_gpu else ():
        try:
            replays[side] = captured(call)
        except Exception as error:
            notes.setdefault(side, f"not captured: {first_line(error)}")
            torch.cuda.synchronize()
    if replays and len(replays) == len(calls):
        way, samples = "graph", sample_in_passes(replays, seconds_by_events, method.pace)
    columns |= {"way": way, "rounds": len(flat(samples[next(iter(samples))])), "unit": "s"}
    measurement = Measurement(row, "s", {side: flat(passes) for side, passes in samples.items()})
    for side, passes in samples.items():
        seconds = measurement.typical(side)
        first, second = map(median, passes)
        columns[side] = seconds
        columns[f"{side} us_per_step"] = seconds * 1e6 / row.steps
        columns[f"{side} noise"] = abs(first - second) / seconds
    if ratio := measurement.ratio(TORCH):
        names = (f"{TORCH} ratio", f"{TORCH} ratio q1", f"{TORCH} ratio q3")
        columns |= dict(zip(names, (ratio.median, ratio.lower, ratio.upper), strict=True))
        columns["behind_torch"] = measurement.behind_torch
    return columns


def sample_in_passes(
    calls: Mapping[str, Call], stopwatch: Callable[[Call, int], float], pace: Pace
) -> dict[str, list[list[float]]]:
    """By side and pass, the seconds per call of every round; all sides take turns."""
    for call in calls.values():
        stopwatch(call, WARM_UP_CALLS)
    batch = max(1, ceil(LEAST_SAMPLE / max(stopwatch(call, 1) for call in calls.values())))
    seconds: dict[str, list[list[float]]] = {side: [] for side in calls}
    for _ in range(2):
        for passes in seconds.values():
            passes.append([])
        began = perf_counter()
        for finished in range(pace.most_rounds):
            if finished >= pace.least_rounds and perf_counter() - began > pace.budget:
                break
            for side, call in calls.items():
                seconds[side][-1].append(stopwatch(call, batch))
    return seconds


def seconds_by_events(call: Call, batch: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(batch):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / batch


def captured(call: Call) -> Call:
    """The replay of a CUDA graph of one call. Capture requires a warm-up on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def flat(passes: Sequence[Sequence[float]]) -> list[float]:
    return [seconds for each in passes for seconds in each]


# Memory, plan and kernels


def with_peak_memory(call: Call, module: nn.Module, device: torch.device) -> tuple[list[Tensor], int | None]:
    """The results of the call, and the bytes allocated at its peak beyond those allocated before."""
    if device.type != "cuda":
        return results_of(call, module), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = results_of(call, module)
    torch.cuda.synchronize()
    return results, torch.cuda.max_memory_allocated() - before


def plan_text(library: ModuleType, row: GpuRow, method: GpuMethod) -> str:
    """fused_rnn's own description of how it computes the row."""
    shape = row.shape
    try:
        plan = library.plan(
            row.cell, DTYPES[row.dtype], shape.T, shape.B, shape.I, shape.H,
            kind="packed" if row.packed else "sequence", num_layers=shape.L, bidirectional=shape.bidirectional,
            backend=method.backend, requires_grad=row.mode == "training", device=method.device,
        )  # fmt: skip
    except Exception as error:
        return first_line(error)
    return str(plan)


def kernel_names(call: Call, device: torch.device) -> list[dict[str, Any]]:
    """The kernels of one call, longest running first: name, number of launches and total microseconds."""
    activity = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = profiler.key_averages()
    if device.type == "cuda":
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    unit = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(events, key=lambda event: getattr(event, unit), reverse=True)
    return [
        {"name": event.key[:120], "launches": event.count, "us": round(getattr(event, unit), 1)}
        for event in events[:MOST_KERNELS]
    ]


def release_memory(device: torch.device) -> None:
    """Free the memory of finished rows: CUDA graphs hold theirs until they are collected."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def is_alive(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal access, every later call of the process fails."""
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False
