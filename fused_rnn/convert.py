"""Between torch.nn's modules and ours: the same parameters, another class."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterable
from inspect import cleandoc
from typing import Any, ClassVar, TypeVar

from torch.nn import Module
from torch.nn.utils.parametrize import is_parametrized

from fused_rnn import survey
from fused_rnn.subclasses import NAMES, TORCH_CLASSES, fused_class, torch_class


class TorchConvertible(Module):
    """Base class of all modules: knows torch.nn's class of the same name, and converts to it where tools need that."""

    _replaces: ClassVar[type[Module] | None] = None  # the user's class of a converted module of a user's subclass

    def to_torch(self) -> Module:
        """Return a module of torch.nn's own class that shares this one's parameters, hooks and training mode.

        A module that was converted from a user's subclass of torch.nn's class gets that class back. Attributes and
        methods that a subclass of ours adds are not carried over.

        Raises:
            TypeError: a parameter is parametrised, which ties it to its class; or the module uses an option that
                torch.nn does not have, such as ``layer_norm``.
        """
        if getattr(self, "_varied", False):
            raise TypeError(f"torch.nn has nothing like {self}")
        return _recast(self, type(self)._replaces or _torchs(type(self)))

    def register_forward_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """As torch.nn.Module's.

        Raises:
            NotImplementedError: the hook is one of Opacus's. It computes gradients per sample from a module's first
                argument and first result alone, as if no state were given, which would be wrong without an error. With
                torch.nn's modules it raises, too, in backward.
        """
        if (getattr(hook, "__module__", None) or "").startswith("opacus."):
            raise NotImplementedError(
                f"Opacus cannot compute gradients per sample of {type(self).__name__}, nor of torch.nn's: use "
                "opacus.layers.DPRNN, DPLSTM or DPGRU; opacus.validators.ModuleValidator.fix replaces LSTM and GRU"
            )
        return super().register_forward_hook(hook, *args, **kwargs)

    def __prepare_scriptable__(self) -> Module:
        # torch.jit.script asks here for what to compile. A forward of the user's own must be compiled, or refused.
        import fused_rnn

        ours = getattr(fused_rnn, _torchs(type(self)).__name__)
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


class Replaced(list[str]):
    """The qualified names of the modules that `replace` converted, and those that it left alone.

    Attributes:
        skipped: the reason for every module that computes recurrent layers and was not converted, by name.
    """

    def __init__(self, names: Iterable[str] = (), skipped: dict[str, str] | None = None) -> None:
        super().__init__(names)
        self.skipped: dict[str, str] = skipped or {}

    def __repr__(self) -> str:
        return f"Replaced({super().__repr__()}, skipped={self.skipped!r})" if self.skipped else super().__repr__()


def from_torch(module: Module) -> Module:
    """Return a fused module that shares the parameters, hooks and training mode of a torch.nn module.

    Args:
        module: a torch.nn RNN, LSTM, GRU, RNNCell, LSTMCell or GRUCell. A module of this package is returned unchanged.

    Raises:
        TypeError: the class of module is not one of these six, or a parameter is parametrised, which ties it to its
            class, or attributes of the module stand in the place of methods. Of subclasses, `replace` converts those
            that compute the same.

    Example:
        >>> import torch, fused_rnn
        >>> theirs = torch.nn.GRU(3, 5)
        >>> ours = fused_rnn.from_torch(theirs)
        >>> ours, ours.weight_hh_l0 is theirs.weight_hh_l0, type(ours.to_torch())
        (GRU(3, 5), True, <class 'torch.nn.modules.rnn.GRU'>)
    """
    if isinstance(module, TorchConvertible):
        return module
    why = survey.reason(module) if isinstance(module, Module) else None
    if why or type(module) not in TORCH_CLASSES:
        detail = f": {why}" if why else ""
        raise TypeError(
            f"expected a module whose class is one of torch.nn's {', '.join(NAMES)}, "
            f"got {type(module).__qualname__}{detail}"
        )
    return _recast(module, fused_class(type(module)))


def replace(model: Module) -> Replaced:
    """Convert every torch.nn RNN, LSTM, GRU and cell inside model, in place.

    The modules keep their identity, parameters and hooks, so optimisers and references to them stay valid. A module of
    a subclass that overrides neither `forward` nor anything that a forward relies on is converted, too: its new class
    derives from the user's and from ours, and `to_torch` goes back to the user's.

    Args:
        model: any module; it may itself be one of those.

    Returns:
        The qualified names of the converted modules ("" is model itself): a list whose attribute `skipped` names all
        other modules that compute recurrent layers, with the reason. Among them are modules that lists, dicts or
        attributes hold where `named_modules` does not see them.

    Raises:
        TypeError: model is not a module.

    Warns:
        UserWarning: some modules were skipped. One warning names all of them.

    Example:
        >>> import torch, fused_rnn
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.LSTM(3, 5), "head": torch.nn.Linear(5, 2)})
        >>> fused_rnn.replace(model), type(model["encoder"])
        (['encoder'], <class 'fused_rnn.modules.LSTM'>)
    """
    if not isinstance(model, Module):
        raise TypeError(f"replace: expected model to be a torch.nn.Module, got {type(model).__name__}")
    result = Replaced()
    for name, module in model.named_modules():
        if isinstance(module, TorchConvertible):
            continue
        if why := survey.reason(module):
            result.skipped[name] = why
        elif torch_class(type(module)) is not None:
            try:
                module.__class__ = fused_class(type(module))
            except TypeError as error:  # __slots__, or bases that Python cannot put into one order
                result.skipped[name] = f"its class cannot be mixed with ours: {error}"
                continue
            _mark(module)
            result.append(name)
    for name, module in survey.held_outside(model):
        if not isinstance(module, TorchConvertible) and (torch_class(type(module)) or survey.reason(module)):
            result.skipped[name] = survey.OUTSIDE
    if result.skipped:
        warnings.warn(survey.report(result.skipped), stacklevel=2)
    return result


def _torchs(cls: type) -> type[Module]:
    base = torch_class(cls)
    assert base is not None
    return base


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
