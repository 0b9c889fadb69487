"""Files of frozen models: they come back bit for bit, and damaged ones are errors."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import contract
import fused_rnn
from fused_rnn import _C
from sources import COMPILER, build, installed_kernels, needs_sources, run

HERE = Path(__file__).resolve().parent
MODULES = {
    "lstm": lambda: nn.LSTM(3, 20, 2, proj_size=5),
    "gru": lambda: nn.GRU(3, 5, bidirectional=True),
    "rnn": lambda: nn.RNN(1, 1, bias=False),
}


@pytest.mark.slow("compiles C++")
@needs_sources
def test_damaged_files(tmp_path: Path) -> None:
    """On the kernels of the package, which .ci/run also builds under the sanitizers."""
    if shutil.which(COMPILER[0]) is None:
        pytest.skip("no C++ compiler (g++)")
    program = build(tmp_path / "frozen_fuzz", [HERE / "frozen_fuzz.cpp"], "-std=c++17", "-O1", also=installed_kernels())
    files = []
    for name, make in MODULES.items():
        for weights in ("float32", "bfloat16", "int8"):
            files.append(tmp_path / f"{name}_{weights}")
            fused_rnn.freeze(make(), weights).save(files[-1])
    for isa in _C.supported_cpu_isas():
        settings = {"FUSED_RNN_CPU_ISA": isa, "ASAN_OPTIONS": "allocator_may_return_null=1"}
        done = run(program, 2000, *files, env=os.environ | settings)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        loaded, refused = (int(number) for number in re.findall(r"(\d+) (?:loaded|refused)", done.stdout))
        assert loaded > 100 and refused > 100


def test_messages(tmp_path: Path) -> None:
    """From Python, through the operator, which reads the same bytes."""
    frozen, x = fused_rnn.freeze(nn.GRU(3, 5), "int8"), torch.randn(2, 1, 3)
    whole = frozen._model.clone()

    def message(change: torch.Tensor) -> str:
        frozen._model = change
        with pytest.raises(RuntimeError) as error:
            frozen(x)
        return str(error.value)

    def changed(at: int, value: int) -> torch.Tensor:
        model = whole.clone()
        model[at] = value
        return model

    assert "is cut off: it has 10 bytes" in message(whole[:10])
    assert "does not begin as one" in message(changed(0, 0))
    assert "has version 9 of the format" in message(changed(8, 9))
    assert f"and has {len(whole) - 8}" in message(whole[:-8])
    assert "its checksum is another" in message(changed(24, (int(whole[24]) + 1) % 256))  # a known header is trusted
    frozen._model = whole
    assert frozen(x)[0].isfinite().all()


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("key", contract.MODULES)
@torch.no_grad()
def test_round_trip(key: str, weights: str, tmp_path: Path) -> None:
    """Class, options, weights and results, of a file that is written anew the same."""
    _, module = contract.pair(key)
    frozen = fused_rnn.freeze(module, weights)
    frozen.save(tmp_path / "model.frnn")
    loaded = fused_rnn.load_frozen(str(tmp_path / "model.frnn"))
    assert type(loaded) is type(frozen) and repr(loaded) == repr(frozen) and not loaded.training
    state, expected = loaded.state_dict(), frozen.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)
    given = contract.arguments(module)
    for a, b in zip(contract.tensors(loaded(*given)), contract.tensors(frozen(*given)), strict=True):
        assert torch.equal(a, b)
    loaded.save(tmp_path / "again.frnn")
    assert (tmp_path / "again.frnn").read_bytes() == (tmp_path / "model.frnn").read_bytes()


def sealed(model: bytearray, at: int, value: int) -> bytearray:
    """The file with another number of 32 bits, and a checksum that fits."""
    model[at : at + 4] = value.to_bytes(4, "little")
    model[24:32] = _C.frozen_checksum(model).to_bytes(8, "little")
    return model


DAMAGED = {
    "empty": (lambda m: m[:0], "is cut off: it has 0 bytes"),
    "half a header": (lambda m: m[:40], "is cut off: it has 40 bytes"),
    "another kind": (lambda m: b"PK" + m[2:], "does not begin as one"),
    "as text": (lambda m: m.replace(b"\r\n", b"\n"), "does not begin as one"),
    "version": (lambda m: sealed(m, 8, 2), "has version 2 of the format; this library reads version 1"),
    "cut off": (lambda m: m[:-8], "says that it has 568 bytes, and has 560"),
    "longer": (lambda m: m + bytes(8), "says that it has 568 bytes, and has 576"),
    "a bit": (lambda m: m[:100] + bytes([m[100] ^ 1]) + m[101:], "its checksum is another"),
    "flags": (lambda m: sealed(m, 12, 16), "has a cell, weights or flags that this library does not know"),
    "weights": (lambda m: sealed(m, 36, 4), "has a cell, weights or flags that this library does not know"),
    "layers of a cell": (lambda m: sealed(m, 12, 1 | 2 | 8), "is a cell with options of a layer"),
    "no units": (lambda m: sealed(m, 56, 0), "has an impossible size: 0"),
    "fewer units": (lambda m: sealed(m, 56, 4), "bytes too many"),
    "more layers": (lambda m: sealed(m, 40, 2), "is too short for its sizes"),
    "projected": (lambda m: sealed(m, 64, 2), "has a projection, and no LSTM"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_the_error_names_the_file_and_what_is_wrong(how: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.frnn"
    frozen = fused_rnn.freeze(nn.GRU(1, 5))  # lives on, so that the library knows the model
    frozen.save(path)
    damage, message = DAMAGED[how]
    path.write_bytes(damage(bytearray(path.read_bytes())))
    with pytest.raises(RuntimeError, match=f"load_frozen: cannot load {path}: the frozen model .*{re.escape(message)}"):
        fused_rnn.load_frozen(path)
    assert frozen(torch.ones(2, 1, 1))[0].shape == (2, 1, 5)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.frnn"):
        fused_rnn.load_frozen(tmp_path / "none.frnn")
