"""Users' subclasses of torch.nn's RNN, LSTM, GRU and cells: which can take the fused forward, and how they do.

Such a module gets a class with two bases, the user's and ours. The user's methods come first, `forward` is ours, and
`isinstance` holds for both. That is safe as long as the user's class overrides nothing that either forward relies on.
"""

from __future__ import annotations

import functools
import types
from abc import ABCMeta
from typing import Any

import torch
from torch.nn import Module

from fused_rnn.policy import BACKENDS

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
TORCH_CLASSES: tuple[type[Module], ...] = tuple(getattr(torch.nn, name) for name in NAMES)

# Methods that no forward calls; and methods of Python that change how a module is read, copied or derived.
_HARMLESS = frozenset(
    ("_apply", "extra_repr", "flatten_parameters", "register_forward_hook", "reset_parameters", "step")
)
_HARMFUL = frozenset(("__getattr__", "__getattribute__", "__reduce__", "__reduce_ex__", "__init_subclass__"))


def torch_class(cls: type) -> type[Module] | None:
    """The one of torch.nn's six classes that `cls` is or derives from; None if there is none."""
    return next((base for base in cls.__mro__ if base in TORCH_CLASSES), None)


def fused_class(cls: type) -> type[Module]:
    """Our class for modules of `cls`: one of the six, or the user's with ours as its second base.

    The caller has made sure that `obstacle` has no objection.
    """
    return _ours(cls) if cls in TORCH_CLASSES else _mixed(cls)


def obstacle(module: Module) -> str | None:
    """Why a module that derives from one of torch.nn's six classes cannot take our forward; None if it can."""
    cls: Any = type(module)
    overridden = _overridden(cls)
    if overridden:
        return f"its class {cls.__qualname__} overrides {', '.join(overridden)}"
    if type(cls) not in (type, ABCMeta):
        return f"its class has the metaclass {type(cls).__qualname__}"
    base: Any = torch_class(cls)
    # An attribute of the instance hides a method; an attribute of ours hides a parameter, buffer or submodule.
    hiding = vars(module).keys() & _methods(base)
    hidden = (module._parameters.keys() | module._buffers.keys() | module._modules.keys()) & _additions(base)
    if vars(module).get("backend", "auto") not in BACKENDS:
        hiding.add("backend")
    names = sorted({*hiding, *hidden})
    return f"it has {', '.join(names)} as an attribute of its own" if names else None


def _ours(base: type) -> type[Module]:
    import fused_rnn

    cls: type[Module] = getattr(fused_rnn, base.__name__)
    return cls


def _classes(base: type) -> tuple[type, ...]:
    """Ours for `base`, and all that it derives from below torch.nn.Module."""
    ours = _ours(base)
    return ours.__mro__[: ours.__mro__.index(Module)]


@functools.cache
def _methods(base: type) -> frozenset[str]:
    """Names of the methods that our forward or torch.nn's may call, and `forward`."""
    methods = {name for cls in _classes(base) for name, value in vars(cls).items() if callable(value)}
    return frozenset(methods - _HARMLESS - {"to_torch"})


@functools.cache
def _additions(base: type) -> frozenset[str]:
    """Names of the attributes that our class has and torch.nn's has not."""
    return frozenset(set(dir(_ours(base))) - set(dir(base)))


@functools.cache
def _overridden(cls: type) -> tuple[str, ...]:
    """Names that a user's class, or a class that it is mixed with, defines and that a forward relies on."""
    base = torch_class(cls)
    assert base is not None
    relied_on = {name for c in _classes(base) for name in vars(c)}.union(vars(base(1, 1, device="meta")))
    users = {name for c in cls.__mro__ if c not in base.__mro__ for name in vars(c)}
    plain = {name for name in users if not (name.startswith("__") and name.endswith("__"))}
    weights = {name for name in plain if name.startswith(("weight_", "bias_"))}
    return tuple(sorted((plain & relied_on - _HARMLESS) | weights | (users & _HARMFUL)))


@functools.cache
def _mixed(cls: type) -> type[Module]:
    """A class like the user's `cls`, with our forward. Its name is the user's, so that `repr` stays the same."""
    base = torch_class(cls)
    assert base is not None
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "_replaces": cls,  # to which `to_torch` goes back
    }
    return types.new_class(cls.__name__, (cls, _ours(base)), exec_body=lambda body: body.update(namespace))


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    # Pickle finds a class by its name, and that is the user's. It stores that class, and makes the mixed one anew.
    reduced: Any = object.__reduce_ex__(self, max(protocol, 2))
    _, (_, *arguments), *state = reduced
    return _remake, (self._replaces, *arguments), *state


def _remake(cls: Any, *arguments: Any) -> Any:
    """An empty module of the mixed class; of the user's own, should it override forward by now."""
    cls = cls if _overridden(cls) else _mixed(cls)
    return cls.__new__(cls, *arguments)
