"""What the documentation shows runs and prints what it says; all that is public is documented.

torch.nn's own examples, which stand in our classes' docstrings, run with `nn` meaning fused_rnn. The README's examples
run one after the other, with the names that its text takes for granted.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_rnn
from fused_rnn import convert, functional, reference, variants

ROOT = Path(__file__).resolve().parent.parent
MODULES = [fused_rnn] + [
    importlib.import_module(f"fused_rnn.{module.name}")
    for module in pkgutil.iter_modules(fused_rnn.__path__)
    if module.name not in ("_C", "_cpu", "_cuda")
]
CLASSES = [getattr(fused_rnn, name) for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")]
FUNCTIONS = [getattr(fused_rnn, name) for name in fused_rnn.__all__ if name.islower()]
FUNCTIONS += [functional.rnn, functional.lstm, functional.gru, reference.step, reference.layer]
FUNCTIONS += [cls.forward for cls in CLASSES] + [fused_rnn.LSTM.step]
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)


def failures(text: str, names: dict[str, Any]) -> tuple[int, str]:
    """How many examples `text` holds, and a report of those that do not print what it says."""
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
    assert all(found[f"{cls.__module__}.{cls.__name__}"] >= 4 for cls in CLASSES)  # torch.nn's, and ours
    assert all(found[f"{f.__module__}.{f.__name__}"] for f in [*FUNCTIONS[:4], functional.lstm, reference.layer])


def test_examples_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    T, B, I, H = 5, 3, 64, 128  # noqa: E741 - the sizes of its modules with options
    lstm = fused_rnn.LSTM(I, H)
    done = torch.zeros(T, B, dtype=torch.bool)
    names = {
        "torch": torch,
        "functional": functional,
        "x": torch.randn(B, T, 28),
        "lstm": lstm,
        "done": done,
        "done_t": done[0],
        "ready": ~done[0],
        "x_t": torch.randn(B, I),
        "hx": lstm(torch.randn(T, B, I))[1],
        "h": torch.zeros(1, 1, H),
        "c": torch.zeros(1, 1, H),
        "lengths": torch.tensor([5, 0, 2]),
        "gru": fused_rnn.GRU(I, H),
    }
    weights = zip(("w_ih", "w_hh", "b_ih", "b_hh"), names["gru"].parameters(), strict=True)
    names |= {name: weight.detach() for name, weight in weights}
    for block in blocks:
        if block.startswith(">>>"):
            assert not failures(block, names)[1]
        else:
            exec(block, names)
        names["x"] = torch.randn(T, B, I)  # the first block's is 28 wide


@each_module
def test_all_that_is_public_has_a_docstring(module: Any) -> None:
    assert inspect.getdoc(module)
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        assert inspect.getdoc(value), f"{module.__name__}.{name}"
        for member, method in vars(value).items() if inspect.isclass(value) else ():
            if not member.startswith("_") and inspect.isfunction(inspect.unwrap(method)):
                assert inspect.getdoc(method), f"{module.__name__}.{name}.{member}"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_every_argument_is_explained(function: Any) -> None:
    text = function.__doc__
    if function in (functional.rnn, functional.gru):
        text += functional.lstm.__doc__  # to which they refer
    for name in inspect.signature(function).parameters.keys() - {"self"}:
        assert re.search(rf"^ *(\w+, )*{name}(, \w+)*:|`{name}`", text, flags=re.MULTILINE), name


@pytest.mark.parametrize("cls", [fused_rnn.RNN, fused_rnn.LSTM, fused_rnn.GRU], ids=lambda cls: cls.__name__)
def test_help_tells_of_every_option(cls: Any) -> None:
    ours, of_torch = cls.__doc__.split(convert.TORCHS_OWN)
    options = [name for name, value in vars(variants.Variants).items() if isinstance(value, variants.Option)]
    assert len(options) >= 6
    for option in ("backend", *options):
        assert f"    {option}: " in ours
    assert inspect.cleandoc(getattr(torch.nn, cls.__name__).__doc__) in of_torch


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason=f"the documentation's sources are not in {ROOT / 'docs'}")
def test_the_reference_page_has_all_public_names() -> None:
    page = (ROOT / "docs" / "index.rst").read_text()
    for name in fused_rnn.__all__:
        assert re.search(rf"^\.\. \w+:: fused_rnn\.{name}\b", page, flags=re.MULTILINE), name
