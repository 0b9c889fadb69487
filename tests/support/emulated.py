"""The CUDA operators on CPU tensors: bindings and kernels compiled for the emulator, as torch operators.

They have the schemas of ``fused_rnn::forward`` and ``backward``, in a namespace of their own.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from fused_rnn import cuda, fakes, operators, policy
from sources import COMPILER, CSRC, ROOT, build, once

EMULATOR = ROOT / "tests/cuda/cuda_emulator"
LIBRARY = "libfused_rnn_emulator.so"
H200 = (132, 232448, 90)  # the device that the emulator reports; see cuda.device_properties


def missing() -> str | None:
    """The reason why the emulator cannot be built, or None."""
    if not CSRC.is_dir():
        return "the C++ sources are not beside the tests"
    return None if shutil.which(COMPILER[0]) else f"no C++ compiler ({COMPILER[0]})"


marks = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.slow("compiles the CUDA kernels for the emulator, which is slow itself"),
]


def build_all(folder: Path) -> None:
    """The emulator, the kernels and their bindings."""
    flags = ["-std=c++17", "-O2", "-fPIC", "-DFUSED_RNN_EMULATOR", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    flags += [f"-I{path}" for path in (CSRC / "cuda", EMULATOR, *include_paths())]
    sources = [*(CSRC / "cuda").glob("*.c*"), *(CSRC / "bindings").glob("cuda_*.cpp")]
    sources = [path for path in sources if path.suffix in (".cpp", ".cu") and path.name != "launch.cu"]
    sources += [EMULATOR / "emulator.cpp", EMULATOR / "last_launch.cpp"]
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
    build(folder / LIBRARY, sources, *flags, "-shared", "-x", "c++", also=libraries)


def built() -> Path:
    """The library, whose object files lie beside it; built once in a run of the tests."""
    return once("emulated", build_all) / LIBRARY


@functools.cache
def load_once() -> ctypes.CDLL:
    """Load the library, once for all tests of this process."""
    torch.ops.load_library(built())
    fakes.register("fused_rnn_emulator")
    return ctypes.CDLL(str(built()))


def operator(name: str, **options: Any) -> Any:
    """The emulated ``fused_rnn::{name}``, with additional arguments."""
    return functools.partial(getattr(torch.ops.fused_rnn_emulator, name).default, **options)


def use(patch: pytest.MonkeyPatch, *, tf32: bool = True) -> None:
    """Run every layer on the CUDA operators."""
    load_once()
    patch.setattr(policy, "on_cuda", lambda x: True)
    patch.setattr(cuda, "tf32_allowed", lambda: tf32)
    patch_operators(patch, operator("forward"), operator("backward"))


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every layer on the CUDA operators, in a file of tests that imports this fixture."""
    use(monkeypatch)


def patch_operators(patch: pytest.MonkeyPatch, forward: Any, backward: Any) -> None:
    """Run every layer on these operators in place of ``fused_rnn::forward`` and ``backward``."""
    for name in ("plain", "in_one_call"):  # which call the CPU's kernels themselves
        patch.setattr(operators, name, lambda *_: None)
    patch.setattr(operators, "forward_operator", forward)
    patch.setattr(operators, "backward_operator", backward)


def last_was_resident() -> bool:
    """Whether the last kernel was one that keeps the recurrent weights on the chip."""
    return load_once().fused_rnn_emulated_shared_bytes() >= 4096
