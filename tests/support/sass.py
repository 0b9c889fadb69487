"""The machine code of a built CUDA library: its kernels, their resources, and the instructions of their time loops.

sass_flow.py follows the paths through a kernel.

NVIDIA's cuobjdump and nvdisasm read it. They come with the CUDA toolkit, with triton, and as the packages
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sass_flow import Flow

# A mangled kernel name: the function, then its template arguments. A cell that is itself a template, RnnCell<Tanh>,
# is named by its argument.
_NAME = re.compile(
    r"_ZN9fused_rnn4cuda\d+(?P<function>(?:(?:step|normalised)_)?(?:forward|backward))I"
    r"NS_\d+(?:RnnCellINS_\d+)?(?P<cell>[A-Za-z]+?)E+NS0_\d+(?P<element>[A-Z][a-z]+\d+)E"
    r"(?:NS0_5ShapeILNS0_8ExchangeE(?P<shape>\d+ELi\d+ELi\d+ELi\d+)EEE)?"
)


@dataclass(frozen=True)
class Name:
    """A kernel of the library; `shape` is its entry in FUSED_RNN_INSTANCES, with the exchange as a number."""

    function: str
    cell: str
    element: str
    shape: tuple[int, ...] = ()

    @staticmethod
    def parse(mangled: str) -> Name:
        match = _NAME.match(mangled)
        assert match, f"a kernel of another kind: {mangled}"
        shape = tuple(int(number) for number in (match["shape"] or "").split("ELi") if number)
        return Name(match["function"], match["cell"], match["element"], shape)


@dataclass
class Kernel:
    name: Name
    resources: dict[str, int] = field(default_factory=dict)  # REG, STACK, LOCAL and others
    instructions: Counter[str] = field(default_factory=Counter)  # by opcode with its modifiers
    time_loop: Counter[str] = field(default_factory=Counter)  # only those in the loop with the tensor-core instructions
    code: str = ""  # the disassembly


def find_tool(name: str) -> str | None:
    """The path of a CUDA tool on PATH, in CUDA_HOME, or in a package of this environment."""
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if key in os.environ]
    folders = [Path(home) / "bin" for home in (*homes, "/usr/local/cuda")]
    for entry in sys.path:
        folders += [*Path(entry).glob("nvidia/*/bin"), Path(entry) / "triton/backends/nvidia/bin"]
    return shutil.which(name) or next((found for path in folders if (found := shutil.which(name, path=path))), None)


def kernels(library: Path, folder: Path) -> dict[str, dict[Name, Kernel]]:
    """The kernels of each architecture; temporary files go to `folder`."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    assert cuobjdump and nvdisasm
    subprocess.run([cuobjdump, "-xelf", "all", library], cwd=folder, check=True, capture_output=True)

    def disassemble(cubin: Path) -> tuple[str, dict[str, Kernel]]:
        found = {
            mangled: Kernel(Name.parse(mangled), usage)
            for mangled, usage in _resources(cuobjdump, cubin)
            if "any_kernel" not in mangled  # in launch.cu, only used to query the architecture
        }
        for mangled, code in _functions(_output(nvdisasm, "-c", cubin) if found else ""):
            if mangled not in found:
                continue
            found[mangled].code = code
            found[mangled].instructions, found[mangled].time_loop = _counts(code)
        return cubin.name.split(".")[-2], found

    result: dict[str, dict[Name, Kernel]] = defaultdict(dict)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for architecture, found in pool.map(disassemble, sorted(folder.glob("*.cubin"))):
            result[architecture] |= {kernel.name: kernel for kernel in found.values()}
    return {architecture: found for architecture, found in result.items() if found}


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _resources(cuobjdump: str, cubin: Path) -> Iterator[tuple[str, dict[str, int]]]:
    usage = _output(cuobjdump, "-res-usage", cubin)
    for mangled, numbers in re.findall(r"Function (\S+):\n(.*)", usage):
        yield mangled, {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}


def _functions(assembly: str) -> Iterator[tuple[str, str]]:
    for section in re.split(r"\n\s*\.section\s+\.text\.", assembly)[1:]:
        yield section.split(",", 1)[0].strip('"'), section


def _counts(code: str) -> tuple[Counter[str], Counter[str]]:
    """Counts of each opcode in a function, and in the outermost loop around its tensor-core instructions."""
    flow = Flow(code)
    return Counter(flow.opcodes), Counter(flow.opcodes[at] for at in flow.time_loop)
