"""benchmarks/gpu_run.sh from end to end on a machine without a GPU: every phase runs, on stand-ins for the GPU.

Python is started through tests/support/fake_gpu/run.py, in which torch.cuda answers and tensors are the CPU's. nvcc,
nvidia-smi and compute-sanitizer are scripts, and building is copying this package.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fused_rnn

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "tests" / "support" / "fake_gpu" / "run.py"
PACKAGE = Path(fused_rnn.__file__).parent

pytestmark = [
    pytest.mark.skipif(
        not (ROOT / "benchmarks/gpu_run.sh").is_file(), reason="the benchmarks are not beside the tests"
    ),
    pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash"),
    pytest.mark.slow("starts Python many times, which imports torch each time"),
]

PROGRAMS = {
    "python": f"""
case "$1 $2" in
  "-m pip") while [ "$1" != --target ]; do shift; done; cp -r "{PACKAGE}" "$2"; exit ;;
  "-c "*torch.cuda*) ;;
  "-c import "*) exec "{sys.executable}" "$@" ;; # asks whether a module is there
esac
exec "{sys.executable}" "{STAND_IN}" "$@"
""",
    "nvcc": "echo Cuda compilation tools, release 13.0",
    "nvidia-smi": "echo NVIDIA H200, 580.1, 1980, 3201, 1980, 3201, 40, 75, 700",
    "compute-sanitizer": """
[ "$1" != --help ] || { echo --kernel-name; exit; }
while case $1 in -*) true ;; *=*) true ;; memcheck | racecheck | 86) true ;; *) false ;; esac; do shift; done
"$@" && echo "========= ERROR SUMMARY: 0 errors"
[ -z "$LONG_LOG" ] || yes "========= Invalid __global__ read" | head -c 20000000
""",
}
# Left out: what takes long on a CPU, and what a replay without a GPU, or autocast for one, cannot do.
GPU_TESTS = (
    "T3B2I4H7L1 or not (matches_torch or many_runs or cuda_graph or two_streams or peak_memory or test_autocast)"
)
MEBIBYTE = 2**20


class Machine:
    """A copy of the sources, and programs that stand in for those of a machine with a GPU."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.programs, self.results = (folder / name for name in ("tree", "bin", "results"))
        for name in ("benchmarks", "tests"):
            ignored = shutil.ignore_patterns("results", "__pycache__")
            shutil.copytree(ROOT / name, self.tree / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", self.tree)
        self.programs.mkdir()
        for name, text in PROGRAMS.items():
            path = self.programs / name
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHON"))}
        env |= {"PATH": f"{self.programs}{os.pathsep}{env['PATH']}", "PYTHON": str(self.programs / "python")}
        env |= {"OMP_NUM_THREADS": "1", "GPU_RUN_COMMIT": "abc", **environment}
        command = ["bash", str(self.tree / "benchmarks/gpu_run.sh"), "--output", str(self.results), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)

    def records(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.results / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def done(machine: Machine) -> subprocess.CompletedProcess[str]:
    """All phases that run without being named."""
    return machine.run(PYTEST_ADDOPTS=f"-k '{GPU_TESTS}'")


def phases(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What became of each phase."""
    table = done.stdout.partition("== phases\n")[2]
    return {line.split()[0]: line.split(maxsplit=3)[3] for line in table.splitlines() if " s  " in line}


def test_every_phase_passes(machine: Machine, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert phases(done) == dict.fromkeys(("facts", "build", "correctness", "baselines", "grid", "sweep"), "passed")


def test_the_results_are_complete(machine: Machine, done: subprocess.CompletedProcess[str]) -> None:
    facts = json.loads((machine.results / "gpu_facts.json").read_text())
    assert facts["multi_processor_count"] == 132 and facts["nvidia_smi"]["driver_version"] == "580.1"
    assert " passed" in (machine.results / "gpu_correctness.log").read_text()
    for name in ("gpu_baselines.jsonl", "gpu_grid.jsonl"):
        first, *rows, last = machine.records(name)
        assert (first["record"], first["device"], last["record"]) == ("run", "NVIDIA H200 (not really)", "end")
        assert rows
        for row in rows:
            assert row["notes"] == "" and row["way"] == "graph" and row["torch.nn"] > 0, row
            assert row["torch.nn memory"] == 2000
    assert all(row["kernels"][0]["name"] == "a_kernel" for row in machine.records("gpu_baselines.jsonl")[1:-1])
    assert all(
        "'resident'" in row["plan"] or "'steps'" in row["plan"] for row in machine.records("gpu_grid.jsonl")[1:-1]
    )
    swept = machine.records("gpu_sweep.jsonl")
    kernels = {(line["kernel"], line["backward"]) for line in swept}
    both_ways = itertools.product(("alone", "through_cluster", "through_l2"), (False, True))
    assert kernels == {*both_ways, ("split_columns", True)} and all(line["measured"] > 0 for line in swept)
    assert "b32_h512_bi_l2" in {line["shape"] for line in swept}


def test_a_fault_in_a_phase_is_seen(machine: Machine, done: subprocess.CompletedProcess[str]) -> None:
    """And the later phases run nevertheless."""
    measure = machine.tree / "benchmarks/gpu/measure.py"
    text = measure.read_text()
    measure.write_text(text.replace("print_steps(lines)\n", "print_stepz(lines)\n"))
    try:
        found = machine.run("--phase", "grid,sweep", "--output", str(machine.results.with_name("faulty")))
    finally:
        measure.write_text(text)
    assert found.returncode == 1
    assert phases(found) == {"grid": "FAILED (exit status 1)", "sweep": "passed"}


def test_the_sanitizer_has_a_run_of_its_own_and_a_long_log_keeps_its_end(
    machine: Machine, done: subprocess.CompletedProcess[str]
) -> None:
    found = machine.run("--phase", "sanitizer", LONG_LOG="1")
    assert found.returncode == 0, found.stdout + found.stderr
    assert phases(found) == {"sanitizer": "passed"} and "limit 100 s" in found.stdout
    assert (machine.results / "gpu_sanitizer.log").stat().st_size == 16 * MEBIBYTE


def test_the_time_limit_is_of_all_phases(machine: Machine) -> None:
    found = machine.run("--phase", "facts", "--time-limit", "4", "--output", str(machine.results.with_name("late")))
    assert found.returncode == 1 and "no time is left for it" in found.stdout
    assert phases(found)["facts"].startswith("STOPPED")
    wrong = machine.run("--time-limit", "soon")
    assert wrong.returncode == 2 and wrong.stderr == "--time-limit needs a number of seconds, got soon\n"
