"""All instruction sets and numbers of threads agree up to rounding, also in forked children and concurrent calls.

So do modules with frozen weights: what a format promises holds on each, and int8 is the same on all.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_rnn
from cases import CASES as ALL_LENGTHS
from cases import Case
from default_set import case_of
from fused_rnn import _C, operators, reference, tuned
from fused_rnn.options import LayerOptions
from processes import survives

pytestmark = pytest.mark.usefixtures("one_thread")

ISAS = _C.supported_cpu_isas()
DTYPES = {"f32": torch.float32, "f64": torch.float64}
CELLS = list(reference.CELLS)


def results(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, states and every gradient of one forward and backward."""
    _, module, _ = case.modules(dtype)
    data = [t.requires_grad_() for t in case.data(dtype)]
    outputs = case.run(module, data)
    weights = [torch.linspace(-1, 2, o.numel(), dtype=dtype).view(o.shape) for o in outputs]
    loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    return [o.detach() for o in outputs] + list(torch.autograd.grad(loss, [*data, *module.parameters()]))


def assert_same_rounding(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        scale = max(b.abs().max().item(), 1.0)
        torch.testing.assert_close(a, b, rtol=0, atol=32 * torch.finfo(b.dtype).eps * scale)


# Instruction sets: each in its own process, which chooses at its first call.

# Tiles in software take seconds for what takes a processor milliseconds, and further steps repeat its instructions.
CASES = [replace(case, T=min(case.T, 7)) for case in ALL_LENGTHS]


# More units than a block has, also of a projection, depths that are no multiple of any group or vector, and one of more
# than 512, with a row, some rows, and more than a part has.
FROZEN = {
    "lstm": lambda: nn.LSTM(70, 75, 2),
    "lstm_proj": lambda: nn.LSTM(9, 140, proj_size=69),
    "gru": lambda: nn.GRU(523, 37, bidirectional=True),
    "rnn": lambda: nn.RNN(5, 130, nonlinearity="relu"),
}
FROZEN_BATCHES = (1, 5, 30)


def frozen_results(isa: str) -> dict[str, Tensor]:
    """Outputs of modules frozen in int8, after checking what each format promises."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    results = {}
    for name, make in FROZEN.items():
        module = make()
        inputs = [torch.randn(3, B, module.input_size) for B in FROZEN_BATCHES]
        for weights, tolerance in (("float32", 0), ("bfloat16", 0), ("int8", 1e-3)):
            frozen, rounded = fused_rnn.freeze(module, weights), fused_rnn.from_torch(module)
            for key, parameter in rounded.named_parameters():
                value = frozen.state_dict()[key].float()
                if weights == "int8" and key.startswith("weight"):
                    value *= frozen.state_dict()[f"{key}_scale"].unsqueeze(1)
                parameter.copy_(value)
            for x in inputs:
                y, expected = frozen(x)[0], rounded(x)[0]
                scale = max(1.0, expected.abs().max().item())
                torch.testing.assert_close(y, expected, rtol=0, atol=tolerance * scale)
                if not module.bidirectional:
                    assert torch.equal(frozen.stream(x.size(1)).chunk(x), y)
                if weights == "int8":
                    results[f"{name} {x.size(1)}"] = y / scale
    return results


def save_results(isa: str, path: str, wanted: list[str]) -> None:
    """Save the results of the cases with these names and of frozen modules, for the parent process to compare."""
    torch.set_num_threads(1)
    assert _C.cpu_isa() == isa
    named = {f"{case}-{name}": (case, dtype) for case in CASES for name, dtype in DTYPES.items()}
    found = {name: results(*named[name]) for name in wanted}
    torch.save(found | {"frozen": frozen_results(isa)}, path)


def results_with(isa: str, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """`results` in this process, where every call names this instruction set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuned, "instruction_sets", lambda: {isa: ISAS.index(isa)})
        with tuned.answering(lambda call, device: tuned.Result("fused", instruction_set=isa)):
            return results(case, dtype)


def fails_at_first_use() -> None:
    """Every use raises an error if the requested instruction set does not exist."""
    wanted = f"FUSED_RNN_CPU_ISA=mmx2 is not supported on this machine; choose one of: {', '.join(ISAS)}"
    module, input = fused_rnn.LSTM(3, 5), torch.ones(2, 1, 3)
    for use in (lambda: module(input), lambda: module(input), _C.cpu_isa):  # every time, not only the first
        with pytest.raises(RuntimeError, match=wanted):
            use()
    torch.nn.LSTM(3, 5)(input)


@pytest.fixture(scope="module")
def by_isa(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """By instruction set, the results of the cases that this run of pytest compares."""
    folder: Path = tmp_path_factory.mktemp("isa")
    wanted = [case_of(item) for item in request.session.items if item.name.startswith("test_instruction_sets_agree[")]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda isa: survives(save_results, isa, str(folder / isa), wanted, FUSED_RNN_CPU_ISA=isa), ISAS))
    return {isa: torch.load(folder / isa) for isa in ISAS}


def test_portable_is_the_last_choice() -> None:
    """Tiles in software, which are for tests, come after it."""
    assert ISAS[-2:] == ["portable", "amx_emulated"]
    assert _C.cpu_isa() in ISAS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_instruction_sets_agree(case: Case, dtype: str, by_isa: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    theirs, _, _ = case.modules(DTYPES[dtype])
    expected = case.run(theirs, case.data(DTYPES[dtype]))
    for isa in ISAS:
        found = by_isa[isa][f"{case}-{dtype}"]
        assert_same_rounding(found[: len(expected)], [t.detach() for t in expected])
        assert_same_rounding(found, by_isa["portable"][f"{case}-{dtype}"])
        assert all(map(torch.equal, results_with(isa, case, DTYPES[dtype]), found)), isa


def test_frozen_weights(by_isa: dict[str, dict[str, Any]]) -> None:
    """What a format promises holds on each (frozen_results checks it), and int8 is the same on all."""
    expected = by_isa[ISAS[0]]["frozen"]
    assert len(expected) == len(FROZEN) * len(FROZEN_BATCHES)
    for isa in ISAS[1:]:
        for name, found in by_isa[isa]["frozen"].items():
            # Exact sums: what differs is an input now and then, rounded to the neighbour of 32767 levels.
            assert (found - expected[name]).abs().max() < 1e-4, (isa, name)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa in ("avx512", "avx2", "portable", "amx_emulated")])
@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_weights_are_widened_as_they_are_read(cell: str, isa: str) -> None:
    """Bit for bit, by both products; the last vectors of a row and of the units are not full. On tiles a single row."""
    torch.manual_seed(0)
    on_tiles = isa == "amx_emulated"
    T, I, H, P = 1 if on_tiles else 3, 21, 19, 18 if cell == "lstm" else 0  # noqa: E741 - the field's letter
    shapes = (reference.GATES[cell] * H, I), (reference.GATES[cell] * H, P or H), (P, H)
    w_ih, w_hh, w_hr = (torch.randn(shape).bfloat16() if shape[0] else None for shape in shapes)
    b_ih, b_hh = torch.randn(2, reference.GATES[cell] * H).bfloat16()
    for B in (1,) if on_tiles else (1, 2, 60):
        given = torch.randn(T, B, I), torch.randn(1, B, P or H), torch.randn(1, B, H) if cell == "lstm" else None
        given = [None if t is None else t.bfloat16() for t in (*given, w_ih, w_hh, b_ih, b_hh, w_hr)]
        wide = [None if t is None else t.float() for t in given]
        found, expected = (
            operators.forward(cell, x, h0, c0, weights, LayerOptions(instance=ISAS.index(of)), False)[:3]
            for of, (x, h0, c0, *weights) in ((isa, given), ("portable" if on_tiles else isa, wide))
        )
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(found, expected, strict=True))


def test_an_unknown_instruction_set() -> None:
    survives(fails_at_first_use, FUSED_RNN_CPU_ISA="mmx2")


def test_a_place_without_an_instruction_set() -> None:
    gru, x = fused_rnn.GRU(3, 5), torch.ones(2, 1, 3)
    with pytest.raises(RuntimeError, match=f"there is no instruction set {len(ISAS)} on this machine"):
        torch.ops.fused_rnn.forward(
            x, None, None, reference.CELLS.index("gru"), False, *gru._flat_weights, instance=len(ISAS)
        )


def test_an_empty_choice_is_none() -> None:
    survives(chooses_the_best, FUSED_RNN_CPU_ISA="")


def chooses_the_best() -> None:
    assert _C.cpu_isa() == ISAS[0]


# Threads

LARGE = [  # enough work for several threads, split by rows, by units, or by directions
    dict(T=9, B=33, I=20, H=96),
    dict(T=6, B=32, I=64, H=128, L=2),
    dict(T=9, B=34, I=20, H=96, lengths=tuple(1 + b % 9 for b in range(34))),
    dict(T=20, B=1, I=64, H=300),
    dict(T=20, B=7, I=33, H=200),
    dict(T=9, B=40, I=20, H=65, bidirectional=True),
]
LARGE_CASES = [Case(cell, **size) for cell in ("RNN", "LSTM", "GRU") for size in LARGE] + [
    Case("LSTM", T=9, B=33, I=20, H=96, proj_size=40),
    Case("LSTM", T=20, B=3, I=20, H=200, proj_size=70),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_one_thread_and_two_agree(case: Case, dtype: str) -> None:
    found, digits = [], False
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(results(case, DTYPES[dtype]))
        sizes = dict(T=case.T, B=case.B, I=case.I, H=case.H, bidirectional=case.bidirectional)
        plan = fused_rnn.plan(case.cell.lower(), DTYPES[dtype], **sizes, device="cpu")
        digits |= plan.forward["products"].startswith("int8")  # how many depends on the rows of a thread
    if case.B >= 16 and not digits:  # each thread has whole rows or a direction
        for one, two in zip(*found, strict=True):
            assert torch.equal(one, two)
    assert_same_rounding(*found)


@pytest.mark.parametrize("case", [LARGE_CASES[0], Case("GRU", T=20, B=2, I=9, H=200)], ids=str)
def test_calls_from_four_threads_at_once(case: Case) -> None:
    """All use one module, each with its own input; forward and backward."""
    torch.set_num_threads(2)
    _, module, _ = case.modules(torch.float32)
    weight = module.weight_hh_l0

    def call(seed: int) -> list[Tensor]:
        x = torch.randn(case.T, case.B, case.I, generator=torch.Generator().manual_seed(seed))
        output, _ = module(x)
        return [output.detach(), *torch.autograd.grad(output.sum(), [weight])]

    expected = [call(seed) for seed in range(50)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, range(50)))
    for a, b in zip(found, expected, strict=True):
        assert_same_rounding(a, b)


def test_the_interpreter_runs_on_during_a_call() -> None:
    """The GIL is released: with an infinite switch interval, another Python thread runs only if a call releases it."""
    torch.set_num_threads(1)
    module, x = fused_rnn.LSTM(64, 256), torch.randn(50, 32, 64)
    calling, seen = False, False

    def call() -> None:
        nonlocal calling
        with torch.no_grad():
            for _ in range(1000):
                calling = True
                torch.ops.fused_rnn.forward(x, None, None, reference.CELLS.index("lstm"), False, *module._flat_weights)
                calling = False
                if seen:
                    return

    thread = threading.Thread(target=call)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e6)
    try:
        thread.start()
        while thread.is_alive() and not seen:
            time.sleep(0)  # passes the GIL on; when it returns, the other thread has released it or ended
            seen = calling
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert seen


# Child processes. OpenMP's threads do not survive a fork: waiting for them never ends.


def in_forked_children(sizes: dict[str, int], like_the_data_loader: bool) -> None:
    """For each cell: compute in this process with two threads, then in its child."""
    children = multiprocessing.get_context("fork")
    for cell in ("RNN", "LSTM", "GRU"):
        case = Case(cell, **sizes)
        torch.set_num_threads(2)
        expected = results(case, torch.float32)
        _, module, _ = case.modules(torch.float32)
        data = case.data(torch.float32)
        receive, send = children.Pipe(duplex=False)

        def compute(case=case, module=module, data=data, send=send) -> None:  # type: ignore[no-untyped-def]
            if like_the_data_loader:
                torch.set_num_threads(1)
                found = results(case, torch.float32)
            else:
                with torch.no_grad():
                    found = case.run(module, data)
            send.send([t.tolist() for t in found])

        child = children.Process(target=compute)
        child.start()
        arrived = receive.poll(300)  # a child that hangs sends nothing
        if not arrived:
            child.kill()
        assert arrived, f"{case}: the child hangs"
        found = receive.recv()
        child.join(300)
        assert child.exitcode == 0 and len(found) == (len(expected) if like_the_data_loader else len(data))
        assert_same_rounding([torch.tensor(values) for values in found], expected[: len(found)])


needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")


def in_all_forked_children() -> None:
    """Forward and backward with torch.set_num_threads(1), as in workers of torch's data loader.

    Then a child that sets nothing: it still requests two threads, and the kernels do not wait for them. Torch's own
    large operations would hang in such a child, so this case contains none.
    """
    in_forked_children(dict(T=12, B=32, I=64, H=128), True)
    in_forked_children(dict(T=20, B=1, I=1, H=256), False)


@needs_fork
def test_forked_children_compute() -> None:
    survives(in_all_forked_children)
