"""Classes, subclassing, signatures, and the cases in which torch's own operators must run."""

import inspect
from contextlib import nullcontext, suppress

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
    TIME,
    arguments,
    close,
    derivative,
    each_call,
    each_module,
    each_sequence,
    error_of,
    fused_calls,
    gradients,
    loss,
    one_of_each,
    pair,
    same_error,
    same_outcome,
    survives,
    tensors,
)
from operator_calls import by_name

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


@each_module
def test_fused_type_is_its_own(key):
    """A documented difference: type(m) is not torch.nn's class; the result of to_torch() has that class."""
    name = MODULES[key][0]
    expected, actual = pair(key)
    assert type(actual) is getattr(fused_rnn, name) is not getattr(nn, name)
    plain = actual.to_torch()
    assert type(plain) is type(expected) is getattr(nn, name)
    assert all(p is q for p, q in zip(plain.parameters(), actual.parameters(), strict=True))
    close(plain(*arguments(plain)), expected(*arguments(plain)))


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


@each_sequence
@pytest.mark.parametrize("helper", [*HELPERS, "get_expected_cell_size"])
def test_helpers(key, helper):
    expected, actual = pair(key)
    wanted = getattr(type(expected), helper, None)
    assert (wanted is None) == (not hasattr(actual, helper))
    if wanted is not None:
        found = inspect.signature(getattr(type(actual), helper))
        assert list(found.parameters) == list(inspect.signature(wanted).parameters)


@each_sequence
def test_helpers_answer_alike(key):
    expected, actual = pair(key)
    input, hx = arguments(actual)
    size = actual.get_expected_hidden_size(input, None)
    assert size == expected.get_expected_hidden_size(input, None)
    assert size == actual.get_expected_hidden_size(input, torch.tensor([BATCH]))
    assert actual.check_forward_args(input, hx, None) is None
    order = torch.tensor([1, 0, 3, 2])
    close(actual.permute_hidden(hx, order), expected.permute_hidden(hx, order))
    args = RuntimeError, "no (1,), got", torch.zeros(2), (1,), "no {}, got {}"
    same_error(expected.check_hidden_size, actual.check_hidden_size, *args)


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    expected, actual = getattr(nn, name), getattr(fused_rnn, name)
    for call in ("__init__", "forward"):
        found, wanted = (inspect.signature(getattr(c, call)) for c in (actual, expected))
        # fused_rnn's additional arguments are keyword-only.
        positional = [p.name for p in found.parameters.values() if p.kind is not p.KEYWORD_ONLY]
        assert positional == list(wanted.parameters)
    same_outcome(
        lambda: nn.utils.skip_init(expected, 3, 5) and None,
        lambda: nn.utils.skip_init(actual, 3, 5) and None,
    )


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


def test_torchs_own_utilities():
    for name in ("pack_padded_sequence", "pad_packed_sequence", "pack_sequence", "PackedSequence"):
        assert getattr(rnn_utils, name).__module__ == "torch.nn.utils.rnn"
        assert not hasattr(fused_rnn, name)


@each_sequence
def test_packed_result(key):
    _, actual = pair(key)
    output, _ = actual(arguments(actual, packed=True)[0])
    assert type(output) is rnn_utils.PackedSequence
    assert len(rnn_utils.unpack_sequence(output)) == BATCH


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
def test_flatten_parameters_is_torchs(key):
    """Its effect on modules that are moved to CUDA must remain."""
    _, actual = pair(key)
    assert type(actual).flatten_parameters is nn.RNNBase.flatten_parameters


@each_sequence
def test_checks_are_torchs_own(key):
    expected, actual = pair(key)
    # Except extra_repr and reset_parameters, which handle fused_rnn's options (test_variant_modules.py).
    for helper in (*HELPERS, "__setattr__", "_apply"):
        assert getattr(type(actual), helper) is getattr(type(expected), helper)


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


@each_module
def test_functorch(key):
    expected, actual = pair(key, torch.float64)
    input, hx = arguments(actual)

    def gradient(module):
        return torch.func.grad(lambda x: loss(module(x, hx)))(input)

    close(gradient(actual), gradient(expected), grad=True)


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


@each_call
def test_gradient_penalty(key, packed):
    grads = []
    for module in pair(key):
        input, hx = arguments(module, packed=packed, grad=True)
        first = derivative(loss(module(input, hx)), module, (input, hx), create_graph=True)
        (first[0].norm() - 1).square().backward()
        grads.append([p.grad for p in module.parameters() if p.grad is not None])
    close(*reversed(grads), grad=True)


def no_python_checks_in_a_process():
    """Sizes that only check_forward_args would reject reach the operators' own checks."""
    for name in SEQUENCES:

        class Unchecked(getattr(fused_rnn, name)):
            def check_forward_args(self, input, hidden, batch_sizes):
                pass

        module = Unchecked(INPUT, HIDDEN)
        good, hx = arguments(module)
        shapes = [(1, 1, HIDDEN), (1, BATCH, 1), (0, BATCH, HIDDEN), (2, BATCH, HIDDEN)]
        wrong_states = [tensors(hx)[0].new_zeros(shape) for shape in shapes]
        calls = [(good, (h, h) if name == "LSTM" else h) for h in wrong_states]
        calls += [(good[..., :1], hx), (torch.zeros(TIME, BATCH, 9), hx)]
        for args in calls:
            error_of(module, *args)
        gradients(module, good, hx)


CELLS = ["rnn_tanh", "rnn_relu", "lstm", "gru"]  # in the order of the operators' numbers


def operator_arguments(cell, time, batch):
    """Valid arguments of torch.ops.fused_rnn.forward by name, for one direction."""
    rows = {"lstm": 4, "gru": 3}.get(cell, 1) * HIDDEN
    shapes = {"x": (time, batch, INPUT), "h0": (1, batch, HIDDEN), "w_ih": (rows, INPUT)}
    shapes |= {"w_hh": (rows, HIDDEN), "b_ih": (rows,), "b_hh": (rows,)}
    if cell == "lstm":
        shapes["c0"] = shapes["h0"]
    given = {name: torch.zeros(shape) for name, shape in shapes.items()}
    arguments = torch.ops.fused_rnn.forward.default._schema.arguments
    return (
        {argument.name: argument.default_value for argument in arguments}
        | given
        | {"cell": CELLS.index(cell), "train": True}
    )


def raw_operator_in_a_process():
    forward = by_name(torch.ops.fused_rnn.forward)
    for cell in CELLS:
        good = operator_arguments(cell, TIME, BATCH)
        forward(**good)
        tensor_names = [name for name, value in good.items() if isinstance(value, torch.Tensor)]
        for name in tensor_names:
            value = good[name]
            wrong = [value.double(), value[:0], value.unsqueeze(0), value.to("meta"), value[0]]
            wrong += [torch.zeros([n + 1 for n in value.shape]), value.to_sparse()]
            wrong += [torch.zeros([n - 1 for n in value.shape]), torch.zeros(())]
            for changed in wrong:
                with suppress(Exception):
                    forward(**{**good, name: changed})
        for changes in ({"x": None}, {"w_hh": None}, {"cell": 4}, {"batch_sizes": good["x"]}):
            error_of(forward, **{**good, **changes})
        for sizes in ([], [-1], [BATCH + 1], [2**40], [1, 2]):
            error_of(forward, **{**good, "batch_sizes": torch.tensor(sizes)})


def test_fused_operator_checks_itself():
    """The operator can be called without the package's Python, so it must check everything."""
    survives(raw_operator_in_a_process)


def test_fused_checks_what_python_did_not():
    """Stricter than torch.nn's operators, which broadcast or read out of bounds."""
    survives(no_python_checks_in_a_process)
