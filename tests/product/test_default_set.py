"""The default set of `pytest` contains every word of every case's name: every option, cell and dtype."""

from __future__ import annotations

from itertools import product

import pytest

from default_set import by_function, case_of, covering, default_set, words


def test_every_word_is_kept_and_most_cases_are_not() -> None:
    cells, options, dtypes = ("RNN", "LSTM", "GRU"), ("plain", "packed", "resets", "proj"), ("f32", "f64", "bf16")
    cases = ["-".join(parts) for parts in product(cells, options, dtypes)]
    kept = covering(cases)
    assert {word for case in kept for word in words(case)} == {*cells, *options, *dtypes}
    assert kept < set(cases) and len(kept) <= len(cells) + len(options) + len(dtypes)
    assert kept == covering(reversed(cases))  # independent of the order of a table


def test_a_new_word_is_never_left_out() -> None:
    cases = [f"LSTM-{number}" for number in range(9)]
    assert covering([*cases, "LSTM-3-new"]) >= {"LSTM-3-new"}
    assert covering([""]) == {""}  # a test without parameters


def test_each_function_is_in_the_default_set_with_every_word(collected: list[pytest.Item]) -> None:
    """Checks the collected tests, which are all tests unless a file is named."""
    chosen = by_function(default_set(collected))
    for function, items in by_function(collected).items():
        usual = [item for item in items if not item.get_closest_marker("slow")]
        kept = {word for item in chosen.get(function, ()) for word in words(case_of(item))}
        assert kept == {word for item in usual for word in words(case_of(item))}, function


def test_what_is_slow_says_why(collected: list[pytest.Item]) -> None:
    for item in collected:
        for marker in item.iter_markers("slow"):
            assert len(marker.args) == 1 and len(str(marker.args[0]).split()) > 1, item.nodeid
