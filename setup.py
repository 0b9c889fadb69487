"""Builds fused_rnn._C: the CPU kernels, the operators and their bindings.

Only LibTorch's stable ABI is used and only libtorch_cpu is linked, so the result runs on torch 2.10 or newer,
whatever version it was built against. FUSED_RNN_SANITIZE=1 adds the address and undefined-behaviour sanitizers.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent


def require_compiler() -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"fused_rnn is compiled on installation and found no C++ compiler ('{compiler}'): install one "
            "(Debian, Ubuntu: apt install g++) or name it in CXX, then run pip again."
        )


def extension() -> Extension:
    import pybind11
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    sanitize = os.environ.get("FUSED_RNN_SANITIZE") == "1"
    flags = [
        "-std=c++17",
        "-O3",
        "-fopenmp",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
        "-Wno-unknown-pragmas",
    ]
    link = ["-fopenmp", "-Wl,--as-needed"]
    if sanitize:
        sanitizers = [
            "-fsanitize=address,undefined",
            "-fno-sanitize=null,alignment,object-size,vptr",  # thrice the build time, and address sees their faults
            "-fno-sanitize-recover=undefined",
        ]
        flags = [*flags, *sanitizers, "-O1", "-g", "-fno-omit-frame-pointer"]
        link += sanitizers
    sources = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*/*.cpp"))
    return Extension(
        "fused_rnn._C",
        sources=sources,
        depends=[path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*") if path.is_file()],
        include_dirs=[*include_paths(), pybind11.get_include()],
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020a000000000000ULL"),
            ("FUSED_RNN_BUILT_WITH_TORCH", f'"{torch.__version__}"'),
        ],
        extra_compile_args=flags,
        extra_link_args=link,
        language="c++",
    )


def build_command() -> type:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            require_compiler()
            super().build_extensions()

    return Build


if {"sdist", "egg_info", "dist_info"} & set(sys.argv):
    setup()
else:
    require_compiler()
    setup(ext_modules=[extension()], cmdclass={"build_ext": build_command()})
