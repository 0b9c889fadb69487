"""A tour of RNN, LSTM and GRU: the shapes that go in and come out.

The input is (time, batch, feature) and the output (time, batch, hidden). A state is
(layers, batch, hidden): it has no time axis, because it belongs to one moment, but one entry for
each layer. The state at the start is zero unless it is given; LSTM has two states, h and c.
"""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from training import Tour, command_line, walk_tour


def walk(library: ModuleType) -> Iterator[tuple[str, Tensor]]:
    yield from layer_with_one_state(library.RNN(4, 2), torch.randn(3, 1, 4))
    yield from layer_with_one_state(library.RNN(10, 20), torch.randn(3, 50, 10))
    yield from layer_with_one_state(library.RNN(10, 20, num_layers=4), torch.randn(3, 50, 10))
    yield from layer_with_one_state(library.RNN(100, 200, num_layers=3), torch.randn(6, 5, 100))
    yield from layer_with_two_states(library.LSTM(100, 200, num_layers=2), torch.randn(10, 3, 100))
    yield from layer_with_one_state(library.GRU(10, 20), torch.randn(3, 32, 10))


def layer_with_one_state(layer: torch.nn.Module, inputs: Tensor) -> Iterator[tuple[str, Tensor]]:
    name = describe(layer)
    output, hidden = layer(inputs)
    yield f"{name}, input", inputs
    yield f"{name}, output", output
    yield f"{name}, last state", hidden
    output, hidden = layer(inputs, torch.randn_like(hidden))
    yield f"{name}, given state: output", output
    yield f"{name}, given state: last state", hidden


def layer_with_two_states(layer: torch.nn.Module, inputs: Tensor) -> Iterator[tuple[str, Tensor]]:
    name = describe(layer)
    output, (hidden, cell) = layer(inputs)
    yield f"{name}, input", inputs
    yield f"{name}, weight_hh_l0 (four gates stacked)", layer.weight_hh_l0
    yield f"{name}, output", output
    yield f"{name}, last h", hidden
    yield f"{name}, last c", cell
    output, (hidden, cell) = layer(inputs, (torch.randn_like(hidden), torch.randn_like(cell)))
    yield f"{name}, given states: output", output
    yield f"{name}, given states: last h", hidden
    yield f"{name}, given states: last c", cell


def describe(layer: torch.nn.Module) -> str:
    sizes = f"{layer.input_size}, {layer.hidden_size}"
    if layer.num_layers > 1:
        sizes += f", {layer.num_layers}"
    return f"{type(layer).__name__}({sizes})"


TOUR = Tour("shapes_tour", walk)

if __name__ == "__main__":
    walk_tour(TOUR, command_line(__doc__).parse_args())
