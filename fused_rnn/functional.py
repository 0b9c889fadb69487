"""torch.nn's RNN, LSTM and GRU as functions of plain tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fused_rnn import call, modules
from fused_rnn.cell_info import GATES
from fused_rnn.spec import Spec


def rnn(input: Any, weights: Sequence[Tensor], hx: Any = None, *, nonlinearity: str = "tanh", **options: Any) -> Any:
    """Compute an RNN with the weights given as tensors. `nonlinearity` is "tanh" or "relu"; otherwise as `lstm`."""
    return _call("RNN", input, weights, hx, nonlinearity=nonlinearity, **options)


def gru(input: Any, weights: Sequence[Tensor], hx: Any = None, **options: Any) -> Any:
    """Compute a GRU with the weights given as tensors. Arguments, results and errors are those of `lstm`."""
    return _call("GRU", input, weights, hx, **options)


def lstm(input: Any, weights: Sequence[Tensor], hx: Any = None, **options: Any) -> Any:
    """Compute an LSTM with the weights given as tensors, which may be computed: dropped, tied, or made by a network.

    Args:
        input, hx: the input and the initial states, as for `fused_rnn.LSTM.forward`.
        weights: the tensors ``w_ih, w_hh[, b_ih, b_hh][, w_hr]`` of every layer and direction, in the order of
            torch.nn's parameters. They determine the sizes and the number of layers.
        options: ``bidirectional=False``, ``batch_first=False``, ``dropout=0.0`` and ``training=False``, as in torch.nn;
            the keywords of `fused_rnn.LSTM.forward` (``resets``, ``reset_state``, ``lengths``,
            ``return_state_sequence``); the constructor's ``zoneout``, ``recurrent_dropout``, ``weight_dropout`` and
            ``recompute``; and ``norms`` for layer normalisation, the gains
            ``norm_ih, norm_hh[, norm_c, norm_c_bias]`` of every layer and direction.

    Returns:
        The results of `fused_rnn.LSTM.forward`.

    Raises:
        ValueError: no module has weights or gains of this number or of these shapes.
        TypeError: an option is unknown.
        ValueError, RuntimeError: sizes or dtypes do not match, as in `fused_rnn.LSTM.forward`.

    Example:
        >>> import torch
        >>> from fused_rnn import functional
        >>> w_ih, w_hh, x = torch.randn(20, 3), torch.randn(20, 5), torch.randn(7, 2, 3)
        >>> output, (h_n, c_n) = functional.lstm(x, [w_ih, torch.dropout(w_hh, 0.5, True)])
        >>> output.shape, c_n.shape
        (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """
    return _call("LSTM", input, weights, hx, **options)


def _call(
    name: str,
    input: Any,
    weights: Sequence[Tensor],
    hx: Any,
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    resets: Tensor | None = None,
    reset_state: Any = None,
    lengths: Tensor | None = None,
    return_state_sequence: bool = False,
    norms: Sequence[Tensor] | None = None,
    **of_class: Any,
) -> Any:
    known = {"zoneout", "recurrent_dropout", "weight_dropout", "recompute"}
    unknown = set(of_class) - (known | {"nonlinearity"} if name == "RNN" else known)
    if unknown:
        raise TypeError(f"{name.lower()}() got an unexpected keyword argument {sorted(unknown)[0]!r}")
    weights = list(weights)
    if norms is not None and not all(isinstance(norm, Tensor) for norm in norms):
        raise ValueError(f"{name.lower()}: expected norms to be tensors, got {[type(norm).__name__ for norm in norms]}")
    if len(weights) < 2 or not all(isinstance(w, Tensor) for w in weights) or any(w.dim() != 2 for w in weights[:2]):
        raise ValueError(
            f"{name.lower()}: expected weights to be tensors that begin with w_ih and w_hh of 2 dimensions"
        )
    gates = GATES["rnn_tanh" if name == "RNN" else name.lower()]
    bias = len(weights) > 2 and weights[2].dim() == 1
    shapes = tuple([tuple(w.shape) for w in weights])
    if torch.compiler.is_compiling():
        shapes, dropout = _constant(shapes), _constant(dropout)
        of_class = {option: _constant(value) for option, value in of_class.items()}
    rows, width = shapes[1]
    projected = name == "LSTM" and width * gates != rows
    count = (2 + 2 * bias + projected) * (2 if bidirectional else 1)  # of a layer
    sizes = tuple(shape[0] // gates for shape in shapes[1::count])
    configuration, weight_shapes, norm_shapes = _description(
        name, shapes[0][1], sizes[0] if len(set(sizes)) == 1 else sizes, len(sizes), bias, batch_first,
        dropout, bidirectional, width if projected else 0, norms is not None,
        tuple((option, tuple(value) if isinstance(value, list) else value) for option, value in of_class.items()),
    )  # fmt: skip
    for what, given, expected in (("weights", weights, weight_shapes), ("norms", list(norms or ()), norm_shapes)):
        actual = [tuple(w.shape) for w in given]
        if actual != list(expected):
            raise ValueError(f"{name.lower()}: expected {what} of shapes {list(expected)}, got {actual}")
    spec = Spec(**dict(configuration), training=training, _flat_weights=weights, norms=list(norms or ()))
    return call.run(spec, None, input, hx, resets, reset_state, lengths, return_state_sequence)


def _constant(value: Any) -> Any:
    """A size, a rate, or a tuple of these; a compiler's symbols become constants, as a module's sizes are."""
    if isinstance(value, (tuple, list)):
        return tuple([_constant(v) for v in value])
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return value
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # slow to import

    return guard_scalar(value)


_Shapes = tuple[tuple[int, ...], ...]
_Description = tuple[tuple[tuple[str, Any], ...], _Shapes, _Shapes]
_CONFIGURATION = tuple(
    f.name for f in fields(Spec) if f.name not in ("training", "backend", "_flat_weights", "norms", "checks")
)


def _description(*arguments: Any) -> _Description:
    return _described(*arguments)


# As torch.compiler.assume_constant_result does, which imports the compiler: a compiler calls this, and does not trace
# it, because a module is made in it.
_description._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256, typed=True)
def _described(
    name: str, input_size: int, hidden_size: Any, num_layers: int, bias: bool, batch_first: bool, dropout: float,
    bidirectional: bool, proj_size: int, layer_norm: bool, of_class: tuple[tuple[str, Any], ...],
) -> _Description:  # fmt: skip
    """The fields of a `Spec` with this configuration, and the shapes of its weights and of its normalisation's gains.

    Making a module on the meta device checks the configuration as the class does.
    """
    options = dict(of_class) | ({"proj_size": proj_size} if proj_size else {})
    options |= {"layer_norm": True} if layer_norm else {}
    module = getattr(modules, name)(
        input_size, hidden_size, num_layers, bias=bias, batch_first=batch_first, dropout=dropout,
        bidirectional=bidirectional, device="meta", **options,
    )  # fmt: skip
    spec: Spec = module._spec()
    weight_shapes, norm_shapes = (
        tuple(tuple(t.shape) for t in tensors) for tensors in (spec._flat_weights, spec.norms)
    )
    return tuple((key, getattr(spec, key)) for key in _CONFIGURATION), weight_shapes, norm_shapes
