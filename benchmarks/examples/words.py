"""Shared by the hello examples: words as tensors, and training from one word to another."""

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import Example, full_batch_training


def letter_indices(word: str, alphabet: str) -> Tensor:
    return torch.tensor([alphabet.index(letter) for letter in word])


def one_hot_letters(word: str, alphabet: str) -> Tensor:
    """One row for each letter, in which the letter's own column is 1: shape (letters, alphabet)."""
    return F.one_hot(letter_indices(word, alphabet), len(alphabet)).float()


def spell(indices: Tensor, alphabet: str) -> str:
    return "".join(alphabet[index] for index in indices.tolist())


def word_example(
    name: str,
    build: Callable[[ModuleType], nn.Module],
    word: str,
    answer: str,
    alphabet: str,
    inputs: Tensor,
    learning_rate: float,
    epochs: int,
) -> Example:
    """Train a model that maps `inputs` to one row of scores for each letter of the answer."""
    labels = letter_indices(answer, alphabet)

    def train(model: nn.Module) -> Iterator[float]:
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        return full_batch_training(model, inputs, labels, optimizer, epochs)

    @torch.no_grad()
    def predict(model: nn.Module) -> Tensor:
        return model(inputs).argmax(dim=1)

    def summary(model: nn.Module) -> str:
        return f"{word} -> {spell(predict(model), alphabet)}"

    return Example(name, build, train, epochs, predict, summary)
