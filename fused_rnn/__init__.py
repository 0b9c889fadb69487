"""Drop-in RNN, LSTM and GRU for PyTorch on fused kernels.

>>> import torch, fused_rnn
>>> lstm = fused_rnn.LSTM(10, 20)  # instead of torch.nn.LSTM
>>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
>>> output.shape
torch.Size([5, 3, 20])
"""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

if find_spec("fused_rnn._C") is None:
    raise ImportError(
        f"fused_rnn is not built in {__path__[0]}. In its source folder, Python finds the sources before the "
        "installed package: run from another folder after `pip install .`, or build in place with "
        "`pip install -e .`"
    )
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
    raise ImportError(f"fused_rnn needs torch 2.10 or newer, found {torch.__version__}")

from fused_rnn import _C as _C  # registers torch.ops.fused_rnn
from fused_rnn import compiled as compiled  # adds what compilers take
from fused_rnn import fakes as fakes  # and the shapes that they ask for
from fused_rnn.cells import GRUCell, LSTMCell, RNNCell
from fused_rnn.convert import from_torch, replace
from fused_rnn.lowering import operator_decompositions
from fused_rnn.modules import GRU, LSTM, RNN
from fused_rnn.patch import patched
from fused_rnn.planning import plan

OPERATORS_LIBRARY = str(Path(__file__).with_name("_cpu.so"))
"""The file of the CPU operators, for ``torch.ops.load_library`` or a C++ program: it needs no Python."""

try:
    __version__ = version("fused_rnn")
except PackageNotFoundError:  # a build in place that was never installed
    __version__ = "unknown"

__all__ = [
    "GRU",
    "LSTM",
    "OPERATORS_LIBRARY",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "from_torch",
    "operator_decompositions",
    "patched",
    "plan",
    "replace",
]
