"""User code that works on torch.nn's internals: flat weights and their names, the base class, torch's operators."""

import pytest
import torch
from torch import nn

import fused_rnn
from contract import (
    HIDDEN,
    INPUT,
    MODULES,
    arguments,
    close,
    each_sequence,
    loss,
    pair,
    tensors,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
