"""The fused kernels under torch.nn itself, for models that are already built and scripts that stay as they are.

torch.nn's modules compute through functions of a module named ``_VF``. `patched` puts another module of that name in
its place; classes, checkpoints and everything that asks for exact classes see no difference.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.jit._builtins import _register_builtin
from torch.nn.modules import rnn

from fused_rnn import autocast, eligibility, functional, ops


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Within it, torch.nn's RNN, LSTM, GRU and their cells run on the fused kernels.

    What the kernels do not take runs as ever. Contexts may nest and overlap; the patch holds for all threads until the
    last one is left.

    Example:
        >>> import torch, fused_rnn
        >>> with fused_rnn.patched():
        ...     output, h_n = torch.nn.GRU(3, 5)(torch.randn(7, 2, 3))
        >>> output.shape
        torch.Size([7, 2, 5])
    """
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


_lock = threading.Lock()
_depth = 0  # contexts that are open now, in any thread


def _enter(change: int) -> None:
    global _depth
    with _lock:
        _depth += change
        rnn._VF = _FUSED if _depth else torch._VF  # type: ignore[attr-defined]  # imported there, not exported


class _Functions(types.ModuleType):
    """torch._VF with some functions replaced; a module, because TorchScript resolves functions only in modules."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch._VF, name)


def _sequence(cell: str) -> Callable[..., Any]:
    """torch.lstm, torch.gru, torch.rnn_tanh or torch.rnn_relu, both overloads, on the fused kernels."""
    original = getattr(torch._VF, cell)

    def padded(
        input: Any,
        hx: Any,
        weights: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        states = hx if cell == "lstm" else (hx,)
        if not _regular(cell, input, states, weights, bidirectional) or input.dim() != 3:
            return None
        x = input.transpose(0, 1) if batch_first else input
        if x.size(0) == 0:
            return None
        y, *states = functional.stack(cell, x, states, weights, has_biases, num_layers, dropout, train, bidirectional)
        return (y.transpose(0, 1) if batch_first else y, *states)

    def packed(
        data: Any,
        batch_sizes: Tensor,
        hx: Any,
        weights: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> Any:
        states = hx if cell == "lstm" else (hx,)
        if not _regular(cell, data, states, weights, bidirectional):
            return None
        return functional.stack(
            cell, data, states, weights, has_biases, num_layers, dropout, train, bidirectional, batch_sizes
        )

    @eligibility.runs_eagerly
    def fused(*args: Any) -> Any:
        takes = packed if len(args) > 3 and isinstance(args[3], (list, tuple)) else padded
        result = takes(*args) if len(args) == 9 else None
        return original(*args) if result is None else result

    return fused


def _regular(cell: str, x: Any, states: Any, weights: Any, bidirectional: Any) -> bool:
    return (
        len(states) == (2 if cell == "lstm" else 1)
        and not torch.compiler.is_exporting()
        and autocast.dtype_on(x.device) is None
        and eligibility.fusible(x, *states, *weights)
        and isinstance(bidirectional, bool)
    )


def _cell(cell: str, name: str) -> Callable[..., Any]:
    """torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell or torch.rnn_relu_cell on the fused kernels."""
    original = getattr(torch._VF, name)

    @eligibility.runs_eagerly
    def fused(input: Tensor, hx: Any, *weights: Tensor | None) -> Any:
        states = hx if cell == "lstm" else (hx,)
        if not _fits(cell, input, states, weights):
            return original(input, hx, *weights)
        h0, c0 = (*states, None)[:2]
        h, _, c, *_ = ops.layer(cell, input, h0, c0, (*(*weights, None, None)[:4], None))
        return h if c is None else (h, c)

    return fused


def _fits(cell: str, input: Any, states: Any, weights: Any) -> bool:
    w_hh = weights[1]
    return (
        len(states) == (2 if cell == "lstm" else 1)
        and not torch.compiler.is_exporting()
        and autocast.dtype_on(input.device) is None
        and eligibility.fusible(input, *states, *weights)
        and input.dim() == 2
        and input.size(1) == weights[0].size(1)
        and all(s.shape == (input.size(0), w_hh.size(1)) for s in states)
    )


def _build() -> _Functions:
    functions = _Functions("fused_rnn.patch._VF")
    for cell in ("rnn_tanh", "rnn_relu", "lstm", "gru"):
        for name, fused in ((cell, _sequence(cell)), (f"{cell}_cell", _cell(cell, f"{cell}_cell"))):
            _register_builtin(fused, f"aten::{name}")
            setattr(functions, name, fused)
    return functions


_FUSED = _build()
