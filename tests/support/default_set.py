"""Selects the cases that `pytest` runs when no file is named: a few minutes, with every option, cell and dtype."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import pytest


def words(case: str) -> set[str]:
    """The parts of a case's name: "LSTM-proj_size-bf16" has three."""
    return set(re.split(r"[-, ]+", case))


def covering(cases: Iterable[str]) -> set[str]:
    """A subset of these names that contains every word of all of them.

    A name is kept if it has a word that no name before it has. The names are taken in the order of a checksum: in the
    order of a table, all combinations with its first entries would be kept, and none with the others.
    """
    seen: set[str] = set()
    kept = set()
    for case in sorted(cases, key=lambda case: (zlib.crc32(case.encode()), case)):
        if not words(case) <= seen:
            kept.add(case)
            seen |= words(case)
    return kept


def case_of(item: pytest.Item) -> str:
    """The part of a test's name in brackets."""
    callspec = getattr(item, "callspec", None)
    return callspec.id if callspec else ""


def by_function(items: Iterable[pytest.Item]) -> dict[str, list[pytest.Item]]:
    functions = defaultdict(list)
    for item in items:
        functions[item.nodeid.removesuffix(f"[{case_of(item)}]")].append(item)
    return functions


def default_set(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """For every test function, the cases selected by `covering`; none that are marked slow."""
    chosen: set[pytest.Item] = set()
    for cases in by_function(item for item in items if not item.get_closest_marker("slow")).values():
        kept = covering(map(case_of, cases))
        chosen.update(item for item in cases if case_of(item) in kept)
    return [item for item in items if item in chosen]
