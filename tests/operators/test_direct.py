"""When the CPU's operators are called without torch's dispatcher.

That each equals its operator, also with damaged arguments, is tested in test_ops.py and test_fuzz.py, and all layers of
a module in one call in test_stack.py.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn
from fused_rnn import _C


class _Asked(Exception):
    """The dispatcher was asked for an operator."""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks the dispatcher for an operator gets an error."""

    class Packet:
        @property
        def default(self) -> None:
            raise _Asked

    for name in ("forward", "backward", "step"):
        monkeypatch.setattr(torch.ops.fused_rnn, name, Packet())


def test_modules_and_cells_do_without_the_dispatcher(alone: None) -> None:
    x, resets = torch.randn(4, 2, 3), torch.zeros(4, 2, dtype=torch.bool)
    for name in ("RNN", "LSTM", "GRU"):
        module = getattr(fused_rnn, name)(3, 5, num_layers=2, bidirectional=True)
        cell = getattr(fused_rnn, f"{name}Cell")(3, 5)
        for options in ({}, {"resets": resets}):
            with torch.no_grad():
                module(x, **options), cell(x[0])
            module(x, **options)[0].sum().backward()
    with pytest.raises(_Asked):
        _C.forward()


class _Watching(TorchDispatchMode):
    def __init__(self) -> None:
        self.seen: list[str] = []
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **kwargs or {})


def test_a_profiler_sees_the_operators() -> None:
    gru, x = fused_rnn.GRU(3, 5, num_layers=2), torch.randn(4, 2, 3)
    with profile() as watching:
        with torch.no_grad():
            gru(x), gru.step(x[0])
        gru(x)[0].sum().backward()
    names = [event.name for event in watching.events()]
    assert names.count("fused_rnn::forward") == 6 and names.count("fused_rnn::backward") == 2


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_mode_around_backward_sees_the_operators(recompute: str) -> None:
    loss = fused_rnn.GRU(3, 5, recompute=recompute)(torch.randn(4, 2, 3))[0].sum()
    with _Watching() as mode:
        loss.backward()
    assert "fused_rnn.backward.default" in mode.seen
    assert ("fused_rnn.forward.default" in mode.seen) == (recompute == "full")


def test_a_mode_around_an_exported_program_sees_the_operator() -> None:
    """So that make_fx records it."""
    x = torch.randn(4, 2, 3)
    module = torch.export.export(fused_rnn.GRU(3, 5).eval(), (x,)).module()
    with torch.no_grad(), _Watching() as mode:
        module(x)
    assert "fused_rnn.forward.default" in mode.seen
    recorded = make_fx(module)(x)
    other = torch.randn_like(x)
    torch.testing.assert_close(recorded(other), module(other))


def test_states_of_equally_wide_layers_that_lie_side_by_side() -> None:
    """They are no states of a torch.nn module."""
    gru, x = fused_rnn.GRU(3, [5, 5], bidirectional=True), torch.randn(4, 2, 3)
    with torch.no_grad():
        found = gru(x)
    torch.testing.assert_close(found, gru(x))
    assert found[1].shape == (2, 2, 10)


@pytest.mark.parametrize("what", ["x", "h0", "weight"])
def test_negated_views_are_what_they_stand_for(what: str) -> None:
    gru = fused_rnn.GRU(3, 5)
    given = {"x": torch.randn(4, 2, 3), "h0": torch.randn(1, 2, 5), "weight": gru.weight_hh_l0}
    with torch.no_grad():
        expected = gru(given["x"], given["h0"])
        given[what] = torch._neg_view(-given[what])
        assert given[what].is_contiguous()
        gru.weight_hh_l0 = torch.nn.Parameter(given["weight"])
        found = gru(given["x"], given["h0"])
    assert torch.equal(found[0], expected[0])


def test_long_calls_let_other_threads_run() -> None:
    """Python's lock is free while a large layer is computed."""
    lstm, x = fused_rnn.LSTM(64, 256), torch.randn(256, 16, 64)
    turns, done = 0, threading.Event()

    def count() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1

    with torch.no_grad():
        other = threading.Thread(target=count)
        other.start()
        before = turns
        for _ in range(3):
            lstm(x)
        after = turns
        done.set()
        other.join()
    assert after > before + 100
