"""The suite `programs`: models of other libraries as they are, on torch.nn and under `fused_rnn.patched()`.

    encodec         transformers' Encodec: a second of sound through encoder, quantiser and decoder
    demucs          Demucs (v2) of half its width: separates half a second of stereo sound into four sources
    deepar          pytorch-forecasting's DeepAR: 64 series; inference draws ten paths of 20 steps
    attentive_fp    PyTorch Geometric's AttentiveFP: a property of each of 64 molecules

Inference is one call; training is a whole step with Adam, and the loss is the mean square of the output. Weights and
data are random from a fixed seed. Convolutions and other layers take most of the time of some programs: the ratio is
what a user gains. T, B, I, H and L describe the largest recurrent layer. A program without its package is left out.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import fused_rnn
from harness.measurement import FUSED, TORCH, Measurement, Row
from harness.shapes import Shape
from harness.speed import Way, measure_ways
from harness.suite import OPTIONS, Method, Suite
from harness.timing import Pace
from harness.workload import SEED

Model = tuple[nn.Module, Callable[[], Tensor]]


def encodec() -> Model:
    from transformers import EncodecConfig, EncodecModel

    model = EncodecModel(EncodecConfig())
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_()  # which a new model leaves at zero
    sound = torch.randn(1, 1, 24000)

    def forward() -> Tensor:  # codes have no gradients: training leaves out the quantiser
        return model.decoder(model.encoder(sound)) if model.training else model(sound).audio_values

    return model, forward


def demucs() -> Model:
    from demucs.demucs import Demucs

    model = Demucs(["drums", "bass", "other", "vocals"], channels=32)
    sound = torch.randn(1, 2, 22050)
    return model, lambda: model(sound)


def deepar() -> Model:
    import pandas
    from pytorch_forecasting import DeepAR, TimeSeriesDataSet

    series, history, future = 64, 60, 20
    steps = history + future
    table = {"series": [str(s) for s in range(series) for _ in range(steps)], "time": [*range(steps)] * series}
    data = TimeSeriesDataSet(
        pandas.DataFrame(table | {"value": torch.rand(series * steps).tolist()}),
        time_idx="time",
        target="value",
        group_ids=["series"],
        time_varying_unknown_reals=["value"],
        max_encoder_length=history,
        max_prediction_length=future,
    )
    model = DeepAR.from_dataset(data, cell_type="GRU", hidden_size=64)
    batch, _ = next(iter(data.to_dataloader(train=False, batch_size=series)))
    return model, lambda: model(batch, n_samples=None if model.training else 10).prediction


def attentive_fp() -> Model:
    from torch_geometric.nn import AttentiveFP

    molecules, atoms = 64, 25  # chains
    model = AttentiveFP(39, 200, 1, edge_dim=10, num_layers=2, num_timesteps=2, dropout=0.2)
    first = torch.arange(molecules * atoms).view(molecules, atoms)[:, :-1].flatten()
    bonds = torch.stack([torch.cat([first, first + 1]), torch.cat([first + 1, first])])
    molecule = torch.arange(molecules).repeat_interleave(atoms)
    features, of_bonds = torch.randn(molecules * atoms, 39), torch.randn(bonds.size(1), 10)
    return model, lambda: model(features, bonds, of_bonds, molecule)


@dataclass(frozen=True)
class Program:
    """A program: `build` returns a model and its forward pass, with weights and data of torch's random state.

    Attributes:
        shape, cell: of its largest recurrent layer.
        package, module: its package as pip and as Python call it.
    """

    shape: Shape
    cell: str
    package: str
    module: str
    build: Callable[[], Model]


PROGRAMS = [
    Program(Shape("encodec", 75, 1, 512, 512, 2), "lstm", "transformers", "transformers", encodec),
    Program(Shape("demucs", 10, 1, 256, 256, 2, True), "lstm", "demucs", "demucs", demucs),
    Program(Shape("deepar", 59, 64, 1, 64, 2), "gru", "pytorch-forecasting", "pytorch_forecasting", deepar),
    Program(Shape("attentive_fp", 1, 1600, 200, 200, 1), "gru", "torch-geometric", "torch_geometric", attentive_fp),
]
PACE = Pace(budget=3.0, least_rounds=9)  # a step moves many megabytes: its time varies more than a layer's
BY_NAME = {program.shape.name: program for program in PROGRAMS}


def way(row: Row, side: str) -> Way:
    """One unit of a program's work. Each side has its own model, because training changes the weights."""
    torch.manual_seed(SEED)
    model, forward = BY_NAME[row.name].build()
    model.train(row.mode == "training")
    optimizer = torch.optim.Adam(model.parameters())
    kernels = fused_rnn.patched if side == FUSED else nullcontext

    def infer() -> Tensor:
        torch.manual_seed(SEED)  # the same dropout and samples on both sides
        with kernels(), torch.inference_mode():
            return forward()

    def train() -> Tensor:
        torch.manual_seed(SEED)
        with kernels():
            optimizer.zero_grad()
            y = forward()
            y.square().mean().backward()
            optimizer.step()
        return y

    return Way(train if model.training else infer, compared_parameters(model), of_torch=side == TORCH)


def compared_parameters(model: nn.Module) -> list[Tensor]:
    """The recurrent layers' parameters, and the model's first, whose gradient comes through them.

    Others, such as a bias before a normalisation, have gradients of zero but for rounding.
    """
    recurrent = [each for each in model.modules() if isinstance(each, (nn.RNNBase, nn.RNNCellBase))]
    return [next(model.parameters()), *(parameter for layer in recurrent for parameter in layer.parameters())]


def measure(row: Row, method: Method) -> Measurement:
    program = BY_NAME[row.name]
    if find_spec(program.module) is None:
        note = f'{program.package} is not installed: run pip install ".[programs]"'
        return Measurement(row, "s", {}, notes={TORCH: note})
    return measure_ways(row, {side: way(row, side) for side in (TORCH, FUSED)}, method, PACE)


SUITE = Suite(
    name="programs",
    quantity="time",
    unit="s",
    shapes=[program.shape for program in PROGRAMS],
    measure=measure,
    options=OPTIONS - {"shape", "dtype"},
    cells=("lstm", "gru"),
    takes=lambda row: row.cell == BY_NAME[row.name].cell,
)
