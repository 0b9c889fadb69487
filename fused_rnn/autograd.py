"""The graph's nodes: of one layer with any options, and of all layers of a plain module on a CPU.

An ``autograd.Function`` around plain operators costs a third of the time per call that
``torch.library.register_autograd`` does, and a call that needs no gradient does without it. All small layers of a
module share one node, which does as little as it can in Python: one for each would take longer than what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_rnn import input_gates, operators, reference
from fused_rnn.cell_info import NAMES
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


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: str, count: int, options: LayerOptions, *tensors: Any) -> Any:
        """`tensors` are x, h0, c0, `count` weights and, with options, those that are differentiable."""
        recompute = options.recompute
        x, h0, c0 = tensors[:3]
        inputs = Inputs(x, h0, c0, tensors[3 : 3 + count])
        y, h_n, c_n, more, kept = run_forward(cell, inputs, options, not recompute)
        constants: tuple[Any, ...] = () if options is NO_OPTIONS else constants_of(options)
        ctx.cell, ctx.count, ctx.constants, ctx.flags = cell, count, len(constants), flags_of(options)
        directions, read = count // 5, _READ_WEIGHTS[True, True]  # all five have a place, absent ones, too
        _save(ctx, () if recompute else kept, constants, tensors, read, directions, directions, recompute)
        if cell != "lstm":
            ctx.mark_non_differentiable(c_n)
        return y, h_n, c_n, *more

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs, count = ctx.needs_input_grad[3:], ctx.count
        again = torch.is_grad_enabled() or _any_transformed(grads, ctx.constants > 0)
        kept, constants, tensors = _saved(ctx, ctx.constants, len(needs), again)
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
    @staticmethod
    def forward(ctx: Any, call: tuple[int, int, int, bool, bool, Tensor | None, Tensor | None], *tensors: Any) -> Any:
        """`tensors` are x, h0, c0 and all weights, torch.nn's ``_flat_weights``.

        `call` is the cell's number, layers, directions, has_biases, projected, resets and lengths, one argument because
        each takes its time. A cell has 0 layers and no h_n (csrc/bindings/cpu_operators.h).
        """
        cell, layers, directions, has_biases, projected, resets, lengths = call
        x, h0, c0, *weights = tensors
        rest = has_biases, projected, resets, lengths, False, True
        results: Any = operators.stack(x, h0, c0, cell, layers, directions, weights, *rest)
        if results is None:
            try:
                options = _options(resets, lengths, x)
                results = _forward_in_turn(NAMES[cell], layers, directions, has_biases, x, h0, c0, weights, options)
            except (RuntimeError, IndexError) as error:
                raise Refused(str(error)) from error
        y, h_n, c_n, between, reserve = results
        constants = () if resets is None and lengths is None else (resets, lengths)
        ctx.of_module, ctx.constants = call[:5], len(constants)
        read = _READ_WEIGHTS[has_biases, projected]
        _save(ctx, (between, reserve), constants, tensors, read, directions, (layers or 1) * directions)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs = ctx.needs_input_grad[1:]
        cell, layers, directions, has_biases, projected = ctx.of_module
        # Of a cell, batched gradients take less time through the specification than row by row; options are a list.
        again = torch.is_grad_enabled() or _any_transformed(grads, layers == 0 or ctx.constants > 0)
        (between, reserve), constants, (x, h0, c0, *weights) = _saved(ctx, ctx.constants, len(needs), again)
        resets, lengths = constants or (None, None)
        if again:
            options = _options(resets, lengths, x)

            def outputs(x: Tensor, h0: Any, c0: Any, *weights: Any) -> Sequence[Tensor | None]:
                name = NAMES[cell]
                if layers == 0:
                    return reference.layer(name, x, h0, c0, reference.layer_weights(weights, 0, 1, 1, has_biases))
                sequence = x if x.dim() == 3 else x.unsqueeze(0)
                y, *states = reference.stack(
                    name, sequence, h0, c0, weights, has_biases, layers, directions, options=options
                )
                return y if x.dim() == 3 else y.squeeze(0), *states

            gradients: Any = _differentiable_backward(outputs, (x, h0, c0, *weights), needs, grads)
        else:
            kept = x, between, reserve
            gradients = operators.stack_backward(
                *grads, *kept, cell, layers, directions, weights, has_biases, projected, resets, lengths, needs
            )
            if gradients is None:
                options = _options(resets, lengths, x)
                gradients = _backward_in_turn(
                    NAMES[cell], layers, directions, has_biases, grads, *kept, weights, options, needs
                )
        return None, *gradients


def _options(resets: Tensor | None, lengths: Tensor | None, x: Tensor) -> LayerOptions:
    """The options of every layer of a sequence; x may be a single step."""
    if resets is None and lengths is None:
        return NO_OPTIONS
    return LayerOptions(resets=resets if resets is None or x.dim() == 3 else resets.unsqueeze(0), lengths=lengths)


# Function.apply without its handling of functorch transforms, in which the policy does not choose the operators.
layer: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Layer).apply
stack: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Stack).apply


# Where the functions of all layers return None, because a profiler or a mode would see the operators, or because a
# tensor is one that only torch can read: the same by the operator of one layer, which keeps the same.


def _forward_in_turn(
    cell: str,
    num_layers: int,
    directions: int,
    has_biases: bool,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    options: LayerOptions,
) -> tuple[Tensor | None, ...]:
    """`operators.stack` in training."""
    if num_layers == 0:
        of_layer = reference.layer_weights(weights, 0, 1, 1, has_biases)
        y, _, c_n, reserve, _ = operators.forward(cell, x, h0, c0, of_layer, options, True)
        return y, None, c_n if cell == "lstm" else None, None, reserve
    y = x if x.dim() == 3 else x.unsqueeze(0)
    h_layers, c_layers = reference.by_layer(h0, None, 0, num_layers), reference.by_layer(c0, None, 1, num_layers)
    of_layers = []
    for index in range(num_layers):
        of_layer = reference.layer_weights(weights, index, num_layers, directions, has_biases)
        y, *others = operators.forward(cell, y, h_layers[index], c_layers[index], of_layer, options, True)
        of_layers.append((y, *others[:3]))
    ys, *kinds = zip(*of_layers, strict=True)
    h_n, c_n, reserve = map(torch.cat, kinds)
    between = torch.cat(ys[:-1]) if num_layers > 1 else None
    return y if x.dim() == 3 else y.squeeze(0), h_n, c_n if cell == "lstm" else None, between, reserve


def _backward_in_turn(
    cell: str,
    num_layers: int,
    directions: int,
    has_biases: bool,
    grads: Sequence[Tensor | None],
    x: Tensor,
    between: Tensor | None,
    reserve: Tensor,
    weights: Sequence[Tensor],
    options: LayerOptions,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """`operators.stack_backward`."""
    is_step, is_cell = x.dim() == 2, num_layers == 0
    num_layers = num_layers or 1
    dy, *dstates = grads
    if is_step:
        x, dy = x.unsqueeze(0), None if dy is None else dy.unsqueeze(0)
    if is_cell:
        dstates = [None if d is None else d.unsqueeze(0) for d in dstates]
    layer_inputs = (x, *(between.split(x.size(0)) if between is not None else ()))
    found: list[Tensor | None] = [None] * len(needs)
    of_states: list[list[Tensor]] = [[], []]
    for index in reversed(range(num_layers)):
        rows = slice(index * directions, (index + 1) * directions)
        of_layer, places = (
            reference.layer_weights(all_weights, index, num_layers, directions, has_biases)
            for all_weights in (weights, range(3, len(needs)))
        )
        needs_of_layer = [place is not None and needs[place] for place in places]
        need_dx = any(needs[: places[0]]) if index > 0 else needs[0]  # of the layers below, or x itself
        dy, *others = operators.backward(
            cell,
            (dy, *[None if d is None else d[rows] for d in dstates]),
            layer_inputs[index],
            reserve[rows],
            of_layer,
            options,
            (need_dx, *needs[1:3], *needs_of_layer),
            0,
        )
        for kind, d in zip(of_states, others, strict=False):
            if d is not None:
                kind.insert(0, d)
        for place, need, d in zip(places, needs_of_layer, others[2:], strict=False):
            if need:
                found[place] = d
        if not need_dx:
            break
    found[:3] = [dy, *[torch.cat(kind) if kind else None for kind in of_states]]
    without = 3 if is_cell else 1 if is_step else 0  # their first dimension
    found[:without] = [None if d is None else d.squeeze(0) for d in found[:without]]
    return [d if need else None for d, need in zip(found, needs, strict=True)]


def _save(
    ctx: Any,
    kept: Sequence[Tensor | None],
    constants: Sequence[Tensor | None],
    tensors: Sequence[Any],
    read_weights: tuple[bool, ...],
    directions: int,
    all_directions: int,
    recompute: bool = False,
) -> None:
    """Keep for backward what forward kept, constants, and `tensors`, the arguments that may need a gradient.

    A tensor that the first derivative reads is saved for it, which guards it against writing in place. One that only a
    second derivative reads is kept aside with its version, so that writing to it stays allowed until then. The last
    four arguments are those of `_that_derivatives_read`.
    """
    ctx.set_materialize_grads(False)
    ctx.kept = len(kept)
    needs = ctx.needs_input_grad[-len(tensors) :]
    ctx.read, aside = _that_derivatives_read(needs, read_weights, directions, all_directions, recompute)
    ctx.save_for_backward(*kept, *constants, *[tensors[i] for i in ctx.read])
    ctx.aside = [(i, t, None if t.is_inference() else t._version) for i in aside if (t := tensors[i]) is not None]


def _saved(ctx: Any, constants: int, count: int, again: bool) -> tuple[Any, Any, list[Any]]:
    """What forward kept, the constants, and the `count` tensors; `again`: for a second derivative."""
    saved, first = ctx.saved_tensors, ctx.kept + constants
    tensors: list[Any] = [None] * count
    for index, tensor in zip(ctx.read, saved[first:], strict=True):
        tensors[index] = tensor
    for index, tensor, version in ctx.aside:
        tensors[index] = _unchanged(tensor, version) if again else tensor
    return saved[: ctx.kept], saved[ctx.kept : first], tensors


# Which weights of a direction the first derivative reads, by which there are: w_ih and w_hh, no biases, w_hr.
_READ_WEIGHTS = {
    (has_biases, projected): (True, True) + (False, False) * has_biases + (True,) * projected
    for has_biases in (True, False)
    for projected in (True, False)
}


@lru_cache(maxsize=4096)
def _that_derivatives_read(
    needs: tuple[bool, ...], read_weights: tuple[bool, ...], directions: int, all_directions: int, recompute: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The places of the tensors that the first derivative reads, and of those only the second.

    Args:
        needs: which of the tensors need a gradient. Weights begin with the fourth.
        read_weights: one of `_READ_WEIGHTS`.
        directions, all_directions: of one layer, and of all layers together.
    """
    everything = range(len(needs))
    if recompute:
        return tuple(everything), ()
    # x and the first w_ih meet in one product: each is read for the other's gradient. The initial states and those of
    # resets are guarded as torch.nn guards its own.
    each = len(read_weights)
    of_w_ih = slice(3, 3 + each * directions, each)
    reads = [any(needs[of_w_ih]), True, True, *read_weights * all_directions]
    reads[of_w_ih] = [needs[0]] * directions
    if len(needs) > len(reads):
        reads += [True] * (len(needs) - len(reads))
        if needs[-1]:  # norm_ih
            reads[0] = True
            reads[of_w_ih] = [True] * directions
    return tuple(i for i in everything if reads[i]), tuple(i for i in everything if not reads[i])


def _unchanged(tensor: Tensor, version: int | None) -> Tensor:
    if version is not None and tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for the second derivative has been modified by an inplace operation: "
            f"it is at version {tensor._version}; expected version {version} instead"
        )
    return tensor


def _any_transformed(grads: Sequence[Tensor | None], or_batched: bool) -> bool:
    # A gradient under vmap or with a tangent: torch's own operations know how to take it. is_grads_batched=True is a
    # vmap of its own, which runs an operator row by row unless the operator has a list of tensors among its arguments:
    # then, with `or_batched`, it counts, too.
    functorch = torch._C._functorch
    if forward_ad._current_level >= 0 or functorch.get_dynamic_layer_stack_depth() > 0:
        return True
    for g in grads:
        if g is not None and (type(g) not in COMPILERS_TYPES or (or_batched and functorch.is_legacy_batchedtensor(g))):
            return True
    return False


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
