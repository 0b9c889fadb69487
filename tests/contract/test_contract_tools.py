"""TorchScript, fx, quantisation and torch.func's gradients work as with torch.nn.

torch.compile, export, ONNX and torch.nn.utils are tested in compose/.
"""

import copy

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
    arguments,
    close,
    each_module,
    each_precision,
    loss,
    pair,
    reloaded,
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
def test_quantisation_leaves_the_module_working(name):
    expected, actual, input = models(name)
    kinds = {nn.Linear, *(getattr(nn, kind) for kind in ("LSTM", "GRU", *CELLS))}
    quantised = torch.ao.quantization.quantize_dynamic(actual, kinds)
    assert not isinstance(quantised.before, nn.Linear)
    torch.testing.assert_close(quantised(input), expected(input), rtol=0.1, atol=0.1)


@each_module
@each_precision
def test_functional_gradients(key, dtype):
    expected, actual = pair(key, dtype)
    input, hx = arguments(actual)

    def found(module):
        def value(parameters, input):
            return loss(torch.func.functional_call(module, parameters, (input, hx)))

        by_parameter, by_input = torch.func.grad(value, (0, 1))(dict(module.named_parameters()), input)
        return [*by_parameter.values(), by_input]

    close(found(actual), found(expected), grad=True)
