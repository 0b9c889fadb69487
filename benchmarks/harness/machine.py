"""The machine and the versions of a run, and the folder of its results."""

import argparse
import re
import subprocess
from datetime import datetime
from pathlib import Path

import torch

import fused_rnn
from fused_rnn import tuned

RESULTS = Path(__file__).parents[1] / "results"  # committed; a folder for each processor
OUTPUT = RESULTS.parents[1] / "build" / "benchmarks"  # of a run that names no other folder; git ignores it
DECORATION = re.compile(r"\((?:R|TM)\)|\b(?:CPU|Processor|\d+-Core)\b|@.*")


def describe_machine() -> dict[str, str]:
    """The machine and the versions, as CSV columns."""
    return {
        "device": cpu_name(),
        "threads": str(torch.get_num_threads()),
        "torch_version": torch.__version__,
        "fused_rnn_version": fused_rnn.__version__,
        "git_commit": git_commit(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def cpu_name(cpu_info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model without decoration: "Intel Xeon with AMX", "AMD EPYC Zen 5", "AMD EPYC with AVX2".

    Virtual machines hide the model's number. What decides how fast kernels run is named, therefore: AMX, AVX2 where
    there is nothing newer, and of AMD the core that multiplies whole vectors of AVX-512 at once, twice per cycle.
    """
    name = " ".join(DECORATION.sub(" ", tuned.cpu_name(cpu_info)).split())
    found = re.search(r"^flags\s*: (.*)$", cpu_info.read_text(), re.M) if cpu_info.exists() else None
    flags = found[1].split() if found else []
    if "amx_tile" in flags:
        return f"{name} with AMX"
    if name == "AMD EPYC" and "avx_vnni" in flags:
        return f"{name} Zen 5"
    return f"{name} with AVX2" if "avx2" in flags and "avx512f" not in flags else name


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        metavar="DIR",
        help="the CSV and the picture go into a folder of this processor's name in DIR (default: %(default)s)",
    )


def processor_folder(output: Path) -> Path:
    """The folder in `output` for this machine's processor, such as intel-xeon-with-amx; made if it is not there."""
    folder = output / re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def git_commit() -> str:
    """The commit of the project, with "-dirty" if files outside of results differ from it; "" without a repository."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=RESULTS.parents[1], capture_output=True, text=True)
        return run.stdout.strip()

    try:
        commit = git("describe", "--always", "--abbrev=12")
        changed = git("diff", "--name-only", "HEAD", "--", ".", f":(exclude){RESULTS.relative_to(RESULTS.parents[1])}")
    except FileNotFoundError:
        return ""
    return commit + "-dirty" * bool(changed)
