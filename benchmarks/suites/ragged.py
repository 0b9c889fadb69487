"""The suite `ragged`: batches of sequences of different lengths, padded to the longest, as data loaders make them.

The competitor is torch.nn between pack_padded_sequence and pad_packed_sequence. fused_rnn is called with `lengths`.
Two more columns show fused_rnn alone: "packed" between the same two functions, and "no lengths" on the whole padded
batch, which computes something else: `lengths` should cost no more than that.

The lengths lie between an eighth of the longest and the longest. In training x needs a gradient, as an embedding's
output does.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from harness.measurement import FUSED, TORCH, Measurement, Row
from harness.shapes import Shape
from harness.speed import Way, measure_ways
from harness.suite import Method, Suite
from harness.workload import SEED, build_module, one_call, random_input

SHAPES = [Shape(f"t{T}_b{B}_h{H}", T, B, I=H, H=H, L=1) for T in (32, 128) for B in (8, 32, 128) for H in (64, 256)]
SHORTEST = 8  # the shortest length is T / SHORTEST
PACKED, WITHOUT = "packed", "no lengths"


def packed(module: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    y, _ = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    return pad_packed_sequence(y, total_length=len(x))[0]


def with_lengths(module: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    return module(x, lengths=lengths)[0]


def without_lengths(module: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    return module(x)[0]


def random_lengths(row: Row) -> Tensor:
    """Random lengths `[B]`, unsorted."""
    T, B = row.shape.T, row.shape.B
    return torch.randint(max(1, T // SHORTEST), T + 1, (B,), generator=torch.Generator().manual_seed(SEED))


def way(row: Row, side: str, function: Callable[..., Tensor], same: bool = True) -> Way:
    module, x, lengths = build_module(side, row), random_input(row), random_lengths(row)
    call = one_call(row, module, lambda: function(module, x, lengths), x)
    return Way(call, [x, *module.parameters()], of_torch=side == TORCH, same=same)


def measure(row: Row, method: Method) -> Measurement:
    ways = {
        TORCH: way(row, TORCH, packed),
        FUSED: way(row, FUSED, with_lengths),
        PACKED: way(row, FUSED, packed),
        WITHOUT: way(row, FUSED, without_lengths, same=False),
    }
    return measure_ways(row, ways, method)


SUITE = Suite(
    name="ragged",
    quantity="time",
    unit="s",
    shapes=SHAPES,
    measure=measure,
)
