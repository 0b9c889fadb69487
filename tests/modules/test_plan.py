"""The planners: their choices are possible on the device at any size, and a user can see and override them."""

import itertools
import random
from typing import Any

import pytest
import torch

import fused_rnn
from fused_rnn import _C, cuda, reference
from fused_rnn.cell_info import NUMBER

DEVICES = {
    "a100": (108, 166912, 80),
    "h100": (132, 232448, 90),
    "b200": (148, 232448, 100),
    "small": (16, 101376, 89),
}
REGISTERS = 65536  # per multiprocessor; the kernels use at most 255 per thread


@pytest.mark.parametrize("name", DEVICES)
def test_every_plan_is_possible(name: str) -> None:
    """Thousands of shapes: no plan exceeds the device's shared memory, threads or blocks, or leaves work undone."""
    sms, shared_bytes, _ = DEVICES[name]
    draw = random.Random(0)
    sizes = [1, 2, 7, 8, 15, 16, 17, 31, 64, 100, 128, 129, 200, 256, 511, 512, 768, 1024, 1500, 2048, 4096, 10000]
    found = 0
    for cell, dtype, backward in itertools.product(reference.CELLS, (torch.bfloat16, torch.float32), (False, True)):
        for _ in range(400):
            H = draw.choice(sizes) if draw.random() < 0.5 else draw.randint(1, 3000)
            B = draw.choice(sizes) if draw.random() < 0.5 else draw.randint(1, 100000)
            D = draw.choice((1, 2))
            for p in cuda.plans(cell, dtype, B, H, D, backward, DEVICES[name]):
                found += 1
                units = 16 * p["unit_warps"]
                tile_rows = 8 * p["row_tiles"]
                assert p["threads"] == 32 * p["unit_warps"] * p["depth_warps"]
                assert p["threads"] * 255 <= REGISTERS
                assert 0 < p["shared_bytes"] <= shared_bytes
                assert p["blocks"] == D * p["parts"] * p["teams"] <= sms  # all blocks run at the same time
                whole = 8 if p["kernel"] == "split_columns" else 1  # whole clusters, which may be larger than a layer
                assert (p["parts"] - whole) * units < H <= p["parts"] * units and p["parts"] % whole == 0
                assert p["rows"] == p["teams"] * p["tiles"] * tile_rows
                assert (p["teams"] - 1) * tile_rows < B  # every team has rows
                assert p["kernel"] != "alone" or p["parts"] == 1
                assert p["microseconds"] > 0
    assert found > 1000


def test_what_fits_on_the_chip() -> None:
    h100 = DEVICES["h100"]
    for cell, H in (("lstm", 2048), ("gru", 2048), ("rnn_tanh", 2048)):
        assert cuda.is_resident(cell, torch.bfloat16, 64, H, 1, h100), cell
    assert not cuda.is_resident("lstm", torch.bfloat16, 64, 8192, 1, h100)
    assert not cuda.is_resident("lstm", torch.float64, 1, 8, 1, h100)


def test_float32_follows_torchs_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = DEVICES["h100"]
    monkeypatch.setattr(cuda, "tf32_allowed", lambda: True)
    assert cuda.is_resident("gru", torch.float32, 4, 64, 1, h100)
    monkeypatch.setattr(cuda, "tf32_allowed", lambda: False)
    assert not cuda.is_resident("gru", torch.float32, 4, 64, 1, h100)


def test_best_first() -> None:
    times = [p["microseconds"] for p in cuda.plans("lstm", torch.bfloat16, 64, 512, 1, False, DEVICES["h100"])]
    assert len(times) > 3 and times == sorted(times)


@pytest.mark.parametrize(
    ("cell", "B", "H", "backward", "microseconds"),
    [
        ("lstm", 64, 1024, False, 3.1),
        ("lstm", 16, 512, False, 1.1),
        ("lstm", 16, 768, False, 1.2),
        ("gru", 64, 1024, False, 2.9),
        ("lstm", 64, 1024, True, 6.5),
    ],
)
def test_the_estimate_is_that_of_the_machine_code(
    cell: str, B: int, H: int, backward: bool, microseconds: float
) -> None:
    """To which plan.h says that its constants were fitted: cycles counted in the machine code, for an H100."""
    found = cuda.plans(cell, torch.bfloat16, B, H, 1, backward, DEVICES["h100"])
    best = next(p for p in found if p["kernel"] != "split_columns")
    assert best["microseconds"] == pytest.approx(microseconds, rel=0.1)


def test_the_estimate_knows_the_architecture() -> None:
    """A device newer than the table has the rates of the latest one before it."""

    def estimate(capability: int, B: int, H: int) -> float:
        found = cuda.plans("lstm", torch.bfloat16, B, H, 1, False, (64, 101376, capability))
        return next(p["microseconds"] for p in found if p["kernel"] == "through_l2")

    capabilities = (80, 86, 87, 89, 90, 100, 103, 120, 121)
    few, many = ({c: estimate(c, *size) for c in capabilities} for size in ((1, 256), (4096, 512)))
    for found in (few, many):
        assert found[86] == found[87] and found[90] == found[100] == found[103] and found[120] == found[121]
        assert len(set(found.values())) == 5
    # Few rows are bound by latency: the RTX 4090 has the shortest cycles. Many by tensor cores: it has slow ones.
    assert few[89] < few[90] < few[80]
    assert many[90] < many[80] < many[89] and 1.5 < many[86] / many[80] < 8 / 2 * 1410 / 1695


@pytest.mark.parametrize(
    ("cell", "dtype", "B", "H", "D", "splits"),
    [
        ("lstm", torch.bfloat16, 64, 1024, 1, True),
        ("lstm", torch.bfloat16, 1, 1024, 1, True),
        ("lstm", torch.bfloat16, 256, 1024, 1, True),
        ("lstm", torch.bfloat16, 64, 512, 2, True),
        ("lstm", torch.float32, 64, 1024, 1, True),
        ("lstm", torch.bfloat16, 64, 2048, 1, True),
        ("gru", torch.bfloat16, 64, 1024, 1, True),
        # Few columns: their share is less than the sums that have to be exchanged, or the weights fit in a cluster.
        ("lstm", torch.bfloat16, 64, 256, 1, False),
        ("rnn_tanh", torch.bfloat16, 16, 512, 1, False),
        ("gru", torch.bfloat16, 8, 128, 1, False),
    ],
)
def test_backward_splits_columns_where_that_is_faster(
    cell: str, dtype: torch.dtype, B: int, H: int, D: int, splits: bool
) -> None:
    found = {b: cuda.plans(cell, dtype, B, H, D, b, DEVICES["h100"]) for b in (False, True)}
    assert (found[True][0]["kernel"] == "split_columns") == splits
    assert all(p["kernel"] != "split_columns" for p in found[False])  # it has no forward
    for p in found[True]:
        if p["kernel"] == "split_columns":
            clusters = D * p["teams"] * p["parts"] // 8
            assert p["threads"] == 256 and clusters <= 132 // 16 * 2


def test_splitting_halves_backward_of_the_large_lstm() -> None:
    """An LSTM of 64 rows and 1024 units: 3.2 us per step, not 6.5, by the estimate. Devices without clusters cannot."""
    split, whole = (
        next(p for p in cuda.plans("lstm", torch.bfloat16, 64, 1024, 1, True, DEVICES["h100"]) if test(p["kernel"]))
        for test in ("split_columns".__eq__, "split_columns".__ne__)
    )
    assert 2 < whole["microseconds"] / split["microseconds"] < 2.5
    for name in ("a100", "small"):
        assert all(
            p["kernel"] in ("alone", "through_l2")
            for p in cuda.plans("lstm", torch.bfloat16, 64, 256, 1, True, DEVICES[name])
        )


def test_plan_on_the_cpu() -> None:
    plan = fused_rnn.plan("lstm", T=64, B=32, I=256, H=256, device="cpu")
    assert (plan.backend, plan.way) == ("fused", "cpu")
    assert plan.forward["instruction_set"] == fused_rnn._C.cpu_isa()
    assert 1 <= plan.forward["workers"] * plan.forward["teams"] <= torch.get_num_threads()
    tiny = fused_rnn.plan("rnn", T=2, B=1, I=2, H=2, device="cpu")
    assert tiny.forward["workers"] * tiny.forward["teams"] == 1
    assert fused_rnn.plan("lstm", T=64, B=32, I=256, H=256, device="cpu", backend="torch").backend == "torch"


def largest_share(
    cell: str,
    B: int,
    I: int,  # noqa: E741
    H: int,
    directions: int,
    threads: int,
    backward: bool,
) -> tuple[float, bool]:
    """The part of a long layer that the busiest thread computes on a CPU, of one direction's work, and whether units
    are shared."""
    plan = _C.cpu_plan(NUMBER[cell], 1000, B, I, H, H, directions, threads, False, 0, False, backward=backward)
    # Units are shared in blocks, of which the last may be narrow.
    items, block = (H, plan["block"]) if plan["splits_units"] else (B, 1)
    blocks, workers = -(-items // block), plan["workers"]
    edges = [min(items, blocks * i // workers * block) for i in range(workers + 1)]
    largest = max(end - begin for begin, end in itertools.pairwise(edges)) / items
    return largest * directions / plan["teams"], plan["splits_units"]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_more_threads_never_leave_far_more_to_the_busiest(backward: bool) -> None:
    """No number of cores between 2 and 128 at which a long layer falls to far fewer threads than it had before."""
    draw = random.Random(0)
    for _ in range(500):
        cell, directions = draw.choice(list(NUMBER)), draw.choice([1, 2])
        B, width, H = map(draw.choice, ([16, 20, 50, 64, 128, 512], [28, 128, 512], [64, 100, 256, 512]))
        least, least_splits_units = float(directions), False
        for threads in (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128):
            share, splits_units = largest_share(cell, B, width, H, directions, threads, backward)
            # Where the weights outgrow a core's cache, a larger share of the units may be faster than all weights for
            # fewer rows.
            bound = 1.4 if splits_units or least_splits_units else 1.2
            assert share <= bound * least, (cell, B, width, H, directions, threads)
            if share <= least:
                least, least_splits_units = share, splits_units


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("cell", list(NUMBER))
def test_small_layers_are_shared_by_rows(cell: str, backward: bool) -> None:
    """Their steps are too short to wait for one another, and every core's cache holds their weights."""
    for threads in (2, 4, 8):
        plan = _C.cpu_plan(NUMBER[cell], 200, 8, 32, 32, 32, 1, threads, False, 0, False, backward=backward)
        assert (plan["splits_units"], plan["workers"]) == (False, threads)


def test_auto_takes_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = dict(T=512, B=64, I=1024, H=1024, properties=DEVICES["h100"])
    monkeypatch.setattr(cuda, "MEASURED", frozenset())
    unmeasured = fused_rnn.plan("lstm", torch.bfloat16, **shape)
    assert (unmeasured.backend, unmeasured.reason) == ("torch", cuda.UNMEASURED)
    assert fused_rnn.plan("lstm", torch.bfloat16, **shape, backend="fused").way == "resident"


def test_plan_for_a_device_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MEASURED", frozenset({90}))
    shape = dict(T=512, B=64, I=1024, H=1024, properties=DEVICES["h100"])
    plan = fused_rnn.plan("lstm", torch.bfloat16, **shape)
    assert (plan.backend, plan.way) == ("fused", "resident")
    assert plan.forward["parts"] > 1 and plan.backward["parts"] > 1
    half = fused_rnn.plan("lstm", torch.float16, **shape)
    assert (half.backend, half.reason) == ("torch", "cuDNN keeps the weights on the chip, too")
    assert fused_rnn.plan("lstm", torch.float16, **shape, backend="fused").way == "resident"
    assert fused_rnn.plan("lstm", torch.float16, **shape, num_layers=2).way == "resident"
    assert fused_rnn.plan("gru", torch.float64, **shape, backend="fused").way == "steps"
    assert fused_rnn.plan("gru", torch.float64, **shape).backend == "torch"


@pytest.mark.parametrize(
    ("resident", "cell", "changes"),
    [
        (True, "lstm", {}),
        (True, "rnn_tanh", {}),
        (False, "gru", {}),  # "performance is flakier than other RNN types"
        (False, "lstm", dict(dtype=torch.bfloat16)),
        (False, "lstm", dict(num_layers=2)),
        (False, "lstm", dict(directions=2)),
        (False, "lstm", dict(H=1152)),
        (False, "lstm", dict(H=960)),
        (False, "lstm", dict(I=64)),
        (False, "lstm", dict(B=60)),
        (False, "lstm", dict(B=136)),
        (True, "lstm", dict(B=96)),
        (False, "rnn_relu", dict(B=96)),
        (True, "rnn_relu", dict(B=96, H=768)),
        (False, "lstm", dict(properties=(58, 101376, 89))),  # L4: too few multiprocessors
        (True, "lstm", dict(properties=(128, 101376, 89))),  # RTX 4090
        (False, "lstm", dict(properties=(108, 101376, 86))),  # minor version 6
        (True, "lstm", dict(H=192, dtype=torch.bfloat16, num_layers=2, directions=2, B=5, I=3)),  # SMALL_H
        (True, "gru", dict(H=192, dtype=torch.float32)),
        (False, "gru", dict(H=193)),
        (True, "rnn_tanh", dict(H=384, dtype=torch.float32, properties=(58, 101376, 89))),
        (False, "rnn_tanh", dict(H=385)),
        (False, "lstm", dict(H=64, dtype=torch.float64)),
    ],
)
def test_when_cudnn_keeps_the_weights_on_the_chip(resident: bool, cell: str, changes: dict) -> None:
    """`get_algo` of torch's aten/src/ATen/native/cudnn/RNN.cpp, case by case."""
    layer = dict(dtype=torch.float16, B=64, I=1024, H=1024, num_layers=1, directions=1, properties=DEVICES["h100"])
    assert cuda.cudnn_is_resident(cell, **(layer | changes)) == resident


def test_cudnn_has_nothing_persistent_for_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MEASURED", frozenset({90}))
    shape = dict(T=100, B=64, I=128, H=128, properties=DEVICES["h100"])
    assert fused_rnn.plan("lstm", torch.float16, **shape).backend == "torch"
    assert fused_rnn.plan("lstm", torch.float16, **shape, kind="packed").backend == "fused"


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="unknown cell 'qrnn'"):
        fused_rnn.plan("qrnn")
    with pytest.raises(ValueError, match="backend must be one of"):
        fused_rnn.plan("lstm", backend="cudnn")
    with pytest.raises(ValueError, match=r"kind must be one of 'sequence', .* got 'layer'"):
        fused_rnn.plan("lstm", kind="layer")


@pytest.mark.parametrize("device", ["meta", "mps", "cuda:63", torch.device("xla")])
def test_devices_without_a_plan(device: Any) -> None:
    with pytest.raises(ValueError, match=f"device must be .* got '{device}'"):
        fused_rnn.plan("lstm", device=device)
    assert fused_rnn.plan("lstm", device="cuda:63", properties=DEVICES["h100"]).backend == "torch"


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (dict(T="a"), TypeError, "T must be an int, got 'a'"),
        (dict(H=2.5), TypeError, "H must be an int, got 2.5"),
        (dict(num_layers=None), TypeError, "num_layers must be an int, got None"),
        (dict(properties=(132, 232448)), ValueError, r"properties must be a tuple of three .* got \(132, 232448\)"),
        (dict(properties="abc"), ValueError, "properties must be a tuple of three ints .* got 'abc'"),
        (dict(properties=(132, "a", 90)), TypeError, r"properties\[1\] must be an int, got 'a'"),
        (dict(properties=(132, 232448, -1)), ValueError, r"properties\[2\] must be at least 1 .* got -1"),
    ],
    ids=str,
)
def test_no_sizes_and_no_properties(bad: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fused_rnn.plan("lstm", **bad)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_backend_of_a_module(name: str) -> None:
    """Any backend has the same weights and results, and does not change repr or state_dict."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(3, 4)
    x = torch.randn(5, 2, 3)
    for backend in ("auto", "fused", "torch"):
        torch.manual_seed(0)
        ours = getattr(fused_rnn, name)(3, 4, backend=backend)
        assert ours.backend == backend
        assert repr(ours) == repr(theirs) and list(ours.state_dict()) == list(theirs.state_dict())
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])
        if backend == "torch":
            assert torch.equal(ours(x)[0], theirs(x)[0])
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'fused', 'torch', got 'fast'"):
        getattr(fused_rnn, name)(3, 4, backend="fast")


@pytest.mark.parametrize("bad", [dict(H=0), dict(H=-40), dict(T=0), dict(B=2**31), dict(dtype=torch.int8)])
def test_sizes_that_no_layer_has(bad: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        fused_rnn.plan("lstm", **(dict(T=5, B=1, I=8, H=8, properties=DEVICES["h100"]) | bad))
    assert cuda.plans("lstm", torch.bfloat16, 1, 0, 1, False, DEVICES["h100"]) == []
    assert cuda.plans("lstm", torch.bfloat16, 1, 8, 0, False, DEVICES["h100"]) == []
