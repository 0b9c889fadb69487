"""Tools that look up a module's exact class: per-sample gradients (Opacus), counts of operations, quantisation.

With fused_rnn's classes they must give the result of torch.nn's class or an error, never a wrong number.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_rnn
from contract import CELLS, NAMES, close, tensors
from fused_rnn import tool_tables

pytestmark = pytest.mark.usefixtures("one_thread")

each_name = pytest.mark.parametrize("name", NAMES)


def input_of(name: str) -> Tensor:
    return torch.linspace(-1, 1, 4 * 3 if name in CELLS else 4 * 6 * 3).view((4, 3) if name in CELLS else (4, 6, 3))


class Tagger(nn.Module):
    """A recurrent layer between linear ones, batch first; `state` makes it start from a given state."""

    def __init__(self, library: Any, name: str, state: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(3, 3)
        cls = getattr(library, name)
        self.rnn = cls(3, 5) if name in CELLS else cls(3, 5, batch_first=True)
        self.after = nn.Linear(5, 2)
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        h = torch.ones(x.size(0), 5) if isinstance(self.rnn, nn.RNNCellBase) else torch.ones(1, x.size(0), 5)
        hx = (h, h) if isinstance(self.rnn, (nn.LSTM, nn.LSTMCell)) else h
        x = self.before(x)
        return self.after(tensors(self.rnn(x, hx) if self.state else self.rnn(x))[0])


# Opacus


def per_sample(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of each sample's sum of squares."""
    parameters = list(model.parameters())
    samples = [torch.autograd.grad(model(x[i : i + 1]).square().sum(), parameters) for i in range(x.size(0))]
    return [torch.stack(of_parameter) for of_parameter in zip(*samples, strict=True)]


@pytest.fixture
def opacus() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("opacus", reason="gradients per sample of Opacus need the package opacus")


@each_name
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("force_functorch", [False, True])
def test_opacus_never_gives_a_wrong_gradient(name: str, state: bool, force_functorch: bool, opacus: Any) -> None:
    """Opacus recomputes a layer from its first argument alone, and would take a given state for zeros."""
    for library in (nn, fused_rnn):
        with pytest.raises((NotImplementedError, RuntimeError, TypeError, AttributeError)) as caught:
            model = Tagger(library, name, state)
            sampled = opacus.GradSampleModule(model, loss_reduction="sum", force_functorch=force_functorch)
            sampled(input_of(name)).square().sum().backward()
    assert f"Opacus cannot compute gradients per sample of {name}" in str(caught.value)


def test_opacus_refuses_subclasses_of_ours(opacus: Any) -> None:
    class Mine(fused_rnn.GRUCell):
        pass

    with pytest.raises(NotImplementedError, match="per sample of Mine, nor of torch"):
        opacus.GradSampleModule(Mine(3, 5))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_opacus_replaces_ours_as_it_replaces_torchs(name: str, opacus: Any) -> None:
    from opacus.validators import ModuleValidator

    texts = [[str(e) for e in ModuleValidator.validate(Tagger(library, name))] for library in (nn, fused_rnn)]
    assert texts[0] == texts[1] and f"We do not support nn.{name}" in texts[1][0]
    model, x = Tagger(fused_rnn, name), input_of(name)
    fixed = ModuleValidator.fix(model)
    assert type(fixed.rnn).__name__ == f"DP{name}"
    close(fixed(x), model(x))
    sampled = opacus.GradSampleModule(fixed, loss_reduction="sum")
    sampled(x).square().sum().backward()
    names = [key for key, _ in model.named_parameters()]  # Opacus lists them in another order
    found = {key: p.grad_sample for key, p in fixed.named_parameters()}
    close([found[key] for key in names], per_sample(model, x), grad=True)


def test_opacus_does_not_drop_an_option(opacus: Any) -> None:
    from opacus.validators import ModuleValidator

    with pytest.raises(TypeError, match="has nothing like"):
        ModuleValidator.fix(nn.Sequential(fused_rnn.LSTM(3, 5, zoneout=0.1)))


@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_opacus_with_expanded_weights(name: str, opacus: Any) -> None:
    from opacus.grad_sample import GradSampleModuleExpandedWeights

    model, x = Tagger(fused_rnn, name), input_of(name)
    expected = per_sample(model, x)
    sampled = GradSampleModuleExpandedWeights(model, loss_reduction="sum")
    sampled(x).square().sum().backward()
    close([p.grad_sample for p in model.parameters()], expected, grad=True)


def test_only_opacus_hooks_are_refused() -> None:
    """Without Opacus: the hook's module name identifies its origin."""
    seen = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(module)

    module = fused_rnn.GRUCell(3, 5)
    handle = module.register_forward_hook(hook, prepend=True)
    module(torch.ones(2, 3))
    assert seen == [module]
    handle.remove()
    hook.__module__ = "opacus.grad_sample.grad_sample_module"
    with pytest.raises(NotImplementedError, match="Opacus cannot compute"):
        module.register_forward_hook(hook)
    module(torch.ones(2, 3))
    assert seen == [module]


# Counts of operations


def counted_by_thop(thop: Any, model: nn.Module, x: Tensor) -> Any:
    return thop.profile(model, (x,), verbose=False)


def counted_by_ptflops(ptflops: Any, model: nn.Module, x: Tensor) -> Any:
    options = {"as_strings": False, "print_per_layer_stat": False, "backend": "pytorch"}
    return ptflops.get_model_complexity_info(model, tuple(x.shape[1:]), **options)


@each_name
@pytest.mark.parametrize(("package", "count"), [("thop", counted_by_thop), ("ptflops", counted_by_ptflops)])
def test_counts_by_class(package: str, count: Any, name: str) -> None:
    tool = pytest.importorskip(package, reason=f"counting operations by class needs the package {package}")
    totals = [count(tool, Tagger(library, name), input_of(name))[0] for library in (nn, fused_rnn)]
    without = count(tool, nn.Sequential(nn.Linear(3, 3)), input_of(name))[0]
    assert totals[0] == totals[1] > 3 * without


def test_layers_of_different_sizes_are_not_counted_wrong() -> None:
    thop = pytest.importorskip("thop", reason="counting operations by class needs the package thop")
    with pytest.raises(TypeError, match=r"thop.* counts layers of one size, got hidden_size=\(5, 4\)"):
        thop.profile(fused_rnn.GRU(3, [5, 4]), (input_of("GRU"),), verbose=False)


# The tables themselves


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fake tool with two tables by class."""
    (tmp_path / "made_up_tool.py").write_text(
        "import torch\n"
        "class Tables:\n"
        "    rules = {torch.nn.LSTM: lambda module: 'LSTM', torch.nn.Linear: lambda module: 'Linear'}\n"
        "loader = __loader__\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tables = {"Tables.rules": lambda rule: rule, "Tables.of_another_version": lambda rule: rule, "gone": None}
    monkeypatch.setitem(tool_tables._TABLES, "made_up_tool", tables)
    monkeypatch.delitem(sys.modules, "made_up_tool", raising=False)
    return "made_up_tool"


@pytest.mark.parametrize("imported_before", [False, True])
def test_a_tool_is_registered_with_its_import(made_up: str, imported_before: bool) -> None:
    if imported_before:
        tool_finder, sys.meta_path[:] = sys.meta_path[:], [f for f in sys.meta_path if "AfterImport" not in repr(f)]
        try:
            tool = importlib.import_module(made_up)
            assert fused_rnn.LSTM not in tool.Tables.rules
        finally:
            sys.meta_path[:] = tool_finder
        tool_tables.install()
    else:
        tool = importlib.import_module(made_up)
    assert tool.Tables.rules[fused_rnn.LSTM] is tool.Tables.rules[nn.LSTM]
    assert fused_rnn.GRU not in tool.Tables.rules and len(tool.Tables.rules) == 3
    assert tool.__loader__ is tool.__spec__.loader is not None
    assert type(tool.__loader__).__module__ == "_frozen_importlib_external"  # the tool's, not ours
    mine = tool.Tables.rules[fused_rnn.LSTM] = lambda module: "mine"  # a user's own entry must stay
    tool_tables.install()
    assert tool.Tables.rules[fused_rnn.LSTM] is mine


def test_nothing_is_imported_and_installed_once() -> None:
    tool_tables.install()
    assert sum("AfterImport" in repr(finder) for finder in sys.meta_path) == 1
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("deepspeed.profiling.flops_profiler.profiler_that_is_not_there")


# Quantisation in torch.ao


class Quantisable(Tagger):
    def __init__(self, library: Any, name: str) -> None:
        super().__init__(library, name)
        self.into, self.out = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(super().forward(self.into(x)))


def statically_quantised(model: nn.Module, x: Tensor) -> nn.Module:
    model.eval().qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")  # type: ignore[assignment]
    prepared = torch.ao.quantization.prepare(model)
    prepared(x)
    return torch.ao.quantization.convert(prepared)


quantises = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        "fbgemm" not in torch.backends.quantized.supported_engines, reason="torch has no quantised engine fbgemm"
    ),
]


@pytest.mark.parametrize("name", ["LSTM"])
def test_static_quantisation(name: str) -> None:
    x = input_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted, found = (statically_quantised(Quantisable(library, name), x) for library in (nn, fused_rnn))
        assert type(found.rnn) is type(wanted.rnn) is torch.ao.nn.quantized.LSTM
        assert torch.equal(found(x), wanted(x))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "LSTM"])
def test_static_quantisation_of_the_others_raises_as_torchs(name: str) -> None:
    x, errors = input_of(name), []
    for library in (nn, fused_rnn):
        with warnings.catch_warnings(), pytest.raises((NotImplementedError, AttributeError)) as caught:
            warnings.simplefilter("ignore")
            statically_quantised(Quantisable(library, name), x)(x)
        errors.append((caught.type, str(caught.value).split(" with arguments")[0]))
    assert errors[0] == errors[1]


def test_static_quantisation_does_not_drop_an_option() -> None:
    model = Quantisable(fused_rnn, "LSTM")
    model.rnn.zoneout = 0.1
    with warnings.catch_warnings(), pytest.raises(TypeError, match="has nothing like"):
        warnings.simplefilter("ignore")
        statically_quantised(model, input_of("LSTM"))


@pytest.mark.parametrize("name", ["LSTM", "GRU", *CELLS])
def test_dynamic_quantisation_of_our_classes_by_name(name: str) -> None:
    x = input_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted, found = (
            torch.ao.quantization.quantize_dynamic(Tagger(library, name), {getattr(library, name), nn.Linear})
            for library in (nn, fused_rnn)
        )
        assert type(found.rnn) is type(wanted.rnn) and type(found.rnn).__module__.startswith("torch.ao.")
        assert torch.equal(found(x), wanted(x))
