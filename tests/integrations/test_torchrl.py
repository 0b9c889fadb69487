"""TorchRL's modules give the same results, states and gradients after conversion by fused_rnn's adapter."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import pytest
import torch

import fused_rnn

rl = pytest.importorskip("torchrl.modules", reason='TorchRL is not installed: pip install ".[torchrl]"')
TensorDict = import_module("tensordict").TensorDict
replace = import_module("fused_rnn.integrations.torchrl").replace

MODULES = {"lstm": rl.LSTMModule, "gru": rl.GRUModule}
each_cell = pytest.mark.parametrize("cell", MODULES)


def make(cell: str, **options: Any) -> tuple[Any, Any]:
    """A module and a converted copy with the same keys."""
    hidden = ["h", "c"] if cell == "lstm" else ["h"]
    keys = {"in_keys": ["x", *hidden], "out_keys": ["y", *(("next", key) for key in hidden)]}
    theirs = MODULES[cell](input_size=3, hidden_size=5, num_layers=2, **keys, **options)
    ours = copy.deepcopy(theirs)
    assert replace(ours) == ["", cell]
    return theirs, ours


def data(shape: tuple[int, ...], cell: str, stored: bool, resets: bool = True) -> Any:
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(*shape, 3, generator=generator)
    is_init = (torch.rand(*shape, 1, generator=generator) < 0.3) & resets
    states = {key: torch.randn(*shape, 2, 5, generator=generator) for key in ("h", "c")[: 2 if cell == "lstm" else 1]}
    return TensorDict({"x": x, "is_init": is_init, **(states if stored else {})}, shape)


@each_cell
@pytest.mark.parametrize("resets", [True, False], ids=["resets", "no resets"])
@pytest.mark.parametrize("stored", [True, False], ids=["stored states", "no states"])
@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9)], ids=str)
def test_trajectories(cell: str, shape: tuple[int, ...], stored: bool, resets: bool) -> None:
    results = []
    for module in make(cell):
        with rl.set_recurrent_mode(True):
            output = module(data(shape, cell, stored, resets))
        loss = output["y"].square().sum() + output["next", "h"].sum()
        results.append((output.exclude("is_init").to_dict(), torch.autograd.grad(loss, list(module.parameters()))))
    theirs, ours = results
    torch.testing.assert_close(ours, theirs)


@each_cell
def test_single_steps(cell: str) -> None:
    theirs, ours = (module(data((4,), cell, True)) for module in make(cell))
    torch.testing.assert_close(ours.to_dict(), theirs.to_dict())


@each_cell
@pytest.mark.parametrize("options", [{"python_based": True}, {"bidirectional": True}], ids=["python", "bidirectional"])
def test_other_forms(cell: str, options: dict[str, Any]) -> None:
    """A Python loop is replaced; bidirectional modules keep TorchRL's handling and use the fused kernels."""
    outputs = []
    for module in make(cell, **options):
        with rl.set_recurrent_mode(True):
            outputs.append(module(data((4, 9), cell, False))["y"])
    torch.testing.assert_close(outputs[1], outputs[0])


@each_cell
def test_trajectories_are_one_call(cell: str) -> None:
    _, module = make(cell)
    calls: list[Any] = []
    getattr(module, cell).register_forward_hook(lambda module, args, result: calls.append(args[0].shape))
    with rl.set_recurrent_mode(True):
        module(data((4, 9), cell, True))
    assert calls == [(4, 9, 3)]


def test_one_state_without_the_other_is_torchrls_error() -> None:
    for module in make("lstm"):
        with rl.set_recurrent_mode(True), pytest.raises(RuntimeError, match="hidden1"):
            module(data((4, 9), "lstm", True).exclude("c"))


def test_models_are_searched() -> None:
    keys = {"in_key": "x", "out_key": "y"}
    model = torch.nn.ModuleList([rl.LSTMModule(input_size=3, hidden_size=5, **keys), torch.nn.GRU(3, 5)])
    parameters = list(model.parameters())
    assert replace(model) == ["0", "0.lstm", "1"] and replace(model) == []
    assert isinstance(model[0].lstm, fused_rnn.LSTM)
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
