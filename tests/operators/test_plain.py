"""Plain calls by one C++ function: they are what Python would compute, and only made where nobody could tell."""

from __future__ import annotations

import gc
import random
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn
from contract import plain_calls
from fused_rnn import _C, operators, policy, tuned
from tuned_calls import table as table

CELLS = {"RNN": {}, "ReLU": {"nonlinearity": "relu"}, "LSTM": {}, "GRU": {}}
RESETS, LENGTHS = torch.tensor([[True, False], [False, True]]), torch.tensor([1, 2])
KEYWORDS = ({"resets": RESETS}, {"lengths": LENGTHS}, {"resets": RESETS, "lengths": LENGTHS})
SIZES: tuple[dict[str, Any], ...] = (
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "batch_first": True},
    {"num_layers": 3, "dropout": 0.5, "batch_first": True},
)


def made(cell: str, options: dict[str, Any], dtype: torch.dtype = torch.float32, suffix: str = "") -> torch.nn.Module:
    cls = getattr(fused_rnn, ("RNN" if cell == "ReLU" else cell) + suffix)
    return cls(3, 4, **CELLS[cell], **options, dtype=dtype).eval()


def states_of(module: torch.nn.Module, dtype: torch.dtype, *shape: int) -> Any:
    h, c = torch.randn(2, *shape, dtype=dtype)
    return (h, c) if "LSTM" in type(module).__name__ else h


def calls_of(module: torch.nn.Module, options: dict[str, Any], dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Its forward, and its step if it has one, with states and without, and with our keywords."""
    if "Cell" in type(module).__name__:
        x, state = torch.randn(2, 3, dtype=dtype), states_of(module, dtype, 2, 4)
        yield from (lambda: module(x), lambda: module(x, state))
        return
    layers = options.get("num_layers", 1)
    x, state = torch.randn(2, 2, 3, dtype=dtype), states_of(module, dtype, layers, 2, 4)
    if options.get("bidirectional"):
        state = states_of(module, dtype, 2 * layers, 2, 4)
    yield from (lambda: module(x), lambda: module(x, state))
    alone = tuple(s[:, 0] for s in state) if isinstance(state, tuple) else state[:, 0]
    yield from (lambda: module(x[0]), lambda: module(x[0], alone), lambda: module(x[0], resets=RESETS[0]))
    yield from (lambda keywords=keywords: module(x, state, **keywords) for keywords in KEYWORDS)
    if not options.get("bidirectional"):
        yield from (lambda: module.step(x[0]), lambda: module.step(x[0], state))
        yield lambda: module.step(x[0], state, resets=RESETS[0])


def tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [t for result in results for t in tensors(result)]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("suffix", ["", "Cell"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", policy.DTYPES)
def test_they_are_what_python_computes(
    cell: str, suffix: str, train: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "HAS_BF16_PRODUCTS", False)  # torch.nn might be chosen
    torch.manual_seed(0)
    of_modules = SIZES + (({"proj_size": 2},) if cell == "LSTM" else ())
    for options in of_modules if not suffix else ({}, {"bias": False}):
        if "proj_size" in options:
            module, x = made(cell, options, dtype), torch.randn(2, 2, 3, dtype=dtype)
            calls = [lambda module=module, x=x: module(x)]
        else:
            module = made(cell, options, dtype, suffix)
            calls = list(calls_of(module, options, dtype))
        for call in calls:
            with torch.set_grad_enabled(train):
                with plain_calls() as found:
                    ours = call()
                assert found == [True] or (train and cell in ("RNN", "ReLU") and suffix)  # torch's own function
                with monkeypatch.context() as patch:
                    for name in ("plain", "in_one_call"):
                        patch.setattr(operators, name, lambda *_: None)
                    expected = call()
            assert type(ours) is type(expected)
            for a, b in zip(tensors(ours), tensors(expected), strict=True):
                assert torch.equal(a, b) and a.stride() == b.stride() and not a._is_view() and a.requires_grad is train
            if train:
                found, wanted = (gradients(results, module) for results in (ours, expected))
                assert all(map(torch.equal, found, wanted))


def gradients(results: Any, module: torch.nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(t.square().sum() for t in tensors(results)), list(module.parameters()))


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Own(Tensor):
    pass


def vmapped(call: Callable[[Tensor], Any], x: Tensor) -> Any:
    return torch.func.vmap(call)(x.unsqueeze(0))


def with_tangent(call: Callable[[Tensor], Any], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return call(x)


def traced(call: Callable[[Tensor], Any], x: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(lambda x: tensors(call(x))[0], (x,), check_trace=False)(x)


def compiled(call: Callable[[Tensor], Any], x: Tensor) -> Any:
    with torch._dynamo.config.patch(allow_rnn=True):
        return torch.compile(call, backend="eager", fullgraph=True)(x)


def parametrised(module: torch.nn.Module, name: str) -> torch.nn.Module:
    parametrize.register_parametrization(module, name, torch.nn.Identity())
    return module


WATCHED: dict[str, Callable[[Callable[[Tensor], Any], Tensor], Any]] = {
    "vmap": vmapped,
    "forward mode": with_tangent,
    "trace": traced,
    "compiler": compiled,
}
CONTEXTS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "profiler": profile,
    "dispatch mode": Seen,
    "function mode": SeenFunctions,
    "device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("suffix", ["", "Cell"])
@pytest.mark.parametrize("name", [*CONTEXTS, *WATCHED, "subclass", "negated", "parametrised"])
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_others_see_the_call(name: str, suffix: str, train: bool, dtype: torch.dtype, table: tuned.Table) -> None:
    torch.manual_seed(0)
    other = tuned.Call("lstm", torch.float32, None, 4, 4, 8, 128, 0, 1, 1, "sequence", False, 0)
    table.put({(tuned.machine(policy.CPU), other): tuned.Result("fused", speedup=2.0)})
    module, x = made("LSTM", {}, dtype, suffix), torch.randn(2, 3, dtype=dtype)
    if name == "trace":
        module.requires_grad_(False)
    if name == "parametrised":
        parametrised(module, "weight_hh" if suffix else "weight_hh_l0")
    x = {"subclass": lambda: x.as_subclass(Own), "negated": lambda: torch._neg_view(x)}.get(name, lambda: x)()

    def call(x: Tensor) -> Any:
        return module(x) if suffix else module(x.unsqueeze(0))

    with plain_calls() as found, CONTEXTS.get(name, nullcontext)(), torch.set_grad_enabled(train):
        WATCHED.get(name, lambda call, x: call(x))(call, x)
    assert not any(found) or (train and name in ("profiler", "negated"))  # there the node asks the dispatcher


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_and_lengths_that_do_not_fit_are_refused_as_by_other_calls(batch_first: bool, train: bool) -> None:
    module, x = made("LSTM", {"batch_first": batch_first}), torch.randn(2, 2, 3)
    with torch.set_grad_enabled(train), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of nested and of sparse tensors
        for resets in (RESETS[0, 0], RESETS[0], RESETS[:, :1], RESETS[:0], RESETS[None]):
            with pytest.raises(RuntimeError, match=r"LSTM: Expected resets of shape \[2, 2\], got"):
                module(x, resets=resets)
        for resets in (torch.nested.nested_tensor(list(RESETS)), RESETS.float(), RESETS.float().to_mkldnn(), True):
            with pytest.raises((RuntimeError, ValueError), match=r"resets|NestedTensorImpl"):
                module(x, resets=resets)
        for resets in (RESETS[0, 0], RESETS, RESETS.to_sparse_csr(), RESETS[0].float().to_mkldnn()):
            with pytest.raises((RuntimeError, ValueError), match=r"LSTM\.step: [Ee]xpected resets"):
                module.step(x[0], resets=resets)
        for lengths in (LENGTHS + 1, LENGTHS - 2, torch._neg_view(LENGTHS)):
            with pytest.raises(ValueError, match="LSTM: expected lengths between 0 and 2, got"):
                module(x, lengths=lengths)


@pytest.mark.usefixtures("one_thread")  # with the writer, more than a small machine's cores would wait for each other
def test_lengths_are_read_once() -> None:
    """Another thread may write to them between the layers, which would then differ in their rows."""
    module, x, lengths = fused_rnn.LSTM(64, 64, 3), torch.randn(64, 64, 64), torch.full((64,), 64)
    states, done = (torch.full((3, 64, 64), 7.0), torch.full((3, 64, 64), 7.0)), threading.Event()

    def write() -> None:
        while not done.wait(1e-6):
            lengths[::2] = 0
            lengths.fill_(64)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for call in range(200):
            with torch.set_grad_enabled(call % 2 == 1):
                torch.full((3, 64, 64), 12345.0)  # what is freed here is the next call's memory
                h_n = module(x, states, lengths=lengths)[1][0].detach()
            without_steps = h_n == 7
            assert (without_steps | (h_n.abs() < 1)).all() and torch.equal(without_steps[0], without_steps[2])
    finally:
        done.set()
        writer.join()


def test_what_tune_measured_is_nothing_to_resets_and_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = made("GRU", {}), torch.randn(2, 2, 3)
    monkeypatch.setattr(tuned.table, "hidden_sizes", {4})
    with plain_calls() as found, torch.no_grad():
        module(x)
        for keywords in KEYWORDS:
            module(x, **keywords)
    assert found == [True] * len(KEYWORDS)


@pytest.mark.parametrize("suffix", ["", "Cell"])
def test_gradients_of_inputs_alone(suffix: str) -> None:
    module, x = made("LSTM", {}, suffix=suffix).requires_grad_(False), torch.randn(2, 3).requires_grad_()
    with plain_calls() as found:
        results = tensors(module(x) if suffix else module(x.unsqueeze(0)))
    assert found == [True] and all(t.grad_fn is not None for t in results)
    (gradient,) = torch.autograd.grad(results[0].sum(), x)
    assert gradient.shape == x.shape and gradient.any()


@pytest.mark.skipif(not policy.bf16_unit(), reason="this processor multiplies nothing narrower than float32")
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_other_products_are_chosen_by_layers(precision: str) -> None:
    module, x = made("GRU", {}), torch.randn(2, 2, 3)
    with plain_calls() as found, torch.no_grad():
        try:
            torch.set_float32_matmul_precision(precision)
            module(x)
            module.step(x[0])  # a single step has no choice
        finally:
            torch.set_float32_matmul_precision("highest")
        module(x)
    assert found == [False, True, True]


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_weights_that_are_no_parameters_count(cell: str) -> None:
    torch.manual_seed(0)
    module, x = made(cell, {}, suffix="Cell"), torch.randn(2, 3)
    with torch.no_grad():
        expected = tensors(module(x))
        for name in ("bias_ih", "bias_hh", "weight_ih"):
            parametrised(module, name)
            assert all(map(torch.allclose, tensors(module(x)), expected))


def test_no_layers_are_no_cell() -> None:
    module, x = made("GRU", {}), torch.randn(2, 3)
    module.num_layers = 0
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
        module.step(x, torch.zeros(2, 4))


@pytest.mark.parametrize("cell", ["RNN", "LSTM"])
def test_states_without_memory(cell: str) -> None:
    """torch.nn computes with such zeros; in the kernels they would be read."""
    module, x = made(cell, {"num_layers": 2, "bidirectional": True}), torch.randn(5, 2, 3)
    zeros = torch._efficientzerotensor((4, 2, 4))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = module(x, (zeros, zeros) if cell == "LSTM" else zeros)[0]
            assert torch.allclose(y, module(x)[0])


def test_empty_states_of_another_layout_are_refused() -> None:
    module, x = made("GRU", {}), torch.empty(5, 0, 3)
    with torch.no_grad(), pytest.raises((RuntimeError, NotImplementedError)):
        module(x, torch.empty(1, 0, 4).to_mkldnn())


def test_a_mode_sees_every_operation_once() -> None:
    seen: list[str] = []

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    module, x = made("GRU", {"batch_first": True}), torch.randn(2, 5, 3)
    counts = []
    for plain in (operators.plain, lambda *_: None):
        with pytest.MonkeyPatch.context() as patch, torch.no_grad(), Counts():
            patch.setattr(operators, "plain", plain)
            seen.clear()
            module(x)
            counts.append(list(seen))
    assert counts[0] == counts[1] != []


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("cell", "suffix"), [("GRU", "Cell"), ("RNN", "Cell"), ("LSTM", ""), ("RNN", "")])
@pytest.mark.parametrize("kind", [Interrupted, RuntimeError])
def test_exceptions_of_signals_are_raised(kind: type[BaseException], cell: str, suffix: str, train: bool) -> None:
    raised = 0

    def raise_it(*_: Any) -> None:
        nonlocal raised
        raised += 1
        raise kind

    module, x = made(cell, {} if suffix else {"num_layers": 2}, suffix=suffix), torch.randn(2, 3)
    call = module if suffix else lambda x: (module(x.unsqueeze(0)), module.step(x))

    def call_until_raised(times: int) -> None:  # a function: Python 3.13's `with` misses what a loop's jump raises
        while raised < times:
            call(x)

    gc.collect(), gc.disable()  # Python loses what is raised while it calls those that wait for another test's garbage
    old = signal.signal(signal.SIGALRM, raise_it)
    try:
        with torch.set_grad_enabled(train):
            for trial in range(100):
                with pytest.raises(kind):
                    signal.setitimer(signal.ITIMER_REAL, 0.0005)
                    call_until_raised(trial + 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        gc.enable()


@pytest.mark.parametrize("suffix", ["", "Cell"])
@pytest.mark.parametrize("cell", CELLS)
def test_errors_of_hooks_are_raised(cell: str, suffix: str) -> None:
    module, x, packed = made(cell, {}, suffix=suffix), torch.randn(2, 3), 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal packed
        packed += 1
        if packed == 1:
            raise RuntimeError("the disk is full")
        return tensor

    with pytest.raises(RuntimeError, match="the disk is full"):  # noqa: SIM117 - the hooks are left first
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(x if suffix else x.unsqueeze(0))
    assert packed == 1


def test_names_that_change_as_they_are_looked_up() -> None:
    class Name(str):
        __slots__ = ()

        def __hash__(self) -> int:
            if armed:
                names.clear()
            return str.__hash__(self)

    armed, module = False, made("GRU", {"num_layers": 3})
    names = list(map(Name, module._flat_weights_names))
    kept, module._flat_weights_names, armed = list(names), names, True
    arguments = [module._parameters, names, module._flat_weights]
    assert _C.plain(torch.randn(2, 2, 3), None, 3, 3, 3, 1, True, False, False, *arguments, None, None) is None
    assert len(kept) == 12 and not names


def test_a_torch_that_lacks_something_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_ad, "_current_level", "none")
    with pytest.raises(RuntimeError):
        _C.watched()


def test_deterministic_results() -> None:
    module, x = made("LSTM", {}), torch.randn(4, 3, 3)
    torch.use_deterministic_algorithms(True)
    try:
        with plain_calls() as found, torch.no_grad():
            rows = [module(x[:, b : b + 1])[0] for b in range(3)]
            assert torch.equal(module(x)[0], torch.cat(rows, 1))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(found)


class Changes:
    """A number that empties the lists of a call as it is read."""

    def __init__(self, *lists: list[Any]) -> None:
        self.lists = lists

    def __index__(self) -> int:
        for each in self.lists:
            each.clear()
        return 1


def test_wrong_arguments_are_none() -> None:
    module, x = made("LSTM", {"num_layers": 2}), torch.randn(2, 2, 3)
    hx = list(states_of(module, torch.float32, 2, 2, 4))
    weights, names = module._flat_weights, module._flat_weights_names
    good = [x, hx, 3, 2, 2, 1, True, False, False, module._parameters, names, weights, RESETS, LENGTHS]
    half = made("LSTM", {}, torch.bfloat16)
    of_half = [x.bfloat16(), None, 3, 2, 1, 1, True, False, False, half._parameters, half._flat_weights_names]
    of_half += [half._flat_weights, None, None]
    wrong = [
        None, 1, -1, 2**62, 2**70, 0.5, "x", [], (), {}, [None], [x], [x, x, x], (None, None), {"a": 1}, x, x[0],
        x.to_sparse(), x.to_mkldnn(), x.double(), x.half(), x.int(), x.to("meta"), torch.empty(0), torch.empty(2, 0, 3),
        x.as_subclass(Own), torch.nested.nested_tensor([x[0], x[1]]), object(), True, False,
    ]  # fmt: skip
    with torch.no_grad():
        expected = tensors(_C.plain(*good))
        assert _C.plain() is None and _C.plain(*good[:-1]) is None and _C.plain(*good, 1) is None
        draw = random.Random(0)
        for trial in range(4000):
            places = [trial % len(good)] if trial < 1000 else draw.sample(range(len(good)), 2)
            arguments = [draw.choice(wrong) if i in places else value for i, value in enumerate(good)]
            for given in (arguments, [*of_half[:3], *arguments[3:6], *of_half[6:]]):  # what policy.choose is asked
                results = _C.plain(*given)
                assert results is None or all(isinstance(t, Tensor) for t in tensors(results))
        for place in (2, 3, 4, 5):
            lists = [list(hx), list(names), list(weights)]
            changed = [x, lists[0], *good[2:10], lists[1], lists[2], *good[12:]]
            changed[place] = Changes(*lists)
            _C.plain(*changed)
        assert all(map(torch.equal, tensors(_C.plain(*good)), expected))


@pytest.mark.parametrize(("watching", "expected"), [(nullcontext, False), (Seen, True), (SeenFunctions, False)])
def test_who_watches(watching: Callable[[], Any], expected: bool) -> None:
    with watching():
        assert _C.watched() is expected
    seen = []
    torch.func.vmap(lambda x: seen.append(_C.watched()) or x)(torch.ones(1))
    with forward_ad.dual_level():
        seen.append(_C.watched())
    assert seen == [True, True]


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}, {"proj_size": 8}], ids=str)
def test_the_choice_is_that_of_the_whole_module(
    options: dict[str, Any], table: tuned.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the user's table says of one layer of bfloat16 says nothing of two."""
    monkeypatch.setattr(policy, "HAS_BF16_PRODUCTS", True)
    monkeypatch.setattr(policy, "bf16_unit", lambda: "")
    one = tuned.Call("lstm", torch.bfloat16, None, 4, 4, 64, 64, 0, 1, 1, "sequence", False, 0)
    table.put({(tuned.machine(policy.CPU), one): tuned.Result("fused", speedup=2.0)})
    x = torch.randn(4, 4, 64, dtype=torch.bfloat16)
    for of_module, expected in (({}, True), (options, False)):
        module = fused_rnn.LSTM(64, 64, **of_module, dtype=torch.bfloat16)
        with torch.no_grad(), plain_calls() as found:
            module(x)
        assert found == [expected]
