"""The suite `examples`: train every example on torch.nn and on fused_rnn, and compare losses and times.

The other suites time one call; this one times whole training steps, optimiser included, and separately the recurrent
layers' part of a step. It checks that both libraries learn the same, by the rule in examples/agreement.py.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

import sklearn  # noqa: F401 - if missing, fail now and not in image_rows after minutes
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fused_rnn
from examples import (
    EXAMPLES,
    SEED,
    TOUR_TOLERANCE,
    TOURS,
    Example,
    Tour,
    compare,
    compare_tours,
    seeded_model,
    tour_results,
)
from harness.examples_report import ExampleResult, draw, print_table, write_csv
from harness.machine import describe_machine
from harness.measurement import MARGIN, Quartiles
from harness.recurrent_part import recorded_calls, time_recurrent_part
from harness.suite import PATIENCE
from harness.timing import InterleavedTiming, Pace, time_interleaved

NAMES = [example.name for example in EXAMPLES]
QUICK_STEPS = 20
WARM_UP = 3
RECURRENT_PACE = Pace(budget=0.5, least_rounds=5)


def run_examples(options: Namespace, console: Console) -> None:
    """Train, print the table, write examples.csv and examples.png; exit if an example disagrees, or a check fails."""
    if options.threads:
        torch.set_num_threads(*options.threads)
    machine = describe_machine()
    console.print("{device}, threads: {threads}, torch {torch_version}".format(**machine))

    failures = [] if options.only else check_tours(TOURS, console)
    examples = [example for example in EXAMPLES if example.name in (options.only or NAMES)]
    results = train_examples(examples, options.quick, console)
    failures += [f"{result.name}: {result.agreement}" for result in results if not result.agreement.holds]
    slow = [row for each in zip(examples, results, strict=True) for row in slow_rows(*each)] if options.check else []

    print_table(results, console)
    csv_path, png_path = options.output / "examples.csv", options.output / "examples.png"
    write_csv(results, machine, csv_path)
    draw(results, machine, png_path)
    console.print(f"Written: {csv_path} and {png_path}", soft_wrap=True)

    reports = (("torch.nn and fused_rnn do not agree on", failures), ("fused_rnn is behind torch.nn on", slow))
    if lines := [line for heading, rows in reports if rows for line in (heading, *rows)]:
        sys.exit("\n".join(lines))


def check_tours(tours: Sequence[Tour], console: Console) -> list[str]:
    """Compare the results of the tours, which train nothing; print which differ."""
    failures = []
    for tour in tours:
        expected, found = (tour_results(tour, library, SEED) for library in (torch.nn, fused_rnn))
        difference = compare_tours(expected, found)
        report = f"{tour.name}: {len(expected)} results, largest difference {difference:.1e}"
        console.print(report)
        if difference > TOUR_TOLERANCE:
            failures.append(f"{report} (allowed {TOUR_TOLERANCE:.0e})")
    return failures


def train_examples(examples: Sequence[Example], quick: bool, console: Console) -> list[ExampleResult]:
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    results = []
    with Progress(*columns, console=console) as progress:
        for example in examples:
            steps = min(QUICK_STEPS, example.steps) if quick else example.steps
            bar = progress.add_task(example.name, total=steps)
            results.append(train_on_both(example, steps, partial(progress.advance, bar)))
    return results


def slow_rows(example: Example, result: ExampleResult) -> list[str]:
    """The timings of an example in which fused_rnn is behind torch.nn also when it is trained some more times."""
    suspects = [name for name, timing in timings(result).items() if Quartiles.of(timing.ratios).below_one()]
    if not suspects:
        return []
    steps = len(result.torch_losses)
    again = [timings(train_on_both(example, steps, lambda: None)) for _ in range(PATIENCE)]
    ratios = {name: Quartiles.of([ratio for each in again for ratio in each[name].ratios]) for name in suspects}
    return [f"{example.name}, {name}" for name in suspects if ratios[name].below_one(MARGIN)]


def timings(result: ExampleResult) -> dict[str, InterleavedTiming]:
    return {"training step": result.timing, "its RNN alone": result.recurrent}


def train_on_both(example: Example, steps: int, after_step: Callable[[], None]) -> ExampleResult:
    """Train the example on both libraries, step by step in turns."""
    torch_model = seeded_model(example, torch.nn, SEED)
    fused_model = seeded_model(example, fused_rnn, SEED)
    timing = time_interleaved(
        partial(next, example.train(torch_model)),
        partial(next, example.train(fused_model)),
        rounds=steps,
        warm_up=WARM_UP,
        after_round=after_step,
    )
    agreement = compare(
        timing.first.results,
        timing.second.results,
        example.predict(torch_model),
        example.predict(fused_model),
    )
    calls = []
    for library in (torch.nn, fused_rnn):
        model = seeded_model(example, library, SEED)
        calls.append(recorded_calls(model, partial(next, example.train(model))))
    return ExampleResult(
        example.name,
        timing,
        time_recurrent_part(*calls, RECURRENT_PACE),
        agreement,
        torch_summary=example.summary(torch_model),
        fused_summary=example.summary(fused_model),
    )
