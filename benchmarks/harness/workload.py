"""The timed calls: one call of a recurrent module, in inference or with its backward pass.

    inference    `with torch.inference_mode(): y = m(x)`
    training     `m.zero_grad(set_to_none=True); y = m(x); y.backward(dy)`, without an optimiser

x is random and, like data, needs no gradient, so backward computes the gradients of the weights and of
the values between layers, but none of x (except in the suites `rl` and `ragged`, where x stands for
another layer's output). Sequences start from zero states, `m(x)`. A single step (T = 1) gets a state,
`m(x, hx)`: it stands for a step of a longer sequence, and without a state there would be no recurrent
product.
"""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

import fused_rnn
from harness.measurement import FUSED, TORCH, Row
from harness.shapes import Shape

CLASSES = {"rnn": "RNN", "lstm": "LSTM", "gru": "GRU"}
GATES = {"rnn": 1, "lstm": 4, "gru": 3}
MODES = ("inference", "training")
LIBRARIES = {TORCH: torch.nn, FUSED: fused_rnn}
SEED = 1


def build_module(side: str, row: Row) -> nn.Module:
    """The row's RNN, LSTM or GRU."""
    shape = row.shape
    return build(side, row, "", shape.I, shape.H, shape.L, bidirectional=shape.bidirectional)


def build_cell(side: str, row: Row) -> nn.Module:
    """The row's RNNCell, LSTMCell or GRUCell."""
    return build(side, row, "Cell", row.shape.I, row.shape.H)


def build(side: str, row: Row, suffix: str, *sizes: int, **flags: bool) -> nn.Module:
    """A module of one side's library; equal arguments give equal weights."""
    library: ModuleType = LIBRARIES[side]
    torch.manual_seed(SEED)
    module = getattr(library, CLASSES[row.cell] + suffix)(*sizes, **flags, dtype=dtype_of(row))
    return module.train(row.mode == "training")


def dtype_of(row: Row) -> torch.dtype:
    return getattr(torch, row.dtype)


def random_tensor(row: Row, *sizes: int) -> Tensor:
    """A random tensor; equal sizes give equal values."""
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(SEED)).to(dtype_of(row))


def random_input(row: Row) -> Tensor:
    """x, `[T, B, I]`."""
    return random_tensor(row, row.shape.T, row.shape.B, row.shape.I)


def random_state(row: Row, sizes: Sequence[int]) -> Tensor | tuple[Tensor, Tensor]:
    """Random hx of these sizes; a pair for the LSTM."""
    state = random_tensor(row, *sizes)
    return (state, state.clone()) if row.cell == "lstm" else state


def module_arguments(row: Row) -> tuple:
    """The arguments of the row's module: x, and hx if the row starts from a given state."""
    x = random_input(row)
    if not row.given_state:
        return (x,)
    return x, random_state(row, state_sizes(row.shape))


def state_sizes(shape: Shape) -> tuple[int, int, int]:
    """The sizes of h and c: layers times directions, batch, hidden size."""
    return shape.L * shape.directions, shape.B, shape.H


def output_sizes(shape: Shape) -> tuple[int, int, int]:
    """The size of y: time, batch, directions times hidden size."""
    return shape.T, shape.B, shape.directions * shape.H


def module_call(row: Row, module: nn.Module) -> Callable[[], Tensor]:
    """A call of a module on the whole sequence."""
    arguments = module_arguments(row)
    return one_call(row, module, lambda: module(*arguments)[0])


def one_call(
    row: Row, module: nn.Module, forward: Callable[[], Tensor], x: Tensor | None = None
) -> Callable[[], Tensor]:
    """The timed call around `forward`, in the row's mode; both return y.

    If x is given, training also computes its gradient.
    """
    if row.mode == "inference":

        def infer() -> Tensor:
            with torch.inference_mode():
                return forward()

        return infer

    dy = random_tensor(row, *output_sizes(row.shape))
    if x is not None:
        x.requires_grad_()

    def train() -> Tensor:
        module.zero_grad(set_to_none=True)
        if x is not None:
            x.grad = None
        y = forward()
        y.backward(dy)
        return y

    return train
