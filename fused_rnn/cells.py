"""RNNCell, LSTMCell and GRUCell: torch.nn's classes, with one fused operator per call.

Only `forward` is new. As in `fused_rnn.modules`, calls that the kernels cannot run go to torch.nn's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fused_rnn import autocast, eligibility, ops, reference
from fused_rnn.convert import TorchConvertible, documentation, fx_leaf
from fused_rnn.eligibility import plain

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def check_ranks(name: str, input: Any, states: Iterable[Any]) -> None:
    """Refuses an input and a state of different rank: torch.nn's kernels would read past the end of the state.

    Args:
        name: the class, for the message.
        input, states: as the caller gave them; whatever is not a tensor is left to torch.nn's own checks.

    Raises:
        RuntimeError: one of input and a state is 1-D, the other 2-D.
    """
    if not isinstance(input, Tensor):
        return
    for state in states:
        if isinstance(state, Tensor) and {input.dim(), state.dim()} == {1, 2}:
            raise RuntimeError(
                f"{name}: Expected input and hidden to have the same number of dimensions, "
                f"got {input.dim()}D and {state.dim()}D"
            )


class FusedCellBase(TorchConvertible, torch.nn.RNNCellBase):
    """Base class of the three cells."""

    def _usual_step(self, cell: str, input: Any, h0: Any = None, c0: Any = None) -> tuple[Tensor, Tensor] | None:
        """h' and c' of batched plain tensors, checked by the operator alone; None if this is not that usual call."""
        weights = [self._parameters.get(name) for name in _WEIGHTS]
        w_ih, w_hh, b_ih, b_hh = weights
        if (
            eligibility.watched()
            or not (plain(input, 2) and input.dtype in eligibility.DTYPES and plain(w_ih, 2) and plain(w_hh, 2))
            or (self.bias and not (plain(b_ih, 1) and plain(b_hh, 1)))
            or (h0 is not None and not plain(h0, 2))
            or (c0 is not None and not plain(c0, 2))
        ):
            return None
        casts = None
        if torch.is_autocast_enabled("cpu"):
            if self._torch_is_faster(cell, input):
                return None
            casts = autocast.casts(cell, input, (h0, c0) if cell == "lstm" else (h0,), weights)
        try:
            if casts is None:
                return ops.step(cell, input, h0, c0, *weights)
            h, c = ops.step(cell, *casts.into((input, h0, c0)), *casts.into(weights))
            h, c = casts.out_of((h, c))
            return h, c
        except RuntimeError:
            return None  # something does not fit, or belongs to torch

    def _step(
        self, cell: str, input: Any, states: tuple[Any, ...], layer: Callable[..., Any] = ops.layer
    ) -> tuple[Tensor, Any] | None:
        """h' and c' (None but for the LSTM) by `layer`; None if torch has to compute this call, or to raise."""
        fuses = layer is ops.layer
        if fuses and not eligibility.fusible(input):
            return None
        parameters = self._parameters
        # A parametrised weight is no parameter, may change whenever it is got, and an attribute is slow to get.
        weights: Any = [parameters[name] if name in parameters else getattr(self, name) for name in _WEIGHTS]
        casts = autocast.casts(cell, input, states, weights) if fuses else None
        if casts:
            if self._torch_is_faster(cell, input):
                return None
            (input,), states, weights = (casts.into(tensors) for tensors in ((input,), states, weights))
        if fuses and not eligibility.fusible(input, *states, *weights):
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
        h, _, c = layer(cell, input, h0, c0, (*weights, None))
        results = [s if dim == 2 else s.squeeze(0) for s in (h, c) if s is not None]
        h, c = (*(casts.out_of(results) if casts else results), None)[:2]
        return h, c

    def _torch_is_faster(self, cell: str, input: Tensor) -> bool:
        """Under autocast."""
        half = autocast.dtype_on(input.device)
        batch = input.size(0) if input.dim() == 2 else 1
        return (
            not eligibility.on_cuda(input)
            and half is not None
            and not torch.compiler.is_compiling()  # which would guard the sizes
            and autocast.torch_is_faster(cell, half, 1, batch, self.hidden_size)
        )

    def _torchs(self, cell: str, input: Any, hx: Any, states: tuple[Any, ...]) -> Any:
        """torch.nn's own forward; the specification where that has no rule for a transform (vmap, jvp).

        Raises:
            RuntimeError: input and hidden differ in rank.
        """
        check_ranks(type(self).__name__, input, states)
        if torch.compiler.is_compiling() or not eligibility.transformed():
            return super().forward(input, hx)
        try:
            return super().forward(input, hx)
        except RuntimeError:
            result = self._step(cell, input, states, reference.layer)
            if result is None:
                raise
            return result if cell == "lstm" else result[0]


@fx_leaf
class RNNCell(FusedCellBase, torch.nn.RNNCell):
    __doc__ = documentation(torch.nn.RNNCell)

    def forward(self, input: Any, hx: Any = None) -> Tensor:
        """Compute one time step.

        Args:
            input: ``(B, input_size)``, or ``(input_size,)`` unbatched.
            hx: the state h, ``(B, hidden_size)``, or ``(hidden_size,)`` unbatched. None means zeros.

        Returns:
            The new state h', shaped like hx.

        Raises:
            ValueError, RuntimeError: sizes or dtypes do not match; type and message are torch.nn's.
        """
        if self.nonlinearity not in ("tanh", "relu"):
            return super().forward(input, hx)
        if self._torch_trains(input, hx):
            return super().forward(input, hx)
        cell = f"rnn_{self.nonlinearity}"
        states = () if hx is None else (hx,)
        result = self._usual_step(cell, input, *states) or self._step(cell, input, states)
        return self._torchs(cell, input, hx, states) if result is None else result[0]

    def _torch_trains(self, input: Any, hx: Any) -> bool:
        """Whether torch.nn is to take a step in training: beside its nodes in C++, ours in Python costs too much.

        The products alone do not make up for it, as they do in the other cells, of three or four times as many.
        """
        parameters: Any = self._parameters
        return (
            torch.is_grad_enabled()
            and plain(input, 2)
            and input.dtype in eligibility.KERNEL_DTYPES
            and (hx is None or plain(hx, 2))
            and ops.any_requires_grad((input, hx, *parameters.values()))
            and not (torch.is_autocast_enabled("cpu") or eligibility.watched() or eligibility.deterministic())
        )


@fx_leaf
class GRUCell(FusedCellBase, torch.nn.GRUCell):
    __doc__ = documentation(torch.nn.GRUCell)

    def forward(self, input: Any, hx: Any = None) -> Tensor:
        """Compute one time step.

        Args:
            input: ``(B, input_size)``, or ``(input_size,)`` unbatched.
            hx: the state h, ``(B, hidden_size)``, or ``(hidden_size,)`` unbatched. None means zeros.

        Returns:
            The new state h', shaped like hx.

        Raises:
            ValueError, RuntimeError: sizes or dtypes do not match; type and message are torch.nn's.
        """
        states = () if hx is None else (hx,)
        result = self._usual_step("gru", input, *states) or self._step("gru", input, states)
        return self._torchs("gru", input, hx, states) if result is None else result[0]


@fx_leaf
class LSTMCell(FusedCellBase, torch.nn.LSTMCell):
    __doc__ = documentation(torch.nn.LSTMCell)

    def forward(self, input: Any, hx: Any = None) -> tuple[Tensor, Tensor]:
        """Compute one time step.

        Args:
            input: ``(B, input_size)``, or ``(input_size,)`` unbatched.
            hx: the states, a pair (h, c), each ``(B, hidden_size)``, or ``(hidden_size,)`` unbatched. None means zeros.

        Returns:
            The pair of new states (h', c'), shaped like hx.

        Raises:
            ValueError, RuntimeError: sizes or dtypes do not match; type and message are torch.nn's.
        """
        pair = isinstance(hx, (tuple, list)) and len(hx) == 2 and hx[0] is not None and hx[1] is not None
        if not (pair or hx is None):
            if isinstance(hx, Tensor):  # torch.nn takes its rows for states
                check_ranks("LSTMCell", input, hx.unbind() if hx.dim() > 0 else ())
            elif isinstance(hx, (tuple, list)):
                check_ranks("LSTMCell", input, hx)
            else:
                raise TypeError(f"LSTMCell: expected hx to be None or a pair (h, c), got {type(hx).__name__}")
            return super().forward(input, hx)
        states = () if hx is None else tuple(hx)
        result = self._usual_step("lstm", input, *states) or self._step("lstm", input, states)
        return self._torchs("lstm", input, hx, states) if result is None else result
