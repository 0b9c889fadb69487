"""Shared by the contract tests: the table of modules, their inputs, and the comparisons.

Every test builds torch.nn's class and fused_rnn's class of the same name with the same parameters
and requires the same results, gradients and errors. MODULES names the variants under test.
"""

import copy
import io
import pickle
from contextlib import contextmanager, nullcontext, suppress

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn import _C, operators

SEQUENCES = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
NAMES = SEQUENCES + CELLS

TIME, BATCH, INPUT, HIDDEN = 6, 4, 3, 5
LENGTHS = (3, 6, 1, 4)  # the lengths of the packed batch: unsorted, with one sequence of a single step

DEEP = {"num_layers": 2, "bidirectional": True}
SEQUENCE_MODULES = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "rnn_deep": ("RNN", {**DEEP, "bias": False}),
    "lstm": ("LSTM", {}),
    "lstm_batch_first": ("LSTM", {"num_layers": 2, "batch_first": True}),
    "lstm_deep": ("LSTM", {**DEEP, "bias": False}),
    "lstm_proj": ("LSTM", {**DEEP, "proj_size": 2}),
    "gru": ("GRU", {}),
    "gru_deep": ("GRU", {**DEEP, "batch_first": True}),
}
CELL_MODULES = {
    "rnn_tanh_cell": ("RNNCell", {}),
    "rnn_relu_cell": ("RNNCell", {"nonlinearity": "relu"}),
    "lstm_cell": ("LSTMCell", {}),
    "gru_cell": ("GRUCell", {}),
    "gru_cell_no_bias": ("GRUCell", {"bias": False}),
}
MODULES = {**SEQUENCE_MODULES, **CELL_MODULES}
BASIC_SEQUENCES = ("rnn_tanh", "lstm", "gru")
ONE_OF_EACH = ("rnn_tanh", "lstm", "gru", "rnn_tanh_cell", "lstm_cell", "gru_cell")

# Relative and absolute. The 16-bit types (a few ulp) are for mixed precision only.
TOLERANCES = {
    torch.float64: (1e-8, 1e-9),
    torch.float32: (1e-4, 2e-5),
    torch.complex64: (1e-4, 2e-5),
    torch.float16: (4e-3, 4e-3),
    torch.bfloat16: (3e-2, 3e-2),
}

each_module = pytest.mark.parametrize("key", MODULES)
each_call = pytest.mark.parametrize(
    ("key", "packed"), [(key, False) for key in MODULES] + [(key, True) for key in SEQUENCE_MODULES]
)
each_sequence = pytest.mark.parametrize("key", SEQUENCE_MODULES)
each_cell = pytest.mark.parametrize("key", CELL_MODULES)
each_basic_sequence = pytest.mark.parametrize("key", BASIC_SEQUENCES)
one_of_each = pytest.mark.parametrize("key", ONE_OF_EACH)
each_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def twins(name, *sizes, backend=None, **options):
    """torch.nn's module of this class and fused_rnn's with the same parameters; only the latter takes `backend`."""
    torch.manual_seed(0)
    expected = getattr(nn, name)(*sizes, **options)
    actual = getattr(fused_rnn, name)(*sizes, **options, **({"backend": backend} if backend else {}))
    actual.load_state_dict(expected.state_dict())
    return expected, actual


def pair(key, dtype=torch.float32, sizes=(INPUT, HIDDEN), **changes):
    """The twins of MODULES[key]."""
    name, options = MODULES[key]
    return twins(name, *sizes, **{**options, "dtype": dtype, **changes})


def arguments(module, time=TIME, batch=BATCH, packed=False, grad=False, seed=1):
    """Leaf tensors (input, hx) that fit the module, with its dtype and device."""
    generator = torch.Generator().manual_seed(seed)
    like = next(module.parameters())

    def draw(*shape):
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(like.device, like.dtype).requires_grad_(grad)

    if isinstance(module, nn.RNNCellBase):
        input = draw(batch, module.input_size)
        shapes = [(batch, module.hidden_size)] * 2
    else:
        lead = (batch, time) if module.batch_first and not packed else (time, batch)
        input = draw(*lead, module.input_size)
        states = module.num_layers * (2 if module.bidirectional else 1)
        shapes = [
            (states, batch, module.proj_size or module.hidden_size),
            (states, batch, module.hidden_size),
        ]
    if packed:
        lengths = [1 + (length - 1) % time for length in (*LENGTHS, *range(batch))][:batch]
        packed = pack_padded_sequence(input, torch.tensor(lengths), enforce_sorted=False)
        input = PackedSequence(packed.data.detach().requires_grad_(grad), *packed[1:])
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return input, tuple(draw(*shape) for shape in shapes)
    return input, draw(*shapes[0])


def zero_state(module, *shape):
    """A zero state of this shape; a pair for the LSTM classes."""
    state = torch.zeros(shape)
    return (state, state.clone()) if isinstance(module, (nn.LSTM, nn.LSTMCell)) else state


def tensors(value):
    """The data tensors of a result or an argument, in order: (output, (h, c)) gives three."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def leaves(module, *args):
    """All tensors by which a result of module(*args) can be differentiated."""
    return [t for t in (*tensors(args), *module.parameters()) if t.requires_grad]


def ramp(tensor):
    """Values from -1 to 2 in even steps, with the tensor's shape and dtype."""
    return torch.linspace(-1, 2, tensor.numel()).to(tensor.dtype).reshape(tensor.shape)


def loss(results):
    """A scalar that weighs each entry of each result differently."""
    return sum((t * ramp(t)).sum() for t in tensors(results))


def derivative(value, module, args, **options):
    """Gradients of a value computed by module(*args), by the leaves of that call; zeros for unused leaves."""
    options |= {"allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(value, leaves(module, *args), **options)


def gradients(module, *args):
    return derivative(loss(module(*args)), module, args)


def higher_gradients(module, args, order):
    """Gradients of the first to the given order, each of a weighted sum of the previous ones."""
    value, found = loss(module(*args)), []
    for _ in range(order):
        grads = derivative(value, module, args, create_graph=True)
        found += grads
        value = loss([g.square() for g in grads])
    return found


def checkpointed(module, args, reentrant):
    """module(*args) under checkpoint, which requires all tensors at the top level."""

    def call(input, *hx):
        return tuple(tensors(module(input, hx if len(hx) == 2 else hx[0])))

    return checkpoint(call, *tensors(args), use_reentrant=reentrant)


def close(actual, expected, grad=False):
    """Assert equal structure, dtypes and shapes, and values within TOLERANCES (gradients: four times that)."""
    actual, expected = tensors(actual), tensors(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        rtol, atol = (4 * limit if grad else limit for limit in TOLERANCES[e.dtype])
        torch.testing.assert_close(a, e, rtol=rtol, atol=atol, equal_nan=True)


def saved_and_loaded(module):
    """The module that torch.load reads from what torch.save wrote of this one."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def reloaded(scripted):
    """The program that torch.jit.load reads from what torch.jit.save wrote of this one."""
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch_save": saved_and_loaded,
}


def error_of(call, *args, **options):
    """(type, text) of the exception that the call must raise."""
    with pytest.raises(Exception) as caught:
        call(*args, **options)
    return caught.type, str(caught.value)


def same_error(expected, actual, kind, text, *args, **options):
    """Assert that both callables raise the same exception, of the given kind and containing the text."""
    wanted = error_of(expected, *args, **options)
    assert issubclass(wanted[0], kind) and text in wanted[1], wanted
    assert error_of(actual, *args, **options) == wanted


def allowed_error(call, *args):
    """A context that suppresses the type of exception that this call raises, if it raises one."""
    try:
        call(*args)
    except Exception as error:
        return suppress(type(error))
    return nullcontext()


def same_outcome(expected, actual, *args):
    """Assert equal results; where torch.nn raises, ours may raise the same type of exception or return a result."""
    with allowed_error(expected, *args):
        close(actual(*args), expected(*args))


@contextmanager
def unchanged(*owners):
    """Assert that the block does not write to these tensors, nor to these modules' parameters."""
    watched = []
    for owner in owners:
        watched += owner.parameters() if isinstance(owner, nn.Module) else tensors(owner)
    before = [(t._version, t.detach().clone()) for t in watched]
    yield
    for tensor, (version, value) in zip(watched, before, strict=True):
        assert tensor._version == version
        torch.testing.assert_close(tensor.detach(), value, rtol=0, atol=0, equal_nan=True)


def same_call_error(key, args, kind, text="", **changes):
    """Assert that both modules of pair() raise the same error for these arguments, and write to nothing."""
    expected, actual = pair(key, **changes)
    with unchanged(actual, args):
        same_error(expected, actual, kind, text, *args)


@contextmanager
def fused_calls():
    """A list of the fused_rnn operators that ran in the block, filled at its end."""
    calls = []
    with torch.autograd.profiler.profile() as profiler:  # starts sooner than torch.profiler's
        yield calls
    names = (event.name for event in profiler.function_events)
    calls += [name for name in names if name.startswith("fused_rnn::")]


@contextmanager
def plain_calls():
    """Whether each call of ours in the block was computed by the one C++ function of csrc/bindings/plain.cpp."""
    found = []

    def plain(*arguments):
        results = _C.plain(*arguments)
        found.append(results is not None)
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "plain", plain)
        yield found
