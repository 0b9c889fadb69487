"""The suites of benchmarks/run.py that measure: their arithmetic, their options, and a small run of each.

Arithmetic is compared with numbers worked out by hand. test_examples.py tests the suite that trains the examples.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, count, repeat
from pathlib import Path

import pytest
import torch
from rich.console import Console

import denormals
import run
from gpu import measure
from harness import competitors, picture, report, roofline, speed, timing
from harness.machine import RESULTS, processor_folder
from harness.measurement import FUSED, TORCH, Floor, Measurement, Quartiles, Row, geometric_mean, mean_ratio
from harness.roofline import Ceilings
from harness.shapes import CPU_GROUPS, GROUPS, Shape, cpu_shapes, parse_shape
from harness.suite import Method, one_and_all
from suites import cells, grid, memory

SHAPE = Shape("small", T=3, B=2, I=4, H=5, L=1)
ROW = Row(SHAPE, "module", "gru", "training", 1, "float32")
CEILINGS = Ceilings(flops=1e10, own_caches=2e9, shared_cache=1e9, memory=5e8)
METHOD = Method(quick=True, competitors=(), ceilings={1: CEILINGS})
MACHINE = {
    "device": "a CPU",
    "threads": "1",
    "torch_version": "2",
    "fused_rnn_version": "0",
    "git_commit": "abc",
    "date": "today",
}


def measured(theirs: list[float], ours: list[float], row: Row = ROW, **fields: object) -> Measurement:
    return Measurement(row, "s", {TORCH: theirs, FUSED: ours}, **fields)


# Statistics of samples


def test_quartiles_are_those_of_the_pairs() -> None:
    ratio = measured([2, 6, 12, 20, 30], [2, 3, 4, 5, 6]).ratio(TORCH)
    assert ratio == Quartiles(lower=2, median=3, upper=4)
    assert Quartiles.of([7.0]) == Quartiles(7, 7, 7)


def test_a_ratio_needs_both_sides() -> None:
    measurement = Measurement(ROW, "s", {}, notes={TORCH: "RuntimeError: no"})
    assert measurement.ratio(TORCH) is None
    assert measurement.typical(FUSED) is None
    assert measurement.fraction_of_floor is None
    assert not measurement.behind_torch
    assert mean_ratio([measurement, measured([8], [2])], TORCH) == pytest.approx(4)


def test_geometric_mean() -> None:
    assert geometric_mean([2, 0.5]) == pytest.approx(1)
    assert geometric_mean([1, 2, 4]) == pytest.approx(2)
    assert geometric_mean([]) is None


def test_behind_torch_means_beyond_noise() -> None:
    assert measured([8, 9, 9, 9, 9], [10] * 5).behind_torch
    assert not measured([8, 9, 9, 11, 11], [10] * 5).behind_torch  # median 0.9, upper quartile 1.1
    assert not measured([12] * 5, [10] * 5).behind_torch
    assert not measured([9] * 5, [10] * 5, resolution=2).behind_torch
    barely = measured([9.8] * 5, [10] * 5)
    assert barely.behind_torch and not barely.fails_check
    assert measured([9.6] * 5, [10] * 5).fails_check
    assert measured([7] * 5, [10] * 5, resolution=2).behind_torch


def test_amounts_have_three_digits() -> None:
    shown = [report.amount(value, "s") for value in (1.5, 0.0123, 1.234e-3, 4.56e-4, 2e-9)]
    assert shown == ["1.50 s", "12.3 ms", "1.23 ms", "456 µs", "0.00 µs"]
    assert report.amount(3 * 2**20, "B") == "3.00 MiB"


# Sampling


def test_sides_are_sampled_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []
    monkeypatch.setattr(timing, "LEAST_SAMPLE", 0)
    pace = timing.Pace(budget=0, least_rounds=4)
    seconds = timing.sample_in_turns({side: lambda side=side: turns.append(side) for side in "ABC"}, pace)
    assert "".join(turns).endswith("ABC" * 4)
    assert {side: len(samples) for side, samples in seconds.items()} == {"A": 4, "B": 4, "C": 4}


def test_a_sample_of_short_calls_is_the_mean_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = chain.from_iterable(repeat((0.0, 1e-4)))  # successive readings differ by 0.1 ms
    monkeypatch.setattr(timing, "perf_counter", lambda: next(clock))
    calls = []
    monkeypatch.setattr(timing, "seconds_per_call", lambda call, batch: calls.append(batch) or 1e-4)
    timing.sample_in_turns({"A": int}, timing.Pace(budget=1, least_rounds=3, most_rounds=3))
    assert calls == [1] * timing.WARM_UP_CALLS + [20] * 3  # 2 ms


def test_a_row_whose_results_differ_is_refused() -> None:
    sides = {TORCH: lambda: lambda: torch.zeros(3), FUSED: lambda: lambda: torch.ones(3)}
    with pytest.raises(RuntimeError, match=r"small, gru, training, 1 thread: .* differ by 1"):
        speed.measure_time(ROW, sides, METHOD)


def test_a_competitor_that_fails_leaves_a_note() -> None:
    def zeros() -> torch.Tensor:
        return torch.zeros(3)

    def failing() -> None:
        raise NotImplementedError("not for this dtype\nand more")

    sides = {TORCH: lambda: zeros, FUSED: lambda: zeros, "compile": failing, "onnxruntime": lambda: lambda: zeros() + 1}
    measurement = speed.measure_time(ROW, sides, METHOD)
    assert set(measurement.samples) == {TORCH, FUSED}
    assert measurement.notes == {
        "compile": "NotImplementedError: not for this dtype",
        "onnxruntime": "differs from torch.nn by 1",
    }
    assert speed.measure_time(ROW, {TORCH: failing}, METHOD).samples == {}


# The roofline


def test_work_by_hand() -> None:
    # A GRU of T=3, B=2, I=4, H=5 from zero states: W_ih is 15x4 for 3 steps, W_hh is 15x5 for 2.
    of_x, of_h = 2 * 2 * 15 * 4, 2 * 2 * 15 * 5
    inference = replace(ROW, mode="inference")
    assert roofline.operations(inference) == 3 * of_x + 2 * of_h
    assert roofline.streamed_bytes(inference) == 4 * (60 + 2 * 75)
    # The weights' gradients need the same in backward; x needs no gradient, h needs one for 2 steps.
    assert roofline.operations(ROW) == 2 * 3 * of_x + 3 * 2 * of_h
    assert roofline.streamed_bytes(ROW) == 4 * (60 + 4 * 75)


def test_work_of_two_layers_and_directions() -> None:
    row = replace(ROW, cell="lstm", shape=replace(SHAPE, L=2, bidirectional=True))
    one_row = 2 * 3 * 20 * 4 + 3 * 3 * 20 * 10 + 2 * (3 * 2 * 20 * 5)
    assert roofline.operations(row) == 2 * (2 * 2 * one_row)
    assert roofline.streamed_bytes(row) == 2 * 4 * (20 * 4 + 2 * 20 * 10 + 2 * (4 * 20 * 5))


def test_a_loop_starts_from_a_given_state_and_reads_all_weights_in_every_step() -> None:
    row = replace(ROW, call="cell", mode="inference", dtype="float64")
    assert roofline.operations(row) == 2 * 2 * 3 * (60 + 75)
    assert roofline.streamed_bytes(row) == 8 * 3 * (60 + 75)


def test_the_floor_is_the_larger_of_arithmetic_and_reading() -> None:
    narrow = replace(ROW, shape=replace(SHAPE, B=1), mode="inference")
    assert roofline.floor(narrow, CEILINGS).seconds == pytest.approx(4 * (60 + 150) / 2e9)
    wide = replace(ROW, shape=replace(SHAPE, B=100), mode="inference")
    assert roofline.floor(wide, CEILINGS).seconds == pytest.approx(2 * 100 * 330 / 1e10)
    floor = Floor(operations=1000, streamed=10, flops=1e9, bandwidth=1e9)
    assert measured([8e-6], [4e-6], floor=floor).fraction_of_floor == pytest.approx(0.25)


def test_larger_weights_come_from_outer_caches() -> None:
    rates = [CEILINGS.bandwidth(size * 2**20) for size in (0, 4, 5, 64, 65)]
    assert rates == [2e9, 2e9, 1e9, 1e9, 5e8]


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count(step=0.001)  # every call takes a millisecond
    monkeypatch.setattr(roofline, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(roofline, "MEMORY", 8 * 2**20)
    ceilings = roofline.measure_ceilings(torch.float32, threads=2, seconds=0.02)
    assert ceilings.flops == pytest.approx(2 * 1024**3 / 0.001)
    assert ceilings.memory == pytest.approx(8 * 2**20 / 0.001)
    assert ceilings.shared_cache == pytest.approx(16 * 2**20 / 0.001)
    assert ceilings.own_caches == pytest.approx(ceilings.shared_cache)  # 1 MiB on two cores is slower here
    with monkeypatch.context() as smaller:
        smaller.setattr(roofline, "SHARED", 2**19)
        smaller.setattr(roofline, "MEMORY", 2**18)
        ceilings = roofline.measure_ceilings(torch.float32, 2, 0.02)
    assert ceilings.own_caches == pytest.approx(2 * 2**20 / 0.001)


def test_denormal_numbers_that_cost_too_much(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both libraries are called; the times are fake."""
    times = {"torch.nn x": 9.0, "fused_rnn x": 1.3}

    def sample(sides: dict[str, Callable[[], None]], pace: timing.Pace, shuffled: bool) -> dict[str, list[float]]:
        for call in sides.values():
            call()
        return {side: [times.get(side, 1.0)] * 3 for side in sides}

    monkeypatch.setattr(denormals, "sample_in_turns", sample)
    with pytest.raises(SystemExit, match=r"more than 1\.2 times .*: RNN x, LSTM x, GRU x$"):
        denormals.main([])
    assert capsys.readouterr().out.splitlines()[1].split() == ["RNN", "x", "9.00", "1.30"]
    times["fused_rnn x"] = 1.2
    denormals.main(["--quick"])


# Rows, shapes and options


def test_shapes() -> None:
    assert parse_shape("3,2,4,5,1") == Shape("T3_B2_I4_H5_L1", 3, 2, 4, 5, 1)
    assert parse_shape("3,2,4,5,2,bi") == Shape("T3_B2_I4_H5_L2_bi", 3, 2, 4, 5, 2, bidirectional=True)
    names = [shape.name for group in GROUPS.values() for shape in group]
    assert len(set(names)) == len(names)
    assert len(cpu_shapes()) == sum(len(GROUPS[group]) for group in CPU_GROUPS) == 21


def test_rows_are_all_combinations() -> None:
    rows = grid.SUITE.rows([SHAPE], ["gru", "rnn"], ["training", "inference"], one_and_all(2), "float64")
    assert [(row.threads, row.mode, row.cell) for row in rows][:3] == [
        (1, "inference", "rnn"),
        (1, "inference", "gru"),
        (1, "training", "rnn"),
    ]
    assert len(rows) == 8
    assert one_and_all(1) == [1]
    assert {row.mode for row in memory.SUITE.rows([SHAPE], ["rnn"], ["training", "inference"], [1], "float32")} == {
        "training"
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--cell gru", "--cell does not apply to --suite examples"),
        ("--threads 1 2", "--suite examples takes one number of threads"),
        ("--only no_such", "no example is called no_such; there are hello_cell"),
        ("--suite grid --only no_such", "no row is called no_such; the rows are hello"),
        ("--suite grid --only hello --shape 1,1,1,1,1", "leave it out with --shape"),
        ("--suite grid --shape 1,2,3,4", "expected five positive numbers T,B,I,H,L and perhaps ,bi; got 1,2,3,4"),
        ("--suite grid --shape 1,2,3,0,1", "expected five positive numbers"),
        ("--suite grid --threads 0", "expected a positive number, got 0"),
        (
            "--suite grid --compare tensorflow",
            "expected a list of torch, onnxruntime, onnxruntime_int8, torch_int8, compile",
        ),
        ("--suite cells --compare compile", "--compare does not apply to --suite cells"),
        ("--suite cells --shape 1,2,3,4,2", "a cell has one layer and one direction"),
        ("--suite memory --mode inference", "--mode does not apply to --suite memory"),
    ],
)
def test_options_that_do_not_fit(arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run.main(arguments.split())
    assert exit_.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(competitors, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(SystemExit, match="onnxruntime is not installed: run pip install onnx onnxruntime"):
        competitors.require_packages(["onnxruntime"])
    competitors.require_packages(["compile"])


# Runs


def test_by_default_results_go_where_git_ignores_them() -> None:
    """Not into the committed ones, which a run of a few rows would replace."""
    root = RESULTS.parents[1]
    assert {run.command_line().get_default("output"), measure.OUTPUT.parent} == {root / "build" / "benchmarks"}
    if (root / ".gitignore").exists():
        assert "/build/" in (root / ".gitignore").read_text().splitlines()


def csv_lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_grid_writes_its_table_and_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--suite grid --quick --shape 3,2,4,5,1 --cell gru --threads 1 --output"
    run.main([*arguments.split(), str(tmp_path)])
    inference, training = csv_lines(processor_folder(tmp_path) / "grid.csv")
    assert (inference["mode"], training["mode"]) == ("inference", "training")
    assert inference["row"] == "T3_B2_I4_H5_L1"
    assert (inference["suite"], inference["cell"], inference["threads"]) == ("grid", "gru", "1")
    assert (inference["dtype"], inference["torch_version"]) == ("float32", torch.__version__)
    assert float(training["torch.nn ratio q1"]) <= float(training["torch.nn ratio"])
    assert 0 < float(training["fraction_of_floor"]) < 1
    floor = Floor(*(float(training[name]) for name in ("operations", "streamed", "flops", "bandwidth")))
    assert float(training["floor"]) == pytest.approx(floor.seconds)
    assert int(training["rounds"]) >= 3
    assert (processor_folder(tmp_path) / "grid.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "Geometric means" in output
    assert max(map(len, output.split("Written:")[0].splitlines())) <= 100


def test_streams_are_compared_with_rounded_weights(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="a competitor is ONNX Runtime")
    competitors = "onnxruntime,onnxruntime_int8,torch_int8"
    arguments = (
        f"--suite stream --quick --shape 1,1,4,5,1 --shape 6,2,4,5,2 --cell lstm --threads 1 --compare {competitors}"
    )
    run.main([*arguments.split(), "--output", str(tmp_path)])
    rows = csv_lines(processor_folder(tmp_path) / "stream.csv")
    assert [row["row"].split()[1] for row in rows] == ["float32", "bfloat16", "int8"] * 2
    for row in rows:
        assert all(float(row[f"{name} ratio"]) > 0 for name in ("torch.nn", *competitors.split(",")))
        assert bool(row["step ratio"]) == (row["T"] == "1")
        assert bool(row["floor"]) == ("float32" in row["row"])


def test_check_fails_on_a_row_that_is_behind_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference is behind at first only; the second time has more rounds."""

    def measure(row: Row, method: Method) -> Measurement:
        paces.append(method.pace())
        slow = row.mode == "training" or (options == ["--check"] and not method.patient)
        return measured([1e-3] * 5, [2e-3 if slow else 5e-4] * 5, row)

    paces: list[timing.Pace] = []
    monkeypatch.setitem(run.SUITES, "grid", replace(grid.SUITE, measure=measure))
    monkeypatch.setattr(run, "measure_ceilings", lambda dtype, threads, seconds: CEILINGS)
    arguments = ["--suite", "grid", "--only", "hello", "--cell", "gru", "--threads", "1", "--output", str(tmp_path)]
    options: list[str] = []
    run.main(arguments)
    options = ["--check"]
    with pytest.raises(SystemExit, match=r"behind torch\.nn on\nhello, gru, training, 1 thread$"):
        run.main([*arguments, *options])
    usual, more = timing.NORMAL, timing.Pace(6.0, 20, 404)
    assert paces == [usual, usual, usual, more, usual, more]
    assert [line["behind_torch"] for line in csv_lines(processor_folder(tmp_path) / "grid.csv")] == ["False", "True"]


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("call", cells.SUITE.calls)
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_loops_over_cells_compute_the_same(cell: str, call: str, mode: str) -> None:
    """The measurement itself compares the results and raises if they differ."""
    measurement = cells.measure(Row(SHAPE, call, cell, mode, 1, "float64"), METHOD)
    assert measurement.ratio(TORCH).median > 0


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_onnxruntime_computes_the_same(cell: str, T: int) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    row = Row(replace(SHAPE, T=T, L=2, bidirectional=True), "module", cell, "inference", 1, "float32")
    measurement = grid.measure(row, replace(METHOD, competitors=["onnxruntime"]))
    assert not measurement.notes
    assert measurement.ratio("onnxruntime").median > 0


def test_a_step_takes_at_least_its_output() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peaks are read from Linux's /proc")
    shape = Shape("wide", T=64, B=64, I=16, H=128, L=1)
    output = 4 * shape.T * shape.B * shape.H
    peak = memory.peak_bytes(FUSED, replace(ROW, shape=shape))
    assert output < peak < 20 * output


# The table and the picture with all optional parts


@pytest.fixture
def full() -> list[Measurement]:
    samples = {TORCH: [2e-4, 3e-4], FUSED: [1e-4, 2e-4], "onnxruntime": [1e-4, 1e-4], "compile": [2e-3, 2e-3]}
    names = ("shapes_tour_lstm", "hello")
    shapes = [shape for shape in cpu_shapes() if shape.name in names]
    rows = grid.SUITE.rows(shapes, ["rnn", "lstm", "gru"], ["inference", "training"], [1, 16], "float32")
    return [
        *[Measurement(row, "s", samples, floor=Floor(3000, 4, 1e8, 1e9)) for row in rows[:-1]],
        Measurement(rows[-1], "s", {}, notes={TORCH: "RuntimeError: no", "compile": "TimeoutError: too long"}),
    ]


def test_the_table_fits_100_columns(full: list[Measurement], capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=100, color_system=None)
    report.print_table(full, console)
    report.print_means(full, "time", console)
    output = capsys.readouterr().out
    assert sum("shapes_tour_lstm" in line for line in output.splitlines()) >= 11  # no name is wrapped
    assert "torch.nn left out of 1 row (shapes_tour_lstm, gru, training, 16 threads): RuntimeError: no" in output
    assert "…" not in output


def test_the_picture_has_a_panel_for_every_condition_and_competitor(full: list[Measurement], tmp_path: Path) -> None:
    path = tmp_path / "ratios.png"
    picture.draw(full, "grid", "time", MACHINE, path)
    assert path.read_bytes().startswith(b"\x89PNG")
