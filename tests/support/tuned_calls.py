"""Fixtures for tests of `fused_rnn.tune`: a table of the test's own, and a clock that shows what the test wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from contract import fused_calls
from fused_rnn import operators, tuned, tuning
from fused_rnn.options import PLANNED
from fused_rnn.tuned import Call, Result, Table

CPU = torch.device("cpu")
H200 = (132, 232448, 90)
T, B, SIZE, HIDDEN = 6, 3, 4, 5
OTHER_SET = "amx_emulated"
"""An instruction set that every machine has, and none takes by itself."""
CALL = Call("gru", torch.float32, None, T, B, SIZE, HIDDEN, 0, 1, 1, "sequence", False, 0)


def put_results(path: str, machine: str, call: Call, result: Result, count: int) -> None:
    """Put results of calls with 0 to count - 1 units, one by one; a spawned process finds this function here."""
    table = Table(path)
    for units in range(count):
        table.put({(machine, call._replace(H=units)): result})


@pytest.fixture
def set_outrun_mkl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Say whether the kernels multiply faster than MKL."""

    def set_to(outrun: bool) -> None:
        monkeypatch.setattr(tuned, "_outrun_mkl", lambda: outrun)
        tuned.torch_trains_as_fast.cache_clear()

    yield set_to
    tuned.torch_trains_as_fast.cache_clear()


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Table]:
    """The user's table, in a folder of the test."""
    own, of_all = Table(str(tmp_path / "tuned.json")), tuned.table
    monkeypatch.setattr(tuning, "_hopeless", set())
    with monkeypatch.context() as patch:
        patch.setattr(tuned, "table", own)
        yield own
    assert of_all.mode == "off" and not of_all.asked, "the test has changed the table of all tests"


_machine = tuned._cpu.__wrapped__


def compare(sets: dict[str, int], patch: pytest.MonkeyPatch) -> None:
    """Make these the CPU's instruction sets that are compared."""
    patch.setattr(tuned, "instruction_sets", lambda: sets)
    patch.setattr(tuned, "_cpu", _machine)  # which remembers no name with these sets


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The seconds that a call takes on each backend or instruction set, in place of the real ones.

    The process's own instruction set is alone, unless the test has the fixture `instruction_sets`.
    """
    seconds = {"torch": 1.0, "fused": 1.0}
    compare({"": PLANNED}, monkeypatch)

    def stub(run: Callable[[], Any], count: int) -> float:
        run()
        answer = tuned.ask(CALL, CPU, False)  # the rival
        assert answer is not None
        return count * seconds.get(answer.instruction_set, seconds[answer.backend])

    monkeypatch.setattr(tuning, "_cpu_seconds", stub)
    monkeypatch.setattr(tuning, "MOST_ROUNDS", 3)
    return seconds


@pytest.fixture
def instruction_sets(clock: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Two instruction sets that are compared: the process's own and OTHER_SET."""
    sets = {"": PLANNED, OTHER_SET: tuned._C.supported_cpu_isas().index(OTHER_SET)}
    compare(sets, monkeypatch)
    return sets


@pytest.fixture
def instances(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The `instance` of each call of the operators forward and backward that has options."""
    seen: list[int] = []

    def noting(operator: Any, count: int) -> Any:
        return lambda *arguments: (len(arguments) > count and seen.append(arguments[-1])) or operator(*arguments)

    monkeypatch.setattr(operators, "forward_operator", noting(operators.forward_operator, 15))
    monkeypatch.setattr(operators, "backward_operator", noting(operators.backward_operator, 18))
    return seen


def computes(call: Callable[[], Any]) -> str:
    """Who computes the call."""
    with fused_calls() as calls:
        call()
    return "fused" if calls else "torch"


@pytest.fixture
def torch_wins(table: Table, clock: dict[str, float]) -> Table:
    """A table that names torch.nn for every call that is tuned."""
    clock["torch"] = 0.5
    return table


def machine_results() -> dict[Call, Result]:
    """The results of this machine in the test's table."""
    return tuned.table.of(tuned.machine(CPU))
