"""`fused_rnn.patched()` runs torch.nn's own classes on the fused kernels, with torch.nn's results, until it is left."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn
from contract import (
    HIDDEN,
    INPUT,
    MODULES,
    arguments,
    close,
    each_call,
    each_sequence,
    error_of,
    fused_calls,
    gradients,
    one_of_each,
    pair,
    reloaded,
)

pytestmark = pytest.mark.usefixtures("one_thread")

rnn_functions = torch.nn.modules.rnn
TORCHS = rnn_functions._VF


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """Undo a patch that a test leaves in place."""
    yield
    rnn_functions._VF = TORCHS


def is_patched() -> bool:
    """Whether a module of torch.nn's own class currently runs on the kernels."""
    module = nn.GRU(3, 5)
    with fused_calls() as calls:
        module(torch.ones(2, 1, 3))
    return "fused_rnn::forward" in calls


class Classifier(nn.Module):
    """A typical user's model: embedding, packed bidirectional LSTM, cell."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(16, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        output, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.out(self.cell(output.sum(1)))


TOKENS = torch.arange(20).view(4, 5) % 11
LENGTHS = torch.tensor([2, 5, 1, 4])
LABELS = torch.tensor([0, 1, 2, 0])


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(TOKENS, LENGTHS), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@each_call
def test_modules_built_before_and_inside(key: str, packed: bool) -> None:
    """Modules and cells, padded and packed, keep torch's class; results, their types and gradients are equal."""
    module, _ = pair(key)
    name, options = MODULES[key]
    args = arguments(module, packed=packed, grad=True)
    wanted, wanted_gradients = module(*args), gradients(module, *args)
    with fused_calls() as calls, fused_rnn.patched():
        result, found_gradients = module(*args), gradients(module, *args)
        assert type(module) is getattr(nn, name)
        assert not isinstance(module, (fused_rnn.modules.FusedRNNBase, fused_rnn.cells.FusedCellBase))
        built = getattr(nn, name)(INPUT, HIDDEN, **options)
        built.load_state_dict(module.state_dict())
        close(built(*args), wanted)
    trains_on_torchs_nodes = key in ("rnn_tanh_cell", "rnn_relu_cell")  # as fused_rnn.RNNCell does
    assert set(calls) == (set() if trains_on_torchs_nodes else {"fused_rnn::forward", "fused_rnn::backward"})
    assert type(result) is type(wanted)
    close(result, wanted)
    close(found_gradients, wanted_gradients, grad=True)
    with fused_calls() as calls, fused_rnn.patched(), torch.no_grad():
        close(module(*args), wanted)
    assert calls
    with fused_calls() as calls:
        for used in (module, built):
            close(used(*args), wanted)
            with torch.no_grad():
                used(*args)
    assert not calls


def test_training() -> None:
    plain, patched = Classifier(), Classifier()
    expected = train(plain, 20)
    with fused_calls() as calls, fused_rnn.patched():
        losses = train(patched, 20)
    assert calls.count("fused_rnn::forward") == 20 * (2 + 1)  # two layers and the cell
    assert calls.count("fused_rnn::backward") == 20 * (2 + 1)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[-1] < 0.9 * losses[0]


def test_training_may_begin_inside_and_go_on_outside() -> None:
    plain, mixed = Classifier().double(), Classifier().double()
    expected = train(plain, 6)
    with fused_rnn.patched():
        losses = train(mixed, 3)
    losses += train(mixed, 3)
    assert losses == pytest.approx(expected, rel=1e-9)


def test_backward_after_the_context() -> None:
    module = nn.LSTM(3, 5)
    input = torch.randn(4, 2, 3, requires_grad=True)
    (wanted,) = torch.autograd.grad(module(input)[0].square().sum(), input)
    with fused_rnn.patched():
        loss = module(input)[0].square().sum()
    close(torch.autograd.grad(loss, input)[0], wanted, grad=True)


def test_nested_contexts() -> None:
    assert not is_patched()
    with fused_rnn.patched():
        with fused_rnn.patched():
            assert is_patched()
        assert is_patched()
    assert not is_patched()
    assert rnn_functions._VF is TORCHS


def test_contexts_that_overlap() -> None:
    """Two contexts, as from two threads: the one that began first ends first."""
    first, second = fused_rnn.patched(), fused_rnn.patched()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    inside = is_patched()
    second.__exit__(None, None, None)
    assert inside
    assert not is_patched()


def test_an_error_inside_ends_it() -> None:
    with pytest.raises(KeyError), fused_rnn.patched(), fused_rnn.patched():
        raise KeyError
    assert not is_patched()
    assert rnn_functions._VF is TORCHS
    with fused_rnn.patched():
        with pytest.raises(RuntimeError, match="must be equal to input_size"):
            nn.GRU(3, 5)(torch.ones(2, 1, 4))
        assert is_patched()
    assert not is_patched()


def test_as_a_decorator() -> None:
    inside = fused_rnn.patched()(is_patched)
    assert inside() and inside()
    assert not is_patched()


def test_it_holds_for_all_threads() -> None:
    module, input, seen = nn.LSTM(3, 5), torch.ones(2, 1, 3), []

    def call() -> None:
        seen.append(module(input)[0].grad_fn.name())

    with fused_rnn.patched():
        call()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    call()
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_script_in_patched(name: str) -> None:
    """TorchScript compiles torch's operators; the program works after the context has ended."""
    model = nn.Sequential(getattr(nn, name)(3, 5, 2, bidirectional=True))
    input = torch.randn(4, 2, 3)
    wanted = model(input)
    with fused_rnn.patched():
        scripted = torch.jit.script(model)
        close(scripted(input), wanted)
    for program in (scripted, reloaded(scripted)):
        close(program(input), wanted)
    assert "aten::" in str(scripted.inlined_graph) and "fused_rnn" not in str(scripted.inlined_graph)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_script_of_cells_in_patched(name: str) -> None:
    cell = getattr(nn, name)(3, 5)
    input, hx = arguments(cell)
    with fused_rnn.patched():
        scripted = torch.jit.script(cell)
        close(scripted(input, hx), cell(input, hx))


def test_what_the_kernels_do_not_take_runs_as_ever() -> None:
    module = nn.GRU(3, 5)
    input = torch.randn(4, 2, 3)
    wanted = module(input)
    with torch.autocast("cpu", torch.bfloat16):
        half_wanted = module(input)
    with fused_calls() as calls, fused_rnn.patched():
        with torch.autocast("cpu", torch.bfloat16):
            close(module(input), half_wanted)
        close(torch.jit.trace(module, input, check_trace=False)(input), wanted)
    assert not calls


@each_sequence
def test_dropout_in_patched(key: str) -> None:
    module, _ = pair(key, num_layers=3, dropout=0.4)
    args = arguments(module)
    torch.manual_seed(2)
    wanted = module(*args)
    torch.manual_seed(2)
    with fused_rnn.patched():
        close(module(*args), wanted)


@one_of_each
def test_errors_in_patched(key: str) -> None:
    module, _ = pair(key)
    input, hx = arguments(module)
    small = tuple(h[..., 1:] for h in hx) if isinstance(hx, tuple) else hx[..., 1:]
    for args in [(input[..., :1], hx), (input, small), (input.double(), hx), (None,), (input[0, 0],)]:
        wanted = error_of(module, *args)
        with fused_rnn.patched():
            assert error_of(module, *args) == wanted


@each_sequence
def test_errors_of_other_layouts_and_dtypes_in_patched(key: str) -> None:
    """What torch.nn's own checks let through, its function refuses."""
    for spoil in ("input", "weight", "flag"):
        module, _ = pair(key)
        input, hx = arguments(module)
        if spoil == "input":
            input = input.to_sparse()
        elif spoil == "weight":
            module._flat_weights[-1] = module._flat_weights[-1].double()
        else:
            module.bidirectional = 1
        wanted = error_of(module, input, hx)
        assert wanted is not None
        with fused_rnn.patched():
            assert error_of(module, input, hx) == wanted, spoil


@one_of_each
def test_pickle_and_conversion_in_patched(key: str) -> None:
    module, _ = pair(key)
    with fused_rnn.patched():
        loaded = pickle.loads(pickle.dumps(module))
        assert type(loaded) is type(module)
        loaded.double()
        close(loaded(*arguments(loaded)), module.double()(*arguments(module)))


def test_our_own_modules_in_patched() -> None:
    module = fused_rnn.LSTM(3, 5)
    args = arguments(module)
    wanted = module(*args)
    with fused_rnn.patched():
        close(module(*args), wanted)
        close(module.to_torch()(*args), wanted)
