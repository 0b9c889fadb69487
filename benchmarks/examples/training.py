"""Shared by all examples: their description, full-batch training and the command line.

An example is a model whose class takes the library (`torch.nn` or `fused_rnn`) as its argument and
takes its recurrent layers from there. Everything else, training included, is written once and is
the same for both, so any difference in the losses comes from the recurrent layers.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agreement import TOUR_TOLERANCE, compare, compare_tours

BACKENDS = ("torch", "fused")
SEED = 1  # with this seed, every example learns its answers within its tutorial's number of epochs
LINES_SHOWN = 8


@dataclass(frozen=True)
class Example:
    """A model to train.

    `train` yields the loss after each of `steps` steps of optimisation; `predict` returns class
    indices, to compare two trained models by; `summary` says in words what the model has learnt.
    """

    name: str
    build: Callable[[ModuleType], nn.Module]
    train: Callable[[nn.Module], Iterator[float]]
    steps: int
    predict: Callable[[nn.Module], Tensor]
    summary: Callable[[nn.Module], str]


@dataclass(frozen=True)
class Tour:
    """A series of calls to untrained layers: `walk` yields labelled results, tensor by tensor."""

    name: str
    walk: Callable[[ModuleType], Iterator[tuple[str, Tensor]]]


def full_batch_training(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    epochs: int,
) -> Iterator[float]:
    """Train on all the data at once, one step of optimisation in each epoch."""
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        yield loss.item()


def seeded_model(example: Example, library: ModuleType, seed: int) -> nn.Module:
    """Build the model from the seed, and leave the random state at the seed for its training.

    Seeding a second time makes the training data independent of how many random numbers the
    initialisation drew.
    """
    torch.manual_seed(seed)
    model = example.build(library)
    torch.manual_seed(seed)
    return model


def load_library(backend: str) -> ModuleType:
    """Import the library of this name; fused_rnn only on request, so that `--backend torch` runs without it."""
    if backend == "torch":
        return torch.nn
    try:
        import fused_rnn
    except ModuleNotFoundError as error:
        if error.name != "fused_rnn":
            raise
        sys.exit('fused_rnn is not installed: run pip install ".[bench]" in the project folder')
    return fused_rnn


def command_line(description: str | None) -> argparse.ArgumentParser:
    """The options of every example; an example may add its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=[*BACKENDS, "both"], default="both")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    return parser


def run_examples(examples: Sequence[Example], options: argparse.Namespace) -> None:
    """Train each example on the requested backends, print the losses, and compare them."""
    backends = chosen_backends(options)
    disagreeing = []
    for example in examples:
        losses, models = {}, {}
        for backend in backends:
            models[backend] = seeded_model(example, load_library(backend), options.seed)
            losses[backend] = list(islice(example.train(models[backend]), example.steps))

        print(f"\n{example.name}, {example.steps} steps, seed {options.seed}")
        print_columns("step", *(f"{backend} loss" for backend in backends))
        for step in shown_steps(example.steps):
            print_columns(step + 1, *(f"{losses[backend][step]:.5f}" for backend in backends))
        for backend in backends:
            print(f"{backend}: {example.summary(models[backend])}")

        if len(backends) == 2:
            predictions = [example.predict(models[backend]) for backend in backends]
            agreement = compare(*losses.values(), *predictions)
            print(f"{'agree' if agreement.holds else 'DISAGREE'}: {agreement}")
            if not agreement.holds:
                disagreeing.append(example.name)
    if disagreeing:
        sys.exit(f"torch.nn and fused_rnn do not agree on {', '.join(disagreeing)}")


def tour_results(tour: Tour, library: ModuleType, seed: int) -> list[tuple[str, Tensor]]:
    torch.manual_seed(seed)
    with torch.no_grad():
        return list(tour.walk(library))


def walk_tour(tour: Tour, options: argparse.Namespace) -> None:
    """Print the shape of every result of a tour (the value, when it is a single number)."""
    results = {backend: tour_results(tour, load_library(backend), options.seed) for backend in chosen_backends(options)}
    for backend, found in results.items():
        print(f"\n{tour.name} on {backend}")
        for label, result in found:
            shown = f"{result.item():g}" if result.dim() == 0 else str(tuple(result.shape))
            print(f"  {label:<52} {shown}")
    if len(results) == 2:
        difference = compare_tours(*results.values())
        print(f"\nlargest difference between torch and fused: {difference:.1e}")
        if difference > TOUR_TOLERANCE:
            sys.exit(f"torch.nn and fused_rnn do not agree on {tour.name}")


def chosen_backends(options: argparse.Namespace) -> Sequence[str]:
    if options.threads:
        torch.set_num_threads(options.threads)
    return BACKENDS if options.backend == "both" else (options.backend,)


def shown_steps(steps: int) -> list[int]:
    """About LINES_SHOWN steps, evenly spaced, the first and the last among them."""
    lines = min(steps, LINES_SHOWN)
    return sorted({round(line * (steps - 1) / max(lines - 1, 1)) for line in range(lines)})


def print_columns(*cells: object) -> None:
    print("".join(f"{cell:>14}" for cell in cells))
