"""Files of frozen models: damaged ones are errors, also under the sanitizers."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_rnn
from fused_rnn import _C
from sources import COMPILER, CSRC, build, needs_sources, run

HERE = Path(__file__).resolve().parent
SANITIZERS = "-fsanitize=address,undefined", "-fno-sanitize=null,alignment,object-size,vptr"
FLAGS = ["-std=c++17", "-O1", "-fopenmp", "-w", "-fno-sanitize-recover=undefined", *SANITIZERS]
MODULES = {
    "lstm": lambda: nn.LSTM(3, 20, 2, proj_size=5),
    "gru": lambda: nn.GRU(3, 5, bidirectional=True),
    "rnn": lambda: nn.RNN(1, 1, bias=False),
}


@pytest.mark.slow("compiles all kernels anew under the sanitizers")
@needs_sources
def test_damaged_files(tmp_path: Path) -> None:
    if shutil.which(COMPILER[0]) is None:
        pytest.skip("no C++ compiler (g++)")
    sources = [HERE / "frozen_fuzz.cpp", *sorted(CSRC.glob("cpu/*.cpp"))]

    program = build(tmp_path / "frozen_fuzz", sources, *FLAGS)
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
    assert "begins otherwise" in message(changed(0, 0))
    assert "has version 9 of the format" in message(changed(8, 9))
    assert f"and has {len(whole) - 8}" in message(whole[:-8])
    assert "its checksum is another" in message(changed(24, (int(whole[24]) + 1) % 256))  # a known header is trusted
    frozen._model = whole
    assert frozen(x)[0].isfinite().all()
