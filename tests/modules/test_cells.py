"""RNNCell, LSTMCell and GRUCell: values and gradients against torch.nn and a float64 reference."""

import pytest
import torch
from torch import Tensor

import fused_rnn
from cases import CELL_SIZES
from test_modules import DTYPES
from tolerances import assert_as_accurate

CELLS = [("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"}), ("LSTMCell", {}), ("GRUCell", {})]


def _results(module: torch.nn.Module, data: list[Tensor]) -> dict[str, Tensor]:
    data = [t.clone().requires_grad_() for t in data]
    x, *states = data
    outputs = module(x, tuple(states) if len(states) == 2 else states[0])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(2)
    loss = sum((o * torch.randn(o.shape, generator=generator).to(o.dtype)).sum() for o in outputs)
    names = ["x", "h", "c"][: len(data)] + [name for name, _ in module.named_parameters()]
    grads = torch.autograd.grad(loss, [*data, *module.parameters()])
    results = dict(zip(["h'", "c'"], outputs, strict=False))
    return results | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("sizes", CELL_SIZES, ids=str)
@pytest.mark.parametrize(("name", "options"), CELLS, ids=lambda v: str(v))
def test_cell_matches_torch(
    name: str, options: dict, sizes: tuple[int, int, int], bias: bool, dtype: torch.dtype
) -> None:
    B, size, H = sizes
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(size, H, bias=bias, **options, dtype=dtype)
    ours = getattr(fused_rnn, name)(size, H, bias=bias, **options, dtype=dtype)
    exact = getattr(torch.nn, name)(size, H, bias=bias, **options, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    exact.load_state_dict(theirs.state_dict())
    shapes = [(B, size), (B, H)] + [(B, H)] * (name == "LSTMCell")
    data = [torch.randn(shape).to(dtype) for shape in shapes]
    expected, actual = _results(theirs, data), _results(ours, data)
    for key, value in _results(exact, [t.double() for t in data]).items():
        if key.startswith("d") and options and dtype.itemsize == 2:
            continue  # near relu's kink, rounding decides on which side a value lies, and the gradient jumps
        if dtype == torch.float64:  # torch.nn's measured error is zero
            torch.testing.assert_close(actual[key], value, rtol=1e-12, atol=1e-11, msg=key)
        else:
            assert_as_accurate(actual[key], expected[key], value, key)


def test_input_and_hidden_of_different_rank_are_refused() -> None:
    for name in ("RNNCell", "GRUCell"):
        with pytest.raises(RuntimeError, match="same number of dimensions, got 1D and 2D"):
            getattr(fused_rnn, name)(3, 4)(torch.randn(3), torch.randn(4, 4))
        with pytest.raises(RuntimeError, match="same number of dimensions, got 2D and 1D"):
            getattr(fused_rnn, name)(3, 4)(torch.randn(4, 3), torch.randn(4))
    with pytest.raises(RuntimeError, match="same number of dimensions, got 1D and 2D"):
        fused_rnn.LSTMCell(3, 4)(torch.randn(3), (torch.randn(4, 4), torch.randn(4, 4)))
