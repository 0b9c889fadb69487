"""Tuning from outside of Python: FUSED_RNN_TUNE and ``python -m fused_rnn tune``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fused_rnn import tuned
from fused_rnn.tuned import Call, Result, Table
from processes import KERNELS, python, run
from tuned_calls import CPU
from tuned_calls import clock as clock
from tuned_calls import table as table
from tuned_calls import torch_wins as torch_wins

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- Environment and command line -----------------------------------------------------------------------------------

SCRIPT = """
import torch, fused_rnn
from fused_rnn import tuned
torch.set_num_threads(1)
with torch.no_grad():
    fused_rnn.LSTM(3, 5)(torch.ones(4, 2, 3))
print(len(tuned.table.of(tuned.machine(torch.device("cpu")))), fused_rnn.plan("lstm", T=4, B=2, I=3, H=5,
    requires_grad=False, device="cpu").source)
"""


def test_the_environment_variable(tmp_path: Path) -> None:
    def printed(**environment: str) -> str:
        result = python("-c", SCRIPT, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path), **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    file = tmp_path / "fused_rnn" / "tuned.json"
    assert printed(FUSED_RNN_TUNE="0") == printed(FUSED_RNN_TUNE="") == "0 shipped\n" and not file.exists()
    assert printed(FUSED_RNN_TUNE="1") == "1 tuned\n"
    content = file.read_bytes()
    (entries,) = json.loads(content)["machines"].values()
    assert len(entries) == 1 and entries[0]["call"]["cell"] == "lstm"
    assert printed(FUSED_RNN_TUNE="1") == printed(FUSED_RNN_TUNE="") == "1 tuned\n"  # without measuring again
    assert file.read_bytes() == content
    assert printed(FUSED_RNN_TUNE="0") == "0 shipped\n"
    assert "FUSED_RNN_TUNE must be 0 or 1, got 'yes': it is ignored" in printed(FUSED_RNN_TUNE="yes")
    file.write_text("{")
    assert printed(FUSED_RNN_TUNE="").startswith("0 shipped\n") and "ignores its table" in printed(FUSED_RNN_TUNE="")


def test_the_command_line(tmp_path: Path) -> None:
    def command(*args: str) -> str:
        result = python(
            "-m", "fused_rnn", *args, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path), FUSED_RNN_TUNE="", OMP_NUM_THREADS="1"
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    path = tmp_path / "fused_rnn" / "tuned.json"
    assert f"tuned:            0 calls on cpu, in {path}\n" in command("info")
    printed = command("tune", "--cell", "gru", "--shape", "5,2,3,4", "--seconds", "0.05", "--device", "cpu")
    assert "gru" in printed and "inference" in printed and "5,2,3,4,1" in printed
    command(
        "tune", "--cell", "rnn_relu", "--shape", "5,2,3,4,2", "--dtype", "bfloat16", "--train", "--bidirectional",
        "--seconds", "0.05", "--device", "cpu",
    )  # fmt: skip
    (entries,) = json.loads(path.read_text())["machines"].values()
    calls = [entry["call"] for entry in entries]
    assert [(c["cell"], c["dtype"], c["num_layers"], c["directions"], c["train"]) for c in calls] == [
        ("gru", "torch.float32", 1, 1, False),
        ("rnn_relu", "torch.bfloat16", 2, 2, True),
    ]
    assert f"tuned:            2 calls on cpu, in {path}\n" in command("info")


WRONG = {
    "no shape": ["--cell", "gru"],
    "three sizes": ["--cell", "gru", "--shape", "1,2,3"],
    "zero": ["--cell", "gru", "--shape", "1,2,3,0"],
    "words": ["--cell", "gru", "--shape", "a,b,c,d"],
    "cell": ["--cell", "qrnn", "--shape", "1,2,3,4"],
    "seconds": ["--cell", "gru", "--shape", "1,2,3,4", "--seconds", "nan"],
    "no GPU": ["--cell", "gru", "--shape", "1,2,3,4", "--device", "cuda"],
}


@pytest.mark.parametrize("args", WRONG.values(), ids=WRONG)
def test_wrong_command_lines(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fused_rnn import __main__ as command_line

    monkeypatch.setattr("sys.argv", ["fused_rnn", "tune", *args])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        command_line.main()
    assert stop.value.code == 2 and "usage: python -m fused_rnn tune" in capsys.readouterr().err


def test_run_follows_the_table(tmp_path: Path) -> None:
    """A script under ``python -m fused_rnn run`` leaves torch.nn's calls to torch.nn where that was faster."""
    (tmp_path / "script.py").write_text(f"import torch\ntorch.set_num_threads(1)\n{KERNELS}kernels()\n")
    call = Call("lstm", torch.float32, None, 2, 1, 4, 5, 0, 1, 1, "sequence", True, 0)
    path = tmp_path / "fused_rnn" / "tuned.json"
    torch.set_num_threads(1)
    environment = dict(XDG_CACHE_HOME=str(tmp_path), FUSED_RNN_TUNE="")
    for backend, expected in (("fused", "['fused_rnn::forward']\n"), ("torch", "[]\n")):
        Table(str(path)).put({(tuned.machine(CPU), call): Result(backend)})
        assert run("script.py", cwd=tmp_path, **environment).stdout == expected
