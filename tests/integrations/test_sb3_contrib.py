"""sb3-contrib's RecurrentPPO learns the same with fused_rnn's adapter, which makes one call per minibatch."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

sb3_contrib = pytest.importorskip("sb3_contrib", reason='sb3-contrib is not installed: pip install ".[sb3]"')
replace = import_module("fused_rnn.integrations.sb3_contrib").replace

POLICIES = {
    "two LSTMs": {},
    "shared LSTM": {"shared_lstm": True, "enable_critic_lstm": False},
    "critic without LSTM": {"enable_critic_lstm": False},
    "two layers": {"n_lstm_layers": 2},
}


def make_agent(fused: bool, policy: dict[str, Any]) -> Any:
    """An agent for CartPole, whose first episodes are short: every rollout has several in a row."""
    options = {"lstm_hidden_size": 16, **policy}
    agent = sb3_contrib.RecurrentPPO(
        "MlpLstmPolicy",
        "CartPole-v1",
        n_steps=64,
        batch_size=32,
        n_epochs=2,
        seed=1,
        policy_kwargs=options,
        device="cpu",
    )
    if fused:
        assert "lstm_actor" in replace(agent.policy)
    return agent


@pytest.mark.slow("trains agents")
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_learns_the_same(policy: dict[str, Any], one_thread: None) -> None:
    theirs, ours = (make_agent(fused, policy).learn(128).policy.state_dict() for fused in (False, True))
    initial = make_agent(False, policy).policy.state_dict()
    assert any((theirs[name] - initial[name]).abs().max() > 1e-3 for name in theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_minibatch_is_one_call() -> None:
    policy = make_agent(True, {}).policy
    features, starts = torch.randn(3 * 20, 4), (torch.rand(3 * 20) < 0.2).float()
    states = (torch.randn(1, 3, 16), torch.randn(1, 3, 16))
    theirs = type(policy)._process_sequence(features, states, starts, policy.lstm_actor.to_torch())
    calls: list[Any] = []
    policy.lstm_actor.register_forward_hook(lambda module, args, result: calls.append(args[0].shape))
    torch.testing.assert_close(policy._process_sequence(features, states, starts, policy.lstm_actor), theirs)
    assert calls == [(20, 3, 4)]


def test_what_is_saved_loads_without_the_package(tmp_path: Path) -> None:
    agent = make_agent(True, {})
    agent.save(tmp_path / "agent.zip")
    loaded = sb3_contrib.RecurrentPPO.load(tmp_path / "agent.zip")
    assert type(loaded.policy.lstm_actor) is torch.nn.LSTM
    observation = agent.observation_space.sample()
    assert loaded.predict(observation, deterministic=True)[0] == agent.predict(observation, deterministic=True)[0]


def test_other_policies_are_refused() -> None:
    with pytest.raises(TypeError, match="RecurrentActorCriticPolicy, got LSTM"):
        replace(torch.nn.LSTM(3, 5))
