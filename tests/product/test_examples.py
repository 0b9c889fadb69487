"""The examples in benchmarks/: every model trains on fused_rnn as it does on torch.nn.

Also tests the tools of that comparison: the rule of agreement, the interleaved timing, the data of the examples, and
the two command lines. The other suites are tested in test_benchmarks.py.
"""

import csv
import gzip
import subprocess
import sys
import wave
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fused_rnn
import run
from examples import (
    EXAMPLES,
    SEED,
    TOUR_TOLERANCE,
    TOURS,
    Agreement,
    Example,
    Tour,
    char_lm,
    compare,
    compare_tours,
    image_rows,
    seeded_model,
    tour_results,
)
from harness.examples_report import ExampleResult
from harness.machine import processor_folder
from harness.recurrent_part import forward_and_backward, recorded_calls
from harness.timing import InterleavedTiming, TimedSide, time_interleaved
from processes import python, python_path
from suites import training_examples

pytestmark = pytest.mark.usefixtures("one_thread")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
BY_NAME = {example.name: example for example in EXAMPLES}
LONG, SHORTENED = 100, 15  # examples of more than LONG steps are stopped after SHORTENED

by_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
by_tour = pytest.mark.parametrize("tour", TOURS, ids=lambda tour: tour.name)


def train(example: Example, library: object, steps: int) -> tuple[list[float], torch.nn.Module]:
    model = seeded_model(example, library, SEED)
    return list(islice(example.train(model), steps)), model


@pytest.mark.slow("trains every example")
@by_example
def test_losses_and_predictions_agree(example: Example) -> None:
    steps = example.steps if example.steps <= LONG else SHORTENED
    torch_losses, torch_model = train(example, torch.nn, steps)
    fused_losses, fused_model = train(example, fused_rnn, steps)
    torch_predictions, fused_predictions = map(example.predict, (torch_model, fused_model))

    agreement = compare(torch_losses, fused_losses, torch_predictions, fused_predictions)
    assert agreement.holds, str(agreement)
    # The rule allows a few different predictions after long trainings; after so few steps there may be none.
    assert torch.equal(torch_predictions, fused_predictions)
    assert len(fused_losses) == steps
    assert fused_losses[-1] < fused_losses[0]


@pytest.mark.slow("trains until it is learnt")
@pytest.mark.parametrize(
    ("name", "summary", "final_loss"),
    [
        ("hello_cell", "hello -> ohlol", 3.0),
        ("hello_rnn", "heelo -> ohlol", 0.6),
        ("hello_embedding", "heelo -> ohlol", 0.02),
        ("world_embedding", "hello -> world", 0.02),
        ("hello_world", "hello -> world", 0.6),
        ("sentiment_last", "50 of 50 training labels learnt", 0.01),
        ("layer_sizes", "50 of 50 training labels learnt", 0.01),
    ],
)
def test_the_answer_is_learnt(name: str, summary: str, final_loss: float) -> None:
    example = BY_NAME[name]
    losses, model = train(example, fused_rnn, example.steps)
    assert example.summary(model) == summary
    assert losses[-1] < final_loss


@by_tour
def test_tours_return_the_same(tour: Tour) -> None:
    expected = tour_results(tour, torch.nn, SEED)
    found = tour_results(tour, fused_rnn, SEED)
    assert compare_tours(expected, found) <= TOUR_TOLERANCE


def test_shapes_of_the_tours() -> None:
    results = dict(item for tour in TOURS for item in tour_results(tour, fused_rnn, SEED))
    assert results["RNNCell(100, 200), number of parameters"] == 60_400
    assert results["largest difference between the two"] < 1e-6
    assert results["RNNCell(4, 2), hidden state at time 2"].shape == (1, 2)
    assert results["RNN(100, 200, 3), output"].shape == (6, 5, 200)
    assert results["RNN(100, 200, 3), given state: last state"].shape == (3, 5, 200)
    assert results["LSTM(100, 200, 2), given states: last c"].shape == (2, 3, 200)
    assert results["GRU(10, 20), last state"].shape == (1, 32, 20)


def test_agreement_refuses_what_it_should() -> None:
    curve = [1.0 / step for step in range(1, 101)]
    answers = torch.arange(10)
    assert compare(curve, curve, answers, answers).holds

    wrong_formula = [loss * 1.0001 for loss in curve]
    assert not compare(curve, wrong_formula, answers, answers).holds
    worse_in_the_end = curve[:50] + [loss * 1.05 for loss in curve[50:]]
    assert not compare(curve, worse_in_the_end, answers, answers).holds
    diverged = [*curve[:-1], float("nan")]
    assert not compare(curve, diverged, answers, answers).holds
    assert not compare(curve, curve, answers, answers.flip(0)).holds


def test_tours_of_other_shapes_do_not_agree() -> None:
    assert compare_tours([("output", torch.zeros(2, 3))], [("output", torch.zeros(3, 2))]) > 1


def test_interleaved_sides_draw_the_random_numbers_they_would_draw_alone() -> None:
    torch.manual_seed(SEED)
    alone = [torch.rand(()).item() for _ in range(4)]
    torch.manual_seed(SEED)
    draw = partial(torch.rand, ())
    timing = time_interleaved(draw, draw, rounds=4, warm_up=1)
    assert timing.first.results == timing.second.results == alone
    assert timing.threads == torch.get_num_threads()


def test_speed_up_is_the_median_of_pairs_after_the_warm_up() -> None:
    first, second = TimedSide(seconds=[90, 2, 6, 8]), TimedSide(seconds=[1, 1, 2, 2])
    assert InterleavedTiming(first, second, warm_up=1, threads=1).speed_up == 3


def test_timing_needs_a_round_after_the_warm_up() -> None:
    with pytest.raises(ValueError, match="warm_up"):
        time_interleaved(int, int, rounds=3, warm_up=3)


def test_sequential_batches_continue_each_other() -> None:
    text = torch.arange(10_000)
    batches = list(char_lm.sequential_batches(text))
    for inputs, labels in batches:
        assert inputs.shape == (char_lm.BATCH, char_lm.TIME)
        assert torch.equal(labels, inputs + 1)
    for (inputs, _), (next_inputs, _) in pairwise(batches):
        assert torch.equal(next_inputs[:, 0], inputs[:, -1] + 1)


def test_random_batches_use_every_piece_once() -> None:
    batches = list(char_lm.random_batches(torch.arange(10_000)))
    for inputs, labels in batches:
        assert inputs.shape == (char_lm.BATCH, char_lm.TIME)
        assert torch.equal(labels, inputs + 1)
    used = torch.cat([inputs.flatten() for inputs, _ in batches])
    assert len(used.unique()) == len(used)


def test_character_model_on_a_text_of_the_user_with_random_sampling(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Stately, plump Buck Mulligan came from the stairhead; " * 100)
    example = char_lm.character_example("rnn", text, "random")
    torch_losses, _ = train(example, torch.nn, 3)
    fused_losses, _ = train(example, fused_rnn, 3)
    assert fused_losses == pytest.approx(torch_losses, rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_files_are_read(tmp_path: Path, packed: bool) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 3), ("t10k", 2)):
        images = bytes([0, 0, 8, 3, *sizes(count, 28, 28), *[255] * (count * 28 * 28)])
        labels = bytes([0, 0, 8, 1, *sizes(count), *range(count)])
        for name, content in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{part}-{name}-ubyte"
            if packed:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)
    digits = image_rows.load_mnist(tmp_path)
    assert torch.equal(digits.train_images, torch.ones(3, 28, 28))
    assert digits.test_images.shape == (2, 28, 28)
    assert digits.train_labels.tolist() == [0, 1, 2]


def sizes(*values: int) -> bytes:
    return b"".join(value.to_bytes(4, "big") for value in values)


def run_script(script: str, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    environment = {} if path is None else {"PYTHONPATH": python_path(path)}
    return python(BENCHMARKS / script, *arguments, **environment)


ONE_SIDE = pytest.mark.slow("starts a process for one half of what `both` runs")


@pytest.mark.parametrize(
    "backend", [pytest.param("torch", marks=ONE_SIDE), pytest.param("fused", marks=ONE_SIDE), "both"]
)
def test_an_example_runs_alone(backend: str) -> None:
    finished = run_script("examples/hello_rnn.py", "--backend", backend)
    assert finished.returncode == 0, finished.stderr
    assert "heelo -> ohlol" in finished.stdout
    assert ("agree:" in finished.stdout) == (backend == "both")


def test_the_stream_runs_alone(tmp_path: Path) -> None:
    """It trains, streams in every format, listens to a recording and draws its picture."""
    recording, picture = tmp_path / "noise.wav", tmp_path / "picture.png"
    with wave.open(str(recording), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((torch.randn(16_000) * 1000).short().numpy().tobytes())
    options = ["--steps", "2", "--frames", "50", "--wav", str(recording), "--picture", str(picture)]
    finished = run_script("examples/streaming.py", *options)
    assert finished.returncode == 0, finished.stderr
    assert all(word in finished.stdout for word in ("float32", "bfloat16", "int8", "real-time", "speech:"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    with picture.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["weights"] for row in rows] == ["float32", "bfloat16", "int8"]
    assert all(0 < float(row["p50 us"]) <= float(row["p99.9 us"]) and row["frames"] == "50" for row in rows)


def test_a_tour_runs_alone() -> None:
    finished = run_script("examples/cell_tour.py")
    assert finished.returncode == 0, finished.stderr
    assert "60400" in finished.stdout


def test_the_recurrent_part_of_a_step_is_its_calls_without_their_history() -> None:
    embedding, rnn, cell = torch.nn.Embedding(4, 3), torch.nn.LSTM(3, 5), torch.nn.GRUCell(5, 5)
    model = torch.nn.ModuleList([embedding, rnn, cell])

    def step() -> None:
        y, _ = rnn(embedding(torch.tensor([[0], [1]])))
        cell(y[1], cell(y[0]))

    calls = recorded_calls(model, step)
    assert [call.module for call in calls] == [rnn, cell, cell]
    tensors = [tensor for call in calls for tensor in call.args]
    assert [tensor.shape for tensor in tensors] == [(2, 1, 3), (1, 5), (1, 5), (1, 5)]
    assert all(tensor.is_leaf and tensor.requires_grad for tensor in tensors)
    forward_and_backward(calls)
    assert len(recorded_calls(model, step)) == 3 and not rnn._forward_pre_hooks


@pytest.mark.slow("trains every example")
def test_the_run_writes_its_table_and_its_picture(tmp_path: Path) -> None:
    arguments = ("--quick", "--only", "hello_rnn", "--threads", "1", "--output", str(tmp_path))
    finished = run_script("run.py", *arguments)
    assert finished.returncode == 0, finished.stderr
    with (processor_folder(tmp_path) / "examples.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["example"] == "hello_rnn"
    assert line["agree"] == "True"
    assert line["threads"] == "1"
    assert line["torch_version"] == torch.__version__
    assert float(line["speed_up"]) > 0 and float(line["rnn_speed_up"]) > 0
    assert (processor_folder(tmp_path) / "examples.png").read_bytes().startswith(b"\x89PNG")


def test_the_run_fails_with_a_sentence_when_an_example_does_not_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = SimpleNamespace(RNN=partial(torch.nn.RNN, nonlinearity="relu"))
    monkeypatch.setattr(training_examples, "fused_rnn", wrong)
    arguments = ["run.py", "--quick", "--only", "hello_rnn", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="do not agree on\nhello_rnn: the losses of the first"):
        run.main()


def test_a_check_names_the_timings_that_are_behind_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recurrent layers are always behind, the training step only at first; the times are fake."""
    trained = []

    def train(example: Example, *_: object) -> ExampleResult:
        trained.append(example.name)
        timing = InterleavedTiming(
            TimedSide([0.5], [9.0]), TimedSide([0.5], [10.0 if len(trained) == 1 else 5.0]), 0, 1
        )
        rnn = InterleavedTiming(TimedSide([], [9.0]), TimedSide([], [10.0]), 0, 1)
        return ExampleResult(example.name, timing, rnn, Agreement(0.0, 0.0, 0.0, 1.0), "", "")

    monkeypatch.setattr(training_examples, "train_on_both", train)
    arguments = ["--only", "hello_rnn", "--output", str(tmp_path)]
    run.main(arguments)
    trained.clear()
    with pytest.raises(SystemExit, match=r"^fused_rnn is behind torch\.nn on\nhello_rnn, its RNN alone$"):
        run.main([*arguments, "--check"])
    assert len(trained) == 1 + 4


def test_a_missing_dependency_gives_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError(name='rich')")
    finished = run_script("run.py", path=tmp_path)
    assert finished.returncode != 0
    assert finished.stderr.startswith('rich is not installed: run pip install ".[bench]"')
