"""RNNCell, LSTMCell and GRUCell: torch.nn's classes, one fused step each.

As in `fused_rnn.modules`, only `forward` is new, and what the kernels do not take goes to torch.nn's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_rnn import ops
from fused_rnn.convert import TorchConvertible, fx_leaf

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class FusedCellBase(TorchConvertible, torch.nn.RNNCellBase):
    """What the three cells share."""

    def _step(self, cell: str, input: Any, states: tuple[Any, ...]) -> tuple[Tensor, Tensor | None] | None:
        """h' and c' (None but for the LSTM); None if torch has to compute this call.

        Raises:
            RuntimeError: input and hidden differ in rank, where torch.nn would read past the end.
        """
        parameters = self._parameters
        # A parametrised weight is no parameter, and an attribute of the module is slow to get.
        weights = [parameters[name] if name in parameters else getattr(self, name) for name in _WEIGHTS]
        if not ops.fusible(input, *states, *weights):
            return None
        dim = input.dim()
        if dim not in (1, 2) or input.size(-1) != self.input_size:
            return None
        shape = (*input.shape[:-1], self.hidden_size)
        for s in states:
            if s is None or s.shape != shape:
                return None
        if dim == 1:
            input, states = input.unsqueeze(0), tuple(s.unsqueeze(0) for s in states)
        h0, c0 = (*states, None, None)[:2]
        h, _, c = ops.layer(cell, input, h0, c0, (*weights, None))
        if dim == 1:
            h, c = h.squeeze(0), None if c is None else c.squeeze(0)
        return h, c

    def _check_ranks(self, input: Any, states: tuple[Any, ...]) -> None:
        for state in states:
            if {getattr(input, "ndim", None), getattr(state, "ndim", None)} == {1, 2}:
                raise RuntimeError(
                    f"{self._get_name()}: Expected input and hidden to have the same number of dimensions, "
                    f"got {input.ndim}D and {state.ndim}D"
                )


@fx_leaf
class RNNCell(FusedCellBase, torch.nn.RNNCell):
    __doc__ = torch.nn.RNNCell.__doc__

    def forward(self, input: Any, hx: Any = None) -> Tensor:
        """input ``(B, input_size)`` or ``(input_size)``, hx alike of hidden_size; returns h'."""
        states = () if hx is None else (hx,)
        self._check_ranks(input, states)
        known = self.nonlinearity in ("tanh", "relu")
        result = self._step(f"rnn_{self.nonlinearity}", input, states) if known else None
        return super().forward(input, hx) if result is None else result[0]


@fx_leaf
class GRUCell(FusedCellBase, torch.nn.GRUCell):
    __doc__ = torch.nn.GRUCell.__doc__

    def forward(self, input: Any, hx: Any = None) -> Tensor:
        """input ``(B, input_size)`` or ``(input_size)``, hx alike of hidden_size; returns h'."""
        states = () if hx is None else (hx,)
        self._check_ranks(input, states)
        result = self._step("gru", input, states)
        return super().forward(input, hx) if result is None else result[0]


@fx_leaf
class LSTMCell(FusedCellBase, torch.nn.LSTMCell):
    __doc__ = torch.nn.LSTMCell.__doc__

    def forward(self, input: Any, hx: Any = None) -> tuple[Tensor, Tensor]:
        """input ``(B, input_size)`` or ``(input_size)``, hx a pair (h, c) alike of hidden_size; returns (h', c')."""
        pair = isinstance(hx, (tuple, list)) and len(hx) == 2
        states = tuple(hx) if pair else ()
        self._check_ranks(input, states)
        result = self._step("lstm", input, states) if pair or hx is None else None
        return super().forward(input, hx) if result is None else result  # type: ignore[return-value]
