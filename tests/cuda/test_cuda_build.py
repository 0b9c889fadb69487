"""The built CUDA library on a machine without a GPU: it loads under any torch and needs no other CUDA library."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fused_rnn
from fused_rnn import cuda
from processes import python, succeeded

LIBRARY = Path(fused_rnn.__file__).parent / "_cuda.so"

pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason="fused_rnn was installed without nvcc: no _cuda.so")


def readelf(option: str) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) was not found")
    return subprocess.run(["readelf", "-W", option, LIBRARY], check=True, capture_output=True, text=True).stdout


def test_the_library_needs_no_cuda_library() -> None:
    """The CUDA runtime is linked statically, and torch's CUDA functions are looked up by name."""
    needed = re.findall(r"\(NEEDED\).*\[(.*)\.so", readelf("-d"))
    assert "libtorch_cpu" in needed
    system = {"libc", "libdl", "libgcc_s", "libm", "libpthread", "librt", "libstdc++"}
    assert [name for name in needed if name not in {*system, "libtorch_cpu"} and not name.startswith("ld-linux")] == []


def test_the_library_uses_the_stable_abi_alone() -> None:
    """Only C functions of torch are undefined symbols, no C++ symbols, which change from version to version."""
    undefined = re.findall(r" UND (\S+)", readelf("--dyn-syms"))
    assert any(name.startswith("aoti_torch_") for name in undefined)
    assert [name for name in undefined if re.match(r"_ZN?[KVT]*[SN]?\d*(at|c10|caffe2|torch)\d", name)] == []


def test_libtorch_cpu_is_all_it_needs_of_torch(tmp_path: Path) -> None:
    """RTLD_NOW resolves every symbol at once. `import torch` is avoided, since it may load torch's CUDA libraries."""
    torch_cpu = Path(find_spec("torch").origin).parent / "lib" / "libtorch_cpu.so"
    code = """
import ctypes, os, sys
for name in sys.argv[1:]:
    ctypes.CDLL(name, mode=os.RTLD_NOW)
print(any("libtorch_cuda" in line for line in open("/proc/self/maps")))
"""
    assert succeeded(python("-c", code, torch_cpu, LIBRARY, cwd=tmp_path)) == "False\n"


LOAD = """
import sys, torch
for library in sys.argv[1:]:
    torch.ops.load_library(library)
for name in ("forward", "backward"):
    operator = getattr(torch.ops.fused_rnn, name).default
    keys = [key for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key)]
    print(operator.name(), *keys)
"""


@pytest.mark.parametrize("order", [("_cuda.so", "_cpu.so"), ("_cpu.so", "_cuda.so")], ids=" ".join)
def test_it_registers_the_cpus_operators_for_cuda(order: tuple[str, str], tmp_path: Path) -> None:
    """Without importing the package; independent of whether torch has CUDA and the machine a GPU."""
    found = succeeded(python("-c", LOAD, *(LIBRARY.with_name(name) for name in order), cwd=tmp_path))
    assert found.splitlines() == ["fused_rnn::forward CPU CUDA", "fused_rnn::backward CPU CUDA"]


def test_the_package_sees_the_library_where_torch_has_cuda() -> None:
    assert cuda.available() == (torch.version.cuda is not None)
