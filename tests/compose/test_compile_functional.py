"""torch.compile of `fused_rnn.functional`: whole graphs, without torch's switch for recurrent modules.

The weights are computed in the graph, and gradients reach the tensors they are computed from. Sizes as in
test_compile.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from contract import MODULES, SEQUENCE_MODULES, close
from fused_rnn import functional
from test_compile import EXTRAS, HIDDEN, INPUT, SIZES, VARIANTS, Graphs, drawn, packed, same, whole
from test_compile import one_compiler as one_compiler

pytestmark = pytest.mark.slow("torch.compile takes seconds a case")

FUNCTIONS = {"RNN": functional.rnn, "LSTM": functional.lstm, "GRU": functional.gru}


@pytest.fixture(autouse=True)
def no_modules(one_compiler: None) -> Iterator[None]:
    """Forbid recurrent modules in graphs."""
    with torch._dynamo.config.patch(allow_rnn=False):
        yield


class Computed(nn.Module):
    """A layer whose weights are scaled by another network."""

    def __init__(self, key: str, options_of_module: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name, changes = MODULES[key]
        module = getattr(fused_rnn, self.name)(INPUT, HIDDEN, **changes, **(options_of_module or {}))
        self.like = [module]  # a list, so that the module is no submodule and invisible to the compiler
        self.layers = module.num_layers
        self.weights = nn.ParameterList([w.detach().clone() for w in module._flat_weights])
        self.norms = nn.ParameterList([torch.rand(size) + 0.5 for _, size in module._norm_shapes()])
        self.scales = nn.Linear(1, len(self.weights))
        of_call = changes.keys() & {"bidirectional", "batch_first", "nonlinearity"}
        self.options = {name: changes[name] for name in of_call} | options

    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        scales = 1 + 0.1 * self.scales(self.weights[0].new_ones(1))
        weights = [w * scale for w, scale in zip(self.weights, scales.unbind(), strict=True)]
        norms = list(self.norms) if len(self.norms) else None
        of_call = dict(training=self.training, norms=norms, **self.options, **options)
        return FUNCTIONS[self.name](input, weights, hx, **of_call)


@pytest.mark.parametrize("key", SEQUENCE_MODULES)
def test_sequences(key: str) -> None:
    model = Computed(key)
    compiled, graphs = whole(model)
    for T, B in SIZES:
        input, hx, _ = drawn(model.like[0], T, B)
        same(compiled, model, input, hx)
    assert graphs.traced == ["layer.default"] * model.layers
    assert graphs.forward == ["forward.default"] * model.layers
    assert graphs.backward == ["backward.default"] * model.layers


@pytest.mark.parametrize(("key", "names", "given"), [EXTRAS[0], EXTRAS[5], EXTRAS[8]])
def test_resets_lengths_and_the_states_of_every_step(key: str, names: str, given: bool) -> None:
    model = Computed(key)
    compiled, graphs = whole(model)
    for T, B in SIZES[1:]:
        input, hx, values = drawn(model.like[0], T, B)
        options = {"reset_state" if name in ("learned", "of_steps") else name: values[name] for name in names.split()}
        same(compiled, model, input, hx if given else None, **options, return_state_sequence=True)
    assert graphs.traced == ["layer.default"] * model.layers


@pytest.mark.parametrize(("key", "training"), [("lstm", True), ("lstm", False), ("gru_deep", False)])
def test_variants(key: str, training: bool) -> None:
    options = {name: value for name, value in VARIANTS.items() if name != "layer_norm"}
    model = Computed(key, {"layer_norm": True}, **options).train(training)
    compiled, graphs = whole(model)
    for T, B in SIZES[1:]:
        input, hx, _ = drawn(model.like[0], T, B)
        found = []
        for call in (compiled, model):
            torch.manual_seed(3)  # the same masks
            found.append(call(input, hx))
        close(*found)
        if not training:
            same(compiled, model, input, hx)
    assert graphs.traced == ["layer.default"] * model.layers


def test_layers_of_different_sizes() -> None:
    torch.manual_seed(0)
    weights = fused_rnn.GRU(INPUT, (HIDDEN, 2 * HIDDEN), num_layers=2)._flat_weights

    def call(input: Tensor) -> Any:
        return functional.gru(input, weights)

    compiled, graphs = whole(call)
    for T, B in SIZES[1:]:
        input = torch.randn(T, B, INPUT)
        close(compiled(input), call(input))
    assert graphs.traced == ["layer.default"] * 2


def test_sizes_and_rates_that_the_compiler_makes_symbols_of() -> None:
    """The compiler makes symbols of a function's tensor sizes and numbers; the operators must be traced with them."""
    weights = [w.detach() for w in Computed("lstm").weights]

    def call(input: Tensor, weights: list[Tensor], rate: float) -> Any:
        return functional.lstm(input, weights, zoneout=(rate, 0.0))

    compiled, graphs = whole(call)
    for T, B in SIZES:
        input = torch.randn(T, B, INPUT)
        close(compiled(input, weights, 0.25), call(input, weights, 0.25))
    assert graphs.traced == ["layer.default"]
    torch._dynamo.reset()
    for rate in (0.25, 0.5):  # each rate has a graph
        with torch._dynamo.config.patch(error_on_recompile=False):
            close(compiled(input, weights, rate), call(input, weights, rate))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_itself(name: str) -> None:
    """Without marked dynamic sizes: the second call makes them dynamic, and later ones reuse its graph."""
    weights = [nn.Parameter(w.detach()) for w in getattr(nn, name)(INPUT, HIDDEN)._flat_weights]
    graphs = Graphs()
    compiled = torch.compile(FUNCTIONS[name], backend=graphs, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for T, B in [(6, 7), (9, 8), (11, 10), (5, 12)]:
            input = torch.randn(T, B, INPUT)
            close(compiled(input, weights), FUNCTIONS[name](input, weights))
    assert graphs.count == 2
    assert graphs.traced == ["layer.default"]


def test_packed() -> None:
    model = Computed("lstm_deep")
    compiled, graphs = whole(model)
    for B in (7, 8):
        input, hx, _ = packed(model.like[0], B)
        found = []
        for call in (compiled, model):
            output, states = call(input, hx)
            assert isinstance(output, PackedSequence)
            found.append([output.data, *states])
        close(*found)
    assert graphs.traced == ["layer.default"] * model.layers


def test_vmap() -> None:
    """vmap over an ensemble's weights inside a compiled function runs torch's operations, as in eager mode."""
    weights = [torch.randn(2, *w.shape) * 0.3 for w in Computed("gru").weights]
    input = torch.randn(6, 7, INPUT)

    def ensemble(*weights: Tensor) -> Tensor:
        output: Tensor = torch.vmap(lambda *w: functional.gru(input, w)[0])(*weights)
        return output

    compiled, graphs = whole(ensemble)
    close(compiled(*weights), torch.stack([functional.gru(input, [w[i] for w in weights])[0] for i in range(2)]))
    assert graphs.traced == []


def test_errors() -> None:
    weights = [w.detach() for w in Computed("gru").weights]
    input = torch.randn(6, 7, INPUT)

    def call(input: Tensor, weights: list[Tensor], **options: Any) -> Any:
        return functional.gru(input, weights, **options)

    for changed, options, text in [
        (weights[:-1], {}, "expected weights"),
        (weights, {"zoneout": 1.5}, "zoneout should be a number in range"),
        (weights, {"zoneouts": 0.5}, "unexpected keyword argument 'zoneouts'"),
    ]:
        torch._dynamo.reset()
        with pytest.raises(Exception, match=text):
            torch.compile(call, backend="eager", fullgraph=True)(input, changed, **options)


def test_inductor() -> None:
    model = Computed("gru")
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for T, B in SIZES[1:]:
        input, hx, options = drawn(model.like[0], T, B)
        same(compiled, model, input, hx, resets=options["resets"])
    torch._dynamo.reset()
    with torch.no_grad():
        close(compiled.eval()(input), model.eval()(input))
