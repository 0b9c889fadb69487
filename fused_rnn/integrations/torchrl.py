"""TorchRL's LSTMModule and GRUModule: a batch of trajectories in one call, where the library splits, pads and packs it.

`is_init` marks where a trajectory begins within a row. TorchRL cuts the row there, pads the pieces, packs them, runs
the RNN and puts its results together again. Here `is_init` is the `resets` of one call, a state that the data holds at
such a step is its `reset_state`, and the states at the ends of trajectories come from the states of every step.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor, nn
from torchrl.modules import GRUModule, LSTMModule

import fused_rnn
from fused_rnn.convert import Replaced


def replace(model: nn.Module) -> Replaced:
    """Convert every LSTMModule and GRUModule inside model, and all of torch.nn's recurrent modules, in place.

    Call it before a loss is built of the model: losses hold networks where `named_modules` does not see them.

    Args:
        model: any module; it may itself be one of those.

    Returns:
        The names of the converted modules, as `fused_rnn.replace` does.
    """
    names = []
    for name, module in model.named_modules():
        if type(module) in FUSED:
            module.make_cudnn_based()  # torch.nn's class in place of a loop in Python; nothing to do with cuDNN here
            module.__class__ = FUSED[type(module)]
            names.append(name)
    result = fused_rnn.replace(model)
    return Replaced(sorted([*names, *result]), result.skipped)


class _Fused:
    """`forward` of whole trajectories; single steps and bidirectional modules are left to TorchRL's own."""

    @dispatch
    def forward(self: Any, tensordict: TensorDictBase) -> TensorDictBase:
        rnn = self.lstm if isinstance(self, LSTMModule) else self.gru
        states_in = self.in_keys[1 : len(self.out_keys)]
        given = [tensordict.get(key, None) is not None for key in states_in]
        if not self.recurrent_mode or rnn.bidirectional or not tensordict.ndim or any(given) != all(given):
            return super().forward(tensordict)  # type: ignore
        rows = tensordict.reshape(-1, tensordict.shape[-1])  # [B, T]
        resets = rows["is_init"].squeeze(-1)
        hx = fresh = None
        if all(given):
            states = [rows[key].permute(1, 2, 0, 3) for key in states_in]  # [B, T, L, H] as [T, L, B, H]
            fresh, hx = pack(rnn, states), pack(rnn, [state[0] for state in states])
        output, _, sequence = rnn(
            rows[self.in_keys[0]], hx, resets=resets, reset_state=fresh, return_state_sequence=True
        )
        # As TorchRL's backends do: the state after the last step of a trajectory, zeros elsewhere.
        ends = torch.cat([resets[:, 1:], torch.ones_like(resets[:, :1])], 1)[..., None, None]
        finals = [torch.where(ends, state.permute(2, 0, 1, 3), 0) for state in unpack(rnn, sequence)]
        for key, value in zip(self.out_keys, [output, *finals], strict=True):
            tensordict.set(key, value.reshape(*tensordict.shape, *value.shape[2:]))
        return tensordict


class FusedLSTMModule(_Fused, LSTMModule):
    """LSTMModule, converted by `replace`."""


class FusedGRUModule(_Fused, GRUModule):
    """GRUModule, converted by `replace`."""


FUSED = {LSTMModule: FusedLSTMModule, GRUModule: FusedGRUModule}


def pack(rnn: nn.RNNBase, states: list[Tensor]) -> Any:
    return tuple(states) if rnn.mode == "LSTM" else states[0]


def unpack(rnn: nn.RNNBase, states: Any) -> Any:
    return states if rnn.mode == "LSTM" else (states,)
