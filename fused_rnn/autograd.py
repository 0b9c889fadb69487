"""The graph's nodes: of one layer with any options, and of all layers of a plain module on a CPU.

An ``autograd.Function`` around plain operators costs a third of the time per call that
``torch.library.register_autograd`` does, and a call that needs no gradient does without it. All small layers of a
module share one node, whose passes are C++: one for each, in Python, would take longer than what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fused_rnn import _C, input_gates, operators, reference
from fused_rnn.cell_info import NAMES
from fused_rnn.operators import BATCH_FIRST, STEP, TIME_FIRST, UNBATCHED
from fused_rnn.options import NO_OPTIONS, LayerOptions, constants_of, flags_of
from fused_rnn.policy import FAKE_TYPES


class Inputs(NamedTuple):
    """The tensors of one call that the options do not hold, and their order in the autograd function."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: tuple[Tensor | None, ...]


_Forward: TypeAlias = "tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]"


def run_forward(cell: str, inputs: Inputs, options: LayerOptions, train: bool) -> _Forward:
    """y, h_n, c_n, c of every step if the options ask for it, and the tensors that backward reads."""
    x, h0, c0, weights = inputs
    kept: list[Tensor] = []
    if options.norm_ih is not None:
        x, kept = input_gates.forward(x, options.norm_ih, weights[::5])  # type: ignore[arg-type]  # never None
        weights = _without_w_ih(weights)
    y, h_n, c_n, reserve, c_sequence = operators.forward(cell, x, h0, c0, weights, options, train)
    return y, h_n, c_n, (c_sequence,) if options.c_sequence else (), (reserve, *kept)


def _run_backward(
    cell: str,
    grads: Sequence[Tensor | None],
    inputs: Inputs,
    options: LayerOptions,
    kept: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, h0, c0, the weights and the options that may need one; some may be there without need."""
    x, h0, _, weights = inputs
    count = len(weights)
    if options is NO_OPTIONS:
        return operators.backward(cell, grads, x, kept[0], weights, options, needs, 0)[: 3 + count]
    need_reset_h, need_reset_c, *_, need_norm_ih = needs[3 + count :]
    reset_states = [s for s, need in ((options.reset_h, need_reset_h), (options.reset_c, need_reset_c)) if need]
    reset_steps = 0 if not reset_states else -1 if reset_states[0].dim() == 4 else 1  # type: ignore[union-attr]
    if options.batch_sizes is not None and type(x) in FAKE_TYPES and grads[1] is None is grads[2] and h0 is not None:
        grads = (grads[0], torch.zeros_like(h0), *grads[2:])  # tells a compiler how many rows there are
    dnorm_ih = None
    if options.norm_ih is None:
        dx, dh0, dc0, *rest = operators.backward(cell, grads, x, kept[0], weights, options, needs, reset_steps)
    else:
        needs_w = needs[3 : 3 + count : 5]
        of_operator = [needs[0] or need_norm_ih or any(needs_w), *needs[1:]]
        of_operator[3 : 3 + count : 5] = [False] * len(needs_w)
        gates = x.new_empty(()).expand(*x.shape[:-1], options.norm_ih.numel())  # never read
        dgates, dh0, dc0, *rest = operators.backward(
            cell, grads, gates, kept[0], _without_w_ih(weights), options, of_operator, reset_steps
        )
        w_ih: Any = weights[::5]
        dx, rest[:count:5], dnorm_ih = input_gates.backward(
            dgates, x, options.norm_ih, w_ih, kept[1:], (needs[0], needs_w, need_norm_ih)
        )
    dreset_h, dreset_c, *dnorms = rest[count:]
    return [dx, dh0, dc0, *rest[:count], dreset_h, dreset_c, *dnorms, dnorm_ih]


def _without_w_ih(weights: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if index % 5 == 0 else w for index, w in enumerate(weights))


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: str, count: int, options: LayerOptions, *tensors: Any) -> Any:
        """`tensors` are x, h0, c0, `count` weights and, with options, those that are differentiable."""
        recompute = options.recompute
        x, h0, c0 = tensors[:3]
        inputs = Inputs(x, h0, c0, tensors[3 : 3 + count])
        y, h_n, c_n, more, kept = run_forward(cell, inputs, options, not recompute)
        constants: tuple[Any, ...] = () if options is NO_OPTIONS else constants_of(options)
        ctx.cell, ctx.count, ctx.flags = cell, count, flags_of(options)
        _C.node_save(ctx, () if recompute else kept, constants, tensors, count // 5, recompute)
        if cell != "lstm":
            ctx.mark_non_differentiable(c_n)
        return y, h_n, c_n, *more

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs, count = ctx.needs_input_grad[3:], ctx.count
        again = _C.node_is_again(grads, ctx.constants > 0)
        kept, constants, tensors = _C.node_saved(ctx, again)
        x, h0, c0 = tensors[:3]
        options = LayerOptions(*constants, *tensors[3 + count :], *ctx.flags) if constants else NO_OPTIONS
        if again:

            def outputs(x: Tensor, h0: Any, c0: Any, *rest: Any) -> Sequence[Tensor | None]:
                of_call = options
                if constants:
                    of_call = LayerOptions(*constants, *rest[count:], *ctx.flags)
                return reference.layer(ctx.cell, x, h0, c0, rest[:count], of_call)

            return None, None, None, *_differentiable_backward(outputs, tensors, needs, grads)
        inputs = Inputs(x, h0, c0, tuple(tensors[3 : 3 + count]))
        if options.recompute:
            kept = run_forward(ctx.cell, inputs, options, True)[-1]
        gradients = _run_backward(ctx.cell, grads, inputs, options, kept, needs)
        return None, None, None, *[g if need else None for g, need in zip(gradients, needs, strict=True)]


class Refused(RuntimeError):
    """A tensor does not fit the others; not an error of the user's own code, such as a hook, which also runs here."""


class _Stack(torch.autograd.Function):
    """All layers of a plain module, or a cell: csrc/bindings/node.cpp.

    The arguments are the call, whose parts csrc/bindings/module_call.h names, x, h0, c0 and all weights, torch.nn's
    ``_flat_weights``.
    """

    forward = staticmethod(_C.node_forward)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _C.node_backward(ctx, *grads)  # not a method itself: compiled autograd traces none of C++


# Function.apply without its handling of functorch transforms, in which the policy does not choose the operators.
layer: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Layer).apply
stack: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Stack).apply


# The node of all layers where a derivative is itself to be differentiated; and where a profiler or a mode would see the
# operators, or a tensor is one that only torch can read: the same by the operator of one layer, which keeps the same.


def backward_again(
    call: tuple[int, int, int, bool, bool, int],
    resets: Tensor | None,
    lengths: Tensor | None,
    tensors: Sequence[Any],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of `tensors` that are needed, as a differentiable function of them and of the outputs' gradients.

    Args:
        call: the cell's number, layers, directions, has_biases, projected and layout.
    """
    cell, num_layers, directions, has_biases, _, layout = call
    name, options, of_states = NAMES[cell], _options(resets, lengths, layout), _layout_of_states(num_layers, layout)

    def outputs(x: Tensor, h0: Any, c0: Any, *weights: Any) -> Sequence[Tensor | None]:
        if num_layers == 0:
            return reference.layer(name, x, h0, c0, reference.layer_weights(weights, 0, 1, 1, has_biases))
        x, h0, c0 = _time_first(x, layout), _time_first(h0, of_states), _time_first(c0, of_states)
        y, *states = reference.stack(name, x, h0, c0, weights, has_biases, num_layers, directions, options=options)
        return _laid_out(y, layout), *[_laid_out(state, of_states) for state in states]

    return _differentiable_backward(outputs, tensors, needs, grads)


def forward_in_turn(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    cell: int,
    num_layers: int,
    directions: int,
    has_biases: bool,
    projected: bool,
    layout: int,
    resets: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """`stack` of csrc/bindings/cpu_operators.h, in training.

    Raises:
        Refused: a tensor does not fit the others.
    """
    name = NAMES[cell]
    try:
        if num_layers == 0:
            of_layer = reference.layer_weights(weights, 0, 1, 1, has_biases)
            y, _, c_n, reserve, _ = operators.forward(name, x, h0, c0, of_layer, NO_OPTIONS, True)
            return y, None, c_n if name == "lstm" else None, None, reserve
        of_states, options = _layout_of_states(num_layers, layout), _options(resets, lengths, layout)
        h0, c0 = _time_first(h0, of_states), _time_first(c0, of_states)
        h_layers, c_layers = reference.by_layer(h0, None, 0, num_layers), reference.by_layer(c0, None, 1, num_layers)
        y, of_layers = _time_first(x, layout), []
        for index in range(num_layers):
            of_layer = reference.layer_weights(weights, index, num_layers, directions, has_biases)
            y, *others = operators.forward(name, y, h_layers[index], c_layers[index], of_layer, options, True)
            of_layers.append((y, *others[:3]))
        ys, *kinds = zip(*of_layers, strict=True)
        h_n, c_n, reserve = map(torch.cat, kinds)
        # In place: what a node returns may be written to, unless it is a view.
        of_layouts = (y, layout), (h_n, of_states), (c_n if name == "lstm" else None, of_states)
        between = torch.cat(ys[:-1]) if num_layers > 1 else None
        return *[_laid_out_in_place(tensor, of_tensor) for tensor, of_tensor in of_layouts], between, reserve
    except (RuntimeError, IndexError) as error:
        raise Refused(str(error)) from error


def backward_in_turn(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    between: Tensor | None,
    reserve: Tensor,
    weights: Sequence[Tensor],
    cell: int,
    num_layers: int,
    directions: int,
    has_biases: bool,
    projected: bool,
    layout: int,
    resets: Tensor | None,
    lengths: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """`stack_backward` of csrc/bindings/cpu_operators.h."""
    of_states, options = _layout_of_states(num_layers, layout), _options(resets, lengths, layout)
    num_layers = num_layers or 1
    x, dy = _time_first(x, layout), _time_first(dy, layout)
    dstates = [_time_first(d, of_states) for d in (dh_n, dc_n)]
    layer_inputs = (x, *(between.split(x.size(0)) if between is not None else ()))
    found: list[Tensor | None] = [None] * len(needs)
    found_states: list[list[Tensor]] = [[], []]
    for index in reversed(range(num_layers)):
        rows = slice(index * directions, (index + 1) * directions)
        of_layer, places = (
            reference.layer_weights(all_weights, index, num_layers, directions, has_biases)
            for all_weights in (weights, range(3, len(needs)))
        )
        needs_of_layer = [place is not None and needs[place] for place in places]
        need_dx = any(needs[: places[0]]) if index > 0 else needs[0]  # of the layers below, or x itself
        dy, *others = operators.backward(
            NAMES[cell],
            (dy, *[None if d is None else d[rows] for d in dstates]),
            layer_inputs[index],
            reserve[rows],
            of_layer,
            options,
            (need_dx, *needs[1:3], *needs_of_layer),
            0,
        )
        for kind, d in zip(found_states, others, strict=False):
            if d is not None:
                kind.insert(0, d)
        for place, need, d in zip(places, needs_of_layer, others[2:], strict=False):
            if need:
                found[place] = d
        if not need_dx:
            break
    found[:3] = (
        _laid_out(dy, layout),
        *[_laid_out(torch.cat(kind), of_states) if kind else None for kind in found_states],
    )
    return [d if need else None for d, need in zip(found, needs, strict=True)]


# Views of a caller's tensors as the operators' [T, B, ...], and back, as in csrc/bindings/module_call.h.


def _layout_of_states(num_layers: int, layout: int) -> int:
    """That of h and c, whose [L*D, B, ...] takes the place of [T, B, ...]."""
    return STEP if num_layers == 0 else UNBATCHED if layout == UNBATCHED else TIME_FIRST


def _time_first(tensor: Any, layout: int) -> Any:
    if tensor is None or layout == TIME_FIRST:
        return tensor
    return tensor.transpose(0, 1) if layout == BATCH_FIRST else tensor.unsqueeze(_MISSING[layout])


def _laid_out(sequence: Any, layout: int) -> Any:
    if sequence is None or layout == TIME_FIRST:
        return sequence
    return sequence.transpose(0, 1) if layout == BATCH_FIRST else sequence.squeeze(_MISSING[layout])


def _laid_out_in_place(sequence: Any, layout: int) -> Any:
    if sequence is None or layout == TIME_FIRST:
        return sequence
    return sequence.transpose_(0, 1) if layout == BATCH_FIRST else sequence.squeeze_(_MISSING[layout])


_MISSING = {UNBATCHED: 1, STEP: 0}  # dimension


def _options(resets: Tensor | None, lengths: Tensor | None, layout: int) -> LayerOptions:
    if resets is None and lengths is None:
        return NO_OPTIONS
    return LayerOptions(resets=_time_first(resets, layout), lengths=lengths)


def _differentiable_backward(
    outputs: Callable[..., Sequence[Tensor | None]],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of `outputs` as a differentiable function of `tensors` and of the outputs' gradients."""
    inputs: list[Any] = [t for t, need in zip(tensors, needs, strict=True) if need]
    used = [g for g in grads if g is not None]

    def of_inputs(*given: Tensor) -> tuple[Tensor, ...]:
        left = iter(given)
        results = outputs(*[next(left) if need else t for t, need in zip(tensors, needs, strict=True)])
        return tuple(o for o, g in zip(results, grads, strict=False) if o is not None and g is not None)

    if torch._C._functorch.get_dynamic_layer_stack_depth() > 0:
        # Inside a transform autograd does not see what was recorded outside; the transform of its kind does.
        found = torch.func.vjp(of_inputs, *inputs)[1](tuple(used))
    else:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views cut every input off from the others: h0 may itself have been computed from x.
            views = [t.view_as(t) for t in inputs]
            found = torch.autograd.grad(of_inputs(*views), views, used, create_graph=create_graph, allow_unused=True)
    left = iter(found)
    return [next(left) if need else None for need in needs]
