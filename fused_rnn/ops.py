"""One layer, differentiable: the operators ``torch.ops.fused_rnn`` and their autograd.

The operators are plain (no autograd kernel): ``autograd.Function`` outside them costs a third of the time that
``torch.library.register_autograd`` does per call, and is skipped when nothing needs a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_rnn import cuda, eligibility, input_gates, reference
from fused_rnn.cell_info import NUMBER
from fused_rnn.eligibility import COMPILERS_TYPES, PLAIN_TYPES, deterministic

if TYPE_CHECKING:
    from typing_extensions import Unpack

_forward = torch.ops.fused_rnn.forward.default
_backward = torch.ops.fused_rnn.backward.default
_step: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fused_rnn.step.default
_step_into = torch.ops.fused_rnn.step_into.default
_step_layers: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.fused_rnn.step_layers.default

_NO_WEIGHTS = (None,) * 5


class Steering(NamedTuple):
    """What steers a layer and has no gradient; the meaning is `fused_rnn.reference.layer`'s."""

    cell: str
    c_sequence: bool = False
    recompute: bool = False
    tf32: bool = False  # products of float32 on CUDA, as torch's switch says for cuDNN's recurrent layers
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None
    drop_h: Tensor | None = None
    zone_h: Tensor | None = None
    zone_c: Tensor | None = None


# What a call without all that passes, itself: it is known again by its identity, and its operators get few arguments,
# which cost a good part of a small call.
_PLAIN = {cell: Steering(cell) for cell in NUMBER}

# A layer's inputs that may have gradients are x, h0, c0, reset_h, reset_c, norm_hh, norm_c, norm_c_bias, and five
# weights of each direction; None where absent. With layer normalisation norm_ih comes last: not the kernels', which are
# given the input's share of the gates then.
_WEIGHTS = 8
_FLAGS = 4  # of a Steering: what comes before its tensors


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    c_sequence: bool = False,
    lengths: Tensor | None = None,
    norms: Sequence[Tensor | None] = reference.NO_NORMS,
    drop_h: Tensor | None = None,
    zone_h: Tensor | None = None,
    zone_c: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Unpack[tuple[Tensor, ...]]]:
    """One layer over a whole sequence on the fused kernels; the meaning is `fused_rnn.reference.layer`'s.

    With `recompute`, backward computes forward again rather than keeping the gates of every step.

    Raises:
        RuntimeError: a tensor does not fit the others in shape, dtype or device.
    """
    run: Callable[..., Any] = layer_of_kernels
    if torch.compiler.is_compiling():  # one operator, defined in fused_rnn/compiled.py
        run, norms = torch.ops.fused_rnn.layer.default, list(norms)
    elif (
        batch_sizes is resets is lengths is drop_h is zone_h is zone_c is None
        and norms is reference.NO_NORMS
        and not (c_sequence or recompute)
    ):
        if torch.is_grad_enabled() and any_requires_grad((x, h0, c0, *weights)):
            plain = _plain_on_cuda(cell, x) if eligibility.on_cuda(x) else _PLAIN[cell]
            y, h_n, c_n = _apply(plain, x, h0, c0, *_NO_WEIGHTS, *weights)
        elif eligibility.on_cuda(x) or deterministic():
            y, h_n, c_n, _, _ = _call_forward(_plain_on_cuda(cell, x), (x, h0, c0, *_NO_WEIGHTS, *weights), False)
        else:
            y, h_n, c_n, _, _ = _forward(x, h0, c0, NUMBER[cell], False, *weights)
        return y, y if x.dim() == 2 else h_n, c_n if cell == "lstm" else None
    y, h_n, c_n, *more = run(
        cell, x, h0, c0, weights, batch_sizes, resets, reset_h, reset_c, c_sequence, lengths, norms, drop_h, zone_h,
        zone_c, recompute,
    )  # fmt: skip
    is_step = batch_sizes is None and x.dim() == 2
    return y, y if is_step else h_n, c_n if cell == "lstm" else None, *more


def layer_of_kernels(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    c_sequence: bool,
    lengths: Tensor | None,
    norms: Sequence[Tensor | None],
    drop_h: Tensor | None,
    zone_h: Tensor | None,
    zone_c: Tensor | None,
    recompute: bool,
) -> Sequence[Tensor]:
    """`layer`, but that h_n of a single step is empty, and so is c_n but for the LSTM."""
    norm_ih, *gains = norms
    inputs: tuple[Tensor | None, ...] = (x, h0, c0, reset_h, reset_c, *gains, *weights)
    if norm_ih is not None:
        x = x if lengths is None else reference.without_what_follows(x, lengths)
        inputs = (x, *inputs[1:], norm_ih)
    steering = Steering(cell, c_sequence, recompute, _in_tf32(x), batch_sizes, lengths, resets, drop_h, zone_h, zone_c)
    if torch.is_grad_enabled() and any_requires_grad(inputs):
        return _apply(steering, *inputs)
    y, h_n, c_n, more, _ = _run_forward(steering, inputs, False)
    return [y, h_n, c_n, *more]


def _in_tf32(x: Tensor) -> bool:
    return x.dtype is torch.float32 and eligibility.on_cuda(x) and cuda.tf32_allowed()


def _plain_on_cuda(cell: str, x: Tensor) -> Steering:
    """Of a call without options, on the CPU, too."""
    return Steering(cell, tf32=True) if _in_tf32(x) else _PLAIN[cell]


def step(cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """One time step of one layer: ``[B, I]`` and states ``[B, ...]`` to h' and c' (empty but for the LSTM).

    Raises:
        RuntimeError: a tensor does not fit the others in shape, dtype or device.
    """
    if torch.is_grad_enabled() and any_requires_grad((x, h0, c0, *weights)):
        h, _, c = _apply(_PLAIN[cell], x, h0, c0, *_NO_WEIGHTS, *weights, *_NO_WEIGHTS[len(weights) :])
        return h, c
    if deterministic():
        return _step(x, h0, c0, NUMBER[cell], *weights, *_NO_WEIGHTS[len(weights) :], True)
    return _step(x, h0, c0, NUMBER[cell], *weights)


def step_layers(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    num_layers: int,
    weights: Sequence[Tensor],
    has_biases: bool,
    projected: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One time step of all layers in inference, float32 or float64.

    Args:
        x: ``[B, I]``.
        h0, c0: the states of all layers, ``[L, B, ...]``; None: zeros.
        weights: torch.nn's ``_flat_weights``.

    Returns:
        y ``[B, P]``, h ``[L, B, P]``, and c ``[L, B, H]``, empty but for the LSTM.

    Raises:
        RuntimeError: a tensor does not fit the others in shape, dtype or device.
    """
    return _step_layers(x, h0, c0, NUMBER[cell], num_layers, weights, has_biases, projected, deterministic())


def step_into(
    cell: str,
    x: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    layer: int,
    weights: Sequence[Tensor | None],
    masks: tuple[Tensor | None, Tensor | None],
    fresh: tuple[Tensor | None, Tensor | None],
    y: Tensor,
    h: Tensor,
    c: Tensor | None,
) -> None:
    """One time step of one layer in inference, which allocates nothing.

    Args:
        x: ``[B, I]``; None: h of the layer below.
        h0, c0: the states of all layers, ``[L, B, ...]``; None: zeros.
        layer: which layer this is.
        masks: active and resets, bool ``[B]``: rows that take the step (the others keep their state), and those of them
            whose state is replaced before it; or None.
        fresh: what replaces the states, shaped like them; None: zeros.
        y, h, c: the results. y ``[B, P]`` is written by the last layer, zero where a row is not active; h may be h0,
            and c may be c0.

    Raises:
        RuntimeError: a tensor does not fit the others in shape, dtype or device, or shares memory with a result.
    """
    _step_into(x, h0, c0, layer, NUMBER[cell], *weights, *masks, *fresh, y, h, c, deterministic())


def any_requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd is to record what is computed from these, if it records at all."""
    for t in tensors:  # noqa: SIM110 - several times faster than any()
        if t is not None and t.requires_grad:
            return True
    return False


def _run_forward(
    steering: Steering, inputs: Sequence[Any], train: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """y, h_n, c_n, what else was asked for, and what backward needs."""
    if (len(inputs) - _WEIGHTS) % 5 == 0:  # no norm_ih
        return _call_forward(steering, inputs, train)
    gates, of_gates = input_gates.forward(inputs[0], inputs[-1], inputs[_WEIGHTS:-1:5])
    y, h_n, c_n, more, kept = _call_forward(steering, _with_gates(inputs, gates), train)
    return y, h_n, c_n, more, (*kept, *of_gates)


def _run_backward(
    steering: Steering,
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
    kept: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients in the order of inputs."""
    if (len(inputs) - _WEIGHTS) % 5 == 0:  # no norm_ih
        return _call_backward(steering, grads, inputs, kept, needs)
    x, norm_ih, w_ih, need_w = inputs[0], inputs[-1], inputs[_WEIGHTS:-1:5], needs[_WEIGHTS:-1:5]
    needs_of_kernels = [needs[0] or needs[-1] or any(need_w), *needs[1:-1]]
    needs_of_kernels[_WEIGHTS::5] = [False] * len(w_ih)
    gates = x.new_empty(()).expand(*x.shape[:-1], norm_ih.numel())  # never read
    first = len(kept) - input_gates.KEPT * len(w_ih)
    found: list[Any] = _call_backward(steering, grads, _with_gates(inputs, gates), kept[:first], needs_of_kernels)
    wanted = (needs[0], need_w, needs[-1])
    dx, dw, dnorm = input_gates.backward(found[0], x, norm_ih, w_ih, kept[first:], wanted)
    found = [dx, *found[1 : len(inputs) - 1], dnorm]  # of a single direction the rest is of none
    found[_WEIGHTS:-1:5] = dw
    return found


def _with_gates(inputs: Sequence[Tensor | None], gates: Tensor) -> list[Tensor | None]:
    """The kernels' inputs, with the input's share of the gates in place of x and of each w_ih."""
    between = [None if i >= _WEIGHTS and i % 5 == _WEIGHTS % 5 else t for i, t in enumerate(inputs[1:-1], 1)]
    return [gates, *between]


def _call_forward(
    steering: Steering, inputs: Sequence[Tensor | None], train: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`_run_forward` on what the kernels take."""
    x, h0, c0, reset_h, reset_c, *norms = inputs[:_WEIGHTS]
    s, weights = steering, inputs[_WEIGHTS:]
    if s is _PLAIN[s.cell] and not deterministic():
        y, h_n, c_n, reserve, _ = _forward(x, h0, c0, NUMBER[s.cell], train, *weights)
        return y, h_n, c_n, (), (reserve,)
    if len(weights) == 5:
        weights = (*weights, *_NO_WEIGHTS)
    operator = partial(cuda.in_tf32, _forward) if s.tf32 else _forward
    y, h_n, c_n, reserve, c_of_steps = operator(
        x, h0, c0, NUMBER[s.cell], train, *weights, s.batch_sizes, s.resets, reset_h, reset_c, s.c_sequence,
        s.drop_h, s.zone_h, s.zone_c, *norms, deterministic(), s.lengths, s.tf32,
    )  # fmt: skip
    return y, h_n, c_n, (c_of_steps,) if s.c_sequence else (), (reserve,)


def _call_backward(
    steering: Steering,
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """`_run_backward` on what the kernels take."""
    s = steering
    x, _, _, reset_h, reset_c, *norms = inputs[:_WEIGHTS]
    w_ih, w_hh, _, _, w_hr, *reverse = inputs[_WEIGHTS:]
    w_ih_reverse, w_hh_reverse, _, _, w_hr_reverse = reverse or _NO_WEIGHTS
    of_both = needs[_WEIGHTS:]
    need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_w_hr = (
        map(bool.__or__, of_both[:5], of_both[5:]) if reverse else of_both
    )
    dy, dh_n, dc_n, dc_sequence = (*grads, None)[:4]
    if s.batch_sizes is not None and dh_n is None is dc_n and type(x) not in PLAIN_TYPES and inputs[1] is not None:
        dh_n = torch.zeros_like(inputs[1])  # tells a compiler how many rows there are
    further: Sequence[Any] = ()
    if s is not _PLAIN[s.cell]:
        reset_steps = _steps_of_reset_states((reset_h, reset_c), needs)
        masks = (s.drop_h, s.zone_h, s.zone_c)
        further = (s.batch_sizes, s.resets, reset_steps, dc_sequence, *masks, *norms, s.lengths, s.tf32)
    operator = partial(cuda.in_tf32, _backward) if s.tf32 else _backward
    dx, dh0, dc0, *of_both, dreset_h, dreset_c, dnorm_hh, dnorm_c = operator(
        dy, dh_n, dc_n, x, *kept, NUMBER[s.cell], needs[0], needs[1] or needs[2], need_w_ih, need_w_hh,
        need_b_ih or need_b_hh, need_w_hr, w_ih, w_hh, w_hr, w_ih_reverse, w_hh_reverse, w_hr_reverse, *further,
    )  # fmt: skip
    dnorms = (dnorm_hh, *(dnorm_c.unbind(1) if norms[1] is not None else (None, None)))
    return [dx, dh0, dc0, dreset_h, dreset_c, *dnorms, *of_both]


def _steps_of_reset_states(states: Sequence[Tensor | None], needs: Sequence[bool]) -> int:
    """0: no gradient of a state at resets is wanted; 1: of one for all steps; -1: of one for each."""
    wanted = [s for s, need in zip(states, needs[3:5], strict=True) if need and s is not None]
    return 0 if not wanted else -1 if wanted[0].dim() == 4 else 1


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steering: Steering, *inputs: Any) -> Any:
        y, h_n, c_n, more, kept = _run_forward(steering, inputs, not steering.recompute)
        kept = () if steering.recompute else kept
        ctx.set_materialize_grads(False)
        is_plain = steering is _PLAIN[steering.cell]
        ctx.steering, ctx.kept = steering if is_plain else steering[:_FLAGS], len(kept)
        # What a first derivative reads is saved for it, and so guarded against writing in place. What only a
        # second derivative reads is kept aside, with its version, so that writing to it stays allowed until then.
        ctx.read, aside = _what_a_derivative_reads(ctx.needs_input_grad, steering.recompute)
        masks = () if is_plain else steering[_FLAGS:]
        ctx.save_for_backward(*masks, *kept, *[inputs[i] for i in ctx.read])
        ctx.aside = [(i, t, t._version) for i in aside if (t := inputs[i]) is not None]
        if steering.cell != "lstm":
            ctx.mark_non_differentiable(c_n)
        return y, h_n, c_n, *more

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs = ctx.needs_input_grad[1:]
        steering, saved = ctx.steering, ctx.saved_tensors
        if len(steering) == _FLAGS:
            count = len(Steering._fields) - _FLAGS
            steering, saved = Steering(*steering, *saved[:count]), saved[count:]
        kept, inputs = saved[: ctx.kept], [None] * len(needs)
        for index, tensor in zip(ctx.read, saved[ctx.kept :], strict=True):
            inputs[index] = tensor
        again = torch.is_grad_enabled() or _any_transformed(*grads)
        for index, tensor, version in ctx.aside:
            inputs[index] = _unchanged(tensor, version) if again else tensor
        if again:
            return None, *_differentiable_backward(steering, inputs, needs, grads)
        if steering.recompute:
            kept = _run_forward(steering, inputs, True)[-1]
        found = _run_backward(steering, grads, inputs, kept, needs)
        return None, *[g if need else None for g, need in zip(found, needs, strict=False)]


# Function.apply without what it adds for functorch transforms, under which `fusible` is false.
_apply: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Layer).apply


@cache
def _what_a_derivative_reads(needs: tuple[bool, ...], recompute: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which of a layer's inputs the first derivative reads, and which the second alone.

    `needs` says which of them need a gradient, behind the steering, which needs none.
    """
    everything = range(len(needs) - 1)
    if recompute:
        return tuple(everything), ()
    # x and w_ih meet in one product: each is read for the other's gradient. Biases are never read. torch.nn guards the
    # initial states, and so are those at resets.
    needs_x, needs_of_weights = needs[1], needs[1 + _WEIGHTS :]
    directions, norm_ih = divmod(len(needs_of_weights), 5)
    dw_ih = any(needs_of_weights[: 5 * directions : 5])
    of_weights = [needs_x, True, False, False, True] * directions
    reads = [dw_ih, *[True] * (_WEIGHTS - 1), *of_weights, *[True] * norm_ih]
    return tuple(i for i in everything if reads[i]), tuple(i for i in everything if not reads[i])


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for the second derivative has been modified by an inplace operation: "
            f"it is at version {tensor._version}; expected version {version} instead"
        )
    return tensor


def _any_transformed(*grads: Tensor | None) -> bool:
    # A gradient under vmap (is_grads_batched=True) or with a tangent: torch's own operations know how to take it.
    if forward_ad._current_level >= 0:
        return True
    functorch = torch._C._functorch
    for g in grads:
        if g is not None and (
            type(g) not in COMPILERS_TYPES or functorch.is_batchedtensor(g) or functorch.is_gradtrackingtensor(g)
        ):
            return True
    return False


def _differentiable_backward(
    steering: Steering,
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The layer's gradients as a differentiable function of its inputs and of the outputs' gradients."""
    s = steering
    wanted: list[Any] = [t for t, need in zip(inputs, needs, strict=True) if need]
    used = [g for g in grads if g is not None]

    def outputs(*given: Tensor) -> tuple[Tensor, ...]:
        left = iter(given)
        taken: list[Any] = [next(left) if need else t for t, need in zip(inputs, needs, strict=True)]
        norm_ih = taken.pop() if (len(taken) - _WEIGHTS) % 5 else None
        x, h0, c0, reset_h, reset_c, *rest = taken
        found = reference.layer(
            s.cell, x, h0, c0, rest[3:], s.batch_sizes, s.resets, reset_h, reset_c, s.c_sequence, s.lengths,
            (norm_ih, *rest[:3]), s.drop_h, s.zone_h, s.zone_c,
        )  # fmt: skip
        return tuple(o for o, g in zip(found, grads, strict=True) if o is not None and g is not None)

    if torch._C._functorch.get_dynamic_layer_stack_depth() > 0:
        # Inside a transform autograd does not see what was recorded outside; the transform of its kind does.
        found = torch.func.vjp(outputs, *wanted)[1](tuple(used))
    else:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views cut every input off from the others: h0 may itself have been computed from x.
            views = [t.view_as(t) for t in wanted]
            found = torch.autograd.grad(outputs(*views), views, used, create_graph=create_graph, allow_unused=True)
    left = iter(found)
    return [next(left) if need else None for need in needs]
