"""The tables of committed results, compared with means worked out by hand."""

from __future__ import annotations

import csv
from itertools import product
from pathlib import Path

import pytest

import tables
from harness import machine

EXAMPLE = {
    "example": "hello",
    "torch_final_loss": 0.5,
    "fused_final_loss": 0.25,
    "largest_difference": 2e-7,
    "torch_ms_per_step": 3,
    "fused_ms_per_step": 1.5,
    "speed_up": 2,
    "rnn_speed_up": 4,
}


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two rows of each cell on two processors: an RNN's ratios have the mean 2, an LSTM's 1, a GRU's 4."""
    ratios = {"rnn": (1, 4), "lstm": (0.5, 2), "gru": (2, 8)}
    for name, slower in (("one", 0.5), ("two", 0)):
        run = {"device": f"CPU {name}", "torch_version": "2", "git_commit": f"{name}456789abc"}
        grid = [
            {"threads": threads, "mode": mode, "cell": cell, "torch.nn ratio": ratio, "behind_torch": ratio == slower}
            for threads, mode, cell in product((1, 2), ("inference", "training"), ratios)
            for ratio in ratios[cell]
        ]
        write(tmp_path / name / "grid.csv", [row | run for row in grid])
    write(tmp_path / "one" / "examples.csv", [EXAMPLE | run])
    write(
        tmp_path / "one" / "cells.csv",
        [each | {"row": f"b1_h16 {call}"} | run for each in grid for call in ("cell", "step")],
    )
    write(
        tmp_path / "one" / "programs.csv",
        [each | {"row": "prog"} | run for each in grid if each["torch.nn ratio"] == 8],
    )
    rivals = {"torch.nn": 4e-6, "step": 3e-6, "onnxruntime": 2e-6, "onnxruntime_int8": None, "torch_int8": 12.6e-6}
    stream = [
        {"row": f"one_row {weights}", "cell": cell, "T": T, "B": 1, "H": 64, "L": 2, "threads": 1, "mode": "inference"}
        | {"fused_rnn": seconds}
        | {rival: time and time * faster for rival, time in rivals.items()}
        | {f"{rival} ratio": time and time / seconds for rival, time in rivals.items()}
        for T, cell in ((9, "lstm"), (1, "gru"))
        for weights, seconds, faster in (("float32", 2e-6, 1), ("bfloat16", 1e-6, 1), ("int8", T * 1e-6, 10))
    ]
    write(tmp_path / "two" / "stream.csv", [row | run for row in stream])
    return tmp_path


def test_speed_shows_a_line_for_each_processor(results: Path) -> None:
    lines = tables.speed(results).splitlines()
    conditions = "inference, 1 thread | training, 1 thread | inference, 2 threads | training, 2 threads"
    assert lines[0] == f"| RNN / LSTM / GRU | {conditions} | slower |"
    assert lines[2] == f"| CPU one |{4 * ' 2.00 / 1.00 / 4.00 |'} 4 of 24 |"
    assert lines[3] == f"| CPU two |{4 * ' 2.00 / 1.00 / 4.00 |'} 0 of 24 |"
    assert lines[-1] == "(CPU one: torch 2, commit one4567; CPU two: torch 2, commit two4567.)"


def test_grid_shows_them_one_below_the_other(results: Path) -> None:
    lines = tables.grid(results).splitlines()
    assert lines[2] == "| CPU one | inference, 1 thread | 2.00 | 1.00 | 4.00 | 2.00 | 1 of 6 |"
    assert lines[6] == "| CPU two | inference, 1 thread | 2.00 | 1.00 | 4.00 | 2.00 | 0 of 6 |"


def test_tutorials(results: Path) -> None:
    assert "| hello | 0.50000 | 0.25000 | 2e-07 | 3.00 | 1.50 | 2.00 | 4.00 |" in tables.tutorials(results)


def test_steps_show_the_mean_and_the_range(results: Path) -> None:
    lines = tables.steps(results).splitlines()
    means = ("2.00 (0.50 to 8.00)", "2.00 (1.00 to 4.00)")
    assert lines[2] == f"| CPU two | `LSTMCell`, `GRUCell` |{4 * f' {means[0]} |'}"
    assert lines[5] == f"| CPU two | `RNN.step` |{4 * f' {means[1]} |'}"


def test_programs(results: Path) -> None:
    assert tables.programs(results).splitlines()[2] == "| CPU two | prog | 8.00 | 8.00 | 8.00 | 8.00 |"


def test_streams_show_the_mean_and_the_least(results: Path) -> None:
    """int8 takes 9 and 1 us, in the mean 3."""
    lines = tables.streams(results).splitlines()
    assert lines[2] == "| CPU two | 1 | float32 | 2.0 (2.00) | 1.5 (1.50) | 1.0 (1.00) | - | 6.3 (6.30) |"
    assert lines[4] == "| CPU two | 1 | int8 | 1.3 (0.44) | 1.0 (0.33) | 0.7 (0.22) | - | 4.2 (1.40) |"


def test_times_of_streams_are_microseconds_of_the_format_that_the_rival_has(results: Path) -> None:
    lines = tables.stream_times(results).splitlines()
    assert lines[2:4] == [
        "| CPU two | LSTM 64, 2 layers, 9 steps | 4.0 | 3.0 | 2.0 | - | 126 | 2.0 | 1.0 | 9.0 |",
        "| CPU two | GRU 64, 2 layers | 4.0 | 3.0 | 2.0 | - | 126 | 2.0 | 1.0 | 1.0 |",
    ]


def test_only_tables_of_a_page_change(results: Path) -> None:
    page = "Before.\n\n<!-- table tutorials -->\nold\n<!-- end -->\n\nAfter.\n"
    assert tables.updated(page, results) == page.replace("old", f"\n{tables.tutorials(results)}\n")
    assert tables.updated("no table", results) == "no table"


@pytest.mark.parametrize(
    ("cpu_info", "name"),
    [
        (
            "model name\t: Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz\nflags\t: avx2 avx512f",
            "Intel Xeon Platinum 8480+",
        ),
        ("model name\t: Intel(R) Xeon(R) Processor\nflags\t: fpu amx_tile amx_int8\n", "Intel Xeon with AMX"),
        ("model name\t: AMD EPYC 9654 96-Core Processor\nflags\t: avx2 avx512f\n", "AMD EPYC 9654"),
        ("model name\t: AMD EPYC\nflags\t: avx2 avx512f avx_vnni\n", "AMD EPYC Zen 5"),
        ("model name\t: AMD EPYC\nflags\t: avx2 avx512f\n", "AMD EPYC"),
        ("model name\t: AMD EPYC 7B13 64-Core Processor\nflags\t: avx2 fma\n", "AMD EPYC 7B13 with AVX2"),
    ],
)
def test_a_folder_for_each_processor(cpu_info: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(cpu_info)
    assert machine.cpu_name(tmp_path / "cpuinfo") == name
    monkeypatch.setattr(machine, "cpu_name", lambda: name)
    folder = machine.processor_folder(tmp_path / "new")
    assert folder == tmp_path / "new" / name.lower().replace(" ", "-").rstrip("+") and folder.is_dir()
