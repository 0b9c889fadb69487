"""The shared table of cases: cells x sizes x flags. Many sizes are odd, to test the remainder of every vector loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn


@dataclass(frozen=True)
class Case:
    """A module's options and its input's sizes. `lengths` makes the input a packed sequence (unsorted if they are)."""

    cell: str
    T: int
    B: int
    I: int  # noqa: E741 - the field's symbol
    H: int
    L: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    lengths: tuple[int, ...] | None = None
    given_states: bool = True
    proj_size: int = 0
    nonlinearity: str | None = None

    def __str__(self) -> str:
        flags = [
            ("bi", self.bidirectional),
            ("nobias", not self.bias),
            ("bf", self.batch_first),
            ("packed", self.lengths),
            ("zeros", not self.given_states),
            (f"proj{self.proj_size}", self.proj_size),
            (self.nonlinearity, self.nonlinearity),
        ]
        sizes = f"T{self.T}B{self.B}I{self.I}H{self.H}L{self.L}"
        return "-".join([self.cell, sizes, *(str(name) for name, on in flags if on)])

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = dict(
            num_layers=self.L,
            bias=self.bias,
            batch_first=self.batch_first,
            bidirectional=self.bidirectional,
        )
        if self.proj_size:
            options["proj_size"] = self.proj_size
        if self.nonlinearity:
            options["nonlinearity"] = self.nonlinearity
        return options

    def modules(self, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
        """torch.nn's module, ours with the same weights, and torch.nn's with these weights in float64."""
        torch.manual_seed(0)
        theirs = getattr(torch.nn, self.cell)(self.I, self.H, **self.options(), dtype=dtype)
        ours = getattr(fused_rnn, self.cell)(self.I, self.H, **self.options(), dtype=dtype)
        exact = getattr(torch.nn, self.cell)(self.I, self.H, **self.options(), dtype=torch.float64)
        ours.load_state_dict(theirs.state_dict())
        exact.load_state_dict(theirs.state_dict())
        return theirs, ours, exact

    def data(self, dtype: torch.dtype) -> list[Tensor]:
        """x and, if given, h0 (and c0), in dtype."""
        generator = torch.Generator().manual_seed(1)
        rows = self.L * (2 if self.bidirectional else 1)
        shapes = [(self.B, self.T, self.I) if self.batch_first else (self.T, self.B, self.I)]
        if self.given_states:
            shapes.append((rows, self.B, self.proj_size or self.H))
        if self.given_states and self.cell == "LSTM":
            shapes.append((rows, self.B, self.H))
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    def pack(self, x: Tensor) -> Tensor | PackedSequence:
        if self.lengths is None:
            return x
        lengths = torch.tensor(self.lengths)
        return pack_padded_sequence(x, lengths, batch_first=self.batch_first, enforce_sorted=False)

    def run(self, module: torch.nn.Module, data: list[Tensor]) -> list[Tensor]:
        """Outputs and final states."""
        x, *states = data
        hx = None if not states else tuple(states) if self.cell == "LSTM" else states[0]
        output, final = module(self.pack(x), hx)
        finals = final if self.cell == "LSTM" else (final,)
        return [output.data if self.lengths else output, *finals]


_SIZES = [
    dict(T=1, B=1, I=1, H=1),
    dict(T=3, B=2, I=4, H=7, bias=False),
    dict(T=7, B=1, I=33, H=33, given_states=False),
    dict(T=5, B=3, I=7, H=20, L=2, batch_first=True),
    dict(T=4, B=17, I=10, H=77, bidirectional=True),
    dict(T=2, B=33, I=77, H=200, L=2, bidirectional=True, batch_first=True),
    dict(T=33, B=7, I=3, H=64, L=3),
    dict(T=1, B=7, I=33, H=77, L=2, bidirectional=True),
    dict(T=1, B=64, I=64, H=128),
    dict(T=20, B=1, I=64, H=256),
    dict(T=2, B=26, I=9, H=360),
    dict(T=2, B=10, I=530, H=130),
    dict(T=3, B=4, I=300, H=220),
    dict(T=7, B=5, I=3, H=33, lengths=(7, 5, 5, 2, 1)),
    dict(T=6, B=4, I=20, H=48, L=2, bidirectional=True, lengths=(1, 6, 3, 3)),
    dict(T=5, B=3, I=7, H=9, bidirectional=True, batch_first=True, bias=False, lengths=(2, 5, 4), given_states=False),
    dict(T=35, B=32, I=28, H=200),
]

_CELLS = [
    dict(cell="RNN", nonlinearity="tanh"),
    dict(cell="RNN", nonlinearity="relu"),
    dict(cell="LSTM"),
    dict(cell="GRU"),
]

CASES = [Case(**cell, **size) for cell in _CELLS for size in _SIZES] + [
    replace(case, proj_size=proj)
    for case, proj in [
        (Case("LSTM", T=3, B=2, I=4, H=7), 1),
        (Case("LSTM", T=6, B=9, I=5, H=33, L=2, bidirectional=True), 20),
        (Case("LSTM", T=1, B=3, I=8, H=77, bias=False), 33),
        (Case("LSTM", T=6, B=4, I=20, H=48, bidirectional=True, lengths=(1, 6, 3, 3)), 17),
        (Case("LSTM", T=12, B=1, I=64, H=256, given_states=False), 64),
    ]
]

CELL_SIZES = [(1, 1, 1), (2, 4, 7), (1, 64, 64), (3, 10, 33), (64, 33, 77), (5, 100, 200)]
"""(B, I, H) for the three cell modules."""
