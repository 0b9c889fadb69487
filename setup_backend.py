"""The PEP 517 build backend: setuptools', which builds beside the torch that the environment has already.

pip, asked to install into an environment, runs that environment's Python, but takes its packages off the path and
installs the build requirements elsewhere. Were torch one of those, it would be loaded a second time, gigabytes of it.
So this backend puts the packages back, behind the build's own, and requires torch only where there is none.
"""

import site
import sys
from importlib.metadata import PackageNotFoundError, version

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the other hooks are setuptools'

folders = [*site.getsitepackages(), site.getusersitepackages()]
sys.path += [folder for folder in folders if folder not in sys.path]


def get_requires_for_build_wheel(config_settings=None):
    """setuptools' requirements, and torch if it is missing or older than the stable ABI that the kernels use."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *missing_torch()]


def get_requires_for_build_editable(config_settings=None):
    """As `get_requires_for_build_wheel`, for ``pip install -e``."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *missing_torch()]


def missing_torch() -> list[str]:
    try:
        found = tuple(int(part) for part in version("torch").split(".")[:2])
    except PackageNotFoundError:
        found = (0, 0)
    return [] if found >= (2, 10) else ["torch>=2.10"]
