"""The picture of a suite of measurements: every ratio as a dot.

One panel for each number of threads and mode, and a line of panels for each competitor, or a column
if there are more competitors than conditions. Dots right of the line at 1 are better with fused_rnn.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from harness.measurement import Measurement, mean_ratio
from harness.report import competitors_of, conditions, thread_count
from harness.workload import CLASSES

COLOURS = dict(zip(CLASSES, ("#d95f02", "#0b4f8a", "#1b9e77"), strict=True))
PARTING_COLOUR = "#f4a582"
BAND_COLOUR = "#f3f3f3"  # behind every other row, to guide the eye
OFFSET = 0.24  # between the dots of the cells on one row
LEAST_SPAN = 1.5  # the axes show ratios from 1 / LEAST_SPAN to LEAST_SPAN at least
PANEL_WIDTH, ROW_HEIGHT = 3.6, 0.3  # inches


def draw(measurements: Sequence[Measurement], suite: str, quantity: str, machine: dict[str, str], path: Path) -> None:
    names = list(dict.fromkeys(each.row.name for each in measurements))
    groups = list(conditions(measurements))
    competitors = competitors_of(measurements)
    upright = len(competitors) > len(groups)
    down, across = (len(groups), len(competitors)) if upright else (len(competitors), len(groups))
    size = (PANEL_WIDTH * max(across, 2) + 1.5, down * (ROW_HEIGHT * len(names) + 1) + 1)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    panels = panels.T if upright else panels
    for competitor, line in zip(competitors, panels, strict=True):
        for (threads, mode, group), axes in zip(groups, line, strict=True):
            mean = mean_ratio(group, competitor)
            if mean is None:
                axes.set_axis_off()
                continue
            draw_ratios(group, competitor, names, axes)
            axes.set_title(f"{mode}, {thread_count(threads)}: mean {mean:.2f}", fontsize=10)
            axes.set_xlabel(f"{quantity} of {competitor} / fused_rnn", fontsize=8)
    lower, upper = panels[0][0].get_xlim()  # the panels share their axes
    panels[0][0].set_xlim(min(lower, 1 / LEAST_SPAN), max(upper, LEAST_SPAN))
    cells = [cell for cell in CLASSES if any(each.row.cell == cell for each in measurements)]
    dots = [panels[0][0].plot([], [], "o", color=COLOURS[cell], label=cell)[0] for cell in cells]
    figure.legend(handles=dots, loc="outside upper right", ncols=len(dots), fontsize=9)
    dtypes = ", ".join(dict.fromkeys(each.row.dtype for each in measurements))
    figure.suptitle(f"{suite}, {dtypes}: right of the line, fused_rnn is better", x=0.01, ha="left", fontsize=11)
    figure.supxlabel(
        "{device}, torch {torch_version}, fused_rnn {fused_rnn_version} {git_commit}, {date}; dots are medians, "
        "lines quartiles, means geometric".format(**machine),
        fontsize=7,
        color="dimgray",
    )
    figure.savefig(path, dpi=120)


def draw_ratios(measurements: Sequence[Measurement], competitor: str, names: Sequence[str], axes: Axes) -> None:
    """Draw a dot for each cell on the line of its row, with a line from quartile to quartile."""
    offsets = dict(zip(CLASSES, (-OFFSET, 0, OFFSET), strict=True))
    axes.axvline(1, color=PARTING_COLOUR, linewidth=2, zorder=0)
    for y in range(0, len(names), 2):
        axes.axhspan(y - 0.5, y + 0.5, color=BAND_COLOUR, zorder=-1)
    for measurement in measurements:
        ratio, row = measurement.ratio(competitor), measurement.row
        if ratio is None:
            continue
        y = names.index(row.name) + offsets[row.cell]
        axes.hlines(y, ratio.lower, ratio.upper, color=COLOURS[row.cell], linewidth=1.5, alpha=0.5)
        axes.plot(ratio.median, y, "o", color=COLOURS[row.cell], markersize=4)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)  # from the top, as in the table
    axes.tick_params(axis="x", labelsize=8, labelbottom=True)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
