"""Packed sequences and cells give torch.nn's results and errors."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import fused_rnn
from contract import (
    BATCH,
    CELLS,
    HIDDEN,
    INPUT,
    LENGTHS,
    MODULES,
    SEQUENCES,
    arguments,
    close,
    each_basic_sequence,
    each_cell,
    each_precision,
    each_sequence,
    error_of,
    gradients,
    pair,
    same_call_error,
    tensors,
    zero_state,
)

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = torch.zeros(BATCH, HIDDEN)


@each_sequence
@each_precision
def test_packed(key, dtype):
    expected, actual = pair(key, dtype)
    packed, _ = arguments(actual, packed=True)
    output, state = actual(packed)
    assert type(output) is PackedSequence
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert getattr(output, name) is getattr(packed, name)
    close((output, state), expected(packed))
    padded, lengths = pad_packed_sequence(output)
    for row, length in enumerate(lengths.tolist()):
        alone = pad_packed_sequence(packed)[0][:length, row]
        alone_output, alone_state = expected(alone)
        close(padded[:length, row], alone_output)
        close([t[:, row] for t in tensors(state)], alone_state)


@each_sequence
def test_packed_state_order(key):
    expected, actual = pair(key)
    packed, hx = arguments(actual, packed=True, grad=True)
    assert packed.sorted_indices is not None
    close(actual(packed, hx), expected(packed, hx))
    close(gradients(actual, packed, hx), gradients(expected, packed, hx), grad=True)


@each_sequence
@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_packed_data_of_any_strides(key, layout):
    expected, actual = pair(key)
    packed, hx = arguments(actual, packed=True)
    data = {
        "sliced": torch.stack([packed.data] * 2, -1)[..., 0],
        "transposed": packed.data.t().contiguous().t(),
    }[layout]
    close(actual(PackedSequence(data, *packed[1:]), hx), expected(packed, hx))


@pytest.mark.parametrize("key", ["rnn_deep", "lstm_deep", "lstm_proj", "gru_deep"])
def test_reverse_starts_at_own_end(key):
    """The reverse direction's output of a row does not depend on the other rows."""
    _, actual = pair(key)
    rows = [torch.randn(n, INPUT) for n in LENGTHS]
    together = pad_packed_sequence(actual(pack_sequence(rows, enforce_sorted=False))[0])[0]
    for index, row in enumerate(rows):
        alone = pad_packed_sequence(actual(pack_sequence([row]))[0])[0]
        close(together[: len(row), index], alone[:, 0])


@pytest.mark.parametrize("key", ["rnn_tanh", "rnn_deep", "gru", "gru_deep"])
@pytest.mark.parametrize(
    ("shape", "dtype", "kind", "text"),
    [
        ((5, 6), torch.float32, RuntimeError, "input.size(-1) must be equal to input_size"),
        ((5, 3, 1), torch.float32, RuntimeError, "input must have 2 dimensions, got 3"),
        ((5, 3), torch.float64, ValueError, "RNN input dtype"),
    ],
)
def test_packed_input_is_checked(key, shape, dtype, kind, text):
    packed = PackedSequence(torch.zeros(shape, dtype=dtype), torch.tensor([2, 2, 1]))
    same_call_error(key, (packed,), kind, text)


@pytest.mark.parametrize("key", ["rnn_tanh", "gru"])
@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 2, 5), (1, 2, 4)])
def test_packed_state_is_checked(key, shape):
    packed = PackedSequence(torch.zeros(5, 3), torch.tensor([2, 2, 1]))
    same_call_error(key, (packed, torch.zeros(shape)), RuntimeError, "Expected hidden size")


@each_basic_sequence
@pytest.mark.parametrize(("sizes", "kind"), [([1, 2], RuntimeError), ([], IndexError)])
def test_refused_batch_sizes(key, sizes, kind):
    packed = PackedSequence(torch.zeros(3, INPUT), torch.tensor(sizes, dtype=torch.int64))
    for module in pair(key):
        assert error_of(module, packed)[0] is kind


@each_sequence
def test_ways_to_pack(key):
    expected, actual = pair(key, batch_first=True)
    rows = [torch.randn(n, INPUT) for n in LENGTHS]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    packed = pack_padded_sequence(padded, torch.tensor(LENGTHS), True, enforce_sorted=False)
    wanted = expected(packed)
    close(actual(packed), wanted)
    close(actual(pack_sequence(rows, enforce_sorted=False)), wanted)
    close(actual(PackedSequence(*packed)), wanted)
    actual.batch_first = False
    close(actual(packed), wanted)
    bare = (packed.data, packed.batch_sizes)
    close(actual(PackedSequence(*bare)), expected(PackedSequence(*bare)))
    close(actual.double()(packed.double()), expected.double()(packed.to(torch.float64)))


@each_cell
def test_cell_unbatched(key):
    expected, actual = pair(key)
    input, hx = arguments(actual, batch=1)
    hx = tuple(h[0] for h in hx) if type(hx) is tuple else hx[0]
    for args in ((input[0],), (input[0], hx)):
        assert all(t.dim() == 1 for t in tensors(actual(*args)))
        close(actual(*args), expected(*args))


@each_cell
def test_cell_dimensions(key):
    name = MODULES[key][0]
    text = f"{name}: Expected input to be 1D or 2D, got 3D instead"
    for hx in (None, zero_state(pair(key)[0])):
        same_call_error(key, (torch.zeros(1, 4, 3), hx), ValueError, text)
    hx = zero_state(pair(key)[0], 1, 4, 5)
    same_call_error(key, (torch.zeros(4, 3), hx), ValueError, "to be 1D or 2D, got 3D instead")


@each_cell
@pytest.mark.parametrize(
    ("input", "state", "text"),
    [
        ((4, 6), (4, 5), "input has inconsistent input_size: got 6 expected 3"),
        ((4, 3), (4, 6), "hidden0 has inconsistent hidden_size: got 6, expected 5"),
        ((4, 3), (3, 5), "Input batch size 4 doesn't match hidden0 batch size 3"),
        ((4, 3), (1, 5), "Input batch size 4 doesn't match hidden0 batch size 1"),
    ],
)
def test_cell_sizes(key, input, state, text):
    args = torch.zeros(input), zero_state(pair(key)[0], *state)
    same_call_error(key, args, RuntimeError, text)


@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (1, 5)])
def test_cell_memory_size(shape):
    args = torch.zeros(4, 3), (torch.zeros(4, 5), torch.zeros(shape))
    same_call_error("lstm_cell", args, RuntimeError, "hidden1")


@pytest.mark.parametrize(
    ("key", "hx", "kind"),
    [
        ("lstm_cell", STATE, TypeError),
        ("lstm_cell", (STATE,), RuntimeError),
        ("lstm_cell", (STATE,) * 3, RuntimeError),
        ("lstm_cell", (STATE, None), AttributeError),
        ("rnn_tanh_cell", (STATE, STATE), AttributeError),
        ("gru_cell", (STATE, STATE), AttributeError),
    ],
)
def test_cell_wrong_kind_of_state(key, hx, kind):
    same_call_error(key, (torch.zeros(BATCH, INPUT), hx), kind)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(("batch", "width", "hidden"), [(0, 3, 5), (4, 3, 0), (4, 0, 0), (0, 0, 0)])
def test_empty_cells(name, batch, width, hidden):
    expected, actual = (getattr(library, name)(width, hidden) for library in (nn, fused_rnn))
    input = torch.zeros(batch, width, requires_grad=True)
    close(actual(input), expected(input))
    assert all(t.shape == (batch, hidden) for t in tensors(actual(input)))
    wanted = gradients(expected, input)
    close(gradients(actual, input), [torch.zeros_like(t) for t in wanted])


@each_cell
def test_cell_without_input(key):
    expected, actual = pair(key, sizes=(0, HIDDEN))
    args = arguments(actual, grad=True)
    close(actual(*args), expected(*args))
    close(gradients(actual, *args), gradients(expected, *args), grad=True)


@pytest.mark.parametrize(("name", "cell_name"), list(zip(SEQUENCES, CELLS, strict=True)))
@each_precision
def test_chained_cells_equal_the_sequence(name, cell_name, dtype):
    sequence = getattr(fused_rnn, name)(3, 5, dtype=dtype)
    cell = getattr(fused_rnn, cell_name)(3, 5, dtype=dtype)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in sequence.state_dict().items()})
    input, hx = arguments(sequence)
    state = tuple(h[0] for h in hx) if type(hx) is tuple else hx[0]
    outputs = []
    for step in input:
        state = cell(step, state)
        outputs.append(tensors(state)[0])
    output, final = sequence(input, hx)
    close(torch.stack(outputs), output)
    close(state, [t[0] for t in tensors(final)])
