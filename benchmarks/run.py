"""Compares fused_rnn with torch.nn and, on request, with ONNX Runtime and torch.compile.

    python benchmarks/run.py                          train the tutorials' models on both
    python benchmarks/run.py --suite grid             whole sequences in many shapes
    python benchmarks/run.py --suite grid --shape 35,32,28,256,1 --cell gru --compare torch,onnxruntime

docs/performance.md says what each suite measures. Each prints a table and writes a CSV file and a picture of its name
into a folder for the processor in build/benchmarks; `--output benchmarks/results` replaces the committed results
instead. The examples fail, with an exit status that is not 0, if the two libraries do not learn the same. With --quick,
all suites give a first impression.

With --check, every suite fails if a row is behind torch.nn beyond noise, and names those rows. A row is measured again
with four times the rounds if the upper quartile of its ratios is below 1, and fails if it is again and the median is
below 0.97.

Started like this, Python looks for modules in this folder and not in the project's, so
`import fused_rnn` finds the installed package, which is the one to measure.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

try:
    import torch
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from harness import picture, report
    from harness.competitors import COMPETITORS, require_packages
    from harness.machine import add_output, describe_machine, processor_folder
    from harness.measurement import Measurement, Row
    from harness.roofline import measure_ceilings
    from harness.shapes import named, parse_shape
    from harness.suite import Method, Suite
    from harness.workload import CLASSES, MODES
    from suites import cells, grid, memory, programs, ragged, rl, stream, training_examples, variants
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed: run pip install ".[bench]" in the project folder')

SUITES = {each.SUITE.name: each.SUITE for each in (grid, cells, memory, rl, ragged, variants, stream, programs)}
EXAMPLES = "examples"
EXAMPLES_OPTIONS = frozenset({"threads", "only", "check"})
DTYPES = ("float32", "float64", "bfloat16", "float16")
WIDTH = 100  # columns, where there is no terminal
CEILING_SECONDS, QUICK_CEILING_SECONDS = 0.5, 0.1
BUSY = 0.5  # running processes in the last minute, before this run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(arguments)
    refuse_what_does_not_fit(options, parser)
    options.output = processor_folder(options.output)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if options.suite == EXAMPLES:
        training_examples.run_examples(options, console)
        return
    failing = [str(each.row) for each in run_suite(SUITES[options.suite], options, console) if each.fails_check]
    if options.check and failing:
        sys.exit("\n".join(["fused_rnn is behind torch.nn on", *failing]))


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=[EXAMPLES, *SUITES], default=EXAMPLES)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only the rows (or examples) with these names")
    parser.add_argument(
        "--shape",
        type=parse_shape,
        action="append",
        metavar="T,B,I,H,L[,bi]",
        help="time steps, batch, input size, hidden size, layers, and bi for two directions: measure this instead of "
        "the suite's own shapes; may be repeated",
    )
    parser.add_argument("--cell", nargs="+", choices=CLASSES, help="default: all three (rl: lstm and gru)")
    parser.add_argument("--mode", nargs="+", choices=MODES, help="default: both")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32")
    parser.add_argument(
        "--threads",
        type=positive,
        nargs="+",
        metavar="N",
        help="numbers of CPU threads (default: 1 and PyTorch's choice; the examples and memory: PyTorch's choice)",
    )
    parser.add_argument(
        "--compare",
        type=competitor_names,
        metavar="NAMES",
        help=f"comma-separated: torch, which is always there, {', '.join(COMPETITORS)}",
    )
    parser.add_argument("--check", action="store_true", help="fail if a row is behind torch.nn beyond noise")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, or steps of training")
    add_output(parser)
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return int(text)


def competitor_names(text: str) -> list[str]:
    """The requested competitors without torch."""
    names = text.split(",")
    for name in names:
        if name != "torch" and name not in COMPETITORS:
            raise argparse.ArgumentTypeError(f"expected a list of torch, {', '.join(COMPETITORS)}; got {name}")
    return [name for name in COMPETITORS if name in names]


def refuse_what_does_not_fit(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exit with a usage error if an option does not apply to the suite, or conflicts with another one."""
    known = EXAMPLES_OPTIONS if options.suite == EXAMPLES else SUITES[options.suite].options
    for name in ("threads", "only", "shape", "cell", "mode", "dtype", "compare", "check"):
        if getattr(options, name) not in (None, False) and name not in known:
            parser.error(f"--{name} does not apply to --suite {options.suite}")
    if options.suite == EXAMPLES:
        if options.threads and len(options.threads) > 1:
            parser.error("--suite examples takes one number of threads")
        for name in options.only or ():
            if name not in training_examples.NAMES:
                parser.error(f"no example is called {name}; there are {', '.join(training_examples.NAMES)}")
        return
    suite = SUITES[options.suite]
    if options.only and options.shape:
        parser.error("--only chooses among the suite's own shapes: leave it out with --shape")
    for shape in options.shape or ():
        if reason := suite.refusal(shape):
            parser.error(f"--shape {shape.name} does not fit --suite {suite.name}: {reason}")
    try:
        named(suite.shapes, options.only or ())
    except ValueError as error:
        parser.error(str(error))


def run_suite(suite: Suite, options: argparse.Namespace, console: Console) -> list[Measurement]:
    """Measure, print the table and the means, write the CSV file and the picture."""
    competitors = options.compare or []
    require_packages(competitors)
    machine = describe_machine()
    threads = list(dict.fromkeys(options.threads or suite.threads(torch.get_num_threads())))
    dtype = options.dtype or "float32"
    console.print("{device}, torch {torch_version}, fused_rnn {fused_rnn_version} {git_commit}".format(**machine))
    if (load := os.getloadavg()[0]) > BUSY:
        console.print(
            f"This machine is busy (load {load:.1f}): with several threads, times will mislead", style="yellow"
        )

    ceilings = {}
    if suite.unit == "s":
        for count in threads:
            seconds = QUICK_CEILING_SECONDS if options.quick else CEILING_SECONDS
            ceilings[count] = measure_ceilings(getattr(torch, dtype), count, seconds)
            console.print(f"{report.thread_count(count)}: {ceilings[count]}")
    shapes = options.shape or (named(suite.shapes, options.only) if options.only else suite.shapes)
    rows = suite.rows(shapes, options.cell or suite.cells, options.mode or MODES, threads, dtype)
    measurements = measure_rows(suite, rows, Method(options.quick, competitors, ceilings), options.check, console)

    report.print_table(measurements, console)
    if not any(each.samples for each in measurements):
        sys.exit(f"--suite {suite.name}: no row could be measured")
    report.print_means(measurements, suite.quantity, console)
    csv_path, png_path = (options.output / f"{suite.name}.{ending}" for ending in ("csv", "png"))
    report.write_csv(measurements, suite.name, machine, csv_path)
    picture.draw(measurements, suite.name, suite.quantity, machine, png_path)
    console.print(f"Written: {csv_path} and {png_path}", soft_wrap=True)
    return measurements


def measure_rows(suite: Suite, rows: Sequence[Row], method: Method, check: bool, console: Console) -> list[Measurement]:
    """Measure all rows; for a check, those that seem behind once more with more rounds."""
    columns = (
        TextColumn("{task.description:<48}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    measurements = []
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        bar = progress.add_task("", total=len(rows))
        for row in rows:
            progress.update(bar, description=str(row))
            if torch.get_num_threads() != row.threads:
                torch.set_num_threads(row.threads)
            measurement = suite.measure(row, method)
            if check and measurement.behind_torch:
                measurement = suite.measure(row, replace(method, patient=True))
            measurements.append(measurement)
            progress.advance(bar)
    return measurements


if __name__ == "__main__":
    main()
