"""The user's table: what `fused_rnn.tune` measured on this machine, and where it is kept.

`fused_rnn.policy` asks it before it follows its own rules. Without a table a call costs one look at `Table.asked`: a
file is looked for when the package is imported, and read when the first call asks.

The table is a JSON file in the user's cache folder. Its results are listed for each machine: a device with a driver, a
number of threads, the versions of torch, cuDNN and this package. A writer merges its results with those that
are there, under a lock, and replaces the file as a whole, so that no reader ever sees a half of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import tempfile
import threading
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple, get_type_hints

import torch

from fused_rnn import _C, cuda
from fused_rnn.options import EVERY_STEP, PLANNED

FORMAT = 2
"""Of the file. A file of another format counts as foreign."""

FIRST_USE_VARIABLE = "FUSED_RNN_TUNE"


class Call(NamedTuple):
    """A call of a module, as far as its speed depends on it.

    Attributes:
        cell: one of `fused_rnn.reference.CELLS`.
        dtype: of the input, and outside of autocast of the weights.
        autocast: the dtype that autocast casts to, or None.
        T, B, I, H, proj_size, num_layers, directions: the sizes. B is the mean over the steps of a packed sequence.
        kind: "sequence", "packed", or "cell" for the forward of an RNNCell and so on, with T == 1.
        train: whether the call records a gradient.
        precision: of products of float32: one of `fused_rnn.policy` on a CPU, 1 for TF32 on CUDA, else 0.
    """

    cell: str
    dtype: torch.dtype
    autocast: torch.dtype | None
    T: int
    B: int
    I: int  # noqa: E741 - the field's letter
    H: int
    proj_size: int
    num_layers: int
    directions: int
    kind: str
    train: bool
    precision: int

    @property
    def left_to_torch(self) -> bool:
        """Whether the shipped rules leave this call of a cell on a CPU to torch."""
        records = self.kind == "cell" and self.train and self.autocast is None
        return records and torch_trains(self.cell, self.dtype, self.B, self.H)

    def bucket(self) -> Call:
        """The call that stands for this one in the table: T, B and I are rounded to powers of two."""
        return self._replace(T=_rounded(self.T), B=_rounded(self.B), I=_rounded(self.I))


def torch_trains(cell: str, dtype: torch.dtype, B: int, H: int) -> bool:
    """Whether torch's function for a cell is as fast in training on a CPU."""
    return cell.startswith("rnn") and torch_trains_as_fast(dtype, B, H)


@lru_cache(maxsize=4096)  # of small calls that ask it, 1 µs is a percent
def torch_trains_as_fast(dtype: torch.dtype, B: int, H: int) -> bool:
    """`torch_trains` of an RNN: its autograd nodes cost less."""
    products = _rounded(B) * H**2  # B as in a bucket
    if dtype not in (torch.float32, torch.float64):
        return products < 2**15  # torch multiplies numbers of 16 bits slowly
    return not _outrun_mkl() or products < 2**17


@cache
def _outrun_mkl() -> bool:
    """Whether the kernels multiply faster than MKL, torch's library for that, which does without AVX-512 on AMD's."""
    return _C.cpu_isa().startswith("avx512") and "AMD" in cpu_name()


def _rounded(size: int) -> int:
    """The power of two that is nearest: 64 for 48 to 95."""
    return 1 << max((4 * size // 3).bit_length() - 1, 0)


class Result(NamedTuple):
    """Who computes a call on this machine.

    Attributes:
        backend: "fused" or "torch".
        instance: of the CUDA kernel (`fused_rnn.options`).
        speedup: torch.nn's time divided by that of the fastest kernels: a median of ratios of neighbouring samples.
        seconds: by name of what was timed, the median time of a call.
        instruction_set: of the CPU kernels, if it is not the process's own (a key of `instruction_sets`).
    """

    backend: str
    instance: int = PLANNED
    speedup: float = 1.0
    seconds: Mapping[str, float] = {}
    instruction_set: str = ""


TORCH_NAMES = ("torch.nn", "cuDNN")
"""The names in `Result.seconds` that are not the kernels'."""

Results = dict[tuple[str, Call], Result]
"""Results by the machine and the bucket."""

Answer = Callable[[Call, torch.device], Result | None]
Mode = Literal["off", "read", "first use"]


class _EverySize:
    def __contains__(self, size: object) -> bool:
        return True


_EVERY_SIZE = _EverySize()


class Table:
    """The results of one file; threads may ask and store at the same time.

    Attributes:
        path: of the file; None for a table in memory.
        mode: "read"; or "first use" to measure calls that the table does not have; or "off" to measure nothing that
            nobody asked for, whatever torch.backends.cudnn.benchmark says.
        asked: whether it may have an answer to any call.
        hidden_sizes, cell_hidden_sizes: the hidden sizes, of sequences and of cells, for which it may say of a call on
            a CPU outside of autocast what the rules do not say. Plain calls of other sizes ask nothing else.
    """

    def __init__(self, path: str | None, mode: Mode = "read") -> None:
        self.path, self.mode = path, mode
        self._results: Results = {}
        self._unread = path is not None and os.path.exists(path)
        self._listeners = 0
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._refresh()

    def _refresh(self) -> None:
        listens = self._listeners > 0 or self._unread or self.mode == "first use"
        self.asked = listens or bool(self._results)
        self.hidden_sizes, self.cell_hidden_sizes = (
            _EVERY_SIZE if listens else self._hidden_sizes(of_cells) for of_cells in (False, True)
        )
        # Anew, not cleared: a thread that is searching now would store what is no longer so.
        self._find = lru_cache(maxsize=4096)(lambda machine, call: self._results.get((machine, call.bucket())))

    def _hidden_sizes(self, of_cells: bool) -> Container[int]:
        return frozenset(
            call.H
            for (machine, call), result in self._results.items()
            if (call.kind == "cell") is of_cells
            and ((result.backend == "torch") is not call.left_to_torch or result.instruction_set != "")
            and machine.startswith("cpu")
            and call.autocast is None
        )

    def after_fork(self) -> None:
        """In a forked child, torch.nn waits for OpenMP's threads, which did not survive; the kernels do not."""
        self.mode, self._results, self._unread, self._listeners = "off", {}, False, 0
        self._start()  # another thread may have held the lock

    def listen(self, change: int) -> None:
        """Counts those that want every call to ask, with 1 and -1."""
        with self._lock:
            self._listeners += change
            self._refresh()

    def measures(self, device: torch.device) -> bool:
        """Whether a call on this device that the table does not have is to be measured."""
        if self.mode == "read":
            return device.type == "cuda" and torch.backends.cudnn.benchmark
        return self.mode == "first use"

    def get(self, machine: str, call: Call) -> Result | None:
        """The result that stands for a call, or None.

        Warns:
            UserWarning: once, if the file cannot be read.
        """
        if self._unread:
            self._read()
        return self._find(machine, call)

    def of(self, machine: str) -> dict[Call, Result]:
        """All results of a machine."""
        if self._unread:
            self._read()
        return {call: result for (where, call), result in list(self._results.items()) if where == machine}

    def _read(self) -> None:
        with self._lock:
            if not self._unread or self.path is None:
                return  # another thread has read it
            try:
                self._results = _load(self.path) | self._results
            except (OSError, ValueError) as error:
                self._unread = False  # before the warning, which may be an error
                self._refresh()
                warnings.warn(
                    f"fused_rnn ignores its table of tuned calls, {self.path}, until fused_rnn.tune replaces it: "
                    f"{error}",
                    stacklevel=2,
                )
            self._unread = False
            self._refresh()

    def put(self, results: Results) -> None:
        """Store results, here and in the file.

        Warns:
            UserWarning: the file cannot be written. The results hold for this process.
        """
        if self._unread:
            self._read()
        with self._lock:
            self._results |= results
            self._refresh()
        if self.path is None:
            return
        try:
            _merge(self.path, results)
        except OSError as error:
            warnings.warn(f"fused_rnn cannot write its table of tuned calls: {error}", stacklevel=2)


def _load(path: str) -> Results:
    """The results in a file.

    Raises:
        OSError, ValueError: it cannot be read, or is not such a file.
    """
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    try:
        return {
            (machine, _call(entry["call"])): _result(entry["result"])
            for machine, entries in content["machines"].items()
            for entry in entries
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"an entry is damaged: {error}") from None


def _merge(path: str, results: Results) -> None:
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        with contextlib.suppress(OSError):  # not every file system has locks; then the last of two writers wins
            fcntl.flock(lock, fcntl.LOCK_EX)
        merged: Results = {}
        with contextlib.suppress(OSError, ValueError):
            merged = _load(path)
        merged |= results
        machines: dict[str, list[Any]] = {}
        for (machine, call), result in merged.items():
            machines.setdefault(machine, []).append({"call": _call_fields(call), "result": result._asdict()})
        descriptor, new = tempfile.mkstemp(dir=folder)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump({"format": FORMAT, "machines": machines}, file, indent=1)
            os.replace(new, path)
        except BaseException:
            os.unlink(new)
            raise


def _call_fields(call: Call) -> dict[str, Any]:
    half = None if call.autocast is None else str(call.autocast)
    return call._asdict() | {"dtype": str(call.dtype), "autocast": half}


def _call(fields: Any) -> Call:
    """A `Call` from a file; `_call_fields` undone.

    Raises:
        KeyError, TypeError: it is none.
    """
    dtype, half = _DTYPES[fields["dtype"]], fields["autocast"]
    call = Call(**fields | {"dtype": dtype, "autocast": None if half is None else _DTYPES[half]})
    for name, value in call._asdict().items():
        if name not in ("dtype", "autocast") and type(value) is not _FIELDS[name]:
            raise TypeError(f"{name} is {value!r}")
    return call


_DTYPES = {str(dtype): dtype for dtype in (getattr(torch, name) for name in _C.dtypes())}
_FIELDS = get_type_hints(Call)


def _result(fields: Any) -> Result:
    """A `Result` from a file.

    Raises:
        TypeError: it is none.
    """
    result = Result(**fields)
    numbers = (result.speedup, *result.seconds.values()) if type(result.seconds) is dict else (None,)
    if (
        result.backend not in ("fused", "torch")
        or type(result.instance) is not int
        or result.instance < EVERY_STEP
        or type(result.instruction_set) is not str
        or not all(type(number) is float for number in numbers)
    ):
        raise TypeError(f"{fields!r}")
    return result


def user_path() -> str | None:
    """The file of this user: in ``$XDG_CACHE_HOME/fused_rnn``, or ``~/.cache/fused_rnn``. None without a home."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # as the specification of these folders says
        cache = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "fused_rnn", "tuned.json") if os.path.isabs(cache) else None


def _user_table() -> Table:
    wish = os.environ.get(FIRST_USE_VARIABLE, "")
    if wish not in ("", "0", "1"):
        warnings.warn(f"{FIRST_USE_VARIABLE} must be 0 or 1, got {wish!r}: it is ignored", stacklevel=2)
    if wish == "0":
        return Table(None, "off")
    return Table(user_path(), "first use" if wish == "1" else "read")


table = _user_table()
"""The table that `fused_rnn.policy` asks."""

on_first_use: Answer | None = None
"""Measures a call that the table does not have; `fused_rnn.tuning` sets it."""

forked = False
"""Whether this process is the forked child of one that had imported the package."""


def _after_fork() -> None:
    global forked
    forked = True
    table.after_fork()


os.register_at_fork(after_in_child=_after_fork)

_thread = threading.local()


@contextlib.contextmanager
def answering(answer: Answer) -> Iterator[None]:
    """Context manager: this thread's calls ask `answer` in place of the table."""
    before = getattr(_thread, "answer", None)
    asked = table  # a test may replace it meanwhile
    _thread.answer = answer
    asked.listen(1)
    try:
        yield
    finally:
        asked.listen(-1)
        _thread.answer = before


def ask(call: Call, device: torch.device, may_measure: bool) -> Result | None:
    """Who computes a call on a device, if that was measured, or may be measured now."""
    answer = getattr(_thread, "answer", None)
    if answer is not None:
        found: Result | None = answer(call, device)
        return found
    result = table.get(machine(device), call)
    if result is None and may_measure and on_first_use is not None and table.measures(device):
        return on_first_use(call, device)
    return result


def machine(device: torch.device) -> str:
    """The name of a machine whose results hold for `device`."""
    if device.type == "cpu":
        return _cpu(torch.get_num_threads())
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _cpu(threads: int) -> str:
    sets = "/".join((_C.cpu_isa(), *filter(None, instruction_sets())))
    return f"cpu: {cpu_name()}, {threads} thread{'s' * (threads > 1)}, {sets}, {_versions()}"


@cache
def instruction_sets() -> dict[str, int]:
    """By name, the instance (`fused_rnn.options`) of the CPU kernels' instruction sets that are compared.

    The first is the process's own, with an empty name. It is alone if FUSED_RNN_CPU_ISA names it.
    """
    sets = {"": PLANNED}
    if not os.environ.get("FUSED_RNN_CPU_ISA"):
        for place, name in enumerate(_C.supported_cpu_isas()):
            if place > 0 and name not in _NEVER_FASTER:
                sets[name] = place
    return sets


_NEVER_FASTER = ("portable", "amx_emulated")


@lru_cache(maxsize=64)
def _gpu(index: int) -> str:
    sms, shared_bytes, _ = cuda.device_properties(torch.device("cuda", index))
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # only where torch has CUDA
    return (
        f"cuda: {torch.cuda.get_device_name(index)}, {sms} multiprocessors, {shared_bytes} bytes of shared memory, "
        f"driver {driver}, cuDNN {torch.backends.cudnn.version()}, {_versions()}"
    )


def _versions() -> str:
    import fused_rnn

    return f"torch {torch.__version__}, fused_rnn {fused_rnn.__version__}"


def cpu_name(cpu_info: str | os.PathLike[str] = "/proc/cpuinfo") -> str:
    """The processor's name; on Arm, where the system has only numbers, those of the makers and kinds of its cores."""
    try:
        with open(cpu_info) as file:
            fields = [tuple(map(str.strip, line.split(":", 1))) for line in file if ":" in line]
    except OSError:
        fields = []
    names = [value for field, value in fields if field == "model name"]
    if names:
        return names[0]
    numbers = [f"{field[4:]} {value}" for field, value in fields if field in ("CPU implementer", "CPU part")]
    return " ".join((platform.processor() or platform.machine(), *dict.fromkeys(numbers)))
