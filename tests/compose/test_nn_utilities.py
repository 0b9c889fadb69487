"""torch.nn.utils, torch.optim, swap_tensors, meta devices and old pickles, through training and checkpoints.

Each runs on torch.nn's module and on ours, which must have equal parameters, buffers, results and errors. Copies are
tested in test_contract_copying.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_rnn
from contract import (
    HIDDEN,
    INPUT,
    MODULES,
    NAMES,
    SEQUENCES,
    allowed_error,
    arguments,
    close,
    each_module,
    each_sequence,
    error_of,
    gradients,
    loss,
    one_of_each,
    pair,
    tensors,
)

pytestmark = [pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"), pytest.mark.usefixtures("one_thread")]

REWRITERS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrized_weight_norm": parametrizations.weight_norm,
    "parametrized_spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
each_rewriter = pytest.mark.parametrize("rewriter", REWRITERS)


def matrices(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters() if name.startswith("weight")]


def rewritten(rewriter: str, *modules: nn.Module) -> None:
    for module in modules:
        torch.manual_seed(3)
        for name in matrices(module):
            REWRITERS[rewriter](module, name)


def trained(module: nn.Module, args: Any, steps: int = 3, **options: Any) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(module(*args)).backward()
        optimizer.step()


def outcome(call: Callable[[], Any]) -> Any:
    """The result, or the type of the exception."""
    try:
        return call()
    except Exception as error:
        return type(error)


@each_module
@each_rewriter
def test_training_with_computed_weights(key: str, rewriter: str) -> None:
    """Every weight matrix is computed; spectral norms do as many power iterations as in torch.nn."""
    expected, actual = pair(key)
    rewritten(rewriter, expected, actual)
    args = arguments(actual)
    for module in (expected, actual):
        trained(module.train(), args)
    close(list(actual.parameters()), list(expected.parameters()))
    close(list(actual.buffers()), list(expected.buffers()))
    close(actual.eval()(*args), expected.eval()(*args))
    args = arguments(actual, grad=True)
    close(gradients(actual, *args), gradients(expected, *args), grad=True)
    if isinstance(actual, nn.RNNBase):
        assert [type(w) for w in actual._flat_weights] == [type(w) for w in expected._flat_weights]

    state = actual.state_dict()
    assert list(state) == list(expected.state_dict())
    others = pair(key)
    rewritten(rewriter, *others)
    for module in others:
        module.load_state_dict(state)
        close(module.eval()(*args), actual(*args))

    for copied in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
        results = [outcome(lambda m=m, copied=copied: copied(m)(*args)) for m in (expected, actual)]
        if isinstance(results[0], type):  # torch.nn cannot: a parametrised module, or non-leaf tensors
            assert results[1] is results[0]
        else:
            close(*reversed(results))

    for module in (expected, actual):
        for name in matrices(pair(key)[0]):
            if rewriter in ("weight_norm", "spectral_norm"):
                getattr(nn.utils, f"remove_{rewriter}")(module, name)
            else:
                parametrize.remove_parametrizations(module, name)
    close(actual(*args), expected(*args))
    assert set(actual.state_dict()) == set(pair(key)[0].state_dict())


class Noisy(nn.Module):
    """A weight that differs at every access, as with weight dropout."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.rand(())


def under_autocast(module: nn.Module) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return module(*arguments(module))


WAYS = {
    "usual": (torch.float32, lambda module: module(*arguments(module))),
    "complex": (torch.complex64, lambda module: module(*arguments(module))),
    "autocast": (torch.float32, under_autocast),
    "gradient": (torch.float32, lambda module: torch.func.grad(lambda x: loss(module(x)))(arguments(module)[0])),
}


@each_module
@pytest.mark.parametrize("way", WAYS)
def test_a_computed_weight_is_got_as_often_as_in_torch(key: str, way: str) -> None:
    """The same seed gives the same weights, also for calls that run on torch.nn's own operators."""
    dtype, call = WAYS[way]
    modules = pair(key, dtype)
    for module in modules:
        parametrize.register_parametrization(module, matrices(module)[1], Noisy())
    expected, actual = modules
    with allowed_error(seeded, call, expected):
        close(seeded(call, actual), seeded(call, expected))


def seeded(call: Callable[[nn.Module], Any], module: nn.Module) -> list[Tensor]:
    torch.manual_seed(7)
    results = tensors(call(module))
    # Under autocast our results are rounded less; the last draw shows how many draws came before it.
    return [*([] if call is under_autocast else results), torch.rand(3)]


@each_sequence
@each_rewriter
def test_computed_weights_with_keywords(key: str, rewriter: str) -> None:
    _, actual = pair(key)
    rewritten(rewriter, actual)
    input, hx = arguments(actual.eval())
    rows = input.shape[:2]
    resets = torch.zeros(rows, dtype=torch.bool)
    close(actual(input, hx, resets=resets), actual(input, hx))
    leaves = list(actual.parameters())
    found, wanted = (
        torch.autograd.grad(loss(actual(input, hx, **given)), leaves) for given in ({"resets": resets}, {})
    )
    close(found, wanted, grad=True)
    if not actual.bidirectional:
        step = input[:, :1] if actual.batch_first else input[:1]
        y, after = actual.step(step.squeeze(1 if actual.batch_first else 0), hx)
        expected, wanted_after = actual(step, hx)
        close([y, *tensors(after)], [expected.squeeze(1 if actual.batch_first else 0), *tensors(wanted_after)])


@each_module
def test_pruning(key: str) -> None:
    """Prune by norm, train, prune by mask, load the checkpoint, and make the pruning permanent."""
    expected, actual = pair(key)
    args, names = arguments(actual), matrices(actual)
    for module in (expected, actual):
        torch.manual_seed(1)
        for name in names:
            prune.l1_unstructured(module, name, amount=0.3)
        trained(module, args)
        prune.ln_structured(module, names[0], amount=1, n=2, dim=0)
        prune.global_unstructured([(module, name) for name in names], prune.RandomUnstructured, amount=4)
        prune.custom_from_mask(module, names[1], torch.ones_like(getattr(module, names[1])).triu())
        assert prune.is_pruned(module)
        trained(module, args)
    close(actual(*args), expected(*args))
    close(gradients(actual, *args), gradients(expected, *args), grad=True)

    state = actual.state_dict()
    assert list(state) == list(expected.state_dict())
    assert {f"{name}_orig" for name in names} | {f"{name}_mask" for name in names} <= set(state)
    _, other = pair(key)
    for name in names:
        prune.identity(other, name)
    other.load_state_dict(state)
    close(other(*args), actual(*args))

    for module in (expected, actual):
        for name in names:
            prune.remove(module, name)
    assert set(actual.state_dict()) == set(pair(key)[0].state_dict())
    assert any((p == 0).any() for p in actual.parameters())
    close(actual(*args), expected(*args))


@one_of_each
@pytest.mark.parametrize("foreach", [False, True])
def test_clipping(key: str, foreach: bool) -> None:
    expected, actual = pair(key)
    args, norms = arguments(actual), []
    for module in (expected, actual):
        loss(module(*args)).backward()
        found = [nn.utils.get_total_norm([p.grad for p in module.parameters()], foreach=foreach)]
        found.append(nn.utils.clip_grad_norm_(module.parameters(), 0.5, norm_type=2.0, foreach=foreach))
        found.append(nn.utils.clip_grad_norm_(module.parameters(), 0.2, norm_type=float("inf"), foreach=foreach))
        nn.utils.clip_grad_value_(module.parameters(), 0.01, foreach=foreach)
        norms.append(found)
    close(*reversed(norms), grad=True)
    assert max(p.grad.abs().max() for p in actual.parameters()) <= 0.01
    close([p.grad for p in actual.parameters()], [p.grad for p in expected.parameters()], grad=True)


OPTIMISERS = [
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (torch.optim.Adam, {}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.Adagrad, {}),
    (torch.optim.RMSprop, {}),
]


@one_of_each
@pytest.mark.parametrize(("optimiser", "options"), OPTIMISERS)
def test_optimisers_and_their_checkpoints(key: str, optimiser: Any, options: dict[str, Any]) -> None:
    expected, actual = pair(key, torch.float64)
    args = arguments(actual)
    for kind in ("foreach", "fused")[: 1 if optimiser is torch.optim.RMSprop else 2]:  # RMSprop has no fused kernels
        for module in (expected, actual):
            state = None
            for _ in range(2):
                current = optimiser(module.parameters(), lr=0.05, **options, **{kind: True})
                if state is not None:
                    current.load_state_dict(state)
                for _ in range(2):
                    current.zero_grad()
                    loss(module(*args)).square().backward()
                    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                    current.step()
                state = copy.deepcopy(current.state_dict())
        close(list(actual.parameters()), list(expected.parameters()))
        close(actual(*args), expected(*args))


@each_module
@pytest.mark.parametrize("multi", [False, True])
def test_exponential_moving_average(key: str, multi: bool) -> None:
    expected, actual = pair(key)
    args = arguments(actual)
    averages = []
    for module in (expected, actual):
        average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5) if multi else None)
        for _ in range(3):
            trained(module, args, steps=1)
            average.update_parameters(module)
        averages.append(average)
    close(averages[1](*args), averages[0](*args))
    close(gradients(averages[1].module, *args), gradients(averages[0].module, *args), grad=True)
    own = averages[1].module
    assert type(own) is type(actual) and all(
        p is not q for p, q in zip(own.parameters(), actual.parameters(), strict=True)
    )
    assert not torch.equal(next(own.parameters()), next(actual.parameters()))


@each_module
def test_swap_tensors(key: str) -> None:
    """Both libraries swap, or both refuse: torch.nn's modules hold weak references to their weights."""
    modules = pair(key)
    args = arguments(modules[1])
    names = matrices(modules[0])

    def swapped(module: nn.Module) -> Any:
        other = nn.Parameter(getattr(module, names[0]).detach() * 2)
        torch.utils.swap_tensors(getattr(module, names[0]), other)
        return module(*args)

    results = [outcome(lambda m=m: swapped(m)) for m in modules]
    if isinstance(results[0], type):
        assert results[1] is results[0]
        close(modules[1](*args), modules[0](*args))  # unchanged
    else:
        close(results[1], results[0])


@each_module
@pytest.mark.parametrize("flag", ["overwrite", "swap"])
def test_flags_of_conversion(key: str, flag: str) -> None:
    """Conversions and loading a checkpoint with a flag of torch.__future__ on: equal results or errors."""
    expected, actual = pair(key)
    state = {name: p.detach() * 3 for name, p in expected.named_parameters()}
    setter = getattr(torch.__future__, f"set_{flag}_module_params_on_conversion")
    for assign in (False, True):
        setter(True)
        try:
            results = []
            for module in (expected, actual):
                module.double()
                module.to(torch.float64).float()
                results.append(outcome(partial(module.load_state_dict, dict(state), assign=assign)))
        finally:
            setter(False)
        assert results[0] == results[1]
        close(list(actual.parameters()), list(expected.parameters()))
        args = arguments(actual, grad=True)
        close(actual(*args), expected(*args))
        close(gradients(actual, *args), gradients(expected, *args), grad=True)


DEFERRED = {
    "to_empty and reset": lambda make: reset(make(device="meta").to_empty(device="cpu")),
    "context": lambda make: reset(in_context(make).to_empty(device="cpu")),
    "assign": lambda make: make(device="meta"),
    "to_empty": lambda make: make(device="meta").to_empty(device="cpu"),
}


def in_context(make: Callable[..., nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def reset(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    module.reset_parameters()
    return module


@each_module
@pytest.mark.parametrize("way", ["to_empty and reset", "context", "assign", "to_empty"])
def test_deferred_initialisation(key: str, way: str) -> None:
    """Built on the meta device, then initialised or loaded from a checkpoint; trains like torch.nn's module."""
    name, options = MODULES[key]
    expected, _ = pair(key)  # initialised from the same seed

    def make(**device: Any) -> nn.Module:
        return getattr(fused_rnn, name)(INPUT, HIDDEN, **options, **device)

    actual = DEFERRED[way](make)
    if "reset" not in way and way != "context":
        actual.load_state_dict(expected.state_dict(), assign=way == "assign")
    assert not any(p.is_meta for p in actual.parameters())
    if isinstance(actual, nn.RNNBase):
        assert all(w is p for w, p in zip(actual._flat_weights, actual.parameters(), strict=True))
    args = arguments(actual)
    close(actual(*args), expected(*args))
    if way == "assign":  # the checkpoint's tensors become the parameters
        expected = copy.deepcopy(expected)
    for module in (expected, actual):
        trained(module.requires_grad_(), args)
    close(actual(*args), expected(*args))


@pytest.mark.parametrize("name", NAMES)
def test_skip_init(name: str) -> None:
    """Works for cells; RNN, LSTM and GRU hide their signature from it, in torch.nn, too."""
    made = [
        outcome(lambda library=library: nn.utils.skip_init(getattr(library, name), 3, 5)) for library in (nn, fused_rnn)
    ]
    if name in SEQUENCES:
        assert made[0] is made[1] is RuntimeError
    else:
        reset(made[0]), reset(made[1])
        close(made[1](*arguments(made[1])), made[0](*arguments(made[0])))


# Attributes that older versions of this package or of torch.nn did not save.
OLDER = {
    "no backend": {"backend"},
    "no mark for fx": {"__module__"},
    "before proj_size": {"proj_size", "backend"},
    "before hook dictionaries": {"_load_state_dict_post_hooks", "_state_dict_pre_hooks", "_backward_pre_hooks"},
    "no weak references": {"_flat_weight_refs"},
}


@each_module
@pytest.mark.parametrize("older", OLDER)
def test_pickles_of_older_versions(key: str, older: str) -> None:
    """Pickles without today's attributes: forward, keywords, `step`, repr and pickling again work."""
    expected, actual = pair(key)
    if isinstance(actual, nn.RNNBase):
        actual.backend = "fused"
    # No older version had both a projection and no proj_size.
    lacking = OLDER[older] - ({"proj_size"} if getattr(actual, "proj_size", 0) else set())
    state = {k: v for k, v in actual.__getstate__().items() if k not in lacking}
    loaded = type(actual).__new__(type(actual))
    loaded.__setstate__(pickle.loads(pickle.dumps(state)))
    args = arguments(loaded)
    for module in (loaded, pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded), loaded.double().float()):
        close(module(*args), expected(*args))
        close(gradients(module, *args), gradients(expected, *args), grad=True)
        assert repr(module) == repr(expected) and set(module.state_dict()) == set(expected.state_dict())
        if isinstance(module, nn.RNNBase):
            assert module.backend == ("auto" if "backend" in OLDER[older] else "fused")
            resets = torch.zeros(args[0].shape[:2], dtype=torch.bool)
            close(module(*args, resets=resets), expected(*args))
    close(loaded.to_torch()(*args), expected(*args))


@each_module
def test_a_file_of_torchs_pickle(key: str) -> None:
    """A pickled module of torch.nn keeps torch.nn's class; from_torch converts it."""
    expected, _ = pair(key)
    args = arguments(expected)
    loaded = pickle.loads(pickle.dumps(expected))
    assert type(loaded) is type(expected)
    close(fused_rnn.from_torch(loaded)(*args), expected(*args))


@each_module
def test_weights_only_files_of_other_shapes(key: str) -> None:
    """A checkpoint of model, optimiser and average together, loaded with weights_only=True."""
    expected, actual = pair(key)
    args = arguments(actual)
    optimizer = torch.optim.Adam(actual.parameters(), foreach=True)
    loss(actual(*args)).backward()
    optimizer.step()
    average = AveragedModel(actual)
    file = io.BytesIO()
    torch.save({"model": actual.state_dict(), "opt": optimizer.state_dict(), "ema": average.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True, mmap=False)
    expected.load_state_dict(loaded["model"])
    close(expected(*args), actual(*args))
    torch.optim.Adam(expected.parameters()).load_state_dict(loaded["opt"])
    AveragedModel(expected).load_state_dict(loaded["ema"])


@each_module
def test_parametrised_modules_are_not_recast(key: str) -> None:
    """A parametrisation makes a class of its own, and to_torch's error says so."""
    _, actual = pair(key)
    parametrizations.weight_norm(actual, matrices(actual)[0])
    kind, text = error_of(actual.to_torch)
    assert kind is TypeError and "parametrised" in text
