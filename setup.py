"""Builds three libraries: _cpu.so, the CPU kernels and their operators; the Python module _C, what is not an operator;
and, where nvcc is found, _cuda.so, the CUDA kernels and their operators. Those of operators know nothing of Python.

Only LibTorch's stable ABI is used and only libtorch_cpu is linked, so the result runs on torch 2.10 or newer,
whatever version it was built against, and the CUDA kernels are built against a torch without CUDA just as well.

Environment: FUSED_RNN_CUDA=0 leaves the CUDA kernels out, =1 fails without nvcc; TORCH_CUDA_ARCH_LIST and MAX_JOBS as
in torch; FUSED_RNN_SANITIZE=1 adds the address and undefined-behaviour sanitizers to the CPU kernels, for tests.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
CUDA_ONLY = ("bindings/cuda_*.cpp", "cuda/recurrence.cpp")
MODULE = ("bindings/module.o", "cuda/plan.o")  # the rest is _cpu.so's
EXHAUSTIVE_SWITCHES = ("-Werror=switch",)  # a cell that a switch leaves out is an error
ARCHITECTURES = "8.0 9.0a 10.0a+PTX"
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
    flags = [
        "-std=c++17",
        "-O3",
        "-g0",  # Python's own flags ask for debug information, most of the libraries' size
        "-fopenmp",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
        "-Wall",
        *EXHAUSTIVE_SWITCHES,
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
        define_macros=[
            STABLE_ABI,
            ("FUSED_RNN_BUILT_WITH_TORCH", f'"{torch.__version__}"'),
        ],
        extra_compile_args=flags,
        extra_link_args=link,
        language="c++",
    )


def nvcc() -> str | None:
    """The CUDA compiler to build with; None: leave the CUDA kernels out."""
    wish = os.environ.get("FUSED_RNN_CUDA", "")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else None
    found = found or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if wish == "1" and found is None:
        sys.exit("FUSED_RNN_CUDA=1, but there is no nvcc: put it on PATH or name its folder in CUDA_HOME.")
    return None if wish == "0" or os.environ.get("FUSED_RNN_SANITIZE") == "1" else found


def code_generation(compiler: str) -> list[str]:
    """nvcc's options for the architectures, written as torch writes them: "8.0 9.0a 10.0a+PTX"."""
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST")
    known = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    options = []
    for name in (wish or ARCHITECTURES).replace(";", " ").replace(",", " ").split():
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            sys.exit(f"TORCH_CUDA_ARCH_LIST: expected versions like 8.0, 9.0a or 10.0+PTX, got {name!r}")
        number = name.removesuffix("+PTX").replace(".", "")
        if not wish and f"sm_{number.removesuffix('a')}" not in known:
            continue  # newer than this compiler
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            number = number.removesuffix("a")  # PTX of an "a" runs nowhere else
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def build_cuda(compiler: str, folder: Path, output: Path) -> None:
    """A plain shared library of operators, no Python module, so that one file serves every Python."""
    from torch.utils.cpp_extension import include_paths, library_paths

    cxx = shlex.split(os.environ.get("CXX", "c++"))
    include = [f"-I{path}" for path in include_paths()]
    shared = ["-std=c++17", "-O3", "-c", "-D{}={}".format(*STABLE_ABI), *include]
    device = [
        compiler,
        *shared,
        *code_generation(compiler),
        "-prec-div=false",
        "--expt-relaxed-constexpr",
        "-Xcompiler",
        "-fPIC",
    ]
    device += ["-Xcompiler", "-fvisibility=hidden", "-ccbin", cxx[0]]
    host = [*cxx, *shared, *EXHAUSTIVE_SWITCHES, "-fPIC", "-fvisibility=hidden"]
    sources = [*sorted((ROOT / "csrc/bindings").glob("cuda_*.cpp")), *sorted((ROOT / "csrc/cuda").glob("*.c*"))]
    sources = [path for path in sources if path.suffix in (".cpp", ".cu")]
    folder /= hashlib.sha256(" ".join(map(str, device)).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{path.name}.o" for path in sources]
    changed = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())

    def compile_one(source: Path, result: Path) -> None:
        if result.exists() and result.stat().st_mtime > changed:
            return
        print(f"building {source.relative_to(ROOT)}", flush=True)
        subprocess.run([*(device if source.suffix == ".cu" else host), source, "-o", result], check=True)

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, sources, objects))
    output.parent.mkdir(parents=True, exist_ok=True)
    # nvcc knows where its runtime is, but for the toolkit that pip installs.
    libraries = [f"-L{path}" for path in (*library_paths(), Path(compiler).resolve().parent.parent / "lib")]
    link = [compiler, "-shared", "-nodlink", "-cudart", "static", "-ccbin", cxx[0], *objects, "-o", output, *libraries]
    subprocess.run([*link, "-ltorch_cpu"], check=True)


def build_command() -> type:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
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
            cpu, cuda = (self.get_ext_fullpath(f"fused_rnn.{name}") for name in ("_cpu", "_cuda"))
            module = [path for path in objects if path.endswith(MODULE)]
            for output, parts, option in (
                (cpu, [path for path in objects if path not in module], "-soname,_cpu.so"),
                (self.get_ext_fullpath(ext.name), [*module, cpu], "-rpath,$ORIGIN"),
            ):
                self.compiler.link_shared_object(
                    parts,
                    output,
                    libraries=ext.libraries,
                    library_dirs=ext.library_dirs,
                    extra_postargs=[*ext.extra_link_args, f"-Wl,{option}"],
                    target_lang=ext.language,
                )
            if compiler := nvcc():
                build_cuda(compiler, Path(self.build_temp).resolve() / "cuda", Path(cuda))
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
    others = [Extension(f"fused_rnn.{name}", sources=[]) for name in ("_cpu", *(["_cuda"] if nvcc() else []))]
    setup(ext_modules=[extension(), *others], cmdclass={"build_ext": build_command()})
