"""RNN, LSTM and GRU: torch.nn's classes with a forward on the fused kernels.

Parameters, initialisation, state_dict, repr and pickling are inherited; `fused_rnn.constructor` adds the options. Calls
without options and our keywords that the kernels cannot run (another dtype or device, a mode that watches torch's
operations, wrong arguments) go to torch.nn's own forward, which computes them or raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import call, operators, policy, steps, tuned
from fused_rnn.cell_info import NUMBER
from fused_rnn.constructor import Variants
from fused_rnn.convert import TorchConvertible, documentation, fx_leaf
from fused_rnn.spec import Spec

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fused_rnn.constructor import Options

_CHECKS = (  # a subclass may override
    "check_forward_args",
    "check_input",
    "check_hidden_size",
    "permute_hidden",
    "get_expected_hidden_size",
    "get_expected_cell_size",
)


class FusedRNNBase(TorchConvertible, Variants):
    """Base class of RNN, LSTM and GRU. Others than plain calls go to `fused_rnn.call`.

    A plain call is one C++ function (csrc/bindings/plain.cpp), and in training a node of `fused_rnn.autograd`.
    """

    _checks_are_torchs = True

    backend = "auto"
    """Selects who computes a call; see `Variants`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes the arguments of torch.nn's class, and ``backend`` as a keyword."""
        backend = kwargs.pop("backend", "auto")
        policy.check_backend(backend)  # before parameters are drawn
        super().__init__(*args, **kwargs)
        if backend != "auto":
            self.backend = backend

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        checks = [getattr(cls, name) for name in _CHECKS if hasattr(cls, name)]
        cls._checks_are_torchs = all(check.__module__ == torch.nn.RNNBase.__module__ for check in checks)

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
            ValueError, RuntimeError: sizes, dtypes or devices do not match; or `lengths` are not from 0 to T, or come
                with input that is no padded batch; or `reset_state` comes without `resets`.
            TypeError: input, hx or `reset_state` is not made of tensors as above.

            Without the keywords, and without options that torch.nn does not have, type and message are torch.nn's.
        """
        may_be_plain = reset_state is None and return_state_sequence is False
        if may_be_plain and not self._varied:
            if (results := self._plain(input, hx, 3, resets, lengths)) is not None:
                return results
            if resets is None and lengths is None and self._leaves_weights_to_torch(input):
                return self._torchs(input, hx)
        keywords = (resets, reset_state, lengths, return_state_sequence)
        return call.run(self._spec(), None if self._varied else self._torchs, input, hx, *keywords)

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
            TypeError: input is not a tensor; or hx, `reset_state` or `out` is not a tensor, or pair of tensors, as the
                results are.
            RuntimeError: sizes or dtypes do not match, as in `forward`; or `out` is given while an argument
                requires a gradient.
        """
        if self.bidirectional or not isinstance(input, Tensor) or input.dim() not in (1, 2):
            steps.refuse(f"{type(self).__name__}.step", self.bidirectional, input)
        may_be_plain = reset_state is None and active is None and out is None
        if may_be_plain and not self._varied and (results := self._plain(input, hx, 2, resets, None)) is not None:
            return results
        if not (may_be_plain and resets is None):
            return steps.run(self._spec(), input, hx, resets, reset_state, active, out)
        steps.check_hx(f"{type(self).__name__}.step", self.mode == "LSTM", input, hx)
        time_dim = 1 if self.batch_first and input.dim() == 2 else 0
        y, hidden = FusedRNNBase.forward(self, input.unsqueeze(time_dim), hx)
        return y.squeeze(time_dim), hidden

    @policy.runs_eagerly
    def _plain(self, input: Any, hx: Any, dim: int, resets: Any, lengths: Any) -> tuple[Any, Any] | None:
        """The results of a plain call, from one C++ function; None if it has to be looked at more closely."""
        if (
            torch.compiler.is_compiling()
            or (self.training and self.dropout and self.num_layers > 1)
            or self.num_layers == 0  # a cell's
            or (self.hidden_size in tuned.table.hidden_sizes and resets is None and lengths is None)
            or self.backend == "torch"
            or not self._checks_are_torchs
            or type(self.bidirectional) is not bool
        ):
            return None
        results: tuple[Any, Any] | None = operators.plain(
            input,
            hx,
            dim,
            NUMBER[self.mode.lower()],
            self.num_layers,
            2 if self.bidirectional else 1,
            self.bias,
            getattr(self, "proj_size", 0) > 0,
            self.batch_first,
            self._parameters,
            self._flat_weights_names,
            self._flat_weights,
            resets,
            lengths,
        )
        return results

    def _leaves_weights_to_torch(self, input: Any) -> bool:
        """Whether torch.nn's forward computes the call and reads the weights: a parametrised one may be random."""
        return self.backend == "torch" or ("parametrizations" in self._modules and not policy.fusible(_data(input)))

    @policy.runs_eagerly
    def _spec(self) -> Spec:
        """This module's configuration and weights, as they are now."""
        parameters = self._parameters
        for name, weight in zip(self._flat_weights_names, self._flat_weights, strict=False):
            if parameters.get(name) is not weight or weight is None:
                self._update_flat_weights()  # torch.nn's, which costs a look-up of every attribute
                break
        norms = [getattr(self, name) for name, _ in self._norm_shapes()] if self._varied else ()
        return Spec(
            type(self).__name__, self.mode, self.input_size, self.hidden_size, self.num_layers, self.bias,
            self.batch_first, self.dropout, self.bidirectional, getattr(self, "proj_size", 0), self.training,
            self.backend, self._flat_weights, norms, checks=None if self._checks_are_torchs else self,
            **self._regularisation,
        )  # fmt: skip

    @policy.runs_eagerly
    def _torchs(self, input: Any, hx: Any) -> Any:
        """torch.nn's own forward, or the specification under a transform for which torch.nn has no rule."""
        if self.backend == "torch" or policy.torch_has_rule(packed=isinstance(input, PackedSequence)):
            return super().forward(input, hx)
        return call.run(self._spec(), None, input, hx)


def _data(input: Any) -> Any:
    return input.data if isinstance(input, PackedSequence) else input


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
