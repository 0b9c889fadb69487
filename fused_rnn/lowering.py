"""How an exported program that holds ``fused_rnn::layer`` is lowered for consumers that do not know this operator.

Each consumer, and the operations that replace ``fused_rnn::layer`` for it:

- ``program.run_decompositions()``: core ATen operations, with which a program loads and runs where fused_rnn is not
  installed. A fixed number of steps is unrolled, as in torch.nn's own decompositions; a dynamic one becomes a ``scan``.
- ``torch.onnx.export(program)``: ONNX's LSTM, GRU and RNN; its Scan for projections and for options of ours. torch has
  no values for the first three, so ``verify=True`` of that function reports a difference: run the model instead.
- ``program.run_decompositions(operator_decompositions())``: ``fused_rnn::forward``, which needs no Python
  (``OPERATORS_LIBRARY``).
- torch.compile, AOTInductor and eager calls: ``fused_rnn::forward`` and ``backward`` (`fused_rnn.compiled`).

All but the third reach the same composite implementation, ``fused_rnn.compiled._layer``, which asks
`in_run_decompositions` for the first two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.functional import layer_norm, linear, pad

from fused_rnn import reference
from fused_rnn.options import NO_OPTIONS, LayerOptions
from fused_rnn.reference import GATES


def in_run_decompositions(x: Tensor) -> bool:
    """Whether ``ExportedProgram.run_decompositions`` is replacing ``fused_rnn::layer`` with something else now.

    For the time of its call it puts the decomposition of its table into the operator's Python kernels, which are empty
    otherwise. The flags of torch.compiler do not tell: AOTInductor sets them, too. The same function is called with a
    FakeTensor where only the shapes of results are asked for.
    """
    kernels = torch.ops.fused_rnn.layer.default.py_kernels
    return isinstance(x, FunctionalTensor) and torch._C.DispatchKey.CompositeImplicitAutograd in kernels


def decomposed(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    options: LayerOptions,
) -> list[Tensor]:
    """``fused_rnn::layer`` in core ATen operations, or in ONNX's while torch.onnx.export runs.

    Raises:
        NotImplementedError: the layer runs on a PackedSequence, whose rows of every step only values tell.
    """
    if options.batch_sizes is not None:
        raise NotImplementedError(
            "a PackedSequence cannot be lowered from fused_rnn::layer: export the model with a padded batch and the "
            "keyword lengths, or convert the module with to_torch() before torch.export"
        )
    exports_onnx = torch.onnx.is_in_onnx_export()
    is_plain = options._replace(lengths=None, recompute=False) == NO_OPTIONS
    if exports_onnx and x.dim() == 3 and weights[4] is None and is_plain:
        return _onnx(cell, x, h0, c0, weights, options.lengths)
    if x.dim() == 2:  # a cell, which has none of the options
        w_ih, w_hh, b_ih, b_hh, w_hr = weights
        assert w_ih is not None and w_hh is not None
        h, *c0s = _initial(cell, x, h0, c0, w_hh)
        h, c = reference.step(cell, x, h, c0s[0] if c0s else None, w_ih, w_hh, b_ih, b_hh, w_hr)
        return [h, x.new_empty(0), _or_empty(c, x)]
    x = x if options.lengths is None else reference.without_what_follows(x, options.lengths)
    unrolled = isinstance(x.size(0), int) and not exports_onnx
    results = [
        _direction(cell, x, h0, c0, weights, options, direction, unrolled) for direction in range(len(weights) // 5)
    ]
    final, sequences = (list(zip(*both, strict=True)) for both in zip(*results, strict=True))
    h_n, *c_n = (torch.stack(state) for state in final)
    y, *c_steps = (torch.cat(sequence, -1) for sequence in sequences)
    return [y, h_n, c_n[0] if c_n else x.new_empty(0), *c_steps]


def _direction(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    options: LayerOptions,
    direction: int,
    unrolled: bool,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """One direction of `fused_rnn.reference.layer` in core ATen: the final states, and the states of every step.

    The product of the input is taken out of the loop, as torch.nn's own decompositions do.
    """
    w_ih, w_hh, b_ih, b_hh, w_hr = weights[5 * direction : 5 * direction + 5]
    assert w_ih is not None and w_hh is not None
    H, P = w_hh.size(0) // GATES[cell], w_hh.size(1)
    resets, lengths, drop_h = options.resets, options.lengths, options.drop_h
    norm_ih, norm_hh, norm_c, norm_c_bias = (
        None if gain is None else gain[direction]
        for gain in (options.norm_ih, options.norm_hh, options.norm_c, options.norm_c_bias)
    )
    gates = linear(x, w_ih, b_ih if norm_ih is None else None)
    if norm_ih is not None:
        gates = layer_norm(gates, norm_ih.shape, norm_ih, b_ih, reference.NORM_EPS)

    optional = {
        "b_hh": b_hh, "w_hr": w_hr, "norm_hh": norm_hh, "norm_c": norm_c, "norm_c_bias": norm_c_bias,
        "drop_h": None if drop_h is None else drop_h[direction],
    }  # fmt: skip
    constants = {"w_hh": w_hh} | {name: t for name, t in optional.items() if t is not None}
    steps = {"gates": gates}
    for name, zone, width in (("zone_h", options.zone_h, P), ("zone_c", options.zone_c, H)):
        if zone is not None:
            (constants if zone.dim() == 1 else steps)[name] = zone.narrow(-1, direction * width, width)
    for name, state in (("fresh_h", options.reset_h), ("fresh_c", options.reset_c)):
        if state is not None:
            (constants if state.dim() == 3 else steps)[name] = state.select(-3, direction)
    if lengths is not None:
        steps["active"] = torch.arange(x.size(0), device=x.device).unsqueeze(1) < lengths
    if resets is not None:
        begins = resets if lengths is None else resets & steps["active"]
        # In the reverse direction the state is replaced between step t + 1 and step t.
        steps["begins"] = begins if direction == 0 else pad(begins, (0, 0, 0, 1))[1:]
    if direction == 1:
        steps = {name: step.flip(0) for name, step in steps.items()}
    h, c = (None if state is None else state[direction] for state in (h0, c0))

    def body(states: Sequence[Tensor], given: Mapping[str, Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        states, outputs = _step(cell, states, given)
        return states, outputs if options.c_sequence else outputs[:1]

    final, outputs = _loop(body, _initial(cell, x, h, c, w_hh), steps, constants, unrolled)
    return final, [output.flip(0) for output in outputs] if direction == 1 else outputs


def _initial(cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, w_hh: Tensor) -> list[Tensor]:
    """The state(s) of one direction before the first step, ``[B, P]`` and for the LSTM ``[B, H]``."""
    batch, H, P = x.size(-2), w_hh.size(0) // GATES[cell], w_hh.size(1)
    states = [x.new_zeros(batch, P) if h0 is None else h0]
    if cell == "lstm":
        states.append(x.new_zeros(batch, H) if c0 is None else c0)
    return states


def _step(
    cell: str, states: Sequence[Tensor], given: Mapping[str, Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The states after one step, and the step's results: these states, or zeros in rows that have ended."""
    get, zero = given.get, states[0].new_zeros(())
    begins, active = get("begins"), get("active")
    if begins is not None:
        fresh = [get("fresh_h"), get("fresh_c")]
        states = [
            torch.where(begins.unsqueeze(1), zero if new is None else new, old)
            for new, old in zip(fresh, states, strict=False)
        ]
    h, *c = states
    results: Any = reference.step(
        cell, given["gates"], h, c[0] if c else None, None, given["w_hh"], None, get("b_hh"), get("w_hr"), None,
        get("norm_hh"), get("norm_c"), get("norm_c_bias"), get("drop_h"), get("zone_h"), get("zone_c"),
    )  # fmt: skip
    new = results[: len(states)]
    if active is None:
        return new, new
    goes_on = active.unsqueeze(1)
    return (
        [torch.where(goes_on, after, before) for after, before in zip(new, states, strict=True)],
        [torch.where(goes_on, after, zero) for after in new],
    )


def _loop(
    body: Callable[[Sequence[Tensor], Mapping[str, Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]],
    initial: Sequence[Tensor],
    steps: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    unrolled: bool,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The final states and the stacked outputs of `body`, which is called with the states and the tensors of one step.

    Args:
        steps: tensors whose first dimension is time.
        constants: tensors that every step reads.
        unrolled: whether the graph gets the operations of every step; otherwise it gets a loop, ``scan``.
    """
    if unrolled:
        states, outputs = initial, []
        for step in zip(*(tensor.unbind(0) for tensor in steps.values()), strict=True):
            states, output = body(states, {**constants, **dict(zip(steps, step, strict=True))})
            outputs.append(output)
        return states, [torch.stack(output) for output in zip(*outputs, strict=True)]

    # The operator under torch's scan(), which cannot be called while a graph is traced: it would compile `combine`.
    from torch._higher_order_ops.scan import scan_op

    def combine(*operands: Tensor) -> list[Tensor]:
        given = dict(zip((*steps, *constants), operands[len(initial) :], strict=True))
        states, outputs = body(operands[: len(initial)], given)
        return [*states, *(output.clone() for output in outputs)]  # no result may share another's memory

    results = scan_op(combine, list(initial), list(steps.values()), tuple(constants.values()))
    return results[: len(initial)], results[len(initial) :]


_ONNX = {
    "lstm": ("LSTM", (0, 3, 1, 2)),
    "gru": ("GRU", (1, 0, 2)),
    "rnn_tanh": ("RNN", (0,)),
    "rnn_relu": ("RNN", (0,)),
}
"""ONNX's operator, and where its gates (LSTM ``i, o, f, g``; GRU ``z, r, n``) are in torch.nn's order."""


def _onnx(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    lengths: Tensor | None,
) -> list[Tensor]:
    """ONNX's operator for a whole layer, whose number of steps may be dynamic; only shapes are computed here."""
    operator, order = _ONNX[cell]
    T, B, _ = x.shape
    D = len(weights) // 5
    w_ih, w_hh, b_ih, b_hh = ([w for w in weights[i::5] if w is not None] for i in range(4))
    H = w_hh[0].size(1)

    def reordered(weight: Tensor) -> Tensor:
        # Slices: the exporter computes those of constants, but not the outputs of a split.
        return torch.cat([weight[i * H : (i + 1) * H] for i in order])

    W, R = (torch.stack([reordered(w) for w in both]) for both in (w_ih, w_hh))
    bias = None
    if b_ih:
        bias = torch.stack([torch.cat((reordered(b), reordered(c))) for b, c in zip(b_ih, b_hh, strict=True)])
    sequence_lens = None if lengths is None else lengths.to(torch.int32)
    states = [h0, c0] if cell == "lstm" else [h0]
    inputs = [x, W, R, bias, sequence_lens, *states]
    attributes: dict[str, Any] = {"hidden_size": H, "direction": "forward" if D == 1 else "bidirectional"}
    if cell == "gru":
        attributes["linear_before_reset"] = 1
    elif cell != "lstm":
        attributes["activations"] = ["Relu" if cell == "rnn_relu" else "Tanh"] * D
    y, *final = torch.onnx.ops.symbolic_multi_out(
        operator, inputs, attributes, dtypes=[x.dtype] * (1 + len(states)),
        shapes=[(T, D, B, H), *[(D, B, H)] * len(states)],
    )  # fmt: skip
    if lengths is not None:  # ONNX gives a row without steps zeros, not its initial state
        taken = (lengths > 0).unsqueeze(1)
        zero = x.new_zeros(())
        final = [torch.where(taken, s, zero if i is None else i) for s, i in zip(final, states, strict=True)]
    return [y.transpose(1, 2).flatten(2), final[0], _or_empty(final[1] if len(final) > 1 else None, x)]


def _or_empty(state: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if state is None else state
