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

if find_spec("fused_rnn._C") is None:
    raise ImportError(
        f"fused_rnn is not built in {__path__[0]}. In its source folder, Python finds the sources before the "
        "installed package: run from another folder after `pip install .`, or build in place with "
        "`pip install -e .`"
    )

from fused_rnn import launch as launch

if launch.requested():  # before torch is imported: the script may set variables that torch reads then
    launch.run(launch.parser().parse_args())

import torch

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
    raise ImportError(f"fused_rnn needs torch 2.10 or newer, found {torch.__version__}")

from fused_rnn import _C as _C  # registers torch.ops.fused_rnn
from fused_rnn import compiled as compiled  # adds what compilers take
from fused_rnn import fakes as fakes  # and the shapes that they ask for
from fused_rnn import functional as functional
from fused_rnn.cells import GRUCell, LSTMCell, RNNCell
from fused_rnn.compiled import operator_decompositions
from fused_rnn.convert import from_torch, replace
from fused_rnn.frozen import FrozenCell, FrozenRNN, freeze, load_frozen
from fused_rnn.modules import GRU, LSTM, RNN
from fused_rnn.patch import patched
from fused_rnn.planning import plan
from fused_rnn.stream import Stream
from fused_rnn.tool_tables import install as _install_tool_tables
from fused_rnn.tuning import tune

_install_tool_tables()

OPERATORS_LIBRARY = str(Path(__file__).with_name("_cpu.so"))
"""Path of the CPU operators' library, for ``torch.ops.load_library`` or a C++ program; it needs no Python."""

STREAM_LIBRARY = str(Path(__file__).with_name("_stream.so"))
"""Path of the library of streams for programs in C; its header is ``<fused_rnn/stream.h>`` in the folder `INCLUDE`."""

INCLUDE = str(Path(__file__).parents[1])
"""The folder for a C compiler's ``-I`` that has ``fused_rnn/stream.h``."""

try:
    __version__ = version("fused_rnn")
except PackageNotFoundError:  # a build in place that was never installed
    __version__ = "unknown"

__all__ = [
    "GRU",
    "INCLUDE",
    "LSTM",
    "OPERATORS_LIBRARY",
    "RNN",
    "STREAM_LIBRARY",
    "FrozenCell",
    "FrozenRNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Stream",
    "freeze",
    "from_torch",
    "functional",
    "load_frozen",
    "operator_decompositions",
    "patched",
    "plan",
    "replace",
    "tune",
]
