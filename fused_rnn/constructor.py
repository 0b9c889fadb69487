"""Options of the constructors beyond torch.nn's: regularised variants, layers of different sizes, recomputation.

Equations and papers are in `fused_rnn.reference`. A module without options has torch.nn's parameters. Each option but
the sizes of layers is an attribute that is checked whenever it is set, because a rate may change during training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from types import MappingProxyType
from typing import Any, Generic, Literal, TypedDict, TypeVar

import torch
from torch.nn import Parameter

from fused_rnn.cell_info import GATES

_Value = TypeVar("_Value")


class Option(Generic[_Value]):
    """Descriptor of an option: an attribute with a default value, which is checked when it is set.

    One with `initial` is what the parameters were made or initialised with, and only the constructor sets it.
    """

    def __init__(self, default: _Value, checked: Callable[[str, Any], _Value], initial: bool = False) -> None:
        self.default, self.checked, self.initial = default, checked, initial

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type | None = None) -> _Value:
        value: _Value = self.default if module is None else module.__dict__.get(self.name, self.default)
        return value

    def __set__(self, module: Any, value: _Value, constructing: bool = False) -> None:
        value = self.checked(self.name, value)
        module._check_option(self.name, value)
        if self.initial and not constructing and value != self.__get__(module):
            raise ValueError(f"{self.name} can only be set in the constructor, got {value}")
        module.__dict__[self.name] = value
        module._note_variants()


def _rate(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < 1:
        raise ValueError(f"{name} should be a number in range [0, 1), got {value!r}")
    return float(value)


def _rates(name: str, value: Any) -> float | tuple[float, float]:
    if not isinstance(value, (tuple, list)):
        return _rate(name, value)
    if len(value) != 2:
        raise ValueError(f"{name} should be a number or a pair (of h, of c), got {value!r}")
    of_h, of_c = (_rate(name, rate) for rate in value)
    return (of_h, of_c) if of_h or of_c else 0.0


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    return value


def _number(name: str, value: Any) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} should be a number or None, got {value!r}")
    return None if value is None else float(value)


def _how_much(name: str, value: Any) -> str:
    if value not in ("none", "full"):
        raise ValueError(f"{name} must be one of 'none', 'full', got {value!r}")
    return str(value)


class Options(TypedDict, total=False):
    """Types of the constructors' keywords, for type checkers and editors; `Variants` describes them."""

    backend: Literal["auto", "fused", "torch"]
    layer_norm: bool
    zoneout: float | tuple[float, float]
    recurrent_dropout: float
    weight_dropout: float
    forget_bias: float | None
    recompute: Literal["none", "full"]


class Variants(torch.nn.RNNBase):
    """The constructor takes options beyond torch.nn's. Each of them is also an attribute; all but hidden_size
    and backend are checked when they are set. Rates may change during training; layer_norm and forget_bias may not.
    Equations and papers are in `fused_rnn.reference`.

    Keyword Args:
        backend: selects who computes a call: "auto" (the default, whichever was measured to be faster), "fused", or
            "torch" (torch.nn's own forward).
        hidden_size: a list of sizes makes one layer for each. Their states lie side by side: hx and the final states
            are ``(D, B, sum(hidden_size))``, and ``h.split(hidden_size, -1)`` separates the layers.
        layer_norm: True normalises both products of a step, and the LSTM's c on its way to h (Ba, Kiros and Hinton
            2016). It adds the parameters ``norm_ih_l0``, ``norm_hh_l0`` ``(gates * hidden_size,)`` and, for the LSTM,
            ``norm_c_l0``, ``norm_c_bias_l0`` ``(hidden_size,)``.
        zoneout: probability in [0, 1) that a unit keeps its state at a step (Krueger et al. 2017); the LSTM also
            takes a pair (for h, for c). In evaluation, the expectation replaces the random choice.
        recurrent_dropout: probability in [0, 1) that W_hh does not see a unit of h in training (Gal and Ghahramani
            2016). The units are drawn once per call and row.
        weight_dropout: probability in [0, 1) that an element of W_hh is zero in training (Merity et al. 2018). The
            elements are drawn once per call.
        forget_bias: initial sum of the two biases of the LSTM's forget gate (Gers et al. 2000, Jozefowicz et al. 2015).
            None initialises them as torch.nn does.
        recompute: "full" keeps no gates between forward and backward: backward computes the forward pass of each layer
            once more. "none" (the default) keeps them.

    Raises:
        ValueError, TypeError: an option is out of range, has the wrong type, or is not available for this class.

    Example:
        >>> import torch, fused_rnn
        >>> lstm = fused_rnn.LSTM(64, 128, layer_norm=True, zoneout=(0.1, 0.05))
        >>> output, (h_n, c_n) = lstm(torch.randn(7, 2, 64), lengths=torch.tensor([7, 4]))
        >>> output.shape, h_n.shape
        (torch.Size([7, 2, 128]), torch.Size([1, 2, 128]))
        >>> y, state = lstm.step(torch.randn(2, 64), (h_n, c_n))
        >>> y.shape
        torch.Size([2, 128])
    """

    _varied = False
    """Whether an option changes forward, compared with torch.nn's."""

    _regularisation: Mapping[str, Any] = MappingProxyType({})
    """Fields of `fused_rnn.spec.Spec` that the options set; empty at their defaults."""

    _flat_weights: Any  # for torch.nn's type some may be None

    layer_norm = Option(False, _flag, initial=True)
    zoneout = Option[float | tuple[float, float]](0.0, _rates)
    recurrent_dropout = Option(0.0, _rate)
    weight_dropout = Option(0.0, _rate)
    forget_bias = Option(None, _number, initial=True)
    recompute = Option("none", _how_much)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes the arguments of torch.nn's class, and the options as keywords."""
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        sizes = args[1] if len(args) > 1 else kwargs.get("hidden_size")
        if isinstance(sizes, (tuple, list)):
            args, kwargs = _with_first_size(args, kwargs, sizes)
        super().__init__(*args, **kwargs)
        if isinstance(sizes, (tuple, list)):
            self._resize(tuple(sizes))
        for name, value in options.items():
            _OPTIONS[name].__set__(self, value, constructing=True)
        for name, size in self._norm_shapes():
            self.register_parameter(name, Parameter(self.get_parameter("weight_ih_l0").new_empty(size)))
        if self.layer_norm or self.forget_bias is not None:
            self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._varied:
            self._note_variants()  # what is derived of the options is not an older pickle's

    def _resize(self, sizes: tuple[int, ...]) -> None:
        """Layers of sizes of their own, from layers of the first one's."""
        if self.proj_size >= min(sizes):  # torch.nn compares it with the first
            raise ValueError("proj_size has to be smaller than hidden_size")
        self.hidden_size: Any = sizes
        gates, D, P = GATES[self.mode.lower()], 2 if self.bidirectional else 1, self.proj_size
        for name in list(self._parameters):
            kind, index = _kind_and_layer(name)
            H = sizes[index]
            shape = {
                "weight_ih": (gates * H, D * (P or sizes[index - 1]) if index else self.input_size),
                "weight_hh": (gates * H, P or H),
                "weight_hr": (P, H),
            }.get(kind, (gates * H,))
            setattr(self, name, Parameter(self.get_parameter(name).new_empty(shape)))
        self._note_variants()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as torch.nn does, the gains of layer normalisation to 1, and the forget gate by `forget_bias`."""
        if all(parameter.is_meta for parameter in self.parameters()):
            return  # there are no values; and a transform may forbid random operations
        if isinstance(self.hidden_size, tuple):
            for name, parameter in self.named_parameters():
                bound = self.hidden_size[_kind_and_layer(name)[1]] ** -0.5
                torch.nn.init.uniform_(parameter, -bound, bound)
        else:
            super().reset_parameters()
        with torch.no_grad():
            for name, _ in self._norm_shapes():
                if (norm := self._parameters.get(name)) is not None:
                    norm.fill_(0.0 if _kind_and_layer(name)[0] == "norm_c_bias" else 1.0)
            if self.forget_bias is not None:
                for name, bias in self.named_parameters():
                    if name.startswith("bias_"):
                        bias.chunk(4)[1].fill_(self.forget_bias if name.startswith("bias_ih") else 0.0)

    def _check_option(self, name: str, value: Any) -> None:
        """What an option asks of the module.

        Raises:
            ValueError: this module cannot have it.
        """
        if self.mode != "LSTM" and (isinstance(value, tuple) or (name == "forget_bias" and value is not None)):
            got = name if name == "forget_bias" else f"{name}=(h, c)"
            raise ValueError(f"{got} is only supported for LSTM, not RNN or GRU")
        if name == "forget_bias" and value is not None and not self.bias:
            raise ValueError("forget_bias needs bias=True, got bias=False")

    def _norm_shapes(self) -> Iterator[tuple[str, int]]:
        """Names and sizes of the parameters of layer normalisation."""
        if not self.layer_norm:
            return
        gates = GATES[self.mode.lower()]
        sizes = self.hidden_size if isinstance(self.hidden_size, tuple) else (self.hidden_size,) * self.num_layers
        for index, H in enumerate(sizes):
            for suffix in ("", "_reverse") if self.bidirectional else ("",):
                of_kind = {"norm_ih": gates * H, "norm_hh": gates * H}
                of_kind |= {"norm_c": H, "norm_c_bias": H} if self.mode == "LSTM" else {}
                yield from ((f"{kind}_l{index}{suffix}", size) for kind, size in of_kind.items())

    def extra_repr(self) -> str:
        """Return torch.nn's text, and the options that differ from their defaults."""
        given = {name: getattr(self, name) for name in _OPTIONS if getattr(self, name) != _OPTIONS[name].default}
        return ", ".join([super().extra_repr(), *(f"{name}={value!r}" for name, value in given.items())])

    def _note_variants(self) -> None:
        self.__dict__["_varied"] = isinstance(self.hidden_size, tuple) or any(
            getattr(self, name) != option.default for name, option in _OPTIONS.items() if name != "forget_bias"
        )
        rate_h, rate_c = self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, self.zoneout)
        self.__dict__["_regularisation"] = {
            "zoneout": (rate_h, rate_c if self.mode == "LSTM" else 0.0),
            "recurrent_dropout": self.recurrent_dropout,
            "weight_dropout": self.weight_dropout,
            "recompute": self.recompute == "full",
        }


_OPTIONS = {name: option for name, option in vars(Variants).items() if isinstance(option, Option)}


def _kind_and_layer(name: str) -> tuple[str, int]:
    """("weight_ih", 1) of "weight_ih_l1_reverse"."""
    kind, _, layer = name.removesuffix("_reverse").rpartition("_l")
    return kind, int(layer)


def _with_first_size(
    args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The constructor's arguments for layers that are all of the first one's size."""
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"hidden_size must be an int or a list of positive ints, one for each layer, got {sizes!r}")
    kwargs = {name: value for name, value in kwargs.items() if name != "hidden_size"}
    num_layers = args[2] if len(args) > 2 else kwargs.pop("num_layers", len(sizes))
    if num_layers != len(sizes):
        raise ValueError(f"hidden_size names {len(sizes)} layers, but num_layers is {num_layers}")
    if args:
        return (args[0], sizes[0], len(sizes), *args[3:]), kwargs
    return (), kwargs | {"hidden_size": sizes[0], "num_layers": len(sizes)}  # torch.nn misses an input_size
