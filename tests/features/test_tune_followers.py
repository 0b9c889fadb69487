"""Who follows the table of tuned calls, and when a call is measured on its first use."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn import cuda, policy, tuned, tuning
from fused_rnn.options import EVERY_STEP, PLANNED
from fused_rnn.tuned import Call, Result, Table
from processes import survives
from tuned_calls import CPU, H200, HIDDEN, OTHER_SET, SIZE, B, T, computes, machine_results
from tuned_calls import clock as clock
from tuned_calls import instances as instances
from tuned_calls import instruction_sets as instruction_sets
from tuned_calls import table as table
from tuned_calls import torch_wins as torch_wins

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- Who follows the table ------------------------------------------------------------------------------------------


def test_every_kind_of_call_follows(torch_wins: Table) -> None:
    """Padded, batch_first, unbatched, packed, with states, bfloat16 and under autocast; training is another call."""
    lstm, first = fused_rnn.LSTM(SIZE, HIDDEN), fused_rnn.LSTM(SIZE, HIDDEN, batch_first=True)
    half = fused_rnn.LSTM(SIZE, HIDDEN, dtype=torch.bfloat16)
    x, hx = torch.randn(T, B, SIZE), (torch.zeros(1, B, HIDDEN),) * 2
    packed = pack_padded_sequence(x, torch.tensor([T, 3, 1]))
    kinds: list[Callable[[], Any]] = [
        lambda: lstm(x),
        lambda: lstm(x, hx),
        lambda: first(x.transpose(0, 1)),
        lambda: lstm(x[:, 0]),
        lambda: lstm(packed),
        lambda: half(x.bfloat16()),
    ]
    with torch.no_grad():
        assert [computes(call) for call in kinds] == ["fused"] * 6
        for model, example in ((lstm, x), (lstm, x[:, 0]), (lstm, packed), (half, x.bfloat16())):
            fused_rnn.tune(model, example, 0.01)
        assert [computes(call) for call in kinds] == ["torch"] * 6
        assert torch.equal(lstm(x)[0], nn.LSTM.forward(lstm, x)[0])
    assert [computes(call) for call in kinds] == ["fused"] * 6
    gru = fused_rnn.GRU(SIZE, HIDDEN)  # torch.nn has no LSTM for bfloat16 on every processor
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert computes(lambda: gru(x)) == "fused"
        fused_rnn.tune(gru, x, 0.01)
        assert computes(lambda: gru(x)) == "torch"


def test_who_does_not_follow(torch_wins: Table) -> None:
    """Other sizes, keywords, modules with another backend or our options, deterministic algorithms; steps."""
    gru, x = fused_rnn.GRU(SIZE, HIDDEN), torch.randn(T, B, SIZE)
    fused_rnn.tune(gru, x, 0.01)
    assert computes(lambda: gru(x)) == "torch"
    assert computes(lambda: gru(torch.randn(T, 50, SIZE))) == "fused"
    assert computes(lambda: gru(x, lengths=torch.full((B,), T))) == "fused"
    assert computes(lambda: gru.step(x[0])) == "fused"
    for options in (dict(backend="fused"), dict(zoneout=0.1)):
        assert computes(lambda options=options: fused_rnn.GRU(SIZE, HIDDEN, **options)(x)) == "fused"
    torch.use_deterministic_algorithms(True)
    try:
        assert computes(lambda: gru(x)) == "fused"
        assert fused_rnn.plan("gru", T=T, B=B, I=SIZE, H=HIDDEN, device="cpu").source == "shipped"
        with pytest.raises(ValueError, match="made no call that could be tuned"):
            fused_rnn.tune(gru, x, 0.01)
    finally:
        torch.use_deterministic_algorithms(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "lacks_threads", lambda: True)  # oneDNN's LSTM would compute wrong numbers
        lstm = fused_rnn.LSTM(SIZE, HIDDEN)
        tuned.table.put({(tuned.machine(CPU), call._replace(cell="lstm")): r for call, r in machine_results().items()})
        assert computes(lambda: lstm(x)) == "fused"


def test_patched_follows(torch_wins: Table) -> None:
    theirs, x = nn.GRU(SIZE, HIDDEN), torch.randn(T, B, SIZE)
    packed = pack_padded_sequence(x, torch.tensor([T, 3, 1]))
    with fused_rnn.patched():
        assert computes(lambda: theirs(x)) == computes(lambda: theirs(packed)) == "fused"
    fused_rnn.tune(fused_rnn.GRU(SIZE, HIDDEN), x, 0.01)
    fused_rnn.tune(fused_rnn.GRU(SIZE, HIDDEN), packed, 0.01)
    with fused_rnn.patched():
        assert computes(lambda: theirs(x)) == computes(lambda: theirs(packed)) == "torch"
        assert computes(lambda: nn.GRU(SIZE, HIDDEN, 2)(x)) == "fused"


@pytest.mark.slow("imports the compiler")
def test_a_compiled_graph_does_not_ask(torch_wins: Table) -> None:
    gru, x = fused_rnn.GRU(SIZE, HIDDEN), torch.randn(T, B, SIZE)
    fused_rnn.tune(gru, x, 0.01)
    torch_wins.mode = "first use"
    with torch._dynamo.config.patch(allow_rnn=True), tuned.answering(lambda *_: pytest.fail("asked")):
        assert computes(lambda: torch.compile(gru, backend="eager", fullgraph=True)(x)) == "fused"


def test_plan_says_where_its_answer_comes_from(torch_wins: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    question: dict[str, Any] = dict(T=T, B=B, I=SIZE, H=HIDDEN, device="cpu")
    assert fused_rnn.plan("gru", **question).source == "shipped"
    fused_rnn.tune(fused_rnn.GRU(SIZE, HIDDEN), torch.randn(T, B, SIZE), 0.01)
    assert fused_rnn.plan("gru", **question).source == "tuned"
    assert fused_rnn.plan("gru", **question, backend="fused").source == "shipped"
    assert fused_rnn.plan("gru", **question, requires_grad=False).source == "shipped"
    on_gpu: dict[str, Any] = dict(dtype=torch.bfloat16, T=512, B=64, I=1024, H=1024)
    assert fused_rnn.plan("gru", **on_gpu, backend="fused", properties=H200).source == "model"
    assert fused_rnn.plan("gru", **on_gpu, properties=H200).source == "shipped"
    monkeypatch.setattr(cuda, "device_properties", lambda device: H200)
    monkeypatch.setattr(tuned, "machine", lambda device: "cuda: an H200")
    other = cuda.plans("gru", torch.bfloat16, 64, 1024, 1, False, H200)[1]
    call = Call("gru", torch.bfloat16, None, 512, 64, 1024, 1024, 0, 1, 1, "sequence", True, 0)
    for instance, way in ((other["instance"], "resident"), (EVERY_STEP, "steps")):
        tuned.table.put({("cuda: an H200", call): Result("fused", instance)})
        plan = fused_rnn.plan("gru", **on_gpu, device="cuda")
        assert (plan.backend, plan.way, plan.source) == ("fused", way, "tuned")
        assert plan.forward == (other if way == "resident" else {})
    planned = cuda.plans  # the fastest kernel in inference may not fit in backward
    monkeypatch.setattr(cuda, "plans", lambda *question: [] if question[5] else planned(*question))
    tuned.table.put({("cuda: an H200", call._replace(train=False)): Result("fused", other["instance"])})
    plan = fused_rnn.plan("gru", **on_gpu, device="cuda", requires_grad=False)
    assert (plan.way, plan.forward, plan.backward) == ("resident", other, {})


def test_the_tuned_instruction_set_reaches_the_operators(
    table: Table, instruction_sets: dict[str, int], instances: list[int]
) -> None:
    """In both passes of plain, unbatched and packed calls, also under patched(); not with keywords."""
    gru, theirs = fused_rnn.GRU(SIZE, HIDDEN), nn.GRU(SIZE, HIDDEN)
    x, other = torch.randn(T, B, SIZE, requires_grad=True), instruction_sets[OTHER_SET]
    packed = pack_padded_sequence(x, torch.tensor([T, 3, 1]))

    def used(call: Callable[[], Any]) -> list[int]:
        instances.clear()
        output = call()[0]
        (output if isinstance(output, torch.Tensor) else output.data).sum().backward(retain_graph=True)
        return list(instances)

    with tuned.answering(lambda call, device: Result("fused", instruction_set=OTHER_SET)):
        for given in (x, x[:, 0], packed):
            assert used(lambda given=given: gru(given)) == [other, other]
        with fused_rnn.patched():
            for given in (x, packed):
                assert used(lambda given=given: theirs(given)) == [other, other]
        assert used(lambda: gru(x, return_state_sequence=True)) == [PLANNED, PLANNED]
        assert used(lambda: gru(x, lengths=torch.full((B,), T))) == []  # in one call, as without a table
    with tuned.answering(lambda call, device: Result("fused", instruction_set="of another machine")):
        assert used(lambda: gru(x)) == []


# ---- First use ------------------------------------------------------------------------------------------------------


@pytest.fixture
def first_use(torch_wins: Table) -> Table:
    torch_wins.mode = "first use"
    torch_wins._refresh()
    return torch_wins


def test_first_use(first_use: Table) -> None:
    """The first call of its bucket is measured, also in inference mode and under a hook on all modules."""
    gru, x = fused_rnn.GRU(SIZE, HIDDEN), torch.randn(T, B, SIZE)
    seen: list[Any] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.inference_mode():
            state = torch.get_rng_state()
            expected = nn.GRU.forward(gru, x)[0]
            assert torch.equal(gru(x)[0], expected)
    finally:
        handle.remove()
    assert seen == [gru] and torch.equal(torch.get_rng_state(), state)
    (call,) = machine_results()
    assert call == Call("gru", torch.float32, None, 8, 4, SIZE, HIDDEN, 0, 1, 1, "sequence", False, 0)
    gru(x)[0].sum().backward()
    assert [call.train for call in machine_results()] == [False, True]
    assert gru.weight_hh_l0.grad is not None
    assert fused_rnn.plan("gru", T=500, device="cpu").source == "shipped"  # asking does not measure


def no_measurement(*arguments: Any) -> Any:
    raise AssertionError("measured at a bad moment")


def test_bad_moments_for_a_first_use(first_use: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_measured", no_measurement)
    gru, x = fused_rnn.GRU(SIZE, HIDDEN), torch.randn(T, B, SIZE)
    with fused_rnn.patched():
        gru(x)
        nn.GRU(SIZE, HIDDEN)(x)
    checkpoint(lambda x: gru(x)[0], x.requires_grad_(), use_reentrant=False).sum().backward()
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        gru(x)
    torch.use_deterministic_algorithms(True)
    try:
        gru(x)
    finally:
        torch.use_deterministic_algorithms(False)
    with tuning._lock:  # another thread measures
        assert computes(lambda: gru(x)) == "fused"
    with pytest.raises(AssertionError, match="measured at a bad moment"):
        gru(x)


def test_a_measurement_that_fails(first_use: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, and the rules decide from then on."""

    def fails(*arguments: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tuning, "_measured", fails)
    gru, x = fused_rnn.GRU(SIZE, HIDDEN), torch.randn(T, B, SIZE)
    with pytest.warns(UserWarning, match="could not measure .* out of memory") as warned:
        assert computes(lambda: gru(x)) == computes(lambda: gru(x)) == "fused"
    assert len(warned) == 1 and not machine_results()


def test_cudnns_benchmark_measures_on_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for benchmark in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
        assert [Table(None, mode).measures(gpu) for mode in ("off", "read", "first use")] == [False, benchmark, True]
        assert [Table(None, mode).measures(CPU) for mode in ("off", "read", "first use")] == [False, False, True]


def test_threads_on_first_use(first_use: Table) -> None:
    """One of them measures, the others compute meanwhile; all results are right."""
    grus = [fused_rnn.GRU(SIZE, HIDDEN) for _ in range(4)]
    x = torch.randn(T, B, SIZE)
    expected = [nn.GRU.forward(gru, x)[0] for gru in grus]
    wrong: list[int] = []
    start = threading.Barrier(len(grus))

    def work(number: int) -> None:
        start.wait()
        for _ in range(20):
            if not torch.allclose(grus[number](x)[0], expected[number], atol=1e-6):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(grus))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(machine_results()) == 1


def in_a_forked_child() -> None:
    torch.set_num_threads(2)
    gru, x = fused_rnn.GRU(64, 128), torch.randn(32, 16, 64)
    key = tuned.machine(CPU), Call("gru", torch.float32, None, 32, 16, 64, 128, 0, 1, 1, "sequence", True, 0)
    tuned.table = Table(None, "first use")
    tuned.table.put({key: Result("torch")})
    assert computes(lambda: gru(x)) == "torch"

    def child() -> None:
        assert not tuned.table.asked and tuned.table.get(*key) is None
        gru(x)
        gru(x[:3])
        with pytest.raises(RuntimeError, match="tune: in a forked process"):
            fused_rnn.tune(gru, x)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0


def test_a_forked_child_does_not_wait_for_torch() -> None:
    survives(in_a_forked_child)
