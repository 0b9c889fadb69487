"""hello -> ohlol with RNNCell: the smallest recurrent training, its loop over time written out.

At each of five steps the network reads a letter of "hello" and answers with a letter of "ohlol".
The four numbers of the hidden state are themselves the scores of the four letters: there is no
output layer.
"""

from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import Example, command_line, run_examples
from words import letter_indices, one_hot_letters, spell

LETTERS = "ehlo"
WORD, ANSWER = "hello", "ohlol"
EPOCHS = 15


class HelloCell(nn.Module):
    def __init__(self, library: ModuleType) -> None:
        super().__init__()
        self.cell = library.RNNCell(input_size=len(LETTERS), hidden_size=len(LETTERS))

    def forward(self, letter: Tensor, hidden: Tensor) -> Tensor:
        return self.cell(letter, hidden)


def scores_of_word(model: nn.Module) -> list[Tensor]:
    """Step through the word; the scores after each letter are (batch, letters) = (1, 4)."""
    hidden = torch.zeros(1, len(LETTERS))
    scores = []
    for letter in one_hot_letters(WORD, LETTERS):
        hidden = model(letter.unsqueeze(0), hidden)
        scores.append(hidden)
    return scores


def train(model: nn.Module) -> Iterator[float]:
    answers = letter_indices(ANSWER, LETTERS)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for scores, answer in zip(scores_of_word(model), answers, strict=True):
            loss = loss + F.cross_entropy(scores, answer.unsqueeze(0))
        loss.backward()
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def predict(model: nn.Module) -> Tensor:
    return torch.cat(scores_of_word(model)).argmax(dim=1)


EXAMPLES = [
    Example(
        name="hello_cell",
        build=HelloCell,
        train=train,
        steps=EPOCHS,
        predict=predict,
        summary=lambda model: f"{WORD} -> {spell(predict(model), LETTERS)}",
    )
]

if __name__ == "__main__":
    run_examples(EXAMPLES, command_line(__doc__).parse_args())
