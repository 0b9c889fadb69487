"""Every structure of states, for every class and every way into the kernels: torch.nn's result or type of error.

torch.nn's own cells read out of bounds where an input is unbatched and a state is not. There torch.nn is not called,
and only an error is required.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fused_rnn
from contract import tensors
from processes import survives

INPUT, HIDDEN = 3, 3  # equal, so that a wrong rank is not detected by its sizes
WAYS = ("class", "replace", "patched")
RANKS = {
    "RNNCell": (1, 2),
    "GRUCell": (1, 2),
    "LSTMCell": (1, 2),
    "RNN": (2, 3),
    "GRU": (2, 3),
    "LSTM": (2, 3),
}
TORCHS_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError)


def structures(state: Callable[[int], Any], ranks: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """States of ranks 0 to 4, alone and in every container."""
    lowest, highest = ranks
    a, b, c = (state(rank) for rank in (lowest, highest, highest + 1))
    for rank in range(5):
        s = state(rank)
        yield f"{rank}-D", s
        for count in (1, 2, 3):
            yield f"tuple of {count} {rank}-D", (s,) * count
            yield f"list of {count} {rank}-D", [s] * count
            yield f"{count} stacked {rank}-D", torch.stack([s] * count)
    for name, (first, second) in {
        "ranks differ": (a, b),
        "ranks differ, exchanged": (b, a),
        "one too high": (b, c),
        "None first": (None, b),
        "None second": (b, None),
        "both None": (None, None),
        "nested": ((b, b), (b, b)),
        "lists": ([b], [b]),
        "numbers": (0.0, 0.0),
        "texts": ("h", "c"),
        "another dtype": (b.double(), b.double()),
        "one of another dtype": (b, b.double()),
        "integers": (b.long(), b.long()),
        "too wide": (torch.cat([b, b], -1), torch.cat([b, b], -1)),
        "c too wide": (b, torch.cat([b, b], -1)),
        "empty": (b[:0], b[:0]),
        "meta": (b.to("meta"), b.to("meta")),
        "sparse": (b.to_sparse(), b.to_sparse()),
    }.items():
        yield name, (first, second)
        yield f"{name}, the first alone", first
    yield "no states", ()
    yield "empty list", []
    yield "a dictionary", {0: b, 1: b}
    yield "a number", 1.0
    yield "a text", "hc"


def outcome(call: Callable[[], Any]) -> Any:
    """The tensors of a result, or the exception."""
    try:
        result = call()
    except Exception as error:  # which type it has is compared
        return error
    return [t.detach() for t in tensors(result)]


def is_ours(name: str, x: torch.Tensor, hx: Any) -> bool:
    """Whether to expect our own error: torch.nn's cells would read out of bounds, or the container is unusual."""
    if not name.endswith("Cell"):
        return False
    if name != "LSTMCell":
        states = [hx]
    elif isinstance(hx, (tuple, list)):
        states = list(hx)
    elif isinstance(hx, torch.Tensor):
        states = list(hx) if hx.dim() > 0 else []
    else:
        return hx is not None
    return any(isinstance(s, torch.Tensor) and {s.dim(), x.dim()} == {1, 2} for s in states)


def state_of(batch: int, rank: int) -> torch.Tensor:
    sizes = {0: (), 1: (HIDDEN,), 2: (batch, HIDDEN), 3: (1, batch, HIDDEN), 4: (1, 1, batch, HIDDEN)}
    return torch.randn(sizes[rank])


def check(way: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name, ranks in RANKS.items():
        theirs = getattr(nn, name)(INPUT, HIDDEN)
        for batch, rank in itertools.product((1, 4), ranks):
            x = {1: torch.randn(INPUT), 2: torch.randn(batch, INPUT), 3: torch.randn(5, batch, INPUT)}[rank]
            for structure, hx in structures(partial(state_of, batch), ranks):
                any_error = is_ours(name, x, hx)
                expected = RuntimeError() if any_error else outcome(partial(theirs, x, hx))
                case = f"{name}, {way}, input {list(x.shape)}, hx {structure}"
                compare(outcome(partial(run, theirs, way, x, hx)), expected, any_error, case)


def compare(actual: Any, expected: Any, any_error: bool, case: str) -> None:
    if isinstance(expected, Exception):
        assert isinstance(actual, TORCHS_ERRORS if any_error else type(expected)), (case, expected, actual)
    else:
        assert not isinstance(actual, Exception), (case, expected, actual)
        torch.testing.assert_close(actual, expected, msg=lambda text: f"{case}\n{text}")


def run(theirs: nn.Module, way: str, x: torch.Tensor, hx: Any) -> Any:
    if way == "class":
        ours = getattr(fused_rnn, type(theirs).__name__)(INPUT, HIDDEN)
        ours.load_state_dict(theirs.state_dict())
        return ours(x, hx)
    if way == "replace":
        model = nn.Sequential(type(theirs)(INPUT, HIDDEN))
        model[0].load_state_dict(theirs.state_dict())
        fused_rnn.replace(model)
        return model[0](x, hx)
    with fused_rnn.patched():
        return theirs(x, hx)


@pytest.fixture(scope="module")
def checks() -> Iterator[dict[str, Future[None]]]:
    """The check of every way, in processes of their own, of which two run at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {way: pool.submit(survives, check, way) for way in WAYS}


@pytest.mark.parametrize("way", WAYS)
def test_structures(way: str, checks: dict[str, Future[None]]) -> None:
    checks[way].result()


def check_functional() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name, keywords in itertools.product(("RNN", "LSTM", "GRU"), (False, True)):
        theirs = getattr(nn, name)(INPUT, HIDDEN)
        call = getattr(fused_rnn.functional, name.lower())
        for batch, rank in itertools.product((1, 3), (2, 3)):
            x = torch.randn(5, INPUT) if rank == 2 else torch.randn(5, batch, INPUT)
            options = {"resets": torch.zeros(x.shape[:-1], dtype=torch.bool)} if keywords else {}
            for structure, hx in structures(partial(state_of, batch), (2, 3)):
                expected = outcome(partial(theirs, x, hx))
                actual = outcome(partial(call, x, list(theirs.parameters()), hx, **options))
                if isinstance(actual, TORCHS_ERRORS):
                    continue  # torch.nn's LSTM also accepts three states, or stacked ones, and ignores the third
                compare(actual, expected, True, f"functional.{name.lower()}, input {list(x.shape)}, hx {structure}")


def check_random_structures(seed: int) -> None:
    """Random structures, two levels deep, as states of every cell: no crash."""
    draw = random.Random(seed)
    torch.set_num_threads(1)
    leaves: list[Callable[[int], Any]] = [partial(state_of, batch) for batch in (1, 2, 4)]
    leaves += [lambda rank: None, lambda rank: 0.0, lambda rank: torch.zeros(rank, HIDDEN)]

    def structure(depth: int) -> Any:
        if depth == 0 or draw.random() < 0.5:
            return draw.choice(leaves)(draw.randrange(5))
        parts = [structure(depth - 1) for _ in range(draw.randrange(4))]
        return draw.choice((tuple, list))(parts)

    for _ in range(1500):
        name = draw.choice([name for name in RANKS if name.endswith("Cell")])
        x = draw.choice((torch.randn(INPUT), torch.randn(draw.choice((1, 2, 4)), INPUT)))
        hx, library = structure(2), draw.choice((nn, fused_rnn))
        with fused_rnn.patched() if library is nn else nullcontext():
            result = outcome(partial(getattr(library, name)(INPUT, HIDDEN), x, hx))
        assert not isinstance(result, Exception) or isinstance(result, TORCHS_ERRORS), (name, x.shape, hx, result)


def check_functional_and_random_structures() -> None:
    check_functional()
    check_random_structures(0)


def test_structures_of_functional_and_random_ones() -> None:
    survives(check_functional_and_random_structures)
