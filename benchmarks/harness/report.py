"""The report of a suite of measurements: a table, and a CSV file for comparing runs.

Each line of the CSV carries the machine and the versions it was measured with, so lines of several runs
can be put together. The picture is in picture.py.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain, groupby
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from harness.measurement import FUSED, TORCH, Measurement, mean_ratio
from harness.workload import CLASSES

SCALES = {
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "B": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")),
}

HEADINGS = {  # short, to keep the columns narrow
    TORCH: "torch\n.nn",
    FUSED: "fused\n_rnn",
    "onnxruntime": "onnx\nruntime",
    "no resets": "no\nresets",
    "no lengths": "no\nlengths",
}


def amount(value: float | None, unit: str) -> str:
    """About three digits, in a unit that suits the size: `1.23 ms`."""
    if value is None:
        return "-"
    scale, name = next((each for each in SCALES[unit] if value >= each[0]), SCALES[unit][-1])
    scaled = value / scale
    return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {name}"


def thread_count(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def competitors_of(measurements: Sequence[Measurement]) -> list[str]:
    """The sides with samples or a note, without fused_rnn and with torch.nn's (the first) first."""
    sides = dict.fromkeys(measurement.of_torch[0] for measurement in measurements)
    for measurement in measurements:
        sides.update(dict.fromkeys([*measurement.samples, *measurement.notes]))
    return [side for side in sides if side != FUSED]


def conditions(measurements: Sequence[Measurement]) -> Iterator[tuple[int, str, list[Measurement]]]:
    """The pairs of threads and mode, each with its measurements."""
    for (threads, mode), group in groupby(measurements, key=lambda each: (each.row.threads, each.row.mode)):
        yield threads, mode, list(group)


def print_table(measurements: Sequence[Measurement], console: Console) -> None:
    """Print one line per row; fits 100 columns, also with every competitor."""
    main, *others = competitors_of(measurements)
    has_floor = any(each.floor is not None for each in measurements)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("\nrow", max_width=18, overflow="fold")
    table.add_column("\ncell", no_wrap=True)
    table.add_column("\nmode", no_wrap=True)
    headings = ["thr-\neads", HEADINGS.get(main, f"\n{main}"), HEADINGS[FUSED], "\nratio", "\nquartiles"]
    headings += ["% of\nfloor"] if has_floor else []
    headings += [HEADINGS.get(name, f"\n{name}") for name in others]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for _, _, group in conditions(measurements):
        for each in group:
            row, ratio = each.row, each.ratio(main)
            cells = [row.name, row.cell, row.mode, str(row.threads)]
            cells += [amount(each.typical(side), each.unit) for side in (main, FUSED)]
            cells += [coloured_ratio(each, main), f"{ratio.lower:.2f}-{ratio.upper:.2f}" if ratio else "-"]
            if has_floor:
                fraction = each.fraction_of_floor
                cells.append("-" if fraction is None else f"{100 * fraction:.0f}")
            cells += [ratio_of_other(each, name) for name in others]
            table.add_row(*cells)
        table.add_section()
    console.print(table)
    for side, note, names in notes(measurements):
        rows = f"1 row ({names[0]})" if len(names) == 1 else f"{len(names)} rows ({names[0]} and others)"
        console.print(f"{side} left out of {rows}: {note}", style="yellow", markup=False, soft_wrap=True)


def coloured_ratio(measurement: Measurement, competitor: str) -> str:
    """The ratio in red where fused_rnn is behind torch.nn beyond noise, in yellow within noise."""
    ratio = measurement.ratio(competitor)
    if ratio is None:
        return "-"
    colour = "bold red" if measurement.behind_torch else "yellow" if ratio.median < 1 else "green"
    return f"[{colour}]{ratio.median:.2f}"


def ratio_of_other(measurement: Measurement, competitor: str) -> str:
    if competitor in measurement.notes:
        return "failed"
    ratio = measurement.ratio(competitor)
    return "-" if ratio is None else f"{ratio.median:.2f}"


def notes(measurements: Sequence[Measurement]) -> list[tuple[str, str, list[str]]]:
    """The notes: side, reason, and the names of the rows it was left out of."""
    rows: dict[tuple[str, str], list[str]] = {}
    for measurement in measurements:
        for key in measurement.notes.items():
            rows.setdefault(key, []).append(str(measurement.row))
    return [(side, note, names) for (side, note), names in rows.items()]


def print_means(measurements: Sequence[Measurement], quantity: str, console: Console) -> None:
    """Print geometric means of the ratios under every condition: by cell, of all rows, and for each competitor."""
    cells = [cell for cell in CLASSES if any(each.row.cell == cell for each in measurements)]
    main, *others = competitors_of(measurements)
    table = Table(title="Geometric means of the ratios", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for heading in [*cells, "all", "rows", "behind", *others]:
        table.add_column(heading, justify="right")
    for threads, mode, group in conditions(measurements):
        values = [mean_ratio([each for each in group if each.row.cell == cell], main) for cell in cells]
        values.append(mean_ratio(group, main))
        behind = sum(each.behind_torch for each in group)
        counts = [str(len(group)), f"[bold red]{behind}" if behind else "0"]
        shown = [two_digits(value) for value in values] + counts
        shown += [two_digits(mean_ratio(group, name)) for name in others]
        table.add_row(f"{mode}, {thread_count(threads)}", *shown)
    console.print(table)
    console.print(
        f"Ratio: {quantity} of {main} (or of the competitor named) over that of fused_rnn, median and quartiles of "
        "the pairs; above 1, fused_rnn is better. Behind: rows whose upper quartile against torch.nn is below 1.",
        style="dim",
    )
    if any(each.floor is not None for each in measurements):
        console.print("% of floor: the least time at this machine's rates (see roofline.py) over ours.", style="dim")


def two_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write_csv(measurements: Sequence[Measurement], suite: str, machine: dict[str, str], path: Path) -> None:
    """Write one line per row; times in seconds, memory in bytes."""
    competitors = competitors_of(measurements)
    lines = [csv_line(each, suite, competitors) | machine | {"threads": each.row.threads} for each in measurements]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=dict.fromkeys(chain.from_iterable(lines)))
        writer.writeheader()
        writer.writerows(lines)


def csv_line(measurement: Measurement, suite: str, competitors: Sequence[str]) -> dict[str, object]:
    row, shape = measurement.row, measurement.row.shape
    line: dict[str, object] = {
        "suite": suite,
        "row": row.name,
        "cell": row.cell,
        "mode": row.mode,
        "T": shape.T,
        "B": shape.B,
        "I": shape.I,
        "H": shape.H,
        "L": shape.L,
        "bidirectional": shape.bidirectional,
        "dtype": row.dtype,
        "rounds": len(measurement.samples.get(FUSED, [])),
        "unit": measurement.unit,
        FUSED: measurement.typical(FUSED),
    }
    for name in competitors:
        ratio = measurement.ratio(name)
        line[name] = measurement.typical(name)
        line[f"{name} ratio"] = ratio and ratio.median
        line[f"{name} ratio q1"] = ratio and ratio.lower
        line[f"{name} ratio q3"] = ratio and ratio.upper
    if measurement.floor:
        line |= asdict(measurement.floor) | {"floor": measurement.floor.seconds}
    return line | {
        "behind_torch": measurement.behind_torch,
        "fraction_of_floor": measurement.fraction_of_floor,
        "notes": "; ".join(f"{side}: {note}" for side, note in measurement.notes.items()),
    }
