"""The calls of the CUDA runtime (csrc/cuda/launch.cu), compiled for the CPU with a runtime that counts them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sources import COMPILER, CSRC, assert_passes, build, needs_sources, run

HERE = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-O1", "-pthread", f"-I{HERE / 'fake_runtime'}", f"-I{CSRC / 'cuda'}", "-x", "c++"]

pytestmark = [
    needs_sources,
    pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"there is no C++ compiler ({COMPILER[0]})"),
    pytest.mark.slow("compiles launch.cu several times, each but once with a fault put in"),
]


def checked(launch: Path, folder: Path) -> object:
    return run(build(folder / "check", [HERE / "launch_check.cpp", launch, CSRC / "cuda" / "plan.cpp"], *FLAGS))


def test_the_runtime_is_called_as_it_should_be(tmp_path: Path) -> None:
    assert_passes(checked(CSRC / "cuda" / "launch.cu", tmp_path))


MUTANTS = {
    "each launch's own limit": (
        "allow_shared_memory(kernel, device_index(), current_device().shared_bytes)",
        "cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes)",
    ),
    "one limit for all devices": ("allowed.insert({kernel, device})", "allowed.insert({kernel, 0})"),
    "allocation forbidden in a capture": ("cudaStreamCaptureModeRelaxed", "cudaStreamCaptureModeGlobal"),
    "mode kept": ("    cudaThreadExchangeStreamCaptureMode(&mode);\n", ""),
    "one flag for all devices": ("words + device_index()", "words"),
    "clusters of small blocks": ("{blocks, 256, d.shared_bytes, false, blocks}", "{blocks, 256, 0, false, blocks}"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_check_notices(name: str, tmp_path: Path) -> None:
    old, new = MUTANTS[name]
    source = (CSRC / "cuda" / "launch.cu").read_text()
    assert old in source
    mutant = tmp_path / "launch.cu"
    mutant.write_text(source.replace(old, new))
    done = checked(mutant, tmp_path)
    assert done.returncode != 0, done.stdout
