"""The self-check before the kernels' first use on a GPU: what it finds, and when it runs.

What it compares is tried with the CPU's operators, which have the same schemas, and with the CUDA kernels under the
emulator. When it runs, and what follows from its answer, is tried with a check and a device that are made up.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import emulated
import fused_rnn
from fused_rnn import cuda, policy, self_check

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
A100 = (108, 166912, 80)

Results = tuple[Any, ...]


# What it finds


def forward_on_cpu(*arguments: Any, **kernel: Any) -> Results:
    """`kernel`: tf32 and instance, which name a kernel of the GPU."""
    return torch.ops.fused_rnn.forward(*arguments)


def backward_on_cpu(*arguments: Any, **kernel: Any) -> Results:
    return torch.ops.fused_rnn.backward(*arguments)


def find_fault(
    forward: Callable[..., Results] = forward_on_cpu,
    backward: Callable[..., Results] = backward_on_cpu,
    properties: cuda.Properties = emulated.H200,
) -> str | None:
    return self_check.find_fault(CPU, properties, forward, backward)


def test_right_operators_pass() -> None:
    """The calls take every kind of kernel with every dtype that it computes; without clusters, the others."""
    seen = set()

    def forward(*arguments: Any, tf32: bool, instance: int) -> Results:
        seen.add((instance, arguments[0].dtype, tf32))
        return forward_on_cpu(*arguments)

    assert find_fault(forward) is None
    assert len({instance for instance, _, _ in seen}) == 4
    assert len(seen) == 3 * 3 + 4  # three kinds that keep the weights on the chip, and one that has no tf32
    seen.clear()
    assert find_fault(forward, properties=A100) is None
    assert len({instance for instance, _, _ in seen}) == 3


@pytest.mark.parametrize("cell", fused_rnn.reference.CELLS)
@pytest.mark.parametrize("name", self_check.RESULTS)
def test_a_wrong_result_is_found(cell: str, name: str) -> None:
    """One value of a result is wrong by a quarter of the largest, in one cell; or it is NaN."""
    number = list(fused_rnn.reference.CELLS).index(cell)
    index = {"y": 0, "dx": 0, "dw_ih": 3, "dw_hh": 4, "db_ih": 5, "db_hh": 6}[name]

    def spoilt(results: Results, spoil: Callable[[Tensor], object]) -> Results:
        spoil(results[index])
        return results

    def quarter(t: Tensor) -> None:
        t.flatten()[-1] += t.abs().max() / 4 + 0.25

    for spoil in (quarter, lambda t: t.flatten()[0].fill_(float("nan"))):

        def forward(*arguments: Any, spoil: Any = spoil, **options: Any) -> Results:
            results = forward_on_cpu(*arguments)
            return spoilt(results, spoil) if name == "y" and arguments[3] == number else results

        def backward(*arguments: Any, spoil: Any = spoil, **options: Any) -> Results:
            results = backward_on_cpu(*arguments)
            return spoilt(results, spoil) if name != "y" and arguments[5] == number else results

        fault = find_fault(forward, backward)
        assert fault is not None and fault.startswith(f"{name} of {cell} in "), fault


def test_a_wrong_state_in_a_long_inference_is_found() -> None:
    """As if a block had read what another one left in the ring at its last turn."""

    def forward(*arguments: Any, **options: Any) -> Results:
        results, train = forward_on_cpu(*arguments), arguments[4]
        if not train:
            results[0][self_check.LONG * self_check.T - 1, 0, 0] += 0.25
        return results

    fault = find_fault(forward)
    assert fault is not None and fault.startswith("y of rnn_tanh in inference (alone) is off by "), fault


def test_it_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert find_fault() is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))
@pytest.mark.slow("compiles the CUDA kernels for the emulator, which is slow itself")
def test_the_kernels_pass_under_the_emulator() -> None:
    emulated.load_once()
    assert find_fault(emulated.operator("forward"), emulated.operator("backward")) is None


# When it runs


class Gpu:
    """A device that is not there, and a check that answers `fault`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fault: str | Exception | None = None
        self.capturing = False
        self.checks: list[torch.device] = []
        monkeypatch.setattr(self_check, "_results", {})
        monkeypatch.setattr(self_check, "find_fault", self.find_fault)
        monkeypatch.setattr(cuda, "device_properties", lambda device: emulated.H200)
        monkeypatch.setattr(cuda, "MEASURED", frozenset({90}))
        for name, value in {
            "is_available": lambda: True,
            "is_current_stream_capturing": lambda: self.capturing,
            "device": lambda device: nullcontext(),
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": lambda mode: None,
            "get_device_name": lambda device: "GPU of a test",
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def find_fault(self, device: torch.device, properties: cuda.Properties) -> str | None:
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
        self.checks.append(device)
        if isinstance(self.fault, Exception):
            raise self.fault
        return self.fault


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    yield Gpu(monkeypatch)


def plan(backend: str = "fused", T: int = 512) -> fused_rnn.planning.Plan:
    return fused_rnn.plan("lstm", torch.bfloat16, T, 64, 1024, 1024, backend=backend, device=GPU)


def test_once_for_each_device(gpu: Gpu) -> None:
    """Also from several threads at once, and within modes and autocast, which do not reach it."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("cpu"):
        threads = [threading.Thread(target=self_check.why_not, args=(GPU,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert self_check.why_not(GPU) is None and plan().backend == "fused"
    assert gpu.checks == [GPU]
    assert self_check.why_not(torch.device("cuda:1")) is None
    assert gpu.checks == [GPU, torch.device("cuda:1")]


def test_not_where_the_kernels_would_not_run(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan("torch").backend == plan("auto", T=2).backend == "torch"
    assert self_check.why_not(CPU) is None
    fused_rnn.plan("lstm", torch.bfloat16, 512, 64, 1024, 1024, backend="fused", properties=emulated.H200)
    monkeypatch.setattr(cuda, "MEASURED", frozenset())
    assert plan("auto").reason == cuda.UNMEASURED
    assert gpu.checks == []


@pytest.mark.parametrize("fault", ["y of gru is off", RuntimeError("CUDA driver version is insufficient\nmore")])
def test_a_failure_warns_once_and_torch_computes(gpu: Gpu, fault: str | Exception) -> None:
    gpu.fault = fault
    reason = str(fault).split("\n")[0]
    with pytest.warns(UserWarning, match=f"failed their self-check on GPU of a test, torch.nn computes .*: {reason}$"):
        first = plan()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = plan("auto")
    assert gpu.checks == [GPU]
    for found in (first, second):
        assert found.backend == "torch" and found.reason.endswith(f"failed their self-check on this device: {reason}")


def test_calls_that_torch_nn_cannot_compute_take_the_specification(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """`resets`, for example. The tensors are the CPU's, taken for the GPU's."""
    gpu.fault = "a fault"
    of_gpu: Any = SimpleNamespace(is_cpu=False, device=GPU)
    with pytest.warns(UserWarning, match="a fault"):
        assert not policy.kernels_work(of_gpu)
    kernels_work = policy.kernels_work
    monkeypatch.setattr(policy, "on_cuda", lambda x: True)
    monkeypatch.setattr(policy, "kernels_work", lambda x: kernels_work(of_gpu))
    torch.manual_seed(0)
    module = fused_rnn.GRU(3, 4, backend="fused")
    x, resets = torch.randn(5, 2, 3), torch.rand(5, 2) < 0.5
    monkeypatch.setattr(fused_rnn.layers, "layer", None)  # would raise
    y, _ = module(x, resets=resets)
    monkeypatch.undo()
    torch.testing.assert_close(y, module(x, resets=resets)[0])


def test_never_in_a_capture(gpu: Gpu) -> None:
    gpu.capturing = True
    assert plan().backend == "torch" and "captured" in plan().reason
    assert gpu.checks == []
    gpu.capturing = False
    assert plan().backend == "fused"
    gpu.capturing = True
    assert plan().backend == "fused"


def test_no_memory_is_no_fault(gpu: Gpu) -> None:
    gpu.fault = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError):
        plan()
    gpu.fault = None
    assert plan().backend == "fused"


def test_info_says_what_came_of_it(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_rnn.__main__ import info

    assert info()["cuda kernels"] == "not built, or torch has no CUDA"
    monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GPU of a test")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    assert info()["cuda kernels"] == "built; right on this GPU of a test, by their self-check"
    monkeypatch.setattr(self_check, "_results", {})
    gpu.fault = "y of gru is off"
    with pytest.warns(UserWarning, match="failed"):
        assert info()["cuda kernels"].endswith("failed their self-check on this device: y of gru is off")
