"""Calls of the operators with every option as a named argument, so that a test can vary one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fused_rnn.options import LayerOptions, operator_tensors_of

OPTIONS = operator_tensors_of(LayerOptions._fields)


def folded(arguments: dict[str, Any]) -> dict[str, Any]:
    """The operator's own arguments, with those in OPTIONS folded into its one list."""
    options = [arguments.get(name) for name in OPTIONS]
    others = {name: value for name, value in arguments.items() if name not in OPTIONS}
    return others | ({} if all(option is None for option in options) else {"options": options})


def by_name(operator: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **arguments: operator(**folded(arguments))
