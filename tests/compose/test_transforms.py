"""Autograd and torch.func with resets, states at resets, lengths and the states of every step, which torch.nn lacks.

Also calls in which torch.nn raises: vmap, ensembles, gradients per sample, forward mode of a float32 LSTM. The
transforms that torch.nn supports are tested in test_contract_autograd.py. Expected values come from ordinary reverse
mode, which test_segments.py compares with torch.nn, from loops in place of vmap, and from finite differences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import fused_rnn
from contract import CELLS, SEQUENCES, close, loss, tensors
from fused_rnn import functional

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, INPUT, HIDDEN = 5, 3, 3, 4
RESETS = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.bool)
LENGTHS = torch.tensor([5, 0, 3])

each_name = pytest.mark.parametrize("name", SEQUENCES)
each_cell = pytest.mark.parametrize("name", CELLS)
each_kind = pytest.mark.parametrize("kind", ["plain", "resets", "every step", "lengths", "all"])


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 100 * seed)).to(dtype)


def state(module: nn.Module, *lead: int, seed: int = 0) -> Any:
    """hx, possibly with leading dimensions; a pair for the LSTM."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    pair = tuple(tensor(*lead, rows, B, HIDDEN, seed=seed + i, dtype=module.weight_hh_l0.dtype) for i in range(2))
    return pair if module.mode == "LSTM" else pair[0]


def built(name: str, kind: str = "plain", **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A bidirectional module of two layers, and the keywords of its calls."""
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64, **options}
    module = getattr(fused_rnn, name)(INPUT, HIDDEN, **options)
    keywords: dict[str, Any] = {}
    if kind in ("resets", "all"):
        keywords |= {"resets": RESETS, "reset_state": state(module, seed=5)}
    if kind == "every step":
        keywords |= {"resets": RESETS, "reset_state": state(module, T, seed=5)}
    if kind in ("lengths", "all"):
        keywords["lengths"] = LENGTHS
    if kind == "all":
        keywords["return_state_sequence"] = True
    return module, keywords


def value_of(module: nn.Module, keywords: dict[str, Any]) -> Callable[..., Tensor]:
    """A scalar function of input, hx and reset_state, differentiable by all three."""

    def value(x: Tensor, hx: Any, fresh: Any) -> Tensor:
        given = keywords | ({"reset_state": fresh} if "resets" in keywords else {})
        return loss(module(x, hx, **given))

    return value


def arguments(module: nn.Module, keywords: dict[str, Any]) -> tuple[Any, ...]:
    return tensor(T, B, INPUT), state(module, seed=2), keywords.get("reset_state", ())


def reverse(value: Callable[..., Tensor], args: tuple[Any, ...]) -> list[Tensor]:
    """Gradients by ordinary reverse mode on the kernels."""
    args = tree_map(lambda t: t.detach().clone().requires_grad_(), args)
    return list(torch.autograd.grad(value(*args), tensors(args)))


@each_kind
@each_name
def test_functional_derivatives(name: str, kind: str) -> None:
    """grad, jacrev, jacfwd, jvp and a dual number, by input, states and states at resets."""
    module, keywords = built(name, kind)
    value, args = value_of(module, keywords), arguments(module, keywords)
    wanted = reverse(value, args)
    argnums = (0, 1, 2) if "resets" in keywords else (0, 1)
    for transform in (grad, jacrev, jacfwd):
        close(list(tensors(transform(value, argnums)(*args))), wanted, grad=True)
    along = tree_map(lambda t: t.cos(), args)
    slope = sum((g * a).sum() for g, a in zip(wanted, tensors(along), strict=True))
    close(jvp(value, args, along)[1], slope, grad=True)
    with forward_ad.dual_level():
        result = value(*tree_map(forward_ad.make_dual, args, along))
        close(forward_ad.unpack_dual(result).tangent, slope, grad=True)


@each_kind
@each_name
def test_second_derivatives(name: str, kind: str) -> None:
    """Forward over reverse and reverse over reverse, by torch.func and by autograd; also by the weights."""
    module, keywords = built(name, kind, num_layers=1)
    value, args = value_of(module, keywords), arguments(module, keywords)
    of_input = lambda x: value(x.view_as(args[0]), *args[1:])  # noqa: E731
    flat = args[0].flatten()
    wanted = torch.autograd.functional.hessian(of_input, flat)
    assert wanted.any()
    close(hessian(of_input)(flat), wanted, grad=True)
    close(torch.autograd.functional.hessian(of_input, flat, vectorize=True), wanted, grad=True)

    leaves = tree_map(lambda t: t.clone().requires_grad_(), args)

    def outputs(*_: Tensor) -> tuple[Tensor, ...]:
        given = keywords | ({"reset_state": leaves[2]} if "resets" in keywords else {})
        return tuple(tensors(module(*leaves[:2], **given)))

    given = (*tensors(leaves), *module.parameters())
    assert torch.autograd.gradcheck(outputs, given, fast_mode=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(outputs, given, fast_mode=True)


@each_kind
@each_name
def test_gradient_of_a_transformed_gradient(name: str, kind: str) -> None:
    """The kernels' backward is linear in the incoming gradient: tangents and batches of it must pass through."""
    module, keywords = built(name, kind)
    x, hx, _ = arguments(module, keywords)
    x.requires_grad_()
    y = module(x, hx, **keywords)[0]
    one, other = torch.sin(y.detach()), torch.cos(y.detach())

    def back(g: Tensor, **options: Any) -> Tensor:
        return torch.autograd.grad(y, x, g, retain_graph=True, **options)[0]

    wanted = back(other)
    close(jvp(back, (one,), (other,))[1], wanted, grad=True)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(back(forward_ad.make_dual(one, other)))
        close([found.primal, found.tangent], [back(one), wanted], grad=True)
    many = torch.stack([one, other])
    for batch in (vmap(back)(many), back(many, is_grads_batched=True)):
        close(batch, torch.stack([back(one), wanted]), grad=True)
        assert not batch.requires_grad  # as in torch.nn, no graph is kept unless requested
    by_value = grad(lambda g: (back(g, create_graph=True) * x.detach()).sum())(one)
    close(by_value, jvp(lambda x: module(x, hx, **keywords)[0], (x.detach(),), (x.detach(),))[1], grad=True)


@each_kind
@each_name
def test_gradient_of_reset_state_alone(name: str, kind: str) -> None:
    """By one argument at a time, with frozen weights in evaluation mode: no other gradient is needed."""
    module, keywords = built(name, kind)
    module.requires_grad_(False).eval()
    value, args = value_of(module, keywords), arguments(module, keywords)
    wanted = reverse(value, args)
    leaves = tree_map(lambda t: t.clone().requires_grad_(), args)
    for leaf, expected in zip(tensors(leaves), wanted, strict=True):
        result = value(*leaves)
        for _ in range(2):
            (found,) = torch.autograd.grad(result, leaf, retain_graph=True)
            assert torch.equal(found, torch.autograd.grad(result, leaf, retain_graph=True)[0])
            close(found, expected, grad=True)
        for other in tensors(leaves):
            other.requires_grad_(other is leaf)
        close(torch.autograd.grad(value(*leaves), leaf)[0], expected, grad=True)
        for other in tensors(leaves):
            other.requires_grad_()


@each_kind
@each_name
def test_checkpoints_and_saved_tensors(name: str, kind: str) -> None:
    module, keywords = built(name, kind)
    value, args = value_of(module, keywords), arguments(module, keywords)
    leaves = tree_map(lambda t: t.clone().requires_grad_(), args)
    everything = [*tensors(leaves), *module.parameters()]
    wanted = torch.autograd.grad(value(*leaves), everything)

    for reentrant in (False, True):
        # Reentrant checkpoints compute gradients only of tensors at the top level.
        flat = partial(regrouped, value, leaves)
        checkpoint(flat, *tensors(leaves), use_reentrant=reentrant).backward()
        close([t.grad for t in everything], wanted, grad=True)
        for t in everything:
            t.grad = None

    stored: list[Any] = []

    def pack(t: Tensor) -> int:
        stored.append(t.detach().numpy().copy())
        return len(stored) - 1

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda index: torch.from_numpy(stored[index]))
    for context in (hooks, torch.autograd.graph.save_on_cpu(), torch.autograd.detect_anomaly(check_nan=True)):
        with context:
            found = value(*leaves)
        close(torch.autograd.grad(found, everything), wanted, grad=True)
    assert stored

    def twice(context: Any) -> list[Tensor]:
        with context:
            first = torch.autograd.grad(value(*leaves), leaves[0], create_graph=True)[0]
            return list(
                torch.autograd.grad(first.square().sum(), everything, allow_unused=True, materialize_grads=True)
            )

    close(twice(torch.autograd.graph.save_on_cpu()), twice(torch.enable_grad()), grad=True)


def regrouped(value: Callable[..., Tensor], like: Any, *flat: Tensor) -> Tensor:
    left = iter(flat)
    return value(*tree_map(lambda _: next(left), like))


@each_kind
@each_name
def test_hooks(name: str, kind: str) -> None:
    """Hooks see the keywords and the gradients, and may change them."""
    module, keywords = built(name, kind)
    x, hx, _ = arguments(module, keywords)
    x.requires_grad_()
    wanted = torch.autograd.grad(loss(module(x, hx, **keywords)[0]), x)[0]
    seen: list[Any] = []
    module.register_forward_pre_hook(lambda _, args, given: seen.append(set(given)), with_kwargs=True)
    module.register_forward_hook(lambda _, args, given, result: seen.append(len(result)), with_kwargs=True)
    module.register_full_backward_hook(lambda _, incoming, outgoing: tuple(g if g is None else 2 * g for g in incoming))
    together = torch.autograd.graph.register_multi_grad_hook((x, module.weight_hh_l0), lambda grads: seen.append(grads))
    y = module(x, hx, **keywords)[0]
    y.retain_grad()
    loss(y).backward()
    together.remove()
    assert seen[:2] == [set(keywords), 2 + ("return_state_sequence" in keywords)]
    close(x.grad, 2 * wanted, grad=True)
    close(seen[2][0], 2 * wanted, grad=True)
    assert y.grad.shape == y.shape and all(g.any() for g in seen[2])


def looped(call: Callable[..., Tensor], *many: Any) -> Tensor:
    """The expected result of vmap, by a loop."""
    count = tensors(many)[0].size(0)
    return torch.stack([call(*tree_map(lambda t, i=i: t[i], many)) for i in range(count)])


def doubled(value: Any) -> Any:
    return tree_map(lambda t: torch.stack([t, ~t if t.dtype is torch.bool else t.flip(0)]), value)


@each_kind
@each_name
def test_vmap(name: str, kind: str) -> None:
    """vmap over the input, the states, and each keyword."""
    module, keywords = built(name, kind)
    x, hx, _ = arguments(module, keywords)
    calls: dict[str, Callable[..., Tensor]] = {
        "input": lambda x: module(x, hx, **keywords)[0],
        "hx": lambda hx: loss(module(x, hx, **keywords)),
        "no hx": lambda x: module(x, **keywords)[0],
        "unbatched": lambda x: module(x[:, 0], tree_map(lambda s: s[:, 0], hx))[0],
    }
    for what, call in calls.items():
        many = doubled(hx) if what == "hx" else doubled(x)
        close(vmap(call)(many), looped(call, many))
    for key in set(keywords) - {"return_state_sequence"}:

        def of_keyword(given: Any, key: str = key) -> Tensor:
            return module(x, hx, **keywords | {key: given})[0]

        close(vmap(of_keyword)(doubled(keywords[key])), looped(of_keyword, doubled(keywords[key])))


@each_name
def test_vmap_over_packed_data(name: str) -> None:
    module, _ = built(name)
    call = lambda data: module(PackedSequence(data, torch.tensor([3, 2, 1])))[0].data  # noqa: E731
    many = tensor(2, 6, INPUT)
    close(vmap(call)(many), looped(call, many))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_kind
@each_name
def test_ensembles(name: str, kind: str, dtype: torch.dtype) -> None:
    """Outputs and gradients of all members at once, with stack_module_state."""
    members = [built(name, kind, dtype=dtype)[0] for _ in range(3)]
    _, keywords = built(name, kind, dtype=dtype)
    for index, member in enumerate(members):
        torch.manual_seed(index)
        member.reset_parameters()
    x = tensor(T, B, INPUT, dtype=dtype)
    stacked, _ = stack_module_state(members)
    call = lambda weights, x: loss(functional_call(members[0], weights, (x,), keywords))  # noqa: E731
    close(vmap(call, (0, None))(stacked, x), torch.stack([loss(m(x, **keywords)) for m in members]))
    found = vmap(grad(call), (0, None))(stacked, x)
    for index, member in enumerate(members):
        wanted = torch.autograd.grad(loss(member(x, **keywords)), list(member.parameters()))
        close([g[index] for g in found.values()], wanted, grad=True)


@each_kind
@each_name
def test_gradients_per_sample(name: str, kind: str) -> None:
    module, keywords = built(name, kind)
    weights = {key: p.detach() for key, p in module.named_parameters()}
    many = tensor(4, T, B, INPUT)

    def value(weights: Any, x: Tensor) -> Tensor:
        return loss(functional_call(module, weights, (x,), keywords)).square()

    found = vmap(grad(value), (None, 0))(weights, many)
    for index, x in enumerate(many):
        wanted = torch.autograd.grad(loss(module(x, **keywords)).square(), list(module.parameters()))
        close([g[index] for g in found.values()], wanted, grad=True)
    # One row at a time, without a batch dimension, wherever torch.nn's own functions do not write in place.
    if kind == "plain":
        per_row = vmap(grad(lambda weights, x: loss(functional_call(module, weights, (x,))[0])), (None, 1))
        found = per_row(weights, many[0])
        for row in range(B):
            wanted = torch.autograd.grad(loss(module(many[0][:, row])[0]), list(module.parameters()))
            close([g[row] for g in found.values()], wanted, grad=True)


@pytest.mark.parametrize("packed", [False, True])
def test_forward_mode_of_a_float32_lstm(packed: bool) -> None:
    """torch.nn raises for padded input: oneDNN has no forward-mode rule."""
    module, _ = built("LSTM", dtype=torch.float32)
    exact, _ = built("LSTM")
    exact.load_state_dict(module.state_dict())
    x, along = tensor(6, INPUT), tensor(6, INPUT, seed=1)
    shape = (lambda x: PackedSequence(x, torch.tensor([3, 2, 1]))) if packed else (lambda x: x.view(3, 2, INPUT))
    call = lambda x, module: tensors(module(shape(x)))[0]  # noqa: E731
    _, found = jvp(partial(call, module=module), (x.float(),), (along.float(),))
    _, wanted = jvp(partial(call, module=exact), (x,), (along,))
    close(found, wanted.float(), grad=True)
    close(jacfwd(partial(call, module=module))(x.float()), jacrev(partial(call, module=exact))(x).float(), grad=True)


@each_kind
@each_name
def test_functional_call_with_a_part_of_the_parameters(name: str, kind: str) -> None:
    module, keywords = built(name, kind)
    x = tensor(T, B, INPUT)
    given = {"weight_hh_l0": (module.weight_hh_l0.detach() * 2).requires_grad_()}
    found = functional_call(module, given, (x,), keywords)
    twin, _ = built(name, kind)
    with torch.no_grad():
        twin.weight_hh_l0.mul_(2)
    wanted = twin(x, **keywords)
    close(found, wanted)
    grads = [
        torch.autograd.grad(loss(result), [weight, *others], allow_unused=True)
        for result, weight, others in (
            (found, given["weight_hh_l0"], list(module.parameters())[2:]),
            (wanted, twin.weight_hh_l0, list(twin.parameters())[2:]),
        )
    ]
    close(*grads, grad=True)


@each_kind
@each_name
def test_plain_functions(name: str, kind: str) -> None:
    """functional.rnn, lstm and gru: every derivative by the weights, and vmap over them."""
    module, keywords = built(name, kind)
    function = getattr(functional, name.lower())
    weights, x = [p.detach() for p in module._flat_weights], tensor(T, B, INPUT)

    def value(*weights: Tensor) -> Tensor:
        return loss(function(x, weights, bidirectional=True, **keywords))

    wanted = reverse(value, tuple(weights))
    every = tuple(range(len(weights)))
    close(list(grad(value, every)(*weights)), wanted, grad=True)
    along = [w.cos() for w in weights]
    slope = sum((g * a).sum() for g, a in zip(wanted, along, strict=True))
    close(jvp(value, tuple(weights), tuple(along))[1], slope, grad=True)
    many = [torch.stack([w, w.sin()]) for w in weights]
    close(vmap(value)(*many), torch.stack([value(*weights), value(*(w.sin() for w in weights))]))
    leaves = [w.clone().requires_grad_() for w in weights]
    checkpoint(value, *leaves, use_reentrant=False).backward()
    close([w.grad for w in leaves], wanted, grad=True)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@each_cell
def test_cells(name: str, given: bool) -> None:
    """vmap, ensembles, gradients per sample and tangents, most of which torch.nn's LSTMCell lacks."""
    members = [getattr(fused_rnn, name)(INPUT, HIDDEN, dtype=torch.float64) for _ in range(2)]
    module, x = members[0], tensor(B, INPUT)
    pair = tensor(B, HIDDEN), tensor(B, HIDDEN, seed=1)
    hx = (pair if name == "LSTMCell" else pair[0]) if given else None
    many = doubled(x)
    call = lambda x: loss(module(x, hx))  # noqa: E731
    close(vmap(call)(many), looped(call, many))
    alone = lambda x, hx=None: tensors(module(x, hx))[-1]  # noqa: E731
    rows = (x, hx) if given else (x,)
    close(vmap(alone)(*rows), alone(*rows))

    stacked, _ = stack_module_state(members)
    weigh = lambda weights, x: loss(functional_call(module, weights, (x, hx)))  # noqa: E731
    close(vmap(weigh, (0, None))(stacked, x), torch.stack([loss(m(x, hx)) for m in members]))
    weights = {key: p.detach() for key, p in module.named_parameters()}
    found = vmap(grad(weigh), (None, 0))(weights, many)
    for index, one in enumerate(many):
        wanted = torch.autograd.grad(loss(module(one, hx)), list(module.parameters()))
        close([g[index] for g in found.values()], wanted, grad=True)
    close(hessian(call)(x), torch.autograd.functional.hessian(call, x), grad=True)

    leaf = x.clone().requires_grad_()
    y = alone(leaf, hx)
    back = lambda g: torch.autograd.grad(y, leaf, g, retain_graph=True)[0]  # noqa: E731
    close(jvp(back, (y.detach(),), (y.detach().cos(),))[1], back(y.detach().cos()), grad=True)
    checked = dict(check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(tensors(module(x, hx))), (leaf,), **checked)


@each_cell
def test_misfits_of_cells_raise_in_a_transform(name: str) -> None:
    """A hidden state with one row for three inputs raises as in torch.nn: it is not broadcast."""
    module = getattr(fused_rnn, name)(INPUT, HIDDEN)
    h = torch.zeros(1, HIDDEN)
    with pytest.raises(RuntimeError):
        vmap(lambda x: tensors(module(x, (h, h) if name == "LSTMCell" else h))[0])(torch.zeros(2, 3, INPUT))


@each_name
def test_misfits_of_sequences_raise_in_a_transform(name: str) -> None:
    module, _ = built(name)
    wrong = tree_map(lambda s: s[:, :1], state(module))
    with pytest.raises(RuntimeError, match="Expected hidden"):
        vmap(lambda x: module(x, wrong)[0])(torch.zeros(2, T, B, INPUT, dtype=torch.float64))


@each_name
def test_backend_torch_stays_torchs_in_a_transform(name: str) -> None:
    module, _ = built(name, backend="torch")
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        vmap(lambda x: module(x)[0])(torch.zeros(2, T, B, INPUT, dtype=torch.float64))
