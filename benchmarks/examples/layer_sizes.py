"""Layers of different sizes: four RNNs in a row, each with its own h0, on the sentiment data.

The layers of one RNN(..., num_layers=4) all have the same size. To give each its own, stack
four RNNs of one layer: the outputs of one are the inputs of the next.
"""

from types import ModuleType

import torch
from torch import Tensor, nn

from sentiment import NUM_CLASSES, NUM_FEATURES, sentence_labels, sentiment_example
from training import command_line, run_examples

HIDDEN_SIZES = (256, 156, 512, 512)


class LayerSizes(nn.Module):
    def __init__(self, library: ModuleType) -> None:
        super().__init__()
        input_sizes = (NUM_FEATURES, *HIDDEN_SIZES[:-1])
        self.layers = nn.ModuleList(
            library.RNN(input_size, hidden_size)
            for input_size, hidden_size in zip(input_sizes, HIDDEN_SIZES, strict=True)
        )
        self.linear = nn.Linear(HIDDEN_SIZES[-1], NUM_CLASSES)

    def forward(self, sentences: Tensor) -> Tensor:
        outputs = sentences  # (time, batch, features)
        for layer, hidden_size in zip(self.layers, HIDDEN_SIZES, strict=True):
            h0 = torch.zeros(1, sentences.size(1), hidden_size)
            outputs, _ = layer(outputs, h0)
        return self.linear(outputs[-1])  # (batch, classes)


EXAMPLES = [sentiment_example("layer_sizes", LayerSizes, sentence_labels)]

if __name__ == "__main__":
    run_examples(EXAMPLES, command_line(__doc__).parse_args())
