"""Properties for random shapes and flags: agreement with torch.nn, and relations between results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_rnn
from cases import Case

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = dict(rtol=1e-10, atol=1e-10)  # in float64

searched = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def cases(draw: Callable, most_layers: int = 3, directions: tuple[bool, ...] = (False, True)) -> Case:
    cell = draw(st.sampled_from(["RNN", "LSTM", "GRU"]))
    T, B, H = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 19))
    lengths = draw(st.none() | st.lists(st.integers(1, T), min_size=B, max_size=B).map(tuple))
    return Case(
        cell=cell,
        T=T,
        B=B,
        I=draw(st.integers(1, 9)),
        H=H,
        L=draw(st.integers(1, most_layers)),
        bidirectional=draw(st.sampled_from(directions)),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        lengths=lengths,
        given_states=draw(st.booleans()),
        proj_size=draw(st.integers(0, H - 1)) if cell == "LSTM" else 0,
        nonlinearity=draw(st.sampled_from(["tanh", "relu"])) if cell == "RNN" else None,
    )


def ours(case: Case) -> torch.nn.Module:
    return case.modules(torch.float64)[1]


def gradients(case: Case, module: torch.nn.Module, data: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Results, and the gradients of their weighted sum: None for tensors that require none."""
    results = case.run(module, data)
    weights = [torch.linspace(-1, 2, r.numel(), dtype=r.dtype).view(r.shape) for r in results]
    leaves = [*data, *module.parameters()]
    wanted = [t for t in leaves if t.requires_grad]
    loss = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
    found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
    return results, [next(found) if t.requires_grad else None for t in leaves]


def batch_dim(case: Case) -> int:
    return 0 if case.batch_first else 1


def padded(case: Case, module: torch.nn.Module, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output as a padded tensor, and the final states."""
    hx = None if not states else tuple(states) if case.cell == "LSTM" else states[0]
    output, final = module(case.pack(x), hx)
    if isinstance(output, PackedSequence):
        output, _ = pad_packed_sequence(output, batch_first=case.batch_first)
    return output, list(final if case.cell == "LSTM" else (final,))


@searched
@given(case=cases(), dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]))
@example(Case("LSTM", 6, 5, 9, 19, 3, True, lengths=(3, 6, 1, 6, 2), proj_size=7), torch.float64)
@example(Case("GRU", 1, 1, 1, 1), torch.float64)
def test_equal_to_torch(case: Case, dtype: torch.dtype) -> None:
    """Equal outputs, states and gradients, with equal shapes and dtypes."""
    theirs, fused, _ = case.modules(dtype)
    data = [t.requires_grad_() for t in case.data(dtype)]
    tolerance = TOLERANCE if dtype == torch.float64 else dict(rtol=4e-4, atol=8e-5)
    expected, found = gradients(case, theirs, data), gradients(case, fused, data)
    for kind in range(2):
        torch.testing.assert_close(found[kind], expected[kind], **tolerance)


@searched
@given(case=cases(), data=st.data())
def test_any_subset_of_gradients(case: Case, data: st.DataObject) -> None:
    """Results and gradients do not depend on which other tensors require gradients."""
    fused, inputs = ours(case), case.data(torch.float64)
    leaves = [*inputs, *fused.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    results, everything = gradients(case, fused, inputs)
    needs = data.draw(st.lists(st.booleans(), min_size=len(leaves), max_size=len(leaves)).filter(any), "requires_grad")
    for leaf, need in zip(leaves, needs, strict=True):
        leaf.requires_grad_(need)
    found_results, found = gradients(case, fused, inputs)
    for a, b in zip(found_results, results, strict=True):
        assert torch.equal(a, b)
    for one, other, need in zip(found, everything, needs, strict=True):
        if need:
            torch.testing.assert_close(one, other, **TOLERANCE)


@searched
@given(case=cases(), data=st.data())
def test_a_row_alone_equals_the_row_in_the_batch(case: Case, data: st.DataObject) -> None:
    fused, (x, *states) = ours(case), case.data(torch.float64)
    output, finals = padded(case, fused, x, states)
    row = data.draw(st.integers(0, case.B - 1), "row")
    length = case.lengths[row] if case.lengths else case.T
    time_dim, dim = 1 - batch_dim(case), batch_dim(case)
    alone = x.narrow(dim, row, 1).narrow(time_dim, 0, length)
    unpacked = Case(case.cell, case.T, 1, case.I, case.H, batch_first=case.batch_first)
    found, found_finals = padded(unpacked, fused, alone, [s[:, row : row + 1] for s in states])
    torch.testing.assert_close(found, output.narrow(dim, row, 1).narrow(time_dim, 0, length), **TOLERANCE)
    torch.testing.assert_close(found_finals, [s[:, row : row + 1] for s in finals], **TOLERANCE)
    unbatched, unbatched_final = fused(alone.squeeze(dim), _hx(case, [s[:, row] for s in states]))
    torch.testing.assert_close(unbatched, found.squeeze(dim), **TOLERANCE)
    first_state = unbatched_final[0] if case.cell == "LSTM" else unbatched_final
    torch.testing.assert_close(first_state, found_finals[0].squeeze(1), **TOLERANCE)


def _hx(case: Case, states: list[Tensor]) -> Tensor | tuple[Tensor, ...] | None:
    return None if not states else tuple(states) if case.cell == "LSTM" else states[0]


@searched
@given(case=cases(directions=(False,)), data=st.data())
def test_a_sequence_cut_in_two_equals_the_whole(case: Case, data: st.DataObject) -> None:
    """State and gradient are passed on. With a cut at 0 or T, one part is empty and left out."""
    fused, (x, *states) = ours(case), case.data(torch.float64)
    whole = Case(case.cell, case.T, case.B, case.I, case.H, batch_first=case.batch_first)
    x.requires_grad_()
    output, finals = padded(whole, fused, x, states)
    time_dim = 1 - batch_dim(case)
    cut = data.draw(st.integers(0, case.T), "cut")
    outputs = []
    handed = states
    for part in x.split([cut, case.T - cut], time_dim):
        if part.size(time_dim):
            y, handed = padded(whole, fused, part, handed)
            outputs.append(y)
    found = torch.cat(outputs, time_dim)
    torch.testing.assert_close([found, *handed], [output, *finals], **TOLERANCE)
    leaves = [x, *fused.parameters()]
    expected_gradients = torch.autograd.grad((output * output.detach().cos()).sum() + finals[-1].sum(), leaves)
    found_gradients = torch.autograd.grad((found * output.detach().cos()).sum() + handed[-1].sum(), leaves)
    torch.testing.assert_close(found_gradients, expected_gradients, **TOLERANCE)


@searched
@given(case=cases(most_layers=1, directions=(True,)))
def test_the_reverse_direction_is_time_reversal(case: Case) -> None:
    """The reverse half of a bidirectional layer equals a forward layer on the reversed sequence, row by row."""
    fused, (x, *states) = ours(case), case.data(torch.float64)
    output, finals = padded(case, fused, x, states)
    options = case.options() | dict(bidirectional=False)
    single = getattr(fused_rnn, case.cell)(case.I, case.H, **options, dtype=torch.float64)
    own = {name.removesuffix("_reverse"): w for name, w in fused.state_dict().items() if name.endswith("_reverse")}
    single.load_state_dict(own)
    y, final = padded(case, single, turned(case, x), [s[1:] for s in states])
    width = case.proj_size or case.H
    torch.testing.assert_close(turned(case, y), output[..., width:], **TOLERANCE)
    torch.testing.assert_close(final, [s[1:] for s in finals], **TOLERANCE)


def turned(case: Case, x: Tensor) -> Tensor:
    """A padded batch with each row reversed up to its own length."""
    rows = x.unbind(batch_dim(case))
    lengths = case.lengths or [case.T] * case.B
    return torch.stack([torch.cat([r[:n].flip(0), r[n:]]) for r, n in zip(rows, lengths, strict=True)], batch_dim(case))


@searched
@given(case=cases(), data=st.data())
def test_the_order_of_the_batch_does_not_matter(case: Case, data: st.DataObject) -> None:
    fused, (x, *states) = ours(case), case.data(torch.float64)
    order = data.draw(st.permutations(range(case.B)), "order")
    output, finals = padded(case, fused, x, states)
    lengths = tuple(case.lengths[b] for b in order) if case.lengths else None
    mixed = Case(case.cell, case.T, case.B, case.I, case.H, batch_first=case.batch_first, lengths=lengths)
    index = torch.tensor(order)
    found, found_finals = padded(
        mixed, fused, x.index_select(batch_dim(case), index), [s.index_select(1, index) for s in states]
    )
    torch.testing.assert_close(found, output.index_select(batch_dim(case), index), **TOLERANCE)
    torch.testing.assert_close(found_finals, [s.index_select(1, index) for s in finals], **TOLERANCE)


@searched
@given(case=cases())
def test_packed_equals_each_length_of_the_padded(case: Case) -> None:
    """Packing sequences of one length changes nothing."""
    fused, (x, *states) = ours(case), case.data(torch.float64)
    lengths = torch.full((case.B,), case.T)
    packed = pack_padded_sequence(x, lengths, batch_first=case.batch_first)
    output, final = fused(packed, _hx(case, states))
    output, _ = pad_packed_sequence(output, batch_first=case.batch_first)
    expected, expected_final = fused(x, _hx(case, states))
    torch.testing.assert_close(output, expected, **TOLERANCE)
    torch.testing.assert_close(final, expected_final, **TOLERANCE)
