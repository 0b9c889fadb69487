"""A character language model: an RNN, GRU or LSTM that learns to predict the next letter.

The text is your own file (`--text FILE`), or the English help texts that come with Python, so that
the example runs without a download. The recipe is the usual one for a first language model: 28
symbols, one-hot; hidden size 256; sequences of 35 steps in batches of 32; SGD with learning rate 1
and gradients clipped to norm 1.

`torchrun --nproc-per-node 2 benchmarks/examples/char_lm.py` shares the rows of each batch among
processes (as many as divide 32) and learns the same.
"""

import math
import os
import re
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training import Example, command_line, run_examples

UNKNOWN = "?"
SYMBOLS = UNKNOWN + " abcdefghijklmnopqrstuvwxyz"
BATCH, TIME = 32, 35
HIDDEN_SIZE = 256
TRAIN_LENGTH = 100_000
PREFIX = "the statement "
STEPS = {"rnn": 600, "gru": 500, "lstm": 600}

# An LSTM has two states, h and c; the others have one.
State = Tensor | tuple[Tensor, Tensor]


class CharacterModel(nn.Module):
    def __init__(self, library: ModuleType, cell: str) -> None:
        super().__init__()
        layer = {"rnn": library.RNN, "gru": library.GRU, "lstm": library.LSTM}[cell]
        self.recurrent = layer(input_size=len(SYMBOLS), hidden_size=HIDDEN_SIZE)
        self.linear = nn.Linear(HIDDEN_SIZE, len(SYMBOLS))

    def forward(self, symbols: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        one_hot = F.one_hot(symbols.T, len(SYMBOLS)).float()  # (time, batch, symbols)
        output, state = self.recurrent(one_hot, state)
        return self.linear(output), state


def sequential_batches(text: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut the text into BATCH long strips, and walk along all of them TIME symbols at a time.

    Each sequence continues the one in the batch before, so the state can be passed on. The random
    start makes the cuts fall elsewhere in each epoch.
    """
    start = int(torch.randint(TIME, ()))
    length = (len(text) - start - 1) // BATCH
    inputs = text[start : start + BATCH * length].reshape(BATCH, length)
    labels = text[start + 1 : start + 1 + BATCH * length].reshape(BATCH, length)
    for position in range(0, length - TIME + 1, TIME):
        yield inputs[:, position : position + TIME], labels[:, position : position + TIME]


def random_batches(text: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut the text into pieces of TIME symbols, and take them in random order."""
    text = text[int(torch.randint(TIME, ())) :]
    count = (len(text) - 1) // TIME
    inputs = text[: count * TIME].reshape(count, TIME)
    labels = text[1 : count * TIME + 1].reshape(count, TIME)
    for pieces in torch.randperm(count)[: count // BATCH * BATCH].split(BATCH):
        yield inputs[pieces], labels[pieces]


def train(model: nn.Module, file: Path | None, sampling: str) -> Iterator[float]:
    """Train without end, epoch after epoch; Example.steps says when to stop."""
    text, _ = load_text(file)
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    trained = DistributedDataParallel(model) if dist.is_initialized() else model
    while True:
        state = None
        batches = sequential_batches(text) if sampling == "sequential" else random_batches(text)
        for inputs, labels in map(own_rows, batches):
            if sampling == "random":
                state = None  # the sequence does not continue the one before
            optimizer.zero_grad()
            scores, state = trained(inputs, state)
            loss = F.cross_entropy(scores.flatten(0, 1), labels.T.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm=1)
            optimizer.step()
            state = detach(state)
            yield mean_over_processes(loss.detach())


def own_rows(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The rows of the batch that this process trains on: all, unless torchrun has started several processes."""
    if not dist.is_initialized():
        return batch
    return tuple(rows.chunk(dist.get_world_size())[dist.get_rank()] for rows in batch)


def mean_over_processes(loss: Tensor) -> float:
    if not dist.is_initialized():
        return loss.item()
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def detach(state: State) -> State:
    """Keep the state's values but not its history: gradients stop at the edge of the batch."""
    return state.detach() if isinstance(state, Tensor) else tuple(part.detach() for part in state)


@torch.no_grad()
def held_out_scores(model: nn.Module, file: Path | None) -> tuple[Tensor, Tensor]:
    """Scores and labels of the symbols of a text that the model was not trained on."""
    _, text = load_text(file)
    scores, _ = model(text[:-1].unsqueeze(0))
    return scores.squeeze(1), text[1:]


def predict(model: nn.Module, file: Path | None) -> Tensor:
    return held_out_scores(model, file)[0].argmax(dim=1)


def summary(model: nn.Module, file: Path | None) -> str:
    perplexity = math.exp(F.cross_entropy(*held_out_scores(model, file)).item())
    return f"held-out perplexity {perplexity:.2f}; {continuation(model, 40)!r}"


@torch.no_grad()
def continuation(model: nn.Module, length: int) -> str:
    """Let the model write on from PREFIX, taking the most probable symbol each time."""
    written = PREFIX
    symbols, state = to_indices(PREFIX), None
    for _ in range(length):
        scores, state = model(symbols.unsqueeze(0), state)
        symbols = scores[-1, 0].argmax().reshape(1)
        written += SYMBOLS[symbols.item()]
    return written


@cache
def load_text(file: Path | None) -> tuple[Tensor, Tensor]:
    """The symbols to train on, and a second part to test on, as long as one batch."""
    if file is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics.values())
    else:
        text = file.read_text(encoding="utf-8")
    letters = re.sub("[^a-z]+", " ", text.lower()).strip()
    indices = to_indices(letters)
    held_out_length = BATCH * TIME
    train_length = min(TRAIN_LENGTH, len(indices) - held_out_length)
    return indices[:train_length], indices[train_length:][:held_out_length]


def to_indices(text: str) -> Tensor:
    return torch.tensor([max(SYMBOLS.find(symbol), 0) for symbol in text])


def character_example(
    cell: str, file: Path | None = None, sampling: str = "sequential", steps: int | None = None
) -> Example:
    return Example(
        name=f"char_{cell}",
        build=partial(CharacterModel, cell=cell),
        train=partial(train, file=file, sampling=sampling),
        steps=steps or STEPS[cell],
        predict=partial(predict, file=file),
        summary=partial(summary, file=file),
    )


EXAMPLES = [character_example(cell) for cell in STEPS]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--cell", choices=STEPS, help="only this one (default: all three)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="an English text to train on")
    parser.add_argument("--sampling", choices=["sequential", "random"], default="sequential")
    parser.add_argument("--steps", type=int, help="of training (default: 500 to 600)")
    options = parser.parse_args()
    cells = [options.cell] if options.cell else STEPS
    examples = [character_example(cell, options.text, options.sampling, options.steps) for cell in cells]
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
        if dist.get_rank() > 0:
            sys.stdout = None  # one process prints
    run_examples(examples, options)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
