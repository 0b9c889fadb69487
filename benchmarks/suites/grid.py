"""The suite `grid`: RNN, LSTM and GRU on whole sequences, in the shapes of shapes.py."""

from functools import partial

from harness.competitors import COMPETITORS
from harness.measurement import FUSED, TORCH, Measurement, Row
from harness.shapes import cpu_shapes
from harness.speed import measure_time
from harness.suite import OPTIONS, Method, Suite
from harness.workload import build_module, module_call


def measure(row: Row, method: Method) -> Measurement:
    torch_module, fused_module = (build_module(side, row) for side in (TORCH, FUSED))
    prepare = {
        TORCH: partial(module_call, row, torch_module),
        FUSED: partial(module_call, row, fused_module),
    }
    for name in method.competitors:
        if row.mode in COMPETITORS[name].modes:
            prepare[name] = partial(COMPETITORS[name].prepare, row, torch_module)
    return measure_time(row, prepare, method)


SUITE = Suite(
    name="grid",
    quantity="time",
    unit="s",
    shapes=cpu_shapes(),
    measure=measure,
    options=OPTIONS | {"compare"},
)
