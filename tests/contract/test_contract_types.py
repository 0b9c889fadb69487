"""Classes, subclassing, signatures, and the cases in which torch's own operators must run."""

import inspect
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import rnn as rnn_utils
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fused_rnn
from contract import (
    BATCH,
    HIDDEN,
    INPUT,
    MODULES,
    NAMES,
    ONE_OF_EACH,
    SEQUENCES,
    arguments,
    close,
    each_call,
    each_module,
    each_sequence,
    error_of,
    fused_calls,
    loss,
    one_of_each,
    pair,
    same_outcome,
    tensors,
)

pytestmark = pytest.mark.usefixtures("one_thread")

HELPERS = (
    "check_input",
    "get_expected_hidden_size",
    "check_hidden_size",
    "check_forward_args",
    "permute_hidden",
    "flatten_parameters",
    "_update_flat_weights",
    "_init_flat_weights",
    "_weights_have_changed",
)


@pytest.mark.parametrize("name", NAMES)
def test_isinstance(name):
    module = getattr(fused_rnn, name)(3, 5)
    base = nn.RNNBase if name in SEQUENCES else nn.RNNCellBase
    assert isinstance(module, getattr(nn, name)) and isinstance(module, base)
    others = [other for other in NAMES if other != name]
    assert not any(isinstance(module, getattr(nn, other)) for other in others)
    assert type(module).__name__ == name and module._get_name() == name


def logging_subclass(base, calls):
    """A subclass that overrides every hook of the base class, records its calls, and calls super()."""

    def override(name):
        def method(self, *args, **options):
            calls.append(name)
            return getattr(super(Mine, self), name)(*args, **options)

        return method

    overridden = ("forward", "reset_parameters", "flatten_parameters", "extra_repr")
    if issubclass(base, nn.RNNBase):
        overridden += ("check_forward_args", "check_input", "permute_hidden", "check_hidden_size")
        overridden += ("get_expected_hidden_size",)
    else:
        overridden = ("forward", "reset_parameters", "extra_repr")
    Mine = type("Mine", (base,), {name: override(name) for name in overridden})
    return Mine


@pytest.mark.parametrize("key", ["rnn_relu", "gru_deep", "lstm_deep", *ONE_OF_EACH])
def test_overrides_are_called(key):
    name, options = MODULES[key]
    logs, results = [], []
    for library in (nn, fused_rnn):
        logs.append([])
        torch.manual_seed(0)
        module = logging_subclass(getattr(library, name), logs[-1])(INPUT, HIDDEN, **options)
        results.append(module(*arguments(module)))
        module.double()
        repr(module)
        module(arguments(module)[0])
    assert set(logs[1]) == set(logs[0]) and "forward" in logs[1]
    for counted in ("forward", "reset_parameters", "flatten_parameters", "check_forward_args"):
        assert logs[1].count(counted) == logs[0].count(counted)
    close(*reversed(results))


def test_override_that_changes_the_result():
    """check_forward_args may be disabled, and permute_hidden may do more than permute."""
    results = []
    for library in (nn, fused_rnn):

        class Mine(library.GRU):
            def check_forward_args(self, input, hidden, batch_sizes):
                pass

            def permute_hidden(self, hx, permutation):
                return super().permute_hidden(hx * 2, permutation)

        torch.manual_seed(0)
        module = Mine(INPUT, HIDDEN)
        results.append(module(*arguments(module)))
    close(*reversed(results))


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    expected, actual = getattr(nn, name), getattr(fused_rnn, name)
    for call in ("__init__", "forward"):
        found, wanted = (inspect.signature(getattr(c, call)) for c in (actual, expected))
        # fused_rnn's additional arguments are keyword-only.
        positional = [p.name for p in found.parameters.values() if p.kind is not p.KEYWORD_ONLY]
        assert positional == list(wanted.parameters)


class Marked(torch.Tensor):
    """A tensor subclass with torch's default __torch_function__: results are Marked, too."""


@each_call
def test_tensor_subclasses(key, packed):
    expected, actual = pair(key)
    input, hx = arguments(actual, packed=packed)
    if packed:
        input = rnn_utils.PackedSequence(input.data.as_subclass(Marked), *input[1:])
    else:
        input = input.as_subclass(Marked)
    wanted, results = (tensors(module(input, hx)) for module in (expected, actual))
    assert [type(t) for t in results] == [type(t) for t in wanted]
    close([t.as_subclass(torch.Tensor) for t in results], tensors(expected(input, hx)))


class FunctionLog(TorchFunctionMode):
    def __init__(self):
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


class OperatorLog(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@each_call
@pytest.mark.parametrize("mode", [FunctionLog, OperatorLog])
def test_modes(key, packed, mode):
    expected, actual = pair(key)
    args = arguments(actual, packed=packed)
    with mode() as log:
        result = actual(*args)
    close(result, expected(*args))
    if mode is FunctionLog:
        name = actual.mode.lower() if isinstance(actual, nn.RNNBase) else "_cell"
        assert any(name in called for called in log.names)
    else:
        assert log.names


@each_call
def test_flop_counter(key, packed):
    counts = []
    for module in pair(key):
        with FlopCounterMode(display=False) as counter:
            loss(module(*arguments(module, packed=packed))).backward()
        counts.append(counter.get_total_flops())
    assert counts[1] == counts[0]


@each_sequence
def test_batch_sizes(key):
    expected, actual = pair(key)
    data = torch.randn(6, INPUT)
    batch_sizes = torch.tensor([3, 2, 1])
    sorted_only = rnn_utils.PackedSequence(data, batch_sizes)
    assert sorted_only.sorted_indices is None
    close(actual(sorted_only), expected(sorted_only))
    narrow = rnn_utils.PackedSequence(data, batch_sizes.to(torch.int32))
    for module in (expected, actual):
        assert error_of(module, narrow)[0] is RuntimeError


@each_sequence
def test_checks_are_torchs_own(key):
    expected, actual = pair(key)
    # Except extra_repr and reset_parameters, which handle fused_rnn's options (test_variant_modules.py).
    for helper in (*HELPERS, "get_expected_cell_size", "__setattr__", "_apply"):  # the cell's is the LSTM's only
        assert getattr(type(actual), helper, None) is getattr(type(expected), helper, None)


UNSUPPORTED = {
    "complex": (torch.complex64, nullcontext),
    "function_mode": (torch.float32, FunctionLog),
    "dispatch_mode": (torch.float32, OperatorLog),
}


@one_of_each
@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_torchs_operators_run(key, reason):
    dtype, context = UNSUPPORTED[reason]
    expected, actual = pair(key, dtype)
    args = arguments(actual)
    with fused_calls() as calls, context():
        same_outcome(expected, actual, *args)
    assert not calls


@each_module
def test_one_odd_weight(key):
    """A single weight of another dtype or of a subclass prevents the fused kernels."""
    expected, actual = pair(key)
    name, weight = list(actual.named_parameters())[-1]
    args = arguments(actual)
    for odd in (weight.double(), weight.detach().as_subclass(Marked)):
        for module in (expected, actual):
            delattr(module, name)
            setattr(module, name, odd)
        if odd.dtype == torch.float64:
            assert issubclass(error_of(actual, *args)[0], RuntimeError)
        else:
            found, wanted = (tensors(module(*args)) for module in (actual, expected))
            assert [type(t) for t in found] == [type(t) for t in wanted]
            close(found, wanted)


@pytest.mark.parametrize("key", ["rnn_tanh", "lstm", "gru"])
def test_per_sample_gradients(key):
    grads = []
    for module in pair(key, torch.float64, batch_first=True):
        input, _ = arguments(module)
        result = call_for_per_sample_grads(module, batch_size=BATCH)(input)
        loss(result[0]).backward()
        grads.append([p.grad_sample for p in module.parameters()])
    close(*reversed(grads), grad=True)
    assert grads[1][0].shape[0] == BATCH
