"""The structure of the source tree: kernels do not depend on torch, imports run one way, every equation occurs once.

The rules are those of CONTRIBUTING.md; the sources are read, and where they name cells, compiled.
"""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest
import torch

import fused_rnn
from fused_rnn import reference
from processes import succeeded
from sources import COMPILER, CSRC, needs_sources, run

PACKAGE = Path(fused_rnn.__file__).parent
# The folders that each folder may use besides itself; all may use csrc/rnn_params.h.
LAYERS = {"cells": [], "cpu": ["cells"], "cuda": ["cells"], "bindings": ["cells", "cpu", "cuda"]}


def code(path: Path) -> str:
    """A C++ file without its comments."""
    return re.sub(r"//.*?$|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def cpp_files(*layers: str) -> list[Path]:
    return [path for layer in layers for path in sorted((CSRC / layer).rglob("*")) if path.is_file()]


def includes(path: Path) -> list[str]:
    """The names in a file's #include lines, with their brackets or quotes."""
    return re.findall(r'^\s*#\s*include\s*(<[^>]+>|"[^"]+")', code(path), flags=re.MULTILINE)


# The Python modules from the bottom up: each imports only from lines above its own.
PYTHON = [
    {"_C", "options", "spec", "tally", "launch"},
    {"reference", "cell_info", "input_gates", "stream"},
    {"constructor", "cuda", "frozen_file"},
    {"self_check", "tuned"},
    {"policy", "operators"},
    {"autocast", "autograd", "fakes", "lowering"},
    {"layers"},
    {"call", "compiled", "patch", "planning"},
    {"steps"},
    {"subclasses"},  # converts to the classes below at run time, and so imports the package itself
    {"survey", "tool_tables"},
    {"convert"},
    {"modules", "cells"},
    {"tuning_report"},
    {"functional", "frozen", "tuning"},
    {"__init__"},
    {"__main__"},
]


def test_python_imports_run_one_way() -> None:
    height = {name: index for index, names in enumerate(PYTHON) for name in names}
    assert set(height) - {"_C"} == {path.stem for path in PACKAGE.glob("*.py")}
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("fused_rnn"):
                continue
            if node.module == "fused_rnn":
                imported = {alias.name for alias in node.names}
            else:
                imported = {str(node.module).split(".")[1]}
            for name in imported & set(height):
                assert height[name] < height[path.stem], f"{path.name} imports {name}"


@needs_sources
def test_the_sources_are_found() -> None:
    for layer in LAYERS:
        assert len(cpp_files(layer)) >= 3, layer
    assert '"../cells/cells.h"' in includes(CSRC / "cpu" / "forward.h")


@needs_sources
def test_kernels_know_nothing_of_torch() -> None:
    """So that they can be built, tested and ported without torch."""
    foreign = re.compile(r"torch|aten|c10|caffe2|pybind|python", re.IGNORECASE)
    for path in [*cpp_files("cells", "cpu", "cuda"), CSRC / "rnn_params.h"]:
        assert not [name for name in includes(path) if foreign.search(name)], path
        assert not re.search(r"\b(torch|at|c10|pybind11|py)::", code(path)), path


@needs_sources
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_uses_only_those_below_it(layer: str) -> None:
    allowed = [CSRC / name for name in (layer, *LAYERS[layer])]
    for path in cpp_files(layer):
        for name in includes(path):
            if name == '"emulator.h"':  # replaces the GPU in tests
                assert path == CSRC / "cuda" / "device.h"
            elif name.startswith('"'):
                target = (path.parent / name.strip('"')).resolve()
                assert target.is_file(), (path, name)
                contracts = (CSRC / "rnn_params.h", CSRC.parent / "fused_rnn" / "stream.h")
                assert target.parent in allowed or target in contracts, (path, name)


@needs_sources
def test_what_is_compiled_per_instruction_set_has_nothing_inline_from_the_library() -> None:
    """The linker would keep one copy for all, perhaps with instructions that the machine does not have."""
    reached, left = set(), [CSRC / "cpu" / "kernels.inc"]
    while left:
        path = left.pop()
        reached.add(path)
        for name in includes(path):
            if name.startswith("<"):
                assert name in ("<cstdint>", "<immintrin.h>", "<type_traits>"), (path, name)
            elif (target := (path.parent / name.strip('"')).resolve()) not in reached:
                left.append(target)
    assert CSRC / "cells" / "math.h" in reached
    sets = list((CSRC / "cpu").glob("isa_*.cpp"))
    assert sets
    for path in sets:
        assert '"kernels.inc"' in includes(path)


@needs_sources
def test_every_cells_equations_occur_once() -> None:
    entries = re.findall(r'X\(\w+, (\w+)(?:<\w+>)?, "(\w+)"\)', (CSRC / "cells" / "cells.h").read_text())
    assert [name for _, name in entries] == list(reference.CELLS)
    sources = {path: code(path) for path in cpp_files(*LAYERS)}
    homes = {}
    for policy in {policy for policy, _ in entries}:
        (homes[policy],) = [path for path, text in sources.items() if re.search(rf"\bstruct {policy}\b", text)]
    for path in homes.values():
        assert path.parent == CSRC / "cells"
        for direction in ("forward", "backward"):
            assert len(re.findall(rf"\bvoid {direction}\(", sources[path])) == 1, path
    assert len(set(homes.values())) == len(homes)


@needs_sources
def test_nothing_else_computes_activations() -> None:
    """Except the function that exports sigmoid and tanh to Python, for the tests of their accuracy."""
    users = []
    for path in cpp_files("cpu", "bindings"):
        users += [path.name] * len(re.findall(r"\bmath::(?:sigmoid|tanh|relu)|\bstd::(?:exp|tanh)", code(path)))
    assert users == ["kernels.inc"] * 2


def test_python_has_the_equations_once() -> None:
    calls = re.compile(r"\b(?:sigmoid|tanh|relu)\(")
    assert [path.name for path in sorted(PACKAGE.glob("*.py")) if calls.search(path.read_text())] == ["reference.py"]


def test_the_specification_stands_alone() -> None:
    """It imports only the names of options from the package, and so agrees with the kernels independently."""
    imported = set()
    for node in ast.walk(ast.parse((PACKAGE / "reference.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("" if node.level else str(node.module))
    roots = {name if name.startswith("fused_rnn") else name.split(".")[0] for name in imported}
    assert roots == {"__future__", "collections", "fused_rnn.options", "torch", "typing", "typing_extensions"}


def test_no_file_for_odds_and_ends() -> None:
    names = [path.stem for folder in (PACKAGE, CSRC) for path in folder.rglob("*")]
    assert "reference" in names
    assert not {"util", "utils", "helper", "helpers", "common", "misc"} & set(names)


def test_the_specification_has_the_constants_of_the_kernels() -> None:
    """The specification defines these constants itself, so they are compared."""
    assert {cell["name"]: cell["gates"] for cell in fused_rnn._C.cells()} == reference.GATES
    assert [cell["name"] for cell in fused_rnn._C.cells()] == list(reference.CELLS)
    assert fused_rnn._C.NORM_EPS == reference.NORM_EPS


@needs_sources
@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"there is no C++ compiler ({COMPILER[0]})")
@pytest.mark.parametrize("source", ["cpu/isa_portable.cpp", "cuda/plan.cpp", "cuda/recurrence.cpp"])
def test_a_cell_that_a_switch_leaves_out_does_not_compile(source: str, tmp_path: Path) -> None:
    """With the build's options, a CellKind that FUSED_RNN_CELLS lacks is an error in every switch over cells."""
    (options,) = re.findall(
        r"^EXHAUSTIVE_SWITCHES = (.*?)  #", (CSRC.parent / "setup_cuda.py").read_text(), re.MULTILINE
    )
    copy = Path(shutil.copytree(CSRC, tmp_path / "csrc"))
    command = [*COMPILER, "-std=c++17", "-fsyntax-only", "-Wno-psabi", *ast.literal_eval(options), copy / source]
    succeeded(run(*command))
    contract = copy / "rnn_params.h"
    contract.write_text(contract.read_text().replace("kLstm, kGru }", "kLstm, kGru, kToy }"))
    done = run(*command)
    assert done.returncode != 0 and "kToy" in done.stderr


@needs_sources
def test_every_switch_over_cells_is_generated() -> None:
    """So no other file than those compiled above has such a switch."""
    users = {path.name for path in cpp_files(*LAYERS) if re.search(r"\bcase CellKind::\w+", code(path))}
    assert users == {"kernels.inc", "cell_info.h", "recurrence.cpp"}
    for path in cpp_files(*LAYERS):
        assert not re.search(r"\bcase CellKind::k[A-Z]", code(path)), path


def test_the_extension_knows_the_cells_of_the_specification() -> None:
    H = 3
    names = []
    for number, cell in enumerate(reference.CELLS):
        rows = reference.GATES[cell] * H
        weights = torch.zeros(rows, 4), torch.zeros(rows, H)
        y, *_ = torch.ops.fused_rnn.forward(torch.zeros(2, 1, 4), None, None, number, False, *weights)
        assert y.shape == (2, 1, H)
        names.append(f"{number} ({cell})")
    with pytest.raises(RuntimeError, match=re.escape(f"unknown cell 4; the cells are: {', '.join(names)}") + "$"):
        torch.ops.fused_rnn.forward(torch.zeros(2, 1, 4), None, None, len(names), False, *weights)
