"""The results of forward and its errors are torch.nn's."""

import pytest
import torch

from contract import (
    BATCH,
    HIDDEN,
    INPUT,
    MODULES,
    TIME,
    arguments,
    close,
    each_basic_sequence,
    each_call,
    each_cell,
    each_module,
    each_precision,
    each_sequence,
    error_of,
    fused_calls,
    gradients,
    loss,
    one_of_each,
    pair,
    same_call_error,
    same_outcome,
    tensors,
    unchanged,
    zero_state,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@each_module
def test_return_types(key):
    expected, actual = pair(key)
    wanted, result = expected(*arguments(actual)), actual(*arguments(actual))
    assert type(result) is type(wanted)
    if MODULES[key][0] == "LSTM":
        assert type(result[1]) is tuple and len(result[1]) == 2
    close(result, wanted)


@each_sequence
def test_unbatched(key):
    expected, actual = pair(key)
    input, hx = arguments(actual, batch=1)
    input = input.squeeze(0 if actual.batch_first else 1)
    hx = type(hx)(h.squeeze(1) for h in hx) if isinstance(hx, tuple) else hx.squeeze(1)
    for args in ((input,), (input, hx)):
        result = actual(*args)
        assert result[0].dim() == 2 and all(t.dim() == 2 for t in tensors(result))
        close(result, expected(*args))


@each_sequence
def test_batch_first(key):
    _, time_major = pair(key, batch_first=False)
    _, batch_major = pair(key, batch_first=True)
    input, hx = arguments(time_major)
    output, state = time_major(input, hx)
    swapped, same_state = batch_major(input.transpose(0, 1), hx)
    close((swapped.transpose(0, 1), same_state), (output, state))
    packed, _ = arguments(time_major, packed=True)
    close(batch_major(packed, hx), time_major(packed, hx))


@each_sequence
@pytest.mark.parametrize("batch_first", [False, True])
def test_memory_layout(key, batch_first):
    expected, actual = pair(key, batch_first=batch_first)
    args = arguments(actual)
    strides = [t.stride() for t in tensors(actual(*args))]
    assert strides == [t.stride() for t in tensors(expected(*args))]
    output, state = actual(*args)
    assert (output.transpose(0, 1) if batch_first else output).is_contiguous()
    assert all(t.is_contiguous() for t in tensors(state))


@each_module
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("time", [1, TIME])
def test_results_own_their_memory(key, mode, time):
    _, actual = pair(key)
    input, hx = arguments(actual, time=time)
    with unchanged(actual, input, hx), mode():
        results = tensors(actual(input, hx))
        wanted = [t.detach().clone() for t in results]
        for index, result in enumerate(results):
            result.detach().fill_(7.0)
            close(results[index + 1 :], wanted[index + 1 :])
            close(results[:index], [torch.full_like(t, 7.0) for t in wanted[:index]])


@each_sequence
def test_zero_batch(key):
    expected, actual = pair(key)
    input, hx = arguments(actual, batch=0, grad=True)
    close(actual(input), expected(input))
    for gradient in gradients(actual, input, hx):
        assert gradient is not None and not gradient.any()


@each_sequence
def test_zero_time(key):
    text = "Expected sequence length to be larger than 0 in RNN"
    same_call_error(key, arguments(pair(key)[0], time=0), RuntimeError, text)


@each_module
def test_default_state_is_zeros(key):
    _, actual = pair(key, dtype=torch.float64)
    input, hx = arguments(actual)
    zeros = tuple(map(torch.zeros_like, hx)) if type(hx) is tuple else torch.zeros_like(hx)
    close(actual(input), actual(input, zeros))
    close(actual(input=input, hx=hx), actual(input, hx))


def test_lstm_state_may_be_a_list():
    for key in ("lstm", "lstm_deep", "lstm_cell"):
        expected, actual = pair(key)
        input, hx = arguments(actual)
        close(actual(input, list(hx)), expected(input, hx))


def overlapping(tensor):
    """A tensor of the same shape whose rows share memory."""
    flat = torch.linspace(-1, 1, tensor.numel(), dtype=tensor.dtype)
    return flat.as_strided(tensor.shape, [1] * tensor.dim())


STRIDED = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "expanded": lambda t: t[:, :1].expand_as(t),
    "offset": lambda t: torch.cat([t[:1], t])[1:],
    "overlapping": overlapping,
    "negated": lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag,
}


@each_module
@pytest.mark.parametrize("layout", STRIDED)
def test_any_strides(key, layout):
    expected, actual = pair(key)
    input, hx = arguments(actual)
    view = STRIDED[layout]
    hx = tuple(map(view, hx)) if type(hx) is tuple else view(hx)
    input = view(input).detach().requires_grad_()
    packed_hx = tuple(h.contiguous() for h in hx) if type(hx) is tuple else hx.contiguous()
    close(actual(input, hx), expected(input.contiguous(), packed_hx))
    close(gradients(actual, input, hx), gradients(expected, input, hx), grad=True)


@each_sequence
@pytest.mark.parametrize("shape", [(), (3,), (2, 6, 4, 3)])
def test_input_dimensions(key, shape):
    name = MODULES[key][0]
    text = f"{name}: Expected input to be 2D or 3D, got {len(shape)}D"
    same_call_error(key, (torch.zeros(shape),), ValueError, text)


@each_sequence
@pytest.mark.parametrize("shape", [(6, 4, 6), (6, 6)])
def test_input_size(key, shape):
    text = "input.size(-1) must be equal to input_size. Expected 3, got 6"
    same_call_error(key, (torch.zeros(shape),), RuntimeError, text)


@each_basic_sequence
@pytest.mark.parametrize(
    ("shape", "state", "text"),
    [
        ((TIME, BATCH, INPUT), (1, HIDDEN), "For batched 3-D input, hx "),
        ((TIME, INPUT), (1, 1, HIDDEN), "For unbatched 2-D input, hx "),
    ],
)
def test_state_dimensions(key, shape, state, text):
    hx = zero_state(pair(key)[0], *state)
    same_call_error(key, (torch.zeros(shape), hx), RuntimeError, text)


@each_sequence
@pytest.mark.parametrize("change", [(-1, 0, 0), (1, 0, 0), (0, -3, 0), (0, 1, 0), (0, 0, 1)])
def test_state_shape(key, change):
    """No broadcasting: a wrong number of layers, batch (also 1) or units raises."""
    input, hx = arguments(pair(key)[0])
    h, *rest = hx if type(hx) is tuple else (hx,)
    wrong = torch.zeros([size + by for size, by in zip(h.shape, change, strict=True)])
    text = f"size {tuple(h.shape)}, got {list(wrong.shape)}"
    same_call_error(key, (input, (wrong, *rest) if rest else wrong), RuntimeError, text)


def test_lstm_names_the_state():
    input, (h, c) = arguments(pair("lstm")[0])
    for index, hx in enumerate([(h[:, :1], c), (h, c[..., :1])]):
        same_call_error("lstm", (input, hx), RuntimeError, f"Expected hidden[{index}] size")


@each_basic_sequence
def test_unbatched_state_shape(key):
    hx = zero_state(pair(key)[0], 2, HIDDEN)
    same_call_error(key, (torch.zeros(6, 3), hx), RuntimeError, "size (1, 1, 5), got [2, 1, 5]")


@each_sequence
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16])
def test_input_dtype(key, dtype):
    text = f"RNN input dtype ({dtype}) does not match weight dtype (torch.float32). Convert input:"
    same_call_error(key, (torch.zeros(6, 4, 3, dtype=dtype),), ValueError, text)
    same_call_error(key, (torch.zeros(6, 4, 9, dtype=dtype),), ValueError, text)


@each_cell
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_cell_input_dtype(key, dtype):
    same_call_error(key, (torch.zeros(4, 3, dtype=dtype),), RuntimeError, "dtype")


@each_module
@each_precision
def test_state_dtype(key, dtype):
    other = torch.float64 if dtype == torch.float32 else torch.float32
    expected, actual = pair(key, dtype)
    input, hx = arguments(actual)
    wrong = tuple(h.to(other) for h in hx) if type(hx) is tuple else hx.to(other)
    with unchanged(actual, input, wrong):
        for module in (expected, actual):
            assert issubclass(error_of(module, input, wrong)[0], RuntimeError)


@pytest.mark.parametrize(
    ("key", "index"),
    [("lstm", 0), ("lstm", 1), ("lstm_deep", 0), ("lstm_deep", 1), ("lstm_cell", 0)],
)
def test_one_state_of_two(key, index):
    expected, actual = pair(key)
    input, hx = arguments(actual)
    hx = tuple(h.double() if i == index else h for i, h in enumerate(hx))
    for module in (expected, actual):
        assert issubclass(error_of(module, input, hx)[0], RuntimeError)


def test_cell_promotes_its_memory():
    """In torch.nn c may have another dtype than the other tensors, apparently by accident."""
    expected, actual = pair("lstm_cell")
    input, (h, c) = arguments(actual)
    same_outcome(expected, actual, input, (h, c.double()))


@each_basic_sequence
@pytest.mark.parametrize("input", [[1.0], None, (torch.zeros(6, 4, 3),)])
def test_input_is_no_tensor(key, input):
    same_call_error(key, (input,), AttributeError, "has no attribute 'dim'")


H0 = torch.zeros(1, BATCH, HIDDEN)


@pytest.mark.parametrize(
    ("key", "hx", "kind", "text"),
    [
        ("gru", (H0, H0), AttributeError, "dim"),
        ("rnn_tanh", (H0,), AttributeError, "dim"),
        ("lstm", (H0,), IndexError, ""),
        ("lstm", (H0, None), AttributeError, "dim"),
        ("lstm", (H0, H0, H0), RuntimeError, "lstm expects two hidden states"),
        ("lstm", H0, IndexError, ""),
        ("lstm", torch.zeros(2, BATCH, HIDDEN), RuntimeError, "should also be 3-D"),
    ],
)
def test_wrong_kind_of_state(key, hx, kind, text):
    same_call_error(key, (torch.zeros(TIME, BATCH, INPUT), hx), kind, text)


@each_basic_sequence
def test_bidirectional_must_be_bool_in_forward(key):
    same_call_error(key, (torch.zeros(6, 4, 3),), TypeError, bidirectional=1)


OTHER_LAYOUTS = {"sparse": torch.Tensor.to_sparse, "mkldnn": torch.Tensor.to_mkldnn}


@each_basic_sequence
@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_other_layouts_raise(key, layout):
    for module in pair(key):
        input, hx = arguments(module)
        assert issubclass(error_of(module, OTHER_LAYOUTS[layout](input), hx)[0], RuntimeError)


@one_of_each
@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_other_layouts_of_the_state(key, layout):
    """Where torch.nn accepts such a state, the results are equal."""
    expected, actual = pair(key)
    input, hx = arguments(actual)
    convert = OTHER_LAYOUTS[layout]
    hx = tuple(map(convert, hx)) if isinstance(hx, tuple) else convert(hx)
    same_outcome(expected, actual, input, hx)


@each_basic_sequence
def test_nested_input_raises(key):
    rows = [torch.ones(TIME, INPUT), torch.ones(2, INPUT)]
    input = torch.nested.nested_tensor(rows, layout=torch.jagged)
    for module in pair(key):
        assert issubclass(error_of(module, input)[0], RuntimeError)


@each_call
@each_precision
@pytest.mark.parametrize("grad", [False, True])
def test_fused_operators_run(key, packed, dtype, grad):
    """Otherwise the comparisons would compare torch.nn with itself. An RNNCell trains on torch.nn's operators."""
    _, module = pair(key, dtype)
    args = arguments(module, packed=packed, grad=grad)
    with fused_calls() as calls:
        loss(module(*args)).backward()
    trains = not isinstance(module, torch.nn.RNNCell)
    assert any("forward" in call for call in calls) == trains
    assert any("backward" in call for call in calls) == trains
    with fused_calls() as calls, torch.no_grad():
        module(*args)
    assert calls
