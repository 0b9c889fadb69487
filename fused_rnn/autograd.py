"""The graph's node of one layer, or of several.

An ``autograd.Function`` around plain operators costs a third of the time per call that
``torch.library.register_autograd`` does, and a call that needs no gradient does without it. Several small layers share
one node: each of its own would take longer than what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_rnn import input_gates, operators, reference
from fused_rnn.cell_info import NUMBER
from fused_rnn.options import NO_OPTIONS, LayerOptions, constants_of, flags_of
from fused_rnn.policy import COMPILERS_TYPES, FAKE_TYPES


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


def _run_forwards(cell: str, num_layers: int, inputs: Inputs) -> _Forward | None:
    """`run_forward` of several layers without options; None if they have to be called in turn."""
    x, h0, c0, weights = inputs
    given = [w for w in weights if w is not None]
    directions, has_biases, projected = len(weights) // (5 * num_layers), weights[2] is not None, weights[4] is not None
    results: Any = operators.stack(
        x, h0, c0, NUMBER[cell], num_layers, directions, given, has_biases, projected, False, True
    )
    return None if results is None else (*results[:3], (), results[3:])


def _run_backwards(
    cell: str,
    num_layers: int,
    grads: Sequence[Tensor | None],
    inputs: Inputs,
    kept: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """`_run_backward` of several layers without options."""
    x, _, _, weights = inputs
    between, reserves = kept
    layer_inputs = (x, *between.split(x.size(0)))
    count = len(weights) // num_layers
    directions = count // 5
    dy, *dstates = grads
    of_states: list[list[Tensor]] = [[], []]
    of_weights: list[Tensor | None] = []
    for index in reversed(range(num_layers)):
        rows, first = slice(index * directions, (index + 1) * directions), index * count
        of_layer = slice(first, first + count)
        need_dx = any(needs[: 3 + first]) if index > 0 else needs[0]  # of the layers below, or x itself
        dy, *others = operators.backward(
            cell,
            (dy, *[None if d is None else d[rows] for d in dstates]),
            layer_inputs[index],
            reserves[rows],
            weights[of_layer],
            NO_OPTIONS,
            (need_dx, *needs[1:3], *needs[3:][of_layer]),
            0,
        )
        for kind, d in zip(of_states, others, strict=False):
            if d is not None:
                kind.insert(0, d)
        of_weights[:0] = others[2 : 2 + count]
        if not need_dx:
            of_weights[:0] = [None] * first
            break
    return [dy, *[torch.cat(kind) if kind else None for kind in of_states], *of_weights]


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: str, num_layers: int, count: int, options: LayerOptions, *tensors: Any) -> Any:
        """One layer, or several without options.

        `tensors` are x, h0, c0, `count` weights and, with options, those that are differentiable. None if the layers
        have to be called in turn.
        """
        recompute = options.recompute
        x, h0, c0 = tensors[:3]
        inputs = Inputs(x, h0, c0, tensors[3 : 3 + count])
        if num_layers == 1:
            y, h_n, c_n, more, kept = run_forward(cell, inputs, options, not recompute)
        elif (several := _run_forwards(cell, num_layers, inputs)) is None:
            return None
        else:
            y, h_n, c_n, more, kept = several
        kept = () if recompute else kept
        ctx.set_materialize_grads(False)
        ctx.cell, ctx.num_layers, ctx.count, ctx.kept = cell, num_layers, count, len(kept)
        # A tensor that the first derivative reads is saved for it, which guards it against writing in place. One that
        # only a second derivative reads is kept aside with its version, so that writing to it stays allowed until then.
        ctx.read, aside = _inputs_that_derivatives_read(ctx.needs_input_grad[4:], num_layers, count, recompute)
        constants: tuple[Any, ...] = () if options is NO_OPTIONS else constants_of(options)
        ctx.constants, ctx.flags = len(constants), flags_of(options)
        ctx.save_for_backward(*kept, *constants, *[tensors[i] for i in ctx.read])
        ctx.aside = [(i, t, t._version) for i in aside if (t := tensors[i]) is not None]
        if cell != "lstm" and c_n is not None:
            ctx.mark_non_differentiable(c_n)
        return y, h_n, c_n, *more

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs, count, saved = ctx.needs_input_grad[4:], ctx.count, ctx.saved_tensors
        first = ctx.kept + ctx.constants
        kept, constants = saved[: ctx.kept], saved[ctx.kept : first]
        tensors: list[Any] = [None] * len(needs)
        for index, tensor in zip(ctx.read, saved[first:], strict=True):
            tensors[index] = tensor
        again = torch.is_grad_enabled() or _any_transformed(grads, bool(constants))
        for index, tensor, version in ctx.aside:
            tensors[index] = _unchanged(tensor, version) if again else tensor
        options = LayerOptions(*constants, *tensors[3 + count :], *ctx.flags) if constants else NO_OPTIONS
        if again:
            found = _differentiable_backward(ctx.cell, ctx.num_layers, tensors, count, options, needs, grads)
            return None, None, None, None, *found
        x, h0, c0 = tensors[:3]
        inputs = Inputs(x, h0, c0, tuple(tensors[3 : 3 + count]))
        if options.recompute:
            kept = run_forward(ctx.cell, inputs, options, True)[-1]
        if ctx.num_layers == 1:
            gradients = _run_backward(ctx.cell, grads, inputs, options, kept, needs)
        else:
            gradients = _run_backwards(ctx.cell, ctx.num_layers, grads, inputs, kept, needs)
        return None, None, None, None, *[g if need else None for g, need in zip(gradients, needs, strict=True)]


# Function.apply without its handling of functorch transforms, in which the policy does not choose the operators.
apply: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Layers).apply


@lru_cache(maxsize=4096)
def _inputs_that_derivatives_read(
    needs: tuple[bool, ...], num_layers: int, count: int, recompute: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The places, among `_Layers`'s tensors, of those that the first derivative reads, and of those only the second.

    Args:
        needs: which of the tensors need a gradient.
        count: how many of them are weights, from the fourth on.
    """
    everything = range(len(needs))
    if recompute:
        return tuple(everything), ()
    # x and w_ih meet in one product: each is read for the other's gradient. Biases are never read. The initial states
    # and those of resets are guarded as torch.nn guards its own.
    in_first_layer = count // (5 * num_layers)  # directions
    needs_x, needs_w_ih = needs[0], any(needs[3 : 3 + 5 * in_first_layer : 5])
    reads = [needs_w_ih, True, True, *[True, True, False, False, True] * (count // 5)]
    reads[3 : 3 + 5 * in_first_layer : 5] = [needs_x] * in_first_layer
    if len(needs) > len(reads):
        reads += [True] * (len(needs) - len(reads))
        if needs[-1]:  # norm_ih
            reads[0] = True
            reads[3 : 3 + count : 5] = [True] * (count // 5)
    return tuple(i for i in everything if reads[i]), tuple(i for i in everything if not reads[i])


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for the second derivative has been modified by an inplace operation: "
            f"it is at version {tensor._version}; expected version {version} instead"
        )
    return tensor


def _any_transformed(grads: Sequence[Tensor | None], has_options: bool) -> bool:
    # A gradient under vmap or with a tangent: torch's own operations know how to take it. is_grads_batched=True is a
    # vmap of its own, which runs an operator row by row unless the operator has a list of tensors among its arguments.
    functorch = torch._C._functorch
    if forward_ad._current_level >= 0 or functorch.get_dynamic_layer_stack_depth() > 0:
        return True
    for g in grads:
        if g is not None and (type(g) not in COMPILERS_TYPES or (has_options and functorch.is_legacy_batchedtensor(g))):
            return True
    return False


def _differentiable_backward(
    cell: str,
    num_layers: int,
    tensors: Sequence[Tensor | None],
    count: int,
    options: LayerOptions,
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The layers' gradients as a differentiable function of their tensors and of the outputs' gradients."""
    inputs: list[Any] = [t for t, need in zip(tensors, needs, strict=True) if need]
    used = [g for g in grads if g is not None]

    def outputs(*given: Tensor) -> tuple[Tensor, ...]:
        left = iter(given)
        all_tensors: list[Any] = [next(left) if need else t for t, need in zip(tensors, needs, strict=True)]
        x, h0, c0, *rest = all_tensors
        of_call = options
        if options is not NO_OPTIONS:
            of_call = LayerOptions(*constants_of(options), *rest[count:], *flags_of(options))
        results = _specification(cell, num_layers, x, h0, c0, rest[:count], of_call)
        return tuple(o for o, g in zip(results, grads, strict=False) if o is not None and g is not None)

    if torch._C._functorch.get_dynamic_layer_stack_depth() > 0:
        # Inside a transform autograd does not see what was recorded outside; the transform of its kind does.
        found = torch.func.vjp(outputs, *inputs)[1](tuple(used))
    else:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views cut every input off from the others: h0 may itself have been computed from x.
            views = [t.view_as(t) for t in inputs]
            found = torch.autograd.grad(outputs(*views), views, used, create_graph=create_graph, allow_unused=True)
    left = iter(found)
    return [next(left) if need else None for need in needs]


def _specification(
    cell: str,
    num_layers: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    options: LayerOptions,
) -> Sequence[Tensor | None]:
    """The results of `_Layers.forward` from operations that torch differentiates."""
    if num_layers == 1:
        return reference.layer(cell, x, h0, c0, weights, options)
    count = len(weights) // num_layers
    states: Any = [(None,) * num_layers if s is None else s.chunk(num_layers) for s in (h0, c0)]
    finals = []
    for index in range(num_layers):
        of_layer = weights[index * count : (index + 1) * count]
        x, *final = reference.layer(cell, x, states[0][index], states[1][index], of_layer)
        finals.append(final)
    return x, *[torch.cat(kind) for kind in zip(*finals, strict=True) if kind[0] is not None]
