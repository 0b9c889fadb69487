"""The suite `stream`: the next steps of a stream, as audio, control loops and on-line forecasts need them.

fused_rnn is a frozen module's stream, with weights in the format that the row names; it writes into a given tensor. The
state of a stream goes on from call to call, that of the others is given. A row of one step is a step, others a chunk.
Besides torch.nn's module, `step` of fused_rnn's is measured, and with --compare ONNX Runtime and the quantised modules
of both. Shapes: those of the grid with up to five rows, and more sizes of a single step.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import fused_rnn
from harness.competitors import COMPETITORS, ROUNDED
from harness.measurement import FUSED, TORCH, Measurement, Row
from harness.shapes import Shape, cpu_shapes
from harness.speed import measure_time
from harness.suite import OPTIONS, Method, Suite
from harness.workload import build_module, module_arguments, module_call, output_sizes

STEP = "step"
SHAPES = [shape for shape in cpu_shapes() if shape.B <= 5 and not shape.bidirectional]
SHAPES += [Shape(f"one_h{H}", T=1, B=1, I=H, H=H, L=1) for H in (128, 256, 512)]


def stream_call(row: Row) -> Callable[[], Tensor]:
    """The stream's next steps."""
    x, *state = module_arguments(row)
    stream = fused_rnn.freeze(build_module(FUSED, row), row.call).stream(row.shape.B, row.threads)
    stream.state = state[0] if state else None
    out = torch.empty(output_sizes(row.shape))
    if row.shape.T > 1:
        return lambda: stream.chunk(x, out=out)
    x_t, out_t = x[0], out[0]

    def step() -> Tensor:
        stream(x_t, out=out_t)
        return out

    return step


def step_call(row: Row) -> Callable[[], Tensor]:
    """`step` of a module that is not frozen."""
    module = build_module(FUSED, row)
    x, hx = module_arguments(row)

    def step() -> Tensor:
        with torch.inference_mode():
            return module.step(x[0], hx)[0].unsqueeze(0)

    return step


def measure(row: Row, method: Method) -> Measurement:
    torch_module = build_module(TORCH, row)
    prepare = {TORCH: partial(module_call, row, torch_module), FUSED: partial(stream_call, row)}
    if row.shape.T == 1:
        prepare[STEP] = partial(step_call, row)
    for name in method.competitors:
        prepare[name] = partial(COMPETITORS[name].prepare, row, torch_module)
    if row.call == "float32":
        return measure_time(row, prepare, method, rounded=ROUNDED)
    return replace(measure_time(row, prepare, method, rounded={FUSED, *ROUNDED}), floor=None)  # which is float32's


def refusal(shape: Shape) -> str | None:
    """Why a shape of the user's cannot be measured; None if it can."""
    return "a stream has one direction" if shape.bidirectional else None


SUITE = Suite(
    name="stream",
    quantity="time",
    unit="s",
    shapes=SHAPES,
    measure=measure,
    options=(OPTIONS | {"compare"}) - {"mode", "dtype"},
    threads=lambda default: [1, 2] if default > 1 else [1],
    calls=("float32", "bfloat16", "int8"),
    modes=("inference",),
    refusal=refusal,
)
