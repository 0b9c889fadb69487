"""TorchScript, fx, export, compile, ONNX, quantisation, functorch and optimisers work as with torch.nn."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_rnn
from contract import (
    CELLS,
    HIDDEN,
    INPUT,
    NAMES,
    SEQUENCES,
    allowed_error,
    arguments,
    close,
    each_cell,
    each_module,
    each_sequence,
    gradients,
    loss,
    one_of_each,
    pair,
    reloaded,
    same_outcome,
    tensors,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
each_name = pytest.mark.parametrize("name", NAMES)
each_sequence_name = pytest.mark.parametrize("name", SEQUENCES)


class Tagger(nn.Module):
    """A typical user's model: a linear layer, the module, another linear layer."""

    def __init__(self, library, name, **options):
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(INPUT, INPUT)
        self.rnn = getattr(library, name)(INPUT, HIDDEN, **options)
        self.after = nn.Linear(HIDDEN, 2)

    def forward(self, input):
        return self.after(self.rnn(self.before(input))[0])


class CellTagger(Tagger):
    def forward(self, input):
        return self.after(self.rnn(self.before(input)))


class LSTMCellTagger(Tagger):
    def forward(self, input):
        return self.after(self.rnn(self.before(input))[0])


class PackedTagger(Tagger):
    def forward(self, input: PackedSequence) -> torch.Tensor:
        output, _ = self.rnn(input)
        return self.after(output.data)


def models(name, **options):
    """torch.nn's model, ours, and an input for both."""
    cell = {"LSTMCell": LSTMCellTagger}.get(name, CellTagger)
    kind = cell if name in CELLS else Tagger
    shape = (4, INPUT) if name in CELLS else (6, 4, INPUT)
    input = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)
    return kind(nn, name, **options), kind(fused_rnn, name, **options), input


@each_name
def test_script(name):
    expected, actual, input = models(name)
    scripted = torch.jit.script(actual)
    for program in (scripted, reloaded(scripted), torch.jit.freeze(scripted.eval())):
        close(program(input), expected(input))
    close(actual(input), expected(input))


@each_sequence_name
def test_script_packed(name):
    expected, actual = PackedTagger(nn, name), PackedTagger(fused_rnn, name)
    packed = pack_sequence([torch.randn(n, INPUT) for n in (3, 6, 1)], enforce_sorted=False)
    scripted = torch.jit.script(actual)
    for program in (scripted, reloaded(scripted)):
        close(program(packed), expected(packed))


@each_name
@pytest.mark.parametrize("training", [False, True])
def test_trace(name, training):
    expected, actual, input = models(name)
    traced = torch.jit.trace(actual.train(training), input)
    longer = torch.cat([input] * 2)
    wider = torch.cat([input] * 3, 1) if input.dim() == 3 else torch.cat([input] * 3)
    programs = [traced, reloaded(traced)]
    if not training:
        programs.append(torch.jit.freeze(torch.jit.trace(actual, input)))
    for program in programs:
        for other in (input, longer, wider):
            close(program(other), expected(other))


@pytest.mark.parametrize(("name", "operator"), [("RNN", "rnn_tanh"), ("LSTM", "lstm"), ("GRU", "gru")])
def test_trace_records_one_operator(name, operator):
    _, actual, input = models(name)
    traced = torch.jit.trace(actual, input)
    assert str(traced.inlined_graph).count(f"aten::{operator}(") == 1


@each_name
def test_fx_node(name):
    """One call_module node: the module is a leaf like torch.nn's."""
    expected, actual, input = models(name)
    traced = torch.fx.symbolic_trace(actual)
    assert ("call_module", "rnn") in [(node.op, node.target) for node in traced.graph.nodes]
    close(traced(input), expected(input))
    close(copy.deepcopy(traced)(input), expected(input))


@each_name
@pytest.mark.parametrize("strict", [False, True])
def test_export(name, strict):
    expected, actual, input = models(name)
    batch = 1 if input.dim() == 3 else 0
    shapes = ({batch: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(actual, (input,), dynamic_shapes=shapes, strict=strict)
    wider = torch.cat([input] * 2, batch)
    for other in (input, wider):
        close(program.module()(other), expected(other))
    close(program.run_decompositions().module()(wider), expected(wider))


@each_name
def test_compile(name):
    expected, actual, input = models(name)
    torch._dynamo.reset()
    compiled = torch.compile(actual, backend="aot_eager")
    close(compiled(input), expected(input))
    close(gradients(compiled, input), gradients(expected, input), grad=True)


@each_sequence_name
def test_full_graph(name):
    """Raises as for torch.nn or gives correct results; with allow_rnn always correct results."""
    expected, actual, input = models(name)
    torch._dynamo.reset()
    whole = [torch.compile(m, backend="aot_eager", fullgraph=True) for m in (expected, actual)]
    same_outcome(*whole, input)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        close(whole[1](input), expected(input))
        close(gradients(whole[1], input), gradients(expected, input), grad=True)


@pytest.mark.parametrize("name", CELLS)
def test_full_graph_cells(name):
    expected, actual, input = models(name)
    torch._dynamo.reset()
    compiled = torch.compile(actual, backend="aot_eager", fullgraph=True)
    close(compiled(input), expected(input))
    close(gradients(compiled, input), gradients(expected, input), grad=True)


@each_sequence_name
def test_onnx(name):
    onnx = pytest.importorskip("onnx", reason="torch.onnx.export needs the package onnx")
    _, actual, input = models(name)
    file = io.BytesIO()
    torch.onnx.export(actual.eval(), (input,), file, dynamo=False)
    graph = onnx.load_from_string(file.getvalue()).graph
    assert [node.op_type for node in graph.node].count(name) == 1


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_onnx_from_export(name):
    pytest.importorskip("onnxscript", reason="the dynamo exporter needs the package onnxscript")
    _, actual, input = models(name)
    program = torch.onnx.export(actual.eval(), (input,), dynamo=True, verbose=False)
    assert [node.op_type for node in program.model.graph].count(name) == 1


QUANTISABLE = ("LSTM", "GRU", *CELLS)


@pytest.mark.parametrize("name", QUANTISABLE)
def test_dynamic_quantisation(name):
    """A documented difference: it goes by exact class and so needs to_torch() first."""
    expected, actual, input = models(name)
    wanted = torch.ao.quantization.quantize_dynamic(expected, {nn.Linear, type(expected.rnn)})
    actual.rnn = actual.rnn.to_torch()
    quantised = torch.ao.quantization.quantize_dynamic(actual, {nn.Linear, type(expected.rnn)})
    assert type(quantised.rnn) is type(wanted.rnn) is not type(expected.rnn)
    close(quantised(input), wanted(input))


@each_name
def test_quantisation_leaves_the_module_working(name):
    expected, actual, input = models(name)
    kinds = {nn.Linear, *(getattr(nn, kind) for kind in QUANTISABLE)}
    quantised = torch.ao.quantization.quantize_dynamic(actual, kinds)
    assert not isinstance(quantised.before, nn.Linear)
    torch.testing.assert_close(quantised(input), expected(input), rtol=0.1, atol=0.1)


@each_module
def test_functional_gradients(key):
    expected, actual = pair(key)
    args = arguments(actual)

    def per_parameter(module):
        def value(parameters):
            return loss(torch.func.functional_call(module, parameters, args))

        return list(torch.func.grad(value)(dict(module.named_parameters())).values())

    close(per_parameter(actual), per_parameter(expected), grad=True)


@one_of_each
def test_jacobians(key):
    expected, actual = pair(key, torch.float64)
    input, hx = arguments(actual, time=2, batch=2)
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):

        def found(module, transform=transform):
            return transform(lambda x: tensors(module(x, hx))[0].sum(-1))(input)

        same_outcome(lambda found=found: found(expected), lambda found=found: found(actual))


@each_cell
def test_vmap_over_cells(key):
    expected, actual = pair(key)
    input, hx = arguments(actual)
    in_dims = (0, (0, 0) if isinstance(hx, tuple) else 0)
    with allowed_error(torch.func.vmap(expected, in_dims), input, hx):
        close(torch.func.vmap(actual, in_dims)(input, hx), expected(input, hx))


@each_sequence
@pytest.mark.parametrize("batched", [False, True])
def test_vmap_over_sequences(key, batched):
    """torch.nn raises; a result must equal a loop's."""
    expected, actual = pair(key)
    inputs = torch.stack([arguments(actual, seed=seed)[0] for seed in (1, 2, 3)])
    if not batched:
        inputs = inputs[:, :, 0]
    with allowed_error(torch.func.vmap(expected), inputs):
        results = torch.func.vmap(actual)(inputs)
        rows = [tensors(expected(input)) for input in inputs]
        close(results, [torch.stack(column) for column in zip(*rows, strict=True)])


OPTIMISERS = {
    "sgd_foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


@one_of_each
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_optimisers(key, optimiser):
    expected, actual = pair(key, torch.float64)
    args = arguments(actual)
    for module in (expected, actual):
        optimizer = OPTIMISERS[optimiser](module.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            loss(module(*args)).square().backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
    close(list(actual.parameters()), list(expected.parameters()))
    close(actual(*args), expected(*args))


@each_module
def test_averaged_model_and_vectors(key):
    expected, actual = pair(key)
    args = arguments(actual)
    averages = [torch.optim.swa_utils.AveragedModel(m) for m in (expected, actual)]
    for module, average in zip((expected, actual), averages, strict=True):
        for seed in (1, 2):
            torch.manual_seed(seed)
            module.reset_parameters()
            average.update_parameters(module)
    close(averages[1](*args), averages[0](*args))
    vector = nn.utils.parameters_to_vector(actual.parameters())
    nn.utils.vector_to_parameters(vector * 2, actual.parameters())
    nn.utils.vector_to_parameters(vector * 2, expected.parameters())
    close(actual(*args), expected(*args))
