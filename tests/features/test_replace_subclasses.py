"""User subclasses of torch.nn's classes: which of them `replace` converts, and that they keep the user's class.

Converted modules are compared with the originals; a subclass that overrides something relevant must be left alone.
"""

from __future__ import annotations

import abc
import copy
import importlib
import pickle
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_rnn
from contract import NAMES, arguments, close, fused_calls, gradients, tensors
from fused_rnn.convert import Replaced
from processes import python, succeeded, this_path

pytestmark = pytest.mark.usefixtures("one_thread")

SUBCLASSES = {name: type(f"My{name}", (getattr(nn, name),), {"__module__": __name__}) for name in NAMES}
globals().update({cls.__name__: cls for cls in SUBCLASSES.values()})  # where pickle looks them up
each_name = pytest.mark.parametrize("name", NAMES)


class Encoder(nn.LSTM):
    """A typical subclass, with its own arguments, initialisation, repr, methods and submodules."""

    def __init__(self, size: int) -> None:
        super().__init__(size, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)

    def extra_repr(self) -> str:
        return f"size={self.input_size}"

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self(x)[0][:, -1])


class Restartable(abc.ABC, nn.RNNBase):
    """An abstract base between torch.nn's class and the user's, as in forecasting packages."""

    @abc.abstractmethod
    def zeros(self, batch: int) -> Any: ...


class RestartableGRU(Restartable, nn.GRU):
    def zeros(self, batch: int) -> Tensor:
        return torch.zeros(self.num_layers, batch, self.hidden_size)


class Stepping(nn.GRU):
    """It has its own `step`, which must be kept."""

    def step(self, x: Tensor) -> str:
        return f"{x.dim()} dimensions"


def replaced(model: nn.Module) -> Replaced:
    """The result of replace; warnings become errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fused_rnn.replace(model)


def converted(module: Any) -> Any:
    assert replaced(module) == [""]
    return module


# Converted


@each_name
def test_a_subclass_that_adds_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SUBCLASSES[name](3, 5))
    module = model[0]
    args = arguments(module, grad=True)
    wanted, wanted_gradients, text = module(*args), gradients(module, *args), repr(model)
    assert replaced(model) == ["0"]
    assert model[0] is module and repr(model) == text
    assert isinstance(module, SUBCLASSES[name]) and isinstance(module, getattr(fused_rnn, name))
    close(module(*args), wanted)
    close(gradients(module, *args), wanted_gradients, grad=True)
    with fused_calls() as calls, torch.no_grad():
        module(*args)
    assert calls
    assert replaced(model) == []


@each_name
def test_there_and_back(name: str) -> None:
    plain = SUBCLASSES[name](3, 5)
    with pytest.raises(TypeError, match=f"got My{name}"):
        fused_rnn.from_torch(plain)  # would return another object, of a class that the user did not name
    fused = converted(copy.copy(plain))
    back = fused.to_torch()
    assert isinstance(fused, getattr(fused_rnn, name)) and type(back) is type(plain) is SUBCLASSES[name]
    assert all(p is q is r for p, q, r in zip(plain.parameters(), fused.parameters(), back.parameters(), strict=True))
    assert vars(back).keys() == vars(plain).keys()
    assert type(converted(back)) is type(fused)


def test_methods_arguments_and_text_stay_the_users() -> None:
    module = Encoder(3)
    x = torch.randn(4, 6, 3)
    wanted, text = module.classify(x), repr(module)
    assert replaced(module) == [""]
    with fused_calls() as calls:
        close(module.classify(x), wanted)
    assert "fused_rnn::forward" in calls
    assert repr(module) == text
    nn.init.zeros_(module.weight_hh_l0)
    module.reset_parameters()
    assert (module.weight_hh_l0 == 0.1).all()
    output, states = module(x, lengths=torch.tensor([6, 2, 0, 3]))  # fused_rnn's own keywords
    assert output.shape == (4, 6, 5) and not output[2].any() and len(states) == 2


def test_an_abstract_base_in_between() -> None:
    module = RestartableGRU(3, 5)
    x = torch.randn(4, 2, 3)
    wanted = module(x, module.zeros(2))
    assert replaced(nn.ModuleList([module])) == ["0"]
    close(module(x, module.zeros(2)), wanted)
    assert isinstance(module, Restartable) and isinstance(module, fused_rnn.GRU)


def test_a_step_of_the_users_own() -> None:
    module = Stepping(3, 5)
    assert replaced(module) == [""]
    assert module.step(torch.ones(2, 3)) == "2 dimensions"


def test_modules_of_one_class_share_the_new_one() -> None:
    model = nn.Sequential(Encoder(3), Encoder(2))
    replaced(model)
    assert type(model[0]) is type(model[1])
    assert type(converted(Encoder(4))) is type(model[0])
    another = type(model[0])(4)  # user code that constructs a second module like the first
    with fused_calls() as calls:
        assert another.classify(torch.ones(2, 3, 4)).shape == (2, 2)
    assert "fused_rnn::forward" in calls


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol: int) -> None:
    module = converted(Encoder(3))
    twin = pickle.loads(pickle.dumps(module, protocol))
    assert type(twin) is type(module)
    x = torch.randn(2, 4, 3)
    close(twin.classify(x), module.classify(x))


@each_name
@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy], ids=lambda f: f.__name__)
def test_copies(name: str, make: Callable[[nn.Module], nn.Module]) -> None:
    module = converted(SUBCLASSES[name](3, 5))
    twin = make(module)
    assert type(twin) is type(module) and twin is not module
    shared = [p is q for p, q in zip(twin.parameters(), module.parameters(), strict=True)]
    assert all(shared) if make is copy.copy else not any(shared)
    close(twin(*arguments(twin)), module(*arguments(module)))


USERS_MODULE = """
import torch
class Tagger(torch.nn.GRU):
    pass
"""
LOAD = """
import torch
model, x, y = torch.load("model.pt", weights_only=False)
import fused_rnn, users_tagger
assert isinstance(model[0], users_tagger.Tagger) and isinstance(model[0], fused_rnn.GRU), type(model[0]).__mro__
assert type(model[0].to_torch()) is users_tagger.Tagger
torch.testing.assert_close(model(x)[0], y)
"""


def test_torch_save_and_load_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "users_tagger.py"
    source.write_text(USERS_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    users_tagger = importlib.import_module("users_tagger")
    model, x = nn.Sequential(users_tagger.Tagger(3, 5)), torch.ones(2, 1, 3)
    replaced(model)
    torch.save((model, x, model(x)[0]), tmp_path / "model.pt")
    succeeded(python("-c", LOAD, cwd=tmp_path, PYTHONPATH=this_path()))

    # Once the class has a forward of its own, a loaded module runs only that.
    source.write_text(USERS_MODULE.replace("pass", "def forward(self, *args): return ('another',)"))
    users_tagger = importlib.reload(users_tagger)
    model, x, _ = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(model[0]) is users_tagger.Tagger and model(x) == ("another",)


def test_parametrisations_fx_and_script() -> None:
    x = torch.ones(4, 2, 3)
    module = converted(MyGRU(3, 5))  # type: ignore[name-defined]  # noqa: F821
    mixed = type(module)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    module(x)
    nn.utils.parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is mixed
    model = nn.Sequential(module)
    graph = torch.fx.symbolic_trace(model).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]
    cell = converted(MyGRUCell(3, 5))  # type: ignore[name-defined]  # noqa: F821
    close(torch.jit.script(nn.Sequential(cell))(x[0]), cell(x[0]))


# Left alone: the user has overridden something that a forward relies on

OVERRIDDEN = {
    "forward": lambda self, x: ("mine",),
    "check_input": lambda self, input, batch_sizes: None,
    "check_forward_args": lambda self, input, hidden, batch_sizes: None,
    "check_hidden_size": lambda self, hx, expected, msg="": None,
    "get_expected_hidden_size": lambda self, input, batch_sizes: (1, 2, 5),
    "permute_hidden": lambda self, hx, permutation: hx,
    "_update_flat_weights": lambda self: None,
    "_init_flat_weights": nn.RNNBase._init_flat_weights,
    "backend": "gloo",  # an attribute of fused_rnn
    "_plain": lambda self, x: ("mine",),
    "__getattr__": lambda self, name: nn.Module.__getattr__(self, name),
    "__reduce__": lambda self: (type(self), (3, 5)),
    "__init_subclass__": classmethod(lambda cls: None),
    "weight_of_nothing": property(lambda self: torch.ones(1)),
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden(name: str) -> None:
    cls = type("Overriding", (nn.GRU,), {name: OVERRIDDEN[name]})
    model = nn.Sequential(cls(3, 5))
    x = torch.ones(2, 2, 3)
    wanted = model(x)
    with pytest.warns(UserWarning, match=rf"left 1 module as before:\n  0: its class Overriding overrides {name}:"):
        result = fused_rnn.replace(model)
    assert result == [] and list(result.skipped) == ["0"]
    assert type(model[0]) is cls
    close(tensors(model(x)), tensors(wanted))
    with pytest.raises(TypeError, match=f"got Overriding: its class Overriding overrides {name}"):
        fused_rnn.from_torch(model[0])


def test_overridden_in_a_class_that_is_mixed_in() -> None:
    class Doubling:
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)[0]  # type: ignore[misc]

    class DoublingGRU(Doubling, nn.GRU):
        pass

    module = DoublingGRU(3, 5)
    with pytest.warns(UserWarning, match="DoublingGRU overrides forward"):
        assert fused_rnn.replace(module) == []
    assert type(module) is DoublingGRU


def test_another_metaclass() -> None:
    class Meta(type):
        pass

    class WithMeta(nn.GRU, metaclass=Meta):
        pass

    with pytest.warns(UserWarning, match="has the metaclass .*Meta"):
        assert fused_rnn.replace(WithMeta(3, 5)) == []


@pytest.mark.parametrize("cls", [nn.GRU, SUBCLASSES["GRU"]], ids=["torch.nn's", "a user's"])
def test_attributes_of_the_instance(cls: type[nn.GRU]) -> None:
    def wrapped(self: nn.GRU, x: Tensor) -> Tensor:
        return 2 * nn.GRU.forward(self, x)[0]

    names = ("forward", "check_input", "backend", "step", "resets")
    model = nn.Sequential(*(cls(3, 5) for _ in names))
    modules = dict(zip(names, model, strict=True))
    modules["forward"].forward = types.MethodType(wrapped, modules["forward"])
    modules["check_input"].check_input = lambda *_: None
    modules["backend"].backend = "gloo"
    modules["step"].register_buffer("step", torch.zeros(1))  # would be hidden by our method of that name
    modules["resets"].resets = 3  # harmless
    x = torch.ones(2, 2, 3)
    wanted = modules["forward"](x)
    with pytest.warns(UserWarning):
        result = fused_rnn.replace(model)
    assert result == ["4"]
    assert list(result.skipped) == ["0", "1", "2", "3"]
    for why, name in zip(result.skipped.values(), names, strict=False):
        assert f"it has {name} as an attribute of its own" in why
    close(modules["forward"](x), wanted)
