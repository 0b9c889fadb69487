"""Voice activity on a stream: a small GRU decides every 10 ms whether somebody speaks.

    python benchmarks/examples/streaming.py                   trains, freezes, streams; about a minute
    python benchmarks/examples/streaming.py --wav speech.wav  also says when the recording has speech

Trains on sound that is like speech (voiced syllables of harmonics, hissing between them) among noise, then freezes the
model in each format, checks that it decides the same, and feeds it frame by frame: the real-time factor, the
percentiles of the latency, and a picture of them. One thread; a frame is a numpy array, as an audio callback has it.
"""

import argparse
import csv
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import numpy
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))

import fused_rnn
from harness.machine import describe_machine

RATE, FRAME = 16_000, 160  # samples in a second, and in the 10 ms of a frame
WINDOW, BANDS, HIDDEN = 2 * FRAME, 40, 64
SECONDS, BATCH = 3, 16  # of training sounds
FORMATS = ("float32", "bfloat16", "int8")
PERCENTILES = (50, 99, 99.9)


def speech_like(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A sound, and of each frame whether it has speech: syllables in phrases, pauses between them, and noise."""
    t = torch.arange(samples) / RATE
    uniform = iter(torch.rand(4096, generator=generator).tolist())
    sound, active, at = torch.zeros(samples), torch.zeros(samples, dtype=torch.bool), 0
    while at < samples:
        at += int((0.05 + (0.8 if next(uniform) < 0.3 else 0.05) * next(uniform)) * RATE)  # a pause
        end = min(at + int((0.08 + 0.2 * next(uniform)) * RATE), samples)
        if at >= end:
            break
        part, pitch = t[at:end], 90 + 150 * next(uniform)
        harmonics = torch.arange(1, 30).unsqueeze(1)
        formant = 300 + 2500 * next(uniform)
        loudness = 1 / (1 + ((harmonics * pitch - formant) / 400) ** 2) + 0.3 / harmonics
        syllable = (loudness * torch.sin(2 * torch.pi * harmonics * pitch * part)).sum(0)
        if next(uniform) < 0.3:
            syllable = syllable + 3 * torch.randn(end - at, generator=generator).diff(prepend=torch.zeros(1))
        sound[at:end] = syllable * torch.hann_window(end - at)
        active[at:end] = True
        at = end
    noise = torch.randn(samples, generator=generator) * (0.02 + 0.4 * next(uniform))
    frames = active[: samples // FRAME * FRAME].view(-1, FRAME).float().mean(1) > 0.5
    return sound + noise, frames


def filters() -> Tensor:
    """The shares of each frequency in each band, wide as the ear's."""
    mel = torch.linspace(0, 2595 * torch.tensor(1 + RATE / 2 / 700).log10().item(), BANDS + 2)
    centres = 700 * (10 ** (mel / 2595) - 1)
    frequency = torch.linspace(0, RATE / 2, WINDOW // 2 + 1).unsqueeze(1)
    up = (frequency - centres[:-2]) / (centres[1:-1] - centres[:-2])
    down = (centres[2:] - frequency) / (centres[2:] - centres[1:-1])
    return torch.minimum(up, down).clamp_min(0)


FILTERS = filters()


def features(sound: Tensor) -> Tensor:
    """The logarithm of the energy in each band, ``[T, BANDS]``, of a window that ends with each frame."""
    windows = F.pad(sound, (WINDOW - FRAME, 0)).unfold(0, WINDOW, FRAME) * torch.hann_window(WINDOW)
    return (torch.fft.rfft(windows).abs().square() @ FILTERS + 1e-5).log() / 4


class VoiceActivity(nn.Module):
    """The logit of speech in each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = fused_rnn.GRU(BANDS, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.rnn(frames)[0]).squeeze(-1)


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features ``[T, B, BANDS]`` and labels ``[T, B]``."""
    sounds, labels = zip(*(speech_like(SECONDS * RATE, generator) for _ in range(BATCH)), strict=True)
    return torch.stack([features(sound) for sound in sounds], 1), torch.stack(labels, 1).float()


def train(model: nn.Module, steps: int, console: Console) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in track(range(steps), "training", console=console):
        x, labels = batch(generator)
        loss = F.binary_cross_entropy_with_logits(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def latencies(model: nn.Module, weights: str, count: int, console: Console) -> numpy.ndarray:
    """Seconds of each of `count` frames, from the frame's features to the decision."""
    stream = fused_rnn.freeze(model.rnn, weights).stream()
    head, bias = model.head.weight.detach().numpy()[0], model.head.bias.item()
    x = features(speech_like(20 * RATE, torch.Generator().manual_seed(2))[0]).numpy()
    frames, h, seconds = [x_t[None] for x_t in x], numpy.empty((1, HIDDEN), numpy.float32), numpy.empty(count)
    for i in track(range(count), f"streaming, {weights}", console=console, update_period=1):
        x_t = frames[i % len(frames)]
        start = perf_counter()
        stream(x_t, out=h)
        float(head @ h[0]) + bias  # the decision
        seconds[i] = perf_counter() - start
    return seconds


def draw(seconds: dict[str, numpy.ndarray], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for weights, values in seconds.items():
        share = 1 - numpy.arange(1, len(values) + 1) / len(values)
        axes.plot(numpy.sort(values) * 1e6, share, label=weights)
    axes.set(xscale="log", yscale="log", xlabel="microseconds of a frame", ylabel="share of frames that take longer")
    axes.set_title(f"GRU {BANDS} x {HIDDEN}, frame by frame from Python, one thread", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def recording(path: Path) -> Tensor:
    with wave.open(str(path)) as file:
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (RATE, 1, 2):
            raise SystemExit(f"{path}: expected 16-bit mono at {RATE} Hz")
        samples = numpy.frombuffer(file.readframes(file.getnframes()), numpy.int16)
    return torch.from_numpy(samples.astype(numpy.float32)) / 2048


def spans(speech: Tensor) -> Iterator[tuple[float, float]]:
    """The seconds from and to which there is speech."""
    edges = F.pad(speech.int(), (1, 1)).diff().nonzero().squeeze(1) * FRAME / RATE
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wav", type=Path, help=f"a recording, 16-bit mono at {RATE} Hz")
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--frames", type=int, default=100_000, help="to stream in each format")
    parser.add_argument("--picture", type=Path, help="where to write the picture of latencies; a CSV goes beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console()
    model = VoiceActivity()
    train(model, options.steps, console)
    x, labels = batch(torch.Generator().manual_seed(1))
    columns = ["weights", "right", "as float32", *(f"p{p:g} us" for p in PERCENTILES), "real-time factor"]
    rows: list[list[str]] = []
    seconds, decisions = {}, {}
    with torch.no_grad():
        for weights in FORMATS:
            decisions[weights] = fused_rnn.freeze(model, weights)(x) > 0
            seconds[weights] = latencies(model, weights, options.frames, console)
            right = (decisions[weights] == labels.bool()).float().mean().item()
            same = (decisions[weights] == decisions["float32"]).float().mean().item()
            percentiles = [f"{numpy.percentile(seconds[weights], p) * 1e6:.2f}" for p in PERCENTILES]
            factor = seconds[weights].mean() * RATE / FRAME
            rows.append([weights, f"{right:.2%}", f"{same:.2%}", *percentiles, f"{factor:.5f}"])
        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        if options.wav:
            speech = fused_rnn.freeze(model, "int8")(features(recording(options.wav)).unsqueeze(1)).squeeze(1) > 0
            console.print("speech:", ", ".join(f"{start:.2f}-{end:.2f} s" for start, end in spans(speech)) or "none")
    if options.picture:
        draw(seconds, options.picture)
        machine, path = describe_machine(), options.picture.with_suffix(".csv")
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*columns, "frames", *machine])
            writer.writerows([*row, options.frames, *machine.values()] for row in rows)
        console.print(f"Written: {options.picture} and {path}", soft_wrap=True)


if __name__ == "__main__":
    main()
