"""The report of `replace`: every recurrent module that it left unchanged, the reason, and an alternative.

Each reason is provoked by a small model; the alternatives that the texts name are tried.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_rnn
from contract import close, fused_calls
from fused_rnn.convert import Replaced

X = torch.ones(4, 2, 3)


class Flipping(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(input.flip(0), hx)


class FromTheBase(nn.RNNBase):
    """torch.nn's parameters with a loop of its own, as in TorchRL's Python LSTM."""

    def __init__(self) -> None:
        super().__init__("LSTM", 3, 5)

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight_ih_l0.T


class Lazy(nn.modules.lazy.LazyModuleMixin, nn.GRUCell):
    cls_to_become = nn.GRUCell  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(1, 5)
        self.weight_ih = nn.UninitializedParameter()

    def initialize_parameters(self, input: Tensor, hx: Any = None) -> None:
        self.input_size = input.size(-1)
        self.weight_ih.materialize((15, self.input_size))
        nn.init.zeros_(self.weight_ih)


def parametrised() -> nn.Module:
    module = nn.GRU(3, 5)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    return module


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(3, 5)), {nn.LSTM})[0]


def frozen() -> nn.Module:
    return torch.jit.freeze(torch.jit.script(nn.Sequential(nn.GRUCell(3, 5)).eval()))


def exported() -> nn.Module:
    return torch.export.export(nn.Sequential(nn.LSTM(3, 5)), (X,)).module()


LEFT_ALONE = {
    "flipping": (lambda: Flipping(3, 5), "overrides forward: run it under fused_rnn.patched(), or derive its class"),
    "from_the_base": (FromTheBase, "derives from none of torch.nn's RNN, LSTM"),
    "lazy": (Lazy, "not initialised: replace after the first call"),
    "parametrised": (parametrised, "parametrised: replace before the parametrisation is registered, or run it under"),
    "quantised": (quantised, "quantised: the kernels compute in floating point"),
    "scripted.0": (lambda: torch.jit.script(nn.Sequential(nn.LSTM(3, 5))), "TorchScript program"),
    "frozen": (frozen, "TorchScript program"),
    "exported": (exported, "replace before the model is traced or exported"),
}
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning"),
]


def replaced(model: nn.Module) -> tuple[Replaced, list[str]]:
    """The result of replace, and the texts of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fused_rnn.replace(model)
    assert all(warning.filename == __file__ for warning in caught)  # the caller's line
    return result, [str(warning.message) for warning in caught]


def test_one_warning_names_all() -> None:
    modules = {name.split(".")[0]: make() for name, (make, _) in LEFT_ALONE.items()}
    model = nn.ModuleDict({**modules, "plain": nn.GRU(3, 5), "linear": nn.Linear(3, 5)})
    types = {name: type(module) for name, module in model.named_modules()}
    result, (text,) = replaced(model)
    assert result == ["plain"]
    assert result.skipped.keys() == LEFT_ALONE.keys()
    for name, (_, reason) in LEFT_ALONE.items():
        assert reason in result.skipped[name], name
        assert f"  {name}: " in text or f" {name}" in text
        assert result.skipped[name] in text
    assert f"left {len(LEFT_ALONE)} modules as before:" in text
    changed = {name for name, module in model.named_modules() if type(module) is not types[name]}
    assert changed == {"plain"}


def test_no_warning_when_nothing_was_left_alone() -> None:
    model = nn.ModuleDict({"a": nn.GRU(3, 5), "b": fused_rnn.LSTM(3, 5), "c": nn.Sequential(nn.Linear(2, 2))})
    model["d"] = torch.jit.script(nn.Linear(2, 2))
    model["e"] = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    assert replaced(model) == (["a"], [])
    assert replaced(model) == ([], [])


def test_the_ways_that_the_reasons_name() -> None:
    """patched() reaches forwards that call torch.nn's; a lazy module can be converted after its first call."""
    module = Flipping(3, 5)
    wanted = module(X)
    with fused_calls() as calls, fused_rnn.patched():
        close(module(X), wanted)
    assert "fused_rnn::forward" in calls
    module = parametrised()
    with fused_calls() as calls, fused_rnn.patched():
        module(X)
    assert "fused_rnn::forward" in calls
    lazy = Lazy()
    lazy(X[0])
    assert replaced(lazy) == ([""], [])


def test_the_list() -> None:
    result = Replaced(["a", "b"], {"c": "because"})
    assert result == ["a", "b"] and isinstance(result, list)
    assert repr(result) == "Replaced(['a', 'b'], skipped={'c': 'because'})"
    assert repr(Replaced(["a"])) == "['a']" and Replaced().skipped == {}
    for twin in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert twin == result and twin.skipped == result.skipped


def test_many_of_one_reason_take_one_line() -> None:
    _, (text,) = replaced(nn.Sequential(*(Flipping(3, 5) for _ in range(40))))
    assert "left 40 modules as before:\n  0, 1, 2, 3, 4 and 35 more: its class Flipping overrides forward" in text
    assert text.count("\n") == 1
    _, (text,) = replaced(Flipping(3, 5))
    assert "\n  the model itself: " in text


# Networks outside of named_modules()


class PPOLoss(nn.Module):
    """Networks stored in __dict__, so that parameters are listed once, as in TorchRL's ClipPPOLoss."""

    def __init__(self, actor: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.__dict__["actor_network"] = actor
        self.__dict__["critic_network"] = critic
        self.actor_network_params = nn.ParameterList(actor.parameters())


def test_networks_of_a_loss() -> None:
    actor = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 5))
    loss = PPOLoss(actor, nn.Linear(3, 1))
    result, (text,) = replaced(loss)
    assert result == [] and list(result.skipped) == ["actor_network.1"]
    assert "named_modules() does not see it: replace before the loss or agent that holds it is built" in text
    assert type(actor[1]) is nn.LSTM  # inspected, not changed
    assert replaced(loss.actor_network) == (["1"], [])
    assert replaced(loss) == ([], [])


class Agent(nn.Module):
    """Networks in lists, dicts, tuples and attributes, a cycle, and one network that is also a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Sequential(nn.GRU(3, 5))
        self.targets = [copy.deepcopy(self.policy), Flipping(3, 5)]
        self.heads = {"a": (nn.LSTM(3, 5), 1.0, None), 2: {nn.Linear(1, 1)}}
        self.seen = [self.policy[0]]
        self.targets[0].owner = [self]
        self.targets.append(self.targets)  # type: ignore[arg-type]
        self.targets[0].spares = [nn.GRUCell(3, 5), fused_rnn.GRU(3, 5)]


def test_networks_in_containers() -> None:
    agent = Agent()
    result, (_,) = replaced(agent)
    assert result == ["policy.0"]
    # owner and spares were set after the deepcopy, so no other network holds copies of them.
    assert set(result.skipped) == {"targets[0].0", "targets[1]", "heads['a'][0]", "targets[0].spares[0]"}
    for name in result.skipped:
        assert isinstance(eval(f"agent.{name}".replace("targets[0].0", "targets[0][0]")), (nn.RNNBase, nn.GRUCell))


class Endless(list):  # type: ignore[type-arg]
    """An unbounded list, such as a replay buffer, which must not be searched completely."""

    taken = 0

    def __iter__(self) -> Iterator[int]:
        for i in itertools.count():
            self.taken += 1
            yield i


def test_large_containers_are_not_searched_to_the_end() -> None:
    model = nn.Linear(2, 2)
    model.buffer, model.deep = Endless(), [[[[[[nn.GRU(2, 2)]]]]]]
    assert replaced(model) == ([], [])
    assert 0 < model.buffer.taken < 10_000


# Wrappers


def test_a_compiled_model_is_converted_inside() -> None:
    model = nn.Sequential(nn.GRU(3, 5))
    compiled = torch.compile(model, backend="eager")
    wanted = compiled(X)
    assert replaced(compiled) == (["_orig_mod.0"], [])
    with fused_calls() as calls:
        close(compiled(X), wanted)
    assert "fused_rnn::forward" in calls


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_a_sharded_module() -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.LSTM(3, 5))
        wanted = model(X)
        fully_shard(model[0], mesh=mesh)
        result, (text,) = replaced(model)
        assert result == [] and "it is sharded: replace before fully_shard" in text
        with fused_calls() as calls, fused_rnn.patched():
            close(model(X), wanted)
        assert "fused_rnn::forward" in calls
        root = nn.Sequential(nn.LSTM(3, 5))  # its layer is sharded by the enclosing model
        wanted = root(X)
        fully_shard(root, mesh=mesh)
        assert replaced(root) == (["0"], [])
        close(root(X), wanted)
    finally:
        torch.distributed.destroy_process_group()
