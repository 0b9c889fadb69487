"""The suite `programs`: where its package is installed, a program gives torch.nn's results on the fused kernels."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.profiler import profile

import run
from harness.measurement import FUSED, TORCH, Row
from harness.speed import TOLERANCES, relative_difference
from suites import programs
from suites.programs import PROGRAMS, Program

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.shape.name)
def test_a_program_computes_the_same_on_the_fused_kernels(program: Program, mode: str) -> None:
    if find_spec(program.module) is None:
        pytest.skip(f"{program.package} is not installed")
    row = Row(program.shape, "module", program.cell, mode, 1, "float32")
    expected = programs.way(row, TORCH).results()
    with profile() as profiled:
        found = programs.way(row, FUSED).results()
    assert any(event.key.startswith("fused_rnn::") for event in profiled.key_averages())
    assert len(found) > 4 if mode == "training" else len(found) == 1
    for one, other in zip(found, expected, strict=True):
        assert relative_difference(one, other) <= TOLERANCES[torch.float32]


def test_each_program_is_one_row() -> None:
    suite = programs.SUITE
    rows = suite.rows(suite.shapes, suite.cells, ["inference"], [1], "float32")
    assert [(row.name, row.cell) for row in rows] == [(each.shape.name, each.cell) for each in PROGRAMS]


def test_a_program_without_its_package_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    arguments = ["--suite", "programs", "--quick", "--only", "deepar", "--mode", "training", "--threads", "1"]
    with pytest.raises(SystemExit, match="--suite programs: no row could be measured"):
        run.main([*arguments, "--output", str(tmp_path)])
    note = 'pytorch-forecasting is not installed: run pip install ".[programs]"'
    assert f"torch.nn left out of 1 row (deepar, gru, training, 1 thread): {note}" in capsys.readouterr().out
