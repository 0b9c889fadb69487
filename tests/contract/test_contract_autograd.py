"""Gradients of every order, hooks and saved tensors are torch.nn's."""

import copy
import re
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from contract import (
    allowed_error,
    arguments,
    checkpointed,
    close,
    derivative,
    each_module,
    each_precision,
    each_sequence,
    error_of,
    gradients,
    higher_gradients,
    leaves,
    loss,
    one_of_each,
    pair,
    ramp,
    tensors,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@each_module
def test_requires_grad_follows_the_inputs(key):
    _, actual = pair(key)
    for parameter in actual.parameters():
        parameter.requires_grad_(False)
    args = arguments(actual)
    assert not any(t.requires_grad for t in tensors(actual(*args)))
    for leaf in [*tensors(args), *actual.parameters()]:
        leaf.requires_grad_()
        assert tensors(actual(*args))[0].requires_grad
        with torch.no_grad():
            assert not any(t.requires_grad for t in tensors(actual(*args)))
        leaf.requires_grad_(False)


def gradients_of_one(module, args, index, layer=slice(None)):
    """Gradients of one result, or of one layer of it, alone; zeros for unused leaves."""
    return derivative(loss(tensors(module(*args))[index][layer]), module, args)


@each_module
def test_each_result_alone(key):
    expected, actual = pair(key)
    args = arguments(actual, grad=True)
    for index in range(len(tensors(actual(*args)))):
        wanted = gradients_of_one(expected, args, index)
        close(gradients_of_one(actual, args, index), wanted, grad=True)


INCOMING = {
    "expanded": lambda output: output.sum(),
    "last_step": lambda output: output[-1].sum(),
    "one_row": lambda output: output[:, 0].square().sum(),
    "transposed": lambda output: output.transpose(0, -1).contiguous().square().sum(),
    "zero": lambda output: (output * 0).sum(),
}


@each_module
@pytest.mark.parametrize("incoming", INCOMING)
def test_layouts_of_the_incoming_gradient(key, incoming):
    expected, actual = pair(key)
    args = arguments(actual, grad=True)
    wanted, found = (
        derivative(INCOMING[incoming](tensors(module(*args))[0]), module, args) for module in (expected, actual)
    )
    close(found, wanted, grad=True)


@pytest.mark.parametrize("key", ["rnn_deep", "lstm_deep", "lstm_proj", "gru_deep"])
def test_state_of_one_layer(key):
    expected, actual = pair(key)
    args = arguments(actual, grad=True)
    wanted = gradients_of_one(expected, args, 1, layer=1)
    close(gradients_of_one(actual, args, 1, layer=1), wanted, grad=True)


@each_module
def test_frozen_parameters(key):
    expected, actual = pair(key)
    args = arguments(actual, grad=True)
    names = [name for name, _ in actual.named_parameters()]
    for chosen in names:
        for frozen in ({chosen}, set(names) - {chosen}):
            for module in (expected, actual):
                for name, parameter in module.named_parameters():
                    parameter.requires_grad_(name not in frozen)
                    parameter.grad = None
                loss(module(*args)).backward()
            for name, parameter in actual.named_parameters():
                assert (parameter.grad is None) == (name in frozen)
            close([p.grad for p in actual.parameters()], [p.grad for p in expected.parameters()], True)


@each_module
def test_nothing_requires_grad(key):
    _, actual = pair(key)
    actual.requires_grad_(False)
    assert all(t.grad_fn is None for t in tensors(actual(*arguments(actual))))


def gradients_after_a_write(module, index):
    """Gradients of results after an in-place write to the input, a state or a weight they came from."""
    args = arguments(module, grad=True)
    weight = next(p for name, p in module.named_parameters() if "weight_hh" in name)
    value = loss(module(*args))
    with torch.no_grad():
        [*tensors(args)[:2], weight][index].mul_(1.5)
    return derivative(value, module, args)


@each_module
@pytest.mark.parametrize("index", [0, 1, -1], ids=["input", "state", "recurrent_weight"])
def test_writes_before_backward_are_noticed(key, index):
    """Raises like torch.nn; where torch.nn has copied its input (batch_first), correct gradients are accepted."""
    expected, actual = pair(key)
    wanted = gradients(actual, *arguments(actual, grad=True))
    try:
        close(gradients_after_a_write(expected, index), wanted, grad=True)
    except RuntimeError:
        kind, text = error_of(gradients_after_a_write, actual, index)
        assert kind is RuntimeError and re.search("modified (by an )?inplace", text)
    else:
        with suppress(RuntimeError):
            close(gradients_after_a_write(actual, index), wanted, grad=True)


def gradients_after_writing(module, args, index, write):
    results = tensors(module(*args))
    results[index] = write(results[index])
    return derivative(loss(results), module, args)


@each_module
@each_precision
@pytest.mark.parametrize("index", [0, -1], ids=["output", "state"])
def test_results_may_be_written_to(key, dtype, index):
    """Where torch.nn raises (oneDNN's LSTM, RNNCell), ours may raise or be correct."""
    expected, actual = pair(key, dtype)
    args = arguments(actual, grad=True)
    wanted = gradients_after_writing(expected, args, index, lambda t: t.mul(2))
    inplace = args, index, lambda t: t.mul_(2)
    with allowed_error(gradients_after_writing, expected, *inplace):
        close(gradients_after_writing(actual, *inplace), wanted, grad=True)


@pytest.mark.parametrize("key", ["rnn_tanh", "lstm_deep", "gru"])
def test_common_inplace_uses(key):
    expected, actual = pair(key)
    args = arguments(actual, grad=True)

    def model(module, inplace):
        output, state = module(*args)
        torch.manual_seed(0)
        output = nn.functional.dropout(output, 0.5, inplace=inplace)
        output = nn.functional.relu(output, inplace=inplace)
        state = tensors(state)[0] if inplace else tensors(state)[0].clone()
        state[:, 1] = 0
        return derivative(loss([output, state]), module, args)

    close(model(actual, True), model(expected, False), grad=True)


@each_module
def test_second_backward(key):
    _, actual = pair(key)
    args = arguments(actual, grad=True)
    value, wanted = loss(actual(*args)), leaves(actual, *args)
    first = torch.autograd.grad(value, wanted, retain_graph=True)
    for g, again in zip(first, torch.autograd.grad(value, wanted), strict=True):
        assert torch.equal(g, again)
    kind, text = error_of(torch.autograd.grad, value, wanted)
    assert kind is RuntimeError and "Trying to backward through the graph a second time" in text


@each_module
@each_precision
def test_second_order(key, dtype):
    expected, actual = pair(key, dtype)
    args = arguments(actual, grad=True)
    found = higher_gradients(actual, args, 2)
    half = len(found) // 2
    wanted = higher_gradients(expected, args, 2)
    close(found[:half], wanted[:half], grad=True)
    scale = max(1.0, max(g.abs().max().item() for g in wanted))
    close([g / scale for g in found], [g / scale for g in wanted], grad=True)


@each_sequence
def test_second_order_packed(key):
    expected, actual = pair(key, torch.float64)
    args = arguments(actual, packed=True, grad=True)
    close(higher_gradients(actual, args, 2), higher_gradients(expected, args, 2), grad=True)


@one_of_each
def test_third_order(key):
    expected, actual = pair(key, torch.float64)
    args = arguments(actual, time=3, batch=2, grad=True)
    close(higher_gradients(actual, args, 3), higher_gradients(expected, args, 3), grad=True)


def dual(value):
    """value with a tangent for each of its tensors."""
    if isinstance(value, PackedSequence):
        return PackedSequence(dual(value.data), *value[1:])
    if isinstance(value, tuple):
        return tuple(map(dual, value))
    return forward_ad.make_dual(value, ramp(value))


def tangents(module, *args):
    """Forward-mode derivative of all results in a fixed direction of input and states."""
    with forward_ad.dual_level():
        results = tensors(module(*map(dual, args)))
        return [forward_ad.unpack_dual(t).tangent for t in results]


@each_module
@each_precision
def test_forward_mode(key, dtype):
    expected, actual = pair(key, dtype)
    args = arguments(actual)
    with allowed_error(tangents, expected, *args):
        reference = copy.deepcopy(expected).double()
        wanted = tangents(reference, *arguments(reference))
        close(tangents(actual, *args), [t.to(dtype) for t in wanted])


@each_sequence
def test_forward_mode_packed(key):
    expected, actual = pair(key, torch.float64)
    args = arguments(actual, packed=True)
    close(tangents(actual, *args), tangents(expected, *args))


@each_module
def test_saved_tensor_hooks(key):
    _, actual = pair(key)
    args = arguments(actual, grad=True)
    wanted = gradients(actual, *args)
    kept = []

    def pack(tensor):
        kept.append(tensor.detach().clone())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: kept[index]):
        value = loss(actual(*args))
    close(torch.autograd.grad(value, leaves(actual, *args), retain_graph=True), wanted, grad=True)
    for tensor in kept:
        tensor.zero_()
    zeroed = torch.autograd.grad(value, leaves(actual, *args))
    assert not torch.allclose(zeroed[0], wanted[0])
    with torch.autograd.graph.save_on_cpu():
        close(gradients(actual, *args), wanted, grad=True)


@each_module
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(key, reentrant):
    expected, actual = pair(key)
    args = arguments(actual, grad=True)
    wanted = gradients(expected, *args)
    loss(checkpointed(actual, args, reentrant)).backward()
    close([t.grad for t in leaves(actual, *args)], wanted, grad=True)


def fired_hooks(module, *args):
    """The hooks that fire in one forward and backward pass, in order, with their shapes."""
    fired = []

    def note(name):
        def hook(*values):
            values = [v for v in values if not isinstance(v, (nn.Module, dict))]
            fired.append((name, [tuple(t.shape) for t in tensors(values)]))

        return hook

    module.register_forward_pre_hook(note("pre"), with_kwargs=True)
    module.register_forward_hook(note("forward"), with_kwargs=True)
    module.register_full_backward_hook(note("backward"))
    for index, leaf in enumerate(leaves(module, *args)):
        leaf.register_hook(note(f"leaf {index}"))
        leaf.register_post_accumulate_grad_hook(note(f"accumulated {index}"))
    loss(module(*args)).backward()
    return fired


@each_module
def test_hooks(key):
    expected, actual = pair(key)
    fired = fired_hooks(actual, *arguments(actual, grad=True))
    wanted = fired_hooks(expected, *arguments(expected, grad=True))
    assert fired[:2] == wanted[:2]
    assert sorted(fired) == sorted(wanted)


@each_module
def test_batched_gradients(key):
    expected, actual = pair(key)
    args = arguments(actual, grad=True)

    def batched(module):
        output = tensors(module(*args))[0]
        along = torch.stack([torch.ones_like(output), ramp(output)])
        return derivative(output, module, args, grad_outputs=along, is_grads_batched=True)

    with allowed_error(batched, expected):
        ones = derivative(tensors(expected(*args))[0].sum(), expected, args)
        ramps = derivative(loss(tensors(expected(*args))[0]), expected, args)
        wanted = [torch.stack(rows) for rows in zip(ones, ramps, strict=True)]
        close(batched(actual), wanted, grad=True)


@one_of_each
def test_jacobian_and_anomaly_mode(key):
    expected, actual = pair(key)
    input, hx = arguments(actual, time=3, batch=2)
    jacobians = [
        torch.autograd.functional.jacobian(lambda x, m=m: tensors(m(x, hx))[0], input) for m in (actual, expected)
    ]
    close(*jacobians, grad=True)
    args = arguments(actual, grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        grads = gradients(actual, *args)
    close(grads, gradients(expected, *args), grad=True)


@each_module
def test_backward_in_eval(key):
    expected, actual = pair(key)
    args = arguments(actual, grad=True)
    close(gradients(actual.eval(), *args), gradients(expected.eval(), *args), grad=True)


@each_module
@each_precision
def test_gradients_accumulate(key, dtype):
    expected, actual = pair(key, dtype)
    args = arguments(actual)
    wanted = gradients(expected, *args)
    for times in (1, 2):
        loss(actual(*args)).backward()
        close([p.grad / times for p in actual.parameters()], wanted, grad=True)
    for parameter in actual.parameters():
        assert parameter.grad.layout == torch.strided and parameter.grad.dtype == dtype
    for set_to_none in (True, False):
        actual.zero_grad(set_to_none=set_to_none)
        loss(actual(*args)).backward()
        close([p.grad for p in actual.parameters()], wanted, grad=True)


def state_gradients(module, input_factor):
    """Gradients of the states with frozen weights, with a write to the input between forward and backward."""
    input, hx = arguments(module.requires_grad_(False))
    for h in tensors(hx):
        h.requires_grad_()
    value = loss(module(input, hx))
    input.mul_(input_factor)
    return derivative(value, module, (input, hx))


@each_module
def test_only_what_backward_needs(key):
    expected, actual = pair(key)
    with allowed_error(state_gradients, expected, 3.0):
        close(state_gradients(actual, 3.0), state_gradients(expected, 1.0), grad=True)


@each_module
def test_nothing_is_saved_without_grad(key):
    _, actual = pair(key)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        with torch.no_grad():
            actual(*arguments(actual, grad=True))
        actual.requires_grad_(False)
        actual(*arguments(actual))
    assert not saved
