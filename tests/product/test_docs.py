"""The documentation is correct: examples run, links and commands exist, speed tables are the committed results.

The examples of a page run one after the other in one namespace, as a reader would type them. torch.nn's own
examples, which are part of our classes' docstrings, run with `nn` meaning fused_rnn.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

import fused_rnn
import run
import tables
from fused_rnn import constructor, convert, functional, launch, reference, tuned

ROOT = Path(__file__).resolve().parents[2]
MODULES = [fused_rnn] + [
    importlib.import_module(f"fused_rnn.{module.name}")
    for module in pkgutil.iter_modules(fused_rnn.__path__)
    if module.name not in ("_C", "_cpu", "_cuda", "_stream")
]
CLASSES = [getattr(fused_rnn, name) for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")]
FUNCTIONS = [getattr(fused_rnn, name) for name in fused_rnn.__all__ if name.islower() and name != "functional"]
FUNCTIONS += [functional.rnn, functional.lstm, functional.gru, reference.step, reference.layer]
FUNCTIONS += [cls.forward for cls in CLASSES] + [fused_rnn.LSTM.step]
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(DOCS.rglob("*.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
OPTIONAL = {"lightning", "sb3_contrib", "torchrl"}  # used in examples on pages that say how to install them
SLOW = {"deployment.md": "compiles C++"}
needs_docs = pytest.mark.skipif(not DOCS.is_dir(), reason=f"the documentation's sources are not in {DOCS}")


@pytest.fixture(autouse=True)
def table_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an example tunes holds in this example only."""
    monkeypatch.setattr(tuned, "table", tuned.Table(None, "off"))


def failures(text: str, names: dict[str, Any]) -> tuple[int, str]:
    """The number of examples in `text`, and a report of those whose output differs from the text."""
    test = doctest.DocTestParser().get_doctest(text, names, "documentation", None, None)
    report: list[str] = []
    doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(test, out=report.append, clear_globs=False)
    return len(test.examples), "".join(report)


@each_module
def test_examples_of_docstrings(module: Any) -> None:
    for found in doctest.DocTestFinder().find(module):
        assert not failures(found.docstring, {"torch": torch, "nn": fused_rnn})[1]


def test_examples_are_looked_at() -> None:
    assert failures(">>> 1 + 1\n3\n", {})[1] and failures(">>> nothing\n", {})[1]
    found = {test.name: len(test.examples) for module in MODULES for test in doctest.DocTestFinder().find(module)}
    assert all(found[f"{cls.__module__}.{cls.__name__}"] >= 4 for cls in CLASSES)  # torch.nn's and ours
    assert all(found[f"{f.__module__}.{f.__name__}"] for f in [*FUNCTIONS[:4], functional.lstm, reference.layer])


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow(SLOW[page.name])] if page.name in SLOW else []) for page in PAGES],
    ids=lambda page: page.name,
)
def test_examples_of_pages(page: Path) -> None:
    names: dict[str, Any] = {}
    missing: set[str] = set()
    with torch._dynamo.config.patch(allow_rnn=False):  # restored if a page sets it
        for block in blocks(page, "python"):
            imported = re.findall(r"^(?:from|import) (\w+)", block, flags=re.MULTILINE)
            absent = {name for name in OPTIONAL & {*imported} if find_spec(name) is None}
            missing |= absent
            if block.startswith(">>>"):
                assert not failures(block, names)[1]
            elif not absent:
                exec(block, names)
    if missing:
        pytest.skip(f"{page.name}: the examples with {', '.join(sorted(missing))}, which is not installed")


@needs_docs
@pytest.mark.parametrize(
    ("page", "language", "program"),
    [
        ("how-to/deployment.md", "cpp", "tests/compose/run_package.cpp"),
        ("how-to/streaming.md", "c", "benchmarks/examples/stream.c"),
    ],
)
def test_examples_in_other_languages_are_of_programs_that_are_tested(page: str, language: str, program: str) -> None:
    lines = {line.strip() for block in blocks(DOCS / page, language) for line in block.splitlines()} - {""}
    assert len(lines) >= 5 and lines <= {line.strip() for line in (ROOT / program).read_text().splitlines()}


@needs_docs
def test_examples_of_pages_are_looked_at() -> None:
    counts = {page.name: len(blocks(page, "python")) for page in PAGES}
    assert counts["README.md"] >= 1 and counts["features.md"] >= 10 and counts["gpu.md"] >= 1
    assert all(len(blocks(page, "python")) >= 2 for page in (DOCS / "tutorial.md", *(DOCS / "how-to").glob("*.md")))


def anchors(page: Path) -> set[str]:
    """The anchors that code hosts and Sphinx make from a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_prose_of_pages_is_no_wider_than_the_code(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in text.splitlines() if not line.startswith(("| ", "!["))]
    assert not [line for line in lines if len(line) > 120]


@needs_docs
@each_page
def test_links_of_pages(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


@needs_docs
def test_files_that_pages_name_exist() -> None:
    named = re.compile(r"\b((?:benchmarks|csrc|fused_rnn|tests)/[\w/]+\.\w+)")
    paths = {path for page in (PAGES[0], *DOCS.rglob("*.md")) for path in named.findall(page.read_text())}
    assert "benchmarks/run.py" in paths and "fused_rnn/reference.py" in paths
    assert not [path for path in paths if not (ROOT / path).is_file()]


@needs_docs
def test_commands_of_pages_are_accepted() -> None:
    for command_line, parser, least in (
        (r"python benchmarks/run\.py([^`&\n]*)", run.command_line(), 8),
        (r"python -m fused_rnn (tune --[^`#\n]*)", launch.parser(), 2),
    ):
        found = {command for page in PAGES for command in re.findall(command_line, page.read_text())}
        assert len(found) >= least
        for command in found:
            parser.parse_args(shlex.split(command))  # exits on unknown options


@needs_docs
@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_tables_of_pages_are_the_committed_results(page: Path) -> None:
    text = page.read_text()
    assert "<!-- table " in text
    assert tables.updated(text) == text, "run python benchmarks/tables.py"


@needs_docs
def test_the_table_of_gpus_is_the_planners(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest LSTM of each GPU, in steps of 16 units, for a batch of 64."""
    monkeypatch.setattr(fused_rnn.cuda, "tf32_allowed", lambda: True)
    gpus = {
        "L4": (58, 101376, 89), "RTX 3090": (82, 101376, 86), "RTX 4090": (128, 101376, 89),
        "RTX 5090": (170, 101376, 120), "A100": (108, 166912, 80), "H100, H200": (132, 232448, 90),
        "B200": (148, 232448, 100),
    }  # fmt: skip

    def most(dtype: torch.dtype, properties: tuple[int, int, int]) -> int:
        fits = (H for H in range(16, 4096, 16) if fused_rnn.cuda.is_resident("lstm", dtype, 64, H, 1, properties))
        return max(fits)

    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) \| (\w+) \|$", (DOCS / "gpu.md").read_text(), re.MULTILINE)
    assert {name for name, *_ in rows} == set(gpus)
    for name, *numbers, way in rows:
        assert list(map(int, numbers)) == [most(dtype, gpus[name]) for dtype in (torch.bfloat16, torch.float32)], name
        assert way == ("clusters" if gpus[name][2] >= 90 else "L2")


@each_module
def test_all_that_is_public_has_a_docstring(module: Any) -> None:
    assert inspect.getdoc(module)
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        assert inspect.getdoc(value), f"{module.__name__}.{name}"
        for member, method in vars(value).items() if inspect.isclass(value) else ():
            function = inspect.unwrap(method)
            if not member.startswith("_") and inspect.isfunction(function) and "fused_rnn" in function.__module__:
                assert inspect.getdoc(method), f"{module.__name__}.{name}.{member}"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_every_argument_is_explained(function: Any) -> None:
    text = function.__doc__
    if function in (functional.rnn, functional.gru):
        text += functional.lstm.__doc__  # to which the other docstrings refer
    for name in inspect.signature(function).parameters.keys() - {"self"}:
        assert re.search(rf"^ *(\w+, )*{name}(, \w+)*:|`{name}`", text, flags=re.MULTILINE), name


@pytest.mark.parametrize("cls", [fused_rnn.RNN, fused_rnn.LSTM, fused_rnn.GRU], ids=lambda cls: cls.__name__)
def test_help_tells_of_every_option(cls: Any) -> None:
    ours, of_torch = cls.__doc__.split(convert.TORCHS_OWN)
    options = [name for name, value in vars(constructor.Variants).items() if isinstance(value, constructor.Option)]
    assert len(options) >= 6
    for option in ("backend", *options):
        assert f"    {option}: " in ours
    assert inspect.cleandoc(getattr(torch.nn, cls.__name__).__doc__) in of_torch


@needs_docs
def test_the_reference_page_has_all_public_names() -> None:
    page = (DOCS / "api.rst").read_text()
    for name in fused_rnn.__all__:
        assert re.search(rf"^\.\. \w+:: fused_rnn\.{name}\b", page, flags=re.MULTILINE), name
