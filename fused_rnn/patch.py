"""The fused kernels under torch.nn itself, for models that are already built and scripts that stay as they are.

torch.nn's modules compute through functions of a module named ``_VF``. `patched` puts another module of that name in
its place; classes, checkpoints and everything that asks for exact classes see no difference.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.jit._builtins import _register_builtin
from torch.nn.modules import rnn

from fused_rnn import layers, policy, tuned
from fused_rnn.options import PLANNED
from fused_rnn.tally import Tally


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Context manager: torch.nn's own RNN, LSTM, GRU and cells run on the fused kernels.

    Calls that the kernels cannot run are computed by torch.nn as before. The patch affects all threads. Contexts may
    nest and overlap; it ends when the last of them is left.

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


def patch_process(verbose: bool = False) -> None:
    """Patches torch.nn until the process ends, in a process of ``python -m fused_rnn run``.

    With `verbose`, the process reports at its end how many calls ran fused.
    """
    global _fused
    if verbose:
        tally = Tally()
        tally.report_at_exit()
        _fused = _build(tally)
    _enter(1)


_lock = threading.Lock()
_depth = 0  # contexts that are open now, in any thread


def _enter(change: int) -> None:
    global _depth
    with _lock:
        _depth += change
        rnn._VF = _fused if _depth else torch._VF  # type: ignore[attr-defined]  # imported there, not exported


class _Functions(types.ModuleType):
    """torch._VF with some functions replaced; a module, because TorchScript resolves functions only in modules."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch._VF, name)


def _sequence(cell: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """torch.lstm, torch.gru, torch.rnn_tanh or torch.rnn_relu, both overloads, on the fused kernels."""
    count = 2 if cell == "lstm" else 1

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
        states = _states(cell, hx)
        h0, c0 = (*states, None, None)[:2]
        plain = len(states) == count and type(bidirectional) is bool and policy.plain_call(3, input, h0, c0, weights)
        if not plain and (not _regular(cell, input, states, weights, bidirectional) or input.dim() != 3):
            return None
        x = input.transpose(0, 1) if batch_first else input
        if x.size(0) == 0:
            return None
        choice = _tuned_choice(cell, x, None, states, weights, num_layers, bidirectional)
        if not choice.fused:
            return None
        directions, dropout = 2 if bidirectional else 1, dropout if train else 0.0
        y, *states = layers.stack(
            cell, x, h0, c0, weights, has_biases, num_layers, directions, dropout, choice.options()
        )
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
        states = _states(cell, hx)
        if not _regular(cell, data, states, weights, bidirectional):
            return None
        choice = _tuned_choice(cell, data, batch_sizes, states, weights, num_layers, bidirectional)
        if not choice.fused:
            return None
        h0, c0 = (*states, None)[:2]
        directions, dropout = 2 if bidirectional else 1, dropout if train else 0.0
        results = layers.stack(
            cell, data, h0, c0, weights, has_biases, num_layers, directions, dropout, choice.options(batch_sizes)
        )
        return tuple(results)

    @policy.runs_eagerly
    def fused(*args: Any) -> Any:
        takes = packed if len(args) > 3 and isinstance(args[3], (list, tuple)) else padded
        try:
            result = takes(*args) if len(args) == 9 else None
        except RuntimeError:  # a size, dtype or layout does not fit
            original(*args)  # raises torch.nn's error
            raise
        return original(*args) if result is None else result

    return fused


def _states(cell: str, hx: Any) -> Sequence[Any]:
    """The states in hx; none where torch's function refuses hx (an LSTM's as one tensor)."""
    if cell != "lstm":
        return (hx,)
    return hx if isinstance(hx, (tuple, list)) else ()


def _regular(cell: str, x: Any, states: Any, weights: Any, bidirectional: Any) -> bool:
    return (
        len(states) == (2 if cell == "lstm" else 1)
        and not torch.compiler.is_exporting()  # a program of torch.nn's modules loads without this package
        and not policy.on_cuda(x)  # cuDNN's, as long as no device was measured
        and policy.autocast_dtype(x.device) is None
        and policy.fusible(x, *states, *weights)
        and isinstance(bidirectional, bool)
    )


_KERNELS = policy.Choice(True, "within patched()")


def _tuned_choice(
    cell: str, x: Tensor, batch_sizes: Tensor | None, states: Any, weights: Any, num_layers: int, bidirectional: bool
) -> policy.Choice:
    """What the user's table says; where it says nothing, nothing is measured, as torch.nn is patched."""
    sizes = tuned.table.hidden_sizes
    if not sizes or torch.compiler.is_compiling() or (H := states[-1].size(-1)) not in sizes:
        return _KERNELS
    T = x.size(0) if batch_sizes is None else batch_sizes.size(0)
    B = x.size(1) if batch_sizes is None else max(1, x.size(0) // max(1, T))
    P, directions = states[0].size(-1), 2 if bidirectional else 1
    choice = policy.tuned_plain(
        cell, x, T, B, H, P if P != H else 0, num_layers, directions, (*states, *weights),
        kind="sequence" if batch_sizes is None else "packed", may_measure=False,
    )  # fmt: skip
    return _KERNELS if choice is None else choice


def _cell(cell: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell or torch.rnn_relu_cell on the fused kernels."""
    count = 2 if cell == "lstm" else 1

    @policy.runs_eagerly
    def fused(input: Any, hx: Any, *weights: Tensor | None) -> Any:
        states = _states(cell, hx)
        h0, c0 = (*states, None, None)[:2]
        choice, may_be_torchs = None, torch.is_grad_enabled() or tuned.table.cell_hidden_sizes
        followed = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None  # sizes may be symbols
        if may_be_torchs and not followed and isinstance(h0, Tensor) and h0.dim() == 2:
            if len(states) == count and tuned.table.cell_hidden_sizes:
                choice = policy.tuned_cell(cell, input, h0.size(1), h0, c0, weights, may_measure=False)
            use_torch = policy.torch_trains_cell(cell, input, h0, weights) if choice is None else not choice.fused
            if use_torch:
                return original(input, hx, *weights)
        if len(states) == count and policy.plain_call(2, input, h0, c0, weights):
            five = (*(*weights, None, None)[:4], None)
            try:
                if choice is not None and choice.instance != PLANNED:
                    h, c = layers.step_of_instance(choice.instance, cell, input, h0, c0, five)
                else:
                    h, c = layers.step(cell, input, h0, c0, five)
            except RuntimeError:  # a size or dtype does not fit
                original(input, hx, *weights)  # raises torch.nn's error
                raise
            return (h, c) if cell == "lstm" else h
        if not _fits(cell, input, states, weights):
            # torch.nn's modules have unsqueezed both by the rank of the input.
            if any(isinstance(state, Tensor) and state.dim() not in (1, 2) for state in states):
                raise RuntimeError(
                    f"{cell}_cell: Expected input and hidden to have the same number of dimensions, "
                    f"got an unbatched input and hidden of sizes {[list(state.shape) for state in states]}"
                )
            return original(input, hx, *weights)
        new_h, _, new_c, *_ = layers.layer(cell, input, h0, c0, (*(*weights, None, None)[:4], None))
        return new_h if new_c is None else (new_h, new_c)

    return fused


def _fits(cell: str, input: Any, states: Any, weights: Any) -> bool:
    w_hh = weights[1]
    return (
        len(states) == (2 if cell == "lstm" else 1)
        and not torch.compiler.is_exporting()  # a program of torch.nn's modules loads without this package
        and not policy.on_cuda(input)  # the CUDA operators compute no cells
        and policy.autocast_dtype(input.device) is None
        and policy.fusible(input, *states, *weights)
        and input.dim() == 2
        and input.size(1) == weights[0].size(1)
        and all(s.shape == (input.size(0), w_hh.size(1)) for s in states)
    )


def _counted(function: Callable[..., Any], count: Callable[[str], None], name: str) -> Callable[..., Any]:
    """The function, which also counts its calls that return."""

    @policy.runs_eagerly
    def counted(*args: Any) -> Any:
        result = function(*args)
        if not torch.compiler.is_compiling():  # a graph cannot hold the counter
            count(name)
        return result

    return counted


def _build(tally: Tally | None = None) -> _Functions:
    """The replacements of torch.nn's recurrent functions; they count their calls if there is a tally."""
    functions = _Functions("fused_rnn.patch._VF")
    for cell in ("rnn_tanh", "rnn_relu", "lstm", "gru"):
        kind = cell.split("_")[0].upper()  # torch.nn's name of the class
        for name, replace, module in ((cell, _sequence, kind), (f"{cell}_cell", _cell, f"{kind}Cell")):
            original = getattr(torch._VF, name)
            if tally is None:
                fused = replace(cell, original)
            else:
                fused = _counted(replace(cell, _counted(original, tally.hand_over, module)), tally.call, module)
            _register_builtin(fused, f"aten::{name}")
            setattr(functions, name, fused)
    return functions


_fused = _build()
