"""The suite `rl`: training on rollouts in which episodes end, so that states are reset inside the sequence.

torch.nn has no resets. The competitors are the loops and conversions that libraries of reinforcement learning
write around it, all with the same outputs and gradients:

    loop         one step of torch.nn's LSTM or GRU at a time, its state multiplied by 0 where an episode
                 begins (CleanRL, stable-baselines3's recurrent PPO, rl_games)
    cuts         the sequence cut for the whole batch wherever one row begins an episode (ikostrikov's PPO)
    pad          every row cut where it begins an episode, the pieces padded to the longest one (TorchRL, rsl_rl)
    packed       the same pieces as a PackedSequence (Sample Factory, Habitat)
    no resets    fused_rnn's call without `resets`, which computes something else: the cost of resets

Finding the pieces is part of every call, because every rollout has different ones. The initial state is given, and
x needs a gradient, as an encoder's output does. Rows are named T x B and the rate of resets.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from harness.measurement import FUSED, TORCH, Measurement, Row
from harness.shapes import Shape
from harness.speed import Way, measure_ways
from harness.suite import OPTIONS, Method, Suite
from harness.timing import Pace
from harness.workload import SEED, build_module, one_call, random_input, random_state, state_sizes

State = Tensor | tuple[Tensor, Tensor]

RATES = {"0%": 0.0, "0.1%": 0.001, "1%": 0.01, "10%": 0.1}
SIZE = 128
SHAPES = [
    Shape(f"{T}x{B}", T, B, I=SIZE, H=SIZE, L=1)
    for T in (16, 64, 128)
    for B in (8, 64, 256)
    if T * B <= 64 * 256  # beyond, torch.nn's backward through a PackedSequence takes many seconds
]
SHAPES.append(Shape("64x64_h256", T=64, B=64, I=256, H=256, L=1))
PACE = Pace(budget=1.0, least_rounds=3)  # the slowest ways take seconds
WITHOUT = "no resets"


def loop(module: nn.Module, x: Tensor, hx: State, resets: Tensor) -> Tensor:
    outputs = []
    for x_t, keep in zip(x, kept(resets, x), strict=True):
        y, hx = module(x_t.unsqueeze(0), times(hx, keep))
        outputs.append(y)
    return torch.cat(outputs)


def cuts(module: nn.Module, x: Tensor, hx: State, resets: Tensor) -> Tensor:
    borders = (resets[1:].any(1).nonzero().squeeze(1) + 1).tolist()
    keep = kept(resets, x)
    outputs = []
    for start, end in pairwise([0, *borders, len(x)]):
        y, hx = module(x[start:end], times(hx, keep[start]))
        outputs.append(y)
    return torch.cat(outputs)


def pad(module: nn.Module, x: Tensor, hx: State, resets: Tensor) -> Tensor:
    pieces = Pieces(resets)
    count, longest = len(pieces.starts), int(pieces.lengths.max())
    places = pieces.position * count + pieces.piece
    padded = x.new_zeros(longest * count, x.size(2)).index_copy(0, places, x.flatten(0, 1))
    y, _ = module(padded.unflatten(0, (longest, count)), pieces.states(hx))
    return y.flatten(0, 1).index_select(0, places).unflatten(0, resets.shape)


def packed(module: nn.Module, x: Tensor, hx: State, resets: Tensor) -> Tensor:
    pieces = Pieces(resets)
    order = pieces.lengths.argsort(descending=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    batch_sizes = pieces.position.bincount()
    places = (batch_sizes.cumsum(0) - batch_sizes)[pieces.position] + rank[pieces.piece]
    data = torch.empty_like(x).flatten(0, 1).index_copy(0, places, x.flatten(0, 1))
    y, _ = module(PackedSequence(data, batch_sizes), pieces.states(hx, order))
    return y.data.index_select(0, places).unflatten(0, resets.shape)


def fused(module: nn.Module, x: Tensor, hx: State, resets: Tensor) -> Tensor:
    return module(x, hx, resets=resets)[0]


def fused_without(module: nn.Module, x: Tensor, hx: State, resets: Tensor) -> Tensor:
    return module(x, hx)[0]


OF_TORCH = {"loop": loop, "cuts": cuts, "pad": pad, "packed": packed}
OF_FUSED = {FUSED: fused, WITHOUT: fused_without}


class Pieces:
    """The sequences between resets, row by row.

    Attributes:
        starts: the start of each piece, an index into `[B, T]` flattened.
        lengths: the length of each piece.
        piece, position: for each element of `[T, B]` flattened, its piece and its position in that piece.
    """

    def __init__(self, resets: Tensor) -> None:
        T, B = resets.shape
        begins = resets.t().clone()
        begins[:, 0] = True
        begins = begins.flatten()
        self.starts = begins.nonzero().squeeze(1)
        self.lengths = self.starts.diff(append=self.starts.new_tensor([T * B]))
        piece = begins.cumsum(0) - 1
        position = torch.arange(T * B) - self.starts[piece]
        self.piece, self.position = (each.view(B, T).t().flatten() for each in (piece, position))
        self.row = self.starts // T
        self.keeps = (self.starts % T == 0) & ~resets[0, self.row]  # whether it continues from the initial state

    def states(self, hx: State, order: Tensor | None = None) -> State:
        """The initial states of the pieces."""
        row, keeps = (self.row, self.keeps) if order is None else (self.row[order], self.keeps[order])
        if isinstance(hx, tuple):
            return tuple(state[:, row] * keeps.unsqueeze(1) for state in hx)
        return hx[:, row] * keeps.unsqueeze(1)


def kept(resets: Tensor, x: Tensor) -> Tensor:
    """The factors of the state before each step, `[T, B, 1]`: 0 at a reset, else 1."""
    return (~resets).to(x.dtype).unsqueeze(2)


def times(hx: State, keep: Tensor) -> State:
    return tuple(state * keep for state in hx) if isinstance(hx, tuple) else hx * keep


def random_resets(row: Row) -> Tensor:
    """Random resets `[T, B]` at the rate in the row's name."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.rand(row.shape.T, row.shape.B, generator=generator) < RATES[row.call]


def way(row: Row, side: str, function: Callable[..., Tensor], same: bool = True) -> Way:
    module, x = build_module(side, row), random_input(row)
    hx, resets = random_state(row, state_sizes(row.shape)), random_resets(row)
    call = one_call(row, module, lambda: function(module, x, hx, resets), x)
    return Way(call, [x, *module.parameters()], of_torch=side == TORCH, same=same)


def measure(row: Row, method: Method) -> Measurement:
    ways = {name: way(row, TORCH, function) for name, function in OF_TORCH.items()}
    ways |= {name: way(row, FUSED, function, name == FUSED) for name, function in OF_FUSED.items()}
    return measure_ways(row, ways, method, PACE)


def refusal(shape: Shape) -> str | None:
    """Why a requested shape cannot be measured; None if it can."""
    return "what runs step by step has one direction" if shape.bidirectional else None


SUITE = Suite(
    name="rl",
    quantity="time",
    unit="s",
    shapes=SHAPES,
    measure=measure,
    options=OPTIONS - {"mode"},
    calls=tuple(RATES),
    modes=("training",),
    cells=("lstm", "gru"),
    refusal=refusal,
)
