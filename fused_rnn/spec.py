"""What a module is, as far as computing goes: its cell, its sizes, its weights and its options.

A `Spec` is made for one call, from a module or from plain weights, because everything in it may change between calls.
torch.nn's own argument checks run on it: they read nothing but these attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import LSTM, RNNBase


def states_of(hx: Any, has_c: bool) -> tuple[Any, ...] | None:
    """hx as a tuple of tensors, empty without hx; None if hx has another structure."""
    if hx is None:
        return ()
    if not has_c:
        return (hx,)
    return tuple(hx) if isinstance(hx, (tuple, list)) and len(hx) == 2 else None


@dataclass
class Spec:
    """One module's configuration and tensors.

    Attributes:
        name: the class, for messages.
        mode, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, training: as in
            torch.nn. hidden_size may be a tuple, with a size for each layer.
        backend: "auto", "fused" or "torch".
        _flat_weights: torch.nn's list: per layer and direction ``w_ih, w_hh[, b_ih, b_hh][, w_hr]``.
        norms: parameters of layer normalisation, per layer and direction ``ih, hh[, c, c_bias]``; empty without.
        zoneout: rates of h and c.
        recurrent_dropout, weight_dropout: rates.
        recompute: whether backward recomputes forward instead of reading saved gates.
        checks: the module, if its class overrides torch.nn's check_input, check_forward_args or permute_hidden; None if
            torch.nn's own run on this object.
        cell: the name in `fused_rnn.reference.CELLS`.
        has_c: whether the state is a pair (h, c).
        directions: 1 or 2.
        side_by_side: whether the layers differ in size, so that their states lie side by side in the last dimension.
        has_rates: whether there is zoneout or recurrent dropout.
    """

    name: str
    mode: str
    input_size: int
    hidden_size: Any
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    training: bool = False
    backend: str = "auto"
    _flat_weights: Sequence[Tensor] = ()
    norms: Sequence[Tensor] = ()
    zoneout: tuple[float, float] = (0.0, 0.0)
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    recompute: bool = False
    checks: Any = None

    def __post_init__(self) -> None:
        self.cell = self.mode.lower()
        self.has_c = self.mode == "LSTM"
        self.directions = 2 if self.bidirectional else 1
        self.side_by_side = isinstance(self.hidden_size, tuple)
        self.has_rates = self.zoneout != (0.0, 0.0) or self.recurrent_dropout > 0

    check_input = RNNBase.check_input
    check_hidden_size = RNNBase.check_hidden_size
    get_expected_hidden_size = RNNBase.get_expected_hidden_size
    get_expected_cell_size = LSTM.get_expected_cell_size

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """torch.nn's check, extended to layers of different sizes.

        Raises:
            RuntimeError, ValueError: input or hidden does not fit; type and message are torch.nn's.
        """
        if not self.side_by_side:
            check: Any = LSTM.check_forward_args if self.has_c else RNNBase.check_forward_args
            check(self, input, hidden, batch_sizes)
            return
        self.check_input(input, batch_sizes)  # type: ignore[misc]  # torch.nn's, on our attributes
        batch = int(batch_sizes[0]) if batch_sizes is not None else input.size(0 if self.batch_first else 1)
        for state, size in zip(self.states(hidden) or (), self.state_sizes, strict=True):
            self.check_hidden_size(state, (self.state_rows, batch, size))  # type: ignore[misc]

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """The states with their rows in the order of `permutation`."""
        if permutation is None:
            return hx
        return self.pack([state.index_select(1, permutation) for state in self.states(hx) or ()])

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """H of every layer."""
        return self.hidden_size if self.side_by_side else (self.hidden_size,) * self.num_layers

    @property
    def state_widths(self) -> tuple[tuple[int, ...], ...]:
        """The sizes of h, and of c, in every layer."""
        h_widths = (self.proj_size,) * self.num_layers if self.proj_size else self.hidden_sizes
        return (h_widths, self.hidden_sizes) if self.has_c else (h_widths,)

    @property
    def state_rows(self) -> int:
        """The first dimension of a state."""
        return (1 if self.side_by_side else self.num_layers) * self.directions

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """The last dimension of each state."""
        if self.side_by_side:
            return tuple([sum(widths) for widths in self.state_widths])
        return (self.proj_size or self.hidden_size, self.hidden_size) if self.has_c else (self.hidden_size,)

    def states(self, hx: Any) -> tuple[Any, ...] | None:
        """`states_of` this module."""
        return states_of(hx, self.has_c)

    def pack(self, states: Sequence[Any]) -> Any:
        """The inverse of `states`: a tensor, or a pair for the LSTM."""
        return tuple(states) if self.has_c else states[0]

    def dropped_weights(self) -> Sequence[Tensor]:
        """The weights of one call with weight dropout: the recurrent weights are masked."""
        count = len(self._flat_weights) // (self.num_layers * self.directions)
        return [
            torch.dropout(weight, self.weight_dropout, True) if index % count == 1 else weight
            for index, weight in enumerate(self._flat_weights)
        ]

    def layer_norms(self) -> list[tuple[Tensor, ...]]:
        """The gains ``ih, hh[, c, c_bias]`` of every layer, each with a first dimension D."""
        D, count = self.directions, len(self.norms) // (self.num_layers * self.directions)
        layers = []
        for first in range(0, len(self.norms), count * D):
            of_layer = self.norms[first : first + count * D]
            layers.append(tuple(torch.stack(list(of_layer[kind::count])) for kind in range(count)))
        return layers
