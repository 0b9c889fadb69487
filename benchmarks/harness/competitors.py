"""Competitors of fused_rnn besides torch.nn: ONNX Runtime, and torch.compile on torch.nn.

Both start from the torch.nn module of the row. One-time work (export, compilation) happens here,
before anything is timed.
"""

import io
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from types import FrameType

import torch
from torch import Tensor, nn

from harness.measurement import Row
from harness.workload import module_arguments, module_call

ONNX_PACKAGES = ("onnx", "onnxruntime")
COMPILE_LIMIT = 60  # seconds; steps are unrolled, and compiling a hundred of them takes many minutes


def onnxruntime_call(row: Row, module: nn.Module) -> Callable[[], Tensor]:
    """The exported module in ONNX Runtime, with as many threads as torch has."""
    import onnxruntime

    arguments = module_arguments(row)
    exported = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter is deprecated and the batch size is fixed, both on purpose
        torch.onnx.export(module, arguments, exported, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = row.threads
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # no log: errors become notes in the table
    # Otherwise its idle threads spin into the next side's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(exported.getvalue(), options, providers=["CPUExecutionProvider"])
    x, *states = arguments
    tensors = [x, *(states[0] if row.cell == "lstm" and states else states)]
    feed = {input.name: tensor.numpy() for input, tensor in zip(session.get_inputs(), tensors, strict=True)}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def compiled_call(row: Row, module: nn.Module) -> Callable[[], Tensor]:
    """The module compiled by torch.compile, steps unrolled, as far as TorchDynamo can follow it.

    Raises:
        TimeoutError: compilation took longer than COMPILE_LIMIT.
    """
    import torch._inductor.config

    torch._dynamo.reset()  # rows share torch.nn's code, of which only a few versions are compiled
    torch._inductor.config.compile_threads = 1  # worker processes would run on after a time-out, during the timing
    with torch._dynamo.config.patch(allow_rnn=True), time_limit(COMPILE_LIMIT, "compilation"):
        call = module_call(row, torch.compile(module))
        call()
    return call


@contextmanager
def time_limit(seconds: int, what: str) -> Iterator[None]:
    """Interrupt Python code that takes longer, by a signal; only in the main thread."""

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{what} took longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@dataclass(frozen=True)
class Competitor:
    """`prepare` returns the call to time; `modes` lists the modes it supports."""

    prepare: Callable[[Row, nn.Module], Callable[[], Tensor]]
    modes: Sequence[str]


COMPETITORS = {
    "onnxruntime": Competitor(onnxruntime_call, modes=("inference",)),
    "compile": Competitor(compiled_call, modes=("inference", "training")),
}


def require_packages(competitors: Sequence[str]) -> None:
    """Exit with a message if a competitor's package is missing, before anything is measured."""
    if "onnxruntime" in competitors:
        missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
        if missing:
            verb = "are" if len(missing) > 1 else "is"
            sys.exit(f"{' and '.join(missing)} {verb} not installed: run pip install {' '.join(ONNX_PACKAGES)}")
