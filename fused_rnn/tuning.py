"""Tuning: times torch.nn and the kernels on this machine, and stores who computes a call from now on.

A call is measured with random weights and data of its sizes. Everything that could compute it, the rivals, first has to
give torch.nn's values; then they take turns, and a rival's speed is the median over the turns of torch.nn's time
divided by its own. Torch.nn must give way to kernels that are 5 % faster on a GPU, where nothing else is known, and in
cells that the rules leave to it; in other calls on a CPU, for which the kernels were measured on other machines, it
must itself be 5 % faster to be taken.

The rivals of a CPU are torch.nn and the kernels, with the process's instruction set and, unless FUSED_RNN_CPU_ISA names
that, with each other one of the processor that computes the call in another way; those must be 5 % faster than the
process's own. On CUDA they are cuDNN, the planner's two best resident kernels, in training also its best one for each
pass, and a product per step.

Weights and data come from a generator of their own, and nothing of the caller's is written to.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import rnn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fused_rnn import _C, cuda, policy, reference, self_check, tuned, tuning_report
from fused_rnn.cell_info import NUMBER
from fused_rnn.cells import GRUCell, LSTMCell, RNNCell
from fused_rnn.modules import GRU, LSTM, RNN
from fused_rnn.options import EVERY_STEP, LayerOptions
from fused_rnn.tuned import TORCH_NAMES, Call, Result

MARGIN = 1.05
"""How much faster a challenger must be."""

FIRST_USE_SECONDS = 0.5
"""How long a call is measured on its first use."""

LEAST_SAMPLE = 2e-3  # seconds, far above the clock's resolution
LEAST_ROUNDS, MOST_ROUNDS = 3, 101
GPU_PLANS = 2
_TORCH = Result("torch")

_lock = threading.Lock()  # two measurements at a time would disturb each other
_hopeless: set[tuple[str, Call]] = set()  # machines' buckets whose measurement failed: not to be tried at every use


def tune(model: torch.nn.Module, example_input: Any, seconds: float = 10.0) -> dict[Call, Result]:
    """Measure who computes the recurrent layers of a model faster on this machine: torch.nn or the kernels.

    Runs the model once, as ``model(example_input)``, notes the calls of its `fused_rnn.RNN`, `LSTM` and `GRU` modules,
    and on a CPU of its cells, and measures each distinct one with random data of its sizes. The results go into the
    user's table, which modules with ``backend="auto"`` and cells follow from then on, in this process and in later
    ones, for calls of about these sizes. They are also printed. Modules with another backend, and those with options
    that torch.nn does not have, are left alone.

    Args:
        model: a module of this package, or any model that contains some.
        example_input: what the model is called with; a tuple is passed as several arguments.
        seconds: about how long to measure, in total; calls that take long are measured a dozen times all the same.

    Returns:
        The result of each distinct call.

    Raises:
        ValueError: the model made no call that could be tuned, or `seconds` is not positive.
        RuntimeError: within `fused_rnn.patched`, where torch.nn runs on the kernels, too; or in a forked process, where
            torch.nn may wait forever; or OpenMP gives fewer threads than torch asks for; or there is no memory.

    Warns:
        UserWarning: the kernels computed wrong values (torch.nn is taken), or the table cannot be written.

    Example::

        gru, x = fused_rnn.GRU(28, 64), torch.randn(20, 8, 28)
        fused_rnn.tune(gru, x)  # forward and backward
        with torch.no_grad():
            fused_rnn.tune(gru, x)  # inference
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"tune: seconds must be positive, got {seconds}")
    if why := _obstacle():
        raise RuntimeError(f"tune: {why}")
    calls = _calls_of(model, example_input)
    if not calls:
        raise ValueError(
            f"tune: {type(model).__name__} made no call that could be tuned. It needs an RNN, LSTM, GRU or cell of "
            "fused_rnn (fused_rnn.replace converts a model) with backend='auto', outside of torch.compile and of "
            "deterministic algorithms"
        )
    results: dict[tuple[Call, torch.device], Result] = {}
    with _lock, tuning_report.progress(seconds) as advance:
        for call, device in calls:
            with _own_settings(call, device):
                result = results[call, device] = _measured(call, device, seconds / len(calls), advance)
            tuned.table.put({(tuned.machine(device), call.bucket()): result})  # at once: the next may fail
    machines = dict.fromkeys(tuned.machine(device) for _, device in calls)
    by_call = {call: result for (call, _), result in results.items()}
    tuning_report.show(by_call, list(machines), tuned.table.path)
    return by_call


def _calls_of(model: torch.nn.Module, example_input: Any) -> list[tuple[Call, torch.device]]:
    """The distinct calls in one forward of a model that ask for the user's table."""
    calls: dict[tuple[Call, torch.device], tuple[Call, torch.device]] = {}
    with tuned.answering(lambda call, device: calls.setdefault((call.bucket(), device), (call, device)) and None):
        model(*example_input) if type(example_input) is tuple else model(example_input)
    return list(calls.values())


def _on_first_use(call: Call, device: torch.device) -> Result | None:
    """Measure a call that the table does not have, unless this is a bad moment; None: the rules decide.

    Under torch.distributed every process only reads the table: to measure in one while the others compute would
    measure their load, and to wait for one could wait forever.
    """
    distributed = torch.distributed
    alone = not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    key = tuned.machine(device), call.bucket()
    if capturing or not alone or key in _hopeless or _obstacle() or not _lock.acquire(blocking=False):
        return None
    try:
        with _own_settings(call, device):
            result = _measured(call, device, FIRST_USE_SECONDS)
    except RuntimeError as error:  # out of memory
        _hopeless.add(key)
        warnings.warn(f"fused_rnn could not measure {call}: {error}", stacklevel=2)
        return None
    finally:
        _lock.release()
    tuned.table.put({key: result})
    return result


tuned.on_first_use = _on_first_use


def _obstacle() -> str | None:
    """Why torch.nn cannot be timed in this process now."""
    if rnn._VF is not torch._VF:  # type: ignore[attr-defined]  # imported there, not exported
        return "within fused_rnn.patched() torch.nn runs on the kernels: tune outside of it"
    if tuned.forked:
        return "in a forked process torch.nn may wait forever: tune in the parent"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks see what autograd saves, as in a checkpointed part of a model: tune outside of it"
    return None


@contextlib.contextmanager
def _own_settings(call: Call, device: torch.device) -> Iterator[None]:
    """The call's modes, whatever those of the caller."""
    half = call.autocast
    try:
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(call.train),
            torch.autocast(device.type, half, enabled=half is not None),
            torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
        ):
            yield
    finally:
        if half is not None:
            torch.clear_autocast_cache()  # it would keep the weights of the measured module


def _measured(
    call: Call, device: torch.device, seconds: float, advance: Callable[[float], None] = lambda seconds: None
) -> Result:
    """Check and time all rivals of a call.

    Args:
        advance: is told how many seconds have passed since it was told last.

    Raises:
        RuntimeError: nothing can compute it, for want of memory.

    Warns:
        UserWarning: the kernels computed wrong values.
    """
    if device.type == "cpu" and policy.lacks_threads():  # torch.nn's LSTM is never taken then
        raise RuntimeError("OpenMP gives fewer threads than torch asks for (OMP_THREAD_LIMIT, OMP_DYNAMIC)")
    subject = _Subject(call, device)
    rivals = _correct(_rivals(call, device), subject)
    samples = _samples(rivals, subject, device, seconds, advance)
    return _decide(rivals, samples, device.type, device.type == "cuda" or call.left_to_torch)


def _correct(rivals: dict[str, Result], subject: _Subject) -> dict[str, Result]:
    """Those rivals that can compute the call, and do it as accurately as torch.nn."""
    values: dict[str, list[Tensor]] = {}
    for name, rival in rivals.items():
        try:
            with tuned.answering(lambda call, device, rival=rival: rival):  # type: ignore[misc]
                values[name] = subject.run()
        except RuntimeError as error:  # such as torch.nn, if it does not know this dtype on this processor
            why = error
    if not values:
        raise why
    torchs, *ours = rivals
    if torchs in values:
        try:
            exact = subject.exact()
        except torch.OutOfMemoryError:  # float64, step by step, takes several times what a rival does
            exact = [value.double() for value in values[torchs]]
        for name in ours:
            if name in values and (wrong := _inaccurate_result(subject.call, values[name], values[torchs], exact)):
                del values[name]
                warnings.warn(
                    f"fused_rnn: {name} computes {wrong} of {subject.call} less accurately than torch.nn, and is not "
                    "taken for such calls; please report this",
                    stacklevel=2,
                )
    return {name: rival for name, rival in rivals.items() if name in values}


def _rivals(call: Call, device: torch.device) -> dict[str, Result]:
    """By name, the answers that make the policy choose each of those that could compute a call; torch.nn first."""
    if device.type != "cuda":
        return {TORCH_NAMES[0]: _TORCH} | _instruction_sets(call)
    rivals = {TORCH_NAMES[1]: _TORCH}
    if self_check.why_not(device):
        return rivals
    dtype = call.autocast or call.dtype
    properties = cuda.device_properties(device)
    if cuda.is_resident(call.cell, dtype, call.B, call.H, call.directions, properties) and call.T > 1:
        if call.train:  # kSplitColumns has backward alone
            rivals["planner"] = Result("fused")
        cost: dict[int, float] = {}
        for backward in (False, True) if call.train else (False,):
            plans = cuda.plans(call.cell, dtype, call.B, call.H, call.directions, backward, properties)
            of_pass = {plan["instance"]: plan["microseconds"] for plan in plans}
            cost = {i: cost.get(i, 0.0) + us for i, us in of_pass.items() if not backward or i in cost}
        for instance in sorted(cost, key=cost.__getitem__)[:GPU_PLANS]:
            rivals[f"kernel {instance}"] = Result("fused", instance)
    return rivals | {"step by step": Result("fused", EVERY_STEP)}


def _instruction_sets(call: Call) -> dict[str, Result]:
    """The kernels with each instruction set that computes the call in a way of its own; the process's own first."""
    precision = policy.layer_precision(call.dtype, call.autocast, call.T == 1)
    rows = _first_rows(call)
    rivals: dict[tuple[Any, ...], tuple[str, Result]] = {}
    for name, instance in tuned.instruction_sets().items():
        plan = _C.cpu_plan(
            NUMBER[call.cell], call.T, rows, call.I, call.H, call.proj_size or call.H, call.directions,
            torch.get_num_threads(), call.dtype is torch.float64, precision, False, instance=instance,
        )  # fmt: skip
        # Those with products of bfloat16 are the one without in all calls that have no such products.
        products = plan["products"], plan["products"] == "bfloat16" and plan["instruction_set"]
        rival = f"kernels, {name}" if name else "kernels", Result("fused", instruction_set=name)
        rivals.setdefault((plan["vector_bytes"], *products), rival)
    return dict(rivals.values())


def _first_rows(call: Call) -> int:
    """Rows of the first step: of a packed sequence with rows of every length, whose mean number per step is B."""
    return 2 * call.B - 1 if call.kind == "packed" else call.B


class _Subject:
    """A module of random weights, its input, and a cell's states, for one call."""

    def __init__(self, call: Call, device: torch.device) -> None:
        self.call = call
        generator = torch.Generator(device).manual_seed(0)
        dtype = call.dtype
        more: dict[str, Any] = {"nonlinearity": call.cell[4:]} if call.cell.startswith("rnn") else {}
        if call.proj_size:
            more["proj_size"] = call.proj_size
        of_cell = call.kind == "cell"
        if not of_cell:
            more |= {"num_layers": call.num_layers, "bidirectional": call.directions == 2}
        make: Any = _CLASSES[call.cell][of_cell]
        module = make(call.I, call.H, device="meta", dtype=torch.float32 if call.autocast else dtype, **more)
        self.module = module.to_empty(device=device)  # without drawing from torch's own generator
        bound = call.H**-0.5
        with torch.no_grad():
            for weight in self.module.parameters():
                weight.uniform_(-bound, bound, generator=generator)
        self.weights = list(self.module.parameters())
        steps = () if of_cell else (call.T,)
        x = torch.randn(*steps, call.B, call.I, generator=generator, device=device, dtype=dtype)
        self.batch_sizes = None
        if call.kind == "packed":
            rows = _first_rows(call)
            x = torch.randn(call.T, rows, call.I, generator=generator, device=device, dtype=dtype)
            lengths = [math.ceil(call.T * row / rows) for row in range(rows, 0, -1)]
            x, self.batch_sizes, *_ = pack_padded_sequence(x, torch.tensor(lengths, device="cpu"))
        self.x = x.detach().requires_grad_(call.train)
        self.states = [
            torch.randn(call.B, call.H, generator=generator, device=device, dtype=dtype).requires_grad_(call.train)
            for _ in range((2 if call.cell == "lstm" else 1) if of_cell else 0)
        ]
        width = call.directions * (call.proj_size or call.H)
        self.dy = torch.randn(*x.shape[:-1], width, generator=generator, device=device, dtype=torch.float32)

    def run(self) -> list[Tensor]:
        """The output, the final states, and in training the gradients of the input, the states and all weights."""
        x = self.x if self.batch_sizes is None else PackedSequence(self.x, self.batch_sizes)
        if self.states:
            hidden = self.module.forward(x, tuple(self.states) if len(self.states) > 1 else self.states[0])
            output = hidden[0] if isinstance(hidden, tuple) else hidden
        else:
            output, hidden = self.module.forward(x)  # no hook sees it
        y = output.data if self.batch_sizes is not None else output
        inputs = (self.x, *self.states, *self.weights)
        return self._results(y, hidden if isinstance(hidden, tuple) else (hidden,), inputs)

    def exact(self) -> list[Tensor]:
        """The results of `run` by the specification, in float64."""
        call = self.call
        inputs = [t.detach().double().requires_grad_(call.train) for t in (self.x, *self.states, *self.weights)]
        x, *states = inputs[: 1 + len(self.states)]
        h0, c0 = (*states, None, None)[:2]
        with torch.autocast(x.device.type, enabled=False):
            y, *hidden = reference.stack(
                call.cell, x, h0, c0, inputs[1 + len(states) :], True, call.num_layers, call.directions, 0.0,
                LayerOptions(self.batch_sizes),
            )  # fmt: skip
            return self._results(y, hidden, inputs)

    def _results(self, y: Tensor, hidden: Iterable[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        results = [y, *hidden]
        if self.call.train:
            results += torch.autograd.grad(y, inputs, self.dy.to(y.dtype))
        return [result.detach() for result in results]


_CLASSES = {"lstm": (LSTM, LSTMCell), "gru": (GRU, GRUCell), "rnn_tanh": (RNN, RNNCell), "rnn_relu": (RNN, RNNCell)}


def _inaccurate_result(call: Call, values: list[Tensor], expected: list[Tensor], exact: list[Tensor]) -> str | None:
    """Which result is less accurate than the tests allow; None if all are as they should be.

    An error may be twice torch.nn's, and a gradient's four times, plus some roundings at the scale of the arithmetic.
    """
    low = call.autocast or (torch.bfloat16 if call.precision else call.dtype)
    rounding = 4 * torch.finfo(low).eps if low is not torch.float64 else 1e-11
    states = 3 if call.cell == "lstm" else 2
    for index, (ours, theirs, truth) in enumerate(zip(values, expected, exact, strict=True)):
        is_gradient = index >= states
        if is_gradient and call.cell == "rnn_relu" and low not in policy.KERNEL_DTYPES:
            continue  # near relu's kink rounding decides on which side a value lies, and the gradient jumps
        allowed = (4 if is_gradient else 2) * _error(theirs, truth) + rounding * max(1.0, truth.abs().max().item())
        if not _error(ours, truth) <= allowed:  # NaN is wrong
            names = ("the output", "a final state", "a final state")
            return "a gradient" if is_gradient else names[index]
    return None


def _error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).abs().max().item()


def _samples(
    rivals: dict[str, Result],
    subject: _Subject,
    device: torch.device,
    seconds: float,
    advance: Callable[[float], None],
) -> dict[str, list[float]]:
    """By name, the seconds per call of every turn. In each round the rivals take turns, in alternating order."""
    clock = _cpu_seconds
    runs: dict[str, Callable[[], Any]] = dict.fromkeys(rivals, subject.run)
    if device.type == "cuda":
        clock = _cuda_seconds
        for name, rival in rivals.items() if subject.call.kind != "packed" else ():  # whose rows come from the host
            with tuned.answering(lambda call, device, rival=rival: rival):  # type: ignore[misc]
                runs[name] = _captured(subject.run, device)
        if subject.run in runs.values():  # a graph and a call cannot be compared
            runs = dict.fromkeys(rivals, subject.run)

    def take(name: str, count: int) -> float:
        with tuned.answering(lambda call, device: rivals[name]):
            return clock(runs[name], count)

    began = last = perf_counter()
    slowest = max(min(take(name, 1) for _ in range(2)) for name in rivals)
    batch = max(1, min(1000, math.ceil(LEAST_SAMPLE / max(slowest, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    order = list(rivals)
    for finished in range(MOST_ROUNDS):
        now = perf_counter()
        advance(now - last)
        last = now
        if finished >= LEAST_ROUNDS and now - began > seconds:
            break
        for name in order:
            samples[name].append(take(name, batch) / batch)
        order.reverse()
    return samples


def _cpu_seconds(run: Callable[[], Any], count: int) -> float:
    """The seconds that a number of calls take."""
    began = perf_counter()
    for _ in range(count):
        run()
    return perf_counter() - began


def _cuda_seconds(run: Callable[[], Any], count: int) -> float:
    """`_cpu_seconds`, by CUDA events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call as a graph, so that the time of Python and of launches does not count."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):  # what happens once, on a stream as in the capture
        run()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(current), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()  # the outer context gives the stream back even if the end of the capture raises
    except RuntimeError:  # some calls cannot be captured, such as those that copy from the host
        return run
    return graph.replay


def _decide(rivals: dict[str, Result], samples: dict[str, list[float]], device_type: str, torch_first: bool) -> Result:
    """The result from the samples of all rivals.

    Args:
        torch_first: whether torch.nn is who must be beaten by a margin, and not the kernels; the first of these are on
            a CPU those with the process's instruction set.
    """
    seconds = {name: median(times) for name, times in samples.items()}
    torchs = next((name for name in rivals if name in TORCH_NAMES), None)
    ours = [name for name in rivals if name != torchs]

    def speedup(name: str, over: str) -> float:
        return median(theirs / own for theirs, own in zip(samples[over], samples[name], strict=True))

    if not ours:
        return _TORCH._replace(seconds=seconds)
    best = max(ours, key=lambda name: speedup(name, torchs or ours[0]))
    if device_type == "cpu" and speedup(best, ours[0]) < MARGIN:
        best = ours[0]
    if torchs is None:
        return rivals[best]._replace(seconds=seconds)
    gain = speedup(best, torchs)
    fused = gain >= MARGIN if torch_first else gain * MARGIN > 1
    return (rivals[best] if fused else _TORCH)._replace(speedup=gain, seconds=seconds)
