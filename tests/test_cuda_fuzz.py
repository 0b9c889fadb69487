"""The CUDA operators called with anything: an exception of Python or results, never a crash; under the emulator.

What the CPU's operators are called with, and why, is in test_fuzz.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulated
from fused_rnn import reference
from test_fuzz import DAMAGES, DISGUISES, check, damaged, searched

pytestmark = [
    pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing())),
    pytest.mark.slow("compiles the CUDA kernels for the emulator, which is slow itself"),
]

CELLS = list(reference.CELLS)


@pytest.fixture(autouse=True)
def library() -> None:
    emulated.load_once()


def forward_arguments(cell: str, resident: bool, D: int, dtype: torch.dtype, more: bool) -> dict[str, Any]:
    """Of a valid call; with all options if `more`."""
    torch.manual_seed(0)
    T, B, H, G = 3, 2, 8, reference.GATES[cell]
    is_lstm = cell == "lstm"

    def of(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    return dict(
        x_gates=of(D, T, B, G * H),
        h0=of(D, B, H),
        c0=of(D, B, H) if is_lstm else None,
        cell=CELLS.index(cell),
        train=True,
        resident=resident,
        instance=-1,
        w_hh=of(D, G * H, H),
        b_ih=of(D, G * H),
        b_hh=of(D, G * H),
        lengths=torch.tensor([3, 1], dtype=torch.int32) if more else None,
        resets=torch.rand(T, B) < 0.5 if more else None,
        reset_h=of(D, T, B, H) if more else None,
        reset_c=of(D, T, B, H) if more and is_lstm else None,
        want_c_sequence=more and is_lstm,
        drop_h=of(D, B, H) if more else None,
        zone_h=of(T, B, D * H) if more else None,
        zone_c=of(D * H) if more and is_lstm else None,
        norm_hh=of(D, G * H) if more and not resident else None,
        norm_c=of(D, H) if more and is_lstm and not resident else None,
        norm_c_bias=of(D, H) if more and is_lstm and not resident else None,
        norm_eps=reference.NORM_EPS,
    )


def backward_arguments(forward: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(1)
    y, h_n, c_n, *left, c_sequence = torch.ops.fused_rnn_emulator.recurrence_forward(**forward)
    variant = ("drop_h", "zone_h", "zone_c", "norm_hh", "norm_c", "norm_c_bias")
    same = {name: forward[name] for name in ("cell", "resident", "instance", "lengths", "resets", *variant)}
    same |= dict(zip(("h_prev", "saved", "state_prev", "h_gates", "statistics"), left, strict=True))
    return same | dict(
        dy=torch.randn_like(y),
        dh_n=torch.randn_like(h_n),
        dc_n=torch.randn_like(c_n) if c_n.numel() else None,
        w_hh_t=forward["w_hh"].transpose(1, 2).contiguous(),
        need_dreset=forward["resets"] is not None,
        dc_sequence=torch.randn_like(c_sequence) if c_sequence.numel() else None,
    )


@st.composite
def calls(draw: Callable, operator: str) -> dict[str, Any]:
    resident = draw(st.booleans())
    dtypes = [torch.float32, torch.bfloat16, torch.float16] + ([] if resident else [torch.float64])
    arguments = forward_arguments(
        draw(st.sampled_from(CELLS)),
        resident,
        draw(st.integers(1, 2)),
        draw(st.sampled_from(dtypes)),
        draw(st.booleans()),
    )
    return backward_arguments(arguments) if operator == "backward" else arguments


@pytest.mark.parametrize("operator", ["forward", "backward"])
@settings(searched, max_examples=40)
@given(data=st.data())
def test_damaged_calls(operator: str, data: st.DataObject) -> None:
    call = getattr(torch.ops.fused_rnn_emulator, f"recurrence_{operator}")
    # Behind a row's end, what forward keeps for backward is memory that nobody has written to.
    check(call, damaged(data, data.draw(calls(operator), "call")), slice(3) if operator == "forward" else slice(1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_weights_that_begin_anywhere(cell: str, dtype: torch.dtype) -> None:
    """A GPU loads them by 16 bytes from addresses that are multiples of 16; flat parameters lie as they come."""
    forward = forward_arguments(cell, True, 1, dtype, False)
    backward = backward_arguments(forward)
    for operator, arguments, name in [("forward", forward, "w_hh"), ("backward", backward, "w_hh_t")]:
        call = getattr(torch.ops.fused_rnn_emulator, f"recurrence_{operator}")
        moved = DISGUISES["later in a buffer"](arguments[name])
        assert moved.data_ptr() % 16 and moved.is_contiguous()
        for found, expected in zip(call(**arguments | {name: moved}), call(**arguments), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("lengths", [[-1, 2], [2**31 - 1, -(2**31)], [4, 0]])
@pytest.mark.parametrize("resident", [False, True])
def test_lengths_outside_of_the_sequence(resident: bool, lengths: list[int]) -> None:
    """Nobody looks at them on the host: they count as 0 and T."""
    forward = forward_arguments("lstm", resident, 2, torch.float32, True)
    inside = [min(max(length, 0), 3) for length in lengths]
    results = []
    for given_lengths in (lengths, inside):
        arguments = forward | dict(lengths=torch.tensor(given_lengths, dtype=torch.int32))
        results.append(
            [
                *torch.ops.fused_rnn_emulator.recurrence_forward(**arguments)[:3],
                *torch.ops.fused_rnn_emulator.recurrence_backward(**backward_arguments(arguments))[1:3],
            ]
        )
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("instance", [-(2**63), -2, 10, 2**31, 2**32 + 1, 2**63 - 1])
def test_kernels_that_are_not_there(instance: int) -> None:
    arguments = forward_arguments("gru", True, 1, torch.float32, False)
    with pytest.raises(RuntimeError, match=r"this kernel|there is no kernel"):
        torch.ops.fused_rnn_emulator.recurrence_forward(**arguments | dict(instance=instance))


def test_memory_that_was_taken_away() -> None:
    forward = forward_arguments("lstm", True, 2, torch.float32, True)
    for operator, arguments in (("forward", forward), ("backward", backward_arguments(forward))):
        for name in [name for name, value in arguments.items() if isinstance(value, Tensor)]:
            if operator == "backward" and name in ("h_prev", "h_gates", "statistics"):
                continue  # resident kernels do not read them, of an LSTM
            with pytest.raises(RuntimeError, match=f"{name} reaches beyond the end of its storage"):
                call = getattr(torch.ops.fused_rnn_emulator, f"recurrence_{operator}")
                call(**arguments | {name: DAMAGES["no storage"](arguments[name])})
