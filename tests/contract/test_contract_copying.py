"""Copies, pickles, checkpoints, replicas, and modules in other processes behave as torch.nn's."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fused_rnn
from contract import (
    COPIES,
    MODULES,
    arguments,
    close,
    each_module,
    each_sequence,
    error_of,
    gradients,
    one_of_each,
    pair,
    tensors,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@each_module
@pytest.mark.parametrize("way", COPIES)
def test_copies(key, way):
    expected, actual = pair(key)
    args = arguments(actual)
    wanted = actual(*args)
    twin = COPIES[way](actual)
    assert type(twin) is type(actual)
    close(twin(*args), wanted)
    if isinstance(twin, nn.RNNBase):
        own = list(twin.parameters())
        assert all(w is p for w, p in zip(twin._flat_weights, own, strict=True))
        assert all(ref() is p for ref, p in zip(twin._flat_weight_refs, own, strict=True))
    for parameter in twin.parameters():
        parameter.data.zero_()
    close(actual(*args), wanted)
    assert not torch.allclose(tensors(twin(*args))[0], tensors(wanted)[0])
    expected.load_state_dict(twin.state_dict())
    close(twin(*args), expected(*args))
    close(gradients(twin, *args), gradients(expected, *args), grad=True)


@each_module
def test_shallow_copy_shares(key):
    _, actual = pair(key)
    twin = copy.copy(actual)
    assert all(p is q for p, q in zip(twin.parameters(), actual.parameters(), strict=True))
    actual.reset_parameters()
    close(twin(*arguments(actual)), actual(*arguments(actual)))


@each_module
def test_state_can_be_pickled(key):
    expected, actual = pair(key)
    actual(*arguments(actual))
    state = actual.__getstate__()
    assert "_flat_weight_refs" not in state
    assert not any(isinstance(value, weakref.ref) for value in state.values())
    assert set(expected.__getstate__()) <= set(state)
    pickle.dumps(state)


def with_old_all_weights(state, module):
    state["all_weights"] = state.pop("_all_weights")


def with_weights_in_place_of_names(state, module):
    state["_all_weights"] = module.all_weights
    del state["_flat_weights_names"], state["_flat_weights"]


OLD_STATES = (with_old_all_weights, with_weights_in_place_of_names)


@pytest.mark.parametrize("key", ["rnn_deep", "lstm_deep", "lstm", "gru_deep"])
@pytest.mark.parametrize("make_old", OLD_STATES)
def test_old_states(key, make_old):
    expected, actual = pair(key)
    state = {k: v for k, v in actual.__getstate__().items() if k != "_flat_weight_refs"}
    make_old(state, actual)
    loaded = type(actual).__new__(type(actual))
    loaded.__setstate__(state)
    assert loaded.proj_size == 0 and loaded._all_weights == expected._all_weights
    close(loaded(*arguments(actual)), expected(*arguments(actual)))


@each_module
@pytest.mark.parametrize("options", [{}, {"assign": True}, {"strict": False}])
def test_load_state_dict(key, options):
    expected, actual = pair(key)
    args = arguments(actual)
    actual(*args)
    expected.reset_parameters()
    state = copy.deepcopy(expected.state_dict())
    if options == {"strict": False}:
        state["unknown"] = torch.zeros(1)
    result = actual.load_state_dict(state, **options)
    assert not result.missing_keys
    close(actual(*args), expected(*args))
    close(gradients(actual, *args), gradients(expected, *args), grad=True)


class Results(Dataset):
    """Item k is the module's first result for the k-th input, computed in the process that requests it."""

    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 2

    def __getitem__(self, index):
        with torch.no_grad():
            return tensors(self.module(*arguments(self.module, seed=index)))[0]


@one_of_each
def test_data_loader_workers(key):
    expected, actual = pair(key)
    actual(*arguments(actual))
    # Importing TorchRL, as another test does, makes "spawn" the default.
    loader = DataLoader(Results(actual), batch_size=None, num_workers=1, timeout=600, multiprocessing_context="fork")
    for result, index in zip(loader, range(2), strict=True):
        close(result, tensors(expected(*arguments(expected, seed=index)))[0])


@each_module
def test_shared_memory(key):
    expected, actual = pair(key)
    assert actual.share_memory() is actual
    assert all(p.is_shared() for p in actual.parameters())
    close(actual(*arguments(actual)), expected(*arguments(expected)))


@each_module
def test_weights_only_loading(key):
    name, _ = MODULES[key]
    for module, library in zip(pair(key), (nn, fused_rnn), strict=True):
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        kind, text = error_of(torch.load, file, weights_only=True)
        assert kind is pickle.UnpicklingError and name in text
        file.seek(0)
        with torch.serialization.safe_globals([getattr(library, name)]):
            loaded = torch.load(file, weights_only=True)
        assert type(loaded) is getattr(library, name)
        close(loaded(*arguments(module)), module(*arguments(module)))


@each_sequence
def test_replica(key):
    _, actual = pair(key)
    replica = actual._replicate_for_data_parallel()
    assert type(replica) is type(actual)
    assert replica._flat_weights is not actual._flat_weights
    assert replica._flat_weights_names is not actual._flat_weights_names
    assert all(w is p for w, p in zip(replica._flat_weights, actual._flat_weights, strict=True))
