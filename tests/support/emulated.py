"""The CUDA operators on CPU tensors: bindings and kernels compiled for the emulator, as torch operators.

They have the schemas of ``fused_rnn::forward`` and ``backward``, in a namespace of their own.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from fused_rnn import cuda, fakes, operators, policy
from sources import CSRC, ROOT

H200 = (132, 232448, 90)  # the device that the emulator reports; see cuda.device_properties


def missing() -> str | None:
    """The reason why the emulator cannot be built, or None."""
    if not CSRC.is_dir():
        return "the C++ sources are not beside the tests"
    return None if shutil.which("g++") else "no C++ compiler (g++)"


marks = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.slow("compiles the CUDA kernels for the emulator, which is slow itself"),
]


def build(folder: Path, *options: str) -> Path:
    """Compile the library; `options` are passed to every call of the compiler."""
    flags = ["-std=c++17", "-O1", "-fPIC", "-DFUSED_RNN_EMULATOR", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    flags += [f"-I{path}" for path in (ROOT / "csrc/cuda", ROOT / "tests/cuda/cuda_emulator", *include_paths())]
    sources = [*(ROOT / "csrc/cuda").glob("*.c*"), *(ROOT / "csrc/bindings").glob("cuda_*.cpp")]
    sources = [path for path in sources if path.suffix in (".cpp", ".cu") and path.name != "launch.cu"]
    sources += [ROOT / f"tests/cuda/cuda_emulator/{name}.cpp" for name in ("emulator", "last_launch")]
    objects = [folder / f"{path.name}.o" for path in sources]

    def compile_one(source: Path, result: Path) -> None:
        command = ["g++", *flags, *options, "-c", "-x", "c++", source, "-o", result]
        subprocess.run(command, check=True, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    library = folder / "libfused_rnn_emulator.so"
    where = [f"-L{path}" for path in library_paths()]
    subprocess.run(["g++", "-shared", *options, *objects, "-o", library, *where, "-ltorch_cpu"], check=True)
    return library


@functools.cache
def load_once() -> ctypes.CDLL:
    """Build and load the library, once for all tests of this process."""
    with tempfile.TemporaryDirectory() as folder:
        return load(build(Path(folder)))


def load(library: Path) -> ctypes.CDLL:
    torch.ops.load_library(library)
    fakes.register("fused_rnn_emulator")
    return ctypes.CDLL(str(library))


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
