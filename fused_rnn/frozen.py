"""Frozen modules: weights rounded and packed once, for inference on a CPU.

A frozen module keeps its weights twice: as the bytes of a model file (frozen_file.py), and as the library packed them
for the machine it runs on. Copies and streams of a module share what was packed, which is freed with the last of them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fused_rnn import _C, policy, steps, survey
from fused_rnn.call import Arguments, batch_major, kind_of
from fused_rnn.cell_info import NUMBER
from fused_rnn.cells import check_ranks
from fused_rnn.convert import TorchConvertible
from fused_rnn.frozen_file import WEIGHTS, Layout, buffer
from fused_rnn.spec import Spec
from fused_rnn.stream import Stream
from fused_rnn.subclasses import NAMES, fused_class, obstacle, torch_class

_operator = torch.ops.fused_rnn.frozen.default


def freeze(module: Module, weights: str = "float32") -> Any:
    """Return an inference module whose weights are fixed, and packed once instead of at every call.

    Args:
        module: an RNN, LSTM, GRU or cell, torch.nn's or ours; or a model that holds some. It is not changed, and later
            changes of its weights do not reach the result: freeze again.
        weights: "float32", with the results of the deterministic kernels bit for bit, if those multiply in float32, as
            they do by default; "bfloat16", weights rounded to that, arithmetic in float32; or "int8", weights rounded
            to 8-bit integers with a scale for each row and inputs and states to 16-bit integers at every step.

    Returns:
        A `FrozenRNN` or `FrozenCell`. For a model, a deep copy in which every such module is frozen, in eval mode and
        without gradients of parameters; its attribute `frozen` is the list of their names.

    Raises:
        TypeError: module is no module, or frozen already; or a module has an option, or a forward of its own, that no
            frozen module computes. All are named.
        ValueError: weights is something else; or the model has no such module; or weights are not float32 on the CPU,
            or for "int8" not finite.

    Example:
        >>> import torch, fused_rnn
        >>> frozen = fused_rnn.freeze(torch.nn.GRU(3, 5), weights="int8")
        >>> frozen
        FrozenRNN(GRU(3, 5), weights='int8')
        >>> output, h_n = frozen(torch.randn(7, 2, 3))
        >>> stream = frozen.stream()
        >>> stream(torch.randn(3)).shape
        torch.Size([5])
    """
    if weights not in tuple(WEIGHTS):  # which may be unhashable
        raise ValueError(f"freeze: expected weights to be one of {', '.join(map(repr, WEIGHTS))}, got {weights!r}")
    if not isinstance(module, Module):
        raise TypeError(f"freeze: expected module to be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, _Frozen):
        raise TypeError("freeze: the module is frozen already; freeze the one that it was made from")
    if torch_class(type(module)) is not None:
        if why := _obstacle(module):
            raise TypeError(f"freeze: cannot freeze this {type(module).__name__}: {why}")
        return _frozen(module, weights)
    names, refused, memo = [], {}, {}
    for name, part in module.named_modules():
        if torch_class(type(part)) is None:
            why = survey.reason(part)
        elif not (why := _obstacle(part)):
            names.append(name)
            memo[id(part)] = _frozen(part, weights)
        if why:
            refused[name] = why
    refused |= {name: survey.OUTSIDE for name, part in survey.held_outside(module) if torch_class(type(part))}
    if refused:
        raise TypeError("\n  ".join(["freeze: cannot freeze", *(f"{name}: {why}" for name, why in refused.items())]))
    if hasattr(module, "frozen"):
        raise ValueError("freeze: the model has an attribute named 'frozen' of its own")
    if not names:
        found = "only frozen ones" if any(isinstance(part, _Frozen) for part in module.modules()) else "none"
        raise ValueError(f"freeze: expected a model with an {', '.join(NAMES[:-1])} or {NAMES[-1]}, found {found}")
    # Which takes the frozen modules for the copies of the others.
    model: Any = copy.deepcopy(module, memo).eval().requires_grad_(False)
    model.frozen = names
    return model


def _obstacle(module: Any) -> str | None:
    """Why a module of one of the six classes, or derived from one, cannot be frozen; None if it can."""
    if module._forward_pre_hooks or module._forward_hooks:
        return "it has forward hooks, which a frozen module would not call"
    if isinstance(module, TorchConvertible):
        if "forward" in vars(module):
            return "it has a forward of its own"
        if getattr(module, "_varied", False):
            return "frozen modules have no layer_norm, zoneout, recurrent_dropout, weight_dropout or sizes by layer"
        ours: Any = fused_class(torch_class(type(module)))  # type: ignore[arg-type]  # never None here
        return None if type(module).forward is ours.forward else f"{type(module).__qualname__} has a forward of its own"
    return None if torch.nn.utils.parametrize.is_parametrized(module) else obstacle(module)


def load_frozen(path: str | PathLike[str]) -> Any:
    """Read a file that the `save` of a frozen module has written.

    Args:
        path: the file.

    Returns:
        A `FrozenRNN` or `FrozenCell`, equal to the saved one bit for bit.

    Raises:
        OSError: the file cannot be read.
        RuntimeError: the file is damaged, or of another kind or version. The message names it and says what is wrong.

    Example:
        >>> import tempfile, torch, fused_rnn
        >>> file = tempfile.NamedTemporaryFile(suffix=".frnn")
        >>> fused_rnn.freeze(torch.nn.LSTM(3, 5)).save(file.name)
        >>> fused_rnn.load_frozen(file.name)
        FrozenRNN(LSTM(3, 5), weights='float32')
    """
    with open(path, "rb") as file:
        model = torch.zeros(os.fstat(file.fileno()).st_size, dtype=torch.uint8, device="cpu")
        file.readinto(buffer(model))
    try:
        packed = _C.frozen_model(buffer(model))
    except RuntimeError as error:
        reason = str(error).removeprefix("fused_rnn: ")
        raise RuntimeError(f"load_frozen: cannot load {os.fspath(path)}: {reason}") from None
    layout = Layout.of(model)
    return (FrozenCell if layout.is_cell else FrozenRNN)(layout, model, packed).eval()


def _frozen(module: Any, weights: str) -> FrozenRNN | FrozenCell:
    is_cell = isinstance(module, torch.nn.RNNCellBase)
    base = torch_class(type(module))
    assert base is not None
    mode = base.__name__.removesuffix("Cell").upper()
    if mode == "RNN":
        mode = f"RNN_{module.nonlinearity.upper()}" if is_cell else module.mode
    layout = Layout(
        mode,
        weights,
        module.input_size,
        module.hidden_size,
        num_layers=getattr(module, "num_layers", 1),
        proj_size=getattr(module, "proj_size", 0),
        bias=bool(module.bias),
        bidirectional=getattr(module, "bidirectional", False),
        batch_first=getattr(module, "batch_first", False),
        is_cell=is_cell,
    )
    parts: dict[str, Tensor] = {}
    for name, shape in layout.shapes():
        parts.update(_rounded(name, getattr(module, name), shape, weights))
    model = layout.written(parts)
    return (FrozenCell if is_cell else FrozenRNN)(layout, model, _C.frozen_model(buffer(model))).eval()


def _rounded(name: str, weight: Any, shape: tuple[int, ...], weights: str) -> Iterator[tuple[str, Tensor]]:
    """A weight as it is stored, with its scales behind it; biases stay as they are."""
    fits = isinstance(weight, Tensor) and weight.dtype is torch.float32 and weight.is_cpu
    if not fits or weight.shape != shape or weight.numel() == 0:
        got = f"{weight.dtype} {list(weight.shape)} on {weight.device}" if isinstance(weight, Tensor) else weight
        raise ValueError(f"freeze: expected {name} to be float32 on the CPU, {list(shape)} and not empty, got {got}")
    weight = weight.detach()
    if len(shape) == 1 or weights != "int8":
        yield name, weight if len(shape) == 1 else weight.to(WEIGHTS[weights])
        return
    if not weight.isfinite().all():
        raise ValueError(f"freeze: expected {name} to be finite for weights='int8'")
    scale = weight.abs().amax(1) / 127
    yield name, (weight / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).round_().to(torch.int8)
    yield f"{name}_scale", scale


class _Frozen(Module):
    """The weights of a frozen module: the bytes of a model, and what the library made of them."""

    _model: Tensor
    _packed: list[Any]  # [the packed weights], which live as long; streams share the list, and see when they change

    def __init__(self, layout: Layout, model: Tensor, packed: Any) -> None:
        super().__init__()
        self._layout, self._packed = layout, [packed]
        self.mode, self.input_size, self.hidden_size = layout.mode, layout.input_size, layout.hidden_size
        self.num_layers, self.bias, self.batch_first = layout.num_layers, layout.bias, layout.batch_first
        self.bidirectional, self.proj_size, self.weights = layout.bidirectional, layout.proj_size, layout.weights
        directions = 2 if layout.bidirectional else 1
        self._sizes = (NUMBER[self.mode.lower()], self.num_layers, directions, self.hidden_size, self.proj_size)
        self._spec = Spec(
            f"Frozen{layout.name}", self.mode, self.input_size, self.hidden_size, self.num_layers, self.bias,
            self.batch_first, 0.0, self.bidirectional, self.proj_size,
            _flat_weights=(torch.empty(0, dtype=torch.float32, device="cpu"),),  # torch.nn's checks look at its dtype
        )  # fmt: skip
        self.register_buffer("_model", model, persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch.nn's
        self._packed = [_C.frozen_model(buffer(self._model)) if policy.plain(self._model, 1) else None]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, view in self._layout.parts(self._model):
            destination[prefix + name] = view.clone()  # torch.save refuses views of several dtypes

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        parts = {}
        for name, view in self._layout.parts(self._model):
            given = state_dict.get(prefix + name)
            if given is None:
                missing_keys.append(prefix + name)
            elif not isinstance(given, Tensor) or given.shape != view.shape or given.dtype is not view.dtype:
                shape = f" of shape {list(given.shape)}" if isinstance(given, Tensor) else ""
                error_msgs.append(
                    f"expected {prefix}{name} to be {view.dtype} of shape {list(view.shape)}, as weights="
                    f"{self.weights!r} has it, got {kind_of(given)}{shape}"
                )
            parts[name] = view if given is None else given
        if strict:
            known = {prefix + name for name in parts}
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]
        if not error_msgs:
            model = self._layout.written(parts)
            self._model, self._packed[0] = model, _C.frozen_model(buffer(model))

    def train(self, mode: bool = True) -> Any:
        """Stay in evaluation mode, whatever `mode` is: a frozen module has nothing to train.

        A model with a frozen part can thus be trained; the part is fixed.
        """
        return super().train(False)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a file for `load_frozen`, and for `fused_rnn/stream.h`, which needs neither Python nor torch.

        Args:
            path: the file, which is overwritten.

        Raises:
            OSError: the file cannot be written.
        """
        with open(path, "wb") as file:
            file.write(buffer(self._model))

    def stream(self, batch: int = 1, threads: int = 1) -> Stream:
        """Return a new stream, which owns a state and advances it step by step.

        Args:
            batch: the number of rows.
            threads: that may share a step; best 1 or as many as torch's, or OpenMP ends and starts threads between a
                step and torch's operations. Layers that one thread computes sooner stay on one.

        Raises:
            RuntimeError: the module is bidirectional, or a number is out of range.
            TypeError: a number is no integer.
        """
        return Stream(self, batch, threads)

    def _new_stream(self, batch: int, threads: int) -> _C.Stream:
        """What `Stream` wraps."""
        return _C.Stream(buffer(self._model), batch, threads)

    def extra_repr(self) -> str:
        options = [str(self.input_size), str(self.hidden_size)]
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "bidirectional": False, "proj_size": 0}
        if self.mode == "RNN_RELU":
            options.append("nonlinearity='relu'")
        options += [f"{key}={getattr(self, key)}" for key, default in defaults.items() if getattr(self, key) != default]
        return f"{self._layout.name}({', '.join(options)}), weights={self.weights!r}"

    def _run(self, x: Tensor, h0: Any = None, c0: Any = None, *more: Any) -> Any:
        """The operator; y, h_n and c_n.

        Raises:
            RuntimeError: a tensor does not fit, or requires a gradient.
        """
        if torch.is_grad_enabled() and policy.any_requires_grad((x, h0, c0, *more)):
            raise RuntimeError(
                f"{self._spec.name}: frozen modules have no gradient; call it under torch.no_grad(), or with tensors "
                "that do not require one"
            )
        return _operator(self._model, *self._sizes, x, h0, c0, *more)


class FrozenRNN(_Frozen):
    """A frozen RNN, LSTM or GRU; `freeze` makes it. Its sizes are those of the module that it was made from."""

    def flatten_parameters(self) -> None:
        """Do nothing, as torch.nn's does on a CPU."""

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        resets: Tensor | None = None,
        reset_state: Any = None,
        lengths: Tensor | None = None,
    ) -> Any:
        """Compute all time steps.

        Args:
            input: ``(T, B, input_size)``, or ``(B, T, input_size)`` with ``batch_first``, or ``(T, input_size)``
                unbatched, or a PackedSequence; float32, on the CPU.
            hx, resets, reset_state, lengths: as in `fused_rnn.LSTM.forward`.

        Returns:
            The output and the final state(s), as `fused_rnn.LSTM.forward`.

        Raises:
            ValueError, RuntimeError, TypeError: an argument does not fit, or requires a gradient.
        """
        if resets is None and reset_state is None and lengths is None and self._is_plain(input, hx):
            h0, c0 = hx if isinstance(hx, tuple) else (hx, None)
            x = input.transpose(0, 1) if self.batch_first else input
            y, h_n, c_n = self._run(x, h0, c0)
            return batch_major(y) if self.batch_first else y, (h_n, c_n) if self.mode == "LSTM" else h_n
        call = Arguments(self._spec, input, hx)
        call.take_keywords(resets, reset_state, lengths, False)
        if call.T == 0:
            if lengths is None and resets is None:
                raise RuntimeError("Expected sequence length to be larger than 0 in RNN")  # as torch.nn
            return call.empty_results()
        y, h_n, c_n = self._run(call.x, *call.states, call.batch_sizes, call.lengths, call.resets, *call.reset_states)
        return call.results((y, h_n, c_n) if self.mode == "LSTM" else (y, h_n), None)

    def step(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """Compute one time step from a given state; `stream` is faster, and keeps the state itself.

        Args:
            input: ``(B, input_size)``, or ``(input_size,)`` unbatched.
            hx: the state(s), as in `forward`. None means zeros.

        Returns:
            The output and the state(s), as `fused_rnn.LSTM.step`.

        Raises:
            ValueError, RuntimeError, TypeError: as `fused_rnn.LSTM.step`; or an argument requires a gradient.
        """
        name = f"{self._spec.name}.step"
        if self.bidirectional or not isinstance(input, Tensor) or input.dim() not in (1, 2):
            steps.refuse(name, self.bidirectional, input)
        steps.check_hx(name, self._spec.has_c, input, hx)
        time_dim = 1 if self.batch_first and input.dim() == 2 else 0
        y, hidden = self.forward(input.unsqueeze(time_dim), hx)
        return y.squeeze(time_dim), hidden

    def _is_plain(self, input: Any, hx: Any) -> bool:
        """Whether the operator finds all that may be wrong with the arguments, or a compiler has seen them."""
        if type(input) not in policy.COMPILERS_TYPES or input.dim() != 3:
            return False
        states = () if hx is None else hx if self.mode == "LSTM" else (hx,)
        if hx is not None and self.mode == "LSTM" and (type(hx) is not tuple or len(hx) != 2):
            return False
        T, B = (input.size(1), input.size(0)) if self.batch_first else (input.size(0), input.size(1))
        rows = self.num_layers * self._sizes[2]
        shapes = [(rows, B, size) for size in self._spec.state_sizes]
        return (
            input.dtype is torch.float32
            and input.size(2) == self.input_size
            and (torch.compiler.is_compiling() or T > 0)
            and all(type(s) in policy.COMPILERS_TYPES for s in states)
            and all(s.dtype is torch.float32 and s.shape == shape for s, shape in zip(states, shapes, strict=False))
        )


class FrozenCell(_Frozen):
    """A frozen RNNCell, LSTMCell or GRUCell; `freeze` makes it."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Compute one time step.

        Args:
            input: ``(B, input_size)``, or ``(input_size,)`` unbatched; float32, on the CPU.
            hx: the state h, or for the LSTMCell the pair (h, c), as torch.nn's cell takes them. None means zeros.

        Returns:
            The new state h', or the pair (h', c').

        Raises:
            RuntimeError, TypeError: an argument does not fit, or requires a gradient.
        """
        states = self._spec.states(hx)
        if states is None or not all(isinstance(s, Tensor) for s in states):
            expected = "a pair (h, c)" if self._spec.has_c else "a tensor"
            raise TypeError(f"{self._spec.name}: expected hx to be None or {expected}, got {type(hx).__name__}")
        if not isinstance(input, Tensor):
            raise TypeError(f"{self._spec.name}: expected input to be a Tensor, got {type(input).__name__}")
        if input.dim() not in (1, 2) or input.size(-1) != self.input_size:
            raise RuntimeError(
                f"{self._spec.name}: expected input of shape [B, {self.input_size}] or [{self.input_size}], "
                f"got {list(input.shape)}"
            )
        check_ranks(self._spec.name, input, states)
        shape = (*input.shape[:-1], self.hidden_size)
        for state in states:
            if state.shape != shape:
                raise RuntimeError(f"{self._spec.name}: expected hx of shape {list(shape)}, got {list(state.shape)}")
        x = input.view(1, -1, self.input_size)
        _, h, c = self._run(x, *(s.view(1, -1, self.hidden_size) for s in states))
        return (h.view(shape), c.view(shape)) if self._spec.has_c else h.view(shape)
