"""Between torch.nn's modules and ours: the same parameters, another class."""

from __future__ import annotations

import copy
import functools
from inspect import cleandoc
from typing import Any, TypeVar

import torch
from torch.nn import Module
from torch.nn.utils.parametrize import is_parametrized

_TORCH_CLASSES = (
    torch.nn.RNN,
    torch.nn.LSTM,
    torch.nn.GRU,
    torch.nn.RNNCell,
    torch.nn.LSTMCell,
    torch.nn.GRUCell,
)


class TorchConvertible(Module):
    """Base class of all modules: knows torch.nn's class of the same name, and converts to it where tools need that."""

    def to_torch(self) -> Module:
        """Return a module of torch.nn's own class that shares this one's parameters, hooks and training mode.

        Attributes and methods of a subclass are not carried over.

        Raises:
            TypeError: a parameter is parametrised, which ties it to its class; or the module uses an option that
                torch.nn does not have, such as ``layer_norm``.
        """
        if getattr(self, "_varied", False):
            raise TypeError(f"torch.nn has nothing like {self}")
        return _recast(self, _torch_class(type(self)))

    def __prepare_scriptable__(self) -> Module:
        # torch.jit.script asks here for what to compile. A forward of the user's own must be compiled, or refused.
        import fused_rnn

        ours = getattr(fused_rnn, _torch_class(type(self)).__name__)
        return self.to_torch() if type(self).forward is ours.forward else self


TORCHS_OWN = "What follows is torch.nn's own documentation."


def documentation(torchs: type, ours: type | None = None) -> str:
    """Return the docstring of a class: a summary, the docstring of `ours` (the additions), then torch.nn's own."""
    added = "" if ours is None else cleandoc(ours.__doc__ or "")
    summary = f"``torch.nn.{torchs.__name__}`` on fused kernels: the same arguments, parameters, results and errors."
    return "\n\n".join(filter(None, (summary, added, TORCHS_OWN, cleandoc(torchs.__doc__ or ""))))


_Class = TypeVar("_Class", bound=type[Module])


def fx_leaf(cls: _Class) -> _Class:
    """Class decorator: torch.fx traces an instance as one node, as it does for torch.nn's classes."""
    this: Any = cls  # whose __init__ is meant, not that of a class derived from it
    init = this.__init__

    @functools.wraps(init)  # inspect.signature shows torch.nn's
    def __init__(self: Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _mark(self)

    this.__init__ = __init__
    return cls


def from_torch(module: Module) -> Module:
    """Return a fused module that shares the parameters, hooks and training mode of a torch.nn module.

    Args:
        module: a torch.nn RNN, LSTM, GRU, RNNCell, LSTMCell or GRUCell. A module of this package is returned unchanged.

    Raises:
        TypeError: the class of module is not one of these six. A subclass of theirs may do anything in its forward;
            derive it from this package's class instead. Or a parameter is parametrised, which ties it to its class.

    Example:
        >>> import torch, fused_rnn
        >>> theirs = torch.nn.GRU(3, 5)
        >>> ours = fused_rnn.from_torch(theirs)
        >>> ours, ours.weight_hh_l0 is theirs.weight_hh_l0, type(ours.to_torch())
        (GRU(3, 5), True, <class 'torch.nn.modules.rnn.GRU'>)
    """
    if isinstance(module, TorchConvertible):
        return module
    return _recast(module, _fused_class(type(module)))


def replace(model: Module) -> list[str]:
    """Convert every torch.nn RNN, LSTM, GRU and cell inside model, in place.

    The modules keep their identity, parameters and hooks, so optimisers and references to them stay valid.

    Args:
        model: any module; it may itself be one of those.

    Returns:
        The qualified names of the converted modules ("" is model itself). Modules of subclasses are left unchanged.

    Example:
        >>> import torch, fused_rnn
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.LSTM(3, 5), "head": torch.nn.Linear(5, 2)})
        >>> fused_rnn.replace(model), type(model["encoder"])
        (['encoder'], <class 'fused_rnn.modules.LSTM'>)
    """
    converted = []
    for name, module in model.named_modules():
        if type(module) in _TORCH_CLASSES:
            module.__class__ = _fused_class(type(module))
            _mark(module)
            converted.append(name)
    return converted


def _fused_class(cls: type) -> type[Module]:
    import fused_rnn

    if cls not in _TORCH_CLASSES:
        names = ", ".join(c.__name__ for c in _TORCH_CLASSES)
        raise TypeError(f"expected a module whose class is one of torch.nn's {names}, got {cls.__qualname__}")
    found: type[Module] = getattr(fused_rnn, cls.__name__)
    return found


def _torch_class(cls: type) -> type[Module]:
    return next(base for base in cls.__mro__ if base in _TORCH_CLASSES)


def _mark(module: Module) -> None:
    # torch.fx takes a module as one node if its __module__ starts with torch.nn; pickle looks at the class instead.
    module.__dict__["__module__"] = "torch.nn.modules.rnn"


def _recast(module: Module, cls: type[Module]) -> Module:
    """A shallow copy of module as a cls: the same parameters, in dictionaries of its own."""
    if is_parametrized(module):
        raise TypeError("a parametrised module cannot change its class: remove the parametrisations first")
    new = copy.copy(module)
    for name, value in new.__dict__.items():
        if isinstance(value, (dict, list)):
            new.__dict__[name] = copy.copy(value)
    new.__class__ = cls
    if issubclass(cls, TorchConvertible):
        _mark(new)
    else:
        new.__dict__.pop("__module__", None)
    return new
