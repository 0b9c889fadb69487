"""Published tutorials run unchanged on the fused kernels: every code block prints the same as on torch.nn.

The texts are not part of this repository. FUSED_RNN_TUTORIALS names a folder of them: `*.txt` or `*.md`, markdown with
fenced code or notebooks flattened to text (`In [n]:`, code, output, prose). The blocks of a text share a namespace.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_rnn
from contract import fused_calls

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = os.environ.get("FUSED_RNN_TUTORIALS")
TEXTS = sorted(path for path in Path(FOLDER).iterdir() if path.suffix in (".txt", ".md")) if FOLDER else []

LEFT_OUT = {
    "needs a display": re.compile(r"\bmatplotlib\b|\bplt\b"),
    "downloads data": re.compile(r"\btorchvision\b|\bMNIST\b|\bd2l\b|\burllib\b|\bdownload"),
}
"""Which blocks do not run, and why. What does not parse (Python 2, pseudo code) is no block at all."""

NUMBER = re.compile(r"[-+]?\d+\.\d*(?:e[-+]?\d+)?")


def code_blocks(text: str) -> list[str]:
    """The text's code, in order."""
    fenced = re.findall(r"^```(?:python)?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    cells = re.split(r"^In \[[^]]*\]:\n", text, flags=re.MULTILINE)[1:]
    return [code for code in map(longest_code, cells or fenced) if code]


def longest_code(cell: str) -> str:
    """The longest prefix of a cell's paragraphs that is valid Python; output and prose follow it."""
    cell = re.sub(r"^%.*$", "", cell, flags=re.MULTILINE)  # a notebook's own commands
    cell = re.split(r"^tensor\(|^torch\.Size\(", cell, flags=re.MULTILINE)[0]  # output that would parse as code
    paragraphs = cell.split("\n\n")
    for count in range(len(paragraphs), 0, -1):
        code = "\n\n".join(paragraphs[:count]).strip()
        with contextlib.suppress(SyntaxError):
            if ast.parse(code).body:
                return code
    return ""


def run(code: str, namespace: dict[str, Any]) -> tuple[str, str]:
    """The output that a notebook would show, and the name of the error that ends the code."""
    program = compile(ast.Interactive(ast.parse(code).body), "<tutorial>", "single")
    printed, error = io.StringIO(), ""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec(program, namespace)
        except Exception as problem:
            error = type(problem).__name__
    return printed.getvalue(), error


def new_namespace() -> dict[str, Any]:
    # The usual imports, in case their block was left out.
    return {"__name__": "__main__", "torch": torch, "nn": torch.nn}


def assert_same_output(found: str, expected: str) -> None:
    """Equal texts up to spaces; numbers with a fraction may differ by a unit of the last digit, or by rounding."""
    found, expected = (re.sub(r",?\s*grad_fn=<\w+>", "", text) for text in (found, expected))
    texts = [re.sub(r"\s+", "", NUMBER.sub("#", text)) for text in (found, expected)]
    assert texts[0] == texts[1]
    for a, b in zip(NUMBER.findall(found), NUMBER.findall(expected), strict=True):
        digits, _, exponent = b.partition("e")
        unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
        assert float(a) == pytest.approx(float(b), abs=max(1.01 * unit, 1e-6), rel=1e-4), (a, b)


EXAMPLE = """# A tutorial

In [1]:
%matplotlib inline
import math

def f(x):
    return x

f(1.5)

1.5

## More

In [2]:
torch.ones(2)

tensor([1., 1.])

In [3]:
print "old"

In [ ]:
out, h = nn.RNN(2, 3)(torch.ones(4, 1, 2))
out.shape

torch.Size([4, 1, 3])
And so on.
"""


def test_extraction_of_cells() -> None:
    codes = code_blocks(EXAMPLE)
    assert [code.split("\n")[-1] for code in codes] == ["## More", "torch.ones(2)", "out.shape"]
    namespace = new_namespace()
    assert [run(code, namespace) for code in codes[1:]] == [
        ("tensor([1., 1.])\n", ""),
        ("torch.Size([4, 1, 3])\n", ""),
    ]


def test_extraction_of_fences() -> None:
    text = "# Title\n```python\nx = 1\n\n\nx + 1\n```\nprose\n```\nh = f(x) => y\n```\n```\nboom\n```\n"
    codes = code_blocks(text)
    assert codes == ["x = 1\n\n\nx + 1", "boom"]
    assert [run(code, new_namespace()) for code in codes] == [("2\n", ""), ("", "NameError")]


def test_comparison_of_outputs() -> None:
    assert_same_output("loss 0.1235 [ 1.]\n", "loss 0.1234 [1.]\n")
    assert_same_output("tensor([1.], grad_fn=<_LayerBackward>)", "tensor([1.], grad_fn=<TanhBackward0>)")
    for found, expected in (("0.1237", "0.1234"), ("ohlol 1.0", "ollol 1.0"), ("[2, 3]", "[3, 2]"), ("1.0", "")):
        with pytest.raises(AssertionError):
            assert_same_output(found, expected)


@pytest.mark.skipif(not FOLDER, reason="FUSED_RNN_TUTORIALS does not name a folder of tutorial texts")
def test_there_are_texts() -> None:
    assert TEXTS, f"no *.txt or *.md in FUSED_RNN_TUTORIALS={FOLDER}"


@pytest.mark.skipif(not FOLDER, reason="FUSED_RNN_TUTORIALS does not name a folder of tutorial texts")
@pytest.mark.parametrize("path", TEXTS or [Path("none")], ids=lambda path: path.stem)
def test_tutorial(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    plain, patched = new_namespace(), new_namespace()
    ran = with_kernels = 0
    for code in code_blocks(path.read_text(encoding="utf-8")):
        if any(rule.search(code) for rule in LEFT_OUT.values()):
            continue
        expected, error = run(code, plain)
        with fused_calls() as calls, fused_rnn.patched():
            found, found_error = run(code, patched)
        assert found_error == error, code  # a block may fail, but with the same error
        if error:
            continue
        assert_same_output(found, expected)
        ran += 1
        with_kernels += "fused_rnn::forward" in calls
    assert ran >= 2 and with_kernels >= 1, f"{ran} blocks ran, {with_kernels} of them used the kernels"
