"""``python -m fused_rnn run``: a script runs as under Python itself, except that layers use the kernels.

Most runs are repeated by plain Python; output, errors and exit status must be equal.
"""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fused_rnn
from fused_rnn import __main__ as command_line
from processes import FUSED, KERNELS, PLAIN, python, python_path, run

SHOW = """
import json, os, sys
modules = sorted(sys.modules)
try:
    import sitecustomize
    site = sitecustomize.__file__
except ModuleNotFoundError:
    site = None
main = sys.modules["__main__"].__dict__ is globals()
names = {name: str(value) for name, value in globals().items() if name.startswith("__") and name != "__builtins__"}
spec = __spec__ and (__spec__.name, __spec__.parent, __spec__.origin)
names.update(__spec__=spec, __loader__=type(__loader__).__name__)
print(json.dumps([sys.argv, main, names, sys.path, os.getcwd(), str(sys.flags), sys._xoptions, modules, site]))
"""


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """A folder with scripts in a subfolder that is also a package, and the same as a zip file."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "show.py").write_text(SHOW)
    (folder / "__main__.py").write_text(SHOW)
    (folder / "kernels.py").write_text(KERNELS + "kernels()\n")
    (folder / "neighbour.py").write_text("value = 42\n")
    (folder / "data.txt").write_text("read me\n")
    (folder / "relative.py").write_text("from . import neighbour\nprint(neighbour.value, __package__)\n")
    with zipfile.ZipFile(tmp_path / "scripts.zip", "w") as archive:
        archive.write(folder / "__main__.py", "__main__.py")
    return tmp_path


def same_as_python(*args: str, cwd: Path, options: tuple[str, ...] = (), **environment: str) -> str:
    """The output, after checking that it, the errors and the status are equal with and without `run`."""
    expected = python(*options, *args, cwd=cwd, **environment)
    result = python(*options, "-m", "fused_rnn", "run", *args, cwd=cwd, **environment)
    assert (result.returncode, result.stdout, result.stderr) == (
        expected.returncode,
        expected.stdout,
        expected.stderr,
    )
    return expected.stdout


def test_run_uses_the_kernels(scripts: Path) -> None:
    assert python("scripts/kernels.py", cwd=scripts).stdout == PLAIN
    assert run("scripts/kernels.py", cwd=scripts).stdout == FUSED


ARGS = [], ["--verbose", "3", "-h", "-m", "a b", "", "run", "--", "c"], ["--", "a"]
TARGETS = (
    ["scripts/show.py"],
    ["./scripts/../scripts/show.py"],
    ["scripts"],
    ["scripts.zip"],
    ["-m", "scripts"],
    ["-m", "scripts.show"],
)


@pytest.mark.parametrize("args", ARGS, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_run_is_like_python(scripts: Path, target: list[str], args: list[str]) -> None:
    """Equal sys.argv, __main__ and its names, sys.path, options, imported modules (without torch), sitecustomize."""
    assert same_as_python(*target, *args, cwd=scripts)


@pytest.mark.parametrize("options", [("-X", "dev", "-u"), ("-OO", "-W", "error"), ("-bb", "-X", "utf8=0")], ids=str)
def test_run_keeps_the_options_of_python(scripts: Path, options: tuple[str, ...]) -> None:
    assert same_as_python("scripts/show.py", cwd=scripts, options=options)


@pytest.mark.parametrize("target", [["scripts/show.py"], ["scripts.zip"]], ids=str)
def test_run_with_a_safe_path(scripts: Path, target: list[str]) -> None:
    """The script's folder is not on sys.path; older versions of Python ignore the variable."""
    assert same_as_python(*target, cwd=scripts, PYTHONSAFEPATH="1")


@pytest.mark.parametrize("start", [["-um", "fused_rnn"], ["-umfused_rnn"], ["-u", "-mfused_rnn"]], ids=str)
def test_run_takes_options_joined_to_m(scripts: Path, start: list[str]) -> None:
    """-u sets no flag in sys.flags, only the buffering of stdout."""
    (scripts / "buffer.py").write_text("import sys\nprint(sys.stdout.write_through, 'torch' in sys.modules)\n")
    assert python(*start, "run", "buffer.py", cwd=scripts).stdout == "True False\n"
    assert run("buffer.py", cwd=scripts).stdout == "False False\n" or os.environ.get("PYTHONUNBUFFERED")


@pytest.mark.parametrize("option", ["-E", "-I", "-S"])
def test_run_refuses_options_that_keep_it_out(scripts: Path, option: str) -> None:
    """Python with such an option may not find this package, so the test passes it the package's path."""
    source = (
        f"import sys; sys.path += {sys.path!r}; sys.argv = ['-m', 'run', 'scripts/show.py']; "
        "sys.orig_argv[1:] = ['-m', 'fused_rnn', 'run', 'scripts/show.py']; import fused_rnn"
    )
    result = python(option, "-c", source, cwd=scripts)
    assert (result.returncode, result.stdout) == (2, "")
    assert "out of reach under Python's options -E, -I and -S" in result.stderr


def test_run_with_a_sitecustomize(scripts: Path) -> None:
    """Python's usual sitecustomize.py is imported once, and its errors are reported."""
    folder = scripts / "site"
    folder.mkdir()
    file = folder / "sitecustomize.py"
    file.write_text("import sys\nsys.sites = [*getattr(sys, 'sites', []), (__name__, __file__)]\n")
    (scripts / "sites.py").write_text("import sys, sitecustomize\nprint(sys.sites, sitecustomize.__file__)\n")
    result = same_as_python("sites.py", cwd=scripts, PYTHONPATH=python_path(folder))
    assert result == f"[('sitecustomize', {str(file)!r})] {file}\n"
    file.write_text("import nowhere\n")
    result = run("scripts/show.py", cwd=scripts, PYTHONPATH=python_path(folder))
    assert result.returncode == 0 and "No module named 'nowhere'" in result.stderr


def test_settings_that_torch_reads_on_import_are_the_scripts(scripts: Path) -> None:
    (scripts / "threads.py").write_text(
        "import os\nos.environ['OMP_NUM_THREADS'] = '1'\nimport torch\nprint(torch.get_num_threads())\n"
    )
    assert run("threads.py", cwd=scripts, OMP_NUM_THREADS="2").stdout == "1\n"


def test_run_through_a_link(scripts: Path) -> None:
    """Python resolves the link: the script's imports are next to the file itself."""
    (scripts / "link.py").symlink_to(scripts / "scripts" / "show.py")
    assert same_as_python("link.py", cwd=scripts)


def test_run_finds_the_neighbours_of_the_script(scripts: Path) -> None:
    script = scripts / "scripts" / "imports.py"
    script.write_text(
        "import os, neighbour\n"
        "os.chdir('/')\n"
        "print(neighbour.value, open(os.path.join(os.path.dirname(__file__), 'data.txt')).read(), end='')\n"
    )
    for cwd, name in ((scripts, str(script)), (scripts, "scripts/imports.py"), (scripts / "scripts", "imports.py")):
        found = run(name, cwd=cwd)
        assert (found.returncode, found.stdout) == (0, "42 read me\n"), found.stderr


def test_run_of_a_module_with_relative_imports(scripts: Path) -> None:
    assert run("-m", "scripts.relative", cwd=scripts).stdout == "42 scripts\n"


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('no data')", 1),
        ("def f():\n    raise ValueError('boom')\n\n\nf()\n", 1),
        ("x = 1\ndef f(:\n", 1),
        ("raise KeyboardInterrupt", -2),
        ("import os; os._exit(4)", 4),
        ("import atexit; atexit.register(print, 'bye'); 1 / 0", 1),
    ],
)
def test_run_ends_as_python_does(scripts: Path, source: str, status: int) -> None:
    """Equal exit status, traceback and message."""
    (scripts / "ends.py").write_text(source)
    same_as_python("ends.py", cwd=scripts)
    assert run("-m", "ends", cwd=scripts).returncode == status


@pytest.mark.parametrize("target", [["nowhere.py"], ["-m", "nowhere"], ["empty"]], ids=str)
def test_run_of_a_missing_script(scripts: Path, target: list[str]) -> None:
    (scripts / "empty").mkdir()
    same_as_python(*target, cwd=scripts)
    assert run(*target, cwd=scripts).returncode != 0


def test_run_pickles_the_scripts_classes(scripts: Path) -> None:
    """They belong to __main__, as under Python."""
    (scripts / "save.py").write_text(
        "import io, torch\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.rnn = torch.nn.GRU(3, 5)\n"
        "file = io.BytesIO()\n"
        "torch.save(Model(), file)\n"
        "file.seek(0)\n"
        "loaded = torch.load(file, weights_only=False)\n"
        "print(type(loaded) is Model, Model.__module__, type(loaded.rnn).__module__)\n"
    )
    assert run("save.py", cwd=scripts).stdout == "True __main__ torch.nn.modules.rnn\n"


def test_info(tmp_path: Path) -> None:
    found = python("-m", "fused_rnn", "info", cwd=tmp_path, OMP_NUM_THREADS="1", FUSED_RNN_CPU_ISA="portable")
    assert found.returncode == 0, found.stderr
    lines = dict(line.split(":", 1) for line in found.stdout.splitlines())
    info = {name: value.strip() for name, value in lines.items()}
    assert info["fused_rnn"].startswith(f"{fused_rnn.__version__} in ")
    assert info["torch"] == torch.__version__
    assert info["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert info["threads"] == "1"
    isas = ", ".join(fused_rnn._C.supported_cpu_isas())
    assert info["instruction set"] == f"portable (this machine has: {isas})"


WRONG = [], ["run"], ["run", "-m"], ["run", "--quick", "a.py"], ["train"], ["info", "more"]


@pytest.mark.parametrize("args", WRONG, ids=str)
def test_wrong_command_lines(args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["fused_rnn", *args])
    with pytest.raises(SystemExit) as stop:
        command_line.main()
    assert stop.value.code == 2 and "usage: python -m fused_rnn" in capsys.readouterr().err
