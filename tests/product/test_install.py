"""Installation builds with the environment's own torch, installs no second one, and explains failures.

`.ci/run` tests the slow parts: a source distribution, a wheel built from it, and that wheel under another torch.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

import _distutils_hack
import pytest
import setuptools

from processes import python, succeeded
from sources import CSRC, copied, needs_sources, run

REQUIREMENTS = "import setup_backend as b; print(b.get_requires_for_build_wheel(), b.get_requires_for_build_editable())"

pytestmark = [
    needs_sources,
    pytest.mark.slow("starts processes"),
]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the sources, because some of these commands write into them."""
    (tmp_path / "sources").mkdir()
    return copied(tmp_path / "sources")


@pytest.mark.parametrize("torch_version, asked_for", [(None, True), ("2.9.1", True), ("2.10.0", False)])
def test_torch_is_required_where_there_is_none(
    sources: Path, tmp_path: Path, torch_version: str | None, asked_for: bool
) -> None:
    succeeded(python("-m", "venv", "--without-pip", tmp_path / "venv"))
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    if torch_version:
        (packages / f"torch-{torch_version}.dist-info").mkdir()
        (packages / f"torch-{torch_version}.dist-info/METADATA").write_text(f"Name: torch\nVersion: {torch_version}\n")
    (tmp_path / "isolated").mkdir()
    for path in Path(setuptools.__file__).parents[1].glob("*setuptools*"):
        (tmp_path / "isolated" / path.name).symlink_to(path)
    (tmp_path / "isolated/_distutils_hack").symlink_to(Path(_distutils_hack.__file__).parent)
    path = os.pathsep.join([str(sources), str(tmp_path / "isolated")])
    process = run(tmp_path / "venv/bin/python", "-c", REQUIREMENTS, cwd=sources, env=os.environ | {"PYTHONPATH": path})
    assert succeeded(process).splitlines()[-1] == " ".join([str(["torch>=2.10"] if asked_for else [])] * 2)


def test_pip_collects_no_torch_beside_one(sources: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = ["--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--log", log]
    process = python("-m", "pip", "install", *options, sources)
    if "NewConnectionError" in log.read_text():
        pytest.skip("needs a package index: pip found none")
    succeeded(process)
    (installed,) = re.findall(r"Installing collected packages: (.*)", log.read_text())
    assert "setuptools" in installed and "torch" not in installed


@pytest.mark.parametrize(
    ("known", "wish", "codes"),
    [
        ("75 80 86 90 100 103 120 121", "", "sm_80 sm_90a sm_100 compute_100 sm_120"),  # CUDA 13
        ("75 80 86 90 100", "", "sm_80 sm_90a sm_100 compute_100"),  # a compiler that knows no RTX 50
        ("75 80 86 90", "", "sm_80 sm_90a"),
        ("80 90", "8.9 12.0+PTX", "sm_89 sm_120 compute_120"),
    ],
)
def test_architectures_of_the_cuda_library(
    known: str, wish: str, codes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every GPU from the A100 on that the compiler knows, unless TORCH_CUDA_ARCH_LIST names others."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    monkeypatch.syspath_prepend(CSRC.parent)
    setup_cuda = importlib.import_module("setup_cuda")
    compiler = tmp_path / "nvcc"
    compiler.write_text(f"#!/bin/sh\nprintf 'sm_%s\\n' {known}\n")
    compiler.chmod(0o755)
    options = setup_cuda.code_generation(str(compiler))
    assert " ".join(option.rpartition("code=")[2] for option in options) == codes


def test_a_failed_compile_ends_with_what_to_do(sources: Path) -> None:
    for path in sources.glob("csrc/*/*.cpp"):
        path.write_text("#error broken\n")
    process = python("setup.py", "build_ext", "--inplace", cwd=sources, FUSED_RNN_CUDA="0")
    assert process.returncode == 1 and "#error broken" in process.stdout
    assert process.stderr.splitlines()[-1].startswith("fused_rnn did not compile")
