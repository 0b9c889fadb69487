"""Has the tests import the installed fused_rnn under `python -m pytest`, which puts the source folder on the path."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if not any((ROOT / "fused_rnn").glob("_C.*.so")):  # not built in place: the sources alone cannot be imported
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
