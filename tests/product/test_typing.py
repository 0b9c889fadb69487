"""The package's types as a user's type checker sees them: checked by `mypy` and run by pytest.

mypy reports unneeded `type: ignore` comments, so each such line proves that mypy rejects it.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typing_extensions import assert_type

import fused_rnn
from fused_rnn import _C, constructor, functional, planning, reference
from fused_rnn.convert import Replaced

PACKAGE = Path(fused_rnn.__file__).parent


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_the_stub_names_what_the_extension_has() -> None:
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    names = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    names |= {ast.unparse(node.target) for node in stub.body if isinstance(node, ast.AnnAssign)}
    names |= {node.name for node in stub.body if isinstance(node, ast.ClassDef) and not node.bases}  # no TypedDict
    assert names == {name for name in dir(_C) if not name.startswith("_")}


def test_options_are_those_that_the_constructors_take() -> None:
    taken = {name for name, value in vars(constructor.Variants).items() if isinstance(value, constructor.Option)}
    assert set(constructor.Options.__annotations__) == taken | {"backend"}


def test_modules() -> None:
    lstm = fused_rnn.LSTM(3, 5, 2, dropout=0.1, proj_size=4, zoneout=(0.1, 0.2), backend="fused")
    assert_type(lstm, fused_rnn.LSTM)
    assert_type(lstm.zoneout, float | tuple[float, float])
    y, state = lstm.step(torch.randn(2, 3))
    assert_type(y, Tensor)
    assert y.shape == (2, 4) and len(state) == 2
    assert_type(fused_rnn.RNN(3, [5, 4], nonlinearity="relu").forget_bias, float | None)
    assert_type(fused_rnn.LSTMCell(3, 5).forward(torch.randn(2, 3)), tuple[Tensor, Tensor])


def test_wrong_options() -> None:
    for wrong in (
        lambda: fused_rnn.GRU(3, 5, zoneout="much"),  # type: ignore[arg-type]
        lambda: fused_rnn.GRU(3, 5, recompute="half"),  # type: ignore[arg-type]
        lambda: fused_rnn.GRU(3, 5, proj_size=4),  # type: ignore[call-arg]
        lambda: fused_rnn.LSTM(3, 5, layernorm=True),  # type: ignore[call-arg]
    ):
        with pytest.raises((TypeError, ValueError)):
            wrong()


def test_functions() -> None:
    names: list[str] = fused_rnn.replace(torch.nn.Sequential(torch.nn.GRU(3, 5)))
    assert_type(fused_rnn.replace(torch.nn.Sequential(torch.nn.GRU(3, 5))), Replaced)
    assert_type(Replaced(names).skipped, dict[str, str])
    assert_type(fused_rnn.plan("gru", device="cpu"), planning.Plan)
    weights = [torch.randn(15, 3), torch.randn(15, 5), None, None, None]
    y, h_n, c_n, *_ = reference.layer("gru", torch.randn(7, 2, 3), None, None, weights)
    assert_type(y, Tensor)
    assert_type(c_n, Tensor | None)
    assert functional.gru(torch.randn(7, 2, 3), [w for w in weights if w is not None])[0].shape == y.shape
    assert h_n.shape == (1, 2, 5)
