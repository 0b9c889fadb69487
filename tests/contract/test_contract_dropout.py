"""Dropout between layers draws the same random numbers as in torch.nn."""

import pytest
import torch

from contract import (
    DEEP,
    arguments,
    checkpointed,
    close,
    each_sequence,
    gradients,
    higher_gradients,
    leaves,
    loss,
    pair,
    tensors,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(call, *args):
    """The call's result, and the state of the generator after it."""
    torch.manual_seed(11)
    return call(*args), torch.get_rng_state()


@each_sequence
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_mask_is_torchs(key, packed):
    expected, actual = pair(key, num_layers=3, dropout=0.4)
    args = arguments(actual, packed=packed)
    wanted, state = seeded(expected, *args)
    result, state_after = seeded(actual, *args)
    close(result, wanted)
    assert torch.equal(state_after, state)


def test_dropout_mask_unbatched():
    expected, actual = pair("gru", num_layers=2, dropout=0.4)
    wanted, state = seeded(expected, torch.ones(7, 3))
    result, state_after = seeded(actual, torch.ones(7, 3))
    close(result, wanted)
    assert torch.equal(state_after, state)


@each_sequence
def test_dropout_acts_between_layers(key):
    expected, actual = pair(key, num_layers=2, dropout=1.0)
    args = arguments(actual)
    dropped, plain = actual(*args), actual.eval()(*args)
    close(plain, expected.eval()(*args))
    directions = 2 if actual.bidirectional else 1
    for state, plain_state in zip(tensors(dropped[1]), tensors(plain[1]), strict=True):
        close(state[:directions], plain_state[:directions])
    assert dropped[0].isfinite().all() and not torch.allclose(dropped[0], plain[0])
    close(dropped, expected.train()(*args))
    with torch.no_grad():
        close(actual.train()(*args), dropped)


@each_sequence
@pytest.mark.parametrize(("layers", "training", "dropout"), [(2, True, 0.0), (2, False, 0.5), (1, True, 0.5)])
def test_no_random_numbers(key, layers, training, dropout):
    _, actual = pair(key, num_layers=layers)
    actual.dropout = dropout
    args = arguments(actual)
    before = torch.get_rng_state()
    actual.train(training)(*args)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("key", ["rnn_tanh", "lstm", "gru"])
@pytest.mark.parametrize("packed", [False, True])
def test_backward_uses_the_same_mask(key, packed):
    expected, actual = pair(key, torch.float64, **DEEP, dropout=0.5)
    args = arguments(actual, packed=packed, grad=True)
    wanted = seeded(gradients, expected, *args)
    found = seeded(gradients, actual, *args)
    close(found[0], wanted[0], grad=True)
    assert torch.equal(found[1], wanted[1])
    close(
        seeded(higher_gradients, actual, args, 2)[0],
        seeded(higher_gradients, expected, args, 2)[0],
        grad=True,
    )


@pytest.mark.parametrize("key", ["rnn_tanh", "lstm", "gru"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_repeats_the_mask(key, reentrant):
    _, actual = pair(key, num_layers=2, dropout=0.5)
    args = arguments(actual, grad=True)
    wanted, _ = seeded(gradients, actual, *args)
    value = loss(seeded(checkpointed, actual, args, reentrant)[0])
    torch.rand(3)
    value.backward()
    close([t.grad for t in leaves(actual, *args)], wanted, grad=True)
    with torch.random.fork_rng():
        first, _ = seeded(actual, *args)
    close(seeded(actual, *args)[0], first)
