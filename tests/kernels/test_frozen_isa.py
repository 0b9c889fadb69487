"""Frozen weights on every instruction set: what a format promises holds on each, and int8 is the same on all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fused_rnn
from fused_rnn import _C
from processes import survives

ISAS = _C.supported_cpu_isas()
# More units than a block has, also of a projection, depths that are no multiple of any group or vector, and one of more
# than 512, with a row, some rows, and more than a part has.
MODULES = {
    "lstm": lambda: nn.LSTM(70, 75, 2),
    "lstm_proj": lambda: nn.LSTM(9, 140, proj_size=69),
    "gru": lambda: nn.GRU(523, 37, bidirectional=True),
    "rnn": lambda: nn.RNN(5, 130, nonlinearity="relu"),
}
BATCHES = (1, 5, 30)


def save_results(isa: str, path: str) -> None:
    """Check the promises, and save int8's outputs for the parent process to compare."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    assert _C.cpu_isa() == isa
    exact = 1e-5 if isa == "amx_emulated" else 0  # which multiplies bfloat16 parts in deterministic layers, too
    results = {}
    for name, make in MODULES.items():
        module = make()
        inputs = [torch.randn(3, B, module.input_size) for B in BATCHES]
        for weights, tolerance in (("float32", exact), ("bfloat16", exact), ("int8", 1e-3)):
            frozen, rounded = fused_rnn.freeze(module, weights), fused_rnn.from_torch(module)
            for key, parameter in rounded.named_parameters():
                value = frozen.state_dict()[key].float()
                if weights == "int8" and key.startswith("weight"):
                    value *= frozen.state_dict()[f"{key}_scale"].unsqueeze(1)
                parameter.copy_(value)
            for x in inputs:
                y, expected = frozen(x)[0], rounded(x)[0]
                scale = max(1.0, expected.abs().max().item())
                torch.testing.assert_close(y, expected, rtol=0, atol=tolerance * scale)
                if not module.bidirectional:
                    assert torch.equal(frozen.stream(x.size(1)).chunk(x), y)
                if weights == "int8":
                    results[f"{name} {x.size(1)}"] = y / scale
    torch.save(results, path)


def test_every_instruction_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in ISAS:
        monkeypatch.setenv("FUSED_RNN_CPU_ISA", isa)
        survives(save_results, isa, str(tmp_path / isa))
    expected = torch.load(tmp_path / ISAS[0])
    assert len(expected) == len(MODULES) * len(BATCHES)
    for isa in ISAS[1:]:
        found = torch.load(tmp_path / isa)
        for name in expected:
            # Exact sums: what differs is an input now and then, rounded to the neighbour of 32767 levels.
            assert (found[name] - expected[name]).abs().max() < 1e-4, (isa, name)
