"""`fused_rnn.tune`: decisions with a stubbed clock, and real measurements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import autograd, cuda, operators, policy, tuned, tuning, tuning_report
from fused_rnn.options import EVERY_STEP, PLANNED
from fused_rnn.tuned import Call, Result, Table
from tuned_calls import CALL, CPU, H200, HIDDEN, OTHER_SET, SIZE, B, T, computes, machine_results
from tuned_calls import clock as clock
from tuned_calls import instances as instances
from tuned_calls import instruction_sets as instruction_sets
from tuned_calls import set_outrun_mkl as set_outrun_mkl
from tuned_calls import table as table
from tuned_calls import torch_wins as torch_wins

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- Decisions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("torchs", "expected"), [(2.0, "fused"), (0.96, "fused"), (0.94, "torch"), (0.1, "torch")])
def test_a_cpu_leaves_the_kernels_only_for_what_is_faster(
    torchs: float, expected: str, table: Table, clock: dict[str, float]
) -> None:
    clock["torch"] = torchs
    gru = fused_rnn.GRU(SIZE, HIDDEN)
    x = torch.randn(T, B, SIZE)
    (result,) = fused_rnn.tune(gru, x, 0.01).values()
    assert result == Result(expected, -1, torchs, {"torch.nn": torchs, "kernels": 1.0})
    plan = fused_rnn.plan("gru", T=T, B=B, I=SIZE, H=HIDDEN, device="cpu")
    assert (plan.backend, plan.source, plan.reason) == (expected, "tuned", "fused_rnn.tune measured it on this machine")
    assert computes(lambda: gru(x)) == expected
    assert computes(lambda: gru(torch.randn(T + 1, B, SIZE))) == expected  # the same bucket


@pytest.mark.parametrize(
    ("torchs", "others", "backend", "chosen"),
    [
        (2.0, 0.9, "fused", OTHER_SET),
        (2.0, 0.97, "fused", ""),  # not by 5 %
        (2.0, 1.1, "fused", ""),
        (0.9, 0.8, "fused", OTHER_SET),
        (0.5, 0.8, "torch", ""),
    ],
)
def test_instruction_sets_are_compared(
    torchs: float,
    others: float,
    backend: str,
    chosen: str,
    table: Table,
    clock: dict[str, float],
    instruction_sets: dict[str, int],
    instances: list[int],
) -> None:
    """Another one is taken if it is 5 % faster than the process's own, in both passes; plan() names it."""
    clock |= {"torch": torchs, OTHER_SET: others}
    gru, x = fused_rnn.GRU(SIZE, HIDDEN, 2), torch.randn(T, B, SIZE, requires_grad=True)
    (result,) = fused_rnn.tune(gru, x, 0.01).values()
    assert (result.backend, result.instruction_set) == (backend, chosen)
    assert result.seconds == {"torch.nn": torchs, "kernels": 1.0, f"kernels, {OTHER_SET}": others}
    assert result.speedup == torchs / (others if chosen else min(others, 1.0) if backend == "torch" else 1.0)
    assert Table(table.path).get(tuned.machine(CPU), next(iter(machine_results()))) == result
    plan = fused_rnn.plan("gru", T=T, B=B, I=SIZE, H=HIDDEN, num_layers=2, device="cpu")
    assert (plan.backend, plan.source) == (backend, "tuned")
    if backend == "fused":
        assert plan.forward["instruction_set"] == (chosen or tuned._C.cpu_isa()) == plan.backward["instruction_set"]
    instances.clear()
    y, _ = gru(x)
    gradients = torch.autograd.grad(y.sum(), [x, *gru.parameters()])
    assert instances == ([instruction_sets[chosen]] * 4 if chosen else [])
    expected = nn.GRU.forward(gru, x)[0]
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), [x, *gru.parameters()]))


def test_the_instruction_sets_that_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process's own, and each that computes a call in another way; the own alone where the user names it."""
    own, *others = tuned._C.supported_cpu_isas()
    usual = tuned.instruction_sets.__wrapped__
    monkeypatch.delenv("FUSED_RNN_CPU_ISA", raising=False)
    assert set(usual()) == {"", *others} - {"portable", "amx_emulated"}
    assert all(tuned._C.supported_cpu_isas()[place] == name for name, place in usual().items() if name)
    monkeypatch.setenv("FUSED_RNN_CPU_ISA", own)
    assert usual() == {"": PLANNED}
    every = {"": PLANNED, own: 0} | {name: place for place, name in enumerate(others, 1)}
    monkeypatch.setattr(tuned, "instruction_sets", lambda: every)

    def compared(dtype: torch.dtype, **sizes: int) -> set[str]:
        call = CALL._replace(dtype=dtype, **sizes)
        return {rival.instruction_set for rival in tuning._instruction_sets(call).values()}

    assert compared(torch.bfloat16) == {"", *others}  # without the second name of the own
    without_products = {"avx512", "avx512_bf16", "amx_emulated"}  # all of them are avx512 then
    assert compared(torch.float64) == {"", *others} - (without_products if "avx512" in {own, *others} else {OTHER_SET})
    plain = "avx512" if "avx512_bf16" not in others else "avx512_bf16"  # the first without products of int8
    assert (plain in compared(torch.float32, B=64, H=256)) == (own == "amx")


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("faster", ["torch", "fused", OTHER_SET])
def test_cells(
    cell: str,
    train: bool,
    faster: str,
    table: Table,
    clock: dict[str, float],
    instruction_sets: dict[str, int],
    instances: list[int],
    set_outrun_mkl: Callable[[bool], None],
) -> None:
    """A loop over a cell is one call; modules and patched() follow, in float32 and under autocast."""
    set_outrun_mkl(False)
    clock |= {"torch": 2.0, "fused": 2.0, OTHER_SET: 2.0} | {faster: 1.0}
    name = {"lstm": "LSTMCell", "gru": "GRUCell"}.get(cell, "RNNCell")
    ours, theirs = (getattr(library, name)(SIZE, HIDDEN) for library in (fused_rnn, nn))
    x = torch.randn(B, SIZE)

    class Loop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            state = None
            for _ in range(T):
                state = ours(x, state)
            return state if cell != "lstm" else state[0]

    Loop.cell = ours
    with torch.set_grad_enabled(train):
        for half in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                ((call, result),) = fused_rnn.tune(Loop(), x, 0.01).items()
                assert call == Call(
                    cell, torch.float32, torch.bfloat16 if half else None, 1, B, SIZE, HIDDEN, 0, 1, 1, "cell", train, 0
                )
                backend = "torch" if faster == "torch" else "fused"
                assert (result.backend, result.instruction_set) == (backend, faster if faster == OTHER_SET else "")
                plan = fused_rnn.plan(cell, B=B, I=SIZE, H=HIDDEN, kind="cell", device="cpu")
                assert (plan.backend, plan.source) == (backend, "tuned")
                instances.clear()
                assert computes(lambda: ours(x)) == backend
                assert set(instances) <= {instruction_sets[result.instruction_set]}
                assert instances or faster != OTHER_SET
        with fused_rnn.patched():
            assert computes(lambda: theirs(x)) == backend
        assert computes(lambda: ours(torch.randn(50 * B, SIZE))) == (  # as untuned
            "torch" if train and cell == "rnn_tanh" else "fused"
        )
    torch.testing.assert_close(ours(x), getattr(nn, name).forward(ours, x))


@pytest.mark.parametrize(("train", "backend"), [(False, "fused"), (True, "torch")])
def test_the_rules_decide_a_draw(train: bool, backend: str, table: Table, clock: dict[str, float]) -> None:
    """A cell of an RNN in training stays torch's, and then asks nothing."""
    clock["torch"] = 1.04 if train else 0.96
    cell, x = fused_rnn.RNNCell(SIZE, HIDDEN).requires_grad_(train), torch.randn(B, SIZE)
    (result,) = fused_rnn.tune(cell, x, 0.01).values()
    assert result.backend == backend == computes(lambda: cell(x))
    assert table.asked and not table.cell_hidden_sizes


def decide(device_type: str, **seconds: list[float]) -> Result:
    names = {"torch": "cuDNN" if device_type == "cuda" else "torch.nn"}
    samples = {names.get(name, name): times for name, times in seconds.items()}
    rivals = {name: Result("torch") if name in tuned.TORCH_NAMES else Result("fused", len(name)) for name in samples}
    return tuning._decide(rivals, samples, device_type, device_type == "cuda")


def test_a_gpu_leaves_cudnn_only_for_what_is_faster() -> None:
    assert decide("cuda", torch=[1.04], a=[1.0]).backend == "torch"
    assert decide("cuda", torch=[1.06], a=[1.0]).backend == "fused"
    best = decide("cuda", torch=[3.0, 3.0], a=[2.0, 2.0], bb=[1.0, 1.0], ccc=[4.0, 4.0])
    assert best[:3] == ("fused", 2, 3.0) and best.seconds == {"cuDNN": 3.0, "a": 2.0, "bb": 1.0, "ccc": 4.0}
    assert decide("cuda", torch=[1.0], a=[2.0], bb=[4.0])[:3] == ("torch", PLANNED, 0.5)


def test_neighbouring_turns_are_compared() -> None:
    """A machine that slows down, or is disturbed for a moment, changes nothing."""
    slowing = decide("cpu", torch=[1.0, 10.0, 100.0], kernels=[0.5, 5.0, 50.0])
    assert slowing[:3] == ("fused", 7, 2.0)
    disturbed = decide("cpu", torch=[1.0, 1.0, 1.0], kernels=[2.0, 0.01, 2.0])
    assert disturbed.backend == "torch" and disturbed.speedup == 0.5


def test_who_is_alone_is_taken() -> None:
    assert decide("cpu", torch=[1.0]).backend == decide("cuda", torch=[1.0]).backend == "torch"
    assert decide("cpu", kernels=[1.0]).backend == decide("cuda", kernels=[1.0]).backend == "fused"


def test_the_rivals_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN, the planner's two best kernels that compute both passes, and a product for every step."""
    monkeypatch.setattr(cuda, "device_properties", lambda device: H200)
    monkeypatch.setattr(cuda, "tf32_allowed", lambda: False)
    call = Call("lstm", torch.bfloat16, None, 512, 64, 1024, 1024, 0, 1, 1, "sequence", False, 0)
    plans = [cuda.plans("lstm", torch.bfloat16, 64, 1024, 1, backward, H200) for backward in (False, True)]
    gpu = torch.device("cuda")
    rivals = tuning._rivals(call, gpu)
    best = [plan["instance"] for plan in plans[0][:2]]
    assert list(rivals) == ["cuDNN", *(f"kernel {instance}" for instance in best), "step by step"]
    assert [rival.instance for rival in rivals.values()] == [-1, *best, EVERY_STEP]
    assert [rival.backend for rival in rivals.values()] == ["torch", "fused", "fused", "fused"]
    both = {plan["instance"] for plan in plans[0]} & {plan["instance"] for plan in plans[1]}
    planner, *trained = [r.instance for r in tuning._rivals(call._replace(train=True), gpu).values()][1:-1]
    assert planner == PLANNED and len(trained) == 2 and set(trained) <= both
    for other in (dict(dtype=torch.float32), dict(dtype=torch.float64), dict(T=1)):
        assert list(tuning._rivals(call._replace(**other), gpu)) == ["cuDNN", "step by step"]


# ---- Real measurements ----------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Three layers, one of them twice with other sizes, a cell that is called twice, and some that are left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a = fused_rnn.LSTM(SIZE, HIDDEN, 2, bidirectional=True, proj_size=3)
        self.b = fused_rnn.GRU(6, HIDDEN, batch_first=True)
        self.c = fused_rnn.RNN(HIDDEN, HIDDEN, nonlinearity="relu")
        self.pinned = fused_rnn.GRU(HIDDEN, 7, backend="fused")
        self.torchs = fused_rnn.GRU(HIDDEN, 8, backend="torch")
        self.plain = nn.GRU(HIDDEN, 9)
        self.varied = fused_rnn.LSTM(HIDDEN, HIDDEN, layer_norm=True)
        self.cell = fused_rnn.GRUCell(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x)[0].transpose(0, 1))[0].transpose(0, 1)
        for module in (self.pinned, self.torchs, self.plain, self.varied, self.c):
            module(y)
        self.c(y[:, :1].expand(-1, 50, -1))
        self.c(pack_padded_sequence(y, torch.tensor([T, 3, 1])))
        self.cell(y[0], self.cell(y[1]))
        return self.c(y)[0]


def test_a_model(table: Table, capsys: pytest.CaptureFixture[str]) -> None:
    """Every distinct call is measured and stored; nothing of the model or of the process changes."""
    torch.manual_seed(3)
    model, x = Model(), torch.randn(T, B, SIZE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, expected = torch.get_rng_state(), model(x)
    for module in model.modules():  # of the recorded forward only
        module.register_forward_pre_hook(lambda module, args: seen.append(module))
    seen: list[Any] = []
    results = fused_rnn.tune(model, x, 0.2)
    assert len(seen) == 13
    assert [(call.cell, call.T, call.B, call.I, call.H, call.kind, call.train) for call in results] == [
        ("lstm", T, B, SIZE, HIDDEN, "sequence", True),
        ("gru", T, B, 6, HIDDEN, "sequence", True),
        ("rnn_relu", T, B, HIDDEN, HIDDEN, "sequence", True),
        ("rnn_relu", T, 50, HIDDEN, HIDDEN, "sequence", True),
        ("rnn_relu", T, 1, HIDDEN, HIDDEN, "packed", True),
        ("gru", 1, B, HIDDEN, HIDDEN, "cell", True),
    ]
    (lstm, *_) = results
    assert (lstm.proj_size, lstm.num_layers, lstm.directions, lstm.dtype) == (3, 2, 2, torch.float32)
    for result in results.values():
        names = {f"kernels, {name}" if name else "kernels" for name in tuned.instruction_sets()}
        assert {"torch.nn", "kernels"} <= set(result.seconds) <= {"torch.nn"} | names
        assert min(result.seconds.values()) > 0
    assert Table(table.path).of(tuned.machine(CPU)) == {call.bucket(): result for call, result in results.items()}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(x), expected)
    printed = capsys.readouterr().out
    assert table.path in printed.replace("\n", "") and "speed-up" in printed and printed.count("training") == 6


def test_without_rich(table: Table, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_report, "HAS_RICH", False)
    fused_rnn.tune(fused_rnn.GRU(SIZE, HIDDEN), torch.randn(T, B, SIZE), 0.01)
    machine, _, row, stored = capsys.readouterr().out.splitlines()
    assert machine == tuned.machine(CPU) and row.startswith("gru float32 training  6,3,4,5,1  ")
    assert stored == f"stored in {table.path}"


@pytest.mark.parametrize("dtype", policy.DTYPES, ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_values_are_checked(cell: str, dtype: torch.dtype, train: bool, recwarn: pytest.WarningsRecorder) -> None:
    """Right kernels pass in every dtype; wrong ones do not, and only torch.nn is left."""
    for more in ({}, dict(kind="packed"), dict(num_layers=2, directions=2), dict(kind="cell", T=1)):
        call = Call(cell, dtype, None, T, B, SIZE, HIDDEN, 0, 1, 1, "sequence", train, 0)._replace(**more)
        with tuning._own_settings(call, CPU):
            rivals = tuning._correct(tuning._rivals(call, CPU), tuning._Subject(call, CPU))
        assert "kernels" in rivals
    assert not [warning for warning in recwarn if "less accurately" in str(warning.message)]


@pytest.mark.parametrize("wrong", [1e-3, math.nan])
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_wrong_values_are_not_taken(
    wrong: float, train: bool, table: Table, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(right: Any) -> Any:
        def run(*arguments: Any) -> Any:
            return tuple(t + wrong if isinstance(t, torch.Tensor) else t for t in right(*arguments))

        return run

    of_nodes = ((operators, "backward_operator"), (autograd._Stack, "backward"))
    for owner, name in of_nodes if train else ((operators, "plain"), (operators, "in_one_call")):
        monkeypatch.setattr(owner, name, damaged(getattr(owner, name)))
    clock["torch"] = 100.0
    gru = fused_rnn.GRU(SIZE, HIDDEN).requires_grad_(train)
    what = "a gradient" if train else "the output"
    with pytest.warns(UserWarning, match=f"kernels computes {what} of .* less accurately than torch.nn"):
        (result,) = fused_rnn.tune(gru, torch.randn(T, B, SIZE), 0.01).values()
    assert result.backend == "torch" and list(result.seconds) == ["torch.nn"]


def test_a_dtype_that_torch_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are taken where torch.nn raises; where all raise, the error is the user's."""
    subject = tuning._Subject(CALL, CPU)

    def refuse(*arguments: Any) -> Any:
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(fused_rnn.GRU, "_torchs", refuse)
    with torch.no_grad():
        assert next(iter(tuning._correct(tuning._rivals(CALL, CPU), subject))) == "kernels"
        for name in ("plain", "forward_operator", "in_one_call"):
            monkeypatch.setattr(operators, name, refuse)
        with pytest.raises(RuntimeError, match="not implemented for 'Half'"):
            tuning._correct(tuning._rivals(CALL, CPU), subject)


def test_what_cannot_be_tuned(table: Table) -> None:
    x = torch.randn(T, B, SIZE)
    for model in (nn.GRU(SIZE, HIDDEN), fused_rnn.GRU(SIZE, HIDDEN, backend="fused"), nn.Identity()):
        with pytest.raises(ValueError, match=f"tune: {type(model).__name__} made no call that could be tuned"):
            fused_rnn.tune(model, x, 0.01)
    for seconds in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="tune: seconds must be positive"):
            fused_rnn.tune(fused_rnn.GRU(SIZE, HIDDEN), x, seconds)
    with fused_rnn.patched(), pytest.raises(RuntimeError, match=r"tune: within fused_rnn\.patched"):
        fused_rnn.tune(fused_rnn.GRU(SIZE, HIDDEN), x, 0.01)
    with pytest.raises(RuntimeError, match=r"expected|must be equal"):  # the model's own error
        fused_rnn.tune(fused_rnn.GRU(SIZE + 1, HIDDEN), x, 0.01)
    assert not table.asked
