"""Importing fused_rnn imports no adapter and none of their libraries."""

from pathlib import Path

from processes import python

PROGRAM = """
import sys, fused_rnn
libraries = {"lightning", "pytorch_lightning", "sb3_contrib", "stable_baselines3", "tensordict", "torchrl"}
print([name for name in sys.modules if name.split(".")[0] in libraries or name.startswith("fused_rnn.integrations")])
"""


def test_the_package_imports_no_adapter(tmp_path: Path) -> None:
    process = python("-c", PROGRAM, cwd=tmp_path)
    assert process.stdout == "[]\n", process.stderr
