"""Selects the tests that run (see default_set.py), and makes them import the installed fused_rnn, without tuned calls.

`python -m pytest` puts the source folder on the path, where without a build in place the sources alone cannot be
imported.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from default_set import default_set
from sources import SHARED

ROOT = Path(__file__).resolve().parent.parent
os.environ["FUSED_RNN_TUNE"] = "0"  # tests, and the processes that they start, leave the user's table alone
COLLECTED = pytest.StashKey[list[pytest.Item]]()

if not any((ROOT / "fused_rnn").glob("_C.*.so")):
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="every case of every test, and the slow tests")


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder for what is built once in a run (sources.once); pytest-xdist's workers inherit its name."""
    if not hasattr(config, "workerinput"):
        shared = tempfile.TemporaryDirectory(prefix="fused_rnn_tests_")
        os.environ[SHARED] = shared.name
        config.add_cleanup(shared.cleanup)


def files_are_named(config: pytest.Config) -> bool:
    """Whether the command line asks for less than the whole folder."""
    folder = config.invocation_params.dir
    return any((folder / arg).resolve() not in (ROOT, ROOT / "tests") for arg in config.args)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Where pytest-xdist is installed, up to four processes share the whole folder, unless -n says otherwise."""
    option = config.option
    seen = option.usepdb or option.trace or option.collectonly or option.capture == "no"  # by someone who looks on
    alone = seen or option.markexpr == "timing" or hasattr(config, "workerinput")
    if getattr(option, "numprocesses", 0) is None and not alone and not files_are_named(config):
        option.numprocesses, option.dist = min(os.cpu_count() or 1, 4), "loadfile"
        if option.all:
            option.loadscopereorder = False  # it sorts by the number of tests, of which the longest files have few
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait by spinning would hold up the others


def pytest_report_header(config: pytest.Config) -> str:
    if files_are_named(config):
        return "set: all cases of the files named"
    return f"set: {'all cases' if config.getoption('all') else 'default; pytest --all runs all cases'}"


def slow_files_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """So that at the end no process waits for another that still has a long file."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    return sorted(items, key=lambda item: item.path not in slow)


@pytest.hookimpl(tryfirst=True)  # before -k and -m, so that COLLECTED holds all tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = list(items)
    chosen = items if config.getoption("all") or files_are_named(config) else default_set(items)
    if config.getoption("markexpr") != "timing":
        chosen = [item for item in chosen if not item.get_closest_marker("timing")]
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = slow_files_first(chosen)


@pytest.fixture
def collected(request: pytest.FixtureRequest) -> list[pytest.Item]:
    """All collected tests, including those that the default set leaves out."""
    return request.config.stash[COLLECTED]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Restore the number of threads after a test that changes it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(same_threads: None) -> None:
    """Use one thread: on a busy machine, waiting threads make tests of small tensors ten times slower."""
    torch.set_num_threads(1)
