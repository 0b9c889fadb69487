"""Calls of the operators with every option as a named argument, so that a test can vary one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fused_rnn import _C
from fused_rnn.options import LayerOptions, operator_tensors_of

OPTIONS = operator_tensors_of(LayerOptions._fields)


def folded(arguments: dict[str, Any]) -> dict[str, Any]:
    """The operator's own arguments, with those in OPTIONS folded into its one list."""
    options = [arguments.get(name) for name in OPTIONS]
    others = {name: value for name, value in arguments.items() if name not in OPTIONS}
    return others | ({} if all(option is None for option in options) else {"options": options})


def by_name(operator: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **arguments: operator(**folded(arguments))


def dispatched(name: str) -> Callable[..., Any]:
    """The operator of this name."""
    return by_name(getattr(torch.ops.fused_rnn, name))


def direct(name: str) -> Callable[..., Any]:
    """The same, without torch's dispatcher where that is possible."""
    parameters = getattr(torch.ops.fused_rnn, name).default._schema.arguments

    def call(**arguments: Any) -> Any:
        given = folded(arguments)
        assert given.keys() <= {parameter.name for parameter in parameters}
        return getattr(_C, name)(*[given.get(p.name, p.default_value) for p in parameters])

    return call


WAYS = {"dispatched": dispatched, "direct": direct}
