"""An unused output has no gradient, rather than a zero one, which times NaN would put NaN into other gradients.

torch.nn in float64 records every operation for autograd, so its NaNs are those of the chain rule.
"""

from __future__ import annotations

from itertools import chain, combinations
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from contract import tensors
from fused_rnn import policy

pytestmark = pytest.mark.usefixtures("one_thread")

INPUT, HIDDEN = 3, 5
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True},
    "deep": {"num_layers": 2, "bidirectional": True},
    "projected": {"proj_size": 2},
}
SEQUENCES = [(name, key) for name in ("RNN", "LSTM", "GRU") for key in OPTIONS if name == "LSTM" or key != "projected"]


def subsets(count: int) -> list[tuple[int, ...]]:
    return list(chain.from_iterable(combinations(range(count), size) for size in range(1, count + 1)))


def nan_gradients(call: Any, inputs: list[torch.Tensor], used: tuple[int, ...]) -> list[torch.Tensor | None]:
    """Where each gradient is NaN; None where there is no gradient."""
    outputs = tensors(call(*inputs))
    loss = sum(outputs[index].sum() for index in used)
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [None if grad is None else grad.isnan() for grad in grads]


def check(ours: Any, theirs: Any, inputs: list[torch.Tensor], count: int, packed: bool = False) -> None:
    """Compare `ours` and `theirs` with every combination of their `count` outputs used.

    torch.nn's packed layers slice and concatenate, which turns some missing gradients into zeros: ours may have fewer
    NaNs. A NaN in a weight belongs to no row and is not tested there.
    """
    for place in range(count if packed else len(inputs)):
        given = [t.detach().clone() for t in inputs]
        given[place].view(-1)[0] = torch.nan
        given = [t.requires_grad_() for t in given]
        for used in subsets(count):
            expected = nan_gradients(theirs, [t.double() for t in given], used)
            actual = nan_gradients(ours, given, used)
            for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
                case = f"NaN in input {place}, outputs {used} used, gradient of input {index}"
                if e is not None:
                    assert a is not None and not (a & ~e).any(), f"{case}: {a} instead of {e}"
                    assert packed or torch.equal(a, e), f"{case}: {a} instead of {e}"


def functional_call(module: nn.Module, states: int, weights: list[str], packed: bool = False) -> Any:
    def call(x: torch.Tensor, *rest: torch.Tensor) -> Any:
        hx = rest[:states]
        input = pack_padded_sequence(x, torch.tensor([1, 4, 2]), enforce_sorted=False) if packed else x
        parameters = dict(zip(weights, rest[states:], strict=True))
        return torch.func.functional_call(module, parameters, (input, hx if states == 2 else hx[0]))

    return call


@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(name: str, batch: int) -> None:
    torch.manual_seed(0)
    theirs, ours = getattr(nn, name)(INPUT, HIDDEN), getattr(fused_rnn, name)(INPUT, HIDDEN)
    states = 2 if name == "LSTMCell" else 1
    names, weights = zip(*ours.named_parameters(), strict=True)
    inputs = [torch.randn(batch, INPUT), *(torch.randn(batch, HIDDEN) for _ in range(states)), *weights]
    check(*(functional_call(m, states, list(names)) for m in (ours, theirs)), inputs, states)


@pytest.mark.parametrize(("T", "packed"), [(1, False), (4, False), (4, True)], ids=["step", "sequence", "packed"])
@pytest.mark.parametrize(("name", "key"), SEQUENCES)
def test_sequences(name: str, key: str, T: int, packed: bool) -> None:
    torch.manual_seed(0)
    options = OPTIONS[key]
    theirs, ours = (getattr(library, name)(INPUT, HIDDEN, **options) for library in (nn, fused_rnn))
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    sizes = [options.get("proj_size", HIDDEN), HIDDEN][: 2 if name == "LSTM" else 1]
    names, weights = zip(*ours.named_parameters(), strict=True)
    inputs = [torch.randn(T, 3, INPUT), *(torch.randn(rows, 3, size) for size in sizes), *weights]

    def outputs(module: nn.Module) -> Any:
        call = functional_call(module, len(sizes), list(names), packed)

        def data_and_states(*given: torch.Tensor) -> Any:
            y, hidden = call(*given)
            return (y.data if packed else y), hidden

        return data_and_states

    check(outputs(ours), outputs(theirs), inputs, 1 + len(sizes), packed)


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"zoneout": 0.3}], ids=str)
def test_own_options(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of every step and the variants, which torch.nn does not have, against the specification."""
    torch.manual_seed(0)
    lstm = fused_rnn.LSTM(INPUT, HIDDEN, **options).eval()
    x, lengths = torch.randn(4, 3, INPUT), torch.tensor([1, 4, 2])
    hx = [torch.randn(1, 3, HIDDEN) for _ in range(2)]
    hx[0][0, 0, 0] = torch.nan
    parameters = list(lstm.parameters())

    def masks(used: tuple[int, ...]) -> list[torch.Tensor]:
        outputs = tensors(lstm(x, tuple(hx), lengths=lengths, return_state_sequence=True))
        return [g.isnan() for g in torch.autograd.grad(sum(outputs[i].sum() for i in used), parameters)]

    for used in ((0,), (1,), (2,), (3,), (4,), (2, 4), (1, 2)):
        actual = masks(used)
        with monkeypatch.context() as patch:
            patch.setattr(policy, "fusible", lambda *tensors: False)
            expected = masks(used)
        for (name, _), a, e in zip(lstm.named_parameters(), actual, expected, strict=True):
            assert not (a & ~e).any(), (used, name)
