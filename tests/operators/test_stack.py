"""All layers of a module, or a cell, in one call without torch's dispatcher, and in one node of the graph.

That damaged arguments do no harm is tested in test_fuzz.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn import _C, autograd, layers, operators, policy, reference
from fused_rnn.operators import BATCH_FIRST, STEP, TIME_FIRST, UNBATCHED
from fused_rnn.options import LayerOptions

CELLS = list(reference.CELLS)
NAMES = (
    "x", "h0", "c0", "weights", "cell", "layers", "directions", "has_biases", "projected", "layout", "resets",
    "lengths", "deterministic", "train",
)  # fmt: skip
ROWS: tuple[dict[str, Any], ...] = (
    {"resets": True}, {"lengths": True}, {"resets": True, "lengths": True, "D": 2}, {"T": 0, "resets": True},
    {"resets": True, "lengths": True, "P": 3, "count": 1},
)  # fmt: skip


def stack(**arguments: Any) -> Any:
    return _C.stack(*[arguments[name] for name in NAMES])


def stack_arguments(
    cell: str,
    *,
    count: int = 2,
    D: int = 1,
    biases: bool = True,
    P: int = 0,
    T: int = 3,
    layout: int = TIME_FIRST,
    resets: bool = False,
    lengths: bool = False,
    dtype: Any = torch.float32,
) -> dict[str, Any]:
    """Arguments of a valid call; T = 0 is a single step."""
    layout = layout if T else STEP
    torch.manual_seed(0)
    B, H, G, lstm = 3, 5, reference.GATES[cell], cell == "lstm"
    weights = []
    for size in [4, *[D * (P or H)] * (count - 1)]:
        shapes = [(G * H, size), (G * H, P or H), *[(G * H,)] * 2 * biases, *[(P, H)] * (P > 0)]
        weights += [torch.randn(shape, dtype=dtype) for _ in range(D) for shape in shapes]
    shapes = (T, B, 4) if T else (B, 4), (count * D, B, P or H), (count * D, B, H)
    x, h0, c0 = (torch.randn(shape, dtype=dtype) for shape in shapes)
    begins = torch.tensor([[True, False, True], [False, True, False], [False, False, True]]) if resets else None
    begins = begins if T or begins is None else begins[0]
    ends = torch.tensor([2, 0, 3], dtype=torch.int32) if lengths else None
    if layout == BATCH_FIRST:
        x, begins = x.transpose(0, 1).contiguous(), None if begins is None else begins.t()
    elif layout == UNBATCHED:
        x, h0, c0, begins = x[:, 0], h0[:, 0], c0[:, 0], None if begins is None else begins[:, 0]
    of_rows = layout, begins, ends, False, False
    values = (x, h0, c0 if lstm else None, weights, CELLS.index(cell), count, D, biases, P > 0, *of_rows)
    return dict(zip(NAMES, values, strict=True))


def options_of(arguments: dict[str, Any]) -> LayerOptions:
    """Of every layer, over a sequence."""
    return autograd._options(arguments["resets"], arguments["lengths"], arguments["layout"])


def in_one_call(
    cell: str,
    x: Any,
    h0: Any,
    c0: Any,
    weights: Any,
    has_biases: bool,
    count: int,
    D: int,
    resets: Any = None,
    lengths: Any = None,
) -> list[Tensor] | None:
    projected = len(weights) > count * D * (4 if has_biases else 2)
    layout = STEP if x.dim() == 2 else TIME_FIRST
    call = CELLS.index(cell), count, D, has_biases, projected, layout, resets, lengths
    results = operators.in_one_call(x, h0, c0, weights, *call)
    return None if results is None else list(results[: 3 if cell == "lstm" else 2])


def with_cells(*changes: dict[str, Any]) -> pytest.MarkDecorator:
    """Every cell with every change of `stack_arguments`; only the LSTM has a projection."""
    pairs = [(cell, change) for cell in CELLS for change in changes if cell == "lstm" or "P" not in change]
    return pytest.mark.parametrize(("cell", "changes"), pairs)


@with_cells({}, {"D": 2}, {"count": 1}, {"biases": False, "D": 2}, {"T": 0}, {"P": 3, "D": 2}, *ROWS)
@pytest.mark.parametrize("states", [True, False])
def test_all_layers_in_one_call_are_layers_in_turn(cell: str, states: bool, changes: dict[str, int]) -> None:
    for dtype in policy.DTYPES:
        a = stack_arguments(cell, dtype=dtype, **changes)
        if not states:
            a |= dict(h0=None, c0=None)
        y, h, c, *_ = stack(**a)
        x, of_h, of_c = a["x"] if a["x"].dim() == 3 else a["x"].unsqueeze(0), [], []
        for index in range(a["layers"]):
            of_layer = reference.layer_weights(a["weights"], index, a["layers"], a["directions"], a["has_biases"])
            rows = slice(index * a["directions"], (index + 1) * a["directions"])
            h0, c0 = (None if a[name] is None else a[name][rows] for name in ("h0", "c0"))
            x, h_n, c_n, _, _ = operators.forward(cell, x, h0, c0, of_layer, options_of(a), False)
            of_h.append(h_n)
            of_c.append(c_n)
        assert torch.equal(y, x.view_as(y)) and torch.equal(h, torch.cat(of_h))
        assert c is None if cell != "lstm" else torch.equal(c, torch.cat(of_c))


@pytest.mark.parametrize("frozen", ["nothing", "the first layer", "all but the states"])
@pytest.mark.parametrize("needs_x", [True, False])
@with_cells(
    {}, {"D": 2}, {"count": 3, "biases": False}, {"P": 3, "D": 2}, {"count": 1}, {"T": 0}, {"T": 0, "P": 3}, *ROWS
)
def test_all_layers_in_one_node_are_layers_in_turn(
    cell: str, changes: dict[str, Any], needs_x: bool, frozen: str
) -> None:
    a = stack_arguments(cell, **changes)
    each = len(a["weights"]) // a["layers"]
    kept = {"nothing": 0, "the first layer": each, "all but the states": len(a["weights"])}[frozen]
    states = [s for s in (a["h0"], a["c0"]) if s is not None and frozen != "the first layer"]
    wanted = [*[a["x"]] * needs_x, *states, *a["weights"][kept:]]
    for tensor in wanted:
        tensor.requires_grad_()
    call = a["h0"], a["c0"], a["weights"], a["has_biases"], a["layers"], a["directions"]

    def everything(y: Tensor, *finals: Tensor) -> list[Tensor]:
        outputs = [y, *finals] if frozen != "nothing" else [y]
        losses = [o.square().sum() for o in outputs]
        return [*outputs, *torch.autograd.grad(sum(losses), wanted, allow_unused=True)]

    of_rows = a["resets"], a["lengths"]
    found = in_one_call(cell, a["x"], *call, *of_rows)
    if not wanted:
        assert not found[0].requires_grad
        return
    if found is None:  # the lowest layer stays out of the node
        assert frozen == "the first layer" and not needs_x
        return
    assert type(found[0].grad_fn).__name__ == "_StackBackward"
    sequence = a["x"] if a["x"].dim() == 3 else a["x"].unsqueeze(0)
    y, *finals = reference.stack(cell, sequence, *call, options=options_of(a), run=layers.layer)
    assert a["layers"] == 1 or type(y.grad_fn.next_functions[0][0]).__name__ == "_LayerBackward"
    expected = everything(y.view_as(found[0]), *finals)
    assert all(map(torch.equal, everything(*found), expected))

    unwatched = in_one_call(cell, a["x"], *call, *of_rows)
    with profile() as watching:  # which sees every layer's operator
        found = everything(*unwatched)
    assert all(map(torch.equal, found, expected))
    assert 1 <= [event.name for event in watching.events()].count("fused_rnn::backward") <= a["layers"]
    with profile() as watching:
        watched = in_one_call(cell, a["x"], *call, *of_rows)
    assert all(map(torch.equal, everything(*watched), expected))
    assert [event.name for event in watching.events()].count("fused_rnn::forward") == a["layers"]


def cell_call(cell: str, *tensors: Tensor) -> list[Tensor]:
    """h' and, for the LSTM, c' of a cell in training, from x, the states and the weights."""
    x, h0, *rest = tensors
    c0, weights = (rest[0], rest[1:]) if cell == "lstm" else (None, rest)
    h, *_, c = layers.step(cell, x, h0, c0, (*(*weights, None, None)[:4], None))
    return [h, c] if cell == "lstm" else [h]


def cell_tensors(cell: str, biases: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    a = stack_arguments(cell, count=1, biases=biases, T=0, dtype=dtype)
    states = [s[0] for s in (a["h0"], a["c0"]) if s is not None]
    return [t.mul_(0.5).requires_grad_() for t in (a["x"], *states, *a["weights"])]


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_in_one_call_is_a_layer(cell: str, biases: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = cell_tensors(cell, biases)

    def everything(watched: tuple[bool, bool] = (False, False)) -> tuple[str, list[Tensor]]:
        with profile() if watched[0] else nullcontext():
            outputs = cell_call(cell, *tensors)
        loss = sum(o.square().sum() for o in outputs)
        with profile() if watched[1] else nullcontext():
            gradients = torch.autograd.grad(loss, tensors)
        return type(outputs[0].grad_fn).__name__, [*outputs, *gradients]

    node, found = everything()
    _, backward_in_turn = everything(watched=(False, True))
    _, in_turn = everything(watched=(True, True))
    monkeypatch.setattr(layers, "step", layers.layer)
    other_node, expected = everything()
    assert (node, other_node) == ("_StackBackward", "_LayerBackward")
    for results in (found, backward_in_turn, in_turn):
        assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives_of_a_cell_in_one_call(cell: str) -> None:
    tensors = cell_tensors(cell, biases=True, dtype=torch.float64)
    assert type(cell_call(cell, *tensors)[0].grad_fn).__name__ == "_StackBackward"
    assert torch.autograd.gradcheck(lambda *given: tuple(cell_call(cell, *given)), tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *given: tuple(cell_call(cell, *given)), tensors, fast_mode=True)


@pytest.mark.parametrize(
    "changes",
    [{}, {"D": 2}, {"count": 1}, {"biases": False}, {"T": 0}, {"P": 3}, *ROWS],
    ids=lambda changes: str(changes),
)
def test_second_derivatives_of_all_layers_in_one_node(changes: dict[str, Any]) -> None:
    a = stack_arguments("lstm", dtype=torch.float64, **changes)
    tensors = [a["x"], a["h0"], a["c0"], *a["weights"]]

    def call(x: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> Any:
        call = weights, a["has_biases"], a["layers"], a["directions"], a["resets"], a["lengths"]
        return tuple(in_one_call("lstm", x, h0, c0, *call))

    for t in tensors:
        t.mul_(0.3).requires_grad_()
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@with_cells(
    *[dict(layout=layout, D=2, resets=resets) for layout in (BATCH_FIRST, UNBATCHED) for resets in (True, False)]
)
def test_layouts_are_views(cell: str, changes: dict[str, Any]) -> None:
    """The node of a sequence that is laid out in another way, however backward is computed."""
    a = stack_arguments(cell, **changes)
    inputs = [a[name] for name in ("x", "h0", "c0") if a[name] is not None] + a["weights"]
    for t in inputs:
        t.mul_(0.3).requires_grad_()
    names = ("cell", "layers", "directions", "has_biases", "projected", "layout", "resets", "lengths")
    turn = {BATCH_FIRST: lambda t: t.transpose(0, 1), UNBATCHED: lambda t: t.unsqueeze(1)}[a["layout"]]
    of_states = turn if a["layout"] == UNBATCHED else lambda t: t

    def outputs(time_first: bool) -> list[Tensor]:
        if not time_first:
            results = autograd.stack(tuple(a[name] for name in names), a["x"], a["h0"], a["c0"], *a["weights"])
            return [t for t in results if t is not None]
        h0, c0 = (None if a[name] is None else of_states(a[name]) for name in ("h0", "c0"))
        sizes = a["has_biases"], a["layers"], a["directions"]
        resets = None if a["resets"] is None else turn(a["resets"])
        y, *states = in_one_call(cell, turn(a["x"]), h0, c0, a["weights"], *sizes, resets)
        if a["layout"] == UNBATCHED:
            return [t.squeeze(1) for t in (y, *states)]
        return [y.transpose(0, 1), *states]

    def gradients(results: list[Tensor], **again: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum(t.square().sum() for t in results), inputs, **again)

    expected = outputs(time_first=True)
    of_expected = gradients(expected, create_graph=True)
    for watched in ((False, False), (True, False), (False, True)):
        with profile() if watched[0] else nullcontext():
            found = outputs(time_first=False)
        assert not any(t._is_view() for t in found) and all(map(torch.equal, found, expected))
        with profile() if watched[1] else nullcontext():
            of_found = gradients([t.mul_(1.0) for t in found])  # in place, as behind a torch.nn module
        torch.testing.assert_close(of_found, of_expected)
    of_found = gradients(outputs(time_first=False), create_graph=True)
    again = [torch.autograd.grad(sum(g.square().sum() for g in first), inputs) for first in (of_found, of_expected)]
    torch.testing.assert_close(*again)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_batched_gradients_run_the_operator_row_by_row(name: str, num_layers: int) -> None:
    module, x = getattr(fused_rnn, name)(4, 5, num_layers=num_layers), torch.randn(3, 2, 4)
    y, weights = module(x)[0], list(module.parameters())
    dy = torch.randn(6, *y.shape)
    with profile() as watching:
        batched = torch.autograd.grad(y, weights, dy, is_grads_batched=True, retain_graph=True)
    assert [event.name for event in watching.events()].count("fused_rnn::backward") >= 6 * num_layers
    one_by_one = zip(*[torch.autograd.grad(y, weights, d, retain_graph=True) for d in dy], strict=True)
    for found, expected in zip(batched, one_by_one, strict=True):
        assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize("keyword", ["resets", "lengths"])
def test_batched_gradients_with_options_are_the_specifications(keyword: str) -> None:
    module, x = fused_rnn.GRU(4, 5), torch.randn(3, 2, 4)
    of_rows = {"resets": torch.tensor([[True, False], [False, True], [False, False]]), "lengths": torch.tensor([3, 1])}
    y, weights = module(x, **{keyword: of_rows[keyword]})[0], list(module.parameters())
    dy = torch.randn(6, *y.shape)
    batched = torch.autograd.grad(y, weights, dy, is_grads_batched=True, retain_graph=True)
    one_by_one = zip(*[torch.autograd.grad(y, weights, d, retain_graph=True) for d in dy], strict=True)
    for found, expected in zip(batched, one_by_one, strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("call", ["forward", "step", "cell"])
def test_a_profiler_around_backward_alone_and_checkpoints(call: str) -> None:
    """What is computed again keeps the same tensors, whoever watches."""
    gru, cell, x = fused_rnn.GRU(3, 4, num_layers=2), fused_rnn.GRUCell(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    run = {"forward": lambda x: gru(x)[0], "step": lambda x: gru.step(x[0])[0], "cell": lambda x: cell(x[0])}[call]
    gradients = []
    for watching in (nullcontext(), profile()):
        loss = checkpoint(lambda x: run(x).square().sum(), x, use_reentrant=False)
        with watching:
            gradients.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_inference_tensors_meet_frozen_weights(name: str) -> None:
    """As in torch.nn: no derivative reads x."""
    module, cell = getattr(fused_rnn, name)(3, 4), getattr(fused_rnn, f"{name}Cell")(3, 4)
    module.weight_ih_l0.requires_grad_(False), cell.weight_ih.requires_grad_(False)
    with torch.inference_mode():
        x = torch.randn(5, 2, 3)
    for y in (module(x)[0], module.step(x[0])[0], cell(x[0])):
        (y[0] if isinstance(y, tuple) else y).sum().backward()
    assert module.weight_hh_l0.grad.abs().sum() > 0 and cell.weight_hh.grad is not None


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_layers_below_the_first_gradient_are_left_out(name: str) -> None:
    """They keep nothing for backward, and their tensors may change before it."""
    module = getattr(fused_rnn, name)(4, 5, num_layers=2)
    for parameter, weight in module.named_parameters():
        weight.requires_grad_(not parameter.endswith("l0"))
    with torch.inference_mode():
        x = torch.randn(3, 2, 4)
    y = module(x)[0]
    with torch.no_grad():
        module.weight_hh_l0.mul_(0.5)
        module.weight_ih_l1.mul_(0.5)
    y.sum().backward()
    assert module.weight_ih_l0.grad is None and module.weight_ih_l1.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "change",
    [
        dict(layers=3),
        dict(layers=0),
        dict(layers=-2),
        dict(layers=2**62),
        dict(layers=None),
        dict(directions=0),
        dict(directions=2),
        dict(layers=1, directions=2),
        dict(weights=[]),
        dict(weights=None),
        dict(weights=[1.0] * 8),
        dict(weights=[torch.randn(s) for s in ((20, 4), (20, 5), 20, 20, (12, 5), (12, 3), 12, 12)]),
        dict(weights=[torch.randn(())] * 8),
        dict(weights=[torch.randn(0, 0)] * 8),
        dict(projected=True),
        dict(has_biases=False),
        dict(x=None),
        dict(x=torch.randn(4)),
        dict(x=torch.randn(0, 3, 4)),
        dict(x=torch.randn(3, 3, 4).half()),
        dict(x=torch.randn(3, 3, 6)),
        dict(x=torch.randn(3, 5), train=True),
        dict(x=torch.randn(3, 4)),
        dict(layout=4),
        dict(layout=-1),
        dict(layout=2**40),
        dict(layout=None),
        dict(layout=STEP),
        dict(layout=UNBATCHED),
        dict(layout=UNBATCHED, x=torch.randn(3, 4)),
        dict(layout=BATCH_FIRST, x=torch.randn(2, 3, 4)),
        dict(layout=BATCH_FIRST, x=torch.randn(3, 4)),
        dict(layout=BATCH_FIRST, resets=torch.zeros(3, dtype=torch.bool)),
        dict(x=torch.randn(3, 4), layout=STEP, layers=0),
        dict(layers=0, weights=[torch.randn(s) for s in ((20, 4), (20, 5), 20, 20)]),
        dict(train=None),
        dict(x=torch.randn(3, 3, 4).as_subclass(type("Mine", (Tensor,), {}))),
        dict(h0=torch.randn(1, 3, 5)),
        dict(h0=torch.randn(2, 3, 5).to("meta")),
        dict(c0=torch.randn(2, 3, 4)),
        dict(cell=7),
        dict(cell=3),
        dict(cell="lstm"),
        dict(resets=torch.zeros(3, 3)),
        dict(resets=torch.zeros(3, 2, dtype=torch.bool)),
        dict(resets=torch.zeros(3, dtype=torch.bool)),
        dict(resets=[True]),
        dict(resets=torch.zeros(3, 3, dtype=torch.bool), x=torch.randn(3, 4), layout=STEP),
        dict(lengths=torch.tensor([1, 2, 4])),
        dict(lengths=torch.tensor([1, 2, -1])),
        dict(lengths=torch.tensor([1, 2])),
        dict(lengths=torch.tensor([1.0, 2.0, 3.0])),
        dict(lengths=torch.tensor([1, 1, 1]), x=torch.randn(3, 4), layout=STEP),
        dict(lengths=torch.tensor([1, 2, 3]).to("meta")),
    ],
    ids=range(54),
)
def test_what_does_not_fit_is_left_to_the_layers(change: dict[str, Any]) -> None:
    a = stack_arguments("lstm")
    before = [t.clone() for t in (a["x"], a["h0"], a["c0"], *a["weights"])]
    assert stack(**a | change) is None
    assert all(map(torch.equal, before, (a["x"], a["h0"], a["c0"], *a["weights"])))


@pytest.mark.parametrize(
    "change",
    [
        dict(layers=3),
        dict(layers=0),
        dict(layers=2**62),
        dict(directions=2),
        dict(directions=0),
        dict(cell=2**40),
        dict(cell=3),
        dict(needs=(True,) * 12),
        dict(needs=[]),
        dict(needs=None),
        dict(needs=[1.0] * 11),
        dict(weights=[None] * 8),
        dict(weights=[]),
        dict(weights=[torch.randn(0, 0)] * 8),
        dict(weights=[torch.randn(())] * 8),
        dict(has_biases=False),
        dict(projected=True),
        dict(x=torch.randn(3, 4)),
        dict(x=torch.randn(4)),
        dict(x=torch.randn(4, 3, 4)),
        dict(x=torch.randn(1, 1, 1).expand(2**62, 0, 4)),
        dict(x=None),
        dict(x=torch.randn(3, 4), dy=torch.randn(3, 5), dh_n=None, dc_n=torch.randn(3, 5), layers=0, layout=STEP),
        dict(layout=4),
        dict(layout=None),
        dict(layout=STEP),
        dict(layout=UNBATCHED),
        dict(layout=UNBATCHED, x=torch.randn(3, 4), dy=torch.randn(3, 5)),
        dict(dy=torch.randn(3, 3, 4)),
        dict(dy=torch.randn(3, 5)),
        dict(dh_n=torch.randn(1, 3, 5)),
        dict(dh_n=torch.randn(5)),
        dict(dc_n=torch.randn(2, 3, 6)),
        dict(between=None),
        dict(between=torch.randn(6, 3, 5)),
        dict(between=torch.randn(3, 3, 6)),
        dict(between=torch.randn(())),
        dict(between=torch.randn(3, 3, 5).double()),
        dict(reserve=torch.randn(2, 9, 2)),
        dict(reserve=torch.randn(1, 9, 30)),
        dict(reserve=torch.randn(0)),
        dict(reserve=None),
        dict(resets=torch.zeros(3, 2, dtype=torch.bool)),
        dict(resets=torch.zeros(3, 3)),
        dict(lengths=torch.tensor([1, 2, 3])),  # the reserve is of all rows
        dict(lengths=torch.tensor([1, 2, 4])),
        dict(lengths=torch.tensor([3.0, 3.0, 3.0])),
    ],
    ids=range(47),
)
def test_what_does_not_fit_backward_is_left_to_the_layers(change: dict[str, Any]) -> None:
    a = stack_arguments("lstm") | dict(train=True)
    y, h_n, c_n, between, reserve = stack(**a)
    backward = dict(
        dy=y, dh_n=h_n, dc_n=c_n, x=a["x"], between=between, reserve=reserve, weights=a["weights"], cell=a["cell"],
        layers=2, directions=1, has_biases=True, projected=False, layout=TIME_FIRST, resets=None, lengths=None,
        needs=(True,) * 11,
    )  # fmt: skip
    assert len(_C.stack_backward(*backward.values())) == 11
    assert _C.stack_backward(*(backward | change).values()) is None


@pytest.mark.parametrize("name", ["h0", "c0"])
@pytest.mark.parametrize("count", [1, 2])
def test_states_of_other_numbers_of_layers_are_refused(count: int, name: str) -> None:
    """No layer takes a part of them."""
    a = stack_arguments("lstm", count=count)
    a["weights"][0].requires_grad_()
    for rows in (0, count + 1, 2 * count):
        a[name] = torch.randn(rows, *a[name].shape[1:])
        with pytest.raises((RuntimeError, IndexError)):
            in_one_call("lstm", a["x"], a["h0"], a["c0"], a["weights"], True, count, 1)


def test_layers_of_different_widths_are_refused() -> None:
    """Their rows may be as long as those that forward kept."""

    def weights(H: int, size: int, P: int) -> list[Tensor]:
        return [torch.randn(4 * H, size), torch.randn(4 * H, P), torch.randn(P, H)]

    (H0, P0), (H1, P1), B = (1, 62), (11, 2), 3
    assert 6 * H0 + P0 == 6 * H1 + P1 == 68
    given = torch.randn(1, B, P1), None, None, torch.randn(1, B, 1), torch.randn(1, B, P0), torch.randn(2, B, 68)
    sizes = CELLS.index("lstm"), 2, 1
    of_layers = weights(H0, 1, P0) + weights(H1, P0, P1)
    assert _C.stack_backward(*given, of_layers, *sizes, False, True, TIME_FIRST, None, None, (True,) * 9) is None


def test_other_numbers_of_arguments_are_refused() -> None:
    arguments = [stack_arguments("gru")[name] for name in NAMES]
    for given in ([], arguments[:5], [*arguments, None], [None] * 40):
        assert _C.stack(*given) is None and _C.stack_backward(*given) is None
        for function in (_C.forward, _C.backward, _C.step):
            with pytest.raises((RuntimeError, TypeError)):
                function(*given)
        assert _C.in_one_call(*given) is None
