"""Our classes in the tables of tools that look a module up by its exact class.

A tool's table gets an entry for each of our classes where it has one for torch.nn's class of the same name: at once if
the tool is imported already, otherwise behind its own import. Nothing is imported for it here.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

import fused_rnn
from fused_rnn.subclasses import NAMES


def _counts(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule that counts a module's operations, from its attributes and in a forward hook."""

    @functools.wraps(rule)
    def counted(module: Any, *args: Any) -> Any:
        if isinstance(module.hidden_size, tuple):
            raise TypeError(f"{rule.__module__} counts layers of one size, got hidden_size={module.hidden_size}")
        return rule(module, *args)

    return counted


def _of_torchs(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch.nn's module, called with the one that ours stands for."""

    @functools.wraps(function)
    def called(module: Any, *args: Any, **kwargs: Any) -> Any:
        return function(module.to_torch(), *args, **kwargs)

    return called


def _from_float(quantised: Any) -> Any:
    """A stand-in for a quantised class of torch.ao that is made from one of our modules; the result is torch.ao's."""

    def from_float(cls: type, module: Any, *args: Any, **kwargs: Any) -> Any:
        return quantised.from_float(module.to_torch(), *args, **kwargs)

    return type(quantised.__name__, (quantised,), {"from_float": classmethod(from_float)})


# The module that defines a table, where the table is in it, and how an entry for torch.nn's class serves ours.
_TABLES: dict[str, dict[str, Callable[[Any], Any]]] = {
    "calflops.pytorch_ops": {"MODULE_HOOK_MAPPING": _counts},
    "deepspeed.profiling.flops_profiler.profiler": {"MODULE_HOOK_MAPPING": _counts},
    "opacus.validators": {"ModuleValidator.VALIDATORS": _of_torchs, "ModuleValidator.FIXERS": _of_torchs},
    "ptflops.pytorch_ops": {"MODULES_MAPPING": _counts},
    "thop.profile": {"register_hooks": _counts},
    "torch.ao.quantization.quantize": {
        "_DEFAULT_CUSTOM_CONFIG_DICT.float_to_observed_custom_module_class": _from_float
    },
    "torch.ao.quantization.quantization_mappings": {"DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS": _from_float},
}


def _register(tool: types.ModuleType) -> None:
    for path, entry in _TABLES[tool.__name__].items():
        table: Any = tool
        for name in path.split("."):
            table = table.get(name) if isinstance(table, dict) else getattr(table, name, None)
        if not isinstance(table, dict):  # another version of the tool
            continue
        for name in NAMES:
            if (torchs := table.get(getattr(torch.nn, name))) is not None:
                table.setdefault(getattr(fused_rnn, name), entry(torchs))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the tools' modules as the other finders do, and has them registered when they have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _TABLES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, tools: Any) -> None:
        self.tools = tools

    def __getattr__(self, name: str) -> Any:  # get_source, get_data, is_package: whatever the tool's loader has
        return getattr(self.tools, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        module: types.ModuleType | None = self.tools.create_module(spec)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__loader__ = self.tools
        if module.__spec__ is not None:
            module.__spec__.loader = self.tools
        self.tools.exec_module(module)
        _register(module)


def install() -> None:
    """Fills the tables of the tools that are imported, and of the others when they come."""
    for name in _TABLES.keys() & sys.modules.keys():
        _register(sys.modules[name])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
