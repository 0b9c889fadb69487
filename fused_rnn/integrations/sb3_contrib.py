"""sb3-contrib's recurrent policies: one call for a whole minibatch, where the library loops over time.

A minibatch contains episodes one after the other, so `RecurrentPPO` runs its LSTM step by step, with the states of rows
that begin an episode set to zero. Here the starts of episodes are the `resets` of one call.
"""

from __future__ import annotations

from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from torch import Tensor

import fused_rnn
from fused_rnn.convert import Replaced

States = tuple[Tensor, Tensor]


def replace(policy: RecurrentActorCriticPolicy) -> Replaced:
    """Convert the LSTMs of a recurrent policy in place, and run them over a whole sequence in one call.

    Parameters and optimiser stay as they are. What `agent.save` writes names nothing of this package; call `replace`
    again after `RecurrentPPO.load`, which builds a new policy.

    Args:
        policy: `agent.policy`, of any of sb3-contrib's recurrent policies or a class derived from them.

    Returns:
        The names of the converted modules, as `fused_rnn.replace` does.

    Raises:
        TypeError: `policy` is not a recurrent policy.
    """
    if not isinstance(policy, RecurrentActorCriticPolicy):
        raise TypeError(f"replace: expected policy to be a RecurrentActorCriticPolicy, got {type(policy).__name__}")
    replaced = fused_rnn.replace(policy)
    if not replaced.skipped:
        policy._process_sequence = process_sequence
    return replaced


def process_sequence(
    features: Tensor, lstm_states: States, episode_starts: Tensor, lstm: fused_rnn.LSTM
) -> tuple[Tensor, States]:
    """`RecurrentActorCriticPolicy._process_sequence` without its loop over time.

    Args:
        features: ``[B * T, I]``, row after row; one step (T = 1) while a rollout is collected.
        lstm_states: h and c, each ``[L, B, H]``.
        episode_starts: ``[B * T]``, 1.0 where an episode begins.

    Returns:
        The output ``[B * T, H]`` and the final states.
    """
    rows = lstm_states[0].shape[1]
    resets = episode_starts.reshape(rows, -1).t() != 0
    if len(resets) == 1:
        return lstm.step(features, lstm_states, resets=resets[0])
    x = features.reshape(rows, -1, lstm.input_size).transpose(0, 1)
    output, lstm_states = lstm(x, lstm_states, resets=resets)
    return output.transpose(0, 1).flatten(0, 1), lstm_states
