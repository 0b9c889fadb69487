"""rnn, lstm and gru as functions of plain tensors: results equal the modules', also with computed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fused_rnn
from contract import tensors
from fused_rnn import functional

OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "num_layers": 2},
    {"batch_first": True},
]
FUNCTIONS = {"RNN": functional.rnn, "LSTM": functional.lstm, "GRU": functional.gru}
each_name = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@each_name
def test_equals_the_module(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = getattr(nn, name)(3, 7, **options, dtype=torch.float64)
    weights = [w.detach().clone().requires_grad_() for w in module._flat_weights]
    x = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    given = {key: options[key] for key in ("bidirectional", "batch_first") if key in options}
    results = tensors(FUNCTIONS[name](x, weights, **given))
    expected = tensors(module(x))
    for a, e in zip(results, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(sum(r.sum() for r in results), [x, *weights])
    wanted = torch.autograd.grad(sum(e.sum() for e in expected), [x, *module._flat_weights])
    for a, e in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_projection_and_relu() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 7, proj_size=2, num_layers=2)
    x = torch.randn(5, 4, 3)
    torch.testing.assert_close(functional.lstm(x, lstm._flat_weights)[0], lstm(x)[0])
    rnn = nn.RNN(3, 7, nonlinearity="relu")
    torch.testing.assert_close(functional.rnn(x, rnn._flat_weights, nonlinearity="relu")[0], rnn(x)[0])


@each_name
def test_weights_that_are_computed(name: str) -> None:
    """Weight dropout and a hypernetwork: gradients reach the tensors from which the weights are computed."""
    torch.manual_seed(0)
    module = getattr(nn, name)(3, 7, dtype=torch.float64)
    x, code = torch.randn(5, 4, 3).double(), torch.randn(2, dtype=torch.float64, requires_grad=True)
    make = [nn.Linear(2, w.numel(), dtype=torch.float64) for w in module._flat_weights]
    weights = [m(code).view_as(w) for m, w in zip(make, module._flat_weights, strict=True)]
    weights[1] = torch.dropout(weights[1], 0.5, True)
    functional_loss = FUNCTIONS[name](x, weights)[0].square().sum()
    (grad,) = torch.autograd.grad(functional_loss, code, retain_graph=True)
    names = [key for key, _ in module.named_parameters()]
    called = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))
    (expected,) = torch.autograd.grad(called[0].square().sum(), code)
    torch.testing.assert_close(grad, expected)


@each_name
def test_with_resets_and_lengths(name: str) -> None:
    torch.manual_seed(0)
    module = getattr(fused_rnn, name)(3, 7)
    x, resets = torch.randn(5, 4, 3), torch.rand(5, 4) < 0.3
    arguments = dict(resets=resets, lengths=torch.tensor([5, 2, 0, 4]), return_state_sequence=True)
    for a, e in zip(
        tensors(FUNCTIONS[name](x, module._flat_weights, **arguments)), tensors(module(x, **arguments)), strict=True
    ):
        assert torch.equal(a, e)


def test_dropout_acts_in_training() -> None:
    torch.manual_seed(0)
    module = nn.GRU(3, 7, num_layers=2)
    x = torch.randn(5, 4, 3)
    still = functional.gru(x, module._flat_weights, dropout=0.5)[0]
    torch.testing.assert_close(still, module(x)[0])
    assert not torch.equal(functional.gru(x, module._flat_weights, dropout=0.5, training=True)[0], still)


def test_bad_weights() -> None:
    module = nn.GRU(3, 7, num_layers=2)
    x = torch.randn(5, 4, 3)
    for weights in (module._flat_weights[:-1], [], module._flat_weights[::-1], [torch.zeros(3)] * 4):
        with pytest.raises(ValueError, match="expected weights"):
            functional.gru(x, weights)
