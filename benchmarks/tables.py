"""Writes the tables of committed results into README.md and the pages of docs.

    python benchmarks/tables.py

Run this after new results, which need `--output benchmarks/results`, and `--threads 1 2` on a machine of more cores.
A test compares the pages with them.
A table stands between the comments `<!-- table NAME -->` and `<!-- end -->`; NAME is one of TABLES.
"""

import csv
import re
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from textwrap import fill

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", DOCS / "performance.md", DOCS / "how-to" / "streaming.md")
CELLS = {"RNN": ["rnn"], "LSTM": ["lstm"], "GRU": ["gru"]}
FORMATS = ("float32", "bfloat16", "int8")  # of frozen weights
RIVALS = {
    "torch.nn": "torch.nn",
    "`step`": "step",
    "ONNX Runtime": "onnxruntime",
    "ONNX Runtime int8": "onnxruntime_int8",
    "torch int8": "torch_int8",
}
WAYS = {  # without the features: a suite, and the name of its competitor
    "`lengths`, against packing and unpacking": ("ragged", "torch.nn"),
    "regularisation, against a loop over time": ("variants", "torch.nn"),
    "`resets`, against a loop over time with masked states": ("rl", "loop"),
    "`resets`, against sequences cut at every reset": ("rl", "cuts"),
    "`resets`, against pieces padded to the longest": ("rl", "pad"),
    "`resets`, against pieces packed": ("rl", "packed"),
    "`resets`, against none": ("rl", "no resets"),
}
CONDITIONS = list(product((1, 2), ("inference", "training")))  # threads and mode

Rows = list[dict[str, str]]


def measured(suite: str, results: Path) -> dict[str, Rows]:
    """The rows of a suite by processor, for the processors on which it was measured."""
    found = {}
    for path in sorted(results.glob(f"*/{suite}.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        found[rows[0]["device"]] = rows
    return found


def speed(results: Path) -> str:
    """README's table: the means by cell, and the number of slower rows, a line for each processor."""
    grids = measured("grid", results)
    lines = []
    for device, rows in grids.items():
        means = [" / ".join(summary(rows, *each)[:3]) for each in CONDITIONS]
        slower = sum(row["behind_torch"] == "True" for row in rows)
        lines.append([device, *means, f"{slower} of {len(rows)}"])
    return table(["RNN / LSTM / GRU", *(condition(*each) for each in CONDITIONS), "slower"], lines) + versions(grids)


def grid(results: Path) -> str:
    """The same means, and those of all rows, one processor below the other."""
    grids = measured("grid", results)
    lines = [
        [device, condition(threads, mode), *summary(rows, threads, mode)]
        for device, rows in grids.items()
        for threads, mode in CONDITIONS
    ]
    return table(["processor", "", *CELLS, "all", "slower"], lines) + versions(grids)


def summary(rows: Rows, threads: int, mode: str) -> list[str]:
    """The geometric means by cell and of all rows, and how many rows are behind torch.nn."""
    rows = under(rows, threads, mode)
    means = [
        geometric_mean(float(row["torch.nn ratio"]) for row in rows if row["cell"] in cells)
        for cells in (*CELLS.values(), ["rnn", "lstm", "gru"])
    ]
    slower = sum(row["behind_torch"] == "True" for row in rows)
    return [*(f"{mean:.2f}" for mean in means), f"{slower} of {len(rows)}"]


def tutorials(results: Path) -> str:
    """A table of the trained examples for each processor."""
    headings = ["example", "loss, torch.nn", "loss, fused_rnn", "largest difference", "ms per step, torch.nn"]
    headings += ["ms per step, fused_rnn", "speed-up", "RNN alone"]
    examples = measured("examples", results).items()
    return "\n\n".join(table(headings, map(tutorial, rows)) + versions({device: rows}) for device, rows in examples)


def tutorial(row: dict[str, str]) -> list[str]:
    losses = [f"{float(row[f'{side}_final_loss']):.5f}" for side in ("torch", "fused")]
    times = [f"{float(row[f'{side}_ms_per_step']):.2f}" for side in ("torch", "fused")]
    ratios = [f"{float(row[name]):.2f}" if row.get(name) else "-" for name in ("speed_up", "rnn_speed_up")]
    return [row["example"], *losses, f"{float(row['largest_difference']):.0e}", *times, *ratios]


def steps(results: Path) -> str:
    """For each kind of loop over single steps the mean of its ratios, with the least and the greatest."""
    loops = measured("cells", results)
    kinds = list(product(("cell", "step"), (["lstm", "gru"], ["rnn"])))
    lines = []
    for device, rows in loops.items():
        for call, cells in kinds:
            name = ", ".join(f"`{c.upper()}{'Cell' if call == 'cell' else '.step'}`" for c in cells)
            chosen = [row for row in rows if row["row"].endswith(call) and row["cell"] in cells]
            lines.append([device, name, *(spread(chosen, *each) for each in CONDITIONS)])
    return table(["processor", "a loop over", *(condition(*each) for each in CONDITIONS)], lines) + versions(loops)


def spread(rows: Rows, threads: int, mode: str) -> str:
    ratios = [float(row["torch.nn ratio"]) for row in under(rows, threads, mode)]
    return f"{geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def programs(results: Path) -> str:
    """A line for each program, with the ratio under each condition."""
    suites = measured("programs", results)
    lines = []
    for device, rows in suites.items():
        for name in dict.fromkeys(row["row"] for row in rows):
            chosen = [row for row in rows if row["row"] == name]
            ratios = [each["torch.nn ratio"] for pair in CONDITIONS for each in under(chosen, *pair)]
            lines.append([device, name, *(f"{float(ratio):.2f}" if ratio else "-" for ratio in ratios)])
    return table(["processor", "program", *(condition(*each) for each in CONDITIONS)], lines) + versions(suites)


def memory(results: Path) -> str:
    """For each cell the mean of torch.nn's peak memory over ours, with the least."""
    peaks = measured("memory", results)
    lines = []
    for device, rows in peaks.items():
        of_cells = [[row for row in rows if row["cell"] in cells] for cells in CELLS.values()]
        lines.append([device, str(len(rows)), *(advantage(chosen, "torch.nn") for chosen in of_cells)])
    return table(["processor", "rows", *CELLS], lines) + versions(peaks)


def features(results: Path) -> str:
    """For each way without a feature the mean of its time over ours on one thread, with the least."""
    lines, runs = [], {}
    for name, (suite, rival) in WAYS.items():
        for device, rows in measured(suite, results).items():
            runs.setdefault(device, []).extend(rows)
            modes = [under(rows, 1, mode) for mode in ("inference", "training")]
            lines.append([device, name, str(max(map(len, modes))), *(advantage(chosen, rival) for chosen in modes)])
    return table(["processor", "feature", "rows", "inference", "training"], lines) + versions(runs)


def stream_times(results: Path) -> str:
    """Microseconds of a call of one row on one thread: of torch.nn and the others, and of each format of weights."""
    streams = measured("stream", results)
    lines = []
    for device, rows in streams.items():
        chosen = [row for row in under(rows, 1, "inference") if row["B"] == "1" and int(row["H"]) >= 64]
        layers: dict[tuple[str, int, int, int], Rows] = {}  # a row for each format, in the order of FORMATS
        for row in chosen:
            layers.setdefault((row["cell"], int(row["T"]), int(row["L"]), int(row["H"])), []).append(row)
        for cell in ("lstm", "gru"):
            for layer in sorted(layer for layer in layers if layer[0] == cell):
                float32, *_, int8 = formats = layers[layer]
                others = [(int8 if rival.endswith("int8") else float32)[rival] for rival in RIVALS.values()]
                times = [*others, *(row["fused_rnn"] for row in formats)]
                lines.append([device, size(*layer), *map(microseconds, times)])
    return table(["processor", "one row", *RIVALS, *FORMATS], lines) + versions(streams)


def size(cell: str, T: int, L: int, H: int) -> str:
    """A layer in words: "GRU 256, 2 layers, 100 steps"."""
    layers = f", {L} layers" if L > 1 else ""
    steps = f", {T} steps" if T > 1 else ""
    return f"{cell.upper()} {H}{layers}{steps}"


def microseconds(seconds: str) -> str:
    """Two digits below ten; "-" if nothing was measured."""
    if not seconds:
        return "-"
    time = float(seconds) * 1e6
    return f"{time:.1f}" if time < 10 else f"{time:.0f}"


def streams(results: Path) -> str:
    """For each format of weights the means of the others' times over its own, with the least."""
    suites = measured("stream", results)
    lines = []
    for device, rows in suites.items():
        for threads, weights in product((1, 2), FORMATS):
            chosen = [row for row in under(rows, threads, "inference") if row["row"].endswith(weights)]
            lines.append([device, str(threads), weights, *(advantage(chosen, rival) for rival in RIVALS.values())])
    return table(["processor", "threads", "weights", *RIVALS], lines) + versions(suites)


def advantage(rows: Rows, rival: str) -> str:
    """The mean of the ratios, and the least; "-" if the rival did not run."""
    ratios = [float(row[f"{rival} ratio"]) for row in rows if row[f"{rival} ratio"]]
    return f"{geometric_mean(ratios):.1f} ({min(ratios):.2f})" if ratios else "-"


def under(rows: Rows, threads: int, mode: str) -> Rows:
    return [row for row in rows if (row["threads"], row["mode"]) == (str(threads), mode)]


def condition(threads: int, mode: str) -> str:
    return f"{mode}, {threads} thread{'s' if threads > 1 else ''}"


def table(headings: Sequence[str], lines: Iterable[list[str]]) -> str:
    first, *others = (f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (headings, *lines))
    return "\n".join([first, "|---" * len(headings) + "|", *others])


def versions(measurements: dict[str, Rows]) -> str:
    """The line below a table: torch's version and the project's commit for each processor."""
    runs = []
    for device, rows in measurements.items():
        dirty = {row["git_commit"]: "-dirty" * row["git_commit"].endswith("-dirty") for row in rows}
        commits = ", ".join(commit[:7] + mark for commit, mark in dirty.items())
        runs.append(f"{device}: torch {rows[0]['torch_version']}, commit {commits}")
    return "\n\n" + fill(f"({'; '.join(runs)}.)", 120, break_on_hyphens=False)


TABLES = {
    "speed": speed,
    "grid": grid,
    "tutorials": tutorials,
    "steps": steps,
    "memory": memory,
    "programs": programs,
    "features": features,
    "streams": streams,
    "stream_times": stream_times,
}


def updated(text: str, results: Path = RESULTS) -> str:
    """A page's text with its tables of the present results."""
    return re.sub(
        r"(?<=<!-- table )(\w+) -->.*?(?=<!-- end -->)",
        lambda found: f"{found[1]} -->\n\n{TABLES[found[1]](results)}\n\n",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text()))
