"""RNN, LSTM and GRU: torch.nn's classes with a forward on the fused kernels.

Everything but `forward`, `step` and `backend` is inherited: parameters, initialisation, state_dict, repr, pickling.
Calls that the kernels cannot run (another dtype or device, a compiler or a mode that watches torch's operations, wrong
arguments) go to torch.nn's own forward, which computes them or raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import autocast, cuda, eligibility, functional, segments, steps
from fused_rnn.convert import TorchConvertible, documentation, fx_leaf
from fused_rnn.variants import Variants

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fused_rnn.variants import Options

_CHECKS = ("check_forward_args", "check_input", "check_hidden_size", "permute_hidden")  # a subclass may override


class FusedRNNBase(TorchConvertible, Variants):
    """Base class of RNN, LSTM and GRU: brings their arguments into the form that `fused_rnn.functional.stack` takes."""

    _checks_are_torchs = True

    backend = "auto"
    """Selects who computes a call; see `Variants`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes the arguments of torch.nn's class, and ``backend`` as a keyword."""
        backend = kwargs.pop("backend", "auto")
        if backend not in eligibility.BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, eligibility.BACKENDS))}, got {backend!r}")
        super().__init__(*args, **kwargs)
        if backend != "auto":
            self.backend = backend

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._checks_are_torchs = all(getattr(cls, name).__module__ == torch.nn.RNNBase.__module__ for name in _CHECKS)

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        resets: Tensor | None = None,
        reset_state: Any = None,
        lengths: Tensor | None = None,
        return_state_sequence: bool = False,
    ) -> Any:
        """Compute all time steps, as torch.nn's forward does. The keyword arguments are additions to torch.nn.

        Args:
            input: ``(T, B, input_size)``, or ``(B, T, input_size)`` with ``batch_first``, or ``(T, input_size)``
                unbatched, or a PackedSequence.
            hx: the initial state(s), each ``(L*D, B, size)``, or ``(L*D, size)`` unbatched. The LSTM takes a pair
                (h_0, c_0) of sizes ``proj_size or hidden_size`` and ``hidden_size``. None means zeros.
            resets: bool ``(T, B)``, or ``(B, T)`` with ``batch_first``, or ``(T,)`` unbatched; for a PackedSequence, a
                PackedSequence of bools that is packed in the same way. True at step t starts a new sequence: the state
                is replaced before step t. The reverse direction starts anew at the same borders. No gradient
                flows across a reset.
            reset_state: the state(s) that a reset sets, shaped like hx, or with an additional first dimension T for
                a state per step, or broadcastable to either, such as a learned state ``(L*D, 1, size)``. Gradients
                flow into it. None means zeros.
            lengths: int32 or int64 ``(B,)``, the number of steps of each row, 0 to T, in any order, on any device.
                Outputs after the end of a row are zero, its final state is that of its last step, and the
                reverse direction begins there.
            return_state_sequence: whether to return the state(s) after every step as a third result.

        Returns:
            The output, shaped like input but ``D * (proj_size or hidden_size)`` wide, and the final state(s), shaped
            like hx. With ``return_state_sequence``, also the state(s) after every step, ``(T, L*D, B, size)``.

        Raises:
            ValueError, RuntimeError: sizes or dtypes do not match; type and message are torch.nn's.
        """
        if self._varied or not (
            resets is None and reset_state is None and lengths is None and return_state_sequence is False
        ):
            self._refresh_flat_weights()
            return segments.run(self, input, hx, resets, reset_state, lengths, return_state_sequence)
        if self._usual(input, 3, hx):
            try:
                return self._fused(input, hx)
            except RuntimeError:
                pass  # something does not fit, or belongs to torch: find out below, and raise torch's error
        return self._checked(input, hx)

    def step(
        self,
        input: Tensor,
        hx: Any = None,
        *,
        resets: Tensor | None = None,
        reset_state: Any = None,
        active: Tensor | None = None,
        out: Any = None,
    ) -> tuple[Tensor, Any]:
        """Compute one time step, for streams and rollouts. Equals `forward` on a sequence of one step; runs no hooks.

        Args:
            input: ``(B, input_size)``, or ``(input_size,)`` unbatched.
            hx: the state(s), as in `forward`. None means zeros.
            resets: bool ``(B,)``, or ``()`` unbatched, true for the rows whose state is replaced before the step.
            reset_state: the state(s) that a reset sets, shaped like hx or broadcastable to it. None means zeros.
            active: bool ``(B,)``, or ``()`` unbatched, true for the rows that take the step. The others keep their
                state, whatever their input and `resets` are, and their output is zero. None means all rows.
            out: a pair (output, hx) of tensors, shaped like the results, that the results are written to. Its states
                may be the tensors given as hx, which are then updated in place. On a CPU, the call then allocates no
                memory for tensors if all are contiguous and of float32 or float64 and the module uses no dropout and
                no regularisation. Such a call is not differentiable.

        Returns:
            The output ``(B, proj_size or hidden_size)``, or ``(proj_size or hidden_size,)`` unbatched, and the
            state(s) for the next step, shaped like hx. With `out`, the two members of `out`.

        Raises:
            ValueError: the module is bidirectional; or `resets` or `active` is not bool; or `reset_state` is given
                without `resets`.
            TypeError: hx, `reset_state` or `out` is not a tensor, or pair of tensors, as the results are.
            RuntimeError: sizes or dtypes do not match, as in `forward`; or `out` is given while an argument
                requires a gradient.
        """
        if self.bidirectional:
            raise ValueError(f"{type(self).__name__}.step: expected bidirectional=False, got {self.bidirectional}")
        if isinstance(input, PackedSequence) or input.dim() not in (1, 2):
            got = "a PackedSequence" if isinstance(input, PackedSequence) else f"{input.dim()}-D tensor"
            raise RuntimeError(f"{type(self).__name__}.step: expected input to be 1-D or 2-D, got {got}")
        if not (resets is None and reset_state is None and active is None and out is None):
            return steps.run(self, input, hx, resets, reset_state, active, out)
        if not self._varied and self._usual(input, 2, hx):
            try:
                y, *hidden = steps.without_options(self, input, self._given_states(hx))
                return y, self._pack_states(hidden)
            except RuntimeError:
                pass
        time_dim = 1 if self.batch_first and input.dim() == 2 else 0
        y, hidden = FusedRNNBase.forward(self, input.unsqueeze(time_dim), hx)
        return y.squeeze(time_dim), hidden

    @eligibility.runs_eagerly
    def _fused(self, input: Tensor, hx: Any) -> Any:
        """Batched plain tensors, checked by the operators alone: the usual call, short of what it can do without.

        Raises:
            RuntimeError: the operators cannot compute this.
        """
        x = input.transpose(0, 1) if self.batch_first else input
        y, *hidden = self._stack(x, (None, None) if hx is None else self._given_states(hx))
        return _batch_major(y) if self.batch_first else y, self._pack_states(hidden)

    @eligibility.runs_eagerly
    def _usual(self, input: Any, dim: int, hx: Any) -> bool:
        """Whether this is the usual call, where every check that is left is made by the operators."""
        if (
            eligibility.watched()
            or torch.is_autocast_enabled("cpu")
            or not eligibility.plain(input, dim)
            or input.dtype not in eligibility.DTYPES
            or not self._usual_weights()
        ):
            return False
        batch = input.size(0 if dim == 2 or self.batch_first else 1)
        if self.backend == "torch" or (
            self.backend == "auto" and eligibility.torch_is_faster(self.mode, input.dtype, batch, self.hidden_size)
        ):
            return False
        if hx is None:
            return True
        rows = self.num_layers * (2 if self.bidirectional else 1)
        for state in self._given_states(hx) or (None,):
            if not eligibility.plain(state, 3) or state.size(0) != rows:
                return False
        return True

    @eligibility.runs_eagerly
    def _stack(
        self, x: Tensor, states: Any, batch_sizes: Tensor | None = None, weights: Any = None, **more: Any
    ) -> tuple[Tensor, ...]:
        return functional.stack(
            self.mode.lower(),
            x,
            states,
            weights or self._flat_weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            batch_sizes,
            **more,
        )

    def _usual_weights(self) -> bool:
        """Whether the flat weights are up to date, plain, and on the CPU."""
        parameters: Any = self._parameters
        plain = eligibility.PLAIN_TYPES
        for name, weight in zip(self._flat_weights_names, self._flat_weights, strict=False):
            if parameters.get(name) is not weight or type(weight) not in plain or not weight.is_cpu:
                return False
        return self._checks_are_torchs and type(self.bidirectional) is bool

    @eligibility.runs_eagerly
    def _checked(self, input: Any, hx: Any) -> Any:
        """Any call: packed, unbatched, irregular or wrong; torch.nn itself takes what the kernels cannot."""
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input
        states = self._given_states(hx)
        # The weights last: torch.nn's forward gets its own, and a parametrised one may change whenever it is got.
        if states is None or not eligibility.fusible(data) or (packed and input.batch_sizes.numel() == 0):
            return self._torchs(input, hx)
        self._refresh_flat_weights()
        weights = self._flat_weights
        casts = self._casts(data, states, weights, packed)
        if casts:
            (data,), states, weights = (casts.into(tensors) for tensors in ((data,), states, weights))
        if not self._regular(data, states, weights, packed):
            return super().forward(input, hx)

        batch_sizes: Any = None
        sorted_indices = unsorted_indices = None
        batched = data.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if packed:
            _, batch_sizes, sorted_indices, unsorted_indices = input
        else:
            if not batched:
                data = data.unsqueeze(batch_dim)
                states = tuple(s.unsqueeze(1) for s in states)
        if states or not self._checks_are_torchs:
            if not states:
                batch = int(batch_sizes[0]) if packed else data.size(batch_dim)
                states = tuple(self._zero_states(data, batch))
                sorted_indices = None  # what nobody gave is in no order
            hidden = self._pack_states(states)
            hidden = self.permute_hidden(hidden, sorted_indices)
            states = self._given_states(hidden) or ()
            self._check_arguments(data, states, batch_sizes)
        else:  # zeros fit by themselves, and the kernels need no tensor for them
            self.check_input(data, batch_sizes)
            states = (None,) * len(self._state_sizes())

        time_major = data.transpose(0, 1) if self.batch_first and not packed else data
        output: Any
        output, *hidden = self._stack(time_major, states, batch_sizes, weights)
        if casts:
            output, hidden = output.to(casts.h), casts.out_of(hidden)

        if packed:
            output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        elif not batched:
            output = output.squeeze(1)
            hidden = [s.squeeze(1) for s in hidden]
        elif self.batch_first:
            output = _batch_major(output)
        return output, self.permute_hidden(self._pack_states(hidden), unsorted_indices)

    def _casts(self, data: Any, states: Any, weights: Any, packed: bool) -> autocast.Casts | None:
        return autocast.casts(self.mode.lower(), data, states, weights, not packed, getattr(self, "proj_size", 0) > 0)

    def _torchs(self, input: Any, hx: Any) -> Any:
        """torch.nn's own forward; the specification where that has no rule for a transform (vmap: for none)."""
        if torch.compiler.is_compiling() or not eligibility.transformed() or self.backend == "torch":
            return super().forward(input, hx)
        try:
            return super().forward(input, hx)
        except RuntimeError:
            return segments.run(self, input, hx, None, None, None, False)

    @eligibility.runs_eagerly
    def _refresh_flat_weights(self) -> None:
        # torch.nn's _update_flat_weights, without the cost of its attribute look-ups in the usual case.
        parameters = self._parameters
        for name, weight in zip(self._flat_weights_names, self._flat_weights, strict=False):
            if parameters.get(name) is not weight or weight is None:
                self._update_flat_weights()
                return

    # RNN and GRU have one state, a tensor; the LSTM has a pair.

    @eligibility.runs_eagerly
    def _given_states(self, hx: Any) -> tuple[Any, ...] | None:
        """The states in hx; () if there are none, None if hx is not what forward expects."""
        return () if hx is None else (hx,)

    @eligibility.runs_eagerly
    def _pack_states(self, states: Any) -> Any:
        return states[0]

    def _zero_states(self, data: Tensor, batch: int) -> list[Tensor]:
        rows = self._state_rows()
        return [torch.zeros(rows, batch, size, dtype=data.dtype, device=data.device) for size in self._state_sizes()]

    def _regular(self, data: Any, states: tuple[Any, ...], weights: Sequence[Any], packed: bool) -> bool:
        """Whether the kernels may take these arguments, as far as torch's own checks do not tell."""
        tensors = (data, *states, *weights)
        if any(t is None for t in tensors) or not eligibility.fusible(*tensors):
            return False
        dim = data.dim()
        time_dim = 1 if self.batch_first and dim == 3 else 0
        return (
            isinstance(self.bidirectional, bool)
            and (packed or (dim in (2, 3) and data.size(time_dim) > 0))
            and (packed or all(s.dim() == dim for s in states))
            and not self._torch_computes(data, packed)
        )

    def _torch_computes(self, data: Tensor, packed: bool) -> bool:
        if eligibility.on_cuda(data) and (data.numel() == 0 or getattr(self, "proj_size", 0) > 0):
            return True  # the CUDA kernels have no projection
        if self.backend != "auto":
            return self.backend == "torch"
        if torch.compiler.is_compiling():
            return eligibility.on_cuda(data)  # not by sizes, which may be symbols here, and would be guarded
        batched = not packed and data.dim() == 3
        batch = data.size(0 if self.batch_first else 1) if batched else 1
        steps = data.size(1 if batched and self.batch_first else 0)
        if not eligibility.on_cuda(data):
            half = autocast.dtype_on(data.device)
            if half is not None:
                return autocast.torch_is_faster(self.mode.lower(), half, steps, batch, self.hidden_size)
            return eligibility.torch_is_faster(self.mode, data.dtype, batch, self.hidden_size)
        directions = 2 if self.bidirectional else 1
        shape = (steps, batch, data.size(-1))
        properties = cuda.device_properties(data.device)
        return cuda.torch_is_faster(
            self.mode, data.dtype, shape, self.hidden_size, self.num_layers, directions, properties
        )


def _batch_major(output: Tensor) -> Tensor:
    # In place on the CPU, as torch.nn does: FSDP2 would lose its hooks when the user writes to a view. On CUDA backward
    # reads the output, and a compiler knows how to deal with views.
    in_place = output.is_cpu and not torch.compiler.is_compiling()
    return output.transpose_(0, 1) if in_place else output.transpose(0, 1)


@fx_leaf
class RNN(FusedRNNBase, torch.nn.RNN):
    __doc__ = documentation(torch.nn.RNN, Variants)

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int | Sequence[int],
            num_layers: int = ...,
            nonlinearity: Literal["tanh", "relu"] = "tanh",
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: torch.device | str | int | None = None,
            dtype: torch.dtype | None = None,
            **options: Unpack[Options],
        ) -> None: ...


@fx_leaf
class LSTM(FusedRNNBase, torch.nn.LSTM):
    __doc__ = documentation(torch.nn.LSTM, Variants)

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int | Sequence[int],
            num_layers: int = ...,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            proj_size: int = 0,
            device: torch.device | str | int | None = None,
            dtype: torch.dtype | None = None,
            **options: Unpack[Options],
        ) -> None: ...

    @eligibility.runs_eagerly
    def _given_states(self, hx: Any) -> tuple[Any, ...] | None:
        if hx is None:
            return ()
        return tuple(hx) if isinstance(hx, (tuple, list)) and len(hx) == 2 else None

    @eligibility.runs_eagerly
    def _pack_states(self, states: Any) -> Any:
        return tuple(states)


@fx_leaf
class GRU(FusedRNNBase, torch.nn.GRU):
    __doc__ = documentation(torch.nn.GRU, Variants)

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int | Sequence[int],
            num_layers: int = ...,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: torch.device | str | int | None = None,
            dtype: torch.dtype | None = None,
            **options: Unpack[Options],
        ) -> None: ...
