"""Handwritten digits read row by row: a two-layer LSTM over the 28 rows of an image.

The images are MNIST's when `--data DIR` names a folder that holds its four files, and otherwise
the real, smaller digits that come with scikit-learn, so that the example runs without a download.
"""

import gzip
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import Example, command_line, run_examples

BATCH = 64
DIGITS_STEPS = 690  # 30 epochs of 23 batches
MNIST_STEPS = 938  # one epoch: forty times as many images


class ImageRows(nn.Module):
    def __init__(self, library: ModuleType) -> None:
        super().__init__()
        self.lstm = library.LSTM(input_size=28, hidden_size=100, num_layers=2)
        self.linear = nn.Linear(100, 10)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.transpose(0, 1)  # (batch, 28, 28) -> (time, batch, feature)
        output, _ = self.lstm(rows)
        return self.linear(output[-1])  # scores after the last row: (batch, 10)


@dataclass(frozen=True)
class Digits:
    """Images (count, 28, 28) with values from -1 to 1, and the digit that each shows."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def train(model: nn.Module, data: Path | None) -> Iterator[float]:
    """Train without end, epoch after epoch; Example.steps says when to stop."""
    digits = load_digits(data)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=0.1)
    while True:
        for batch in torch.randperm(len(digits.train_images)).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
            loss.backward()
            optimizer.step()
            yield loss.item()


@torch.no_grad()
def predict(model: nn.Module, data: Path | None) -> Tensor:
    images = load_digits(data).test_images
    return torch.cat([model(batch).argmax(dim=1) for batch in images.split(128)])


def summary(model: nn.Module, data: Path | None) -> str:
    right = predict(model, data) == load_digits(data).test_labels
    return f"test accuracy {right.float().mean().item():.1%} of {len(right)} images"


@cache
def load_digits(data: Path | None) -> Digits:
    return load_scikit_learn_digits() if data is None else load_mnist(data)


def load_scikit_learn_digits() -> Digits:
    try:
        from sklearn.datasets import load_digits as load_small_digits
    except ModuleNotFoundError:
        sys.exit('image_rows needs scikit-learn for its images: run pip install ".[bench]"')
    images, labels = load_small_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(28, 28), mode="bilinear").squeeze(1) * 2 - 1
    labels = torch.tensor(labels)
    # The file is ordered by writer: the last fifth was written by people the network has not seen.
    split = len(images) * 4 // 5
    return Digits(images[:split], labels[:split], images[split:], labels[split:])


def load_mnist(folder: Path) -> Digits:
    return Digits(
        *(
            tensor
            for part in ("train", "t10k")
            for tensor in (
                read_idx(folder, f"{part}-images-idx3-ubyte").float() / 127.5 - 1,
                read_idx(folder, f"{part}-labels-idx1-ubyte").long(),
            )
        )
    )


def read_idx(folder: Path, name: str) -> Tensor:
    """Read one file of MNIST, unpacked or gzipped, in `folder` or where torchvision puts it.

    The format is: two zero bytes, a byte for the type, a byte for the number of dimensions, the
    dimensions as 32-bit big-endian integers, and then the values, here one byte each.
    """
    for path in (folder / name, folder / "MNIST" / "raw" / name):
        if path.exists():
            content = path.read_bytes()
            break
        packed = path.with_name(f"{name}.gz")
        if packed.exists():
            content = gzip.decompress(packed.read_bytes())
            break
    else:
        sys.exit(f"{folder} holds no {name} (nor {name}.gz), also not in MNIST/raw")
    num_dims = content[3]
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(num_dims)]
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * num_dims)
    return values.reshape(sizes)


def image_example(data: Path | None = None) -> Example:
    return Example(
        name="image_rows",
        build=ImageRows,
        train=partial(train, data=data),
        steps=DIGITS_STEPS if data is None else MNIST_STEPS,
        predict=partial(predict, data=data),
        summary=partial(summary, data=data),
    )


EXAMPLES = [image_example()]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder that holds MNIST")
    options = parser.parse_args()
    run_examples([image_example(options.data)], options)


if __name__ == "__main__":
    main()
