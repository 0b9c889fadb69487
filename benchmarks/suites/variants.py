"""The suite `variants`: regularised layers, against loops over time written with torch operations.

torch.nn has no such layers. The competitor is a Python loop as in torch's custom_lstms.py and the published code of the
AWD-LSTM and of zoneout: the product with W_ih for all steps at once, then step after step one product, one chunk, and
one call for each activation. Both sides draw the same masks from torch's generator. "plain" is fused_rnn's layer
without the option, which computes something else: it shows the cost of the option.

Weight dropout is left out: it needs no loop in torch.nn, only another weight.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

import fused_rnn
from harness.measurement import FUSED, TORCH, Measurement, Row
from harness.shapes import Shape
from harness.speed import Way, measure_ways
from harness.suite import Method, Suite
from harness.workload import CLASSES, SEED, dtype_of, one_call, random_input

OPTIONS = {"layer_norm": {"layer_norm": True}, "zoneout": {"zoneout": 0.1}, "dropout": {"recurrent_dropout": 0.2}}
SHAPES = [Shape(f"t{T}_b{B}_h{H}", T, B, I=H, H=H, L=1) for T, B, H in ((100, 1, 64), (100, 16, 128), (50, 64, 256))]
PLAIN = "plain"
# Of layer normalisation: a hundred steps from a state of zeros multiply a rounding ten thousandfold, in the loop as in
# the kernels, which are equally far from float64's results.
TOLERANCE = 0.02


class Loop:
    """One layer of a fused_rnn.LSTM or GRU, step by step in torch operations."""

    def __init__(self, module: nn.Module) -> None:
        self.m = module
        self.is_lstm = module.mode == "LSTM"

    def __call__(self, x: Tensor) -> Tensor:
        m = self.m
        B, H = x.size(1), m.hidden_size
        from_x = self.normalised(linear(x, m.weight_ih_l0), "norm_ih_l0") + m.bias_ih_l0
        drop, zones = self.masks(x)
        h = c = x.new_zeros(B, H)
        outputs = []
        for t, x_t in enumerate(from_x.unbind(0)):
            from_h = linear(h if drop is None else h * drop, m.weight_hh_l0)
            from_h = self.normalised(from_h, "norm_hh_l0") + m.bias_hh_l0
            if self.is_lstm:
                i, f, g, o = (x_t + from_h).chunk(4, 1)
                c_new = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h_new = o.sigmoid() * self.normalised(c_new, "norm_c_l0", "norm_c_bias_l0").tanh()
                c = c_new if zones is None else torch.lerp(c, c_new, zones[1] if not m.training else zones[1][t])
            else:
                (x_r, x_z, x_n), (h_r, h_z, h_n) = x_t.chunk(3, 1), from_h.chunk(3, 1)
                z = (x_z + h_z).sigmoid()
                n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
                h_new = torch.lerp(n, h, z)
            h = h_new if zones is None else torch.lerp(h, h_new, zones[0] if not m.training else zones[0][t])
            outputs.append(h)
        return torch.stack(outputs)

    def normalised(self, rows: Tensor, gain: str, bias: str = "") -> Tensor:
        if not self.m.layer_norm:
            return rows
        gain = getattr(self.m, gain)
        return layer_norm(rows, gain.shape, gain, getattr(self.m, bias) if bias else None)

    def masks(self, x: Tensor) -> tuple[Tensor | None, list[Tensor] | None]:
        """The masks of recurrent dropout, and of zoneout for h and c."""
        m, drop, zones = self.m, None, None
        if m.recurrent_dropout and m.training:
            keep = 1 - m.recurrent_dropout
            drop = x.new_empty(x.size(1), m.hidden_size).bernoulli_(keep).div_(keep)
        if m.zoneout:
            keep = 1 - m.zoneout
            shape = (len(x), x.size(1), m.hidden_size)
            draw = lambda: x.new_empty(shape).bernoulli_(keep) if m.training else x.new_full((), keep)  # noqa: E731
            zones = [draw() for _ in range(1 + self.is_lstm)]
        return drop, zones


def way(row: Row, side: str, options: dict, same: bool = True) -> Way:
    torch.manual_seed(SEED)
    module = getattr(fused_rnn, CLASSES[row.cell])(row.shape.I, row.shape.H, **options, dtype=dtype_of(row))
    module.train(row.mode == "training")
    x = random_input(row)
    forward: Callable[[Tensor], Tensor] = Loop(module) if side == TORCH else lambda x: module(x)[0]

    def seeded() -> Tensor:
        torch.manual_seed(SEED)  # the same masks
        return forward(x)

    call = one_call(row, module, seeded, x)
    return Way(call, [x, *module.parameters()], of_torch=side == TORCH, same=same)


def measure(row: Row, method: Method) -> Measurement:
    options = OPTIONS[row.call]
    ways = {TORCH: way(row, TORCH, options), FUSED: way(row, FUSED, options), PLAIN: way(row, FUSED, {}, same=False)}
    return measure_ways(row, ways, method, tolerance=TOLERANCE if "layer_norm" in options else None)


def refusal(shape: Shape) -> str | None:
    """Why a requested shape cannot be measured; None if it can."""
    return None if shape.L == shape.directions == 1 else "the loop is one layer in one direction"


SUITE = Suite(
    name="variants",
    quantity="time",
    unit="s",
    shapes=SHAPES,
    measure=measure,
    calls=tuple(OPTIONS),
    cells=("lstm", "gru"),
    refusal=refusal,
)
