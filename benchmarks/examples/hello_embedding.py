"""heelo -> ohlol and hello -> world with letters embedded, not one-hot, and an output layer.

An Embedding learns a vector for each letter, two RNN layers read the vectors, and a Linear layer
scores the letters, so the hidden size does not depend on the size of the alphabet. Here the batch
comes first: tensors are (batch, time, feature), though states stay (layers, batch, hidden).

The tutorial of heelo -> ohlol means "hello" but spells its input h-e-e-l-o; the slip is kept, so
that the losses can be compared with the printed ones.
"""

from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from training import command_line, run_examples
from words import letter_indices, word_example

HIDDEN_SIZE = 8
NUM_LAYERS = 2


class EmbeddingRNN(nn.Module):
    def __init__(self, library: ModuleType, num_letters: int, embedding_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_letters, embedding_size)
        self.rnn = library.RNN(embedding_size, HIDDEN_SIZE, NUM_LAYERS, batch_first=True)
        self.linear = nn.Linear(HIDDEN_SIZE, num_letters)

    def forward(self, letters: Tensor) -> Tensor:
        hidden = torch.zeros(NUM_LAYERS, letters.size(0), HIDDEN_SIZE)
        output, _ = self.rnn(self.embedding(letters), hidden)
        return self.linear(output).flatten(0, 1)  # (batch * time, letters)


EXAMPLES = [
    word_example(
        "hello_embedding",
        build=partial(EmbeddingRNN, num_letters=4, embedding_size=10),
        word="heelo",
        answer="ohlol",
        alphabet="ehlo",
        inputs=letter_indices("heelo", "ehlo").unsqueeze(0),  # (batch, time) = (1, 5)
        learning_rate=0.05,
        epochs=15,
    ),
    word_example(
        "world_embedding",
        build=partial(EmbeddingRNN, num_letters=7, embedding_size=16),
        word="hello",
        answer="world",
        alphabet="ehlowrd",
        inputs=letter_indices("hello", "ehlowrd").unsqueeze(0),
        learning_rate=0.1,
        epochs=20,
    ),
]

if __name__ == "__main__":
    run_examples(EXAMPLES, command_line(__doc__).parse_args())
