"""A stack of layers, and one layer with its autograd.

`stack` is the readable algorithm of torch.nn's RNN, LSTM and GRU: layers, directions, dropout between layers. `layer`
runs the operators of `fused_rnn.operators`. An ``autograd.Function`` around plain operators costs a third of the time
per call that ``torch.library.register_autograd`` does, and a call that needs no gradient does without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_rnn import cuda, input_gates, operators, policy, reference
from fused_rnn.cell_info import NUMBER
from fused_rnn.options import NO_OPTIONS, LayerOptions, constants_of, differentiable_of, flags_of, tensors_of
from fused_rnn.policy import COMPILERS_TYPES, FAKE_TYPES, any_requires_grad, deterministic, runs_eagerly

if TYPE_CHECKING:
    from typing_extensions import Unpack


@runs_eagerly
def stack(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    directions: int,
    dropout: float = 0.0,
    options: LayerOptions = NO_OPTIONS,
    options_of: Callable[[int, Tensor, Sequence[Tensor | None]], LayerOptions] | None = None,
    sequences: bool = False,
    widths: Sequence[Sequence[int]] | None = None,
    run: Callable[..., Any] | None = None,
) -> list[Tensor]:
    """Compute all layers of a torch.nn.RNN, LSTM or GRU.

    Args:
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        x: ``[T, B, I]``, or ``[N, I]`` with ``batch_sizes`` in the options, the data of a packed sequence.
        h0, c0: the initial states ``[L*D, B, P]`` and ``[L*D, B, H]``. None means zeros.
        weights: torch.nn's ``_flat_weights``: per layer and direction ``w_ih, w_hh[, b_ih, b_hh][, w_hr]``.
        has_biases, num_layers, directions: of the module.
        dropout: between the layers; 0 outside of training.
        options: of every layer.
        options_of: returns a layer's options from its index, its input and its weights, in place of `options`.
        sequences: whether to return the states of every step.
        widths: the sizes of h, and of c, in every layer, if the states of layers lie side by side in the last
            dimension.
        run: computes one layer; `layer` if None. `fused_rnn.reference.layer` makes this the specification.

    Returns:
        y ``[T, B, D*P]`` or ``[N, D*P]``, h_n ``[L*D, B, P]``, for the LSTM c_n ``[L*D, B, H]``, and with `sequences` h
        and for the LSTM c of every step ``[T, L*D, B, ...]`` or ``[N, L*D, ...]``.
    """
    run = layer if run is None else run
    trains = weights[0].requires_grad and torch.is_grad_enabled()  # nearly always all that there is to ask
    plain = options_of is None and options is NO_OPTIONS and widths is None and run is layer
    if plain and not (trains or dropout > 0 or sequences):
        results = _in_one_call(cell, x, h0, c0, weights, has_biases, num_layers, directions)
        if results is not None:
            return results
    h_layers: Sequence[Tensor | None] = (h0,)
    c_layers: Sequence[Tensor | None] = (c0,)
    if num_layers > 1:
        h_layers, c_layers = by_layer(h0, widths, 0, num_layers), by_layer(c0, widths, 1, num_layers)
    h_n: list[Tensor] = []
    c_n: list[Any] = []
    steps: list[tuple[Tensor, ...]] = []
    for index in range(num_layers):
        if index > 0 and dropout > 0:
            x = torch.dropout(x, dropout, True)
        of_layer = layer_weights(weights, index, num_layers, directions, has_biases)
        if options_of is not None:
            options = options_of(index, x, of_layer)
        x, h, c, *c_steps = run(cell, x, h_layers[index], c_layers[index], of_layer, options)
        h_n.append(h)
        c_n.append(c)
        steps.append((x, *c_steps))
    dim = 0 if widths is None else -1
    results = [x, h_n[0] if num_layers == 1 else torch.cat(h_n, dim)]
    if cell == "lstm":
        results.append(c_n[0] if num_layers == 1 else torch.cat(c_n, dim))
    if sequences:
        results += [
            torch.cat([_by_direction(s, directions) for s in kind], dim or 1) for kind in zip(*steps, strict=True)
        ]
    return results


def _in_one_call(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    directions: int,
) -> list[Tensor] | None:
    """The results of `stack` in inference on a CPU, from all layers at once; None if they have to be called in turn."""
    if (
        torch.compiler.is_compiling()
        or policy.on_cuda(x)
        or x.dtype not in policy.KERNEL_DTYPES
        or policy.precision(x)
        or (torch.is_grad_enabled() and any_requires_grad((x, h0, c0, *weights)))
    ):
        return None
    projected = len(weights) > num_layers * directions * (4 if has_biases else 2)
    results = operators.stack(
        x, h0, c0, NUMBER[cell], num_layers, directions, weights, has_biases, projected, deterministic()
    )
    return None if results is None else list(results if cell == "lstm" else results[:2])


def layer_weights(
    weights: Sequence[Tensor], index: int, num_layers: int, directions: int, has_biases: bool
) -> tuple[Tensor | None, ...]:
    """``w_ih, w_hh, b_ih, b_hh, w_hr`` of each direction of one layer, None for those that are absent."""
    count = len(weights) // (num_layers * directions)  # of a direction
    five: list[Tensor | None] = []
    for first in range(index * directions * count, (index + 1) * directions * count, count):
        w = weights[first : first + count]
        five += w if has_biases else (*w[:2], None, None, *w[2:])
        if count - 2 * has_biases == 2:
            five.append(None)
    return tuple(five)


def by_layer(
    state: Tensor | None, widths: Sequence[Sequence[int]] | None, which: int, num_layers: int
) -> Sequence[Tensor | None]:
    """``[..., D, B, size]`` of every layer, of h (`which` is 0) or c (1); `widths` as in `stack`."""
    if state is None:
        return (None,) * num_layers
    return state.chunk(num_layers, -3) if widths is None else state.split(list(widths[which]), -1)


def _by_direction(sequence: Tensor, D: int) -> Tensor:
    """``[T, B, D*P]`` as ``[T, D, B, P]``, ``[N, D*P]`` as ``[N, D, P]``."""
    rows: Tensor = sequence.unflatten(-1, (D, -1))
    return rows.transpose(1, 2) if rows.dim() == 4 else rows


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    options: LayerOptions = NO_OPTIONS,
) -> tuple[Tensor, Tensor, Tensor | None, Unpack[tuple[Tensor, ...]]]:
    """Compute one layer over a whole sequence; arguments and results are those of `fused_rnn.reference.layer`.

    Raises:
        RuntimeError: a tensor does not fit the others in shape, dtype or device.
    """
    if torch.compiler.is_compiling():  # one operator, defined in fused_rnn/compiled.py
        y, h_n, c_n, *more = torch.ops.fused_rnn.layer.default(
            cell, x, h0, c0, weights, tensors_of(options), options.c_sequence, options.precision, options.recompute
        )
    elif options is not NO_OPTIONS or deterministic() or policy.on_cuda(x) or policy.precision(x):
        y, h_n, c_n, *more = layer_of_operators(cell, x, h0, c0, weights, options)
    elif torch.is_grad_enabled() and any_requires_grad((x, h0, c0, *weights)):
        y, h_n, c_n = _apply(cell, len(weights), NO_OPTIONS, x, h0, c0, *weights)
        return y, y if x.dim() == 2 else h_n, c_n if cell == "lstm" else None
    else:
        y, h_n, c_n, _, _ = operators.forward_operator(x, h0, c0, NUMBER[cell], False, *weights)
        return y, y if x.dim() == 2 else h_n, c_n if cell == "lstm" else None
    is_step = options.batch_sizes is None and x.dim() == 2
    return y, y if is_step else h_n, c_n if cell == "lstm" else None, *more


def step(
    cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Compute one time step of one layer: ``[B, I]`` and states ``[B, ...]`` to h' and c' (empty but for the LSTM).

    Raises:
        RuntimeError: a tensor does not fit the others in shape, dtype or device.
    """
    if torch.is_grad_enabled() and any_requires_grad((x, h0, c0, *weights)):
        options = LayerOptions(deterministic=True) if deterministic() else NO_OPTIONS
        tensors = () if options is NO_OPTIONS else differentiable_of(options)
        h, _, c = _apply(cell, len(weights), options, x, h0, c0, *weights, *tensors)
        return h, c
    return operators.step(x, h0, c0, NUMBER[cell], *weights, deterministic())


def step_of_instance(
    instance: int, cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """`step` on these kernels (`fused_rnn.options`)."""
    h, _, c, *_ = layer_of_operators(cell, x, h0, c0, weights, LayerOptions(instance=instance))
    return h, c


def torchs_rnn_step(cell: str, x: Tensor, h0: Tensor | None, weights: Sequence[Tensor | None]) -> Tensor:
    """h' of `step` of an RNN, from torch's own function, whose autograd nodes cost less than ours."""
    w_ih, w_hh, b_ih, b_hh = weights[:4]
    h0 = x.new_zeros(x.size(0), w_hh.size(0)) if h0 is None else h0  # type: ignore[union-attr]  # never None
    return _TORCHS_RNN_CELL[cell](x, h0, w_ih, w_hh, b_ih, b_hh)


_TORCHS_RNN_CELL: dict[str, Callable[..., Tensor]] = {"rnn_tanh": torch.rnn_tanh_cell, "rnn_relu": torch.rnn_relu_cell}


def layer_of_operators(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    options: LayerOptions,
) -> Sequence[Tensor]:
    """`layer`, except that h_n of a single step is empty, and c_n unless the cell is an LSTM."""
    if options.norm_ih is not None and options.lengths is not None:
        x = reference.without_what_follows(x, options.lengths)
    if deterministic():
        options = options._replace(deterministic=True)
    if x.dtype is torch.float32 and policy.on_cuda(x) and cuda.tf32_allowed():
        options = options._replace(tf32=True)
    if options.precision == policy.HIGHEST:
        steps = x if options.batch_sizes is None else options.batch_sizes
        precision = policy.precision(x, single_step=steps.dim() == 2 or steps.size(0) == 1)
        options = options if precision == policy.HIGHEST else options._replace(precision=precision)
    if torch.is_grad_enabled():
        tensors: tuple[Any, ...] = () if options is NO_OPTIONS else differentiable_of(options)
        if any_requires_grad((x, h0, c0, *weights, *tensors)):
            results: Sequence[Tensor] = _apply(cell, len(weights), options, x, h0, c0, *weights, *tensors)
            return results
    y, h_n, c_n, more, _ = _run_forward(cell, _Inputs(x, h0, c0, tuple(weights)), options, False)
    return [y, h_n, c_n, *more]


class _Inputs(NamedTuple):
    """The tensors of one call that the options do not hold, and their order in the autograd function."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: tuple[Tensor | None, ...]


def _run_forward(
    cell: str, inputs: _Inputs, options: LayerOptions, train: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
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
    inputs: _Inputs,
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
        inputs = _Inputs(x, h0, c0, tensors[3 : 3 + count])
        y, h_n, c_n, more, kept = _run_forward(cell, inputs, options, not recompute)
        kept = () if recompute else kept
        ctx.set_materialize_grads(False)
        ctx.cell, ctx.count, ctx.kept = cell, count, len(kept)
        # A tensor that the first derivative reads is saved for it, which guards it against writing in place. One that
        # only a second derivative reads is kept aside with its version, so that writing to it stays allowed until then.
        ctx.read, aside = _inputs_that_derivatives_read(ctx.needs_input_grad[3:], count, recompute)
        constants: tuple[Any, ...] = () if options is NO_OPTIONS else constants_of(options)
        ctx.constants, ctx.flags = len(constants), flags_of(options)
        ctx.save_for_backward(*kept, *constants, *[tensors[i] for i in ctx.read])
        ctx.aside = [(i, t, t._version) for i in aside if (t := tensors[i]) is not None]
        if cell != "lstm":
            ctx.mark_non_differentiable(c_n)
        return y, h_n, c_n, *more

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs, count, saved = ctx.needs_input_grad[3:], ctx.count, ctx.saved_tensors
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
            return None, None, None, *_differentiable_backward(ctx.cell, tensors, count, options, needs, grads)
        x, h0, c0 = tensors[:3]
        inputs = _Inputs(x, h0, c0, tuple(tensors[3 : 3 + count]))
        if options.recompute:
            kept = _run_forward(ctx.cell, inputs, options, True)[-1]
        gradients = _run_backward(ctx.cell, grads, inputs, options, kept, needs)
        return None, None, None, *[g if need else None for g, need in zip(gradients, needs, strict=True)]


# Function.apply without its handling of functorch transforms, in which the policy does not choose the operators.
_apply: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Layer).apply


@lru_cache(maxsize=4096)
def _inputs_that_derivatives_read(
    needs: tuple[bool, ...], count: int, recompute: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The places, among `_Layer`'s tensors, of those that the first derivative reads, and of those only the second.

    Args:
        needs: which of the tensors need a gradient.
        count: how many of them are weights, from the fourth on.
    """
    everything = range(len(needs))
    if recompute:
        return tuple(everything), ()
    # x and w_ih meet in one product: each is read for the other's gradient. Biases are never read. The initial states
    # and those of resets are guarded as torch.nn guards its own.
    needs_x, needs_w_ih = needs[0], any(needs[3 : 3 + count : 5])
    reads = [needs_w_ih, True, True, *[needs_x, True, False, False, True] * (count // 5)]
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
    tensors: Sequence[Tensor | None],
    count: int,
    options: LayerOptions,
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The layer's gradients as a differentiable function of its tensors and of the outputs' gradients."""
    inputs: list[Any] = [t for t, need in zip(tensors, needs, strict=True) if need]
    used = [g for g in grads if g is not None]

    def outputs(*given: Tensor) -> tuple[Tensor, ...]:
        left = iter(given)
        all_tensors: list[Any] = [next(left) if need else t for t, need in zip(tensors, needs, strict=True)]
        x, h0, c0, *rest = all_tensors
        of_call = options
        if options is not NO_OPTIONS:
            of_call = LayerOptions(*constants_of(options), *rest[count:], *flags_of(options))
        results = reference.layer(cell, x, h0, c0, rest[:count], of_call)
        return tuple(o for o, g in zip(results, grads, strict=True) if o is not None and g is not None)

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
