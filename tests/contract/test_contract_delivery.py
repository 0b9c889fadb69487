"""Conversion, the patch, and user code that works on torch.nn's internals."""

import io
import pickle

import pytest
import torch
from torch import nn

import fused_rnn
from contract import (
    HIDDEN,
    INPUT,
    MODULES,
    NAMES,
    arguments,
    close,
    each_call,
    each_module,
    each_sequence,
    error_of,
    fused_calls,
    gradients,
    loss,
    one_of_each,
    pair,
    tensors,
)

pytestmark = pytest.mark.usefixtures("one_thread")

rnn_functions = torch.nn.modules.rnn


class Model(nn.Module):
    """A sequence module between two linear layers; takes (T, B, INPUT)."""

    def __init__(self, library, name="LSTM"):
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(INPUT, INPUT)
        self.rnn = getattr(library, name)(INPUT, HIDDEN, 2, bidirectional=True)
        self.after = nn.Linear(2 * HIDDEN, 1)

    def forward(self, input):
        return self.after(self.rnn(self.before(input))[0]).relu()


@each_module
def test_from_torch_and_back(key):
    expected, _ = pair(key)
    args = arguments(expected)
    wanted = expected(*args)
    expected.eval()
    fused = fused_rnn.from_torch(expected)
    assert type(fused) is getattr(fused_rnn, MODULES[key][0]) and not fused.training
    plain = fused.to_torch()
    assert type(plain) is type(expected) and not plain.training
    for module in (fused, plain):
        close(module(*args), wanted)
        for parameter, own in zip(module.parameters(), expected.parameters(), strict=True):
            assert parameter is own
    assert repr(fused) == repr(expected) == repr(plain)
    with torch.no_grad():
        next(expected.parameters()).mul_(3)
    close(fused(*args), expected(*args))
    new = nn.Parameter(torch.zeros_like(next(fused.parameters())))
    setattr(fused, next(fused.named_parameters())[0], new)
    close(plain(*args), expected(*args))


def test_from_torch_wants_torchs_own_classes():
    class Mine(nn.LSTM):
        pass

    for module in (nn.Linear(2, 2), Mine(3, 5)):
        assert error_of(fused_rnn.from_torch, module)[0] is TypeError


def test_replace():
    model = nn.ModuleDict({name: getattr(nn, name)(INPUT, HIDDEN) for name in NAMES})
    model["inner"] = nn.Sequential(nn.Linear(INPUT, INPUT), model["GRU"], nn.GRU(INPUT, HIDDEN))
    parameters, state = list(model.parameters()), list(model.state_dict())
    wanted = {name: tensors(model[name](*arguments(model[name]))) for name in NAMES}
    converted = fused_rnn.replace(model)
    assert sorted(converted) == sorted([*NAMES, "inner.2"])
    assert type(model["inner"][1]) is type(model["GRU"]) is fused_rnn.GRU
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == state
    for name in NAMES:
        assert type(model[name]) is getattr(fused_rnn, name)
        close(model[name](*arguments(model[name])), wanted[name])
    assert fused_rnn.replace(model) == []


def test_replace_keeps_hooks_and_optimisers():
    model, seen = Model(nn), []
    model.rnn.register_forward_hook(lambda *_: seen.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert fused_rnn.replace(model) == ["rnn"]
    input = torch.ones(6, 4, INPUT)
    before = model(input)
    loss(before).backward()
    optimizer.step()
    assert seen == [1] and not torch.allclose(model(input), before)


@each_call
def test_patched(key, packed):
    module, _ = pair(key)
    args = arguments(module, packed=packed, grad=True)
    wanted, wanted_grads = module(*args), gradients(module, *args)
    original = rnn_functions._VF
    with fused_rnn.patched():
        assert type(module) is getattr(nn, MODULES[key][0])
        result = module(*args)
        close(result, wanted)
        assert type(result) is type(wanted)
        close(gradients(module, *args), wanted_grads, grad=True)
        built = getattr(nn, MODULES[key][0])(INPUT, HIDDEN, **MODULES[key][1])
        built.load_state_dict(module.state_dict())
        close(built(*args), wanted)
    assert rnn_functions._VF is original
    close(built(*args), wanted)


@each_call
def test_fused_operators_run_in_patched(key, packed):
    """Without this test, a patch without effect would pass."""
    module, _ = pair(key)
    args = arguments(module, packed=packed)
    with torch.no_grad():
        with fused_calls() as calls, fused_rnn.patched():
            module(*args)
        assert calls
        with fused_calls() as calls:
            module(*args)
        assert not calls


def test_patched_ends_with_an_error():
    original = rnn_functions._VF
    with pytest.raises(KeyError), fused_rnn.patched():
        with fused_rnn.patched():
            pass
        assert rnn_functions._VF is not original
        raise KeyError
    assert rnn_functions._VF is original


@each_sequence
def test_dropout_in_patched(key):
    module, _ = pair(key, num_layers=3, dropout=0.4)
    args = arguments(module)
    torch.manual_seed(2)
    wanted = module(*args)
    torch.manual_seed(2)
    with fused_rnn.patched():
        close(module(*args), wanted)


@one_of_each
def test_errors_in_patched(key):
    module, _ = pair(key)
    input, hx = arguments(module)
    small = tuple(h[..., 1:] for h in hx) if isinstance(hx, tuple) else hx[..., 1:]
    wrong = [(input[..., :1], hx), (input, small), (input.double(), hx), (None,), (input[0, 0],)]
    for args in wrong:
        wanted = error_of(module, *args)
        with fused_rnn.patched():
            assert error_of(module, *args) == wanted


@one_of_each
def test_pickle_and_conversion_in_patched(key):
    module, _ = pair(key)
    with fused_rnn.patched():
        loaded = pickle.loads(pickle.dumps(module))
        assert type(loaded) is type(module)
        loaded.double()
        close(loaded(*arguments(loaded)), module.double()(*arguments(module)))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_scripting_in_patched(name):
    model = Model(nn, name)
    input = torch.randn(6, 4, INPUT)
    wanted = model(input)
    with fused_rnn.patched():
        scripted = torch.jit.script(model)
        close(scripted(input), wanted)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    close(torch.jit.load(file)(input), wanted)


@each_sequence
def test_flatten_parameters_every_forward(key):
    expected, actual = pair(key)
    for module in actual.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    close(actual(*arguments(actual)), expected(*arguments(actual)))


@each_sequence
def test_initialise_by_flat_names(key):
    expected, actual = pair(key)
    for module in (expected, actual):
        torch.manual_seed(9)
        for name in module._flat_weights_names:
            if "weight" in name:
                nn.init.xavier_uniform_(module._parameters[name])
    close(actual(*arguments(actual)), expected(*arguments(actual)))


@pytest.mark.parametrize("key", ["rnn_deep", "lstm_deep", "gru_deep"])
def test_train_mode_without_dropout(key):
    expected, actual = pair(key, dropout=0.5)
    for model in (nn.Sequential(expected).eval(), nn.Sequential(actual).eval()):
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                module.dropout = 0.0
                module.train()
    close(actual(*arguments(actual)), expected(*arguments(actual)))


def test_flatten_parameters_patched_in_the_base_class(monkeypatch):
    calls = []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda self: calls.append(self))
    module = fused_rnn.GRU(3, 5)
    module.double()
    assert calls == [module, module]


@each_sequence
def test_low_rank_weights(key):
    """A subclass that computes its flat weights in _init_flat_weights, before every forward pass."""
    name, options = MODULES[key]
    results = []
    for library in (nn, fused_rnn):

        class LowRank(getattr(library, name)):
            def _init_flat_weights(self):
                super()._init_flat_weights()
                if "delta" in self._parameters:
                    self._flat_weights[1] = self._flat_weights[1] + self.delta

        torch.manual_seed(0)
        module = LowRank(INPUT, HIDDEN, **options)
        module.register_parameter("delta", nn.Parameter(torch.ones(1)))
        module._init_flat_weights()
        output = module(*arguments(module))
        loss(output).backward()
        results.append([*tensors(output), module.delta.grad, module.weight_hh_l0.grad])
    close(*reversed(results), grad=True)


@pytest.mark.parametrize("key", ["rnn_tanh", "lstm_deep", "gru"])
def test_users_call_torchs_operators(key):
    _, actual = pair(key)
    input, hx = arguments(actual)
    function = getattr(torch._VF, actual.mode.lower())
    options = actual.bias, actual.num_layers, 0.0, True, actual.bidirectional, False
    close(function(input, hx, actual._flat_weights, *options), actual(input, hx))


class GraphCounter:
    """A torch.compile backend that counts graphs and runs them unchanged."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_compile_in_patched(name):
    """Dynamo skips torch's rnn.py; the functions of the patch must not become graphs, either."""
    model = Model(nn, name)
    input = torch.randn(6, 4, INPUT)
    wanted, counters = model(input), (GraphCounter(), GraphCounter())
    torch._dynamo.reset()
    close(torch.compile(model, backend=counters[0])(input), wanted)
    torch._dynamo.reset()
    with fused_rnn.patched():
        close(torch.compile(model, backend=counters[1])(input), wanted)
    assert counters[1].graphs == counters[0].graphs


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_compiled_cells_in_patched(name):
    cell = getattr(nn, name)(INPUT, HIDDEN)
    args = arguments(cell)
    torch._dynamo.reset()
    with fused_rnn.patched():
        compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
        close(compiled(*args), cell(*args))


def test_export_in_patched():
    model, input = Model(nn, "GRU"), torch.randn(6, 4, INPUT)
    for strict in (False, True):
        with fused_rnn.patched():
            program = torch.export.export(model, (input,), strict=strict)
        close(program.module()(input), model(input))
