"""PyTorch Lightning: a callback that converts a model before training, testing or prediction begins."""

from __future__ import annotations

import sys
from typing import Any

import fused_rnn
from fused_rnn.convert import Replaced

if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:  # the same library under its other name
    from pytorch_lightning import Callback
    from pytorch_lightning.utilities import rank_zero_info
else:
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities import rank_zero_info


class ReplaceRNNs(Callback):
    """Calls `fused_rnn.replace` on the LightningModule at setup, in every process; the first prints what it converted.

    Setup comes before the strategy wraps the model and before the optimisers are made, and parameters keep their names:
    any strategy and any checkpoint works. Checkpoints hold no trace of this package.

    Attributes:
        replaced: the result of `fused_rnn.replace`; None before setup.
    """

    def __init__(self) -> None:
        self.replaced: Replaced | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Converts, at the first of the stages of a trainer."""
        if self.replaced is None:
            self.replaced = fused_rnn.replace(pl_module)
            names = ", ".join(name or "the module itself" for name in self.replaced)
            rank_zero_info("fused_rnn runs %s", names or "nothing: there is no recurrent module of torch.nn's")
