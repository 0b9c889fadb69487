"""heelo -> ohlol with RNN: the model of hello_cell.py with the loop over time left to the layer.

The tutorial this follows means "hello" but spells its input h-e-e-l-o; the slip is kept, so that
the losses can be compared with the printed ones.
"""

from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from training import command_line, run_examples
from words import one_hot_letters, word_example

LETTERS = "ehlo"
WORD = "heelo"


class LetterRNN(nn.Module):
    """The hidden state has one number for each letter: the letter's score."""

    def __init__(self, library: ModuleType, num_letters: int) -> None:
        super().__init__()
        self.rnn = library.RNN(input_size=num_letters, hidden_size=num_letters, num_layers=1)

    def forward(self, letters: Tensor) -> Tensor:
        _, batch, num_letters = letters.shape
        hidden = torch.zeros(1, batch, num_letters)
        output, _ = self.rnn(letters, hidden)
        return output.reshape(-1, num_letters)  # (time * batch, letters)


EXAMPLES = [
    word_example(
        "hello_rnn",
        build=partial(LetterRNN, num_letters=len(LETTERS)),
        word=WORD,
        answer="ohlol",
        alphabet=LETTERS,
        inputs=one_hot_letters(WORD, LETTERS).unsqueeze(1),  # (time, batch, letters) = (5, 1, 4)
        learning_rate=0.05,
        epochs=25,
    )
]

if __name__ == "__main__":
    run_examples(EXAMPLES, command_line(__doc__).parse_args())
