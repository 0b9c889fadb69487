"""from_torch, to_torch and replace: which modules are converted, which tensors are shared, and which state is kept.

Converted models are compared with the originals: results, gradients, hooks, modes and checkpoints.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_rnn
from contract import (
    COPIES,
    MODULES,
    NAMES,
    arguments,
    close,
    each_module,
    fused_calls,
    gradients,
    pair,
    tensors,
)

pytestmark = pytest.mark.usefixtures("one_thread")

each_name = pytest.mark.parametrize("name", NAMES)


def make(library: Any, name: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(library, name)(3, 5)


def same_parameters(a: nn.Module, b: nn.Module) -> bool:
    first, second = dict(a.named_parameters()), dict(b.named_parameters())
    return first.keys() == second.keys() and all(first[name] is second[name] for name in first)


each_copy = pytest.mark.parametrize("way", COPIES)


class Tagger(nn.Module):
    """Nested modules to convert: in a list, a dictionary, a sequence, one used twice, and others in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 3)
        self.encoder = nn.LSTM(3, 4, 2, bidirectional=True, dropout=0.2)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 6), nn.Tanh()), nn.GRU(6, 6)])
        self.cells = nn.ModuleDict({"a": nn.GRUCell(6, 6), "b": nn.RNNCell(6, 6)})
        self.again = self.blocks[1]
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.encoder(self.embedding(tokens))
        x, _ = self.blocks[1](self.blocks[0](x))
        x, _ = self.again(x)
        return self.out(self.norm(self.cells["b"](self.cells["a"](x[-1]))))


CONVERTED = ["encoder", "blocks.1", "cells.a", "cells.b"]  # `again` is the same module as blocks.1


class FlippingLSTM(nn.LSTM):
    """A user's subclass of torch.nn.LSTM that computes something else and contains a convertible module."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.inner = nn.GRU(3, 3)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(self.inner(input.flip(0))[0], hx)


class DoublingLSTM(fused_rnn.LSTM):
    """A user's subclass of fused_rnn.LSTM with its own forward."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        output, hidden = super().forward(input, hx)
        return 2 * output, hidden


class NamedLSTM(fused_rnn.LSTM):
    """A user's subclass of fused_rnn.LSTM with no change."""

    def __init__(self, *args: Any, name: str = "none") -> None:
        super().__init__(*args)
        self.name = name


# from_torch and to_torch


@each_module
def test_there_and_back(key: str) -> None:
    plain, _ = pair(key)
    fused = fused_rnn.from_torch(plain)
    back = fused.to_torch()
    name = MODULES[key][0]
    assert type(plain) is type(back) is getattr(nn, name) and type(fused) is getattr(fused_rnn, name)
    assert back is not plain and fused is not plain
    assert same_parameters(plain, fused) and same_parameters(plain, back)
    assert list(fused.state_dict()) == list(plain.state_dict()) == list(back.state_dict())
    args = arguments(plain, grad=True)
    for module in (fused, back):
        close(module(*args), plain(*args))
        close(gradients(module, *args), gradients(plain, *args), grad=True)
    assert repr(fused) == repr(plain) == repr(back)
    wanted, first = plain(*args), next(iter(plain.state_dict()))
    setattr(fused, first, nn.Parameter(torch.zeros_like(getattr(fused, first))))  # of this module alone
    close(plain(*args), wanted)
    close(back(*args), wanted)


@each_name
def test_only_ours_calls_the_kernels(name: str) -> None:
    plain = make(nn, name)
    fused = fused_rnn.from_torch(plain)
    for module, expected in ((plain, False), (fused, True), (fused.to_torch(), False)):
        with fused_calls() as calls, torch.no_grad():  # an RNNCell trains on torch.nn's operators
            module(*arguments(module))
        assert bool(calls) == expected


@each_name
def test_from_torch_of_ours_is_itself(name: str) -> None:
    module = make(fused_rnn, name)
    assert fused_rnn.from_torch(module) is module


@each_name
def test_parameters_are_shared_in_both_directions(name: str) -> None:
    plain = make(nn, name)
    fused = fused_rnn.from_torch(plain)
    back = fused.to_torch()
    trio = (plain, fused, back)
    for changed in trio:
        before = fused(*arguments(fused))
        with torch.no_grad():
            next(changed.parameters()).mul_(2)
        for module in trio:
            close(module(*arguments(module)), plain(*arguments(plain)))
        assert not torch.allclose(tensors(fused(*arguments(fused)))[0], tensors(before)[0])
    tensors(fused(*arguments(fused)))[0].sum().backward()
    assert all(p.grad is not None for p in plain.parameters())
    plain.zero_grad()
    assert all(p.grad is None for p in back.parameters())


@each_name
def test_loading_weights_reaches_the_other(name: str) -> None:
    plain, other = make(nn, name), make(nn, name)
    other.reset_parameters()
    fused = fused_rnn.from_torch(plain)
    fused.load_state_dict(other.state_dict())
    close(plain(*arguments(plain)), other(*arguments(other)))


@each_name
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype(name: str, dtype: torch.dtype) -> None:
    plain = make(nn, name).to(dtype)
    fused = fused_rnn.from_torch(plain)
    assert {p.dtype for p in fused.parameters()} == {dtype}
    close(fused(*arguments(fused)), plain(*arguments(plain)))
    fused.float()  # changes the parameters of both
    close(plain(*arguments(plain)), fused(*arguments(fused)))


@each_name
def test_mode_is_taken_over_and_then_each_modules_own(name: str) -> None:
    plain = make(nn, name).eval()
    fused = fused_rnn.from_torch(plain)
    assert not fused.training and not fused.to_torch().training
    fused.train()
    assert fused.to_torch().training and not plain.training


def test_dropout_follows_the_mode() -> None:
    torch.manual_seed(0)
    plain = nn.LSTM(3, 5, 3, dropout=0.5)
    fused = fused_rnn.from_torch(plain)
    args = arguments(plain)
    for train in (True, False):
        results = []
        for module in (plain.train(train), fused.train(train)):
            torch.manual_seed(1)
            results.append(module(*args))
        close(*results)


@pytest.mark.parametrize("convert", [fused_rnn.from_torch, lambda module: fused_rnn.from_torch(module).to_torch()])
def test_hooks_are_kept(convert: Callable[[nn.Module], nn.Module]) -> None:
    plain, seen = nn.GRU(3, 5), []
    plain.register_forward_pre_hook(lambda *_: seen.append("before"))
    plain.register_forward_hook(lambda *_: seen.append("after"))
    plain.register_full_backward_hook(lambda *_: seen.append("backward"))
    plain.register_state_dict_post_hook(lambda *_: seen.append("state"))
    converted = convert(plain)
    converted(torch.randn(2, 1, 3, requires_grad=True))[0].sum().backward()
    converted.state_dict()
    assert seen == ["before", "after", "backward", "state"]
    converted.register_forward_hook(lambda *_: seen.append("new"))
    seen.clear()
    plain(torch.randn(2, 1, 3))
    assert "new" not in seen


def test_attributes_and_buffers_are_kept() -> None:
    plain = nn.GRU(3, 5)
    plain.note = "mine"
    plain.register_buffer("steps", torch.tensor(3))
    plain.weight_ih_l0.requires_grad_(False)
    for module in (fused_rnn.from_torch(plain), fused_rnn.from_torch(plain).to_torch()):
        assert module.note == "mine" and module.steps is plain.steps
        assert not module.weight_ih_l0.requires_grad and module.weight_hh_l0.requires_grad
        module.register_buffer("own", torch.zeros(1))
        assert not hasattr(plain, "own")


@each_name
@each_copy
def test_copies_of_converted_modules(name: str, way: str) -> None:
    fused = fused_rnn.from_torch(make(nn, name))
    for module, library in ((fused, fused_rnn), (fused.to_torch(), nn)):
        twin = COPIES[way](module)
        assert type(twin) is getattr(library, name)
        assert not any(p is q for p, q in zip(twin.parameters(), module.parameters(), strict=True))
        close(twin(*arguments(twin)), module(*arguments(module)))


@each_name
def test_a_pickle_of_torchs_module_does_not_need_this_package(name: str) -> None:
    assert b"fused_rnn" not in pickle.dumps(fused_rnn.from_torch(make(nn, name)).to_torch())


def test_from_torch_refuses_other_classes() -> None:
    for wrong, called in ((FlippingLSTM(3, 5), "FlippingLSTM"), (nn.Linear(3, 5), "Linear"), (3, "int")):
        with pytest.raises(TypeError, match=f"torch.nn's RNN, LSTM, GRU, .*Cell, got {called}"):
            fused_rnn.from_torch(wrong)
    with pytest.raises(TypeError, match=r"replace: expected model to be a torch.nn.Module, got int"):
        fused_rnn.replace(3)


def test_to_torch_of_a_users_subclass() -> None:
    fused = NamedLSTM(3, 5, name="mine")
    plain = fused.to_torch()
    assert type(plain) is nn.LSTM and plain.name == "mine" and same_parameters(plain, fused)
    close(plain(*arguments(plain)), fused(*arguments(fused)))
    assert fused_rnn.from_torch(fused) is fused
    assert type(fused_rnn.from_torch(plain)) is fused_rnn.LSTM


# TorchScript accepts only exact classes, so models go through to_torch


def test_scripting_a_model_keeps_its_results_and_parameters() -> None:
    # torch.jit.script replaces modules of the eager model by their to_torch() (docs/compatibility.md).
    model = nn.Sequential(fused_rnn.GRU(3, 5))
    module, input = model[0], torch.ones(2, 1, 3)
    wanted = model(input)
    scripted = torch.jit.script(model)
    close(scripted(input), wanted)
    close(model(input), wanted)
    assert all(a is b for a, b in zip(model[0].parameters(), module.parameters(), strict=True))


def test_scripting_a_users_forward_is_right_or_refused() -> None:
    model = nn.Sequential(DoublingLSTM(3, 5))
    input = torch.ones(2, 1, 3)
    wanted = model(input)
    try:
        scripted = torch.jit.script(model)
    except Exception:
        scripted = model  # as for a subclass of torch.nn.LSTM that calls super().forward
    close(scripted(input), wanted)
    close(model(input), wanted)


# replace


def test_replace_returns_names_and_keeps_everything_else() -> None:
    model = Tagger().eval()
    model.encoder.weight_ih_l0.requires_grad_(False)
    tokens = torch.arange(12).view(4, 3) % 7
    wanted = model(tokens)
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    parameters, text = dict(model.named_parameters()), repr(model)

    assert fused_rnn.replace(model) == CONVERTED
    for name, module in model.named_modules():
        assert module is modules[name]  # the same object, so that other references stay valid
        assert isinstance(module, (fused_rnn.LSTM, fused_rnn.GRU, fused_rnn.GRUCell, fused_rnn.RNNCell)) == (
            name in CONVERTED
        )
    assert model.again is model.blocks[1]
    assert repr(model) == text
    assert not any(module.training for module in model.modules())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not model.encoder.weight_ih_l0.requires_grad and model.encoder.weight_hh_l0.requires_grad
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.encoder.dropout == 0.2 and model.encoder.num_layers == 2
    with fused_calls() as calls:
        close(model(tokens), wanted)
    assert calls.count("fused_rnn::forward") == 5  # two layers, the repeated module twice, the GRUCell
    assert fused_rnn.replace(model) == []


@each_module
def test_replace_of_the_root(key: str) -> None:
    model, _ = pair(key)
    args = arguments(model, grad=True)
    wanted, wanted_gradients, same = model(*args), gradients(model, *args), model
    assert fused_rnn.replace(model) == [""]
    assert model is same and type(model) is getattr(fused_rnn, MODULES[key][0])
    close(model(*args), wanted)
    close(gradients(model, *args), wanted_gradients, grad=True)


def test_replace_without_anything_to_do() -> None:
    assert fused_rnn.replace(nn.Sequential(nn.Linear(2, 2))) == []
    assert fused_rnn.replace(fused_rnn.LSTM(2, 2)) == []


def test_replace_keeps_hooks() -> None:
    model, seen = nn.Sequential(nn.GRU(3, 5)), []
    handle = model[0].register_forward_hook(lambda *_: seen.append("hook"))
    fused_rnn.replace(model)
    model(torch.ones(2, 1, 3))
    handle.remove()
    model(torch.ones(2, 1, 3))
    assert seen == ["hook"]


def test_replace_in_the_middle_of_a_training() -> None:
    """An optimiser created before `replace` continues with its state."""
    tokens = torch.arange(12).view(4, 3) % 7
    models, optimizers = [Tagger().double(), Tagger().double()], []
    for model in models:
        model.encoder.dropout = 0.0
        optimizers.append(torch.optim.Adam(model.parameters(), lr=0.01))
    losses: list[list[float]] = [[], []]
    for step in range(6):
        if step == 3:
            assert fused_rnn.replace(models[1]) == CONVERTED
        for model, optimizer, values in zip(models, optimizers, losses, strict=True):
            loss = model(tokens).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)
    assert losses[1][-1] < losses[1][2]
    close(list(models[1].parameters()), list(models[0].parameters()))


def test_replace_leaves_users_subclasses_alone() -> None:
    model = nn.Sequential(FlippingLSTM(3, 5))
    input = torch.randn(4, 2, 3)
    wanted = model(input)
    assert fused_rnn.replace(model) == ["0.inner"]
    assert type(model[0]) is FlippingLSTM and type(model[0].inner) is fused_rnn.GRU
    close(model(input), wanted)


def test_replace_leaves_parametrized_modules_alone() -> None:
    model = nn.Sequential(nn.GRU(3, 5))
    nn.utils.parametrizations.weight_norm(model[0], "weight_hh_l0")
    kind, wanted = type(model[0]), model(torch.ones(2, 1, 3))
    assert fused_rnn.replace(model) == []
    assert type(model[0]) is kind
    close(model(torch.ones(2, 1, 3)), wanted)


def test_replace_leaves_quantised_and_scripted_modules_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(3, 5)), {nn.LSTM})
        scripted = torch.jit.script(nn.Sequential(nn.LSTM(3, 5)))
    for model in (quantised, scripted):
        wanted = model(torch.ones(2, 1, 3))
        assert fused_rnn.replace(model) == []
        close(model(torch.ones(2, 1, 3)), wanted)


@each_copy
def test_copies_of_a_replaced_model(way: str) -> None:
    model = Tagger().eval()
    fused_rnn.replace(model)
    twin = COPIES[way](model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert twin.again is twin.blocks[1]
    tokens = torch.arange(12).view(4, 3) % 7
    close(twin(tokens), model(tokens))


def test_a_replaced_model_goes_back_by_to_torch() -> None:
    model = Tagger().eval()
    tokens = torch.arange(12).view(4, 3) % 7
    fused_rnn.replace(model)
    wanted = model(tokens)
    for name in ("encoder", "again"):
        setattr(model, name, getattr(model, name).to_torch())
    model.blocks[1] = model.again
    assert type(model.encoder) is nn.LSTM and type(model.again) is nn.GRU
    close(model(tokens), wanted)
