"""Builds four libraries: _cpu.so, the CPU kernels and their operators; the Python module _C, what is not an operator;
_stream.so, the CPU kernels with fused_rnn/stream.h, which needs no torch; and, where nvcc is found, _cuda.so, the CUDA
kernels and their operators. Only _C knows of Python.

Only LibTorch's stable ABI is used and only libtorch_cpu is linked, so the result runs on torch 2.10 or newer,
whatever version it was built against, and the CUDA kernels are built against a torch without CUDA just as well.

Environment: FUSED_RNN_CUDA=0 leaves the CUDA kernels out, =1 fails without nvcc; TORCH_CUDA_ARCH_LIST and MAX_JOBS as
in torch; FUSED_RNN_SANITIZE=1 adds the address and undefined-behaviour sanitizers to the CPU kernels, for tests.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path
from subprocess import CalledProcessError

from setuptools import Extension, setup
from setuptools.errors import CompileError, LinkError

from setup_cuda import EXHAUSTIVE_SWITCHES, build_cuda, nvcc

ROOT = Path(__file__).resolve().parent
CUDA_ONLY = ("bindings/cuda_*.cpp", "cuda/recurrence.cpp")
# The objects of the Python module; the rest is _cpu.so's.
MODULE = (
    "bindings/module.o",
    "bindings/direct.o",
    "bindings/node.o",
    "bindings/plain.o",
    "bindings/stream.o",
    "cuda/plan.o",
)
FAILED = (
    "fused_rnn did not compile (the first 'error:' above says why): it needs a C++17 compiler with OpenMP, such as a "
    "recent g++ (Debian, Ubuntu: apt install g++; CXX names another), and FUSED_RNN_CUDA=0 leaves out what needs nvcc."
)
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020a000000000000ULL")  # of torch 2.10


def require_compiler() -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"fused_rnn is compiled on installation and found no C++ compiler ('{compiler}'): install one "
            "(Debian, Ubuntu: apt install g++) or name it in CXX, then run pip again."
        )


def pybind11_include() -> list[str]:
    try:
        import pybind11
    except ImportError:  # torch carries a copy
        return []
    return [pybind11.get_include()]


def extension() -> Extension:
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    sanitize = os.environ.get("FUSED_RNN_SANITIZE") == "1"
    flags = ["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
    flags += [*EXHAUSTIVE_SWITCHES, "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-g0"]  # Python's own flags ask for debug information, most of the libraries' size
    link = ["-fopenmp", "-Wl,--as-needed"]
    if sanitize:
        sanitizers = [
            "-fsanitize=address,undefined",
            "-fno-sanitize=null,alignment,object-size,vptr",  # thrice the build time, and address sees their faults
            "-fno-sanitize-recover=undefined",
        ]
        # Line numbers are what a report shows; variables, too (-g), would double the build time.
        flags = [*flags, *sanitizers, "-O1", "-g1", "-fno-omit-frame-pointer"]
        link += sanitizers
    sources = sorted(
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob("csrc/*/*.cpp")
        if not any(path.match(pattern) for pattern in CUDA_ONLY)
    )
    return Extension(
        "fused_rnn._C",
        sources=sources,
        depends=[path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*") if path.is_file()],
        include_dirs=[*pybind11_include(), *include_paths()],
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        define_macros=[STABLE_ABI, ("FUSED_RNN_BUILT_WITH_TORCH", f'"{torch.__version__}"')],
        extra_compile_args=flags,
        extra_link_args=link,
        language="c++",
    )


def build_command() -> type:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except (CompileError, LinkError, CalledProcessError, RuntimeError) as error:  # the last is ninja's
                sys.exit(f"{error}\n{FAILED}")

        def get_ext_filename(self, name: str) -> str:
            """Libraries of operators serve every Python, and their names tell of none."""
            return super().get_ext_filename(name) if name.endswith("_C") else f"{name.replace('.', '/')}.so"

        def build_extension(self, ext: Extension) -> None:
            """All of them at the module's turn: its files are compiled beside the others."""
            if ext.name != "fused_rnn._C":
                return
            require_compiler()
            objects = self.compiler.compile(
                ext.sources,
                output_dir=self.build_temp,
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                extra_postargs=ext.extra_compile_args,
                depends=ext.depends,
            )
            cpu, stream, cuda = (self.get_ext_fullpath(f"fused_rnn.{name}") for name in ("_cpu", "_stream", "_cuda"))
            kernels = [path for path in objects if Path(path).parent.match("csrc/cpu")]
            module = [path for path in objects if path.endswith(MODULE)]
            for output, parts, libraries, option in (
                (cpu, [path for path in objects if path not in module], ext.libraries, "-soname,_cpu.so"),
                (stream, kernels, [], "-soname,_stream.so"),
                (self.get_ext_fullpath(ext.name), [*module, cpu], ext.libraries, "-rpath,$ORIGIN"),
            ):
                self.compiler.link_shared_object(
                    parts,
                    output,
                    libraries=libraries,
                    library_dirs=ext.library_dirs,
                    extra_postargs=[*ext.extra_link_args, f"-Wl,{option}"],
                    target_lang=ext.language,
                )
            if compiler := nvcc():
                build_cuda(compiler, ROOT / "csrc", STABLE_ABI, Path(self.build_temp).resolve() / "cuda", Path(cuda))
            else:
                Path(cuda).unlink(missing_ok=True)  # of an earlier build
                if self.editable_mode:
                    (ROOT / "fused_rnn/_cuda.so").unlink(missing_ok=True)

    return Build


if {"sdist", "egg_info", "dist_info"} & set(sys.argv):
    setup()
else:
    require_compiler()
    # Those without sources are built with the module; their names have them copied and packed.
    names = ("_cpu", "_stream", *(["_cuda"] if nvcc() else []))
    others = [Extension(f"fused_rnn.{name}", sources=[]) for name in names]
    setup(ext_modules=[extension(), *others], cmdclass={"build_ext": build_command()})
