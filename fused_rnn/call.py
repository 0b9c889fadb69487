"""What a module was given, in one form: ``[T, B, I]`` or packed rows, states, and the way back for the results.

`run` computes any call, of a module or of plain weights: padded, packed and unbatched input, batch_first, resets,
lengths and states. The plain calls of `fused_rnn.modules` do without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import autocast, layers, policy, reference, tuned
from fused_rnn.options import NO_OPTIONS, PLANNED, LayerOptions
from fused_rnn.policy import CASTABLE, HIGHEST, autocast_dtype, runs_eagerly
from fused_rnn.spec import Spec


@runs_eagerly
def run(
    spec: Spec,
    torchs: Callable[[Any, Any], Any] | None,
    input: Any,
    hx: Any,
    resets: Any = None,
    reset_state: Any = None,
    lengths: Any = None,
    return_state_sequence: bool = False,
) -> Any:
    """Compute a call, on the operators if `fused_rnn.policy` chooses them.

    Args:
        spec: the module.
        torchs: torch.nn's own forward for a call that torch.nn knows; None for a module that torch.nn does not have.
            Otherwise, what the operators cannot compute runs on `fused_rnn.reference`, a loop over time.
        input, hx, resets, reset_state, lengths, return_state_sequence: as in `fused_rnn.LSTM.forward`.

    Returns:
        The results of `fused_rnn.LSTM.forward`.

    Raises:
        ValueError, RuntimeError, TypeError: the arguments do not fit.
    """
    has_keywords = not (resets is None and reset_state is None and lengths is None and return_state_sequence is False)
    torch_knows = torchs is not None and not has_keywords
    data = input.data if isinstance(input, PackedSequence) else input
    half = autocast_dtype(data.device) if isinstance(data, Tensor) else None
    instance = PLANNED
    if torch_knows and torchs is not None:  # the latter for mypy
        choice = _choice(spec, input, hx, half)
        if choice is None or not choice.fused:
            return torchs(input, hx)
        instance = choice.instance
    call = Arguments(spec, input, hx)
    call.instance = instance
    if has_keywords:
        call.take_keywords(resets, reset_state, lengths, return_state_sequence)
    if call.T == 0:
        if not has_keywords:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")  # as torch.nn
        return call.empty_results()
    weights = spec.dropped_weights() if spec.training and spec.weight_dropout > 0 else spec._flat_weights
    casts = call.casts(weights) if half is not None else None
    if casts is not None:
        weights = call.cast(casts, weights)
        call.precision = HIGHEST if policy.on_cuda(call.x) else policy.autocast_precision(half)
    takes_operators = torch_knows
    if not torch_knows and spec.backend != "torch":
        tensors = (*call.states, *call.reset_states, *weights, *chain(*call.norms))
        not_on_cuda = spec.proj_size > 0 or call.x.numel() == 0
        takes_operators = (
            policy.fusible(call.x, *tensors)
            and not (not_on_cuda and policy.on_cuda(call.x))
            and policy.kernels_work(call.x)
        )
    has_options = has_keywords or call.norms or spec.recompute or spec.has_rates
    has_options = has_options or call.precision != HIGHEST or call.instance != PLANNED
    with torch.autocast(call.x.device.type, enabled=False) if half is not None else _NO_CONTEXT:
        stack: Any = layers.stack if takes_operators else reference.stack
        results = stack(
            spec.cell,
            call.x,
            call.states[0],
            call.states[1],
            weights,
            spec.bias,
            spec.num_layers,
            spec.directions,
            spec.dropout if spec.training else 0.0,
            NO_OPTIONS if call.batch_sizes is None else LayerOptions(call.batch_sizes),
            options_of=call.layer_options if has_options else None,
            sequences=call.wants_sequence,
            widths=spec.state_widths if spec.side_by_side else None,
        )
    return call.results(results, casts)


def _choice(spec: Spec, input: Any, hx: Any, half: torch.dtype | None) -> policy.Choice | None:
    """Who computes a call without keywords, before torch.nn's own checks; None if the operators cannot."""
    packed = isinstance(input, PackedSequence)
    data, states = input.data if packed else input, () if hx is None else spec.states(hx)
    if not isinstance(data, Tensor) or states is None or type(spec.bidirectional) is not bool:
        return None
    if any(t is None for t in (*states, *spec._flat_weights)):
        return None
    tensors = (data, *states, *spec._flat_weights)
    castable = half is not None and _casts(spec, data, states, spec._flat_weights, packed) is not None
    if not policy.fusible(*tensors, castable=castable):
        return None
    dim = data.dim()
    if packed:
        if input.batch_sizes.numel() == 0:
            return None
        T, B = data.size(0), 1
    elif dim not in (2, 3) or any(s.dim() != dim for s in states):
        return None
    else:
        T, B = (data.size(0), 1) if dim == 2 else data.shape[:2]
        T, B = (B, T) if dim == 3 and spec.batch_first else (T, B)
        if T == 0:
            return None
    on_gpu = policy.on_cuda(data)
    # Whether the choice depends on it; a compiler would guard the table that its graphs do not follow.
    asks = not torch.compiler.is_compiling() and (
        half is not None or data.dtype is torch.bfloat16 or on_gpu or tuned.table.asked
    )
    return policy.choose(
        spec.cell,
        data.dtype,
        T,
        B,
        data.size(-1),
        spec.hidden_size,
        kind="packed" if packed else "sequence",
        num_layers=spec.num_layers,
        directions=spec.directions,
        proj_size=spec.proj_size,
        steps=input.batch_sizes.size(0) if packed else 1,
        backend=spec.backend,
        differentiable=asks and torch.is_grad_enabled() and policy.any_requires_grad(tensors),
        half=half,
        on_gpu=on_gpu,
        device=data.device,
    )


def _casts(spec: Spec, data: Any, states: Sequence[Any], weights: Sequence[Any], packed: bool) -> autocast.Casts | None:
    """What autocast casts a call to, or None."""
    return autocast.casts(spec.cell, data, states, weights, not packed, spec.proj_size > 0)


_NO_CONTEXT = nullcontext()


class Arguments:
    """The arguments of one call in one form.

    Attributes:
        x: ``[T, B, I]``, or ``[N, I]`` with batch_sizes.
        states: h0 and c0, ``[L*D, B, ...]`` or None for zeros; two, whatever the cell.
        batch_sizes: of a packed sequence, or None.
        T: the number of time steps.
        resets, lengths, reset_states, wants_sequence: as in `fused_rnn.LSTM.forward`, time first.
        precision: of the products of float32, one of `fused_rnn.policy`.
        instance: of the kernels (`fused_rnn.options`).

    Raises:
        ValueError, RuntimeError, TypeError: input or hx does not fit; for shapes and dtypes as in torch.nn.
    """

    resets: Tensor | None = None
    lengths: Tensor | None = None
    reset_states: tuple[Tensor | None, ...] = (None, None)
    wants_sequence = False
    precision = HIGHEST
    instance = PLANNED

    def __init__(self, spec: Spec, input: Any, hx: Any) -> None:
        self.spec, self.name = spec, spec.name
        checks: Any = spec if spec.checks is None else spec.checks
        self.packed = input if isinstance(input, PackedSequence) else None
        data = input if self.packed is None else self.packed.data
        if not isinstance(data, Tensor):
            raise TypeError(f"{self.name}: expected input to be a Tensor or PackedSequence, got {type(data).__name__}")
        if self.packed is None and data.dim() not in (2, 3):
            raise ValueError(f"{self.name}: Expected input to be 2D or 3D, got {data.dim()}D tensor instead")
        states = () if hx is None else spec.states(hx)
        if states is None:
            raise TypeError(f"{self.name}: expected hx to be None or a pair (h_0, c_0), got {kind_of(hx)}")
        if states:
            _check_tensors(self.name, "hx", states)
        self.batched = self.packed is not None or data.dim() == 3
        self.batch_sizes = None if self.packed is None else self.packed.batch_sizes
        batch_dim = 0 if spec.batch_first else 1
        if not self.batched:
            if any(s.dim() != 2 for s in states):
                raise RuntimeError(
                    f"{self.name}: For unbatched 2-D input, hx should also be 2-D, got {states[0].dim()}-D"
                )
            data, states = data.unsqueeze(batch_dim), tuple(s.unsqueeze(1) for s in states)
        elif any(s.dim() != 3 for s in states):
            raise RuntimeError(
                f"{self.name}: For batched 3-D input, hx should also be 3-D, got {states[0].dim()}-D tensor"
            )
        compiled_packed = self.packed is not None and torch.compiler.is_compiling()
        if not states and checks is not spec and not compiled_packed:  # a class's own checks look at states
            batch = data.size(batch_dim) if self.batch_sizes is None else int(self.batch_sizes[0])
            states = tuple(data.new_zeros(spec.state_rows, batch, size) for size in spec.state_sizes)
        permutes = hx is not None and (self.packed is not None or checks is not spec)
        if permutes:
            order = None if self.packed is None else self.packed.sorted_indices
            states = spec.states(checks.permute_hidden(spec.pack(states), order)) or ()
        if states and not compiled_packed:
            checks.check_forward_args(data, spec.pack(states), self.batch_sizes)
        else:  # zeros fit; how many rows a packed step has is in values, which a compiled graph leaves to the operators
            checks.check_input(data, self.batch_sizes)
        self.gave_states = hx is not None
        self.x = data.transpose(0, 1) if spec.batch_first and self.packed is None else data
        self.T = self.x.size(0) if self.batch_sizes is None else self.batch_sizes.size(0)
        self.states: tuple[Tensor | None, ...] = (*states, None, None)[:2]
        self.norms = spec.layer_norms() if spec.norms else []

    @property
    def batch(self) -> int:
        """The number of rows. A compiled graph cannot ask for it in a packed sequence, where it is a value."""
        return self.x.size(1) if self.batch_sizes is None else int(self.batch_sizes[0])

    def take_keywords(self, resets: Any, reset_state: Any, lengths: Any, wants_sequence: bool) -> None:
        """Check the keywords that torch.nn does not have, and bring them into one form.

        Raises:
            ValueError, RuntimeError, TypeError: one does not fit.
        """
        if resets is not None:
            self.check_resets(resets)
            self.resets = self.time_major(resets)
        elif reset_state is not None:
            raise ValueError(f"{self.name}: reset_state needs resets, got None")
        if lengths is not None:
            self.lengths = self.checked_lengths(lengths)
            if policy.on_cuda(self.x) or torch.compiler.is_compiling():  # there the operators multiply all of x at once
                self.x = reference.without_what_follows(self.x, self.lengths)
        if reset_state is not None:
            self.reset_states = (*self.checked_reset_states(reset_state), None)[:2]
        self.wants_sequence = wants_sequence

    def time_major(self, rows: Any) -> Any:
        """``[T, B]`` or packed ``[N]`` from a tensor in the user's layout."""
        if self.packed is not None:
            return rows.data
        if not self.batched:
            return rows.unsqueeze(1)
        return rows.transpose(0, 1) if self.spec.batch_first else rows

    def check_resets(self, resets: Any) -> None:
        """Raise an error if `resets` does not fit."""
        shape: tuple[int, ...]
        if self.packed is not None:
            if not isinstance(resets, PackedSequence):
                raise ValueError(
                    f"{self.name}: expected resets to be a PackedSequence as input is, got {kind_of(resets)}"
                )
            if not _packed_alike(resets, self.packed):
                raise ValueError(f"{self.name}: expected resets to be packed as input is, in the same order")
            shape, resets = (self.x.size(0),), resets.data
        else:
            T, B = self.x.size(0), self.x.size(1)
            shape = (T,) if not self.batched else (B, T) if self.spec.batch_first else (T, B)
        if not isinstance(resets, Tensor) or resets.dtype is not torch.bool:
            raise ValueError(f"{self.name}: expected resets to be a bool tensor, got {kind_of(resets)}")
        if resets.shape != shape:
            raise RuntimeError(f"{self.name}: Expected resets of shape {list(shape)}, got {list(resets.shape)}")
        if resets.device != self.x.device:
            raise RuntimeError(f"{self.name}: expected resets on {self.x.device}, got {resets.device}")

    def checked_lengths(self, lengths: Any) -> Tensor:
        """`lengths` on the input's device, or an error if it does not fit."""
        if self.packed is not None or not self.batched:
            what = "a PackedSequence" if self.packed is not None else "unbatched input"
            raise ValueError(f"{self.name}: lengths go with a padded batch, got {what}")
        if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{self.name}: expected lengths to be an int32 or int64 tensor, got {kind_of(lengths)}")
        if lengths.shape != (self.batch,):
            raise RuntimeError(f"{self.name}: Expected lengths of shape {[self.batch]}, got {list(lengths.shape)}")
        if self.x.is_cpu and not lengths.is_cpu:
            lengths = lengths.cpu()
        # Reading the values of a tensor on a GPU would wait for it; the kernels stop at T by themselves.
        if lengths.is_cpu and not policy.watched() and lengths.numel() > 0:
            values = lengths.tolist()  # for a batch faster than two reductions
            if not 0 <= min(values) <= max(values) <= self.T:
                raise ValueError(
                    f"{self.name}: expected lengths between 0 and {self.T}, got {min(values)} to {max(values)}"
                )
        on_device: Tensor = lengths if self.x.is_cpu else lengths.to(self.x.device, non_blocking=True)
        return on_device

    def checked_reset_states(self, reset_state: Any) -> tuple[Tensor | None, ...]:
        """``[L*D, B, size]`` each, or ``[T, L*D, B, size]``, from anything that broadcasts to either."""
        sizes, rows = self.spec.state_sizes, self.spec.state_rows
        given = self.spec.states(reset_state)
        if given is None:
            raise TypeError(f"{self.name}: expected reset_state to be a pair (h, c), got {kind_of(reset_state)}")
        _check_tensors(self.name, "reset_state", given)
        given = given if self.batched else tuple(state.unsqueeze(-2) if state.dim() else state for state in given)
        per_step = any(state.dim() == 4 for state in given)
        dtypes = CASTABLE if autocast_dtype(self.x.device) else (self.x.dtype,)
        order = None if self.packed is None else self.packed.sorted_indices
        states = []
        for state, size in zip(given, sizes, strict=True):
            if state.dtype not in dtypes or state.device != self.x.device:
                raise ValueError(
                    f"{self.name}: expected reset_state to be {self.x.dtype} on {self.x.device} as input is, "
                    f"got {state.dtype} on {state.device}"
                )
            of_one = (rows, self.batch, size)
            shape = (self.T, *of_one) if per_step else of_one
            state = state.unsqueeze(0) if per_step and state.dim() == 3 else state
            if state.dim() != len(shape) or any(
                actual not in (1, expected) for actual, expected in zip(state.shape, shape, strict=True)
            ):
                raise RuntimeError(
                    f"{self.name}: Expected reset_state of shape {list(of_one)} or {[self.T, *of_one]}, "
                    f"got {list(state.shape)}"
                )
            state = state if order is None or state.size(-2) == 1 else state.index_select(-2, order)
            states.append(state.expand(shape))
        return tuple(states)

    def casts(self, weights: Sequence[Tensor]) -> autocast.Casts | None:
        """What autocast casts this call's tensors to, or None."""
        states = self.states[: 2 if self.spec.has_c else 1] if self.gave_states else ()
        return _casts(self.spec, self.x, states, (*weights, *self.reset_states), self.packed is not None)

    def cast(self, casts: autocast.Casts, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """Cast this call's tensors; return the cast weights."""
        (self.x,) = casts.into((self.x,))
        self.states, self.reset_states = casts.into(self.states), casts.into(self.reset_states)
        self.norms = [casts.into(norms) for norms in self.norms]
        return casts.into(weights)

    def layer_options(self, index: int, x: Tensor, weights: Sequence[Tensor | None]) -> LayerOptions:
        """The options of one layer, whose input and weights these are; draws its masks."""
        spec = self.spec
        w_hh: Any = weights[1]
        D, P = spec.directions, w_hh.size(1)
        reset_h, reset_c = self.reset_states
        if spec.num_layers > 1:
            widths = spec.state_widths if spec.side_by_side else None
            of_layers = [
                reference.by_layer(s, widths, which, spec.num_layers) for which, s in enumerate(self.reset_states)
            ]
            reset_h, reset_c = (states[index] for states in of_layers)
        norm_ih, norm_hh, norm_c, norm_c_bias = (*(self.norms[index] if self.norms else ()), *[None] * 4)[:4]
        drop_h = None
        if spec.recurrent_dropout > 0 and spec.training:
            keep = 1 - spec.recurrent_dropout
            drop_h = x.new_empty(D, self.batch, P).bernoulli_(keep).div_(keep)
        zones: list[Tensor | None] = [None, None]
        if spec.zoneout != (0.0, 0.0):
            for which, (rate, width) in enumerate(zip(spec.zoneout, (P, spec.hidden_sizes[index]), strict=True)):
                if rate > 0 and spec.training:
                    zones[which] = x.new_empty(*x.shape[:-1], D * width).bernoulli_(1 - rate)
                elif rate > 0:
                    zones[which] = x.new_full((D * width,), 1 - rate)
        zone_h, zone_c = zones
        return LayerOptions(
            self.batch_sizes, self.resets, self.lengths, drop_h, zone_h, zone_c, reset_h, reset_c, norm_hh, norm_c,
            norm_c_bias, norm_ih, c_sequence=self.wants_sequence and spec.has_c, precision=self.precision,
            recompute=spec.recompute, instance=self.instance,
        )  # fmt: skip

    def empty_results(self) -> tuple[Any, ...]:
        """The results without time steps: an empty output, and the given states."""
        spec, x = self.spec, self.x
        states = [
            x.new_zeros(spec.state_rows, self.batch, size) if state is None else state.clone()
            for state, size in zip(self.states, spec.state_sizes, strict=False)
        ]
        sequences = [x.new_empty(0, spec.state_rows, self.batch, size) for size in spec.state_sizes]
        return self.results(
            [x.new_empty(0, self.batch, spec.directions * spec.state_widths[0][-1]), *states, *sequences], None
        )

    def results(self, tensors: Sequence[Tensor], casts: autocast.Casts | None) -> tuple[Any, ...]:
        """The results in torch.nn's form: output, final states, and the states of every step if they are wanted."""
        spec, packed = self.spec, self.packed
        count = 2 if spec.has_c else 1
        output, hidden, sequences = tensors[0], tensors[1 : 1 + count], tensors[1 + count :]
        if casts is not None:
            output, hidden, sequences = output.to(casts.h), casts.out_of(hidden), casts.out_of(sequences)
        if packed is not None:
            indices = (packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
            results: tuple[Any, ...] = PackedSequence(output, *indices), spec.pack(hidden)
            steps: list[Any] = [PackedSequence(s, *indices) for s in sequences]
        elif self.batched:
            results = batch_major(output) if spec.batch_first else output, spec.pack(hidden)
            steps = list(sequences)
        else:
            results = output.squeeze(1), spec.pack([h.squeeze(1) for h in hidden])
            steps = [s.squeeze(2) for s in sequences]
        if spec.checks is not None or (packed is not None and packed.unsorted_indices is not None):
            checks = spec if spec.checks is None else spec.checks
            order = None if packed is None else packed.unsorted_indices
            results = results[0], checks.permute_hidden(results[1], order)
        return (*results, spec.pack(steps)) if self.wants_sequence else results


def batch_major(output: Tensor) -> Tensor:
    """``[B, T, ...]`` from ``[T, B, ...]``."""
    # In place on the CPU, as torch.nn does: FSDP2 would lose its hooks when the user writes to a view. On CUDA backward
    # reads the output, and a compiler knows how to deal with views.
    in_place = output.is_cpu and not torch.compiler.is_compiling()
    return output.transpose_(0, 1) if in_place else output.transpose(0, 1)


def kind_of(value: Any) -> str:
    """A value's type for a message."""
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def _check_tensors(name: str, argument: str, states: Sequence[Any]) -> None:
    for state in states:
        if not isinstance(state, Tensor):
            raise TypeError(f"{name}: expected {argument} to be made of tensors, got {kind_of(state)}")


def _packed_alike(a: PackedSequence, b: PackedSequence) -> bool:
    if a.sorted_indices is not b.sorted_indices and (
        a.sorted_indices is None or b.sorted_indices is None or not torch.equal(a.sorted_indices, b.sorted_indices)
    ):
        return False
    return torch.equal(a.batch_sizes, b.batch_sizes)
