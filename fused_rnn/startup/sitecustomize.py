"""Patches torch.nn in every process of ``python -m fused_rnn run`` that imports torch.

Python imports this file at its start because its folder is first on PYTHONPATH. The Python may be of another version or
environment than the one that started the run, and most processes never import torch: the file imports only modules
that every Python has loaded by then, and no error leaves it.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

FOLDER = os.path.dirname(__file__)
PACKAGE = os.path.dirname(FOLDER)


class AfterImport:
    """An import hook: finds one module as the other finders do, and calls `then` after the module was loaded."""

    def __init__(self, name: "str", then: "Callable[[], None]") -> None:
        self.name = name
        self.then = then

    def find_spec(self, name: "str", path: "Any" = None, target: "Any" = None) -> "Any":
        """The method that the import system calls."""
        if name != self.name:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    break
        else:
            spec = self.missing()
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = Loader(spec.loader, self.loaded)
        return spec

    def missing(self) -> "Any":
        """The spec of a module that no other finder knows."""
        return None

    def loaded(self) -> None:
        """Removes the hook and calls `then`. The program goes on whatever happens."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        try:
            self.then()
        except Exception as error:
            if sys.stderr is None:
                return
            message = (str(error) or type(error).__name__).splitlines()[0]
            sys.stderr.write(f"fused_rnn: process {os.getpid()} ({sys.executable}) computes with torch.nn: {message}\n")


class AfterImportOfPackage(AfterImport):
    """For fused_rnn itself, which need not be on this process's path: the run may have found it in its folder."""

    def missing(self) -> "Any":
        """The package of the run."""
        from importlib.util import spec_from_file_location

        return spec_from_file_location(self.name, os.path.join(PACKAGE, "__init__.py"))


class Loader:
    """A module's loader that also calls `then`; when the module is executed, it has its own loader again."""

    def __init__(self, loader: "Any", then: "Callable[[], None]") -> None:
        self.loader = loader
        self.then = then

    def __getattr__(self, name: "str") -> "Any":
        return getattr(self.loader, name)

    def create_module(self, spec: "Any") -> "Any":
        """As importlib.abc.Loader's."""
        return self.loader.create_module(spec)

    def exec_module(self, module: "Any") -> None:
        """As importlib.abc.Loader's."""
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.then()


def import_package() -> None:
    """Imports fused_rnn; no more, because its own import may have led here, by importing torch."""
    import fused_rnn  # noqa: F401


def patch() -> None:
    """Patches torch.nn for the rest of the process."""
    from fused_rnn.patch import patch_process

    patch_process(verbose=os.environ.get("FUSED_RNN_RUN") == "verbose")


sys.path[:] = [folder for folder in sys.path if folder != FOLDER]
if os.environ.get("FUSED_RNN_RUN"):
    sys.meta_path[:0] = [AfterImport("torch", import_package), AfterImportOfPackage("fused_rnn", patch)]

# The file of this name that would have been imported. Where there is none, this module's own import ends with the
# ModuleNotFoundError that Python expects then.
del sys.modules["sitecustomize"]
import sitecustomize  # type: ignore[import-not-found]  # noqa: E402, F401
