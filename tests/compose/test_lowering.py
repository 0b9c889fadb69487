"""Exported programs for consumers without our operators: core ATen, ONNX, processes without fused_rnn.

Expected values are torch.nn's eager ones, and ours for options that torch.nn does not have.
"""

from __future__ import annotations

import io
import subprocess
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from contract import CELL_MODULES, CELLS, MODULES, NAMES, ONE_OF_EACH, SEQUENCE_MODULES, close, gradients, pair, tensors
from processes import python, run, succeeded
from test_compile import HIDDEN, INPUT

pytestmark = [
    pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export"),  # torch.nn's, too
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.onnx"),
]

SIZES = [(6, 7), (9, 4)]  # T, B; exported at the first
BOTH = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}


SLOW = pytest.mark.slow("takes seconds a program; the default set has one of each cell, each option and each format")


def some(cases: Iterable[tuple[Any, ...]], kept: Container[str]) -> list[Any]:
    """These cases, of which all that begin with another word than those kept are slow."""
    return [pytest.param(*case, marks=[] if case[0] in kept else SLOW) for case in cases]


def drawn(module: nn.Module, T: int, B: int) -> Tensor:
    if isinstance(module, nn.RNNCellBase):
        return torch.randn(B, INPUT)
    return torch.randn(*((B, T) if module.batch_first else (T, B)), INPUT)


def exported(module: nn.Module, input: Tensor, dynamic: bool = True, **options: Any) -> ExportedProgram:
    shapes = ({0: Dim.DYNAMIC} if input.dim() == 2 else BOTH,) if dynamic else None
    return torch.export.export(module, (input,), dynamic_shapes=shapes, **options)


def operators(program: ExportedProgram) -> set[str]:
    """All operators of a program, including those in the bodies of its loops."""
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}


def core(names: set[str]) -> bool:
    """Whether all are core ATen operators, arithmetic of sizes, or loops.

    torch.export guards every ``Tensor.to`` of any model with `_assert_tensor_metadata`, which its consumers remove.
    """
    aten = torch.ops.aten
    for name in names - {"aten._assert_tensor_metadata.default"}:
        if name.startswith("aten."):
            _, packet, overload = name.split(".")
            operator = getattr(getattr(aten, packet), overload)
            if torch.Tag.core not in operator.tags:
                return False
        elif name != "scan" and not name.startswith("<built-in function "):
            return False
    return True


def in_onnxruntime(program: Any, *inputs: Tensor) -> list[Tensor]:
    runtime = pytest.importorskip("onnxruntime", reason="the exported model is run in onnxruntime")
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    given = {argument.name: input.numpy() for argument, input in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(result) for result in session.run(None, given)]


def to_onnx(model: Any, *arguments: Any, **options: Any) -> Any:
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs the package onnxscript")
    return torch.onnx.export(model, *arguments, dynamo=True, verbose=False, **options)


def node_types(program: Any) -> list[str]:
    return [node.op_type for node in program.model.graph]


@pytest.mark.parametrize(
    ("key", "dynamic"),
    [
        *some([(key, False) for key in MODULES], ("rnn_deep", "lstm_proj", "gru", "lstm_cell")),
        *some([(key, True) for key in ("rnn_relu", "lstm_proj", "gru_deep", "lstm_cell")], ("gru_deep",)),
    ],
)
def test_core_aten(key: str, dynamic: bool) -> None:
    """For a fixed number of steps unrolled, as torch.nn's own decomposition; for any number of steps a loop."""
    expected, actual = pair(key, sizes=(INPUT, HIDDEN))
    program = exported(actual, drawn(actual, *SIZES[0]), dynamic)
    lowered = program.run_decompositions()
    assert any("fused_rnn" in name for name in operators(program))
    assert core(operators(lowered))
    assert ("scan" in operators(lowered)) == (dynamic and key not in CELL_MODULES)
    for T, B in SIZES if dynamic else SIZES[:1]:
        input = drawn(actual, T, B)
        close(lowered.module()(input), expected(input))


@pytest.mark.parametrize("name", some([(name,) for name in NAMES], ("LSTM", "GRUCell")))
def test_core_aten_like_torchs_own(name: str) -> None:
    """For a fixed number of steps, our program needs at most three operators that torch.nn's does not."""
    lowered = []
    for library in (nn, fused_rnn):
        module = getattr(library, name)(INPUT, HIDDEN).eval()
        lowered.append(operators(exported(module, torch.randn(4, INPUT), False).run_decompositions()))
    assert lowered[1] - lowered[0] <= {"aten.mm.default", "aten.cat.default", "aten.view.default"}


@pytest.mark.parametrize(
    ("key", "dynamic"),
    some(
        [("lstm_proj", False), ("rnn_deep", True), ("lstm", True), ("gru", True), ("gru_cell", True)],
        ("lstm_proj", "lstm", "gru_cell"),
    ),
)
def test_a_lowered_program_has_gradients(key: str, dynamic: bool) -> None:
    expected, actual = pair(key, torch.float64, sizes=(INPUT, HIDDEN))
    input = drawn(actual, *SIZES[0]).double()
    lowered = exported(actual, input, dynamic).run_decompositions().module()
    close(gradients(lowered, input), gradients(expected, input), grad=True)


@pytest.mark.parametrize("key", some([(key,) for key in MODULES], ONE_OF_EACH))
def test_onnx_of_a_program(key: str) -> None:
    expected, actual = pair(key, sizes=(INPUT, HIDDEN))
    program = to_onnx(exported(actual.eval(), drawn(actual, *SIZES[0])))
    nodes = node_types(program)
    if key in SEQUENCE_MODULES and key != "lstm_proj":  # ONNX's operator has no projection
        assert nodes.count(SEQUENCE_MODULES[key][0]) == actual.num_layers
        assert "Scan" not in nodes
    for T, B in SIZES:
        input = drawn(actual, T, B)
        close(in_onnxruntime(program, input), tensors(expected(input)))


@pytest.mark.parametrize("way", ["class", "replace", "patched"])
@pytest.mark.parametrize("key", ["rnn_relu", "lstm_deep", "gru_deep", "lstm_cell"])
def test_onnx_of_a_model(key: str, way: str) -> None:
    """Within `patched` torch.nn's model exports the same ONNX nodes as without."""
    expected, actual = (nn.Sequential(module).eval() for module in pair(key, sizes=(INPUT, HIDDEN)))
    model = actual if way == "class" else nn.Sequential(pair(key, sizes=(INPUT, HIDDEN))[0]).eval()
    if way == "replace":
        assert fused_rnn.replace(model) == ["0"]
    input = drawn(expected[0], *SIZES[0])
    if way == "patched":
        with fused_rnn.patched():
            program = to_onnx(model, (input,))
        assert node_types(program) == node_types(to_onnx(expected, (input,)))
    else:
        program = to_onnx(model, (input,))
        if key in SEQUENCE_MODULES:
            assert SEQUENCE_MODULES[key][0] in node_types(program)
    close(in_onnxruntime(program, input), tensors(expected(input)))


@pytest.mark.parametrize(
    "key", some([(key,) for key in ("rnn_tanh", "lstm_deep", "lstm_proj", "gru_deep")], ("rnn_tanh", "lstm_deep"))
)
def test_onnx_with_initial_states(key: str) -> None:
    expected, actual = pair(key, sizes=(INPUT, HIDDEN))
    rows = actual.num_layers * (2 if actual.bidirectional else 1)

    def states(B: int) -> Any:
        found = tuple(torch.randn(rows, B, size) for size in actual._spec().state_sizes)
        return found if len(found) == 2 else found[0]

    T, B = SIZES[0]
    of_batch: Any = {1: Dim.DYNAMIC}
    shapes = (BOTH, (of_batch, of_batch) if isinstance(states(1), tuple) else of_batch)
    program = to_onnx(torch.export.export(actual, (drawn(actual, T, B), states(B)), dynamic_shapes=shapes))
    for T, B in SIZES:
        input, hx = drawn(actual, T, B), states(B)
        close(in_onnxruntime(program, input, *tensors(hx)), tensors(expected(input, hx)))


class WithOptions(nn.Module):
    """A module that is called with fused_rnn's keywords."""

    def __init__(self, module: nn.Module, *names: str) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, input: Tensor, resets: Tensor, lengths: Tensor, learned: list[Tensor]) -> Any:
        given = {"resets": resets, "lengths": lengths, "reset_state": learned if len(learned) == 2 else learned[0]}
        options = {name: given[name] for name in self.names}
        return self.module(input, **options, return_state_sequence="resets" in self.names)


OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("gru", "lengths", {}),
    ("lstm_deep", "lengths", {}),
    ("rnn_deep", "resets", {}),
    ("lstm", "resets lengths reset_state", {}),
    ("gru_deep", "resets lengths reset_state", {"layer_norm": True}),
    ("lstm", "resets", {"layer_norm": True, "zoneout": 0.2}),
]


@pytest.mark.parametrize(
    ("key", "names", "changes", "consumer"),
    [
        *some([(*row, "onnx") for row in OPTIONS], ("gru", "lstm_deep", "rnn_deep", "lstm")),
        *some([(*row, "loop") for row in OPTIONS[3:]], ("lstm",)),
        (*OPTIONS[4], "unrolled"),
    ],
    ids=lambda value: " ".join(value) or "plain" if isinstance(value, dict) else value,
)
def test_options(key: str, names: str, changes: dict[str, Any], consumer: str) -> None:
    """Resets, lengths, learned states and regularised layers become a loop over time in every format."""
    name, options = MODULES[key]
    torch.manual_seed(0)
    module: Any = getattr(fused_rnn, name)(INPUT, HIDDEN, **options, **changes).eval()
    module.requires_grad_(False)  # else the loop's backward pass is traced, too: test_a_lowered_program_has_gradients
    model = WithOptions(module, *names.split())
    rows = module.num_layers * (2 if module.bidirectional else 1)

    def arguments(T: int, B: int) -> tuple[Any, ...]:
        resets = torch.rand((B, T) if module.batch_first else (T, B)) < 0.3
        learned = tuple(torch.randn(rows, 1, size) for size in module._spec().state_sizes)
        lengths = torch.randint(0, T + 1, (B,))
        lengths[0] = 0
        return drawn(module, T, B), resets, lengths, list(learned)

    given = arguments(*SIZES[0])
    shapes = (BOTH, BOTH, {0: Dim.DYNAMIC}, [None] * len(given[3]))
    program = torch.export.export(model, given, dynamic_shapes=None if consumer == "unrolled" else shapes)
    if consumer == "onnx":
        onnx = to_onnx(program)
        assert ("Scan" in node_types(onnx)) == ("resets" in names)
    else:
        lowered = program.run_decompositions()
        assert core(operators(lowered))
        assert ("scan" in operators(lowered)) == (consumer == "loop")
    for T, B in SIZES[:1] if consumer == "unrolled" else SIZES:
        given = arguments(T, B)
        if consumer == "onnx":
            close(in_onnxruntime(onnx, *tensors(given)), tensors(model(*given)))
        else:
            close(lowered.module()(*given), model(*given))


@pytest.mark.parametrize(("name", "strict"), [(name, False) for name in NAMES] + [("LSTM", True), ("GRUCell", True)])
def test_patched_programs_are_torchs(name: str, strict: bool) -> None:
    """Inside `patched`, torch.nn's classes export torch.nn's operators, so that their programs load anywhere."""
    torch.manual_seed(0)
    module = getattr(nn, name)(INPUT, HIDDEN).eval()
    input = torch.randn((7, INPUT) if name in CELLS else (6, 7, INPUT))
    plain = exported(module, input, dynamic=False, strict=strict)
    with fused_rnn.patched():
        program = exported(module, input, dynamic=False, strict=strict)
    assert operators(program) == operators(plain)
    close(program.module()(input), module(input))


WITHOUT = """
import sys
class Refused:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "fused_rnn":
            raise ModuleNotFoundError("No module named 'fused_rnn'", name="fused_rnn")
sys.meta_path.insert(0, Refused())
import torch
"""


def without_us(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process that cannot import fused_rnn."""
    return python("-c", WITHOUT + code, cwd=folder)


LOAD = """
for name in NAMES:
    torch.save(torch.export.load(f"{name}.pt2").module()(torch.load("input.pt")), f"{name}.pt")
"""


def test_saved_programs_load_without_fused_rnn(tmp_path: Path) -> None:
    """Directly if exported from `patched` or to_torch(); with our classes after run_decompositions().

    Where a program cannot be loaded, torch's error names the missing operator.
    """
    expected, actual = (module.eval() for module in pair("gru", sizes=(INPUT, HIDDEN)))
    input = drawn(actual, *SIZES[0])
    torch.save(input, tmp_path / "input.pt")
    programs = {
        "to_torch": exported(actual.to_torch(), input, dynamic=False),
        "lowered": exported(actual, input, dynamic=False).run_decompositions(),
        "loop": exported(actual, input).run_decompositions(),
    }
    with fused_rnn.patched():
        programs["patched"] = exported(expected, input, dynamic=False)
    for name, program in programs.items():
        torch.export.save(program, tmp_path / f"{name}.pt2")
    torch.export.save(exported(actual, input), tmp_path / "ours.pt2")
    done = without_us(f"NAMES = {[*programs]!r}{LOAD}torch.export.load('ours.pt2')", tmp_path)
    assert done.returncode != 0 and "fused_rnn" in done.stderr
    for name in programs:
        close(torch.load(tmp_path / f"{name}.pt"), expected(input))


@pytest.mark.slow("starts two processes, for what the test above shows of `patched`")
def test_a_program_of_run_loads_without_fused_rnn(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"""
import torch
torch.manual_seed(0)
model = torch.nn.LSTM({INPUT}, {HIDDEN}).eval()
input = torch.randn(6, 7, {INPUT})
torch.save(input, "input.pt")
torch.save(model(input), "expected.pt")
torch.export.save(torch.export.export(model, (input,)), "program.pt2")
""")
    succeeded(run(script, cwd=tmp_path))
    succeeded(without_us('NAMES = ["program"]' + LOAD, tmp_path))
    close(torch.load(tmp_path / "program.pt"), torch.load(tmp_path / "expected.pt"))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fused_rnn.GRU(INPUT, HIDDEN)

    def forward(self, data: Tensor, batch_sizes: Tensor) -> Tensor:
        output: Tensor = self.rnn(PackedSequence(data, batch_sizes))[0].data
        return output


def test_a_packed_sequence_says_what_to_do() -> None:
    model = Packed()
    packed = pack_padded_sequence(torch.randn(6, 4, INPUT), torch.tensor([6, 4, 3, 1]))
    program = torch.export.export(model, packed[:2])
    with pytest.raises(NotImplementedError, match="keyword lengths, or convert the module with to_torch"):
        program.run_decompositions()
    lowered = program.run_decompositions(fused_rnn.operator_decompositions())
    close(lowered.module()(*packed[:2]), model(*packed[:2]))


def test_operator_decompositions() -> None:
    """The other lowering, to the operators that need no Python, leaves torch's default table unchanged."""
    module = fused_rnn.GRU(INPUT, HIDDEN)
    program = exported(module, torch.randn(6, 7, INPUT))
    for table, name in (
        (fused_rnn.operator_decompositions(), "fused_rnn.forward.default"),
        ({}, "fused_rnn.layer.default"),
    ):
        lowered = program.run_decompositions(table)
        assert name in operators(lowered)
        input = torch.randn(9, 4, INPUT)
        close(lowered.module()(input), module(input))
    assert core(operators(program.run_decompositions()))
