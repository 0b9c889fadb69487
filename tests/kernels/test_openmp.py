"""OpenMP may start fewer threads than torch requests: the kernels divide the work among those that start.

oneDNN's LSTM then silently skips a part of the work: in such a process torch.nn.LSTM returns wrong numbers in
training, so no call may be given to it.

And it ends threads that a smaller region leaves out, so that the next larger one starts them again: no layer may.
"""

from __future__ import annotations

import os

import pytest
import torch

import fused_rnn
from cases import Case
from contract import fused_calls
from fused_rnn import _C, policy
from processes import survives

THREADS = 4
SIZES = [  # split by rows, by units, by directions and their rows, and by the units of a single step
    dict(T=9, B=33, I=20, H=96),
    dict(T=20, B=1, I=64, H=300),
    dict(T=9, B=40, I=20, H=65, bidirectional=True),
    dict(T=1, B=40, I=64, H=256),
]
ANOTHER = pytest.mark.slow("starts a process, for another way to the numbers of threads of the others")
ENVIRONMENTS = [
    pytest.param({"OMP_THREAD_LIMIT": "2"}, marks=ANOTHER),
    {"OMP_THREAD_LIMIT": "3"},
    pytest.param({"OMP_DYNAMIC": "true"}, marks=ANOTHER),
    {"OMP_MAX_ACTIVE_LEVELS": "0"},  # allows one thread
]


def the_kernels_are_right() -> None:
    """Outputs, states and every gradient, against torch.nn in float64."""
    torch.set_num_threads(THREADS)
    assert _C.openmp_threads() < THREADS
    for case in [Case(cell, **size) for cell in ("RNN", "LSTM", "GRU") for size in SIZES]:
        _, module, exact = case.modules(torch.float32)
        results = []
        for m in (module, exact):
            data = [t.to(m.weight_hh_l0.dtype).requires_grad_() for t in case.data(torch.float32)]
            outputs = case.run(m, data)
            loss = sum(o.sin().sum() for o in outputs)
            results.append([*outputs, *torch.autograd.grad(loss, [*data, *m.parameters()])])
        for found, expected in zip(*results, strict=True):
            scale = max(expected.abs().max().item(), 1.0)
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * scale)


def no_lstm_is_handed_to_torch() -> None:
    """Calls that the policy would otherwise give to torch.nn."""
    policy.HAS_BF16_PRODUCTS = True
    policy.bf16_unit = lambda: ""  # as if the kernels did not use them
    for threads, lacks in ((_C.openmp_threads() + 1, True), (_C.openmp_threads(), False)):
        torch.set_num_threads(threads)
        assert policy.lacks_threads() is lacks
        for half in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                lstm, gru = (
                    fused_rnn.plan(cell, torch.bfloat16, 50, 64, 8, H, device="cpu")
                    for cell, H in (("lstm", 256), ("gru", 512))
                )
            assert lstm.backend == ("fused" if lacks else "torch")
            assert gru.backend == "torch"  # does not use oneDNN
    torch.set_num_threads(_C.openmp_threads() + 1)
    case = Case("LSTM", T=9, B=33, I=20, H=96)
    for dtype, half in ((torch.bfloat16, False), (torch.float32, True)):
        _, module, exact = case.modules(dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half), fused_calls() as calls:
            found = case.run(module, case.data(dtype))[0]
        assert calls
        expected = case.run(exact, [t.double() for t in case.data(dtype)])[0]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02)


def both() -> None:
    the_kernels_are_right()
    no_lstm_is_handed_to_torch()


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda variables: "-".join(map("=".join, variables.items())))
def test_fewer_threads_than_asked_for(environment: dict[str, str]) -> None:
    survives(both, **environment)


def threads_stay() -> None:
    """The same threads run operations of torch on all of them and layers that have work for fewer."""
    torch.set_num_threads(THREADS)
    for B in (2, 3):
        assert fused_rnn.plan("lstm", T=64, B=B, I=32, H=32, device="cpu").forward["workers"] == B < THREADS
    calls = [(fused_rnn.LSTM(32, 32), torch.randn(64, B, 32)) for B in (2, 3)]
    of_torch = torch.randn(2**20)
    seen = []
    for _ in range(3):
        for module, x in calls:
            of_torch.sin()
            module(x)[0].sum().backward()
        seen.append(set(os.listdir("/proc/self/task")))
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system does not list a process's threads")
def test_threads_are_not_started_again() -> None:
    survives(threads_stay)


def test_all_threads_come() -> None:
    """The usual case, without those environment variables."""
    assert _C.openmp_threads() >= torch.get_num_threads() and not policy.lacks_threads()
