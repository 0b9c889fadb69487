"""The suites `rl`, `ragged` and `variants` of benchmarks/run.py: their ways agree, and a small run of each succeeds."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import run
from harness import report, speed, timing
from harness.machine import processor_folder
from harness.measurement import FUSED, TORCH, Measurement, Row
from harness.shapes import Shape
from harness.suite import Method
from harness.workload import build_module, random_input, random_state, state_sizes
from suites import ragged, rl, variants

SHAPE = Shape("small", T=7, B=3, I=4, H=5, L=1)
ROW = Row(SHAPE, "10%", "lstm", "training", 1, "float64")
METHOD = Method(quick=True, competitors=(), ceilings={})


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_ways_to_reset_agree(cell: str, layers: int, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement itself compares outputs and gradients and raises if they differ."""
    monkeypatch.setitem(rl.RATES, "10%", rate)
    measurement = rl.measure(replace(ROW, cell=cell, shape=replace(SHAPE, L=layers)), METHOD)
    assert list(measurement.samples) == ["loop", "cuts", "pad", "packed", FUSED, rl.WITHOUT]
    assert measurement.of_torch == ["loop", "cuts", "pad", "packed"]
    assert measurement.ratio("packed").median > 0


def test_the_loop_resets_before_the_step() -> None:
    module, x, hx = build_module(TORCH, ROW), random_input(ROW), random_state(ROW, state_sizes(SHAPE))
    resets = torch.zeros(7, 3, dtype=torch.bool)
    resets[4, 1] = True
    y = rl.loop(module, x, hx, resets)
    torch.testing.assert_close(y[4:, 1:2], module(x[4:, 1:2])[0])
    torch.testing.assert_close(y[:, ::2], module(x, hx)[0][:, ::2])


def test_pieces_by_hand() -> None:
    resets = torch.tensor([[False, True], [False, False], [True, False]])
    pieces = rl.Pieces(resets)
    assert pieces.starts.tolist() == [0, 2, 3]
    assert pieces.lengths.tolist() == [2, 1, 3]
    assert pieces.piece.tolist() == [0, 2, 0, 2, 1, 2]  # [T, B]
    assert pieces.position.tolist() == [0, 0, 1, 1, 0, 2]
    assert pieces.states(torch.ones(1, 2, 1)).flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_ways_of_lengths_agree(cell: str, mode: str) -> None:
    measurement = ragged.measure(replace(ROW, call="module", cell=cell, mode=mode), METHOD)
    assert list(measurement.samples) == [TORCH, FUSED, ragged.PACKED, ragged.WITHOUT]
    assert measurement.of_torch == [TORCH]


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("option", variants.OPTIONS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_ways_of_variants_agree(cell: str, option: str, mode: str) -> None:
    measurement = variants.measure(replace(ROW, call=option, cell=cell, mode=mode), METHOD)
    assert list(measurement.samples) == [TORCH, FUSED, variants.PLAIN]


def test_lengths_differ() -> None:
    lengths = ragged.random_lengths(replace(ROW, shape=replace(SHAPE, T=64, B=100)))
    assert 8 <= lengths.min() < 16 and 56 < lengths.max() <= 64
    assert ragged.random_lengths(ROW).min() >= 1


def test_every_round_may_have_its_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    monkeypatch.setattr(timing, "LEAST_SAMPLE", 0)
    sides = {side: lambda side=side: turns.append(side) for side in "ABC"}
    seconds = timing.sample_in_turns(sides, timing.Pace(budget=0, least_rounds=20), shuffled=True)
    rounds = ["".join(turns[start : start + 3]) for start in range(len(turns) - 60, len(turns), 3)]
    assert {"".join(sorted(order)) for order in rounds} == {"ABC"} and len(set(rounds)) > 3
    assert list(seconds) == list("ABC")


@pytest.mark.parametrize("wrong", ["y", "gradient"])
def test_a_way_that_differs_is_refused(wrong: str) -> None:
    def a_way(factor: float, gradient: float) -> speed.Way:
        leaf = torch.ones(2, requires_grad=True)
        leaf.grad = torch.full((2,), gradient)
        return speed.Way(lambda: torch.full((3,), factor), [leaf], of_torch=True)

    ways = {TORCH: a_way(1.0, 1.0), FUSED: a_way(2.0, 1.0) if wrong == "y" else a_way(1.0, 2.0)}
    with pytest.raises(RuntimeError, match=f"{FUSED} differs by 1"):
        speed.measure_ways(ROW, ways, METHOD)
    assert speed.measure_ways(ROW, {**ways, FUSED: replace(ways[FUSED], same=False)}, METHOD).ratio(TORCH)


def test_behind_torch_is_behind_any_way_of_torch() -> None:
    samples = {"loop": [9.0] * 5, "pad": [1.0] * 5, FUSED: [2.0] * 5}
    assert Measurement(ROW, "s", samples, of_torch=["loop", "pad"]).behind_torch
    assert not Measurement(ROW, "s", samples, of_torch=["loop"]).behind_torch
    assert report.competitors_of([Measurement(ROW, "s", samples, of_torch=["pad", "loop"])]) == ["pad", "loop"]


@pytest.mark.parametrize(
    ("suite", "columns", "calls"),
    [
        ("rl", ["loop", "no resets"], [f" {rate}" for rate in rl.RATES]),
        ("ragged", [TORCH, "packed"], ["", ""]),
        ("variants", [TORCH, "plain"], [f" {option}" for option in variants.OPTIONS] * 2),
    ],
)
def test_a_run_writes_its_table_and_its_picture(
    suite: str, columns: list[str], calls: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"--suite {suite} --quick --shape 5,3,4,6,1 --cell gru --threads 1 --output"
    run.main([*arguments.split(), str(tmp_path)])
    with (processor_folder(tmp_path) / f"{suite}.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == [f"T5_B3_I4_H6_L1{call}" for call in calls]
    assert all(float(line[f"{column} ratio"]) > 0 for line in lines for column in columns)
    assert (processor_folder(tmp_path) / f"{suite}.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, capsys.readouterr().out.split("Written:")[0].splitlines())) <= 100


def test_rl_has_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert {row.cell for row in rl.SUITE.rows(rl.SHAPES, rl.SUITE.cells, ["training"], [1], "float32")} == {
        "lstm",
        "gru",
    }
    with pytest.raises(SystemExit):
        run.main(["--suite", "rl", "--shape", "3,2,4,5,1,bi"])
    assert "one direction" in capsys.readouterr().err
