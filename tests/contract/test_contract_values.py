"""Values, determinism, threads, processes, memory and extreme sizes, against torch.nn."""

import copy
import gc
import multiprocessing
import signal
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

from contract import (
    BASIC_SEQUENCES,
    BATCH,
    HIDDEN,
    INPUT,
    ONE_OF_EACH,
    TIME,
    arguments,
    close,
    derivative,
    each_basic_sequence,
    each_call,
    each_module,
    each_sequence,
    gradients,
    loss,
    one_of_each,
    pair,
    tensors,
    unchanged,
)
from processes import survives

pytestmark = pytest.mark.usefixtures("one_thread")

LARGE = {"sizes": (32, 128)}  # enough work for more than one thread
LARGE_INPUT = {"time": 12, "batch": 8}


@pytest.mark.parametrize("key", ["lstm", "lstm_proj"])
@pytest.mark.filterwarnings("error")
def test_no_warning_from_the_kernels(key):
    """torch.nn computes projections without oneDNN and warns once; our kernels have no reason to."""
    _, actual = pair(key)
    actual(*arguments(actual))


@each_sequence
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e20, -3e38])
def test_special_values(key, value):
    expected, actual = pair(key, batch_first=False)
    input, hx = arguments(actual)
    input[2, 1, 0] = value
    found, wanted = actual(input, hx), expected(input, hx)
    close(found, wanted)
    others = [0, 2, 3]
    assert all(t[:, others].isfinite().all() for t in tensors(found))
    if value != value:
        assert found[0][2:, 1].isnan().any(-1).all()


def test_nan_goes_on_in_its_row_only():
    for key in ("rnn_tanh", "rnn_relu", "lstm", "gru"):
        _, actual = pair(key)
        input, hx = arguments(actual)
        input[2, 1, 0] = float("nan")
        nan = actual(input, hx)[0].isnan()
        assert nan[2:, 1].all() and nan.sum() == (TIME - 2) * HIDDEN


@pytest.mark.parametrize("key", ["rnn_tanh_cell", "rnn_relu_cell", "lstm_cell", "gru_cell"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e20])
def test_special_values_in_cells(key, value):
    expected, actual = pair(key)
    input, hx = arguments(actual)
    input[1] = value
    close(actual(input, hx), expected(input, hx))
    tensors(hx)[0][2] = value
    close(actual(input, hx), expected(input, hx))


@each_call
def test_repeatable(key, packed):
    _, actual = pair(key, **LARGE)
    args = arguments(actual, **LARGE_INPUT, packed=packed, grad=True)
    first = [*tensors(actual(*args)), *gradients(actual, *args)]
    second = [*tensors(actual(*args)), *gradients(actual, *args)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_sequence
def test_rows_are_independent(key):
    _, actual = pair(key, batch_first=False)
    input, hx = arguments(actual)
    wanted = actual(input, hx)
    input[:, 0] = float("nan")
    found = actual(input, hx)
    assert found[0][:, 0].isnan().all()
    close([t[:, 1:] for t in tensors(found)], [t[:, 1:] for t in tensors(wanted)])


@each_call
def test_thread_counts(key, packed):
    expected, actual = pair(key, **LARGE)
    args = arguments(actual, **LARGE_INPUT, packed=packed, grad=True)
    wanted, wanted_grads = expected(*args), gradients(expected, *args)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        close(actual(*args), wanted)
        close(gradients(actual, *args), wanted_grads, grad=True)
        assert torch.get_num_threads() == threads


@each_module
def test_deterministic_and_without_onednn(key):
    expected, actual = pair(key)
    args = arguments(actual, grad=True)
    wanted, wanted_grads = expected(*args), gradients(expected, *args)
    torch.use_deterministic_algorithms(True)
    try:
        close(actual(*args), wanted)
        close(gradients(actual, *args), wanted_grads, grad=True)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.backends.mkldnn.flags(enabled=False):
        close(actual(*args), wanted)
        close(gradients(actual, *args), wanted_grads, grad=True)


@one_of_each
@pytest.mark.parametrize("threads", [1, 2])
def test_python_threads(key, threads):
    _, actual = pair(key, **LARGE)
    calls = [arguments(actual, **LARGE_INPUT, seed=seed, grad=True) for seed in range(8)]

    def call(args):
        return tensors(actual(*args)), gradients(actual, *args)

    wanted = [call(args) for args in calls]
    torch.set_num_threads(threads)
    with ThreadPoolExecutor(4) as pool:
        for (found, grads), (value, wanted_grads) in zip(pool.map(call, calls), wanted, strict=True):
            close(found, value)
            close(grads, wanted_grads, grad=True)


@each_call
@pytest.mark.parametrize("backward", [False, True])
def test_graph_is_freed(key, packed, backward):
    """All tensors saved for backward are freed with the results, without the garbage collector."""
    _, actual = pair(key)
    input, hx = arguments(actual, packed=packed, grad=True)
    kept = []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()
            kept.append(weakref.ref(self))

    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            between = tensors(input)[0] * 1
            alive = weakref.ref(between)
            if packed:
                between = PackedSequence(between, *input[1:])
            results = tensors(actual(between, hx))
        assert any(ref() is not None for ref in kept)
        if backward:
            loss(results).backward()
        del between, results
        assert alive() is None
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()


def results_in_a_child(keys, queue):
    """Results on one thread, like DataLoader's workers: with more, GNU OpenMP deadlocks after a fork."""
    torch.set_num_threads(1)
    for key in keys:
        _, module = pair(key, **LARGE)
        args = arguments(module, **LARGE_INPUT, grad=True)
        found = [*tensors(module(*args)), *gradients(module, *args)]
        queue.put([t.detach().numpy() for t in found])


def forked_children():
    """Fork first with one thread in the parent, then after the parent has used two."""
    context = multiprocessing.get_context("fork")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        wanted = {}
        for key in ONE_OF_EACH:
            _, module = pair(key, **LARGE)
            args = arguments(module, **LARGE_INPUT, grad=True)
            wanted[key] = [*tensors(module(*args)), *gradients(module, *args)]
        queue = context.Queue()
        child = context.Process(target=results_in_a_child, args=(ONE_OF_EACH, queue))
        child.start()
        for key in ONE_OF_EACH:
            found = [torch.from_numpy(array) for array in queue.get(timeout=600)]
            close(found, wanted[key], grad=True)
        child.join(600)
        assert child.exitcode == 0


def test_forked_child():
    survives(forked_children)


@each_call
def test_nothing_is_written_to(key, packed):
    _, actual = pair(key)
    args = arguments(actual, packed=packed, grad=True)
    with unchanged(actual, args):
        gradients(actual, *args)
        with torch.no_grad():
            actual(*args)


@pytest.mark.parametrize("key", ["lstm", "lstm_deep", "lstm_cell"])
def test_states_that_share_memory(key):
    expected, actual = pair(key)
    input, (h, _) = arguments(actual, grad=True)
    close(actual(input, (h, h)), expected(input, (h, h)))
    close(gradients(actual, input, (h, h)), gradients(expected, input, (h, h)), grad=True)


def test_input_that_is_the_state():
    for key in ("rnn_tanh_cell", "gru_cell"):
        expected, actual = pair(key, sizes=(HIDDEN, HIDDEN))
        input, _ = arguments(actual)
        close(actual(input, input), expected(input, input))


@each_basic_sequence
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_long_sequences(key, scale):
    _, actual = pair(key, sizes=(8, 64))
    reference = copy.deepcopy(actual).double()
    input, hx = arguments(actual, time=500, batch=2)
    input = input * scale
    wide = tuple(h.double() for h in hx) if isinstance(hx, tuple) else hx.double()
    wanted = reference(input.double(), wide)
    for found, value in zip(tensors(actual(input, hx)), tensors(wanted), strict=True):
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=2e-5)


@each_basic_sequence
@pytest.mark.parametrize(("time", "batch"), [(20000, 1), (1, 3000)])
def test_long_and_wide(key, time, batch):
    expected, actual = pair(key)
    args = arguments(actual, time=time, batch=batch, grad=True)
    wanted, found = expected(*args), actual(*args)
    close(found, wanted)
    wanted_grads = derivative(wanted[0].square().mean(), expected, args)
    close(derivative(found[0].square().mean(), actual, args), wanted_grads, grad=True)


@each_basic_sequence
def test_interrupted(key):
    _, actual = pair(key)
    args = arguments(actual, grad=True)
    wanted = gradients(actual, *args)

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            while True:
                gradients(actual, *args)
    finally:
        signal.signal(signal.SIGALRM, previous)
    close(gradients(actual, *args), wanted, grad=True)


def test_usable_after_an_error():
    for key in BASIC_SEQUENCES:
        _, actual = pair(key)
        args = arguments(actual)
        wanted = actual(*args)
        with pytest.raises(RuntimeError):
            actual(torch.zeros(TIME, BATCH, INPUT + 1))
        close(actual(*args), wanted)
