"""The operators called directly: schemas, fake kernels, and hostile arguments, which must raise without any write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_rnn import reference
from operator_calls import WAYS, by_name, folded

CELLS = list(reference.CELLS)
forward, backward = by_name(torch.ops.fused_rnn.forward), by_name(torch.ops.fused_rnn.backward)


def forward_arguments(
    cell: str, kind: str = "padded", D: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Arguments of a valid call of torch.ops.fused_rnn.forward."""
    torch.manual_seed(0)
    T, B, size, H = 3, 2, 4, 5
    P = 3 if kind == "projected" else H
    G = reference.GATES[cell]
    x = {"step": (B, size), "packed": (5, size)}.get(kind, (T, B, size))
    state = (B,) if kind == "step" else (D, B)
    arguments: dict[str, Any] = dict(
        x=torch.randn(x, dtype=dtype),
        h0=torch.randn(*state, P, dtype=dtype),
        c0=torch.randn(*state, H, dtype=dtype) if cell == "lstm" else None,
    )
    for suffix in ("", "_reverse"):
        present = suffix == "" or D == 2
        shapes = dict(w_ih=(G * H, size), w_hh=(G * H, P), b_ih=(G * H,), b_hh=(G * H,), w_hr=(P, H))
        for name, shape in shapes.items():
            given = present and (name != "w_hr" or kind == "projected")
            arguments[name + suffix] = torch.randn(shape, dtype=dtype) if given else None
    arguments["batch_sizes"] = torch.tensor([2, 2, 1]) if kind == "packed" else None
    arguments["lengths"] = torch.tensor([1, 3]) if kind == "ragged" else None
    return arguments | dict(cell=CELLS.index(cell), train=True)


def backward_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a valid call of torch.ops.fused_rnn.backward after that forward."""
    y, h_n, c_n, reserve, _ = forward(**given)
    names = ["x", "w_ih", "w_hh", "w_hr", "w_ih_reverse", "w_hh_reverse", "w_hr_reverse", "batch_sizes"]
    names += ["lengths", "cell"]
    needs = ["dx", "dstate", "dw_ih", "dw_hh", "db", "dw_hr"]
    return dict(
        dy=torch.randn_like(y),
        dh_n=torch.randn_like(h_n) if h_n.numel() else None,
        dc_n=torch.randn_like(c_n) if c_n.numel() else None,
        reserve=reserve,
        **{name: given[name] for name in names},
        **{f"need_{need}": True for need in needs},
    )


KINDS = [("padded", 1), ("padded", 2), ("packed", 1), ("packed", 2), ("ragged", 1), ("ragged", 2), ("step", 1)]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("kind", "D"), KINDS)
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_forward(cell: str, kind: str, D: int, train: bool) -> None:
    arguments = forward_arguments(cell, kind, D) | dict(train=train)
    torch.library.opcheck(torch.ops.fused_rnn.forward.default, (), folded(arguments))


@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize(("kind", "D"), KINDS)
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_backward(cell: str, kind: str, D: int, needs: bool) -> None:
    arguments = backward_arguments(forward_arguments(cell, kind, D))
    arguments |= {name: needs for name in arguments if name.startswith("need_")}
    torch.library.opcheck(torch.ops.fused_rnn.backward.default, (), folded(arguments))


def test_opcheck_projection() -> None:
    arguments = forward_arguments("lstm", "projected", 2)
    torch.library.opcheck(torch.ops.fused_rnn.forward.default, (), folded(arguments))
    torch.library.opcheck(torch.ops.fused_rnn.backward.default, (), folded(backward_arguments(arguments)))


def _fails(op: Any, arguments: dict[str, Any], message: str) -> None:
    dense = {n: v for n, v in arguments.items() if isinstance(v, Tensor) and v.layout is torch.strided and v.is_cpu}
    before = {name: value.clone() for name, value in dense.items()}
    with pytest.raises((RuntimeError, NotImplementedError, TypeError, ValueError), match=message):
        op(**arguments)
    for name, value in before.items():
        assert torch.equal(arguments[name], value), f"{name} was written to"


HOSTILE_FORWARD = [
    (dict(x=torch.randn(3, 2, 7)), r"w_ih must have shape \[20, 7\], got \[20, 4\]"),
    (dict(x=torch.randn(4)), "x must be"),
    (dict(x=torch.randn(())), "x must be"),
    (dict(x=torch.randn(1, 3, 2, 4)), "x must be"),
    (dict(x=torch.randn(0, 2, 4)), "larger than 0"),
    (dict(x=torch.randn(3, 2, 4).half()), "h0 must have the dtype of x"),
    (dict(x=torch.zeros(3, 2, 4, dtype=torch.int64)), "float32, float64, bfloat16 or float16"),
    (dict(x=torch.randn(3, 2, 4).double()), "h0 must have the dtype of x"),
    (dict(x=torch.randn(3, 2, 4).to_sparse()), "."),
    (dict(x=torch.randn(3, 2, 4, dtype=torch.complex64)), "float32, float64, bfloat16 or float16"),
    (dict(h0=torch.randn(1, 1, 5)), r"h0 must have shape \[1, 2, 5\], got \[1, 1, 5\]"),
    (dict(h0=torch.randn(2, 5)), "h0 must have shape"),
    (dict(h0=torch.randn(1, 2, 5).double()), "h0 must have the dtype"),
    (dict(c0=torch.randn(1, 2, 4)), r"c0 must have shape \[1, 2, 5\]"),
    (dict(w_hh=torch.randn(20, 4)), "w_hh must have shape"),
    (dict(w_hh=torch.randn(19, 5)), "multiple of 4 rows"),
    (dict(w_hh=torch.randn(20)), "2 dimensions"),
    (dict(w_hh=torch.randn(0, 0)), "must have shape"),
    (dict(w_ih=torch.randn(20, 3)), "w_ih must have shape"),
    (dict(w_ih=torch.randn(20, 4).double()), "w_ih must have the dtype"),
    (dict(b_ih=torch.randn(19)), r"b_ih must have shape \[20\], got \[19\]"),
    (dict(b_hh=torch.randn(1)), "b_hh must have shape"),
    (dict(w_hr=torch.randn(3, 5)), "w_hr must have shape"),
    (dict(w_ih_reverse=torch.randn(20, 4)), "reverse direction needs w_ih and w_hh"),
    (dict(w_ih_reverse=torch.randn(20, 4), w_hh_reverse=torch.randn(20, 5)), r"h0 must have shape \[2, 2, 5\]"),
    (dict(batch_sizes=torch.tensor([2, 2, 1])), "x must be"),
    (dict(cell=4), r"unknown cell 4; the cells are: 0 \(rnn_tanh\), 1 \(rnn_relu\), 2 \(lstm\), 3 \(gru\)"),
    (dict(cell=-1), "unknown cell -1"),
    (dict(cell=2**40 + 2), "unknown cell"),
    (dict(cell=3), "multiple of 3 rows"),
    (dict(cell=0), "w_hh must have shape"),
    (dict(cell="lstm"), "."),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("change", "message"), HOSTILE_FORWARD, ids=range(len(HOSTILE_FORWARD)))
def test_hostile_forward(change: dict[str, Any], message: str, way: str) -> None:
    _fails(WAYS[way]("forward"), forward_arguments("lstm") | change, message)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (torch.tensor([2, 2, 2]), "6 is not 5"),
        (torch.tensor([1, 2, 2]), "not increase"),
        (torch.tensor([2, 2, 0, 1]), "positive"),
        (torch.tensor([5, -1, 1]), "positive"),
        (torch.tensor([2**62, 2**62, 2**62, 2**62]), "not increase"),
        (torch.tensor([], dtype=torch.int64), "must not be empty"),
        (torch.tensor([2, 2, 1], dtype=torch.int32), "1-D int64"),
        (torch.tensor([[2, 2, 1]]), "1-D int64"),
        (torch.tensor([2.0, 2.0, 1.0]), "1-D int64"),
    ],
)
def test_hostile_batch_sizes(sizes: Tensor, message: str) -> None:
    _fails(forward, forward_arguments("lstm", "packed") | dict(batch_sizes=sizes), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lengths=torch.tensor([1, 4])), "lengths must be between 0 and 3, got 4"),
        (dict(lengths=torch.tensor([-1, 3])), "lengths must be between 0 and 3, got -1"),
        (dict(lengths=torch.tensor([1, 2, 3])), r"lengths must have shape \[2\], got \[3\]"),
        (dict(lengths=torch.tensor([1.0, 2.0])), "lengths must be int32 or int64"),
        (dict(lengths=torch.tensor([True, False])), "lengths must be int32 or int64"),
        (dict(x=torch.randn(5, 4), batch_sizes=torch.tensor([2, 2, 1])), "lengths need x to be"),
        (dict(x=torch.randn(2, 4), h0=None, c0=None), "lengths need x to be"),
        (dict(resets=torch.zeros(4, dtype=torch.bool)), r"resets must have shape \[3, 2\], got \[4\]"),
    ],
)
def test_hostile_lengths(change: dict[str, Any], message: str) -> None:
    _fails(forward, forward_arguments("lstm", "ragged") | change, message)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(reserve=torch.randn(1, 6, 29)), r"reserve must have shape \[1, 6, 30\]"),
        (dict(reserve=torch.randn(0)), "reserve must have shape"),
        (dict(reserve=torch.randn(1, 6, 30).double()), "reserve must have the dtype"),
        (dict(dy=torch.randn(3, 2, 4)), "dy must have shape"),
        (dict(dh_n=torch.randn(2, 2, 5)), "dh_n must have shape"),
        (dict(dc_n=torch.randn(1, 2, 6)), "dc_n must have shape"),
        (dict(x=torch.randn(3, 3, 4)), "dy must have shape"),
        (dict(w_ih=torch.randn(20, 5)), "w_ih must have shape"),
    ],
)
def test_hostile_backward(change: dict[str, Any], message: str, way: str) -> None:
    _fails(WAYS[way]("backward"), backward_arguments(forward_arguments("lstm")) | change, message)


@pytest.mark.parametrize("cell", CELLS)
def test_any_strides(cell: str) -> None:
    """Non-contiguous and expanded tensors give the results of contiguous ones."""
    arguments = forward_arguments(cell)
    expected = forward(**arguments)
    strided = {
        name: value.repeat_interleave(2, -1)[..., ::2] if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    for a, b in zip(forward(**strided), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_needs_decide_what_is_computed(cell: str) -> None:
    """A gradient is None unless requested, and does not depend on which others are."""
    arguments = backward_arguments(forward_arguments(cell, D=2))
    needs = [name for name in arguments if name.startswith("need_")]
    everything = backward(**arguments)
    owner = ["need_dx", "need_dstate", "need_dstate"]
    owner += ["need_dw_ih", "need_dw_hh", "need_db", "need_db", "need_dw_hr"] * 2 + ["resets"] * 2 + ["norms"] * 2
    for need in needs:
        only = arguments | {name: name == need for name in needs}
        for whose, alone, together in zip(owner, backward(**only), everything, strict=True):
            if whose == need and together is not None:  # None without a projection
                assert torch.equal(alone, together)
            else:
                assert alone is None


def test_large_sizes_are_refused_not_attempted() -> None:
    """Expanded tensors can have any size: allocating the buffers must fail without an overflow."""
    one = torch.randn(1)
    arguments = forward_arguments("lstm") | dict(
        x=one.expand(2**30, 2**30, 4), h0=None, c0=None, w_ih=torch.randn(20, 4), w_hh=torch.randn(20, 5)
    )
    with pytest.raises(RuntimeError):
        forward(**arguments)


def test_an_empty_batch() -> None:
    arguments = forward_arguments("lstm")
    arguments |= {name: arguments[name][:, :0] for name in ("x", "h0", "c0")}
    y, h_n, c_n, *_ = forward(**arguments)
    assert y.shape == (3, 0, 5)
    assert h_n.shape == c_n.shape == (1, 0, 5)
    gradients = backward(**backward_arguments(arguments))
    assert all(gradient is None or not gradient.any() for gradient in gradients)


def step_arguments(cell: str) -> dict[str, Any]:
    """Arguments of a valid call of torch.ops.fused_rnn.step_into: the second of two layers."""
    torch.manual_seed(0)
    B, size, H, G, lstm = 3, 4, 5, reference.GATES[cell], cell == "lstm"
    h = torch.randn(6, 2, B, H)
    return dict(
        x=torch.randn(B, size), h0=h[0], c0=h[1] if lstm else None, layer=1, cell=CELLS.index(cell),
        w_ih=torch.randn(G * H, size), w_hh=torch.randn(G * H, H), b_ih=torch.randn(G * H), b_hh=torch.randn(G * H),
        w_hr=None, active=torch.tensor([True, False, True]), resets=torch.tensor([True, True, False]),
        reset_h=h[4], reset_c=h[5] if lstm else None, y=torch.randn(B, H), h=h[2], c=h[3] if lstm else None,
    )  # fmt: skip


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_step_into(cell: str) -> None:
    torch.library.opcheck(torch.ops.fused_rnn.step_into.default, (), step_arguments(cell))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(layer=2), "layer must be between 0 and 1, got 2"),
        (dict(layer=-1), "layer must be between"),
        (dict(x=torch.randn(2, 4)), r"x must have shape \[3, 4\], got \[2, 4\]"),
        (dict(x=None), "x is missing, or w_ih does not fit h"),
        (dict(x=torch.randn(3, 4).double()), "x must have the dtype of x"),
        (dict(h0=torch.randn(1, 3, 5)), r"h0 must have shape \[2, 3, 5\], got \[1, 3, 5\]"),
        (dict(h=torch.randn(2, 3, 4)), "h must be 5 wide, got 4"),
        (dict(h=torch.randn(3, 5)), "h must be contiguous"),
        (dict(h=torch.randn(5, 3, 2).permute(2, 1, 0)), "h must be contiguous"),
        (dict(h=torch.zeros(2, 3, 5).half()), "h must be float32 or float64"),
        (dict(c=torch.randn(2, 3, 4)), r"c must have shape \[2, 3, 5\]"),
        (dict(c=torch.randn(5, 3, 2).permute(2, 1, 0)), "c must be contiguous"),
        (dict(c=None), "the LSTM, and no other cell, has c"),
        (dict(cell=3), "no other cell|multiple|must be"),
        (dict(y=torch.randn(3, 4)), r"y must have shape \[3, 5\]"),
        (dict(y=torch.randn(5, 3).T), "y must have contiguous rows"),
        (dict(y=torch.randn(1, 5).expand(3, 5)), "rows of y must not overlap"),
        (dict(w_ih=torch.randn(20)), "w_ih must be"),
        (dict(w_hh=torch.randn(20, 4)), "w_hh must have shape"),
        (dict(b_ih=torch.randn(19)), "b_ih must have shape"),
        (dict(w_hr=torch.randn(4, 5)), "w_hr must have shape"),
        (dict(active=torch.ones(2, dtype=torch.bool)), "active must have shape"),
        (dict(resets=torch.ones(3)), "resets must have the dtype"),
        (dict(resets=None), "need resets"),
        (dict(reset_h=torch.randn(2, 1, 5).expand(2, 4, 5)), "reset_h must have shape"),
        (dict(reset_c=torch.randn(2, 3, 4)), "reset_c must have shape"),
    ],
)
def test_hostile_step_into(change: dict[str, Any], message: str) -> None:
    _fails(torch.ops.fused_rnn.step_into, step_arguments("lstm") | change, message)


@pytest.mark.parametrize(("one", "other"), [("y", "x"), ("y", "h"), ("h", "c"), ("h", "c0"), ("c", "reset_c")])
def test_step_into_refuses_shared_memory(one: str, other: str) -> None:
    arguments, memory = step_arguments("lstm"), torch.randn(31)
    for name in (one, other):
        arguments[name] = memory[: arguments[name].numel()].view_as(arguments[name])
    _fails(torch.ops.fused_rnn.step_into, arguments, f"{one} must not share memory with {other}")


def test_step_into_writes_to_the_state_it_reads_or_apart_from_it() -> None:
    arguments, memory = step_arguments("lstm"), torch.randn(31)
    torch.ops.fused_rnn.step_into(**arguments | dict(h=arguments["h0"], c=arguments["c0"]))
    arguments |= dict(h0=memory[1:].view(2, 3, 5), h=memory[:-1].view(2, 3, 5))
    _fails(torch.ops.fused_rnn.step_into, arguments, "h must not share memory with h0")
