"""The sources of the package, where they are beside the tests: copies of them, and C++ programs compiled from them."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SHARED = "FUSED_RNN_TESTS_FOLDER"
"""The environment variable that names a folder of all processes of a run; conftest.py sets it."""
COMPILER = shlex.split(os.environ.get("CXX", "g++"))

needs_sources = pytest.mark.skipif(not CSRC.is_dir(), reason=f"the C++ sources are not beside the tests, in {CSRC}")


def copied(folder: Path) -> Path:
    """Copy the files from which the package is built into a new folder."""
    for name in ("csrc", "fused_rnn"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))]:
        shutil.copy(path, folder)
    return folder


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; after ten minutes, far above any run time here, it hangs."""
    return subprocess.run([str(word) for word in command], text=True, capture_output=True, timeout=600, **options)


def compiled(source: Path, target: Path, *flags: str, compiler: Sequence[str] = COMPILER) -> Path:
    done = run(*compiler, *flags, "-c", source, "-o", target)
    assert done.returncode == 0, done.stderr[-4000:]
    return target


def build(
    program: Path,
    sources: Iterable[Path],
    *flags: str,
    compiler: Sequence[str] = COMPILER,
    also: Iterable[Path | str] = (),
    processes: int | None = None,
) -> Path:
    """Compile `sources` in parallel and link them with the object files and libraries `also`."""
    folder = program.with_suffix(".objects")
    folder.mkdir()
    with ThreadPoolExecutor(processes or os.cpu_count()) as pool:
        objects = pool.map(lambda path: compiled(path, folder / f"{path.name}.o", *flags, compiler=compiler), sources)
        done = run(*compiler, *flags, "-x", "none", *objects, *also, "-o", program)  # objects, in spite of -x in flags
    assert done.returncode == 0, done.stderr[-4000:]
    return program


def installed_kernels() -> list[str]:
    """What the linker needs for the package's own kernels, which would take minutes to compile anew."""
    import fused_rnn  # not above: conftest.py imports this file before it has set the path

    return [fused_rnn.STREAM_LIBRARY, f"-Wl,-rpath,{Path(fused_rnn.STREAM_LIBRARY).parent}"]


def once(name: str, fill: Callable[[Path], None]) -> Path:
    """A folder that the first process of this run of the tests to ask for it fills, while others wait."""
    folder = Path(os.environ[SHARED]) / name
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
            fill(unfinished)
            unfinished.rename(folder)
    return folder


def assert_passes(done: subprocess.CompletedProcess[str]) -> None:
    """Assert that a program of checks, such as kernel_check.cpp, has run to its end without a failure."""
    print(done.stdout)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.rstrip().endswith(" 0 failures")
