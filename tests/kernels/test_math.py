"""The kernels' sigmoid and tanh against torch in float64, on every instruction set of this machine, for all exponents.

The error may be 2 ulp, and 3 ulp in float64, where torch's own error counts, too.
"""

import pytest
import torch
from torch import Tensor

from fused_rnn import _C

_EXACT = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}


def _map(function: str, isa: str, x: Tensor) -> Tensor:
    return torch.frombuffer(_C.map_function(function, isa, x.numpy()), dtype=x.dtype)


def _ulps(actual: Tensor, exact: Tensor) -> float:
    """The largest error in units in the last place of `actual`'s dtype. Subnormal results may be 0, as torch's are."""
    info = torch.finfo(actual.dtype)
    exact = exact.to(torch.float64)
    spacing = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=info.tiny)))) * info.eps
    distance = (actual.double() - exact).abs()
    subnormal = exact.abs() < info.tiny
    assert distance[subnormal].le(exact[subnormal].abs()).all()
    return (distance / spacing)[~subnormal].max().item()


def _all_float32_exponents() -> Tensor:
    bits = torch.arange(0, 0x7F800000, 3001, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    return torch.cat((x, -x))


@pytest.mark.parametrize("isa", _C.supported_cpu_isas())
@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_float32(function: str, isa: str) -> None:
    x = torch.cat((_all_float32_exponents(), torch.linspace(-110, 110, 400_001)))
    assert _ulps(_map(function, isa, x), _EXACT[function](x.double())) <= 2


@pytest.mark.parametrize("isa", _C.supported_cpu_isas())
@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_float64(function: str, isa: str) -> None:
    # torch's float64 functions have an error of up to one ulp themselves, hence 3.
    x = torch.cat((_all_float32_exponents().double(), torch.linspace(-750, 750, 200_001, dtype=torch.float64)))
    assert _ulps(_map(function, isa, x), _EXACT[function](x)) <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("isa", _C.supported_cpu_isas())
def test_special_values(isa: str, dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")], dtype=dtype)
    sigmoid, tanh = _map("sigmoid", isa, x), _map("tanh", isa, x)
    torch.testing.assert_close(sigmoid, torch.sigmoid(x), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(tanh, torch.tanh(x), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(tanh[:4]), torch.tensor([False, True, False, True]))


def test_bad_input_is_refused() -> None:
    x = torch.zeros(3).numpy()
    with pytest.raises(ValueError, match="'sigmoid' or 'tanh', got 'cosh'"):
        _C.map_function("cosh", _C.cpu_isa(), x)
    with pytest.raises(ValueError, match="'mmx' is not supported"):
        _C.map_function("tanh", "mmx", x)
    with pytest.raises(ValueError, match="float32 or float64"):
        _C.map_function("tanh", _C.cpu_isa(), torch.zeros(3, dtype=torch.int32).numpy())
    with pytest.raises(ValueError, match="one-dimensional and contiguous"):
        _C.map_function("tanh", _C.cpu_isa(), x[::2])
