"""Competitors of fused_rnn besides torch.nn: ONNX Runtime, torch.compile on torch.nn, and 8-bit weights in both.

All start from the torch.nn module of the row. One-time work (export, compilation) happens here,
before anything is timed.
"""

import io
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import torch
from torch import Tensor, nn

from harness.measurement import Row
from harness.workload import module_arguments, module_call

ONNX_PACKAGES = ("onnx", "onnxruntime")
COMPILE_LIMIT = 60  # seconds; steps are unrolled, and compiling a hundred of them takes many minutes


def onnxruntime_call(row: Row, module: nn.Module, rounded: bool = False) -> Callable[[], Tensor]:
    """The exported module in ONNX Runtime, with as many threads as torch has; `rounded`: its weights to 8 bits."""
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
    model = rounded_model(exported.getvalue()) if rounded else exported.getvalue()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x, *states = arguments
    tensors = [x, *(states[0] if row.cell == "lstm" and states else states)]
    feed = {input.name: tensor.numpy() for input, tensor in zip(session.get_inputs(), tensors, strict=True)}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def rounded_model(model: bytes) -> bytes:
    """The model after ONNX Runtime's own dynamic quantisation, which knows the LSTM only.

    Raises:
        ValueError: it left the model as it was.
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    with TemporaryDirectory() as folder, redirect_stdout(None):
        given, made = Path(folder) / "given.onnx", Path(folder) / "made.onnx"
        given.write_bytes(model)
        logging.disable(logging.WARNING)  # it recommends a preparation that changes nothing here
        try:
            quantize_dynamic(given, made)
        finally:
            logging.disable(logging.NOTSET)
        if not any(node.op_type.startswith("DynamicQuantize") for node in onnx.load(made).graph.node):
            raise ValueError("not quantised by ONNX Runtime")
        return made.read_bytes()


def quantized_call(row: Row, module: nn.Module) -> Callable[[], Tensor]:
    """torch's own dynamic quantisation, which knows the LSTM and the GRU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated in favour of another package
        model = nn.ModuleList([module])  # of which it replaces the parts
        (rounded,) = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.GRU}, dtype=torch.qint8)
    if isinstance(rounded, nn.RNNBase):
        raise ValueError("not quantised by torch")
    return module_call(row, rounded)


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
    "onnxruntime_int8": Competitor(partial(onnxruntime_call, rounded=True), modes=("inference",)),
    "torch_int8": Competitor(quantized_call, modes=("inference",)),
    "compile": Competitor(compiled_call, modes=("inference", "training")),
}


ROUNDED = frozenset({"onnxruntime_int8", "torch_int8"})
"""The competitors whose weights are rounded."""


def require_packages(competitors: Sequence[str]) -> None:
    """Exit with a message if a competitor's package is missing, before anything is measured."""
    if any(name.startswith("onnxruntime") for name in competitors):
        missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
        if missing:
            verb = "are" if len(missing) > 1 else "is"
            sys.exit(f"{' and '.join(missing)} {verb} not installed: run pip install {' '.join(ONNX_PACKAGES)}")
