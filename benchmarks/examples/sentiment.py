"""Three-class sentiment with a four-layer RNN, in three forms: last step, every step, given h0.

The tutorial shows the models without data. Here the word vectors are random, and the labels come
from a fixed random projection of them: real text would need a download, and these labels can be
learnt as well.
"""

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor, nn

from training import Example, command_line, full_batch_training, run_examples

TIME, BATCH = 3, 50
NUM_FEATURES, HIDDEN_SIZE, NUM_LAYERS, NUM_CLASSES = 100, 256, 4, 3
STEPS = 40


class SentimentRNN(nn.Module):
    """Four RNN layers of one size and a classifier; the forms differ in what they classify."""

    def __init__(self, library: ModuleType) -> None:
        super().__init__()
        self.rnn = library.RNN(NUM_FEATURES, HIDDEN_SIZE, NUM_LAYERS)
        self.linear = nn.Linear(HIDDEN_SIZE, NUM_CLASSES)


class LastStep(SentimentRNN):
    """One answer for each sentence, from the output of the last time step."""

    def forward(self, sentences: Tensor) -> Tensor:
        output, _ = self.rnn(sentences)  # (time, batch, hidden)
        return self.linear(output[-1])  # (batch, classes)


class EveryStep(SentimentRNN):
    """One answer for each word."""

    def forward(self, sentences: Tensor) -> Tensor:
        output, _ = self.rnn(sentences)
        return self.linear(output.flatten(0, 1))  # (time * batch, classes)


class GivenState(SentimentRNN):
    """One answer for each word, from a given h0. It is zero, so the losses are EveryStep's."""

    def forward(self, sentences: Tensor) -> Tensor:
        h0 = torch.zeros(NUM_LAYERS, sentences.size(1), HIDDEN_SIZE)
        output, _ = self.rnn(sentences, h0)
        return self.linear(output.flatten(0, 1))


def random_sentences() -> tuple[Tensor, Tensor]:
    """Word vectors (time, batch, features), and the score of each word for each class."""
    generator = torch.Generator().manual_seed(0)
    sentences = torch.randn(TIME, BATCH, NUM_FEATURES, generator=generator)
    projection = torch.randn(NUM_FEATURES, NUM_CLASSES, generator=generator)
    return sentences, sentences @ projection


def sentence_labels(word_scores: Tensor) -> Tensor:
    return word_scores.sum(dim=0).argmax(dim=1)


def word_labels(word_scores: Tensor) -> Tensor:
    return word_scores.flatten(0, 1).argmax(dim=1)


def sentiment_example(
    name: str,
    build: Callable[[ModuleType], nn.Module],
    labels_from: Callable[[Tensor], Tensor],
) -> Example:
    sentences, word_scores = random_sentences()
    labels = labels_from(word_scores)

    def train(model: nn.Module) -> Iterator[float]:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
        return full_batch_training(model, sentences, labels, optimizer, STEPS)

    @torch.no_grad()
    def predict(model: nn.Module) -> Tensor:
        return model(sentences).argmax(dim=1)

    def summary(model: nn.Module) -> str:
        right = (predict(model) == labels).sum().item()
        return f"{right} of {len(labels)} training labels learnt"

    return Example(name, build, train, STEPS, predict, summary)


EXAMPLES = [
    sentiment_example("sentiment_last", LastStep, sentence_labels),
    sentiment_example("sentiment_every", EveryStep, word_labels),
    sentiment_example("sentiment_h0", GivenState, word_labels),
]

if __name__ == "__main__":
    run_examples(EXAMPLES, command_line(__doc__).parse_args())
