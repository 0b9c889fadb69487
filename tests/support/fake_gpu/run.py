"""Runs a Python program on a machine without a GPU as if there were one: `python run.py script.py arguments`.

Takes -c, -m and - as Python does. torch.cuda answers for a made-up H200. Tensors "on the GPU" are the CPU's, so that
programs compute right numbers; streams, events and graphs do nothing but take time. It serves the test of
benchmarks/gpu_run.sh: time runs 40 times as fast, and the benchmarks' shapes are small.
"""

from __future__ import annotations

import runpy
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SPEED = 40


class Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def synchronize(self) -> None:
        pass


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.timed, self.at = enable_timing, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        assert self.timed and end.timed and 0 < self.at <= end.at
        return (end.at - self.at) * 1e3


class Graph:
    captured = False

    def replay(self) -> None:
        assert self.captured
        time.sleep(1e-5)


class Profiler:
    """Finds one kernel in every call."""

    def __init__(self, activities: Any) -> None:
        pass

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def key_averages(self) -> list[Any]:
        import torch

        kernel = dict(key="a_kernel", count=2, device_type=torch.autograd.DeviceType.CUDA, self_device_time_total=3.0)
        return [SimpleNamespace(**kernel)]


@contextmanager
def graph(graph: Graph, **_: Any) -> Any:
    yield
    graph.captured = True


def install_cuda() -> type:
    """Replace torch.cuda, and move to the CPU what is asked for on a CUDA device; returns the mode that does that."""
    import torch
    from torch.utils._device import DeviceContext

    properties = SimpleNamespace(
        name="NVIDIA H200 (not really)", major=9, minor=0, total_memory=2**37, multi_processor_count=132,
        L2_cache_size=2**26, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
        regs_per_multiprocessor=65536,
    )  # fmt: skip
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_name": lambda *_: properties.name,
        "get_device_capability": lambda *_: (properties.major, properties.minor),
        "get_device_properties": lambda *_: properties,
        "is_current_stream_capturing": lambda: False,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
        "device": lambda device: nullcontext(),
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *_: None,
        "memory_allocated": lambda *_: 1000,
        "max_memory_allocated": lambda *_: 3000,
        "current_stream": lambda *_: Stream(),
        "stream": lambda stream: nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "_sleep": lambda cycles: None,
    }.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, value)

    def on_cpu(device: Any) -> Any:
        is_device = isinstance(device, (str, torch.device))
        return "cpu" if is_device and str(device).startswith("cuda") else device

    # A DeviceContext by type: policy.watched takes no notice of those.
    class OnCpu(DeviceContext):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.device:
                return func(*args, **(kwargs or {}))
            kwargs = {name: on_cpu(value) if name == "device" else value for name, value in (kwargs or {}).items()}
            return func(*(on_cpu(value) for value in args), **kwargs)

    torch.profiler.profile = Profiler

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Generator:
            return super().__new__(cls, device=on_cpu(device))

    torch.Generator = Generator
    torch.utils._device.DeviceContext = OnCpu
    OnCpu("cpu").__enter__()
    return OnCpu


def install_library(mode: type) -> None:
    """Make fused_rnn take the CPU's operators, which have the same schemas, for the GPU's."""
    import torch

    from fused_rnn import cuda, self_check

    def of_any_kernel(operator: Any) -> Any:
        """The operator without the number of a GPU's kernel, which names an instruction set on a CPU."""

        def run(*arguments: Any, instance: int = 0, **named: Any) -> Any:
            return operator(*arguments, **named)

        run.default = operator.default
        return run

    operators = torch.ops.fused_rnn
    operators.forward, operators.backward = of_any_kernel(operators.forward), of_any_kernel(operators.backward)
    cuda.available = lambda: True
    check = self_check.find_fault

    def find_fault(*arguments: Any) -> str | None:
        with mode("cpu"):  # modes belong to a thread, and the check has one of its own
            return check(*arguments, forward=operators.forward, backward=operators.backward)

    self_check.find_fault = find_fault


def install_clock() -> None:
    real = time.perf_counter
    time.perf_counter = lambda: SPEED * real()


def shrink_shapes(benchmarks: Path) -> None:
    sys.path.insert(0, str(benchmarks))
    from dataclasses import replace

    from harness import shapes

    full = shapes.Shape.__init__

    def small(self: Any, *arguments: Any, **named: Any) -> None:
        full(self, *arguments, **named)
        for letter, most in dict(T=4, B=3, I=8, H=24).items():
            object.__setattr__(self, letter, min(getattr(self, letter), most))  # the dataclass is frozen

    shapes.Shape.__init__ = small
    # Three, and one of two directions first: on a busy machine the time ends after the first rows.
    few = sorted(shapes.GROUPS["gpu"], key=lambda shape: not shape.bidirectional)[:3]
    shapes.GROUPS["gpu"] = tuple(map(replace, few))


def main() -> None:
    sys.argv = sys.argv[1:]
    what = sys.argv[0]
    mode = install_cuda()
    if what == "-c":
        exec(compile(sys.argv[1], "<string>", "exec"), {"__name__": "__main__"})
    elif what == "-":
        exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
    elif what == "-m":
        sys.argv = sys.argv[1:]
        install_library(mode)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        install_clock()
        shrink_shapes(Path(what).resolve().parents[1])
        if not {"--baselines", "--facts"} & set(sys.argv):  # these run before anything is built
            install_library(mode)
        sys.path.insert(0, str(Path(what).resolve().parent))
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    main()
