"""The layout of a block's shared memory has no bank conflicts: `bank_conflicts.cpp` counts them, without a GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from sources import COMPILER, CSRC, assert_passes, needs_sources, run

HERE = Path(__file__).resolve().parent

pytestmark = [
    needs_sources,
    pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"there is no C++ compiler ({COMPILER[0]})"),
]


def counted(layout: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The counts with the layout.h of the folder `layout`."""
    program = folder / "bank_conflicts"
    built = run(*COMPILER, "-std=c++17", f"-I{layout}", HERE / "bank_conflicts.cpp", "-o", program)
    assert built.returncode == 0, built.stderr[-4000:]
    return run(program)


def test_no_access_has_a_bank_conflict(tmp_path: Path) -> None:
    assert_passes(counted(CSRC / "cuda", tmp_path))


@pytest.mark.parametrize(
    "padding, none, access",
    [
        ("row / 2 * 40", "row / 2 * 32", "sums stored"),
        ("rows / 2 * 40 + 16", "rows / 2 * 40", "sums loaded"),
        ("row * 17", "row * 16", "sums stored"),
        ("(row / 2 * 8 + place) % 32", "place", "sums for other blocks stored"),
        ("128 * 128 + 64", "128 * 128", "rows loaded"),
    ],
)
def test_a_missing_padding_is_found(padding: str, none: str, access: str, tmp_path: Path) -> None:
    shutil.copytree(CSRC / "cells", tmp_path / "cells")
    (tmp_path / "cuda").mkdir()
    text = (CSRC / "cuda" / "layout.h").read_text()
    assert text.count(padding) == 1
    (tmp_path / "cuda" / "layout.h").write_text(text.replace(padding, none))
    done = counted(tmp_path / "cuda", tmp_path)
    assert done.returncode == 1
    assert access in done.stdout
