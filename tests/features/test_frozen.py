"""Frozen modules: every argument of forward, the three formats of weights, errors, copies and files of weights."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import fused_rnn
from cases import CASES, Case
from contract import MODULES, arguments, pair, tensors
from fused_rnn import _C
from fused_rnn.cell_info import NUMBER
from processes import survives

pytestmark = pytest.mark.usefixtures("deterministic")

FORMATS = ("float32", "bfloat16", "int8")


@pytest.fixture
def deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    with torch.no_grad():
        yield
    torch.use_deterministic_algorithms(False)


def assert_equal(found: Any, expected: Any) -> None:
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def rounded(module: nn.Module, weights: str) -> nn.Module:
    """A copy of the module whose weights have the values that freezing gives them."""
    result = copy.deepcopy(module)
    state = fused_rnn.freeze(module, weights).state_dict()
    for name, parameter in result.named_parameters():
        value = state[name].float()
        if f"{name}_scale" in state:
            value *= state[f"{name}_scale"].unsqueeze(1)
        parameter.copy_(value)
    return result


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_those_of_the_deterministic_kernels(case: Case, weights: str) -> None:
    """Bit for bit, with the weights rounded as the format says."""
    _, module, _ = case.modules(torch.float32)
    frozen = fused_rnn.freeze(module, weights)
    inputs = case.data(torch.float32)
    assert_equal(case.run(frozen, inputs), case.run(rounded(module, weights), inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_int8_is_near(case: Case) -> None:
    """Against the same weights in float32, what is left is the rounding of inputs and states, 2^-16 of the largest."""
    _, module, _ = case.modules(torch.float32)
    frozen = fused_rnn.freeze(module, "int8")
    inputs = case.data(torch.float32)
    for found, expected in zip(
        tensors(case.run(frozen, inputs)), tensors(case.run(rounded(module, "int8"), inputs)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * max(1.0, expected.abs().max().item()))


KEYWORDS = ["resets", "reset_state", "reset_state_per_step", "lengths", "resets+lengths"]


@pytest.mark.parametrize("keywords", KEYWORDS)
@pytest.mark.parametrize("key", ["rnn_relu", "lstm_deep", "lstm_proj", "gru_deep", "lstm_batch_first"])
def test_keywords(key: str, keywords: str) -> None:
    torch.manual_seed(0)
    name, options = MODULES[key]
    module = getattr(fused_rnn, name)(3, 5, **options)
    frozen = fused_rnn.freeze(module)
    T, B = 7, 4
    x = torch.randn(T, B, 3)
    given: dict[str, Any] = {}
    if "lengths" in keywords:
        given["lengths"] = torch.tensor([3, 7, 0, 5])
    if "reset" in keywords:
        given["resets"] = torch.rand(T, B) < 0.3
    if "state" in keywords:
        sizes = [(module.proj_size or 5) if name == "LSTM" else 5, 5][: 2 if name == "LSTM" else 1]
        rows = module.num_layers * (2 if module.bidirectional else 1)
        first = (T,) if "step" in keywords else ()
        states = tuple(torch.randn(*first, rows, B, size) for size in sizes)
        given["reset_state"] = states if name == "LSTM" else states[0]
    if module.batch_first:
        x = x.transpose(0, 1)
        given |= {"resets": given["resets"].t()} if "resets" in given else {}
    assert_equal(frozen(x, **given), module(x, **given))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("batch", [None, 1, 5])
def test_cells(name: str, batch: int | None, weights: str) -> None:
    torch.manual_seed(0)
    cell = getattr(fused_rnn, name)(3, 20)
    frozen, rows = fused_rnn.freeze(cell, weights), () if batch is None else (batch,)
    x, h = torch.randn(*rows, 3), torch.randn(*rows, 20)
    hx = (h, torch.randn(*rows, 20)) if name == "LSTMCell" else h
    for found, expected in zip(tensors(frozen(x, hx)), tensors(cell(x, hx)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if weights == "float32" else 2e-2)
    assert tensors(frozen(x))[0].shape == (*rows, 20)


def test_step_is_forward_of_one_step() -> None:
    module = fused_rnn.LSTM(3, 5, 2)
    frozen, hx = fused_rnn.freeze(module), (torch.randn(2, 4, 5), torch.randn(2, 4, 5))
    x = torch.randn(4, 3)
    assert_equal(frozen.step(x, hx), module.step(x, hx))
    assert_equal(frozen.step(x[0]), module.step(x[0]))
    with pytest.raises(ValueError, match="bidirectional=False"):
        fused_rnn.freeze(nn.GRU(3, 5, bidirectional=True)).step(x)


def plan(module: nn.RNNBase, weights: str, T: int, B: int, threads: int) -> dict[str, Any]:
    """How threads share the first layer of a frozen module."""
    I, H, P = module.input_size, module.hidden_size, module.proj_size or module.hidden_size  # noqa: E741
    directions = 2 if module.bidirectional else 1
    number = [None, *FORMATS].index(weights)
    return _C.cpu_plan(NUMBER[module.mode.lower()], T, B, I, H, P, directions, threads, False, 0, False, number)


@pytest.mark.parametrize("weights", FORMATS)
def test_threads_compute_the_same(weights: str) -> None:
    shared = []
    for module, T, B in (
        (nn.LSTM(64, 640, 2), 3, 2),
        (nn.GRU(200, 200), 40, 9),
        (nn.RNN(40, 64), 90, 12),
        (nn.LSTM(64, 320, proj_size=70), 9, 3),
        (nn.GRU(64, 200, bidirectional=True), 9, 3),
    ):
        x, frozen = torch.randn(T, B, module.input_size), fused_rnn.freeze(module, weights)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(frozen(x))
            parts = plan(module, weights, T, B, threads)
            shared.append((parts["teams"], parts["workers"], parts["splits_units"]))
        assert_equal(results[1], results[0])
        assert_equal(results[2], results[0])
    ways = {(teams > 1, workers > 1, units) for teams, workers, units in shared}
    assert ways >= {(False, False, False), (False, True, False), (False, True, True), (True, False, False)}


@pytest.mark.parametrize("weights", FORMATS)
def test_small_calls_are_left_to_one_thread(weights: str) -> None:
    """Waiting for one another would take longer than the work: an LSTM of 64 units takes some microseconds a step."""
    for T, B in ((1, 1), (16, 1), (1, 8)):
        assert plan(nn.LSTM(64, 64), weights, T, B, 2)["workers"] == 1
    assert plan(nn.LSTM(512, 512), weights, 16, 4, 2)["workers"] == 2


def test_not_finite_inputs() -> None:
    """A NaN stays in its row. int8 also makes NaN of an infinity."""
    module = nn.GRU(3, 5)
    x = torch.randn(4, 3, 3)
    x[1, 1, 0] = torch.nan
    for weights in FORMATS:
        y, _ = fused_rnn.freeze(module, weights)(x)
        assert y[1:, 1].isnan().all() and y[:, [0, 2]].isfinite().all() and y[0].isfinite().all()
    x[1, 1, 0] = torch.inf
    assert_equal(fused_rnn.freeze(module)(x), fused_rnn.from_torch(module)(x))
    assert fused_rnn.freeze(module, "int8")(x)[0][1:, 1].isnan().all()


def test_weights_of_zero_rows() -> None:
    module = nn.RNN(3, 5)
    module.weight_ih_l0.data[2] = 0
    module.weight_hh_l0.data.zero_()
    for weights in FORMATS:
        y, _ = fused_rnn.freeze(module, weights)(torch.zeros(2, 1, 3))
        torch.testing.assert_close(y, module(torch.zeros(2, 1, 3))[0])


# Models


def model() -> nn.Module:
    parts = {"rnn": nn.GRU(3, 5), "cells": nn.ModuleList([nn.LSTMCell(3, 5), fused_rnn.RNNCell(3, 5)])}
    return nn.ModuleDict({**parts, "head": nn.Linear(5, 2), "again": parts["rnn"]})


def test_a_model_is_copied() -> None:
    original = model().train()
    frozen = fused_rnn.freeze(original, "bfloat16")
    assert frozen.frozen == ["rnn", "cells.0", "cells.1"]
    assert [type(frozen["rnn"]), type(frozen["cells"][0])] == [fused_rnn.FrozenRNN, fused_rnn.FrozenCell]
    assert frozen["again"] is frozen["rnn"] and not frozen.training
    assert original.training and type(original["rnn"]) is nn.GRU
    assert frozen["head"].weight is not original["head"].weight
    assert [name for name, _ in frozen.named_parameters()] == ["head.weight", "head.bias"]
    assert not frozen["head"].weight.requires_grad and original["head"].weight.requires_grad


def test_later_changes_do_not_reach_it() -> None:
    module, x = nn.GRU(3, 5), torch.randn(2, 1, 3)
    frozen = fused_rnn.freeze(module)
    before = frozen(x)
    module.weight_hh_l0.data.add_(1)
    assert_equal(frozen(x), before)
    assert not torch.equal(fused_rnn.freeze(module)(x)[0], before[0])


class WithForward(fused_rnn.LSTM):
    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        return super().forward(input * 2, hx, **options)


@pytest.mark.parametrize(
    "module, reason",
    [
        (lambda: fused_rnn.LSTM(3, 5, layer_norm=True), "no layer_norm"),
        (lambda: fused_rnn.LSTM(3, (5, 6), 2), "sizes by layer"),
        (lambda: WithForward(3, 5), "a forward of its own"),
        (lambda: nn.Sequential(nn.Linear(3, 3), WithForward(3, 5)), "1: WithForward has a forward of its own"),
    ],
)
def test_what_cannot_be_frozen(module: Any, reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        fused_rnn.freeze(module())


def test_wrong_shapes_are_named() -> None:
    module = nn.LSTM(3, 5, proj_size=2)
    module.weight_hr_l0 = nn.Parameter(torch.zeros(5, 2))  # as many numbers
    with pytest.raises(ValueError, match=r"weight_hr_l0 to be float32 on the CPU, \[2, 5\] and not empty, got .*5, 2"):
        fused_rnn.freeze(module)
    with pytest.raises(ValueError, match=r"weight_ih to be .* \[15, 0\] and not empty"):
        fused_rnn.freeze(nn.GRUCell(0, 5))


def test_wrong_arguments_of_freeze() -> None:
    with pytest.raises(ValueError, match=r"weights to be one of 'float32', 'bfloat16', 'int8', got 'int4'"):
        fused_rnn.freeze(nn.GRU(3, 5), "int4")
    with pytest.raises(ValueError, match=r"weights to be one of .* got \['int8'\]"):
        fused_rnn.freeze(nn.GRU(3, 5), ["int8"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="found none"):
        fused_rnn.freeze(nn.Linear(3, 5))
    with pytest.raises(ValueError, match="found only frozen ones"):
        fused_rnn.freeze(nn.Sequential(fused_rnn.freeze(nn.GRU(3, 5))))
    with pytest.raises(TypeError, match="the module is frozen already"):
        fused_rnn.freeze(fused_rnn.freeze(nn.GRU(3, 5)))
    with pytest.raises(TypeError, match=r"expected module to be a torch\.nn\.Module, got str"):
        fused_rnn.freeze("gru.pt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight_ih_l0 to be float32 on the CPU.*float64"):
        fused_rnn.freeze(nn.GRU(3, 5).double())
    broken = nn.GRU(3, 5)
    broken.weight_hh_l0.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight_hh_l0 to be finite"):
        fused_rnn.freeze(broken, "int8")
    assert fused_rnn.freeze(broken)(torch.zeros(1, 1, 3))[0].isnan().any()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda f: f(torch.randn(2, 1, 4)), RuntimeError, "must be equal to input_size"),
        (lambda f: f(torch.randn(2, 1, 3).double()), ValueError, "does not match weight dtype"),
        (lambda f: f(torch.randn(2, 1, 3), torch.randn(1, 2, 5)), RuntimeError, "Expected hidden size"),
        (lambda f: f(torch.randn(0, 1, 3)), RuntimeError, "sequence length to be larger than 0"),
        (lambda f: f(torch.randn(2, 1, 3, device="meta")), Exception, "device"),
        (lambda f: f(torch.randn(2, 1, 3), lengths=torch.tensor([3])), ValueError, "between 0 and 2"),
        (lambda f: f("x"), TypeError, "expected input to be a Tensor"),
    ],
)
def test_wrong_arguments_of_forward(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call(fused_rnn.freeze(nn.GRU(3, 5)))


def test_wrong_arguments_of_a_cell() -> None:
    cell = fused_rnn.freeze(nn.LSTMCell(3, 5))
    with pytest.raises(TypeError, match="FrozenLSTMCell: expected input to be a Tensor, got str"):
        cell("x")
    with pytest.raises(RuntimeError, match=r"FrozenLSTMCell: expected input of shape \[B, 3\] or \[3\], got \[2, 4\]"):
        cell(torch.randn(2, 4))
    with pytest.raises(TypeError, match=r"FrozenLSTMCell: expected hx to be None or a pair \(h, c\), got Tensor"):
        cell(torch.randn(2, 3), torch.randn(2, 5))


def test_there_is_no_gradient() -> None:
    frozen = fused_rnn.freeze(nn.GRU(3, 5))
    with torch.enable_grad():
        with pytest.raises(RuntimeError, match="frozen modules have no gradient"):
            frozen(torch.randn(2, 1, 3, requires_grad=True))
        assert not frozen(torch.randn(2, 1, 3))[0].requires_grad
    assert list(frozen.parameters()) == []


def test_a_model_with_a_frozen_part_can_be_trained() -> None:
    """train() leaves the frozen part as it is, and the rest learns."""
    model = nn.ModuleDict({"first": nn.Dropout(), "rnn": fused_rnn.freeze(nn.GRU(3, 5)), "head": nn.Linear(5, 2)})
    assert model.train() is model
    assert model.training and model["first"].training and model["head"].training and not model["rnn"].training
    before = copy.deepcopy(model["rnn"].state_dict())
    with torch.enable_grad():
        model["head"](model["rnn"](torch.randn(4, 2, 3))[0]).sum().backward()
    assert model["head"].weight.grad is not None
    assert all(torch.equal(value, before[name]) for name, value in model["rnn"].state_dict().items())
    assert fused_rnn.freeze(nn.GRU(3, 5)).train().training is False


def test_negated_and_conjugated_views() -> None:
    """Whose memory holds the negatives of their numbers."""
    module, z = nn.GRU(3, 5), torch.randn(4, 2, 3, dtype=torch.complex64)
    h0 = torch.randn(1, 2, 5, dtype=torch.complex64)
    frozen = fused_rnn.freeze(module)
    assert z.conj().imag.is_neg()
    assert_equal(frozen(z.conj().imag, h0.conj().imag), frozen(-z.imag, -h0.imag))
    negated = copy.deepcopy(module)
    for name, parameter in module.named_parameters():
        setattr(negated, name, nn.Parameter(torch._neg_view(-parameter.detach())))
    assert negated.bias_ih_l0.is_neg()
    for weights in FORMATS:
        assert_equal(fused_rnn.freeze(negated, weights)(z.imag), fused_rnn.freeze(module, weights)(z.imag))
    state = {name: torch._neg_view(-value) for name, value in frozen.state_dict().items()}
    other = fused_rnn.freeze(nn.GRU(3, 5))
    other.load_state_dict(state)
    assert_equal(other(z.imag), frozen(z.imag))


@pytest.mark.parametrize("batch", [1, 5, 30])
def test_int8_sums_of_more_than_512_products(batch: int) -> None:
    """Which are made in parts: an integer holds no more."""
    module, x = nn.LSTM(1100, 530, proj_size=515), torch.randn(2, batch, 1100)
    largest = torch.full_like(x, 3.0)  # all products at their largest, of one sign
    module.weight_ih_l0.data[:5] = 0.01
    frozen, expected = fused_rnn.freeze(module, "int8"), rounded(module, "int8")
    for given in (x, largest):
        for a, b in zip(tensors(frozen(given)), tensors(expected(given)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


# Memory


def resident() -> int:
    """Bytes of memory that this process occupies."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def frees_memory_with_the_module() -> None:
    """And with its copies, streams, and the weights that load_state_dict replaced: 17 MB packed each."""
    torch.set_grad_enabled(False)
    module = nn.LSTM(1024, 1024)
    module(torch.zeros(1, 1, 1024))
    before = resident()
    for _ in range(6):
        module.weight_ih_l0.data += 1
        frozen = fused_rnn.freeze(module, "bfloat16")
        other = copy.deepcopy(frozen)
        stream = other.stream()
        stream(torch.zeros(1024))
        state = {name: value + 1 for name, value in frozen.state_dict().items()}
        frozen.load_state_dict(state)
        frozen(torch.zeros(1, 1, 1024))
        del frozen, other, stream, state
    gc.collect()
    assert resident() - before < 25e6


def keeps_the_model_of_a_program_without_a_module() -> None:
    """An exported program has the bytes alone: the operator packs them once, not at every call."""
    torch.set_grad_enabled(False)
    frozen, x = fused_rnn.freeze(nn.LSTM(1024, 1024)), torch.randn(1, 1, 1024)
    model, sizes, expected = frozen._model.clone(), frozen._sizes, frozen(x)[0]
    assert_equal(frozen(x)[0], expected)  # whose first call imports much
    del frozen
    gc.collect()
    before = resident()
    for _ in range(3):
        assert_equal(torch.ops.fused_rnn.frozen(model, *sizes, x)[0], expected)
        assert 25e6 < resident() - before < 60e6  # 34 MB packed


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc/self/statm, of Linux")
@pytest.mark.parametrize("check", [frees_memory_with_the_module, keeps_the_model_of_a_program_without_a_module])
def test_memory(check: Callable[[], None]) -> None:
    """In a process of its own, whose allocator gives large blocks back to the system at once."""
    survives(check, MALLOC_MMAP_THRESHOLD_="65536")


def test_copies_share_what_was_packed() -> None:
    frozen = fused_rnn.freeze(nn.GRU(3, 5))
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert other._packed[0] is frozen._packed[0]


def test_as_many_models_as_one_likes() -> None:
    """None is packed anew because of the others."""
    models = [fused_rnn.freeze(nn.GRU(3, 5)) for _ in range(150)]
    packed = [model._packed[0] for model in models]
    for model, its_own in zip(models, packed, strict=True):
        assert model(torch.ones(1, 1, 3))[0].isfinite().all()
        assert copy.deepcopy(model)._packed[0] is its_own
    assert len(set(map(id, packed))) == len(models)


# Copies


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("key", MODULES)
def test_copies(key: str, way: str, weights: str) -> None:
    _, ours = pair(key)
    frozen = fused_rnn.freeze(ours, weights)
    if way == "deepcopy":
        other = copy.deepcopy(frozen)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(frozen))
    else:
        file = io.BytesIO()
        torch.save(frozen, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    given = arguments(ours)
    assert_equal(other(*given), frozen(*given))
    assert repr(other) == repr(frozen)


@pytest.mark.parametrize("weights", FORMATS)
def test_state_dict(weights: str) -> None:
    module, other = nn.LSTM(3, 5, 2, proj_size=2), nn.LSTM(3, 5, 2, proj_size=2)
    frozen, target = fused_rnn.freeze(module, weights), fused_rnn.freeze(other, weights)
    state = frozen.state_dict()
    names = set(module.state_dict())
    matrices = {f"{name}_scale" for name in names if name.startswith("weight")}
    assert set(state) == names | (matrices if weights == "int8" else set())
    assert state["weight_hr_l1"].shape == (2, 5) and state["weight_hr_l1"].dtype is getattr(torch, weights)
    file = io.BytesIO()
    torch.save(state, file)
    target.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    x = torch.randn(4, 1, 3)
    assert_equal(target(x), frozen(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_ih_l0"):
        target.load_state_dict({name: value for name, value in state.items() if name != "weight_ih_l0"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*more"):
        target.load_state_dict({**state, "more": x})
    with pytest.raises(RuntimeError, match=r"expected bias_ih_l0 to be torch\.float32 of shape"):
        target.load_state_dict({**state, "bias_ih_l0": x})
    with pytest.raises(RuntimeError, match=r"expected bias_ih_l0 to be torch\.float32 of shape .* got int"):
        target.load_state_dict({**state, "bias_ih_l0": 3})
    assert_equal(target(x), frozen(x))


def test_int8_rounds_each_row() -> None:
    module = nn.GRU(30, 5)
    state = fused_rnn.freeze(module, "int8").state_dict()
    weight, scale = state["weight_ih_l0"], state["weight_ih_l0_scale"].unsqueeze(1)
    assert weight.abs().amax(1).eq(127).all()
    assert ((weight * scale - module.weight_ih_l0).abs() <= scale / 2 * 1.001).all()


def test_threads_share_a_module() -> None:
    frozen, x = fused_rnn.freeze(nn.LSTM(16, 64), "int8"), torch.randn(20, 3, 16)
    expected = frozen(x)[0]
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda _: torch.equal(frozen(x)[0], expected), range(80)))


def test_modules_with_hooks_or_a_forward_of_their_own_are_refused() -> None:
    """weight_norm sets its weight in a hook: frozen, it would be stale."""
    normed = nn.utils.weight_norm(nn.GRU(3, 5), "weight_hh_l0")
    hooked, patched = fused_rnn.GRU(3, 5), fused_rnn.GRU(3, 5)
    hooked.register_forward_hook(lambda module, given, result: result)
    patched.forward = lambda x: x
    for module, reason in ((normed, "forward hooks"), (hooked, "forward hooks"), (patched, "a forward of its own")):
        with pytest.raises(TypeError, match=reason):
            fused_rnn.freeze(module)


def test_a_model_keeps_its_own_attributes() -> None:
    model = nn.Sequential(nn.GRU(3, 5))
    model.frozen = True
    with pytest.raises(ValueError, match="an attribute named 'frozen' of its own"):
        fused_rnn.freeze(model)


def test_torchs_default_dtype_has_no_influence() -> None:
    module = nn.LSTM(3, 5)
    torch.set_default_dtype(torch.float64)
    try:
        frozen = fused_rnn.freeze(module)
        stream = frozen.stream()
        y = stream(torch.ones(3, dtype=torch.float32))
        assert y.dtype is torch.float32 and stream.state[0].dtype is torch.float32
        assert frozen(torch.ones(1, 3, dtype=torch.float32))[0].dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
