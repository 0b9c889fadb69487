"""The CPU kernels without torch: `kernel_check.cpp` compares them with its own reference.

Those of the package, and compiled anew under the thread sanitizer and for 64-bit Arm in an emulator.

Tests with torch see only this machine's instruction sets, and the thread sanitizer does not understand libgomp's
synchronisation. Here the kernels run on std::thread with their own barrier, which it does understand, and the portable
ones on NEON. Two tests remove the barrier, to prove that the check and the sanitizer can fail.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from sources import COMPILER, CSRC, assert_passes, build, installed_kernels, needs_sources, run

HERE = Path(__file__).resolve().parent
CHECK = HERE / "kernel_check.cpp"
SOURCES = [CHECK, *sorted(CSRC.glob("cpu/*.cpp"))]
FLAGS = [  # as in setup.py, with -O1 because it compiles faster, and without warnings
    *("-std=c++17", "-O1", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-w"),
]
ARM = ["aarch64-linux-gnu-g++", "-static"]

pytestmark = [
    needs_sources,
    pytest.mark.slow("compiles the check and, for the thread sanitizer and for emulated Arm, all kernels"),
]


def require(tool: str, package: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed (Debian, Ubuntu: apt install {package})")


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require(COMPILER[0], "g++")
    return build(tmp_path_factory.mktemp("native") / "kernel_check", [CHECK], *FLAGS, also=installed_kernels())


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs the program under the thread sanitizer."""
    require(COMPILER[0], "g++")
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "empty.cpp").write_text("int main() {}")
    if run(*COMPILER, "-fsanitize=thread", folder / "empty.cpp", "-o", folder / "empty").returncode:
        pytest.skip(f"{COMPILER[0]} has no thread sanitizer (Debian, Ubuntu: it comes with g++; Fedora: libtsan)")
    # The sanitizer does not support every system's address-space randomisation.
    for prefix in ([], ["setarch", platform.machine(), "-R"]):
        if (not prefix or shutil.which("setarch")) and run(*prefix, folder / "empty").returncode == 0:
            return [*prefix, str(build(folder / "kernel_check", SOURCES, *FLAGS, "-fsanitize=thread", "-g1"))]
    pytest.skip("the thread sanitizer does not start here, with or without `setarch -R` (package util-linux)")


def test_every_instruction_set_agrees_with_the_reference(native: Path) -> None:
    assert_passes(run(native))


def test_the_check_sees_a_missing_barrier(native: Path) -> None:
    """Proves that the check can fail: without a barrier, workers read buffers that still hold NaN."""
    done = run(native, "--quick", "--without-barrier", "portable")
    assert done.returncode == 1
    assert "FAILED: portable float32" in done.stdout


def under_thread_sanitizer(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(*command, "--quick", *arguments, env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"})


def test_no_data_race(sanitized: list[str]) -> None:
    done = under_thread_sanitizer(sanitized)
    assert "WARNING: ThreadSanitizer" not in done.stderr, done.stderr[:4000]
    assert_passes(done)


def test_the_thread_sanitizer_sees_a_missing_barrier(sanitized: list[str]) -> None:
    done = under_thread_sanitizer(sanitized, "--without-barrier")
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr


def test_arm_agrees_with_the_reference(tmp_path: Path) -> None:
    require(ARM[0], "g++-aarch64-linux-gnu")
    require("qemu-aarch64", "qemu-user")
    program = build(tmp_path / "kernel_check", SOURCES, *FLAGS, "-O2", compiler=ARM)
    assert_passes(run("qemu-aarch64", program, "--quick"))
