"""From one layer to the whole: layers, directions, dropout between layers; and the modules as functions.

This is the readable algorithm of torch.nn's RNN, LSTM and GRU; `fused_rnn.ops.layer` makes it fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fused_rnn import ops
from fused_rnn.cell_info import GATES
from fused_rnn.reference import Norms


def stack(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_sizes: Tensor | None = None,
    extras: Extras | None = None,
    layer: Callable[..., Any] = ops.layer,
) -> tuple[Tensor, ...]:
    """All layers of a torch.nn.RNN, LSTM or GRU.

    Args:
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        x: ``[T, B, I]``, or ``[N, I]`` with ``batch_sizes`` (a packed sequence's data).
        states: h0 ``[L*D, B, P]``, and for the LSTM c0 ``[L*D, B, H]``; None for zeros.
        weights: torch.nn's ``_flat_weights``: per layer and direction ``w_ih, w_hh[, b_ih, b_hh][, w_hr]``.
        has_biases, num_layers, dropout, bidirectional: as in torch.nn; dropout only acts with ``train``.
        batch_sizes: int64 ``[T]`` or None.
        extras: what torch.nn does not have.
        layer: what computes one layer; `fused_rnn.reference.layer` makes this the specification.

    Returns:
        y ``[T, B, D*P]`` (or ``[N, D*P]``), h_n ``[L*D, B, P]`` and for the LSTM c_n ``[L*D, B, H]``; with
        ``extras.state_sequence`` then h, and for the LSTM c, of every step: ``[T, L*D, B, ...]`` (``[N, L*D, ...]``).
    """
    D = 2 if bidirectional else 1
    count = len(weights) // (num_layers * D)  # of a direction
    widths: Any = (None, None)
    if extras is not None and extras.side_by_side:
        w_hh = weights[1 :: D * count]
        widths = [w.size(1) for w in w_hh], [w.size(0) // GATES[cell] for w in w_hh]
    h0 = _by_layer(states[0], widths[0], num_layers)
    c0 = _by_layer(states[1] if len(states) > 1 else None, widths[1], num_layers)
    h_n, c_n = [], []
    sequences: list[tuple[Tensor, ...]] = []
    more: dict[str, Any] = {}
    if extras is not None:
        at_resets = [
            _by_layer(s, w, num_layers) for s, w in zip((*extras.reset_states, None, None), widths, strict=False)
        ]
    for index in range(num_layers):
        if index > 0 and train and dropout > 0:
            x = torch.dropout(x, dropout, True)
        of_layer = weights_of_layer(weights, index, num_layers, D, has_biases)
        if extras is not None:
            more = extras.of_layer(index, cell, *(states[index] for states in at_resets))
            more |= extras.masks(cell, x, of_layer, batch_sizes, train)
        x, h, c, *c_steps = layer(cell, x, h0[index], c0[index], of_layer, batch_sizes, **more)
        h_n.append(h)
        c_n.append(c)
        sequences.append((x, *c_steps))
    dim = 0 if widths[0] is None else -1
    results = (x, _join(h_n, dim), _join(c_n, dim)) if cell == "lstm" else (x, _join(h_n, dim))
    if extras is None or not extras.state_sequence:
        return results
    kinds = zip(*sequences, strict=True)
    return *results, *(_join([_by_direction(s, D) for s in kind], dim or 1) for kind in kinds)


@dataclass(frozen=True)
class Extras:
    """What torch.nn does not have; the meaning of all of it is `fused_rnn.reference.layer`'s.

    Attributes:
        resets: bool ``[T, B]`` or ``[N]``.
        reset_states: what replaces each state, ``[L*D, B, ...]`` or ``[T, L*D, B, ...]``; None: zeros.
        lengths: integers ``[B]`` on x's device: the steps of each row.
        state_sequence: whether the states of every step are wanted.
        norms: of each layer the gains of layer normalisation; empty: none.
        recurrent_dropout: rate, in training.
        zoneout: rates of h and c; the masks' expectation takes their place outside of training.
        recompute: whether backward computes forward again rather than keeping what it needs of it.
        side_by_side: whether a state holds the layers in its last dimension, ``[D, B, ...]``, not in its first.
    """

    resets: Tensor | None = None
    reset_states: Sequence[Tensor | None] = ()
    lengths: Tensor | None = None
    state_sequence: bool = False
    norms: Sequence[Norms] = ()
    recurrent_dropout: float = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)
    recompute: bool = False
    side_by_side: bool = False

    def of_layer(self, index: int, cell: str, reset_h: Tensor | None, reset_c: Tensor | None) -> dict[str, Any]:
        """Arguments of one layer but its masks; the states are its own."""
        found: dict[str, Any] = {}
        if self.resets is not None:
            found = {"resets": self.resets, "reset_h": reset_h, "reset_c": reset_c}
        if self.lengths is not None:
            found["lengths"] = self.lengths
        if self.state_sequence and cell == "lstm":
            found["c_sequence"] = True
        if self.norms:
            found["norms"] = self.norms[index]
        if self.recompute:
            found["recompute"] = True
        return found

    def masks(
        self, cell: str, x: Tensor, weights: Sequence[Tensor | None], batch_sizes: Tensor | None, train: bool
    ) -> dict[str, Tensor]:
        """Draws the masks of one layer, whose five weights of each direction these are."""
        found: dict[str, Tensor] = {}
        w_hh: Any = weights[1]
        D, P, H = len(weights) // 5, w_hh.size(1), w_hh.size(0) // GATES[cell]
        if self.recurrent_dropout > 0 and train:
            batch = int(batch_sizes[0]) if batch_sizes is not None else x.size(1)
            keep = 1 - self.recurrent_dropout
            found["drop_h"] = x.new_empty(D, batch, P).bernoulli_(keep).div_(keep)
        for name, rate, width in zip(("zone_h", "zone_c"), self.zoneout, (D * P, D * H), strict=True):
            if rate > 0 and train:
                found[name] = x.new_empty(*x.shape[:-1], width).bernoulli_(1 - rate)
            elif rate > 0:
                found[name] = x.new_full((width,), 1 - rate)
        return found


def weights_of_layer(
    weights: Sequence[Tensor], index: int, num_layers: int, D: int, has_biases: bool
) -> tuple[Tensor | None, ...]:
    """Of torch.nn's ``_flat_weights``, five of each direction."""
    count = len(weights) // (num_layers * D)  # of a direction
    start = index * D * count
    of_layer = _five(weights[start : start + count], has_biases)
    return of_layer if D == 1 else of_layer + _five(weights[start + count : start + 2 * count], has_biases)


def _five(weights: Sequence[Tensor], has_biases: bool) -> tuple[Tensor | None, ...]:
    """``w_ih, w_hh, b_ih, b_hh, w_hr``, None where absent."""
    five = tuple(weights) if has_biases else (*weights[:2], None, None, *weights[2:])
    return five if len(five) == 5 else (*five, None)


def _by_layer(state: Tensor | None, widths: list[int] | None, num_layers: int) -> Sequence[Tensor | None]:
    """``[..., D, B, size]`` of every layer; `widths` are the sizes of layers that lie side by side."""
    if state is None or num_layers == 1:
        return (state,) * num_layers
    return state.chunk(num_layers, -3) if widths is None else state.split(widths, -1)


def _by_direction(sequence: Tensor, D: int) -> Tensor:
    """``[T, B, D*P]`` as ``[T, D, B, P]``, ``[N, D*P]`` as ``[N, D, P]``."""
    rows: Tensor = sequence.unflatten(-1, (D, -1))
    return rows.transpose(1, 2) if rows.dim() == 4 else rows


def _join(states: list[Tensor], dim: int) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(states, dim)


def rnn(input: Any, weights: Sequence[Tensor], hx: Any = None, *, nonlinearity: str = "tanh", **options: Any) -> Any:
    """torch.nn.RNN's function of plain tensors, as `lstm` is the LSTM's; `nonlinearity` is "tanh" or "relu"."""
    return _call("RNN", input, weights, hx, nonlinearity=nonlinearity, **options)


def gru(input: Any, weights: Sequence[Tensor], hx: Any = None, **options: Any) -> Any:
    """torch.nn.GRU's function of plain tensors, as `lstm` is the LSTM's."""
    return _call("GRU", input, weights, hx, **options)


def lstm(input: Any, weights: Sequence[Tensor], hx: Any = None, **options: Any) -> Any:
    """torch.nn.LSTM's function of plain tensors, for weights that are computed: dropped, tied, made by another network.

    Args:
        input, hx: as the module's forward takes them.
        weights: of every layer and direction ``w_ih, w_hh[, b_ih, b_hh][, w_hr]``, torch.nn's order of parameters.
            Sizes and the number of layers are theirs.
        options: ``bidirectional``, ``batch_first``, ``dropout``, ``training`` as in torch.nn (False, False, 0.0,
            False); the keywords of the module's forward (``resets`` and so on); of its constructor ``zoneout``,
            ``recurrent_dropout``, ``weight_dropout``, ``recompute``; and for layer normalisation ``norms``, its gains
            of every layer and direction ``norm_ih, norm_hh[, norm_c, norm_c_bias]``.

    Returns:
        What the module's forward does.

    Raises:
        ValueError: the number or the shapes of the weights or gains are no module's.
        TypeError: an option is unknown.
        ValueError, RuntimeError: as the module's forward.

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
    from fused_rnn import modules, segments  # both are built on this file

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
    gates = {"RNN": 1, "LSTM": 4, "GRU": 3}[name]
    bias = len(weights) > 2 and weights[2].dim() == 1
    shapes = _constant(tuple(tuple(w.shape) for w in weights))
    rows, width = shapes[1]
    projected = name == "LSTM" and width * gates != rows
    count = (2 + 2 * bias + projected) * (2 if bidirectional else 1)  # of a layer
    sizes = tuple(shape[0] // gates for shape in shapes[1::count])
    attributes, of_weights, of_norms = _description(
        name, shapes[0][1], sizes[0] if len(set(sizes)) == 1 else sizes, len(sizes), bias, batch_first,
        _constant(dropout), bidirectional, width if projected else 0, norms is not None,
        tuple((option, _constant(value)) for option, value in of_class.items()),
    )  # fmt: skip
    parameters: dict[str, Tensor] = {}
    for what, given, of_module in (("weights", weights, of_weights), ("norms", list(norms or ()), of_norms)):
        expected, got = [shape for _, shape in of_module], [tuple(w.shape) for w in given]
        if got != expected:
            raise ValueError(f"{name.lower()}: expected {what} of shapes {expected}, got {got}")
        parameters |= {key: w for (key, _), w in zip(of_module, given, strict=True)}
    module: Any = object.__new__(getattr(modules, name))
    module.__dict__.update(dict(attributes), training=training, _flat_weights=weights, _parameters=parameters)
    return segments.run(module, input, hx, resets, reset_state, lengths, return_state_sequence)


def _constant(value: Any) -> Any:
    """A size, a rate, or a tuple of these, even where a compiler has made symbols of them: modules have none either."""
    if isinstance(value, (tuple, list)):
        return tuple([_constant(v) for v in value])
    if not torch.compiler.is_compiling() or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return value
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # slow to import

    return guard_scalar(value)


_Shapes = tuple[tuple[str, tuple[int, ...]], ...]
_Description = tuple[tuple[tuple[str, Any], ...], _Shapes, _Shapes]


def _description(*arguments: Any) -> _Description:
    return _described(*arguments)


# What torch.compiler.assume_constant_result does, which imports the compiler: it calls this, and does not look inside,
# where a module is made.
_description._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256, typed=True)
def _described(
    name: str, input_size: int, hidden_size: Any, num_layers: int, bias: bool, batch_first: bool, dropout: float,
    bidirectional: bool, proj_size: int, layer_norm: bool, of_class: tuple[tuple[str, Any], ...],
) -> _Description:  # fmt: skip
    """What a module of these sizes has: its attributes, and the names and shapes of its weights and of its gains."""
    from fused_rnn import modules

    options = dict(of_class) | ({"proj_size": proj_size} if proj_size else {})
    options |= {"layer_norm": True} if layer_norm else {}
    module = getattr(modules, name)(
        input_size, hidden_size, num_layers, bias=bias, batch_first=batch_first, dropout=dropout,
        bidirectional=bidirectional, device="meta", **options,
    )  # fmt: skip
    names = module._flat_weights_names
    attributes = {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str, tuple))}
    attributes |= {"_flat_weights_names": tuple(names)}
    del attributes["__module__"]
    of_weights, of_norms = (
        tuple((key, tuple(module._parameters[key].shape)) for key in keys)
        for keys in (names, [key for key, _ in module._norm_shapes()])
    )
    return tuple(attributes.items()), of_weights, of_norms
