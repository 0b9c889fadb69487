"""Has the tests import the installed fused_rnn under `python -m pytest`, which puts the source folder on the path, and
leaves out the tests that compare times.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

if not any((ROOT / "fused_rnn").glob("_C.*.so")):  # not built in place: the sources alone cannot be imported
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects tests marked `timing` unless -m names them. (In addopts, a -m would be lost to the command line's.)"""
    if "timing" in config.getoption("-m"):
        return
    timed = [item for item in items if item.get_closest_marker("timing")]
    config.hook.pytest_deselected(items=timed)
    items[:] = [item for item in items if item not in timed]
