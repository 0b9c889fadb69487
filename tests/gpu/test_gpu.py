"""The GPU kernels against torch.nn: results, gradients, errors, streams, CUDA graphs and calls without synchronisation.

The cases and the tolerance are those of the CPU tests. The float64 reference is computed on the CPU, independently of
the kernels under test and of cuDNN.
"""

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from cases import CASES, Case
from contract import SEQUENCES, close, error_of, fused_calls, tensors, twins
from gpu.timing import tf32_allowed
from tolerances import assert_as_accurate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

GPU = "cuda"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuDNN's results vary between runs

each_sequence = pytest.mark.parametrize("name", SEQUENCES)
each_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])


@dataclass(frozen=True)
class Precision:
    dtype: torch.dtype
    tf32: bool = False


PRECISIONS = {
    "bf16": Precision(torch.bfloat16),
    "f16": Precision(torch.float16),
    "tf32": Precision(torch.float32, tf32=True),
    "f32": Precision(torch.float32),
    "f64": Precision(torch.float64),
}
each_precision = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)

_SIZES = [
    dict(T=12, B=1, I=128, H=128),
    dict(T=9, B=64, I=256, H=256),
    dict(T=6, B=16, I=512, H=512),
    dict(T=4, B=16, I=1024, H=1024),
    dict(T=3, B=300, I=40, H=128),
    dict(T=200, B=8, I=32, H=96),
    dict(T=5, B=19, I=130, H=260, L=2, bidirectional=True),
    dict(T=5, B=8, I=64, H=512, L=2),
    dict(T=9, B=6, I=64, H=128, lengths=(9, 9, 7, 4, 4, 1)),
    dict(T=9, B=6, I=64, H=128, bidirectional=True, lengths=(4, 9, 1, 7, 9, 4)),
]
GPU_CASES = [Case(cell, **size) for cell in SEQUENCES for size in _SIZES] + CASES
"""Sizes that a GPU's kernels treat differently (one block, several, all; whole tiles and parts), and the CPU's."""


@pytest.fixture(autouse=True)
def errors_belong_to_their_test() -> Iterator[None]:
    """Report a kernel's error in its test: errors arrive late, and after some the process cannot use the GPU."""
    yield
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the GPU reports an error, all that follows would fail, too: {error}", returncode=1)


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """Switch off TF32, which is on by default in cuDNN, unless a test switches it on."""
    with tf32_allowed(False):
        yield


def pair(name: str, *sizes: int, dtype: torch.dtype = torch.float32, **options: object) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module on the GPU, and ours with the same weights and backend="fused"."""
    return twins(name, *sizes, **options, dtype=dtype, device=GPU, backend="fused")


def draw(*sizes: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(GPU, dtype)


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """All results of one forward and backward pass: outputs, states, gradients of x and of the parameters."""
    module.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    outputs = tensors(module(x))
    sum((o.float() * weigh(o)).sum() for o in outputs).backward()
    return [*(o.detach() for o in outputs), x.grad, *(p.grad for p in module.parameters())]


def weigh(tensor: Tensor) -> Tensor:
    """A different weight for every entry, so that each affects the gradients."""
    return torch.linspace(-1, 2, tensor.numel(), device=tensor.device).reshape(tensor.shape)


def results(case: Case, module: nn.Module, data: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """All results of one forward and backward pass, on the CPU; backward starts from values of `dtype`."""
    data = [t.clone().requires_grad_() for t in data]
    outputs = case.run(module, data)
    generator = torch.Generator().manual_seed(2)
    starts = [torch.randn(o.shape, generator=generator).to(dtype).to(o) for o in outputs]
    found = dict(zip(["output", "h_n", "c_n"], outputs, strict=False))
    inputs = dict(zip(["x", "h0", "c0"], data, strict=False)) | dict(module.named_parameters())
    grads = torch.autograd.grad(outputs, list(inputs.values()), starts)
    found |= {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return {name: value.detach().cpu() for name, value in found.items()}


def rounded_to_tf32(tensor: Tensor) -> Tensor:
    """Rounded to ten bits of mantissa, as the tensor cores read float32."""
    bits = tensor.detach().float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def tf32_results(case: Case, exact: nn.Module, data: list[Tensor]) -> dict[str, Tensor]:
    """Exact results for operands rounded to TF32, since torch.nn may use TF32 less than it is allowed to."""
    rounded = copy.deepcopy(exact)
    rounded.load_state_dict({name: rounded_to_tf32(p) for name, p in exact.state_dict().items()})
    found = results(case, rounded, [rounded_to_tf32(t).double() for t in data], torch.float32)
    return {name: value.float() for name, value in found.items()}


def farther(first: Tensor, second: Tensor, reference: Tensor) -> Tensor:
    distances = [(t.double() - reference).abs().max() if t.numel() else 0 for t in (first, second)]
    return first if distances[0] >= distances[1] else second


@each_precision
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_matches_torch(case: Case, precision: Precision) -> None:
    """Forward and all gradients, twice: the second time is bitwise equal."""
    dtype = precision.dtype
    theirs, ours, exact = case.modules(dtype)
    ours.backend, data = "fused", case.data(dtype)
    wanted = results(case, exact, [t.double() for t in data], dtype)
    on_gpu = [t.to(GPU) for t in data]
    with tf32_allowed(precision.tf32):
        expected = results(case, theirs.to(GPU), on_gpu, dtype)
        actual = results(case, ours.to(GPU), on_gpu, dtype)
        again = results(case, ours, on_gpu, dtype)
    yardstick = expected
    if precision.tf32:
        rounded = tf32_results(case, exact, data)
        yardstick = {name: farther(value, rounded[name], wanted[name]) for name, value in expected.items()}
    for name, value in wanted.items():
        if not torch.equal(actual[name], again[name]):
            with tf32_allowed(precision.tf32):  # torch.nn computes the remaining calls, with its own precision
                theirs_again = results(case, theirs, on_gpu, dtype)
            assert not all(torch.equal(expected[key], theirs_again[key]) for key in wanted), f"{name}: varies by run"
        if name.startswith("d") and case.nonlinearity == "relu" and (dtype.itemsize == 2 or precision.tf32):
            continue  # near relu's kink, rounding decides on which side a value lies, and the gradient jumps
        if dtype == torch.float64:
            torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-11, msg=name)
        else:
            assert_as_accurate(actual[name], yardstick[name], value, name)


@each_sequence
@each_half
def test_the_fused_kernels_run(name: str, dtype: torch.dtype) -> None:
    """Without this test, torch.nn's own kernels would pass the comparisons above."""
    _, ours = pair(name, 64, 256, dtype=dtype)
    with fused_calls() as calls:
        step(ours, draw(6, 16, 64, dtype=dtype))
    assert len(calls) >= 2, calls


@each_sequence
@each_half
@pytest.mark.parametrize("sizes", [(64, 1, 128, 128), (100, 32, 64, 512), (50, 64, 64, 1024)], ids=str)
def test_many_runs_agree(name: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Blocks that read too early or too late do so only rarely. Inputs and weights must not change."""
    T, B, I, H = sizes  # noqa: E741
    _, ours = pair(name, I, H, dtype=dtype)
    x = draw(T, B, I, dtype=dtype)
    before = [t.detach().clone() for t in (x, *ours.parameters())]
    wanted = step(ours, x)
    for _ in range(20):
        assert all(torch.equal(a, e) for a, e in zip(step(ours, x), wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((x, *ours.parameters()), before, strict=True))


@each_sequence
@each_precision
def test_backend_torch_is_torch(name: str, precision: Precision) -> None:
    theirs, ours = pair(name, 20, 40, dtype=precision.dtype, num_layers=2)
    ours.backend = "torch"
    x = draw(5, 4, 20, dtype=precision.dtype)
    with tf32_allowed(precision.tf32), fused_calls() as calls:
        actual = step(ours, x)
        expected = step(theirs, x)
    assert not calls
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@each_sequence
def test_torchs_default_switches(name: str) -> None:
    """TF32 in cuDNN but not in matrix products, set by the old names, which torch forbids to mix with the new ones."""
    theirs, ours = pair(name, 64, 256)
    torch.backends.cudnn.allow_tf32 = True  # restored by the fixture
    for a, e in zip(step(ours, draw(6, 16, 64)), step(theirs, draw(6, 16, 64)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-2, atol=1e-2 * max(e.abs().max().item(), 1.0))
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (True, False)


@each_sequence
@each_half
def test_inference_equals_training(name: str, dtype: torch.dtype) -> None:
    _, ours = pair(name, 48, 128, dtype=dtype, num_layers=2)
    x = draw(11, 9, 48, dtype=dtype)
    with torch.inference_mode():
        inference = ours(x)
    close(inference, ours(x))


@each_sequence
def test_unbatched(name: str) -> None:
    theirs, ours = pair(name, 24, 72, bidirectional=True)
    x = draw(7, 24)
    close(step(ours, x), step(theirs, x), grad=True)


@each_sequence
@pytest.mark.parametrize("sorted_by_user", [True, False])
def test_packed(name: str, sorted_by_user: bool) -> None:
    """The packed result keeps batch_sizes and indices; every row equals the result of the row alone."""
    theirs, ours = pair(name, 16, 64, num_layers=2, bidirectional=True)
    x = draw(8, 4, 16)
    lengths = torch.tensor([8, 6, 6, 1] if sorted_by_user else [6, 1, 8, 6])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=sorted_by_user)
    actual, expected = ours(packed), theirs(packed)
    close(actual, expected)
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert getattr(actual[0], field) is getattr(packed, field)


@each_sequence
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_zero_batch(name: str, batch_first: bool, training: bool) -> None:
    theirs, ours = pair(name, 8, 16, batch_first=batch_first)
    x = draw(*((0, 5, 8) if batch_first else (5, 0, 8)))

    def call(module: nn.Module) -> list[Tensor]:
        return step(module, x) if training else tensors(module(x))

    try:
        expected = call(theirs)
    except RuntimeError as error:
        assert error_of(call, ours)[0] is type(error)
    else:
        close(call(ours), expected)


@each_sequence
def test_on_a_stream_of_its_own(name: str) -> None:
    """Kernels run on the current stream, after its earlier work."""
    _, ours = pair(name, 64, 128)
    x = draw(40, 16, 64)
    wanted = step(ours, x)
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about ten milliseconds; on another stream, the call would read zeros
        late.copy_(x)
        found = step(ours, late)
    torch.cuda.current_stream().wait_stream(stream)
    for a, e in zip(found, wanted, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("H", [128, 1024])
def test_two_streams_at_once(H: int) -> None:
    """Blocks that wait for each other must not wait for blocks that cannot start because of the other stream."""
    modules = [pair(name, 64, H, dtype=torch.bfloat16)[1] for name in ("LSTM", "GRU")]
    x = draw(60, 32, 64, dtype=torch.bfloat16)
    wanted = [step(module, x) for module in modules]
    streams = [torch.cuda.Stream() for _ in modules]
    torch.cuda.synchronize()
    for _ in range(5):
        found = []
        for module, stream in zip(modules, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(module, x))
        torch.cuda.synchronize()
        for actual, expected in zip(found, wanted, strict=True):
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@each_sequence
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", [(12, 16, 64, 256), (7, 3, 20, 33)], ids=str)
def test_cuda_graph(name: str, training: bool, sizes: tuple[int, ...]) -> None:
    """Captured once and replayed several times on new inputs."""
    T, B, I, H = sizes  # noqa: E741
    _, ours = pair(name, I, H, dtype=torch.bfloat16)
    x = draw(T, B, I, dtype=torch.bfloat16)

    def call() -> list[Tensor]:
        if training:
            return step(ours, x)
        with torch.no_grad():
            return tensors(ours(x))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in range(2, 6):
        x.copy_(draw(T, B, I, seed=seed, dtype=torch.bfloat16))
        graph.replay()
        found = [t.clone() for t in captured]
        close(found, call(), grad=True)


@each_sequence
@each_half
@pytest.mark.parametrize("input_is_half", [False, True])
def test_autocast(name: str, dtype: torch.dtype, input_is_half: bool) -> None:
    theirs, ours = pair(name, 32, 96, num_layers=2)
    x = draw(6, 5, 32, dtype=dtype if input_is_half else torch.float32)

    def call(module: nn.Module) -> list[Tensor]:
        with torch.autocast(GPU, dtype):
            outputs = tensors(module(x))
        module.zero_grad(set_to_none=True)
        sum((o.float() * weigh(o)).mean() for o in outputs).backward()
        return [*outputs, *(p.grad for p in module.parameters())]

    actual, expected = call(ours), call(theirs)
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    for a, e in zip(actual, expected, strict=True):  # computed in `dtype`, even if the result is float32
        limit = 8 * torch.finfo(dtype).eps * max(e.abs().max().item(), 0.1)
        torch.testing.assert_close(a, e, rtol=0, atol=limit)


@each_sequence
def test_grad_scaler(name: str) -> None:
    """Three mixed-precision training steps; the last one overflows and is skipped with both libraries."""
    trained = []
    for module in pair(name, 16, 64):
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(GPU, init_scale=1024.0)
        for number in range(3):
            optimiser.zero_grad(set_to_none=True)
            with torch.autocast(GPU, torch.float16):
                output, _ = module(draw(5, 8, 16, seed=number))
            value = output.float().square().mean() * (float("inf") if number == 2 else 1.0)
            scaler.scale(value).backward()
            scaler.step(optimiser)
            scaler.update()
        assert scaler.get_scale() == 512.0
        trained.append([p.detach() for p in module.parameters()])
    for theirs, ours in zip(*trained, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


@each_sequence
def test_there_and_back(name: str) -> None:
    _, ours = pair(name, 12, 40, num_layers=2)
    x = draw(6, 3, 12)
    wanted = step(ours, x)
    close(step(ours.cpu(), x.cpu()), [t.cpu() for t in wanted], grad=True)
    for a, e in zip(step(ours.to(GPU), x), wanted, strict=True):
        assert torch.equal(a, e)


@each_sequence
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    _, ours = pair(name, 12, 40)
    x = draw(6, 3, 12)
    wanted = step(ours, x)
    twin = copied(ours)
    assert type(twin) is type(ours)
    for a, e in zip(step(twin, x), wanted, strict=True):
        assert torch.equal(a, e)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    close(step(twin, x), wanted)


@each_sequence
def test_state_dict_both_ways(name: str) -> None:
    theirs, ours = pair(name, 12, 40, bidirectional=True)
    x = draw(6, 3, 12)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(0.5)
    theirs.load_state_dict(ours.state_dict())
    close(step(ours, x), step(theirs, x), grad=True)


MISFITS: dict[str, Callable[[nn.Module, Tensor, Tensor], tuple]] = {
    "input elsewhere": lambda m, x, h: (m, x.cpu(), h),
    "state elsewhere": lambda m, x, h: (m, x, h.cpu()),
    "weights elsewhere": lambda m, x, h: (m.cpu(), x, h),
    "one weight elsewhere": lambda m, x, h: (with_a_weight(m, lambda w: w.cpu()), x, h),
    "input dtype": lambda m, x, h: (m, x.half(), h),
    "state dtype": lambda m, x, h: (m, x, h.half()),
    "one weight's dtype": lambda m, x, h: (with_a_weight(m, lambda w: w.half()), x, h),
    "input size": lambda m, x, h: (m, x[..., 1:], h),
    "input dimensions": lambda m, x, h: (m, x[None], h),
    "hidden size": lambda m, x, h: (m, x, h[..., 1:]),
    "state's batch": lambda m, x, h: (m, x, h[:, 1:]),
    "no time steps": lambda m, x, h: (m, x[:0], h),
}


def with_a_weight(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    module.weight_hh_l0 = nn.Parameter(change(module.weight_hh_l0.detach()))
    return module


@each_sequence
@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit(name: str, misfit: str) -> None:
    """The same type of exception as torch.nn's, or the same result where torch.nn has one."""

    def call(module: nn.Module) -> list[Tensor]:
        changed, x, h = MISFITS[misfit](module, draw(4, 3, 8), draw(1, 3, 24, seed=2))
        return tensors(changed(x, (h, h.clone()) if name == "LSTM" else h))

    theirs, ours = pair(name, 8, 24)
    try:
        expected = call(theirs)
    except Exception as error:
        assert error_of(call, ours)[0] is type(error)
    else:
        close(call(ours), expected)


@each_sequence
def test_double_backward(name: str) -> None:
    """A gradient penalty, against torch.nn on the CPU, because cuDNN has no second derivative."""
    theirs, ours = pair(name, 6, 20, dtype=torch.float64)
    found = []
    for module, device in ((theirs.cpu(), "cpu"), (ours, GPU)):
        x = draw(4, 3, 6, dtype=torch.float64).to(device).requires_grad_()
        (dx,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        found.append([x.grad.cpu(), *(p.grad.cpu() for p in module.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-9)


@each_sequence
@each_half
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "deep"])
def test_the_cpu_never_waits(name: str, dtype: torch.dtype, options: dict) -> None:
    _, ours = pair(name, 64, 256, dtype=dtype, **options)
    x = draw(10, 16, 64, dtype=dtype)
    step(ours, x)  # one-time work may synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(ours, x)
        with torch.no_grad():
            ours(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_sequence
def test_peak_memory(name: str, record_property: Callable[[str, object], None]) -> None:
    """Peak memory of a training step for both libraries; printed, not limited."""
    x = draw(128, 64, 256, dtype=torch.bfloat16)
    peaks = {}
    for side, module in zip(("torch.nn", "fused_rnn"), pair(name, 256, 512, dtype=torch.bfloat16), strict=True):
        step(module, x)
        module.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(module, x)
        torch.cuda.synchronize()
        peaks[side] = torch.cuda.max_memory_allocated() - before
        record_property(f"{side} peak bytes", peaks[side])
    print(", ".join(f"{side} {peak / 2**20:.1f} MiB" for side, peak in peaks.items()))
    assert all(peak > 0 for peak in peaks.values())
