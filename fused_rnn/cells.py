"""RNNCell, LSTMCell and GRUCell: torch.nn's classes, with one fused operator per call.

Only `forward` is new. As in `fused_rnn.modules`, calls that the kernels cannot run go to torch.nn's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fused_rnn import autocast, layers, operators, policy, reference, tuned
from fused_rnn.cell_info import NUMBER
from fused_rnn.convert import TorchConvertible, documentation, fx_leaf
from fused_rnn.options import NO_OPTIONS, PLANNED, LayerOptions

_WEIGHTS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
_TORCHS_RNN: dict[str, Callable[..., Tensor]] = {"tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell}


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

    def _run(self, cell: str, input: Any, hx: Any, states: tuple[Any, ...]) -> Any:
        """h' and c', which is empty or None but for the LSTM; or torch.nn's own result."""
        parameters: Any = self._parameters
        weights = [parameters.get(name) for name in _WEIGHTS]
        results = self._plain(cell, input, hx, weights)
        return self._run_any(cell, input, hx, states) if results is None else results

    @policy.runs_eagerly
    def _plain(self, cell: str, input: Any, hx: Any, weights: Sequence[Tensor | None]) -> Any:
        """As `fused_rnn.modules.FusedRNNBase._plain`."""
        biased = weights[2] is not None
        if (
            torch.compiler.is_compiling()
            or biased is not (weights[3] is not None)
            or (self.bias and not biased)
            or self.hidden_size in tuned.table.cell_hidden_sizes
        ):
            return None
        names, given = (_WEIGHTS, weights) if biased else (_WEIGHTS[:2], weights[:2])
        of_weights = self._parameters, names, given
        return operators.plain(input, hx, 2, NUMBER[cell], 0, 1, biased, False, False, *of_weights, None, None)

    def _choice(self, cell: str, x: Tensor, states: Sequence[Any], weights: Sequence[Any]) -> policy.Choice:
        batch = x.size(0) if x.dim() == 2 else 1
        return policy.choose(
            cell,
            x.dtype,
            1,
            batch,
            self.input_size,
            self.hidden_size,
            kind="cell",
            half=policy.autocast_dtype(x.device),
            differentiable=torch.is_grad_enabled() and policy.any_requires_grad((x, *states, *weights)),
            on_gpu=policy.on_cuda(x),
            device=x.device,
        )

    def _run_any(self, cell: str, input: Any, hx: Any, states: Any) -> Any:
        """As `_run`, for any arguments: unbatched, cast by autocast, watched, irregular or wrong."""
        check_ranks(type(self).__name__, input, states)
        if not self._fits(input, states):
            return super().forward(input, hx)
        transformed, instance = not policy.torch_has_rule(), PLANNED
        if not (transformed or policy.fusible(input)):
            return super().forward(input, hx)
        parameters = self._parameters
        # A parametrised weight is no parameter, may change whenever it is got, and an attribute is slow to get.
        weights: Any = [parameters[name] if name in parameters else getattr(self, name) for name in _WEIGHTS]
        computed = any(name not in parameters for name in _WEIGHTS)  # torch.nn would compute them once more
        if weights[0] is None or weights[1] is None:
            return super().forward(input, hx)
        casts = autocast.casts(cell, input, states, weights)
        if not transformed:
            tensors = (input, *states, *weights)
            if not policy.fusible(*tensors, castable=casts is not None):
                return super().forward(input, hx)
            if not computed:
                choice = self._choice(cell, input, states, weights)
                if not choice.fused:
                    return super().forward(input, hx)
                instance = choice.instance
        if casts is not None:
            (input,), states, weights = (casts.into(tensors) for tensors in ((input,), states, weights))
        batched = input.dim() == 2
        if not batched:
            input, states = input.unsqueeze(0), tuple(s.unsqueeze(0) for s in states)
        h0, c0 = (*states, None, None)[:2]
        run: Any = layers.layer if policy.kernels_work(input) and not transformed else reference.layer
        precision = policy.HIGHEST
        if casts is not None and not policy.on_cuda(input):
            precision = policy.autocast_precision(policy.autocast_dtype(input.device))
        options = NO_OPTIONS
        if precision != policy.HIGHEST or instance != PLANNED:
            options = LayerOptions(precision=precision, instance=instance)
        with nullcontext() if casts is None else torch.autocast(input.device.type, enabled=False):
            h, _, c = run(cell, input, h0, c0, (*weights, None), options)
        results: Any = [s if batched else s.squeeze(0) for s in (h, c) if s is not None]
        h, *more = results if casts is None else casts.out_of(results)
        return (h, more[0]) if more else (h, None)

    def _fits(self, input: Any, states: tuple[Any, ...]) -> bool:
        """Whether the sizes are those that this cell expects."""
        if not isinstance(input, Tensor) or input.dim() not in (1, 2) or input.size(-1) != self.input_size:
            return False
        shape = (*input.shape[:-1], self.hidden_size)
        return all(isinstance(s, Tensor) and s.shape == shape for s in states)


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
            RuntimeError: one of input and hx is batched, and the other is not.
        """
        if self.nonlinearity not in ("tanh", "relu"):
            return super().forward(input, hx)
        if torch.is_grad_enabled() and (trained := self._trained_by_torch(input, hx)) is not None:
            return trained
        result = self._run(f"rnn_{self.nonlinearity}", input, hx, () if hx is None else (hx,))
        return result if isinstance(result, Tensor) else result[0]

    @policy.runs_eagerly
    def _trained_by_torch(self, input: Any, hx: Any) -> Tensor | None:
        """h' from torch's function, where that trains as fast; None for others. Each check costs a percent of it."""
        # A parametrised weight is no parameter.
        w_ih, w_hh, b_ih, b_hh = map(self._parameters.get, _WEIGHTS)
        if (
            w_ih is None
            or w_hh is None
            or not w_hh.requires_grad
            or (self.bias and (b_ih is None or b_hh is None))
            or type(input) not in policy.PLAIN_TYPES
            or input.dim() != 2
            or (hx is not None and (type(hx) not in policy.PLAIN_TYPES or hx.dim() != 2))
            or torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None  # sizes may be symbols
            or policy.transformed()
            or not tuned.torch_trains_as_fast(input.dtype, input.size(0), self.hidden_size)
            or self.hidden_size in tuned.table.cell_hidden_sizes
            or torch.is_autocast_enabled("cpu")
            or policy.deterministic()
            or input.dtype not in policy.DTYPES
        ):
            return None
        if hx is None:
            hx = input.new_zeros(input.size(0), self.hidden_size)
        return _TORCHS_RNN[self.nonlinearity](input, hx, w_ih, w_hh, b_ih, b_hh)


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
            RuntimeError: one of input and hx is batched, and the other is not.
        """
        result = self._run("gru", input, hx, () if hx is None else (hx,))
        return result if isinstance(result, Tensor) else result[0]


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
            RuntimeError: one of input and hx is batched, and the other is not.
            TypeError: hx is neither None nor a pair.
        """
        pair = isinstance(hx, (tuple, list)) and len(hx) == 2 and hx[0] is not None and hx[1] is not None
        if not (pair or hx is None):
            if isinstance(hx, Tensor):  # torch.nn takes its rows for the states of an unbatched input
                check_ranks("LSTMCell", input, hx.unbind() if hx.dim() == 3 else ())
            elif isinstance(hx, (tuple, list)):
                check_ranks("LSTMCell", input, hx)
            else:
                raise TypeError(f"LSTMCell: expected hx to be None or a pair (h, c), got {type(hx).__name__}")
            return super().forward(input, hx)
        h, c = self._run("lstm", input, hx, () if hx is None else tuple(hx))
        return h, c
