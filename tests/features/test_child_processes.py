"""``python -m fused_rnn run`` reaches every child process that imports torch, and does not affect the others.

Programs are run as a user would start them; they print which operators computed their layers.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_rnn
from contract import close, fused_calls
from fused_rnn import patch
from fused_rnn.tally import Tally
from processes import FUSED, KERNELS, PLAIN, python, run

WAYS = """
import multiprocessing, os, subprocess, sys
from concurrent.futures import ProcessPoolExecutor

def kernels(*args):  # torch is imported in the child only
    from helper import kernels
    kernels()

class Data:
    def __getitem__(self, index):
        kernels()
        return index

    def __len__(self):
        return 1

def process(method, function=kernels):
    child = multiprocessing.get_context(method).Process(target=function)
    child.start()
    child.join()

def grandchild():
    process("spawn")

def pool():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        executor.submit(kernels).result()

def torch_spawn():
    import torch.multiprocessing
    torch.multiprocessing.spawn(kernels, nprocs=1)

def data_loader():
    from torch.utils.data import DataLoader
    list(DataLoader(Data(), num_workers=1, multiprocessing_context="spawn"))

def relaunch(*command):
    if "RANK" in os.environ:
        kernels()
    else:
        subprocess.run([sys.executable, *command], env=os.environ | {"RANK": "1"}, check=True)

def execute():
    os.execv(sys.executable, [sys.executable, "-c", "from helper import kernels; kernels()"])

WAYS = {
    "spawn": lambda: process("spawn"),
    "forkserver": lambda: process("forkserver"),
    "fork": lambda: process("fork"),
    "grandchild": lambda: process("spawn", grandchild),
    "ProcessPoolExecutor": pool,
    "torch.multiprocessing": torch_spawn,
    "DataLoader": data_loader,
    "sys.argv": lambda: relaunch(*sys.argv),
    "-m": lambda: relaunch("-m", "ways", *sys.argv[1:]),
    "execv": execute,
}
if __name__ == "__main__":
    WAYS[sys.argv[1]]()
"""
NAMES = re.findall(r'^    "([^"]+)": ', WAYS, flags=re.MULTILINE)


def written(folder: Path) -> Path:
    (folder / "helper.py").write_text(KERNELS)
    (folder / "ways.py").write_text(WAYS)
    (folder / "kernels.py").write_text("from helper import kernels\nkernels()\n")
    return folder


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with several programs."""
    return written(tmp_path)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[str]]]:
    """The output of the program for every way, of which two run at a time."""
    folder = written(tmp_path_factory.mktemp("ways"))
    with ThreadPoolExecutor(2) as pool:
        yield {way: pool.submit(output, "ways.py", way, cwd=folder) for way in NAMES}


def output(*args: str, cwd: Path, **environment: str) -> str:
    """The output of a run that must succeed without errors."""
    result = run(*args, cwd=cwd, **environment)
    assert result.returncode == 0 and "fused_rnn" not in result.stderr, result.stderr
    return result.stdout


def test_ways_of_starting_children_are_read() -> None:
    assert len(NAMES) == 10 and {"spawn", "execv"} < set(NAMES)


@pytest.mark.parametrize("way", NAMES)
def test_child_processes(outputs: dict[str, Future[str]], way: str) -> None:
    assert outputs[way].result() == FUSED


def test_without_run_children_compute_with_torch(programs: Path) -> None:
    result = python("ways.py", "spawn", cwd=programs)
    assert (result.returncode, result.stdout) == (0, PLAIN)


def test_a_child_of_a_module(programs: Path) -> None:
    """multiprocessing imports the main module by its name, and that module imports from its package."""
    package = programs / "package"
    package.mkdir()
    (package / "helper.py").write_text(KERNELS)
    (package / "main.py").write_text(
        "import multiprocessing\n"
        "def work():\n"
        "    from .helper import kernels\n"
        "    print(__name__, __package__, __spec__.name)\n"
        "    kernels()\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=work)\n"
        "    child.start()\n"
        "    child.join()\n"
    )
    assert output("-m", "package.main", cwd=programs) == f"__mp_main__ package package.main\n{FUSED}"


def test_a_child_in_another_folder(programs: Path) -> None:
    """The script has a relative path and changes the working folder before it starts a child."""
    (programs / "elsewhere").mkdir()
    (programs / "moves.py").write_text(
        "import multiprocessing, os\n"
        "def work():\n"
        "    from helper import kernels\n"
        "    kernels()\n"
        "if __name__ == '__main__':\n"
        "    os.chdir('elsewhere')\n"
        "    child = multiprocessing.get_context('spawn').Process(target=work)\n"
        "    child.start()\n"
        "    child.join()\n"
    )
    assert output("moves.py", cwd=programs) == FUSED


# Processes that must not be affected


def child(programs: Path, *args: str, change: str = "") -> tuple[str, str]:
    """Output and errors of a program that starts Python with these arguments and a changed environment."""
    (programs / "starts.py").write_text(
        "import os, subprocess, sys\n"
        f"environment = dict(os.environ)\n{change}\n"
        f"sys.exit(subprocess.run([sys.executable, *{args!r}], env=environment).returncode)\n"
    )
    result = run("starts.py", cwd=programs)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


PATH = os.pathsep.join(filter(None, sys.path))


@pytest.mark.parametrize("change", ["del environment['FUSED_RNN_RUN']", f"environment['PYTHONPATH'] = {PATH!r}"])
def test_a_program_can_leave_a_child_out(programs: Path, change: str) -> None:
    """It removes the run's variable, or sets PYTHONPATH itself."""
    assert child(programs, "kernels.py", change=change)[0] == PLAIN


@pytest.mark.parametrize("option", ["-I", "-S", "-E"])
def test_children_without_site_or_environment_run_unharmed(programs: Path, option: str) -> None:
    assert child(programs, option, "-c", "print('fine')") == ("fine\n", "")


def test_looking_for_torch_does_not_import_it(programs: Path) -> None:
    """Libraries test for torch with find_spec; the result must be the usual one."""
    (programs / "asks.py").write_text(
        "import importlib.util, sys\n"
        "spec = importlib.util.find_spec('torch')\n"
        "print(spec.origin, spec.submodule_search_locations, spec.loader.get_filename('torch'), spec.loader.name)\n"
        "print('torch' in sys.modules)\n"
    )
    assert output("asks.py", cwd=programs) == python("asks.py", cwd=programs).stdout


def test_torch_has_its_own_loader(programs: Path) -> None:
    (programs / "loader.py").write_text(
        "import sys, torch\n"
        "print(type(torch.__loader__).__name__, torch.__spec__.loader is torch.__loader__)\n"
        "print({type(finder).__module__ for finder in sys.meta_path} & {'sitecustomize'})\n"
    )
    assert output("loader.py", cwd=programs) == "SourceFileLoader True\nset()\n"


def test_a_program_that_imports_the_package_first(programs: Path) -> None:
    (programs / "first.py").write_text("from fused_rnn import LSTM\nfrom helper import kernels\nkernels()\n")
    assert output("first.py", cwd=programs) == FUSED


def test_the_package_of_the_working_folder(programs: Path) -> None:
    """`python -m` finds the package there; a script's path and its child's path do not contain it."""
    (programs / "fused_rnn").symlink_to(Path(fused_rnn.__file__).parent)
    folder = programs / "elsewhere"
    folder.mkdir()
    (folder / "helper.py").write_text(KERNELS)
    (folder / "hidden.py").write_text(
        "import sys\n"
        "class Without:\n"
        "    def __init__(self, finder):\n"
        "        self.finder = finder\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        return None if name == 'fused_rnn' else self.finder.find_spec(name, path, target)\n"
        "sys.meta_path[2:] = map(Without, sys.meta_path[2:])\n"
        "from helper import kernels\n"
        "kernels()\n"
        "print(sys.modules['fused_rnn'].__file__)\n"
    )
    assert output("elsewhere/hidden.py", cwd=programs) == f"{FUSED}{programs / 'fused_rnn' / '__init__.py'}\n"


def test_an_environment_whose_torch_is_too_old(programs: Path) -> None:
    """The process runs on torch.nn and says so in one line."""
    folder = programs / "old"
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("__version__ = '2.4.0'\n")
    change = f"environment['PYTHONPATH'] += {os.pathsep + str(folder)!r}"
    result, errors = child(programs, "-c", "import os, torch; print(os.getpid(), torch.__version__)", change=change)
    pid = result.split()[0]
    assert result == f"{pid} 2.4.0\n"
    reason = "fused_rnn needs torch 2.10 or newer, found 2.4.0"
    assert errors == f"fused_rnn: process {pid} ({sys.executable}) computes with torch.nn: {reason}\n"


def test_an_import_of_torch_that_fails(programs: Path) -> None:
    """The error is the program's own, and a second import of torch is patched."""
    (programs / "broken").mkdir()
    (programs / "broken" / "torch.py").write_text("raise ImportError('no such device')\n")
    (programs / "tries.py").write_text(
        "import sys\n"
        "sys.path.insert(0, 'broken')\n"
        "try:\n"
        "    import torch\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "del sys.path[0]\n"
        "from helper import kernels\n"
        "kernels()\n"
    )
    assert output("tries.py", cwd=programs) == f"no such device\n{FUSED}"


def test_a_run_within_a_run(programs: Path) -> None:
    assert child(programs, "-m", "fused_rnn", "run", "-m", "kernels")[0] == FUSED
    (programs / "path.py").write_text("import os\nprint(os.environ['PYTHONPATH'].count('startup'))\n")
    assert child(programs, "-m", "fused_rnn", "run", "path.py") == ("1\n", "")


# --verbose

LINE = re.compile(r"fused_rnn: process (\d+), torch.nn's recurrent modules: (.*)\n")


def test_every_process_reports_its_calls(programs: Path) -> None:
    """Forked and spawned children count their own calls; workers without calls print nothing; scripts get --verbose."""
    (programs / "counts.py").write_text(
        "import multiprocessing, os, sys\n"
        "def work(times):\n"
        "    import torch\n"
        "    for _ in range(times):\n"
        "        torch.nn.GRU(3, 5)(torch.ones(2, 1, 3))\n"
        "    print(os.getpid(), times, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    work(1)\n"
        "    for method, times in (('fork', 2), ('fork', 0), ('spawn', 3)):\n"
        "        child = multiprocessing.get_context(method).Process(target=work, args=(times,))\n"
        "        child.start()\n"
        "        child.join()\n"
        "    if os.fork() == 0:\n"
        "        work(4)\n"
        "        sys.exit()\n"
        "    os.wait()\n"
        "    print(*sys.argv)\n"
        "    work(5)\n"
        "    sys.exit(7)\n"
    )
    result = run("--verbose", "counts.py", "--verbose", cwd=programs)
    *processes, last = result.stdout.splitlines()
    pids = [line.split()[0] for line in (*processes, last)]
    assert (result.returncode, pids.pop(5)) == (7, "counts.py")
    reports = dict(LINE.findall(result.stderr))
    counts = {pids[0]: 6, pids[1]: 2, pids[3]: 3, pids[4]: 4}
    assert reports == {
        pid: f"{count} calls ({count} GRU) ran fused, 0 calls ran on torch.nn" for pid, count in counts.items()
    }


@pytest.fixture
def tally() -> Iterator[Tally]:
    """The tally of a patch for the duration of the test."""
    tally = Tally()
    functions, patch._fused = patch._fused, patch._build(tally)
    with fused_rnn.patched():
        yield tally
    patch._fused = functions


def test_calls_are_counted_by_class(tally: Tally) -> None:
    x = torch.ones(2, 1, 3)
    assert str(tally) == "0 calls ran fused, 0 calls ran on torch.nn"
    with fused_calls() as calls:
        nn.LSTM(3, 5, 2)(x)
        nn.RNN(3, 5, nonlinearity="relu")(x)
        nn.GRUCell(3, 5)(x[0])
        nn.GRUCell(3, 5)(x[0])
    assert calls.count("fused_rnn::forward") == 5  # one per layer
    nn.GRU(3, 5, dtype=torch.complex64)(x.to(torch.complex64))
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        nn.GRU(3, 5)(torch.ones(2, 1, 4))
    assert str(tally) == "4 calls (2 GRUCell, 1 LSTM, 1 RNN) ran fused, 1 call (1 GRU) ran on torch.nn"


def test_threads_count(tally: Tally) -> None:
    module, x = nn.GRUCell(3, 5), torch.ones(1, 3)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=lambda: [module(x) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert str(tally).startswith("800 calls (800 GRUCell) ran fused")


def test_counting_does_not_stop_compilers(tally: Tally) -> None:
    """TorchScript and torch.compile accept the counted modules; calls in their graphs are not counted."""
    module, x = nn.Sequential(nn.GRU(3, 5)), torch.ones(2, 1, 3)
    expected = module(x)
    before = str(tally)
    close(torch.jit.script(module)(x), expected)
    assert str(tally) == before
    with torch._dynamo.config.patch(allow_rnn=True):
        close(torch.compile(module, backend="eager", fullgraph=True)(x), expected)
    assert str(tally) == before
    torch.compiler.reset()
    close(torch.compile(module, backend="eager")(x), expected)  # breaks the graph at the module, which runs eagerly
    assert str(tally) == "2 calls (2 GRU) ran fused, 0 calls ran on torch.nn"
