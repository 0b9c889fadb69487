"""The report of `fused_rnn.replace`: modules that compute recurrent layers and stay as they are, and why."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from fused_rnn.subclasses import NAMES, obstacle, torch_class

_OPERATORS = tuple(f"{cell}{suffix}" for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu") for suffix in ("", "_cell"))
OUTSIDE = (
    "named_modules() does not see it: replace before the loss or agent that holds it is built, or call replace on it"
)
"""The reason for a module that `held_outside` finds."""
_PATCHED = "run it under fused_rnn.patched()"
_MOST_ITEMS = 100  # of one container: a replay buffer holds no networks
_DEEPEST = 4  # containers within each other


def reason(module: Module) -> str | None:
    """Why `module`, which is none of ours and computes recurrent layers itself, cannot be converted; and a way for it.

    None if it can be converted or computes no such layers.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return _of_a_script(module)
    if isinstance(module, torch.fx.GraphModule) and _computes_recurrent_layers(module.graph):
        return "its graph holds torch's operators: replace before the model is traced or exported"
    cls = type(module)
    if cls.__module__.startswith("torch.ao.") and cls.__name__ in NAMES:
        return "it is quantised: the kernels compute in floating point"
    if not isinstance(module, (torch.nn.RNNBase, torch.nn.RNNCellBase)):
        return None
    if is_parametrized(module):
        return f"it is parametrised: replace before the parametrisation is registered, or {_PATCHED}"
    if any(base.__module__.startswith("torch.distributed.") for base in cls.__mro__):
        return f"it is sharded: replace before fully_shard, or {_PATCHED}"
    if any(map(is_lazy, module.parameters())):
        return "its parameters are not initialised: replace after the first call"
    base = torch_class(cls)
    if base is None:
        return f"its class {cls.__qualname__} derives from none of torch.nn's {', '.join(NAMES)}"
    objection = obstacle(module)
    return objection and f"{objection}: {_PATCHED}, or derive its class from fused_rnn.{base.__name__}"


def held_outside(model: Module) -> Iterator[tuple[str, Module]]:
    """Modules that attributes of the model's modules hold, directly or in containers, and named_modules() has not.

    Each comes with an expression for it, such as ``loss.networks['actor'].rnn``, and with all of its submodules.
    """
    seen = {id(module) for module in model.modules()}
    waiting = deque(model.named_modules())
    while waiting:
        owner, module = waiting.popleft()
        for attribute, value in vars(module).items():
            if attribute in _OF_EVERY_MODULE:
                continue
            for path, outsider in _modules_in(value, f"{owner}.{attribute}" if owner else attribute, seen):
                for name, part in outsider.named_modules():
                    if id(part) not in seen:
                        seen.add(id(part))
                        full = f"{path}.{name}" if name else path
                        waiting.append((full, part))
                        yield full, part


_OF_EVERY_MODULE = vars(Module()).keys()
_SEQUENCES = (list, tuple, set, frozenset, deque)


def _modules_in(value: Any, path: str, seen: set[int], depth: int = 0) -> Iterator[tuple[str, Module]]:
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Module):
        yield path, value
    elif id(value) in seen:
        return
    elif depth < _DEEPEST and isinstance(value, dict):
        items = value.items()
    elif depth < _DEEPEST and isinstance(value, _SEQUENCES):
        items = enumerate(value)
    if isinstance(value, (dict, *_SEQUENCES)):
        seen.add(id(value))
    for key, item in itertools.islice(items, _MOST_ITEMS):
        if isinstance(item, (Module, dict, *_SEQUENCES)):  # the text of a key may be long: only where it is needed
            yield from _modules_in(item, f"{path}[{key!r}]", seen, depth + 1)


def _of_a_script(module: Any) -> str | None:
    inside = any(getattr(part, "original_name", None) in NAMES for part in module.modules() if part is not module)
    if module.original_name in NAMES or (not inside and _calls_recurrent_operators(module)):
        return "it is a TorchScript program, which calls torch's operators: convert the model that it was made from"
    return None


def _calls_recurrent_operators(script: Any) -> bool:
    graphs = [getattr(script, name).inlined_graph for name in script._c._method_names()]
    return any(graph.findAllNodes(f"aten::{name}", recurse=True) for graph in graphs for name in _OPERATORS)


def _computes_recurrent_layers(graph: torch.fx.Graph) -> bool:
    return any(
        node.op == "call_function" and getattr(node.target, "__name__", "").split(".")[0] in _OPERATORS
        for node in graph.nodes
    )


def report(skipped: dict[str, str]) -> str:
    """One text for a warning: the modules of each reason, in one line."""
    of_reason: dict[str, list[str]] = {}
    for name, why in skipped.items():
        of_reason.setdefault(why, []).append(name or "the model itself")
    lines = [f"fused_rnn.replace left {len(skipped)} module{'s' if len(skipped) > 1 else ''} as before:"]
    for why, names in of_reason.items():
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        lines.append(f"  {', '.join(names[:5])}{more}: {why}")
    return "\n".join(lines)
