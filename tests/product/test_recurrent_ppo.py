"""The reinforcement-learning example: the learner recomputes the player's actions and states.

Loop and fused backends agree, episodes start where the environments say, and advantages are those of the definition.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("gymnasium", minversion="1.1", reason="the environments of recurrent_ppo need gymnasium>=1.1")

import examples  # noqa: F401 - puts the folder of recurrent_ppo on the path
import recurrent_ppo
from recurrent_ppo import BACKENDS, LIMITS, Learner, Player, Policy, Rollout

pytestmark = pytest.mark.usefixtures("one_thread")

ENVIRONMENTS, STEPS = 6, 50

by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_cell = pytest.mark.parametrize("cell", ["lstm", "gru"])


def new_player(backend: str, cell: str = "lstm") -> Player:
    torch.manual_seed(1)
    return Player(Policy(backend, cell), ENVIRONMENTS, seed=1)


def recomputed(policy: Policy, rollout: Rollout) -> torch.Tensor:
    with torch.no_grad():
        actions, _ = policy(rollout.observations, rollout.starts, rollout.state)
    return actions.log_prob(rollout.actions)


@by_backend
@by_cell
def test_the_learner_recomputes_the_log_probabilities_of_the_rollout(backend: str, cell: str) -> None:
    """Also in later rollouts, which begin in the middle of episodes with the state reached there."""
    player = new_player(backend, cell)
    for index in range(3):
        rollout = player.play(STEPS)
        assert rollout.starts[1:].any(), "no episode ended inside: the test would show nothing"
        assert index == 0 or not rollout.starts[0].all()
        torch.testing.assert_close(recomputed(player.policy, rollout), rollout.log_probs, rtol=0, atol=2e-6)
        for environments in torch.arange(ENVIRONMENTS).chunk(2):
            part = rollout.of(environments)
            torch.testing.assert_close(recomputed(player.policy, part), part.log_probs, rtol=0, atol=2e-6)

        wrong = rollout._replace(starts=rollout.starts.roll(1, 0))  # one step late
        assert (recomputed(player.policy, wrong) - rollout.log_probs).abs().max() > 1e-4


def test_starts_are_where_the_environments_start() -> None:
    """CartPole starts within 0.05 of upright, and a step that ends an episode early lies outside of the limits."""
    player = new_player("fused")
    rollouts = [player.play(STEPS) for _ in range(3)]
    starts = torch.cat([rollout.starts for rollout in rollouts])
    observations = torch.cat([rollout.observations for rollout in rollouts]) * LIMITS
    assert starts[0].all()
    assert observations[starts].abs().max() <= 0.05 + 1e-6
    jumps = (observations[1:] - observations[:-1]).abs().amax(-1)
    assert jumps[~starts[1:]].max() < jumps[starts[1:]].min()

    lengths = []
    for column in torch.cat([starts, player.starts[None]]).T:
        lengths += column.nonzero().flatten().diff().tolist()
    assert 0 < len(lengths) < recurrent_ppo.EPISODES
    assert sorted(player.episode_returns) == sorted(lengths)


def test_an_episode_cut_off_at_the_time_limit_counts_the_value_of_its_last_observation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import gymnasium

    make = gymnasium.make
    monkeypatch.setattr(gymnasium, "make", lambda name: make(name, max_episode_steps=5))  # the pole falls later
    monkeypatch.setattr(recurrent_ppo, "GAE_LAMBDA", 0.0)  # advantages become one-step errors
    player = new_player("fused")
    rollout = player.play(9)
    assert rollout.starts.nonzero()[:, 0].unique().tolist() == [0, 5]

    # Replay past the cut, without a reset, up to the observation that the rollout does not contain.
    again = recurrent_ppo.make_environments(ENVIRONMENTS)
    again.reset(seed=1)
    for action in rollout.actions[:5]:
        *_, info = again.step(action.numpy())
    last = torch.stack([recurrent_ppo.visible(final[None])[0] for final in info["final_obs"]])
    observations = torch.cat([rollout.observations[:5], last[None]])
    with torch.no_grad():
        _, values = player.policy(observations, rollout.starts[:5].new_zeros(6, ENVIRONMENTS), rollout.state)
    expected = recurrent_ppo.REWARD_SCALE + recurrent_ppo.GAMMA * values[5]
    torch.testing.assert_close(rollout.returns[4], expected, rtol=0, atol=1e-6)


def test_advantages_are_discounted_sums_within_the_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent_ppo, "GAE_LAMBDA", 1.0)
    rewards, values = torch.randn(4, 1), torch.randn(4, 1)
    ends = torch.tensor([False, True, False, False])[:, None]
    next_value = torch.randn(1)
    found = recurrent_ppo.generalised_advantages(rewards, values, ends, next_value) + values
    g = recurrent_ppo.GAMMA
    last = rewards[3] + g * next_value
    expected = torch.stack([rewards[0] + g * rewards[1], rewards[1], rewards[2] + g * last, last])
    torch.testing.assert_close(found, expected)


@by_cell
def test_loop_and_fused_give_the_same_loss_and_gradients(cell: str) -> None:
    player = new_player("fused", cell)
    torch.manual_seed(1)
    loop = Policy("loop", cell)
    assert all(map(torch.equal, loop.state_dict().values(), player.policy.state_dict().values()))
    player.play(STEPS)
    rollout = player.play(STEPS)  # begins in the middle of episodes
    Learner(player.policy).update(rollout)  # otherwise the ratios are 1
    loop.load_state_dict(player.policy.state_dict())

    losses = [recurrent_ppo.loss_of(policy, rollout) for policy in (loop, player.policy)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    theirs, ours = (
        torch.autograd.grad(loss, list(policy.parameters()))
        for loss, policy in zip(losses, (loop, player.policy), strict=True)
    )
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert expected.abs().max() > 1e-5
    assert recurrent_ppo.first_difference(player.policy, rollout) < recurrent_ppo.SAME_START


@by_backend
def test_some_updates(backend: str) -> None:
    player = new_player(backend)
    before = [parameter.clone() for parameter in player.policy.parameters()]
    options = argparse.Namespace(steps=16, updates=3, seconds=float("inf"))
    lines = list(recurrent_ppo.train(player, options))
    assert [line["steps"] for line in lines] == [16 * ENVIRONMENTS * update for update in (1, 2, 3)]
    assert lines[-1]["done"] == 1
    assert not any(map(torch.equal, before, player.policy.parameters()))


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--updates", "2", "--envs", "4", "--steps", "8", "--cell", "gru", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["recurrent_ppo.py", *arguments])
    recurrent_ppo.main()
    assert "times as fast" in capsys.readouterr().out
    (picture,) = tmp_path.glob("*/recurrent_ppo.png")  # in the processor's folder
    with picture.with_suffix(".csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["update"] for line in lines] == ["1", "2"]
    assert lines[0]["torch_version"] == torch.__version__
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_gymnasium_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(SystemExit, match="pip install"):
        recurrent_ppo.make_environments(1)
