"""The machine and the versions of a run."""

import platform
import subprocess
from datetime import datetime
from pathlib import Path

import torch

import fused_rnn


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


def cpu_name() -> str:
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str:
    """The commit of the project; "" outside of a git repository or before the first commit."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return ""
    return git.stdout.strip()
