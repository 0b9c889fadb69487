"""The shapes of the benchmarks, chosen from uses of recurrent networks.

Small shapes are bound by the cost of a call, narrow batches by how fast the weights come from the
caches, wide batches by arithmetic. A library can win one of these and lose another, so the grid has
some of each, named after their use.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """`T` time steps, batch `B`, input size `I`, hidden size `H`, `L` layers, one direction or two."""

    name: str
    T: int
    B: int
    I: int  # noqa: E741 - the symbol in torch.nn's documentation
    H: int
    L: int
    bidirectional: bool = False

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


GROUPS = {
    "tutorial": (
        Shape("hello", T=5, B=1, I=4, H=4, L=1),
        Shape("hello_embedding", T=5, B=1, I=10, H=8, L=2),
        Shape("shapes_tour", T=6, B=5, I=100, H=200, L=3),
        Shape("shapes_tour_lstm", T=10, B=3, I=100, H=200, L=2),
        Shape("shapes_tour_gru", T=3, B=32, I=10, H=20, L=1),
        Shape("sentiment", T=3, B=50, I=100, H=256, L=4),
        Shape("image_rows", T=28, B=64, I=28, H=100, L=2),
        Shape("time_machine", T=35, B=32, I=28, H=256, L=1),
    ),
    "streaming": (
        Shape("step_h64", T=1, B=1, I=64, H=64, L=1),
        Shape("step_h256", T=1, B=1, I=256, H=256, L=2),
        Shape("vad_chunk", T=16, B=1, I=64, H=128, L=1),
        Shape("denoise_chunk", T=100, B=1, I=256, H=256, L=2),
        Shape("asr_predictor", T=50, B=1, I=640, H=640, L=1),
    ),
    "rl": (
        Shape("rollout", T=1, B=64, I=64, H=128, L=1),
        Shape("learner_small", T=16, B=128, I=64, H=128, L=1),
        Shape("learner", T=64, B=64, I=256, H=256, L=1),
    ),
    "supervised": (
        Shape("forecast", T=100, B=32, I=8, H=64, L=2),
        Shape("tagger_bi", T=50, B=32, I=128, H=128, L=1, bidirectional=True),
        Shape("encoder_bi", T=100, B=16, I=256, H=256, L=2, bidirectional=True),
        Shape("lm_512", T=64, B=32, I=512, H=512, L=2),
        Shape("lm_1024", T=32, B=64, I=1024, H=1024, L=1),
    ),
    "gpu": (
        Shape("b1_h128", T=512, B=1, I=128, H=128, L=1),
        Shape("b1_h1024", T=512, B=1, I=1024, H=1024, L=1),
        Shape("b16_h512", T=512, B=16, I=512, H=512, L=1),
        Shape("b16_h768", T=1024, B=16, I=768, H=768, L=1),
        Shape("b32_h192", T=512, B=32, I=192, H=192, L=1),
        Shape("b64_h160", T=512, B=64, I=160, H=160, L=1),
        Shape("b64_h256", T=512, B=64, I=256, H=256, L=1),
        Shape("b64_h1024", T=512, B=64, I=1024, H=1024, L=1),
        Shape("b256_h512", T=256, B=256, I=512, H=512, L=1),
        Shape("b64_h2048", T=256, B=64, I=2048, H=2048, L=1),
        Shape("b64_h512_l3", T=256, B=64, I=512, H=512, L=3),
        Shape("b32_h512_bi_l2", T=256, B=32, I=512, H=512, L=2, bidirectional=True),
        Shape("rl_learner", T=64, B=2048, I=256, H=256, L=1),
    ),
}

CPU_GROUPS = ("tutorial", "streaming", "rl", "supervised")


def cpu_shapes() -> list[Shape]:
    return [shape for group in CPU_GROUPS for shape in GROUPS[group]]


def named(shapes: Sequence[Shape], names: Sequence[str]) -> list[Shape]:
    """The shapes with these names, in the order of `shapes`.

    Raises:
        ValueError: a name is no shape's.
    """
    known = [shape.name for shape in shapes]
    for name in names:
        if name not in known:
            raise ValueError(f"no row is called {name}; the rows are {', '.join(known)}")
    return [shape for shape in shapes if shape.name in names]


def parse_shape(text: str) -> Shape:
    """Read `T,B,I,H,L` or `T,B,I,H,L,bi`, the form of the command line."""
    *sizes, last = text.split(",")
    bidirectional = last == "bi"
    if not bidirectional:
        sizes.append(last)
    if len(sizes) != 5 or not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected five positive numbers T,B,I,H,L and perhaps ,bi; got {text}")
    T, B, I, H, L = map(int, sizes)  # noqa: E741
    name = f"T{T}_B{B}_I{I}_H{H}_L{L}{'_bi' if bidirectional else ''}"
    return Shape(name, T, B, I, H, L, bidirectional)
