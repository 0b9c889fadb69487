"""The user's table of tuned calls: its file, its buckets, and what happens to files that are damaged or not ours."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fused_rnn import tuned
from fused_rnn.tuned import Call, Result, Table
from tuned_calls import put_results
from tuned_calls import set_outrun_mkl as set_outrun_mkl

CALL = Call("lstm", torch.float32, None, 64, 32, 16, 128, 0, 1, 1, "sequence", False, 0)
HERE, ELSEWHERE = "cpu: this one", "cpu: another one"
RESULT = Result("torch", -1, 0.75, {"torch.nn": 0.75, "kernels": 1.0})


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Of a file that does not exist yet, nor does its folder."""
    return str(tmp_path / "cache" / "tuned.json")


def test_results_come_back_from_the_file(path: str) -> None:
    other_set = Result("fused", -1, 1.5, {"kernels": 1.0}, "avx2")
    packed = CALL._replace(cell="gru", dtype=torch.bfloat16, autocast=torch.float16, kind="packed", train=True)
    cell = CALL._replace(kind="cell")
    stored = {
        (HERE, CALL): RESULT,
        (HERE, cell): other_set,
        (HERE, packed): Result("fused", 3, 1.5, {"cuDNN": 1.5, "kernel 3": 1.0}),
    }
    Table(path).put(stored)
    Table(path).put({(ELSEWHERE, CALL): Result("fused")})  # keeps what is there
    table = Table(path)
    assert table.of(HERE) == {call: result for (_, call), result in stored.items()}
    assert table.get(HERE, CALL) == RESULT
    assert table.get(ELSEWHERE, CALL) == Result("fused")
    assert table.get("cpu: a third one", CALL) is None
    assert (
        os.listdir(os.path.dirname(path)) == ["tuned.json", "tuned.json.lock"]
        or len(os.listdir(os.path.dirname(path))) == 2
    )


@pytest.mark.parametrize(
    ("size", "power"),
    [(1, 1), (2, 2), (3, 4), (5, 4), (6, 8), (11, 8), (12, 16), (47, 32), (48, 64), (95, 64), (96, 128)],
)
def test_sizes_are_rounded_to_the_nearest_power_of_two(size: int, power: int) -> None:
    call = CALL._replace(T=size, B=size, I=size)
    assert call.bucket() == CALL._replace(T=power, B=power, I=power)
    assert call.bucket().bucket() == call.bucket()


def test_all_else_must_be_equal(path: str) -> None:
    table = Table(None)
    table.put({(HERE, CALL.bucket()): RESULT})
    assert table.get(HERE, CALL._replace(T=70, B=40, I=17)) == RESULT
    others = dict(cell="gru", dtype=torch.float64, autocast=torch.bfloat16, H=127, proj_size=3, num_layers=2)
    others |= dict(directions=2, kind="packed", train=True, precision=1, T=200, B=3, I=32)
    assert set(others) == set(Call._fields)
    for name, value in others.items():
        assert table.get(HERE, CALL._replace(**{name: value})) is None, name


def test_an_empty_table_is_never_asked(path: str) -> None:
    table = Table(path)
    assert not table.asked and CALL.H not in table.hidden_sizes
    table.put({(HERE, CALL): Result("fused")})
    assert table.asked and CALL.H not in table.hidden_sizes
    table.put({("cuda: a GPU", CALL): RESULT, (HERE, CALL._replace(autocast=torch.bfloat16)): RESULT})
    assert CALL.H not in table.hidden_sizes  # plain calls on a CPU still run on the kernels
    table.put({(HERE, CALL): RESULT, (HERE, CALL._replace(H=7)): Result("fused", instruction_set="avx2")})
    assert {CALL.H, 7} == table.hidden_sizes and not table.cell_hidden_sizes
    assert CALL.H in Table(path).hidden_sizes and CALL.H + 1 in Table(path).hidden_sizes  # not read yet


def test_what_the_rules_say_is_not_asked(set_outrun_mkl: Callable[[bool], None]) -> None:
    """An RNN's cell in training is torch.nn's by the rules, all other plain calls on a CPU are the kernels'."""
    set_outrun_mkl(False)
    table, cell = Table(None), CALL._replace(T=1, kind="cell")
    rnn = cell._replace(cell="rnn_tanh", train=True)
    table.put({(HERE, cell): Result("fused"), (HERE, rnn): Result("torch")})
    assert not table.cell_hidden_sizes
    table.put({(HERE, cell._replace(H=1)): Result("torch"), (HERE, rnn._replace(H=2)): Result("fused")})
    table.put({(HERE, rnn._replace(H=3, train=False)): Result("torch")})
    table.put({(HERE, rnn._replace(H=4, kind="sequence")): Result("fused")})
    assert table.cell_hidden_sizes == {1, 2, 3} and not table.hidden_sizes


def entry(**fields: object) -> str:
    call = CALL._asdict() | {"dtype": "torch.float32"}
    result = RESULT._asdict()
    for name, value in fields.items():
        (call if name in call else result)[name] = value
    return json.dumps({"format": tuned.FORMAT, "machines": {HERE: [{"call": call, "result": result}]}})


WRONG = {
    "empty": "",
    "cut": entry()[:-20],
    "binary": b"\x80\x81\x00",
    "deep": "[" * 100_000,
    "foreign": '{"name": "someone else\'s", "version": 3}',
    "a list": "[1, 2]",
    "old": json.dumps({"format": tuned.FORMAT - 1, "machines": {}}),
    "new": json.dumps({"format": tuned.FORMAT + 1, "machines": {}}),
    "no machines": json.dumps({"format": tuned.FORMAT}),
    "machines": json.dumps({"format": tuned.FORMAT, "machines": [1]}),
    "no call": json.dumps({"format": tuned.FORMAT, "machines": {HERE: [{}]}}),
    "T": entry(T="64"),
    "train": entry(train=1),
    "dtype": entry(dtype="torch.int8"),
    "autocast": entry(autocast=["torch.int8"]),
    "backend": entry(backend="fast"),
    "instance": entry(instance=-3),
    "speedup": entry(speedup=None),
    "instruction set": entry(instruction_set=3),
    "seconds": entry(seconds={"kernels": "1"}),
    "seconds list": entry(seconds=[1.0]),
    "unknown field": entry(colour="green"),
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_a_damaged_or_foreign_file(content: str | bytes, tmp_path: Path) -> None:
    """One warning, no answer; the next result replaces it."""
    path = tmp_path / "tuned.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    table = Table(str(path))
    with pytest.warns(UserWarning, match="ignores its table of tuned calls") as warned:
        assert table.get(HERE, CALL) is None
        assert table.get(HERE, CALL) is None
    assert len(warned) == 1 and not table.asked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table.put({(HERE, CALL): RESULT})
        assert Table(str(path)).get(HERE, CALL) == RESULT


def test_the_entry_that_others_damage_is_valid(tmp_path: Path) -> None:
    (tmp_path / "tuned.json").write_text(entry())
    assert Table(str(tmp_path / "tuned.json")).get(HERE, CALL) == RESULT


def test_a_warning_that_is_an_error_is_one_once(tmp_path: Path) -> None:
    (tmp_path / "tuned.json").write_text("{")
    table = Table(str(tmp_path / "tuned.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            table.get(HERE, CALL)
        assert table.get(HERE, CALL) is None


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    """Results hold in the process."""
    (tmp_path / "cache").write_text("a file where a folder should be")
    table = Table(str(tmp_path / "cache" / "tuned.json"))
    with pytest.warns(UserWarning, match="cannot write its table"):
        table.put({(HERE, CALL): RESULT})
    assert table.get(HERE, CALL) == RESULT
    (tmp_path / "tuned.json").mkdir()
    table = Table(str(tmp_path / "tuned.json"))
    with pytest.warns(UserWarning, match="ignores its table"):
        assert table.get(HERE, CALL) is None
    with pytest.warns(UserWarning, match="cannot write its table"):
        table.put({(HERE, CALL): RESULT})
    assert sorted(os.listdir(tmp_path)) == ["cache", "tuned.json", "tuned.json.lock"]  # no temporary file is left


WRITERS, RESULTS = 4, 25


def test_processes_write_at_the_same_time(path: str) -> None:
    """No result is lost, and a reader always finds a whole file."""
    processes = multiprocessing.get_context("spawn")
    writers = [
        processes.Process(target=put_results, args=(path, f"writer {number}", CALL, RESULT, RESULTS))
        for number in range(WRITERS)
    ]
    for writer in writers:
        writer.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while any(writer.is_alive() for writer in writers):
            Table(path).of("writer 0")
    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    table = Table(path)
    assert all(len(table.of(f"writer {number}")) == RESULTS for number in range(WRITERS))


def test_threads_write_and_ask_at_the_same_time(path: str) -> None:
    table = Table(path)
    found: list[bool] = []

    def work(writer: int) -> None:
        for number in range(RESULTS):
            call = CALL._replace(H=number)
            table.put({(f"writer {writer}", call): RESULT})
            found.append(table.get(f"writer {writer}", call) == RESULT)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * (WRITERS * RESULTS)
    assert all(len(Table(path).of(f"writer {number}")) == RESULTS for number in range(WRITERS))


def test_the_users_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for cache, expected in (
        ("/big/disk", "/big/disk/fused_rnn/tuned.json"),
        ("", "/home/someone/.cache/fused_rnn/tuned.json"),
        ("relative", "/home/someone/.cache/fused_rnn/tuned.json"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert tuned.user_path() == expected
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuned.user_path() == "/home/someone/.cache/fused_rnn/tuned.json"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without a home
    assert tuned.user_path() is None


def test_a_machine_is_named_by_all_that_matters() -> None:
    torch.set_num_threads(1)
    name = tuned.machine(torch.device("cpu"))
    assert f", 1 thread, {tuned._C.cpu_isa()}" in name and f", torch {torch.__version__}, fused_rnn " in name
    assert all(f"/{isa}" in name for isa in tuned.instruction_sets() if isa)
    torch.set_num_threads(2)
    assert ", 2 threads, " in tuned.machine(torch.device("cpu"))


def test_a_processor_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arm's cores have numbers; several kinds may be in one processor."""
    monkeypatch.setattr(platform, "processor", lambda: "aarch64")
    core = "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: {}\n\n"
    (tmp_path / "cpuinfo").write_text("".join(map(core.format, ["0xd05", "0xd05", "0xd0a"])))
    assert tuned.cpu_name(tmp_path / "cpuinfo") == "aarch64 implementer 0x41 part 0xd05 part 0xd0a"
    (tmp_path / "cpuinfo").write_text("model name\t: Some CPU: fast\nmodel name\t: Some CPU: fast\n")
    assert tuned.cpu_name(tmp_path / "cpuinfo") == "Some CPU: fast"
    assert tuned.cpu_name(tmp_path / "nowhere") == "aarch64"
