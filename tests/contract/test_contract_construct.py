"""Construction, attributes, repr, constructor errors, parameters and state are torch.nn's.

Each test constructs torch.nn's class and fused_rnn's with the same arguments and compares them.
"""

import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn

import fused_rnn
from contract import (
    CELLS,
    HIDDEN,
    INPUT,
    MODULES,
    NAMES,
    SEQUENCES,
    arguments,
    close,
    each_module,
    each_sequence,
    error_of,
    pair,
    same_error,
    tensors,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SEQUENCE_ARGUMENTS = {
    "two": ((3, 5), {}),
    "keywords": ((), {"input_size": 3, "hidden_size": 5, "num_layers": 2, "bias": False}),
    "mixed": ((3, 5, 2), {"bidirectional": True, "batch_first": True, "dropout": 0.25}),
    "factory": ((3, 5), {"device": torch.device("cpu"), "dtype": torch.float64}),
}
ALL_POSITIONAL = {
    "RNN": (3, 5, 2, "relu", False, True, 0.5, True, 0, "cpu", torch.float64),
    "LSTM": (3, 5, 2, False, True, 0.5, True, 2, "cpu", torch.float64),
    "GRU": (3, 5, 2, False, True, 0.5, True, 0, "cpu", torch.float64),
    "RNNCell": (3, 5, False, "relu", "cpu", torch.float64),
    "LSTMCell": (3, 5, False, "cpu", torch.float64),
    "GRUCell": (3, 5, False, "cpu", torch.float64),
}


def both(name, *args, **options):
    return [getattr(library, name)(*args, **options) for library in (nn, fused_rnn)]


def public(module):
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def description(module):
    """Everything that the constructor's arguments decide about a module."""
    shapes = [(name, p.shape, p.dtype, p.device) for name, p in module.named_parameters()]
    return public(module), shapes, repr(module)


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("case", SEQUENCE_ARGUMENTS)
def test_sequence_arguments(name, case):
    args, options = SEQUENCE_ARGUMENTS[case]
    expected, actual = both(name, *args, **options)
    assert description(actual) == description(expected)


@pytest.mark.parametrize("name", SEQUENCES)
def test_all_positional(name):
    expected, actual = both(name, *ALL_POSITIONAL[name])
    assert description(actual) == description(expected)
    assert actual.batch_first and actual.bidirectional and not actual.bias


def test_nonlinearity_and_proj_size_by_keyword():
    for name, option in (("RNN", {"nonlinearity": "relu"}), ("LSTM", {"proj_size": 2})):
        expected, actual = both(name, input_size=3, hidden_size=5, **option)
        assert description(actual) == description(expected)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"dtype": torch.float64}])
def test_cell_arguments(name, options):
    for expected, actual in (
        both(name, 3, 5, **options),
        both(name, input_size=3, hidden_size=5, **options),
        both(name, *ALL_POSITIONAL[name]),
    ):
        assert description(actual) == description(expected)


def test_rnn_cell_nonlinearity():
    for expected, actual in (
        both("RNNCell", 3, 5, True, "relu"),
        both("RNNCell", 3, 5, nonlinearity="relu"),
    ):
        assert description(actual) == description(expected)
        assert actual.nonlinearity == "relu"


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("RNN", {"nonlinearity": "relu"}, "RNN(3, 5)"),
        ("GRU", {"bias": False}, "GRU(3, 5, bias=False)"),
        (
            "LSTM",
            {"proj_size": 2, "num_layers": 2, "bias": False, "batch_first": True}
            | {"dropout": 0.5, "bidirectional": True},
            "LSTM(3, 5, proj_size=2, num_layers=2, bias=False, batch_first=True, dropout=0.5, bidirectional=True)",
        ),
        (
            "RNNCell",
            {"nonlinearity": "relu", "bias": False},
            "RNNCell(3, 5, bias=False, nonlinearity=relu)",
        ),
        ("LSTMCell", {}, "LSTMCell(3, 5)"),
        ("GRUCell", {}, "GRUCell(3, 5)"),
    ],
)
def test_repr(name, options, text):
    expected, actual = both(name, 3, 5, **options)
    assert repr(actual) == repr(expected) == text
    assert repr(nn.Sequential(actual)) == repr(nn.Sequential(expected))
    assert actual.extra_repr() == expected.extra_repr()


@pytest.mark.parametrize("name", SEQUENCES)
def test_dropout_warning(name):
    seen = []
    for library in (nn, fused_rnn):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = getattr(library, name)(3, 5, dropout=0.5)
        assert module.dropout == 0.5
        seen.append([(w.category, str(w.message), w.filename) for w in caught])
    assert seen[0] == seen[1]
    assert len(seen[1]) == 1 and seen[1][0][0] is UserWarning
    assert "but got dropout=0.5 and num_layers=1" in seen[1][0][1]


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize(
    ("args", "options"),
    [((3, 5, 2), {"dropout": 1}), ((True, 5), {}), ((3, 5), {"bidirectional": 1})],
)
def test_accepted_oddities(name, args, options):
    expected, actual = both(name, *args, **options)
    assert description(actual) == description(expected)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("args", [(0, 5), (3, 0), (3, 5, 1), (3, 5, 0)])
def test_cells_check_nothing(name, args):
    expected, actual = both(name, *args)
    assert description(actual) == description(expected)


def test_cell_nonlinearity_is_checked_in_forward():
    expected, actual = both("RNNCell", 3, 5, nonlinearity="x")
    same_error(expected, actual, RuntimeError, "Unknown nonlinearity: x", torch.zeros(4, 3))


def test_base_class_has_no_forward():
    with fused_rnn.patched(), pytest.raises(NotImplementedError):
        nn.RNNBase("LSTM", 3, 5)(torch.randn(6, 4, 3))


@pytest.mark.parametrize("key", ["rnn_tanh", "lstm", "gru"])
def test_dropout_and_training_may_change(key):
    expected, actual = pair(key, num_layers=2)
    input, hx = arguments(actual)
    for changes in ({"dropout": 0.5}, {"training": False}, {"training": True, "dropout": 0.0}):
        for module in (expected, actual):
            vars(module).update(changes)
        torch.manual_seed(7)
        wanted = expected(input, hx)
        torch.manual_seed(7)
        close(actual(input, hx), wanted)


@each_sequence
def test_batch_first_may_change(key):
    expected, actual = pair(key)
    for module in (expected, actual):
        module.batch_first = not module.batch_first
    input, hx = arguments(actual)
    close(actual(input, hx), expected(input, hx))


@pytest.mark.parametrize(
    ("key", "name", "value"),
    [("rnn_tanh", "mode", "RNN_RELU"), ("rnn_tanh_cell", "nonlinearity", "relu")],
)
def test_nonlinearity_may_change(key, name, value):
    expected, actual = pair(key)
    args = arguments(actual)
    before = tensors(actual(*args))[0]
    for module in (expected, actual):
        setattr(module, name, value)
    close(actual(*args), expected(*args))
    assert not torch.allclose(tensors(actual(*args))[0], before)


@pytest.mark.parametrize("mode", ["GRU", "LSTM"])
def test_mode_must_fit_the_class(mode):
    for module in both("RNN", 3, 12):
        module.mode = mode
        error_of(module, torch.zeros(6, 4, 3))


DROPOUT = "dropout should be a number in range [0, 1] representing the probability"
ERRORS = {
    "negative_dropout": (SEQUENCES, (3, 5), {"dropout": -0.1}, ValueError, DROPOUT),
    "dropout_above_one": (SEQUENCES, (3, 5), {"dropout": 1.1}, ValueError, DROPOUT),
    "dropout_bool": (SEQUENCES, (3, 5), {"dropout": True}, ValueError, DROPOUT),
    "dropout_word": (
        SEQUENCES, (3, 5), {"dropout": "a"}, ValueError, "could not convert string to float: 'a'",
    ),
    "dropout_digits": (SEQUENCES, (3, 5), {"dropout": "0.5"}, ValueError, DROPOUT),
    "bias": (
        SEQUENCES, (3, 5), {"bias": 1}, TypeError, "bias should be of type bool, got: int",
    ),
    "batch_first": (
        SEQUENCES, (3, 5), {"batch_first": 1}, TypeError,
        "batch_first should be of type bool, got: int",
    ),
    "no_layers": (
        SEQUENCES, (3, 5, 0), {}, ValueError, "num_layers must be greater than zero",
    ),
    "negative_layers": (
        SEQUENCES, (3, 5, -1), {}, ValueError, "num_layers must be greater than zero",
    ),
    "input_type": (
        SEQUENCES, (3.0, 5), {}, TypeError, "input_size should be of type int, got: float",
    ),
    "input_value": (SEQUENCES, (0, 5), {}, ValueError, "input_size must be greater than zero"),
    "hidden_type": (
        SEQUENCES, (3, 5.0), {}, TypeError, "hidden_size should be of type int, got: float",
    ),
    "hidden_value": (
        SEQUENCES, (3, -5), {}, ValueError, "hidden_size must be greater than zero",
    ),
    "proj_size_not_lstm": (
        ("RNN", "GRU"), (3, 5), {"proj_size": 0}, ValueError,
        "proj_size argument is only supported for LSTM, not RNN or GRU",
    ),
    "proj_size_negative": (("LSTM",), (3, 5), {"proj_size": -1}, ValueError, "proj_size"),
    "proj_size_large": (
        ("LSTM",), (3, 5), {"proj_size": 5}, ValueError,
        "proj_size has to be smaller than hidden_size",
    ),
    "nonlinearity": (
        ("RNN",), (3, 5), {"nonlinearity": "x"}, ValueError,
        "Unknown nonlinearity 'x'. Select from 'tanh' or 'relu'.",
    ),
    "nonlinearity_positional": (
        ("RNN",), (3, 5, 1, "x"), {}, ValueError, "Unknown nonlinearity 'x'",
    ),
    "too_few": (NAMES, (3,), {}, TypeError, "missing"),
    "unknown_keyword": (NAMES, (3, 5), {"depth": 2}, TypeError, "depth"),
    "too_many": (NAMES, (3, 5, True, "tanh", *[True] * 12), {}, TypeError, ""),
    "layers_float": (SEQUENCES, (3, 5), {"num_layers": 1.0}, TypeError, ""),
    "integer_dtype": (
        NAMES, (3, 5), {"dtype": torch.int64}, RuntimeError,
        "Only Tensors of floating point and complex dtype can require gradients",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "case"), [(name, case) for case, row in ERRORS.items() for name in row[0]])
def test_constructor_errors(name, case):
    _, args, options, kind, text = ERRORS[case]
    same_error(getattr(nn, name), getattr(fused_rnn, name), kind, text, *args, **options)


@pytest.mark.parametrize("name", SEQUENCES)
def test_order_of_checks(name):
    """All arguments are wrong at first and corrected one by one; the same check raises at each stage."""
    wrong = {"proj_size": -1} if name == "LSTM" else {"proj_size": 0}
    wrong |= {"nonlinearity": "x"} if name == "RNN" else {}
    wrong |= {"dropout": "2", "bias": 1, "batch_first": 1}
    wrong |= {"input_size": 1.0, "hidden_size": 1.0, "num_layers": 0}
    repairs = [("proj_size", None)] if name != "LSTM" else []
    repairs += [("nonlinearity", None), ("dropout", 2.0), ("dropout", 0.5), ("bias", True)]
    repairs += [("batch_first", True), ("input_size", 0), ("input_size", 3)]
    repairs += [("hidden_size", 0), ("hidden_size", 5), ("num_layers", 1)]
    spoken = set()
    for argument, value in repairs:
        expected = error_of(getattr(nn, name), **wrong)
        assert error_of(getattr(fused_rnn, name), **wrong) == expected
        spoken.add(expected)
        wrong[argument] = value
        if value is None:
            del wrong[argument]
    assert len(spoken) >= 8


def test_projected_bidirectional_names():
    module = fused_rnn.LSTM(3, 5, 2, bidirectional=True, proj_size=2)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    first = "weight_ih_l0 weight_hh_l0 bias_ih_l0 bias_hh_l0 weight_hr_l0 weight_ih_l0_reverse"
    assert list(shapes)[:6] == first.split()
    assert shapes["weight_ih_l1_reverse"] == (20, 4)
    assert shapes["weight_hh_l1"] == (20, 2) and shapes["weight_hr_l1"] == (2, 5)
    assert not any("bias" in name for name, _ in fused_rnn.GRU(3, 5, bias=False).named_parameters())


@each_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_seeded_initialisation(key, dtype):
    name, options = MODULES[key]
    torch.manual_seed(3)
    expected = getattr(nn, name)(INPUT, HIDDEN, dtype=dtype, **options)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    actual = getattr(fused_rnn, name)(INPUT, HIDDEN, dtype=dtype, **options)
    assert torch.equal(torch.get_rng_state(), state)
    for wanted, parameter in zip(expected.parameters(), actual.parameters(), strict=True):
        assert parameter.dtype == dtype and torch.equal(parameter, wanted)
        assert parameter.abs().max() <= 5**-0.5 + 1e-3


@each_module
def test_reset_parameters(key):
    expected, actual = pair(key)
    for module in (expected, actual):
        module.register_parameter("extra", nn.Parameter(torch.zeros(7)))
        torch.manual_seed(5)
        assert module.reset_parameters() is None
    for wanted, parameter in zip(expected.parameters(), actual.parameters(), strict=True):
        assert torch.equal(parameter, wanted) and parameter.requires_grad and parameter.is_leaf
    assert actual.extra.abs().max() > 0


@pytest.mark.parametrize("name", CELLS)
def test_hidden_size_zero(name):
    cell = getattr(fused_rnn, name)(3, 0)
    cell.register_parameter("extra", nn.Parameter(torch.ones(2)))
    cell.reset_parameters()
    assert torch.equal(cell.extra, torch.zeros(2))


@each_module
def test_state_dict(key):
    expected, actual = pair(key)
    state = actual.state_dict()
    assert list(state) == list(expected.state_dict()) == [n for n, _ in actual.named_parameters()]
    assert state._metadata == expected.state_dict()._metadata
    assert not list(actual.buffers())
    for name, parameter in actual.named_parameters():
        assert state[name].data_ptr() == parameter.data_ptr()
    for source, target in ((actual, expected), (expected, actual)):
        source.reset_parameters()
        target.load_state_dict(source.state_dict(), strict=True)
        close(list(target.state_dict().values()), list(source.state_dict().values()))


@each_module
def test_load_errors(key):
    expected, actual = pair(key)
    name = next(iter(actual.state_dict()))
    for change in ({"extra": torch.zeros(1)}, {name: torch.zeros(1, 2)}):
        state = {**actual.state_dict(), **change}
        text = "Error(s) in loading state_dict"
        same_error(expected.load_state_dict, actual.load_state_dict, RuntimeError, text, state)


@each_sequence
def test_flat_weights(key):
    expected, actual = pair(key)
    named = dict(actual.named_parameters())
    assert actual._flat_weights_names == expected._flat_weights_names == list(named)
    assert actual._all_weights == expected._all_weights
    assert isinstance(actual._flat_weights, list)
    for weight, reference, name in zip(actual._flat_weights, actual._flat_weight_refs, named, strict=True):
        assert weight is named[name] and reference() is weight
    for weights, names in zip(actual.all_weights, actual._all_weights, strict=True):
        assert all(w is named[n] for w, n in zip(weights, names, strict=True))


@each_module
def test_no_further_names(key):
    expected, actual = pair(key)
    own, wanted = ([(name, type(value), value) for name, value in public(m).items()] for m in (actual, expected))
    assert own == wanted
    assert set(type(actual).__constants__) == set(type(expected).__constants__)
    assert getattr(type(actual), "__jit_unused_properties__", None) == getattr(
        type(expected), "__jit_unused_properties__", None
    )
    assert set(pickle.loads(pickle.dumps(actual)).__dict__) >= set(public(expected))


@pytest.mark.parametrize("name", SEQUENCES)
def test_flatten_parameters(name):
    calls = []

    class Counting(getattr(fused_rnn, name)):
        def flatten_parameters(self):
            calls.append(1)
            assert super().flatten_parameters() is None

    module = Counting(3, 5)
    assert len(calls) == 1
    signature = inspect.signature(getattr(fused_rnn, name).flatten_parameters)
    assert list(signature.parameters) == ["self"]
    module(torch.randn(6, 4, 3))
    assert len(calls) == 1
    for converted in (module.double(), module.half(), module.to(torch.float32)):
        assert converted is module
    assert len(calls) == 4
    plain = getattr(nn, name)(3, 5)
    plain.load_state_dict(module.state_dict())
    input = torch.randn(6, 4, 3)
    close(module(input), plain(input))
