"""Dtypes, devices, modes, and weights that change, are replaced, tied or computed, as in torch.nn."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_rnn
from contract import (
    HIDDEN,
    INPUT,
    MODULES,
    arguments,
    close,
    derivative,
    each_module,
    each_sequence,
    error_of,
    gradients,
    loss,
    one_of_each,
    pair,
    same_outcome,
    tensors,
)
from tolerances import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread")


def weight_name(module, kind="weight_hh"):
    return next(name for name, _ in module.named_parameters() if kind in name)


def same_results_and_gradients(expected, actual, **options):
    args = arguments(actual, grad=True, **options)
    close(actual(*args), expected(*args))
    close(gradients(actual, *args), gradients(expected, *args), grad=True)


@pytest.mark.parametrize("key", ["rnn_relu", "rnn_relu_cell"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_relu_in_half_precision(key, dtype):
    """With the gradients, at sizes where no value lies so near relu's kink that rounding decides on its side."""
    expected, actual = pair(key, dtype)
    args = arguments(actual, grad=True)
    reference = copy.deepcopy(expected).double()
    args64 = arguments(reference, grad=True)
    for tensor64, tensor in zip(tensors(args64), tensors(args), strict=True):
        tensor64.data.copy_(tensor.data)
    found, wanted, exact = actual(*args), expected(*args), reference(*args64)
    for trio in zip(*map(tensors, (found, wanted, exact)), strict=True):
        assert_as_accurate(*trio, "result")
    modules = (actual, args), (expected, args), (reference, args64)
    for trio in zip(*(gradients(module, *given) for module, given in modules), strict=True):
        assert_as_accurate(*trio, "dleaf")


@each_module
def test_complex(key):
    expected, actual = pair(key, torch.complex64)
    args = arguments(actual, grad=True)

    def call(module):
        results = module(*args)
        return tensors(results), derivative(loss(results).abs(), module, args)

    same_outcome(lambda: call(expected), lambda: call(actual))


@each_module
def test_factory_arguments(key):
    name, options = MODULES[key]
    build = getattr(fused_rnn, name)
    assert all(p.is_meta for p in build(3, 5, device="meta", **options).parameters())
    with torch.device("meta"):
        assert all(p.is_meta for p in build(3, 5, **options).parameters())
    torch.set_default_device("meta")
    try:
        assert all(p.is_meta for p in build(3, 5, **options).parameters())
    finally:
        torch.set_default_device(None)
    torch.set_default_dtype(torch.float64)
    try:
        module = build(3, 5, **options)
        assert tensors(module(*arguments(module)))[0].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@each_module
def test_meta_forward_and_materialising(key):
    expected, actual = pair(key)
    args = arguments(actual)
    wanted = tensors(expected(*args))
    _, meta = pair(key, device="cpu")
    meta.to("meta")
    for result, value in zip(tensors(meta(*arguments(meta))), wanted, strict=True):
        assert result.shape == value.shape and result.dtype == value.dtype
    meta.to_empty(device="cpu")
    torch.manual_seed(0)
    meta.reset_parameters()
    torch.manual_seed(0)
    expected.reset_parameters()
    close(meta(*args), expected(*args))


@each_module
def test_fake_tensors(key):
    expected, actual = pair(key)
    args = arguments(actual)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = mode.from_tensor(args[0]), torch.utils._pytree.tree_map(mode.from_tensor, args[1])
        results = tensors(actual(*fakes))
    for result, value in zip(results, tensors(expected(*args)), strict=True):
        assert result.shape == value.shape and result.dtype == value.dtype


@each_module
def test_autocast_leaves_float64_alone(key):
    expected, actual = pair(key, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        same_outcome(expected, actual, *arguments(actual))


CONVERSIONS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "float": lambda m: m.double().float(),
    "to": lambda m: m.to("cpu", torch.float64),
    "type": lambda m: m.type(torch.float64),
}


@each_module
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions(key, conversion):
    expected, actual = pair(key)
    actual(*arguments(actual))
    before = list(actual.parameters())
    assert CONVERSIONS[conversion](actual) is actual
    assert all(p is q for p, q in zip(actual.parameters(), before, strict=True))
    CONVERSIONS[conversion](expected)
    close(list(actual.parameters()), list(expected.parameters()))
    close(actual(*arguments(actual)), expected(*arguments(expected)))


@each_module
def test_inference_mode(key):
    expected, outside = pair(key)
    args = arguments(expected)
    wanted = expected(*args)
    with torch.inference_mode():
        _, inside = pair(key)
        close(inside(*args), wanted)
        close(outside(*args), wanted)
        assert tensors(inside(*args))[0].is_inference()
        outside.load_state_dict(inside.state_dict())
    with torch.no_grad():
        close(inside(*args), wanted)
        close(outside(*args), wanted)


@each_module
def test_inference_tensor_outside(key):
    """An inference tensor as input of a module that records gradients: an error or correct gradients."""
    expected, actual = pair(key)
    with torch.inference_mode():
        args = arguments(actual)
    same_outcome(lambda: gradients(expected, *args), lambda: gradients(actual, *args))


@one_of_each
@pytest.mark.parametrize("where", ["input", "state", "weights"])
def test_two_devices(key, where):
    expected, actual = pair(key)
    input, hx = arguments(actual)
    if where == "input":
        input = input.to("meta")
    elif where == "state":
        hx = tuple(h.to("meta") for h in hx) if isinstance(hx, tuple) else hx.to("meta")
    else:
        expected.to("meta"), actual.to("meta")
    for module in (expected, actual):
        assert issubclass(error_of(module, input, hx)[0], RuntimeError)


@each_module
def test_new_parameter(key):
    expected, actual = pair(key)
    actual(*arguments(actual))
    for name, parameter in list(actual.named_parameters()):
        new = nn.Parameter(parameter.detach() * 2)
        for module in (expected, actual):
            setattr(module, name, new)
        if isinstance(actual, nn.RNNBase):
            assert actual._flat_weights[actual._flat_weights_names.index(name)] is new
        same_results_and_gradients(expected, actual)
    kind, text = error_of(setattr, actual, weight_name(actual), torch.zeros(1))
    assert kind is TypeError and "cannot assign" in text


@each_module
def test_computed_weight(key):
    """A plain tensor in place of a deleted parameter is used and receives a gradient."""
    results = []
    for module in pair(key):
        name = weight_name(module)
        source = (getattr(module, name).detach() * 0.5).requires_grad_()
        delattr(module, name)
        setattr(module, name, source * 2)
        args = arguments(module)
        value = module(*args)
        grads = (
            derivative(loss(value), module, args),
            torch.autograd.grad(loss(module(*args)), source),
        )
        results.append((value, grads))
    close(results[1][0], results[0][0])
    close(results[1][1], results[0][1], grad=True)


@each_module
def test_parameter_registered_as_none(key):
    expected, actual = pair(key)
    for module in (expected, actual):
        name = weight_name(module)
        value = getattr(module, name).detach() * 3
        module.register_parameter(name, None)
        module._parameters.pop(name)
        setattr(module, name, value)
    same_results_and_gradients(expected, actual)


@each_module
def test_functional_call(key):
    expected, actual = pair(key)
    args = arguments(actual)
    own = actual(*args)
    given = {name: (p.detach() * 2).requires_grad_() for name, p in actual.named_parameters()}
    found, wanted = (torch.func.functional_call(m, given, args) for m in (actual, expected))
    close(found, wanted)
    grads = [torch.autograd.grad(loss(r), list(given.values())) for r in (found, wanted)]
    close(*grads, grad=True)
    close(actual(*args), own)


@each_module
def test_parameters_dictionary(key):
    expected, actual = pair(key)
    args = arguments(actual)
    own, name = actual(*args), weight_name(actual)
    old = actual._parameters[name]
    for module in (expected, actual):
        module._parameters[name] = nn.Parameter(old.detach() * 2)
    close(actual(*args), expected(*args))
    actual._parameters[name] = old
    close(actual(*args), own)


@pytest.mark.parametrize("key", ["rnn_deep", "lstm_deep", "gru_deep"])
def test_tied_weights(key):
    expected, actual = pair(key)
    for module in (expected, actual):
        module.weight_hh_l0_reverse = module.weight_hh_l0
        module.weight_hh_l1 = module.weight_hh_l0
    names = [name for name, _ in actual.named_parameters()]
    assert "weight_hh_l1" not in names and "weight_hh_l1" in actual.state_dict()
    same_results_and_gradients(expected, actual)
    other = getattr(fused_rnn, MODULES[key][0])(INPUT, HIDDEN, bias=actual.bias)
    other.weight_hh_l0 = actual.weight_hh_l0
    assert len(list(nn.ModuleList([actual, other]).parameters())) == len(names) + len(list(other.parameters())) - 1


CHANGES = {
    "data": lambda p: p.data.mul_(2),
    "numpy": lambda p: p.detach().numpy().__imul__(2),
    "no_grad": lambda p: p.detach().mul_(2),
    "set_data": lambda p: setattr(p, "data", p.data * 2),
    "storage": lambda p: p.data.untyped_storage().copy_((p.data * 2).untyped_storage()),
}


@each_module
@pytest.mark.parametrize("change", CHANGES)
def test_no_stale_copy(key, change):
    expected, actual = pair(key)
    args = arguments(actual, grad=True)
    for module in (expected, actual):
        gradients(module, *args)
        for parameter in module.parameters():
            CHANGES[change](parameter)
    same_results_and_gradients(expected, actual)


@each_sequence
def test_deleted_weight(key):
    expected, actual = pair(key)
    for module in (expected, actual):
        name = weight_name(module)
        weight = getattr(module, name)
        delattr(module, name)
        assert module.to(torch.float64) is module
        assert module._flat_weights[module._flat_weights_names.index(name)] is None
        setattr(module, name, nn.Parameter(weight.detach()))
        module.to(torch.float32)
    same_results_and_gradients(expected, actual)


LAYOUTS = {
    "transposed": lambda p: p.detach().t().contiguous().t(),
    "offset": lambda p: torch.cat([torch.zeros(3), p.detach().flatten()])[3:].view(p.shape),
    "sliced": lambda p: torch.stack([p.detach()] * 2, -1)[..., 1],
    "expanded": lambda p: p.detach()[:1].expand_as(p),
}


@each_module
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_layouts(key, layout):
    expected, actual = pair(key)
    for name, parameter in list(actual.named_parameters()):
        laid_out = LAYOUTS[layout](parameter)
        setattr(actual, name, nn.Parameter(laid_out))
        setattr(expected, name, nn.Parameter(laid_out.clone(memory_format=torch.contiguous_format)))
    same_results_and_gradients(expected, actual)


@each_module
def test_views_of_one_buffer(key):
    expected, actual = pair(key)
    flat = nn.utils.parameters_to_vector(expected.parameters()).detach() * 2
    for module in (expected, actual):
        nn.utils.vector_to_parameters(flat, module.parameters())
    same_results_and_gradients(expected, actual)
