"""torch.export, AOTInductor and ONNX: programs with the fused operators, run at other sizes and in other processes.

Their results are compared with the eager model's.
"""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.cpp_extension import include_paths, library_paths

import fused_rnn
from contract import MODULES, NAMES, close, gradients, tensors
from fused_rnn import functional
from processes import python, succeeded, this_path
from sources import run
from test_compile import HIDDEN, INPUT, built, fused

pytestmark = [
    pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export"),  # torch.nn's, too
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def exported(model: nn.Module, input: Tensor, strict: bool = False) -> torch.export.ExportedProgram:
    """The program for any length and batch."""
    shapes = {"input": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    return torch.export.export(model, (input,), dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("key", ["rnn_deep", "lstm_proj", "gru_deep"])
def test_any_length_and_batch(key: str, strict: bool) -> None:
    model = built(key).eval()
    program = exported(model, torch.randn(6, 7, INPUT), strict=strict)
    lowered = program.run_decompositions(fused_rnn.operator_decompositions())
    assert fused(program.graph_module) == ["layer.default"] * 2
    assert fused(lowered.graph_module) == ["forward.default"] * 2
    for T, B in [(6, 7), (9, 8), (2, 3)]:
        input = torch.randn(T, B, INPUT)
        for runs in (program.module(), lowered.module()):
            close(runs(input), model(input))


@pytest.mark.parametrize("strict", [False, True])
def test_keywords(strict: bool) -> None:
    module = fused_rnn.LSTM(INPUT, HIDDEN).eval()

    def options(T: int, B: int) -> dict[str, Any]:
        return dict(
            input=torch.randn(T, B, INPUT),
            hx=(torch.randn(1, B, HIDDEN), torch.randn(1, B, HIDDEN)),
            resets=torch.rand(T, B) < 0.3,
            lengths=torch.randint(0, T + 1, (B,)),
            return_state_sequence=True,
        )

    both, second = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {1: Dim.DYNAMIC}
    shapes = dict(input=both, hx=(second, second), resets=both, lengths={0: Dim.DYNAMIC}, return_state_sequence=None)
    program = torch.export.export(module, (), options(6, 7), dynamic_shapes=shapes, strict=strict)
    assert fused(program.graph_module) == ["layer.default"]
    for T, B in [(9, 8), (2, 3)]:
        given = options(T, B)
        close(program.module()(**given), module(**given))


class Tied(nn.Module):
    """Functional calls: two layers share their weights, and half of the recurrent ones are dropped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList([torch.randn(4 * HIDDEN, HIDDEN) * 0.3 for _ in range(2)])
        self.register_buffer("mask", (torch.rand(4 * HIDDEN, HIDDEN) < 0.5).float() * 2)

    def forward(self, input: Tensor) -> Any:
        w_ih, w_hh = self.weights
        return functional.lstm(input, [w_ih, w_hh * self.mask] * 2)


@pytest.mark.parametrize("strict", [False, True])
def test_functions(strict: bool) -> None:
    model = Tied()
    program = exported(model, torch.randn(6, 7, HIDDEN), strict=strict)
    assert fused(program.graph_module) == ["layer.default"] * 2
    for T, B in [(9, 8), (2, 3)]:
        input = torch.randn(T, B, HIDDEN)
        close(program.module()(input), model(input))
    close(gradients(program.module(), input), gradients(model, input), grad=True)


@pytest.mark.parametrize("name", NAMES)
def test_each_class(name: str) -> None:
    """Also within `patched`, where only torch.nn's own classes export torch.nn's operators (test_lowering.py)."""
    cell = name.endswith("Cell")
    torch.manual_seed(0)
    module = getattr(fused_rnn, name)(INPUT, HIDDEN).eval()
    input = torch.randn((7, INPUT) if cell else (6, 7, INPUT))
    dims = {0: Dim.DYNAMIC} if cell else {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    plain = contextlib.nullcontext()
    for context, strict in ((plain, False), (fused_rnn.patched(), False), (plain, True)):
        with context:
            program = torch.export.export(module, (input,), dynamic_shapes=(dims,), strict=strict)
        assert fused(program.graph_module) == ["layer.default"]
        other = torch.randn((8, INPUT) if cell else (9, 8, INPUT))
        close(program.module()(other), module(other))


@pytest.mark.parametrize("key", ["rnn_deep", "lstm_proj", "gru"])
def test_a_program_can_be_trained(key: str) -> None:
    model = built(key)
    program = exported(model, torch.randn(6, 7, INPUT)).module()
    input = torch.randn(9, 8, INPUT)
    close(gradients(program, input), gradients(model, input), grad=True)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in program.named_parameters()] == names


def test_the_model_is_left_as_it_was() -> None:
    model = built("lstm")
    before = copy.deepcopy(model)
    exported(model, torch.randn(6, 7, INPUT))
    input = torch.randn(9, 8, INPUT)
    close(gradients(model, input), gradients(before, input), grad=True)


def elsewhere(code: str, folder: Path, *, path: bool = True) -> None:
    """Run code in another process, in folder; without `path` it can import only installed packages."""
    succeeded(python("-c", code, cwd=folder, PYTHONPATH=this_path() if path else ""))


def test_a_saved_program_runs_elsewhere(tmp_path: Path) -> None:
    model = built("gru_deep").eval()
    program = exported(model, torch.randn(6, 7, INPUT))
    torch.export.save(program, tmp_path / "program.pt2")
    torch.export.save(program.run_decompositions(fused_rnn.operator_decompositions()), tmp_path / "lowered.pt2")
    input = torch.randn(9, 8, INPUT)
    torch.save(input, tmp_path / "input.pt")
    library = fused_rnn.OPERATORS_LIBRARY
    run = "torch.save(torch.export.load(f'{name}.pt2').module()(torch.load('input.pt')), f'{name}.pt')"
    elsewhere(f"import torch, fused_rnn; name = 'program'; {run}", tmp_path)
    # The lowered program needs only the operators.
    elsewhere(f"import torch; torch.ops.load_library({library!r}); name = 'lowered'; {run}", tmp_path, path=False)
    for name in ("program", "lowered"):
        close(torch.load(tmp_path / f"{name}.pt"), model(input))


SIZES = [(9, 8), (2, 3)]


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, str]:
    """A model, and its package of machine code by AOTInductor."""
    model = built("lstm_deep").eval()
    program = exported(model, torch.randn(6, 7, INPUT))
    file = tmp_path_factory.mktemp("package") / "model.pt2"
    return model, torch._inductor.aoti_compile_and_package(program, package_path=str(file))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_frozen(weights: str, strict: bool) -> None:
    """One operator, whose model is a constant of the program; also after `run_decompositions`."""
    model = fused_rnn.freeze(built("lstm_deep"), weights)
    program = exported(model, torch.randn(6, 7, INPUT), strict=strict)
    assert fused(program.graph_module) == ["frozen.default"]
    file = io.BytesIO()
    torch.export.save(program, file)
    loaded = torch.export.load(io.BytesIO(file.getvalue()))
    for T, B in SIZES:
        input = torch.randn(T, B, INPUT)
        for runs in (program.module(), program.run_decompositions().module(), loaded.module()):
            close(runs(input), model(input))


@pytest.mark.slow("compiles C++")
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_frozen_package_runs_without_python(weights: str, tmp_path: Path) -> None:
    model = fused_rnn.freeze(built("lstm_deep"), weights)
    program = exported(model, torch.randn(6, 7, INPUT))
    file = tmp_path / "model.pt2"
    package_runs_without_python(
        model, torch._inductor.aoti_compile_and_package(program, package_path=str(file)), tmp_path
    )


@pytest.mark.slow("compiles C++")
def test_a_package_runs_with_the_operators_alone(packaged: tuple[nn.Module, str], tmp_path: Path) -> None:
    model, package = packaged
    inputs = [torch.randn(T, B, INPUT) for T, B in SIZES]
    torch.save(inputs, tmp_path / "inputs.pt")
    code = f"""
import sys, torch
torch.ops.load_library({fused_rnn.OPERATORS_LIBRARY!r})
model = torch._inductor.aoti_load_package({package!r})
torch.save([model(x) for x in torch.load("inputs.pt")], "results.pt")
assert not any(name.startswith("fused_rnn") for name in sys.modules)
"""
    elsewhere(code, tmp_path, path=False)
    for found, input in zip(torch.load(tmp_path / "results.pt"), inputs, strict=True):
        close(found, model(input))


@pytest.mark.slow("compiles C++")
def test_a_package_runs_without_python(packaged: tuple[nn.Module, str], tmp_path: Path) -> None:
    package_runs_without_python(*packaged, tmp_path)


def package_runs_without_python(model: nn.Module, package: str, tmp_path: Path) -> None:
    """A C++ program loads and runs it, with the model's results."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler (g++)")
    program = tmp_path / "run_package"
    headers = [f"-I{path}" for path in include_paths()]
    libraries = [option for path in library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    source = Path(__file__).with_name("run_package.cpp")
    command = ["g++", "-std=c++20", "-w", *headers, source, "-o", program, *libraries]
    succeeded(run(*command, "-ltorch_cpu", "-lc10", "-ldl"))
    inputs = [torch.randn(T, B, INPUT) for T, B in SIZES]
    files = [tmp_path / f"{T}x{B}" for T, B in SIZES]
    arguments: list[Any] = []
    for file, input in zip(files, inputs, strict=True):
        input.numpy().tofile(file)
        arguments += [file, *input.shape]
    printed = succeeded(run(program, fused_rnn.OPERATORS_LIBRARY, package, *arguments))
    loaded = {Path(line.split()[-1]).name for line in printed.splitlines()}
    assert Path(fused_rnn.OPERATORS_LIBRARY).name in loaded
    assert not [name for name in loaded if name.startswith("libpython")]
    for file, input in zip(files, inputs, strict=True):
        expected = model(input)[0]
        found = torch.from_file(f"{file}.out", size=expected.numel())
        close(found.view_as(expected), expected)


@pytest.mark.parametrize("key", ["rnn_deep", "lstm_deep", "gru_deep"])
def test_onnx(key: str) -> None:
    """By the exporter that traces: each layer is a node of ONNX's own."""
    onnx = pytest.importorskip("onnx", reason="torch.onnx.export needs the package onnx")
    runtime = pytest.importorskip("onnxruntime", reason="the exported model is run in onnxruntime")
    model = built(key).eval()
    file = io.BytesIO()
    input = torch.randn(6, 7, INPUT)
    axes = {"input": {0: "a", 1: "b"}}
    torch.onnx.export(model, (input,), file, dynamo=False, input_names=["input"], dynamic_axes=axes)
    nodes = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]
    assert nodes.count(MODULES[key][0]) == model.rnn.num_layers
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for shape in [(6, 7, INPUT), (8, 9, INPUT)] if not model.rnn.batch_first else [(6, 7, INPUT)]:
        input = torch.randn(shape)
        found = session.run(None, {"input": input.numpy()})
        close([torch.from_numpy(f) for f in found], tensors(model(input)))
