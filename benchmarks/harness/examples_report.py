"""The results of a run of the examples: a table, a CSV file and a picture.

The table and the picture are for reading, the CSV is for comparing runs: each of its lines carries
the machine and the versions it was measured with, so lines of several runs can be put together.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table

from examples import Agreement
from harness.timing import InterleavedTiming

TORCH_COLOUR = "#f4a582"
FUSED_COLOUR = "#0b4f8a"
RECURRENT_COLOUR = "#7fb3d9"
CURVES_PER_ROW = 5


@dataclass(frozen=True)
class ExampleResult:
    """An example trained on both libraries; the first side of the timings is torch.nn, the second fused_rnn."""

    name: str
    timing: InterleavedTiming  # of whole training steps
    recurrent: InterleavedTiming  # of the recurrent layers' forward and backward in a step
    agreement: Agreement
    torch_summary: str
    fused_summary: str

    @property
    def torch_losses(self) -> list[float]:
        return self.timing.first.results

    @property
    def fused_losses(self) -> list[float]:
        return self.timing.second.results


def print_table(results: Sequence[ExampleResult], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fits a terminal of 80 columns
    table.add_column("\nexample", no_wrap=True)
    for heading in (
        "torch\nloss",
        "largest\ndiff.",
        "step:\ntorch",
        "ms\nfused",
        "speed\n-up",
        "RNN:\ntorch",
        "ms\nfused",
        "speed\n-up",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.name,
            f"{result.torch_losses[-1]:.5f}",
            f"{'[green]' if result.agreement.holds else '[bold red]'}{result.agreement.largest_difference:.0e}",
            *(
                cell
                for timing in (result.timing, result.recurrent)
                for cell in (
                    f"{1000 * timing.first_median:.2f}",
                    f"{1000 * timing.second_median:.2f}",
                    f"{timing.speed_up:.2f}",
                )
            ),
        )
    console.print(table)
    console.print(
        "Largest difference: of the losses of torch.nn and fused_rnn, relative, at any step.\n"
        "Step: a whole training step. RNN: forward and backward of its recurrent layers;\n"
        "the rest is other layers, loss, optimiser and Python, the same for both.\n"
        "Speed-up: median over turns of (time of torch.nn / time of fused_rnn).",
        style="dim",
    )


def write_csv(results: Sequence[ExampleResult], machine: dict[str, str], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = None
        for result in results:
            timing, recurrent, agreement = result.timing, result.recurrent, result.agreement
            line = {
                "example": result.name,
                "steps": len(result.torch_losses),
                "torch_final_loss": result.torch_losses[-1],
                "fused_final_loss": result.fused_losses[-1],
                "start_difference": agreement.start_difference,
                "final_difference": agreement.final_difference,
                "largest_difference": agreement.largest_difference,
                "same_predictions": agreement.same_predictions,
                "agree": agreement.holds,
                "torch_seconds": sum(timing.first.seconds),
                "fused_seconds": sum(timing.second.seconds),
                "torch_ms_per_step": 1000 * timing.first_median,
                "fused_ms_per_step": 1000 * timing.second_median,
                "speed_up": timing.speed_up,
                "torch_rnn_ms_per_step": 1000 * recurrent.first_median,
                "fused_rnn_ms_per_step": 1000 * recurrent.second_median,
                "rnn_speed_up": recurrent.speed_up,
                "torch_summary": result.torch_summary,
                "fused_summary": result.fused_summary,
                **machine,
            }
            if writer is None:
                writer = csv.DictWriter(file, fieldnames=line)
                writer.writeheader()
            writer.writerow(line)


def draw(results: Sequence[ExampleResult], machine: dict[str, str], path: Path) -> None:
    """A small loss curve per example on the left, bars of the speed-ups on the right."""
    columns = min(CURVES_PER_ROW, len(results))
    rows = -(-len(results) // columns)
    widths = (2.4 * columns, 5)  # inches
    figure = Figure(figsize=(sum(widths), 2.2 * max(rows, 2) + 1), layout="constrained")
    curves, bars = figure.subfigures(1, 2, width_ratios=widths, wspace=0.04)

    cells = list(curves.subplots(rows, columns, squeeze=False).flat)
    for result, axes in zip(results, cells, strict=False):
        draw_losses(result, axes)
    for axes in cells[len(results) :]:
        axes.remove()
    curves.suptitle("Loss at each step")
    curves.legend(cells[0].get_lines(), ["torch.nn", "fused_rnn"], loc="outside lower center", ncols=2)

    draw_speed_ups(results, bars.subplots())
    bars.suptitle("Speed-up of fused_rnn")
    figure.supxlabel(
        "{device}, threads: {threads}, torch {torch_version}, fused_rnn {fused_rnn_version} "
        "{git_commit}, {date}".format(**machine),
        fontsize=7,
        color="dimgray",
    )
    figure.savefig(path, dpi=120)


def draw_losses(result: ExampleResult, axes: Axes) -> None:
    """Draw torch.nn as a broad light line and fused_rnn as a thin dark one on top: both stay visible."""
    steps = range(1, len(result.torch_losses) + 1)
    axes.plot(steps, result.torch_losses, color=TORCH_COLOUR, linewidth=4)
    axes.plot(steps, result.fused_losses, color=FUSED_COLOUR, linewidth=1)
    axes.set_title(result.name, fontsize=9)
    axes.set_ylim(0, 1.08 * max(result.torch_losses + result.fused_losses))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def draw_speed_ups(results: Sequence[ExampleResult], axes: Axes) -> None:
    """Draw two bars per example, one below the other: the whole step, and the recurrent layers' part of it."""
    sides = (
        ("training step", FUSED_COLOUR, [result.timing.speed_up for result in results]),
        ("its RNN alone, forward and backward", RECURRENT_COLOUR, [result.recurrent.speed_up for result in results]),
    )
    for offset, (label, colour, speed_ups) in zip((-0.2, 0.2), sides, strict=True):
        positions = [index + offset for index in range(len(results))]
        bars = axes.barh(positions, speed_ups, color=colour, height=0.38, label=label)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(1, color=TORCH_COLOUR, linewidth=2)
    axes.set_xlim(0, 1.15 * max(1, *(ratio for *_, speed_ups in sides for ratio in speed_ups)))
    axes.set_xlabel("torch.nn = 1; longer is faster", fontsize=9)
    axes.set_yticks(range(len(results)), [result.name for result in results])
    axes.set_ylim(max(len(results), 5) - 0.4, -0.6)  # from the top, as in the table
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, fontsize=8, frameon=False)
