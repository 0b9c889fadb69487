"""Builds _cuda.so with nvcc, for setup.py: a plain library of operators, no Python module, that serves every Python.

Importing this file needs no torch, so that a source distribution can be made without it.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

EXHAUSTIVE_SWITCHES = ("-Werror=switch",)  # a cell that a switch leaves out is an error
# Code runs on its own version and on later minor ones, so these are all GPUs from the A100 on: 8.0 has the L4, RTX 30
# and 40, 10.0 B200 and B300, 12.0 the RTX 50. An "a" runs nowhere else. PTX is compiled on the user's machine.
ARCHITECTURES = "8.0 9.0a 10.0+PTX 12.0"


def nvcc() -> str | None:
    """The CUDA compiler to build with; None: leave the CUDA kernels out."""
    wish = os.environ.get("FUSED_RNN_CUDA", "")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    compiler = shutil.which("nvcc", path=f"{home}/bin") if home else None
    compiler = compiler or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if wish == "1" and compiler is None:
        sys.exit("FUSED_RNN_CUDA=1, but there is no nvcc: put it on PATH or name its folder in CUDA_HOME.")
    return None if wish == "0" or os.environ.get("FUSED_RNN_SANITIZE") == "1" else compiler


def code_generation(compiler: str) -> list[str]:
    """nvcc's options for the architectures, written as torch writes them: "8.0 9.0a 10.0+PTX"."""
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST")
    known = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    options = []
    for name in (wish or ARCHITECTURES).replace(";", " ").replace(",", " ").split():
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            sys.exit(f"TORCH_CUDA_ARCH_LIST: expected versions like 8.0, 9.0a or 10.0+PTX, got {name!r}")
        number = name.removesuffix("+PTX").replace(".", "")
        if not wish and f"sm_{number.removesuffix('a')}" not in known:
            continue  # newer than this compiler
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            number = number.removesuffix("a")  # PTX of an "a" runs nowhere else
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def build_cuda(compiler: str, csrc: Path, macro: tuple[str, str], folder: Path, output: Path) -> None:
    """Compiles the sources that have changed into objects in `folder`, and links them into the library `output`.

    Args:
        csrc: the folder of all sources.
        macro: name and value; the version of LibTorch's stable ABI to use.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    cxx = shlex.split(os.environ.get("CXX", "c++"))
    include = [f"-I{path}" for path in include_paths()]
    shared = ["-std=c++17", "-O3", "-c", "-D{}={}".format(*macro), *include]
    device = [
        compiler,
        *shared,
        *code_generation(compiler),
        "-prec-div=false",
        "--expt-relaxed-constexpr",
        "-Xcompiler",
        "-fPIC",
    ]
    device += ["-Xcompiler", "-fvisibility=hidden", "-ccbin", cxx[0]]
    host = [*cxx, *shared, *EXHAUSTIVE_SWITCHES, "-fPIC", "-fvisibility=hidden"]
    sources = [*sorted((csrc / "bindings").glob("cuda_*.cpp")), *sorted((csrc / "cuda").glob("*.c*"))]
    sources = [path for path in sources if path.suffix in (".cpp", ".cu")]
    folder /= hashlib.sha256(" ".join(map(str, device)).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{path.name}.o" for path in sources]
    changed = max(path.stat().st_mtime for path in csrc.rglob("*") if path.is_file())

    def compile_one(source: Path, result: Path) -> None:
        if result.exists() and result.stat().st_mtime > changed:
            return
        print(f"building {source.relative_to(csrc.parent)}", flush=True)
        subprocess.run([*(device if source.suffix == ".cu" else host), source, "-o", result], check=True)

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, sources, objects))
    output.parent.mkdir(parents=True, exist_ok=True)
    # nvcc knows where its runtime is, but for the toolkit that pip installs.
    libraries = [f"-L{path}" for path in (*library_paths(), Path(compiler).resolve().parent.parent / "lib")]
    link = [compiler, "-shared", "-nodlink", "-cudart", "static", "-ccbin", cxx[0], *objects, "-o", output, *libraries]
    subprocess.run([*link, "-ltorch_cpu"], check=True)
