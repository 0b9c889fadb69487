"""Training with Lightning is the same with and without fused_rnn's callback, in one process and in two."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from processes import python

lightning = pytest.importorskip("lightning.pytorch", reason='Lightning is not installed: pip install ".[lightning]"')
ReplaceRNNs = import_module("fused_rnn.integrations.lightning").ReplaceRNNs

DATA = torch.randn(16, 7, 3, generator=torch.Generator().manual_seed(1))


class Model(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rnn, self.head = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 1)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.head(self.rnn(batch)[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(DATA, batch_size=4)


def train(folder: Path, callbacks: list[Any], **options: Any) -> dict[str, torch.Tensor]:
    model = Model()
    trainer = lightning.Trainer(
        max_epochs=2, callbacks=callbacks, accelerator="cpu", default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(model)
    trainer.save_checkpoint(folder / "checkpoint.pt")
    return model.state_dict()


@pytest.mark.slow("trains models")
def test_trains_the_same(tmp_path: Path) -> None:
    callback = ReplaceRNNs()
    theirs, ours = train(tmp_path, []), train(tmp_path, [callback])
    torch.testing.assert_close(ours, theirs)
    assert callback.replaced == ["rnn"]
    assert b"fused_rnn" not in (tmp_path / "checkpoint.pt").read_bytes().replace(b"ReplaceRNNs", b"")


def test_the_library_under_its_other_name(tmp_path: Path) -> None:
    if find_spec("pytorch_lightning") is None:
        pytest.skip("pytorch-lightning is not installed")
    code = "import pytorch_lightning as pl; from fused_rnn.integrations.lightning import ReplaceRNNs as cls; "
    process = python("-c", code + "print(issubclass(cls, pl.Callback))", cwd=tmp_path)
    assert process.stdout == "True\n", process.stderr


DDP = """
import sys, torch
sys.path[:0] = {paths!r}
from pathlib import Path
import fused_rnn
from test_lightning import ReplaceRNNs, Model, train
import torch.distributed as dist

class Check(ReplaceRNNs):
    def on_train_start(self, trainer, module):
        assert isinstance(module.rnn, fused_rnn.GRU) and trainer.world_size == 2
        Path(sys.argv[1], f"rank{{trainer.global_rank}}").write_text(str(self.replaced))

if __name__ == "__main__":
    train(Path(sys.argv[1]), [Check()], devices=2, strategy="ddp")
"""


@pytest.mark.slow("starts processes")
def test_with_ddp(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    (tmp_path / "program.py").write_text(DDP.format(paths=paths))
    process = python("program.py", str(tmp_path), cwd=tmp_path, OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["['rnn']"] * 2
    assert (process.stdout + process.stderr).count("fused_rnn runs rnn") == 1
