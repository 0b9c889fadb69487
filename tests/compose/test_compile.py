"""torch.compile of models: fused operators in whole graphs, compiled once for all lengths and batches, eager's results.

Most tests avoid inductor, whose C++ code is slow to build: they run the graph that AOTAutograd differentiated. All
sizes of a call differ, because the compiler assumes that sizes which are equal in its first call always are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from contract import CELL_MODULES, CELLS, MODULES, NAMES, SEQUENCES, allowed_error, arguments, close, pair, tensors

INPUT, HIDDEN = 3, 5
SIZES = [(6, 7), (9, 7), (11, 8)]  # T, B


@pytest.fixture(autouse=True)
def one_compiler() -> Iterator[None]:
    """Compile in every test anew, fail on recompilation, and allow recurrent modules in graphs."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True, error_on_recompile=True):
        yield


class Graphs:
    """A backend that records the fused operators as traced, and in forward and backward after AOTAutograd."""

    def __init__(self, differentiated: bool = True) -> None:
        self.differentiated = differentiated
        self.traced: list[str] = []
        self.forward: list[str] = []
        self.backward: list[str] = []
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        def keeps(where: str) -> Any:
            def compiler(graph: Any, _: Any) -> Any:
                setattr(self, where, fused(graph))
                return make_boxed_func(graph)

            return compiler

        self.count += 1
        self.traced = fused(graph)
        if not self.differentiated:
            return graph
        return aot_autograd(fw_compiler=keeps("forward"), bw_compiler=keeps("backward"))(graph, inputs)


def fused(graph: Any) -> list[str]:
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [target.removeprefix("fused_rnn.") for target in targets if target.startswith("fused_rnn.")]


def whole(model: Any, differentiated: bool = True) -> tuple[Any, Graphs]:
    graphs = Graphs(differentiated)
    return torch.compile(model, backend=graphs, fullgraph=True, dynamic=True), graphs


class Model(nn.Module):
    """A model around a recurrent module, which passes all arguments on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(INPUT, INPUT)
        self.rnn = module

    def forward(self, input: Tensor, hx: Any = None, **options: Any) -> Any:
        return self.rnn(self.before(input), hx, **options)


def built(key: str, **options: Any) -> Model:
    torch.manual_seed(0)
    name, changes = MODULES[key]
    return Model(getattr(fused_rnn, name)(INPUT, HIDDEN, **changes, **options))


def drawn(module: nn.RNNBase, T: int, B: int) -> tuple[Tensor, Any, dict[str, Any]]:
    """Random input, hx, and one value for each keyword of forward."""
    generator = torch.Generator().manual_seed(100 * T + B)
    rows = module.num_layers * (2 if module.bidirectional else 1)

    def state(*lead: int) -> Any:
        states = [
            torch.randn(*lead, size, generator=generator, requires_grad=True) for size in module._spec().state_sizes
        ]
        return tuple(states) if len(states) == 2 else states[0]

    def sequence(values: Tensor) -> Tensor:
        return values.transpose(0, 1) if module.batch_first else values

    input = sequence(torch.randn(T, B, INPUT, generator=generator)).requires_grad_()
    options = {
        "resets": sequence(torch.rand(T, B, generator=generator) < 0.3),
        "learned": state(rows, 1),
        "of_steps": state(T, rows, B),
        "lengths": torch.randint(0, T + 1, (B,), generator=generator),
    }
    return input, state(rows, B), options


def same(compiled: Any, model: Any, *args: Any, **options: Any) -> None:
    """Assert that the compiled model's results and gradients equal the eager model's."""
    wanted = [t for t in tensors([*args, *options.values()]) if t.requires_grad] + list(model.parameters())
    found = []
    for call in (compiled, model):
        results = tensors(call(*args, **options))
        loss = sum((t * t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in results)
        grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        found.append((results, grads))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1], grad=True)


@pytest.mark.parametrize("key", [key for key in MODULES if key not in CELL_MODULES])
def test_sequences(key: str) -> None:
    model = built(key)
    compiled, graphs = whole(model)
    for T, B in SIZES:
        input, hx, _ = drawn(model.rnn, T, B)
        same(compiled, model, input, hx)
    layers = model.rnn.num_layers
    assert graphs.traced == ["layer.default"] * layers
    assert graphs.forward == ["forward.default"] * layers
    assert graphs.backward == ["backward.default"] * layers


@pytest.mark.slow("torch.compile takes seconds a case")
@pytest.mark.parametrize("key", ["rnn_deep", "lstm", "gru"])
def test_zero_states_unbatched_and_inference(key: str) -> None:
    model = built(key)
    for shape in [(6, 7, INPUT), (6, INPUT)]:
        torch._dynamo.reset()
        compiled, graphs = whole(model)
        for T in (6, 9):
            same(compiled, model, torch.randn(T, *shape[1:]))
        assert len(graphs.traced) == model.rnn.num_layers
    torch._dynamo.reset()
    compiled, graphs = whole(model)
    with torch.no_grad():
        for T, B in SIZES:
            input = torch.randn(T, B, INPUT)
            close(compiled(input), model(input))
    assert graphs.forward == ["forward.default"] * model.rnn.num_layers


EXTRAS = [  # module, keywords, whether to pass initial states
    ("gru", "resets", True),
    ("lstm_proj", "resets learned", True),
    ("rnn_relu", "resets of_steps", True),
    ("rnn_deep", "lengths", True),
    ("lstm", "lengths", False),
    ("lstm", "lengths resets", True),
    ("rnn_relu", "lengths resets", False),
    ("rnn_tanh", "lengths resets learned", False),
    ("gru", "lengths resets of_steps", True),
]


@pytest.mark.slow("torch.compile takes seconds a case")
@pytest.mark.parametrize(("key", "names", "given"), EXTRAS)
def test_resets_lengths_and_the_states_of_every_step(key: str, names: str, given: bool) -> None:
    model = built(key)
    compiled, graphs = whole(model)
    for T, B in SIZES[1:]:
        input, hx, values = drawn(model.rnn, T, B)
        options = {"reset_state" if name in ("learned", "of_steps") else name: values[name] for name in names.split()}
        same(compiled, model, input, hx if given else None, **options, return_state_sequence=True)
    assert graphs.traced == ["layer.default"] * model.rnn.num_layers
    assert graphs.backward == ["backward.default"] * model.rnn.num_layers


@pytest.mark.parametrize("training", [True, False])
def test_dropout(training: bool) -> None:
    model = built("lstm_deep", dropout=0.5).train(training)
    compiled, _ = whole(model)
    input, hx, _ = drawn(model.rnn, *SIZES[0])
    results = []
    for call in (compiled, model):
        torch.manual_seed(3)
        results.append(call(input, hx))
    close(*results)


VARIANTS = dict(layer_norm=True, zoneout=0.2, recurrent_dropout=0.3, weight_dropout=0.2, dropout=0.1, recompute="full")


@pytest.mark.slow("torch.compile takes seconds a case")
@pytest.mark.parametrize("key", ["lstm", "gru_deep"])
def test_variants(key: str) -> None:
    model = built(key, **VARIANTS)
    compiled, graphs = whole(model.eval())
    for T, B in SIZES[1:]:
        input, hx, options = drawn(model.rnn, T, B)
        same(compiled, model, input, hx, resets=options["resets"])
    assert graphs.traced == ["layer.default"] * model.rnn.num_layers
    torch._dynamo.reset()
    compiled, graphs = whole(model.train())
    found = []
    for call in (compiled, model):
        torch.manual_seed(3)  # the same masks
        found.append(call(input, hx))
    close(*found)
    assert graphs.traced == ["layer.default"] * model.rnn.num_layers


def test_layers_of_different_sizes() -> None:
    torch.manual_seed(0)
    model = Model(fused_rnn.GRU(INPUT, (HIDDEN, 2 * HIDDEN), num_layers=2))
    compiled, graphs = whole(model)
    for T, B in SIZES[1:]:
        same(compiled, model, torch.randn(T, B, INPUT))
    assert graphs.traced == ["layer.default"] * 2


def packed(module: nn.RNNBase, B: int) -> tuple[PackedSequence, Any, list[Tensor]]:
    """A random unsorted batch, its initial states, and the tensors that may need gradients."""
    _, hx, _ = drawn(module, 9, B)
    lengths = torch.randperm(9)[:B] + 1
    batch = pack_padded_sequence(torch.randn(9, B, INPUT), lengths, enforce_sorted=False)
    batch.data.requires_grad_()
    return batch, hx, [batch.data, *tensors(hx)]


@pytest.mark.slow("torch.compile takes seconds a case")
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("key", ["rnn_relu", "lstm_proj", "gru"])
def test_packed(key: str, given: bool) -> None:
    """A PackedSequence passes through a whole graph; torch.nn's modules raise, because they compare its sizes."""
    module = built(key).rnn
    compiled, graphs = whole(lambda *arguments: module(*arguments))
    for B in (7, 8):
        input, hx, wanted = packed(module, B)
        found = []
        for call in (compiled, module):
            output, states = call(input, hx) if given else call(input)
            assert isinstance(output, PackedSequence)
            grads = torch.autograd.grad(output.data.square().sum(), wanted, allow_unused=not given)
            found.append(([output.data, states], [g for g in grads if g is not None]))
        close(found[0][0], found[1][0])
        close(found[0][1], found[1][1], grad=True)
    assert graphs.traced == ["layer.default"] * module.num_layers


@pytest.mark.slow("torch.compile takes seconds a case")
@pytest.mark.parametrize("name", SEQUENCES)
def test_a_module_itself(name: str) -> None:
    """Without a model around it and without marked dynamic sizes: two graphs for any number of lengths."""
    module = getattr(fused_rnn, name)(INPUT, HIDDEN)
    graphs = Graphs()
    compiled = torch.compile(module, backend=graphs, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for T, B in [(6, 7), (9, 8), (11, 10), (5, 12)]:
            input = torch.randn(T, B, INPUT)
            close(compiled(input), module(input))
    assert graphs.count == 2
    assert graphs.traced == ["layer.default"]


@pytest.mark.slow("torch.compile takes seconds a case")
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", ["rnn_tanh", "lstm", "lstm_proj", "gru_deep", "lstm_cell", "gru_cell"])
def test_autocast(key: str, half: torch.dtype) -> None:
    """Dtypes and values equal eager's, with autocast around the compiled model and inside it."""
    if cell := key in CELL_MODULES:
        _, model = pair(key, sizes=(INPUT, HIDDEN))
    else:
        model = built(key).rnn

    def inside(*args: Tensor) -> Any:
        with torch.autocast("cpu", half):
            return model(*args)

    compiled, graphs = whole(model)
    for T, B in SIZES[1:]:
        input = torch.randn((B, INPUT) if cell else (T, B, INPUT), requires_grad=True)
        found = []
        for call in (compiled, model):
            with torch.autocast("cpu", half):
                results = tensors(call(input))
            loss = sum(t.double().square().sum() for t in results)
            found.append((results, torch.autograd.grad(loss, [input, *model.parameters()])))
        close(found[0][0], found[1][0])
        close(found[0][1], found[1][1], grad=True)
    assert graphs.traced == ["layer.default"] * getattr(model, "num_layers", 1)
    torch._dynamo.reset()
    compiled, graphs = whole(inside)
    close(compiled(input), inside(input))
    assert graphs.traced == ["layer.default"] * getattr(model, "num_layers", 1)


@pytest.mark.parametrize("key", ["lstm", "gru"])
def test_autocast_with_keywords_and_variants(key: str) -> None:
    model = built(key, layer_norm=True, zoneout=0.2).eval()
    compiled, graphs = whole(model)
    for T, B in SIZES[1:]:
        input, hx, values = drawn(model.rnn, T, B)
        with torch.autocast("cpu", torch.bfloat16):
            same(compiled, model, input, hx, resets=values["resets"], lengths=values["lengths"])
    assert graphs.traced == ["layer.default"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = built("gru_deep").to(dtype)
    compiled, graphs = whole(model)
    input = torch.randn(4, 6, INPUT, dtype=dtype, requires_grad=True)
    same(compiled, model, input)
    assert graphs.backward == ["backward.default"] * 2


@pytest.mark.parametrize("name", SEQUENCES)
def test_without_the_switch(name: str) -> None:
    """The graph breaks at the module, as at torch.nn's, and the module runs eagerly; so it does inside `patched`."""
    models = [Model(getattr(library, name)(INPUT, HIDDEN)) for library in (nn, fused_rnn)]
    models[1].load_state_dict(models[0].state_dict())
    counts = []
    for model, context in zip([*models, models[0]], [nullcontext(), nullcontext(), fused_rnn.patched()], strict=True):
        with context, torch._dynamo.config.patch(allow_rnn=False):
            torch._dynamo.reset()
            graphs = Graphs()
            input = torch.randn(6, 7, INPUT, requires_grad=True)
            same(torch.compile(model, backend=graphs), model, input)
            counts.append(graphs.count)
            torch._dynamo.reset()
            with pytest.raises(torch._dynamo.exc.Unsupported, match="allow_rnn"):
                torch.compile(model, backend="eager", fullgraph=True)(input)
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.slow("torch.compile takes seconds a case")
@pytest.mark.parametrize("name", SEQUENCES)
def test_without_the_switch_nothing_inside_is_compiled(name: str) -> None:
    module = getattr(fused_rnn, name)(INPUT, HIDDEN)

    def call(input: Tensor, hx: Any, resets: Tensor) -> Any:
        of_steps = module.step(input[0], hx), module.step(input[0], hx, active=resets[0])
        return module(input, hx), module(input, hx, resets=resets), *of_steps

    input, hx, values = drawn(module, 6, 7)
    clear_compilation_metrics()
    with torch._dynamo.config.patch(allow_rnn=False):
        compiled = torch.compile(call, backend="eager")
        close(compiled(input, hx, values["resets"]), call(input, hx, values["resets"]))
    ours = [of for of in get_compilation_metrics() if str(Path(fused_rnn.__file__).parent) in of.co_filename]
    assert {of.co_name for of in ours} <= {"forward", "step"}  # only these are attempted
    assert all(of.fail_type for of in ours)


@pytest.mark.parametrize("name", NAMES)
def test_patched(name: str) -> None:
    """Inside `patched`, torch.nn's own classes compile to the fused operators; cells do without the switch."""
    torch.manual_seed(0)
    module = getattr(nn, name)(INPUT, HIDDEN)
    args = arguments(module)
    wanted = module(*args)
    with fused_rnn.patched(), torch._dynamo.config.patch(allow_rnn=name not in CELLS):
        compiled, graphs = whole(module)
        close(compiled(*args), wanted)
    assert graphs.traced == ["layer.default"]


def test_what_torch_computes() -> None:
    """Calls outside the kernels' scope contain no fused operator when compiled, either."""
    model = built("gru")
    input = torch.randn(6, 7, INPUT)
    for change in ("backend", "complex"):
        torch._dynamo.reset()
        compiled, graphs = whole(model, differentiated=False)  # torch.nn's operator unrolls the steps
        if change == "backend":
            model.rnn.backend = "torch"
            close(compiled(input), model(input))
            model.rnn.backend = "auto"
        else:
            model.to(torch.complex64)
            with allowed_error(model, input.to(torch.complex64)):
                close(compiled(input.to(torch.complex64)), model(input.to(torch.complex64)))
        assert graphs.traced == []


def test_errors() -> None:
    model = built("lstm")
    compiled, _ = whole(model)
    wrong = torch.randn(6, 7, INPUT + 1)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        torch.compile(model.rnn, backend="eager", dynamic=True)(wrong)
    compiled(torch.randn(6, 7, INPUT))  # the failure leaves the compiled model usable


def test_vmap() -> None:
    """Inside a compiled function, too, cells under vmap run torch.nn's operations."""
    _, cell = pair("gru_cell", sizes=(INPUT, HIDDEN))
    input, h = torch.randn(7, INPUT), torch.randn(7, HIDDEN)

    def call(input: Tensor, h: Tensor) -> Tensor:
        return torch.vmap(lambda *args: cell(*args))(input, h)

    compiled, graphs = whole(call)
    close(compiled(input, h), cell(input, h))
    assert graphs.traced == []


@pytest.mark.slow("compiles C++")
def test_inductor() -> None:
    model = built("lstm")
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for T, B in SIZES[1:]:
        input, hx, options = drawn(model.rnn, T, B)
        same(compiled, model, input, hx, resets=options["resets"])


@pytest.mark.parametrize("way", ["plain", "step", "cell", "recompute"])
def test_compiled_autograd(way: str) -> None:
    """A graph of eager calls whose backward is compiled: the nodes stay as they are."""
    options = {"recompute": "full"} if way == "recompute" else {}
    module = fused_rnn.LSTMCell(4, 5) if way == "cell" else fused_rnn.LSTM(4, 5, **options)
    x = torch.randn(3, 2, 4)
    call = {"step": lambda: module.step(x[0])[0], "cell": lambda: module(x[0])[0]}.get(way, lambda: module(x)[0])

    def gradients() -> list[Tensor]:
        module.zero_grad()
        call().square().sum().backward()
        return [weight.grad for weight in module.parameters()]

    expected = gradients()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        found = gradients()
    torch._dynamo.reset()
    assert all(map(torch.equal, found, expected))
