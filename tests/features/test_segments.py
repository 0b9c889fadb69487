"""Resets inside a sequence, lengths, and the states of every step, against torch.nn on each piece separately.

Also against the specification, for all combinations and their gradients.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn
from contract import tensors, twins
from fused_rnn import layers, operators, policy, reference
from fused_rnn.options import LayerOptions

NAMES = ("RNN", "LSTM", "GRU")
each_name = pytest.mark.parametrize("name", NAMES)
OPTIONS = [
    {},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
pair = partial(twins, dtype=torch.float64)


def draw_state(module: nn.Module, B: int, *first: int, requires_grad: bool = True) -> Any:
    """Random hx, or one for every step if there is a leading dimension."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    p = next(module.parameters())
    sizes = [module.proj_size or module.hidden_size] + [module.hidden_size] * (module.mode == "LSTM")
    states = [torch.randn(*first, rows, B, size, dtype=p.dtype).requires_grad_(requires_grad) for size in sizes]
    return tuple(states) if module.mode == "LSTM" else states[0]


def row_of(state: Any, b: int, t: int | None = None) -> Any:
    """The state of one batch row, at step t if there is one for each."""
    if isinstance(state, tuple):
        return tuple(row_of(s, b, t) for s in state)
    state = state[t] if state.dim() == 4 else state
    return state[:, b : b + 1]


def directions_of(state: Any, rows: slice) -> Any:
    return tuple(s[rows] for s in state) if isinstance(state, tuple) else state[rows]


def in_pieces(module: nn.Module, x: Tensor, hx: Any, resets: Tensor, reset_state: Any) -> tuple[Tensor, Any]:
    """The meaning of resets in one layer: torch.nn on each piece separately. x and resets are time first."""
    T, B, _ = x.shape
    zero = draw_state(module, B, requires_grad=False)
    zero = tuple(torch.zeros_like(s) for s in zero) if isinstance(zero, tuple) else torch.zeros_like(zero)
    outputs, finals = [], []
    two = module.bidirectional
    for b in range(B):
        cuts = sorted({0, T, *resets[:, b].nonzero().flatten().tolist()})
        pieces, last = [], None
        for start, stop in itertools.pairwise(cuts):
            fresh = zero if reset_state is None else reset_state
            ahead = row_of(fresh if resets[start, b] else hx, b, start)
            back = row_of(hx if stop == T else fresh, b, stop - 1)
            first = ahead
            if two:
                join = lambda f, r: torch.cat((f[:1], r[1:]))  # noqa: E731
                first = tuple(map(join, ahead, back)) if isinstance(ahead, tuple) else join(ahead, back)
            y, h = module(x[start:stop, b : b + 1], first)
            pieces.append(y)
            if start == 0:
                at_start = h
            last = h
        outputs.append(torch.cat(pieces))
        if two:
            join = lambda f, r: torch.cat((f[:1], r[1:]))  # noqa: E731
            last = tuple(map(join, last, at_start)) if isinstance(last, tuple) else join(last, at_start)
        finals.append(last)
    if isinstance(finals[0], tuple):
        return torch.cat(outputs, 1), tuple(torch.cat(f, 1) for f in zip(*finals, strict=True))
    return torch.cat(outputs, 1), torch.cat(finals, 1)


def gradients(outputs: Any, inputs: list[Tensor]) -> list[Tensor]:
    outputs = tensors(outputs)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    found = torch.autograd.grad(outputs, inputs, weights, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


def assert_same(actual: Any, expected: Any, inputs: list[Tensor], other_inputs: list[Tensor] | None = None) -> None:
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
    for a, e in zip(gradients(actual, inputs), gradients(expected, other_inputs or inputs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["zeros", "learned", "every step"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("B", "H", "rate"), [(1, 3, 0.3), (4, 17, 0.3), (9, 40, 0.05), (3, 5, 1.0)])
@each_name
def test_resets_cut_the_sequence(name: str, B: int, H: int, rate: float, bidirectional: bool, kind: str) -> None:
    theirs, ours = pair(name, 3, H, bidirectional=bidirectional)
    T = 11
    x = torch.randn(T, B, 3, dtype=torch.float64, requires_grad=True)
    hx = draw_state(ours, B)
    resets = torch.rand(T, B) < rate
    reset_state = None if kind == "zeros" else draw_state(ours, B, *([T] if kind == "every step" else []))
    expected = in_pieces(theirs, x, hx, resets, reset_state)
    actual = ours(x, hx, resets=resets, reset_state=reset_state)
    inputs = [x, *tensors(hx), *([] if reset_state is None else tensors(reset_state))]
    assert_same(actual, expected, [*inputs, *ours.parameters()], [*inputs, *theirs.parameters()])


def of_reference(module: nn.Module, *args: Any, monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> Any:
    """The same call, computed by the specification."""
    with monkeypatch.context() as patch:
        patch.setattr(policy, "fusible", lambda *tensors: False)
        return module(*args, **kwargs)


@pytest.mark.parametrize("kind", ["zeros", "learned", "every step"])
@each_option
@each_name
def test_resets_of_every_module(name: str, options: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair(name, 4, 9, **options)
    T, B = 7, 5
    shape = (B, T) if options.get("batch_first") else (T, B)
    x = torch.randn(*shape, 4, dtype=torch.float64, requires_grad=True)
    hx, resets = draw_state(ours, B), torch.rand(shape) < 0.3
    reset_state = None if kind == "zeros" else draw_state(ours, B, *([T] if kind == "every step" else []))
    arguments = dict(resets=resets, reset_state=reset_state, return_state_sequence=True)
    expected = of_reference(ours, x, hx, **arguments, monkeypatch=monkeypatch)
    inputs = [x, *tensors(hx), *([] if reset_state is None else tensors(reset_state)), *ours.parameters()]
    assert_same(ours(x, hx, **arguments), expected, inputs)


@each_option
@each_name
def test_lengths_are_packing(name: str, options: dict[str, Any]) -> None:
    theirs, ours = pair(name, 4, 9, **options)
    T, lengths = 8, torch.tensor([3, 8, 1, 5, 5])
    batch_first = options.get("batch_first", False)
    x = torch.randn(5, T, 4, dtype=torch.float64) if batch_first else torch.randn(T, 5, 4, dtype=torch.float64)
    x.requires_grad_()
    hx = draw_state(ours, 5)
    packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    output, hidden = theirs(packed, hx)
    output, _ = pad_packed_sequence(output, batch_first=batch_first, total_length=T)
    inputs = [x, *tensors(hx)]
    for kind in (torch.int32, torch.int64):
        actual = ours(x, hx, lengths=lengths.to(kind))
        assert_same(actual, (output, hidden), [*inputs, *ours.parameters()], [*inputs, *theirs.parameters()])


@pytest.mark.parametrize("lengths", [[0, 4, 2], [0, 0, 0], [4, 4, 4], [1, 0, 0]])
@each_option
@each_name
def test_lengths_with_zeros(
    name: str, options: dict[str, Any], lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = pair(name, 4, 9, **options)
    shape = (3, 4) if options.get("batch_first") else (4, 3)
    x = torch.randn(*shape, 4, dtype=torch.float64, requires_grad=True)
    for hx in (None, draw_state(ours, 3)):
        for resets in (None, torch.rand(shape) < 0.4):
            arguments = dict(lengths=torch.tensor(lengths), resets=resets, return_state_sequence=True)
            expected = of_reference(ours, x, hx, **arguments, monkeypatch=monkeypatch)
            actual = ours(x, hx, **arguments)
            assert_same(actual, expected, [x, *ours.parameters(), *([] if hx is None else tensors(hx))])
    if hx is not None and lengths[0] == 0:
        for final, first in zip(tensors(actual[1]), tensors(hx), strict=True):
            assert torch.equal(final[:, 0], first[:, 0])


@each_name
def test_lengths_with_a_state_for_every_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair(name, 4, 9)
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    states = draw_state(ours, 3, 5)
    arguments = dict(lengths=torch.tensor([2, 5, 0]), resets=torch.rand(5, 3) < 0.5, reset_state=states)
    expected = of_reference(ours, x, **arguments, monkeypatch=monkeypatch)
    assert_same(ours(x, **arguments), expected, [x, *tensors(states), *ours.parameters()])


@each_option
@each_name
def test_state_sequence_is_a_loop_of_steps(name: str, options: dict[str, Any]) -> None:
    """The states of every step, with their gradients, equal those of calls on growing sequences."""
    theirs, ours = pair(name, 4, 9, **(options | {"bidirectional": False}))
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    data = x.transpose(0, 1) if options.get("batch_first") else x
    hx = draw_state(ours, 3)
    output, hidden, sequence = ours(data, hx, return_state_sequence=True)
    state, states = hx, []
    for t in range(6):
        step = x[t : t + 1].transpose(0, 1) if options.get("batch_first") else x[t : t + 1]
        _, state = theirs(step, state)
        states.append(tensors(state))
    expected = [torch.stack(kind) for kind in zip(*states, strict=True)]
    inputs = [x, *tensors(hx)]
    assert_same(sequence, expected, [*inputs, *ours.parameters()], [*inputs, *theirs.parameters()])
    for last, final in zip(tensors(sequence), tensors(hidden), strict=True):
        assert torch.equal(last[-1], final)
    assert torch.equal(ours(data, hx)[0], output)


@each_name
def test_state_sequence_of_a_packed_sequence(name: str) -> None:
    _, ours = pair(name, 4, 9, bidirectional=True)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    packed = pack_padded_sequence(x, torch.tensor([2, 6, 4]), enforce_sorted=False)
    *_, sequence = ours(packed, return_state_sequence=True)
    *_, padded = ours(x, lengths=torch.tensor([2, 6, 4]), return_state_sequence=True)
    of_packed = sequence if name == "LSTM" else (sequence,)
    for a, b in zip(of_packed, tensors(padded), strict=True):
        assert torch.equal(pad_packed_sequence(a)[0].transpose(1, 2), b)


@pytest.mark.parametrize("kind", ["zeros", "learned", "every step"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [[2, 6, 4, 4], [6, 4, 4, 1]], ids=["any order", "sorted"])
@each_name
def test_resets_of_a_packed_sequence(
    name: str, lengths: list[int], bidirectional: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = pair(name, 4, 9, bidirectional=bidirectional)
    x, resets = torch.randn(6, 4, 4, dtype=torch.float64, requires_grad=True), torch.rand(6, 4) < 0.4
    hx = draw_state(ours, 4)
    reset_state = None if kind == "zeros" else draw_state(ours, 4, *([6] if kind == "every step" else []))
    outputs, finals = [], []
    for b, n in enumerate(lengths):
        rows = slice(b, b + 1)
        fresh = [s[..., rows, :] for s in tensors(reset_state)] if reset_state is not None else None
        fresh = tuple(fresh) if name == "LSTM" and fresh else fresh and fresh[0]
        y, h = in_pieces(theirs, x[:n, rows], row_of(hx, b), resets[:n, rows], fresh)
        outputs.append(nn.functional.pad(y, (0, 0, 0, 0, 0, 6 - n)))
        finals.append(tensors(h))
    expected = torch.cat(outputs, 1), [torch.cat(kind, 1) for kind in zip(*finals, strict=True)]

    def packed(rows: Tensor) -> Any:
        return pack_padded_sequence(rows, torch.tensor(lengths), enforce_sorted=lengths == sorted(lengths)[::-1])

    def call() -> Any:
        y, h = ours(packed(x), hx, resets=packed(resets), reset_state=reset_state)
        return pad_packed_sequence(y)[0], h

    inputs = [x, *tensors(hx), *([] if reset_state is None else tensors(reset_state))]
    with monkeypatch.context() as patch:
        patch.setattr(reference, "layer", None)  # only the kernels may run
        assert_same(call(), expected, [*inputs, *ours.parameters()], [*inputs, *theirs.parameters()])
    with monkeypatch.context() as patch:
        patch.setattr(policy, "fusible", lambda *tensors: False)
        assert_same(call(), expected, [*inputs, *ours.parameters()], [*inputs, *theirs.parameters()])


def test_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair("LSTM", 4, 9, proj_size=5, num_layers=2, bidirectional=True)
    x = torch.randn(7, 4, 4, dtype=torch.float64, requires_grad=True)
    hx, state = draw_state(ours, 4), draw_state(ours, 4)
    arguments = dict(
        resets=torch.rand(7, 4) < 0.3, reset_state=state, lengths=torch.tensor([7, 3, 0, 5]), return_state_sequence=True
    )
    expected = of_reference(ours, x, hx, **arguments, monkeypatch=monkeypatch)
    assert expected[2][0].shape == (7, 4, 4, 5) and expected[2][1].shape == (7, 4, 4, 9)
    assert_same(ours(x, hx, **arguments), expected, [x, *tensors(hx), *tensors(state), *ours.parameters()])


@each_name
def test_unbatched_and_broadcast(name: str) -> None:
    _, ours = pair(name, 4, 9, num_layers=2)
    x, resets = torch.randn(6, 4, dtype=torch.float64), torch.rand(6) < 0.5
    learned = draw_state(ours, 1)
    one = ours(x, resets=resets, reset_state=_squeezed(learned), return_state_sequence=True)
    many = ours(x.unsqueeze(1).expand(6, 3, 4), resets=resets.unsqueeze(1).expand(6, 3), reset_state=learned)
    torch.testing.assert_close(one[0], many[0][:, 1])
    assert tensors(one[2])[0].shape == (6, 2, 9)


def _squeezed(state: Any) -> Any:
    return tuple(s.squeeze(1) for s in state) if isinstance(state, tuple) else state.squeeze(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@each_name
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    _, exact = pair(name, 8, 33)
    _, ours = pair(name, 8, 33, dtype=dtype)
    exact.load_state_dict(ours.state_dict())
    x, resets = torch.randn(9, 5, 8).to(dtype), torch.rand(9, 5) < 0.2
    arguments = dict(resets=resets, lengths=torch.tensor([9, 2, 4, 9, 1]))
    y, _ = ours(x, **arguments)
    assert y.dtype is dtype
    error = (y.double() - exact(x.double(), **arguments)[0]).abs().max()
    assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("cell", reference.CELLS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 4])], ids=["whole", "ragged"])
def test_gradcheck(cell: str, D: int, lengths: Tensor | None) -> None:
    """First and second derivatives of a layer, also by its reset states."""
    torch.manual_seed(3)
    T, B, size, H, G = 4, 2, 2, 3, reference.GATES[cell]

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).requires_grad_()

    has_c = cell == "lstm"
    states = [tensor(D, B, H), tensor(D, B, H) if has_c else None]
    resets = torch.tensor([[False, True], [True, False], [False, False], [True, True]])
    fresh = [tensor(T, D, B, H), tensor(T, D, B, H) if has_c else None]
    weights = [w for _ in range(D) for w in (tensor(G * H, size), tensor(G * H, H), tensor(G * H), tensor(G * H), None)]
    inputs = [tensor(T, B, size), *states, *weights, *fresh]
    present = [t for t in inputs if t is not None]

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        left = iter(given)
        x, h0, c0, *rest = (None if t is None else next(left) for t in inputs)
        options = LayerOptions(resets=resets, lengths=lengths, reset_h=rest[-2], reset_c=rest[-1], c_sequence=has_c)
        outputs = layers.layer(cell, x, h0, c0, rest[:-2], options)
        return tuple(o for o in outputs if o is not None)

    assert torch.autograd.gradcheck(call, present, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, present, fast_mode=True)


def test_threads_and_sizes_agree() -> None:
    """All ways of splitting the work agree, with resets in any row."""
    threads = torch.get_num_threads()
    try:
        for name, B, H in itertools.product(NAMES, (1, 2, 33), (20, 130)):
            _, ours = pair(name, 16, H, dtype=torch.float32, bidirectional=True)
            x, resets = torch.randn(12, B, 16), torch.rand(12, B) < 0.2
            found = []
            for n in (1, 2):
                torch.set_num_threads(n)
                found.append([t.detach() for t in tensors(ours(x, resets=resets))])
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(threads)


def test_a_transform_falls_back() -> None:
    """Under a transform, plain torch computes the same."""
    _, ours = pair("GRU", 4, 9, dtype=torch.float32)
    x, resets = torch.randn(6, 3, 4), torch.rand(6, 3) < 0.3
    expected, _ = ours(x, resets=resets)
    mapped = torch.func.vmap(lambda rows: ours(rows, resets=resets)[0])(x.unsqueeze(0))
    torch.testing.assert_close(mapped[0], expected)


BAD = [
    (dict(resets=torch.zeros(6, 3)), ValueError, "resets to be a bool tensor, got a torch.float32 tensor"),
    (dict(resets=[True]), ValueError, "resets to be a bool tensor, got list"),
    (dict(resets=torch.zeros(3, 6, dtype=torch.bool)), RuntimeError, r"resets of shape \[6, 3\], got \[3, 6\]"),
    (dict(reset_state=torch.zeros(1, 3, 9)), ValueError, "reset_state needs resets"),
    (dict(resets=torch.zeros(6, 3, dtype=torch.bool), reset_state=torch.zeros(1, 3, 8)), RuntimeError, "reset_state"),
    (dict(lengths=torch.tensor([1.0, 2, 3])), ValueError, "lengths to be an int32 or int64"),
    (dict(lengths=torch.tensor([1, 2])), RuntimeError, r"lengths of shape \[3\], got \[2\]"),
    (dict(lengths=torch.tensor([1, 2, 7])), ValueError, "between 0 and 6, got 1 to 7"),
    (dict(lengths=torch.tensor([-1, 2, 6])), ValueError, "between 0 and 6, got -1 to 6"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    _, ours = pair("GRU", 4, 9, dtype=torch.float32)
    with pytest.raises(error, match=text):
        ours(torch.randn(6, 3, 4), **arguments)


def test_a_state_of_resets_without_dimensions() -> None:
    _, ours = pair("GRU", 4, 9, dtype=torch.float32)
    for x in (torch.randn(6, 3, 4), torch.randn(6, 4)):
        with pytest.raises(RuntimeError, match=r"Expected reset_state of shape .*, got \[\]"):
            ours(x, resets=torch.zeros(x.shape[:-1], dtype=torch.bool), reset_state=torch.zeros(()))


def test_what_does_not_go_together() -> None:
    _, ours = pair("GRU", 4, 9, dtype=torch.float32)
    packed = pack_padded_sequence(torch.randn(6, 3, 4), torch.tensor([6, 4, 1]))
    resets = torch.zeros(6, 3, dtype=torch.bool)
    for wrong, text in (
        (resets, "expected resets to be a PackedSequence as input is, got a torch.bool tensor"),
        (pack_padded_sequence(resets, torch.tensor([6, 4, 2])), "packed as input is, in the same order"),
        (pack_padded_sequence(resets, torch.tensor([6, 4, 1]), enforce_sorted=False), "in the same order"),
        (pack_padded_sequence(resets.int(), torch.tensor([6, 4, 1])), "bool tensor, got a torch.int32 tensor"),
    ):
        with pytest.raises(ValueError, match=text):
            ours(packed, resets=wrong)
    with pytest.raises(RuntimeError, match=r"resets of shape \[11\], got \[11, 1\]"):
        ours(packed, resets=pack_padded_sequence(resets.unsqueeze(2), torch.tensor([6, 4, 1])))
    with pytest.raises(ValueError, match="got a PackedSequence"):
        ours(packed, lengths=torch.tensor([6, 4, 1]))
    with pytest.raises(ValueError, match="got unbatched input"):
        ours(torch.randn(6, 4), lengths=torch.tensor([6]))
    with pytest.raises(RuntimeError, match="input"):
        ours(torch.randn(6, 3, 5), resets=torch.zeros(6, 3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="Expected hidden"):
        ours(torch.randn(6, 3, 4), torch.zeros(1, 3, 8), resets=torch.zeros(6, 3, dtype=torch.bool))


@pytest.mark.parametrize("batch_first", [False, True])
@each_name
def test_a_rollout_of_steps_is_the_sequence(name: str, batch_first: bool) -> None:
    _, ours = pair(name, 4, 9, num_layers=2, batch_first=batch_first)
    x, resets = torch.randn(6, 3, 4, dtype=torch.float64), torch.rand(6, 3) < 0.4
    learned = draw_state(ours, 1, requires_grad=False)
    for reset_state in (None, learned):
        hx, outputs = None, []
        for t in range(6):
            y, hx = ours.step(x[t], hx, resets=resets[t], reset_state=reset_state)
            outputs.append(y)
        data, cuts = (x.transpose(0, 1), resets.T) if batch_first else (x, resets)
        expected, final = ours(data, resets=cuts, reset_state=reset_state)
        actual = torch.stack(outputs, 1 if batch_first else 0)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        for a, e in zip(tensors(hx), tensors(final), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    one, _ = ours.step(x[0, 0], _squeezed(learned), resets=torch.tensor(True))
    torch.testing.assert_close(one, ours.step(x[0, 0])[0])
    with pytest.raises(RuntimeError, match="resets of shape"):
        ours.step(x[0], resets=torch.zeros(2, dtype=torch.bool))


@each_name
def test_weights_are_those_of_the_moment(name: str) -> None:
    """Weights that were swapped since the last call are used."""
    _, ours = pair(name, 4, 9)
    x, resets = torch.randn(6, 3, 4, dtype=torch.float64), torch.zeros(6, 3, dtype=torch.bool)
    ours(x, resets=resets)
    others = {key: torch.randn_like(p).requires_grad_() for key, p in ours.named_parameters()}
    call = torch.func.functional_call
    found = call(ours, others, (x,), {"resets": resets})[0]
    torch.testing.assert_close(found, call(ours, others, (x,))[0])
    assert all(g.any() for g in torch.autograd.grad(found.sum(), list(others.values())))


@pytest.mark.parametrize("changed", ["resets", "lengths"])
def test_changed_before_backward(changed: str) -> None:
    _, ours = pair("GRU", 4, 9)
    arguments = dict(resets=torch.rand(6, 3) < 0.5, lengths=torch.tensor([2, 6, 4]))
    y, _ = ours(torch.randn(6, 3, 4, dtype=torch.float64), **arguments)
    arguments[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_states_at_resets_of_any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single step with a state per step; h for all steps with c per step, and the reverse."""
    _, ours = pair("LSTM", 4, 9)
    for T, steps_h, steps_c in ((1, [1], [1]), (5, [], [5]), (5, [5], [])):
        x = torch.randn(T, 3, 4, dtype=torch.float64, requires_grad=True)
        fresh = (draw_state(ours, 3, *steps_h)[0], draw_state(ours, 3, *steps_c)[1])
        arguments = dict(resets=torch.rand(T, 3) < 0.7, reset_state=fresh)
        expected = of_reference(ours, x, **arguments, monkeypatch=monkeypatch)
        assert_same(ours(x, **arguments), expected, [x, *fresh, *ours.parameters()])


def test_backend_torch_runs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = fused_rnn.GRU(4, 9, backend="torch")
    monkeypatch.setattr(operators, "forward_operator", None)
    ours(torch.randn(6, 3, 4), resets=torch.zeros(6, 3, dtype=torch.bool))


def test_what_lies_behind_a_rows_end_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair("GRU", 4, 9)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    x[4:, 0] = torch.nan
    arguments, inputs = dict(lengths=torch.tensor([4, 6, 6])), [x.requires_grad_(), *ours.parameters()]
    for y, _ in (ours(x, **arguments), of_reference(ours, x, **arguments, monkeypatch=monkeypatch)):
        found = torch.autograd.grad(y.pow(2).sum(), inputs, create_graph=True)
        found += torch.autograd.grad(sum(g.pow(2).sum() for g in found), inputs)
        assert all(g.isfinite().all() for g in found) and not found[0][4:, 0].any()


@each_name
def test_the_kernels_take_every_combination(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "layer", None)
    _, ours = pair(name, 4, 9, bidirectional=True)
    x, resets = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True), torch.rand(6, 3) < 0.4
    for lengths, steps in itertools.product((None, [0, 0, 0], [2, 6, 0]), ([], [6])):
        arguments = dict(resets=resets, reset_state=draw_state(ours, 3, *steps), return_state_sequence=True)
        y, *_ = ours(x, **arguments, lengths=None if lengths is None else torch.tensor(lengths))
        y.sum().backward()


@pytest.mark.parametrize("state", [0.0, torch.zeros(1, 3, 9).double(), (torch.zeros(1, 3, 9),) * 2])
def test_bad_reset_states(state: Any) -> None:
    _, ours = pair("GRU", 4, 9, dtype=torch.float32)
    with pytest.raises((TypeError, ValueError), match="expected reset_state"):
        ours(torch.randn(6, 3, 4), resets=torch.zeros(6, 3, dtype=torch.bool), reset_state=state)
