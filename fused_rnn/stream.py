"""Streams: a frozen module's state, which advances by one step or by a chunk of steps."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version


class Stream:
    """Steps of a frozen module one after another; the `stream` method of a frozen module makes it.

    Inputs are float32 tensors on the CPU or float32 numpy arrays, contiguous, and results are of the same kind. With
    `out` a step allocates nothing. Nothing records a gradient. Give each thread a stream of its own; streams share the
    weights. After `load_state_dict` of the module, a stream goes on from its state with the new weights.

    Args:
        module: a `FrozenRNN` of one direction, or a `FrozenCell`.
        batch: the number of rows B.
        threads: that share a step.

    Raises:
        RuntimeError: the module is bidirectional, or a number is out of range.
        TypeError: module is not frozen, or a number is no integer.

    Example:
        >>> import torch, fused_rnn
        >>> stream = fused_rnn.freeze(torch.nn.LSTM(3, 5)).stream()
        >>> y = stream(torch.randn(3))  # one step
        >>> y = stream.chunk(torch.randn(20, 3))  # twenty
        >>> h, c = stream.state
        >>> stream.reset()
        >>> y.shape, h.shape
        (torch.Size([20, 5]), torch.Size([1, 1, 5]))
    """

    def __init__(self, module: Any, batch: int = 1, threads: int = 1) -> None:
        if not hasattr(module, "_new_stream"):
            raise TypeError(f"Stream: expected module to be a FrozenRNN or FrozenCell, got {type(module).__name__}")
        self.module, self.batch, self.threads = module, index(batch), index(threads)
        self._packed = module._packed
        self._take_weights()
        self._width = module.proj_size or module.hidden_size
        self._has_c = module.mode == "LSTM"
        self._rows = torch.empty(self.batch, self._width, **_FLOAT32)  # what a step's result is shaped like
        self._row = self._rows[0]

    def _take_weights(self) -> None:
        self._weights = self._packed[0]
        self._stream = self.module._new_stream(self.batch, self.threads)
        self._run = self._stream.run

    def __call__(self, x: Any, *, out: Any = None) -> Any:
        """Compute one time step.

        Args:
            x: ``(B, input_size)``, or with one row ``(input_size,)``.
            out: where to write the result, a tensor or array that does not overlap with x; None means a new one.

        Returns:
            The output, ``(B, proj_size or hidden_size)`` or without B as x; `out`, if it is given.

        Raises:
            RuntimeError: type, shape, dtype, device or layout do not fit.
        """
        return self._advanced(x, out, False)

    def chunk(self, x: Any, *, out: Any = None) -> Any:
        """Compute several time steps; the result is that of single steps, and comes sooner.

        Args:
            x: ``(T, B, input_size)``, or with one row ``(T, input_size)``; time comes first, also for a module with
                ``batch_first``.
            out: as for a step.

        Returns:
            The outputs, shaped like x but ``proj_size or hidden_size`` wide; `out`, if it is given.

        Raises:
            RuntimeError: type, shape, dtype, device or layout do not fit.
        """
        return self._advanced(x, out, True)

    def _advanced(self, x: Any, out: Any, chunk: bool) -> Any:
        if self._packed[0] is not self._weights:  # the module has loaded others
            state = self.state
            self._take_weights()
            self.state = state
        try:
            if out is not None:
                result = out
            elif isinstance(x, Tensor) and not chunk:  # empty_like takes half the time of empty
                result = torch.empty_like(self._row if x.dim() == 1 else self._rows)
            else:
                result = _empty(x, (*x.shape[:-1], self._width))
        except AttributeError:
            raise RuntimeError(f"Stream: x must be a float32 tensor or array, got {type(x).__name__}") from None
        self._run(x, result, chunk)
        if isinstance(out, Tensor) and torch.is_grad_enabled() and not out.is_inference():
            increment_version(out)  # autograd may have saved it for a derivative
        return result

    @property
    def state(self) -> Any:
        """The state h ``(L, B, proj_size or hidden_size)``, or of an LSTM the pair (h, c): copies, as tensors.

        Setting it takes what getting it returns, or arrays of these shapes, or None for zeros.

        Raises:
            TypeError, RuntimeError: what it is set to has another structure, shape or dtype.
        """
        layers, hidden_size = self.module.num_layers, self.module.hidden_size
        h = torch.empty(layers, self.batch, self._width, **_FLOAT32)
        c = torch.empty(layers, self.batch, hidden_size, **_FLOAT32) if self._has_c else None
        self._stream.get_state(h, c)
        return (h, c) if self._has_c else h

    @state.setter
    def state(self, state: Any) -> None:
        if state is None:
            self.reset()
            return
        if self._has_c and (not isinstance(state, (tuple, list)) or len(state) != 2):
            raise TypeError(f"Stream.state: expected a pair (h, c) or None, got {type(state).__name__}")
        h, c = map(_plain, state) if self._has_c else (_plain(state), None)
        self._stream.set_state(h, c)

    def reset(self, rows: Any = None) -> None:
        """Set the state to zeros.

        Args:
            rows: bool ``(B,)``, true for the rows to reset. None means all.

        Raises:
            RuntimeError: rows is not bool, or has another shape.
        """
        if rows is None:
            self._stream.reset(None)
            return
        mask = torch.as_tensor(rows)
        if mask.dtype is not torch.bool or mask.shape != (self.batch,):
            raise RuntimeError(
                f"Stream.reset: expected rows to be bool of shape [{self.batch}], got {mask.dtype} of shape "
                f"{list(mask.shape)}"
            )
        self._stream.reset(bytes(mask.tolist()))

    def __reduce__(self) -> tuple[Callable[..., Stream], tuple[Any, ...]]:
        return _restored, (self.module, self.batch, self.threads, self.state)


_FLOAT32: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are


def _restored(module: Any, batch: int, threads: int, state: Any) -> Stream:
    stream = Stream(module, batch, threads)
    stream.state = state
    return stream


def _plain(state: Any) -> Tensor:
    try:
        return torch.as_tensor(state).detach().resolve_neg().contiguous()
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"Stream.state: expected tensors or arrays, got {type(state).__name__}: {error}") from None


def _empty(like: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(like, Tensor):
        return torch.empty(shape, **_FLOAT32)
    import numpy

    return numpy.empty(shape, numpy.float32)
