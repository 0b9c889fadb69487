"""Train every example on torch.nn and on fused_rnn, check that they agree, and compare the times.

    python benchmarks/run.py                          all examples, about three minutes
    python benchmarks/run.py --quick                  all examples, the first steps only
    python benchmarks/run.py --only hello_rnn char_gru

Prints a table and writes examples.csv and examples.png into benchmarks/results. The exit status is
not 0 when an example does not agree; the rule is in benchmarks/examples/agreement.py.

Started like this, Python looks for modules in this folder and not in the project's, so
`import fused_rnn` finds the installed package, the one that is to be measured.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

try:
    import sklearn  # noqa: F401 - for image_rows, which would only miss it after minutes
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
    from report import ExampleResult, describe_machine, draw, print_table, write_csv
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed: run pip install ".[bench]" in the project folder')

from timing import time_interleaved

NAMES = [example.name for example in EXAMPLES]
RESULTS = Path(__file__).parent / "results"
QUICK_STEPS = 20
WARM_UP = 3


def main() -> None:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    machine = describe_machine()
    console.print("{device}, threads: {threads}, torch {torch_version}".format(**machine))

    names = options.only or NAMES
    failures = [] if options.only else check_tours(TOURS, console)
    examples = [example for example in EXAMPLES if example.name in names]
    results = train_examples(examples, options.quick, console)
    failures += [f"{result.name}: {result.agreement}" for result in results if not result.agreement.holds]

    print_table(results, console)
    options.output.mkdir(parents=True, exist_ok=True)
    csv_path, png_path = options.output / "examples.csv", options.output / "examples.png"
    write_csv(results, machine, csv_path)
    draw(results, machine, png_path)
    console.print(f"Written: {csv_path} and {png_path}", soft_wrap=True)

    if failures:
        sys.exit("\n".join(["torch.nn and fused_rnn do not agree on", *failures]))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=["examples"], default="examples")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=NAMES,
        metavar="NAME",
        help=f"train only these examples; the names are {', '.join(NAMES)}",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--quick", action="store_true", help=f"stop each training after {QUICK_STEPS} steps")
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="the folder for the CSV and the picture (default: benchmarks/results)",
    )
    return parser.parse_args()


def check_tours(tours: Sequence[Tour], console: Console) -> list[str]:
    """Compare what the tours, which train nothing, return on both; say which differ."""
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
    return ExampleResult(
        example.name,
        timing,
        agreement,
        torch_summary=example.summary(torch_model),
        fused_summary=example.summary(fused_model),
    )


if __name__ == "__main__":
    main()
