"""A tour of RNNCell: one time step per call, and the loop that makes it equal to RNN.

RNNCell computes a single time step, so the loop over the sequence and the passing on of the hidden
state are written by hand. RNN is that loop: given the same weights it returns the same values.
"""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from training import Tour, command_line, walk_tour


def walk(library: ModuleType) -> Iterator[tuple[str, Tensor]]:
    yield from step_by_step(library)
    yield from cell_against_layer(library)


def step_by_step(library: ModuleType) -> Iterator[tuple[str, Tensor]]:
    cell = library.RNNCell(input_size=4, hidden_size=2)
    sequence = torch.randn(3, 1, 4)  # (time, batch, feature)
    hidden = torch.zeros(1, 2)  # (batch, hidden)
    for time, features in enumerate(sequence):
        hidden = cell(features, hidden)
        yield f"RNNCell(4, 2), hidden state at time {time}", hidden


def cell_against_layer(library: ModuleType) -> Iterator[tuple[str, Tensor]]:
    cell = library.RNNCell(input_size=100, hidden_size=200)
    parameters = sum(parameter.numel() for parameter in cell.parameters())
    yield "RNNCell(100, 200), number of parameters", torch.tensor(parameters)

    sequence = torch.randn(6, 5, 100)
    hidden = torch.zeros(5, 200)
    outputs = []
    for features in sequence:
        hidden = cell(features, hidden)
        outputs.append(hidden)
    outputs = torch.stack(outputs)
    yield "RNNCell(100, 200), outputs of 6 steps", outputs

    layer = library.RNN(input_size=100, hidden_size=200)
    # RNN numbers its layers, hence weight_ih of the cell is weight_ih_l0 of the layer.
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    layer_outputs, last_hidden = layer(sequence)
    yield "RNN(100, 200) with the same weights, outputs", layer_outputs
    yield "RNN(100, 200) with the same weights, last state", last_hidden
    yield "largest difference between the two", (outputs - layer_outputs).abs().max()


TOUR = Tour("cell_tour", walk)

if __name__ == "__main__":
    walk_tour(TOUR, command_line(__doc__).parse_args())
