"""PyTorch's ModuleInfo samples for the six classes, run as PyTorch's test/test_modules.py runs them.

On the CPU torch.nn passes all of them. Errors, modes and memory formats are tested on torch.nn as well, to check the
tests themselves. Cases that PyTorch marks as failing (cuDNN) need a GPU. Left out: `inplace`, which no RNN has, and
moves between devices.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fused_rnn
from contract import COPIES, NAMES, close, tensors

pytest.importorskip("expecttest", reason="torch.testing._internal needs the package expecttest")

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def without_traces() -> Iterator[None]:
    """Undo the process-wide changes made by importing PyTorch's test utilities."""
    flag, flags = "__allow_nonbracketed_mutation_flag", torch.backends.flags_frozen.__globals__
    allowed = flags[flag]
    calls = [(cls, cls.__call__) for cls in (torch._C.ScriptFunction, torch._C.ScriptMethod)]
    yield
    flags[flag] = allowed
    for cls, call in calls:
        cls.__call__ = call


with without_traces():
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
    from torch.testing._internal.common_utils import freeze_rng_state

INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls.__module__ == "torch.nn.modules.rnn"}

each = pytest.mark.parametrize("name", NAMES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
each_library = pytest.mark.parametrize("library", [nn, fused_rnn], ids=["torch.nn", "fused_rnn"])


def test_there_is_an_info_for_every_class() -> None:
    assert set(INFOS) == set(NAMES)
    assert all(set(info.dtypes) == {torch.float32, torch.float64} for info in INFOS.values())


def samples(name: str, dtype: torch.dtype, training: bool, requires_grad: bool = False, **options: Any) -> list[Any]:
    torch.manual_seed(0)
    info = INFOS[name]
    if name in ("RNN", "GRU"):
        options = {"with_packed_sequence": True, **options}
    found = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training, **options
    )
    assert len(found) > 1
    return list(found)


def built(library: Any, name: str, sample: Any, dtype: torch.dtype, training: bool, **factory: Any) -> nn.Module:
    torch.manual_seed(1)
    given = sample.constructor_input
    return getattr(library, name)(*given.args, **given.kwargs, **factory).to(dtype).train(training)


def called(module: nn.Module, sample: Any) -> Any:
    with freeze_rng_state():
        return module(*sample.forward_input.args, **sample.forward_input.kwargs)


@each
@each_dtype
@each_mode
def test_forward(name: str, dtype: torch.dtype, training: bool) -> None:
    """Results equal the sample's own reference, and torch.nn's with the same seed: constructor, unbatched, packed."""
    for sample in samples(name, dtype, training):
        module = built(fused_rnn, name, sample, dtype, training)
        found, given = called(module, sample), sample.forward_input
        close(found, called(built(nn, name, sample, dtype, training), sample))
        if isinstance(given.args[0], Tensor):  # samples of packed sequences have no reference
            close(found, sample.reference_fn(module, *given.args, **given.kwargs))


@each
@each_dtype
def test_factory_kwargs(name: str, dtype: torch.dtype) -> None:
    for sample in samples(name, dtype, True):
        for device in ("cpu", "meta"):
            given = sample.constructor_input
            module = getattr(fused_rnn, name)(*given.args, **given.kwargs, device=device, dtype=dtype)
            assert {(p.device.type, p.dtype) for p in module.parameters()} == {(device, dtype)}
            assert not list(module.buffers())
            with torch.device(device):
                inside = getattr(fused_rnn, name)(*given.args, **given.kwargs, dtype=dtype)
            assert {p.device.type for p in inside.parameters()} == {device}


@each
def test_repr(name: str) -> None:
    for sample in samples(name, torch.float32, True):
        ours, theirs = (built(library, name, sample, torch.float32, True) for library in (fused_rnn, nn))
        assert repr(ours) == str(ours) == repr(theirs)


def through_a_state_dict(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module)
    for p in twin.parameters():
        p.data.zero_()
    twin.load_state_dict(pickle.loads(pickle.dumps(module.state_dict())))
    return twin


@each
@each_mode
@pytest.mark.parametrize("way", [*COPIES, "state_dict"])
def test_copies(way: str, name: str, training: bool) -> None:
    copied = COPIES.get(way, through_a_state_dict)
    for sample in samples(name, torch.float32, training):
        module = built(fused_rnn, name, sample, torch.float32, training)
        expected = called(module, sample)
        twin = copied(module)
        assert type(twin) is type(module) and twin.training == training
        for a, e in zip(tensors(called(twin, sample)), tensors(expected), strict=True):
            assert torch.equal(a, e)


def strided(tensor: Tensor) -> Tensor:
    """An equal, non-contiguous leaf."""
    if tensor.dim() == 0 or tensor.numel() < 2:
        return tensor
    spread = torch.stack([tensor.detach(), torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]
    assert not spread.is_contiguous()
    return spread.requires_grad_(tensor.requires_grad)


@each
@each_dtype
def test_non_contiguous_tensors(name: str, dtype: torch.dtype) -> None:
    """Input, states and incoming gradients, alone and together as in PyTorch's test; then also the weights."""
    for sample in samples(name, dtype, True, requires_grad=True, **without_packed(name)):
        module = built(fused_rnn, name, sample, dtype, True)

        def run(inputs: Any, grads: Any = None, module: nn.Module = module) -> tuple[list[Tensor], list[Tensor]]:
            leaves = [*tensors(inputs), *module.parameters()]
            outputs = tensors(module(*inputs))
            grads = [torch.ones_like(o) for o in outputs] if grads is None else grads
            return outputs, list(torch.autograd.grad(outputs, leaves, grads))

        args = sample.forward_input.args
        expected, grads = run(args)
        spread = pytree.tree_map_only(Tensor, strided, args)
        for changed in ((spread[0], *args[1:]), (args[0], *spread[1:]), spread):
            found = run(changed, [strided(torch.ones_like(o)) for o in expected])
            close(found[0], expected)
            close(found[1], grads, grad=True)
        for parameter in module.parameters():
            parameter.data = strided(parameter.data)
        found = run(spread)
        close(found[0], expected)
        close(found[1], grads, grad=True)


def without_packed(name: str) -> dict[str, bool]:
    return {"with_packed_sequence": False} if name in ("RNN", "GRU") else {}


def differentiable(module: nn.Module, sample: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """A function of every leaf of the call, and the leaves."""
    flat, spec = pytree.tree_flatten(sample.forward_input.args)
    names = [key for key, _ in module.named_parameters()]

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = pytree.tree_unflatten(leaves[: len(flat)], spec)
        weights = dict(zip(names, leaves[len(flat) :], strict=True))
        with freeze_rng_state():
            return tuple(tensors(torch.func.functional_call(module, weights, given)))

    return call, (*flat, *(p.detach().clone().requires_grad_() for p in module.parameters()))


@each
@each_mode
def test_grad(name: str, training: bool) -> None:
    for sample in samples(name, torch.float64, training, requires_grad=True, **without_packed(name)):
        call, leaves = differentiable(built(fused_rnn, name, sample, torch.float64, training), sample)
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True, check_batched_grad=True)


@each
@each_library
def test_memory_format(library: Any, name: str) -> None:
    """A memory format changes only 4-D tensors; a module, its input and its parameters stay as they are."""
    for sample in samples(name, torch.float32, True):
        module = built(library, name, sample, torch.float32, True)
        expected = called(module, sample)
        for memory_format in (torch.contiguous_format, torch.channels_last, torch.preserve_format):
            if memory_format is not torch.preserve_format:
                module.to(memory_format=memory_format)
            assert all(p.is_contiguous() for p in module.parameters())
            found = called(module, sample)
            close(found, expected)
            assert [t.stride() for t in tensors(found)] == [t.stride() for t in tensors(expected)]


@each
@each_library
def test_if_train_and_eval_modes_differ(library: Any, name: str) -> None:
    """Whether forward reads `training` is recorded in PyTorch's ModuleInfo."""
    for sample in samples(name, torch.float32, True):
        module = built(library, name, sample, torch.float32, True)
        del module.training
        if INFOS[name].train_and_eval_differ:
            with pytest.raises(AttributeError, match=f"'{name}' object has no attribute 'training'"):
                called(module, sample)
        else:
            called(module, sample)


@each
@each_library
def test_errors(library: Any, name: str) -> None:
    info = INFOS[name]
    torch.manual_seed(0)
    errors = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
    assert len(errors) > 3
    for error in errors:
        sample = error.module_error_input
        on_construction = error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR
        module = None if on_construction else built(library, name, sample, torch.float32, True)
        with pytest.raises(error.error_type, match=error.error_regex):
            built(library, name, sample, torch.float32, True) if on_construction else called(module, sample)


@each
@pytest.mark.parametrize("swap", [False, True], ids=["set", "swap"])
def test_to(name: str, swap: bool) -> None:
    """The same Parameter objects hold the converted values, and forward uses them."""
    set_swap = torch.__future__.set_swap_module_params_on_conversion
    for sample in samples(name, torch.float32, True, **without_packed(name)):
        module = built(fused_rnn, name, sample, torch.float32, True)
        parameters, values = list(module.parameters()), [p.detach().double() for p in module.parameters()]
        args = pytree.tree_map_only(Tensor, Tensor.double, sample.forward_input.args)
        set_swap(swap)
        try:
            module.to(torch.float64)
        finally:
            set_swap(False)
        assert all(p is q for p, q in zip(module.parameters(), parameters, strict=True))
        close(list(module.parameters()), values)
        expected = built(nn, name, sample, torch.float32, True).to(torch.float64)
        close(module(*args), expected(*args))


@each
def test_to_empty(name: str) -> None:
    for sample in samples(name, torch.float32, True):
        with torch.device("meta"):
            module = built(fused_rnn, name, sample, torch.float32, True)
        expected = built(nn, name, sample, torch.float32, True)
        assert all(p.is_meta for p in module.parameters())
        module.to_empty(device="cpu")
        module.load_state_dict(expected.state_dict())
        close(called(module, sample), called(expected, sample))


@each
def test_state_dict_hooks(name: str) -> None:
    """Each kind of hook is called once per state_dict and load_state_dict, and may change its argument."""
    for sample in samples(name, torch.float32, True):
        module = built(fused_rnn, name, sample, torch.float32, True)
        seen: list[str] = []

        def add(module: nn.Module, state: dict, prefix: str, metadata: dict, seen: list[str] = seen) -> None:
            seen.append("state")
            state[prefix + "extra"] = torch.ones(1)

        def drop(module: nn.Module, state: dict, prefix: str, *rest: Any, seen: list[str] = seen) -> None:
            seen.append("before load")
            del state[prefix + "extra"]

        def after(module: nn.Module, keys: Any, seen: list[str] = seen) -> None:
            seen.append("after load")
            assert not keys.missing_keys and not keys.unexpected_keys

        module.register_state_dict_pre_hook(lambda *_, seen=seen: seen.append("before state"))
        module.register_state_dict_post_hook(add)
        module.register_load_state_dict_pre_hook(drop)
        module.register_load_state_dict_post_hook(after)
        before = called(module, sample)
        state = module.state_dict()
        assert state["extra"].item() == 1
        module.load_state_dict(state)
        assert seen == ["before state", "state", "before load", "after load"]
        close(called(module, sample), before)
