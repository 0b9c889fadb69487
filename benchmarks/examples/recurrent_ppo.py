"""Recurrent PPO: an LSTM or GRU learns to balance a pole whose velocities it cannot see.

The task is gymnasium's CartPole-v1 with two of its four observations hidden: only the position of the cart and the
angle of the pole are left. The velocities must be inferred from earlier observations, so the policy is recurrent.

Episodes end inside a rollout, and the next one must begin with a fresh state. fused_rnn takes the whole rollout in one
call, `lstm(x, hx, resets=starts)`. Without `resets`, a loop over time masks the state, `(1 - start) * h`: this is
`--backend loop`, on torch.nn. The losses of the two are compared first; their times, taken in turns, at the end.
"""

import argparse
import csv
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor, nn
from torch.distributions import Categorical

sys.path.append(str(Path(__file__).parents[1]))

import fused_rnn
from harness.machine import add_output, describe_machine, processor_folder
from harness.timing import InterleavedTiming, time_interleaved

BACKENDS = ("loop", "fused")
VISIBLE = [0, 2]  # indices of CartPole's observations: cart position, pole angle
LIMITS = torch.tensor([2.4, 0.21])  # of these two; beyond them the episode ends
HIDDEN_SIZE = 64
GAMMA, GAE_LAMBDA, REWARD_SCALE = 0.99, 0.95, 0.01  # with this scale, values are at most 1
EPOCHS, MINIBATCHES, LEARNING_RATE = 4, 4, 2e-3
CLIP, VALUE_WEIGHT, ENTROPY_WEIGHT, MAX_GRADIENT_NORM = 0.2, 0.5, 0.01, 0.5  # the customary values
EPISODES = 100  # that the mean return is taken over, the last ones
SAME_START = 1e-5  # limit on the difference of the first update's losses between the backends
TIMED_UPDATES, WARM_UP = 9, 2
PROGRESS = "{steps:8d} steps, {seconds:4.0f} s: return {mean_return:5.1f}; learner {learner_ms:.0f} ms per update"
LEARNER_TIMES = "learner, per update: loop {loop_ms:.0f} ms, fused {fused_ms:.0f} ms, {speed_up:.1f} times as fast"

State = Tensor | tuple[Tensor, Tensor]  # h of a GRU, (h, c) of an LSTM: each (1, environments, HIDDEN_SIZE)


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    return function(state) if isinstance(state, Tensor) else tuple(map(function, state))


def fresh_where(starts: Tensor, state: State) -> State:
    """The state, with zeros for the environments in which an episode starts."""
    keep = 1 - starts[:, None].float()
    return map_state(lambda part: keep * part, state)


class Policy(nn.Module):
    """A recurrent layer with two heads. The backends differ only in how they run that layer."""

    def __init__(self, backend: str, cell: str) -> None:
        super().__init__()
        library = fused_rnn if backend == "fused" else nn
        layer = {"lstm": library.LSTM, "gru": library.GRU}[cell]
        self.backend, self.cell = backend, cell
        self.recurrent = layer(len(VISIBLE), HIDDEN_SIZE)
        self.action_head, self.value_head = nn.Linear(HIDDEN_SIZE, 2), nn.Linear(HIDDEN_SIZE, 1)

    def forward(self, observations: Tensor, starts: Tensor, state: State) -> tuple[Categorical, Tensor]:
        """The learner's call: action distributions and values of a whole rollout, (time, environment)."""
        if self.backend == "fused":
            outputs, _ = self.recurrent(observations, state, resets=starts)
        else:
            outputs = []
            for observation, start in zip(observations, starts, strict=True):
                output, state = self.recurrent_step(observation, fresh_where(start, state))
                outputs.append(output)
            outputs = torch.stack(outputs)
        return self.heads(outputs)

    def step(self, observation: Tensor, starts: Tensor, state: State) -> tuple[Categorical, Tensor, State]:
        """The player's call: one step of every environment."""
        output, state = self.recurrent_step(observation, fresh_where(starts, state))
        return *self.heads(output), state

    def recurrent_step(self, observation: Tensor, state: State) -> tuple[Tensor, State]:
        if self.backend == "fused":
            return self.recurrent.step(observation, state)
        output, state = self.recurrent(observation.unsqueeze(0), state)
        return output.squeeze(0), state

    def heads(self, outputs: Tensor) -> tuple[Categorical, Tensor]:
        actions = Categorical(logits=self.action_head(outputs), validate_args=False)
        return actions, self.value_head(outputs).squeeze(-1)


class Rollout(NamedTuple):
    """Some steps of all environments, (time, environment), and the state before the first step."""

    observations: Tensor
    starts: Tensor  # whether this observation is the first of an episode
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor
    state: State

    def of(self, environments: Tensor) -> "Rollout":
        return Rollout(*(map_state(lambda tensor: tensor[:, environments], part) for part in self))


def make_environments(count: int) -> Any:
    """Vector environments in SameStep mode: where an episode ends, `step` returns the next one's first observation."""
    try:
        from gymnasium import make, vector
    except ImportError:
        sys.exit('recurrent_ppo needs gymnasium for its environments: run pip install "gymnasium>=1.1"')
    return vector.SyncVectorEnv([partial(make, "CartPole-v1")] * count, autoreset_mode="SameStep")


def visible(observation: Any) -> Tensor:
    return torch.as_tensor(observation[:, VISIBLE], dtype=torch.float32) / LIMITS


class Player:
    """Plays in all environments, rollout after rollout, and keeps track of where episodes start."""

    def __init__(self, policy: Policy, count: int, seed: int) -> None:
        self.policy, self.environments = policy, make_environments(count)
        self.observation = visible(self.environments.reset(seed=seed)[0])
        self.starts = torch.ones(count, dtype=torch.bool)
        zeros = torch.zeros(1, count, HIDDEN_SIZE)
        self.state = (zeros, zeros) if policy.cell == "lstm" else zeros
        self.running_returns = torch.zeros(count)
        self.episode_returns: deque[float] = deque(maxlen=EPISODES)

    @torch.no_grad()
    def play(self, steps: int) -> Rollout:
        first_state, history = self.state, []
        for _ in range(steps):
            observation, starts = self.observation, self.starts
            actions, values, self.state = self.policy.step(observation, starts, self.state)
            action = actions.sample()
            rewards = self.act(action)
            history.append((observation, starts, action, actions.log_prob(action), values, rewards, self.starts))
        observations, starts, actions, log_probs, values, rewards, ends = map(torch.stack, zip(*history, strict=True))
        _, next_value, _ = self.policy.step(self.observation, self.starts, self.state)
        advantages = generalised_advantages(rewards, values, ends, next_value)
        return Rollout(observations, starts, actions, log_probs, advantages, advantages + values, first_state)

    def act(self, action: Tensor) -> Tensor:
        """Step the environments and return the scaled rewards. Where an episode ends, the next one starts."""
        observation, rewards, terminated, truncated, info = self.environments.step(action.numpy())
        rewards = torch.as_tensor(rewards, dtype=torch.float32)
        self.observation, self.starts = visible(observation), torch.as_tensor(terminated | truncated)
        self.running_returns += rewards
        self.episode_returns += self.running_returns[self.starts].tolist()
        self.running_returns[self.starts] = 0
        rewards *= REWARD_SCALE
        # An episode cut off at its time limit would have continued: its last observation's value stands for the rest.
        cut = torch.as_tensor(truncated & ~terminated).nonzero().flatten()
        if len(cut):
            last = torch.cat([visible(info["final_obs"][index][None]) for index in cut])
            state = map_state(lambda part: part[:, cut], self.state)
            rewards[cut] += GAMMA * self.policy.step(last, torch.zeros_like(cut), state)[1]
        return rewards


def generalised_advantages(rewards: Tensor, values: Tensor, ends: Tensor, next_value: Tensor) -> Tensor:
    """Generalised advantage estimation. `ends` marks steps that end an episode; nothing after an end counts."""
    advantages = torch.empty_like(rewards)
    advantage = torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        goes_on = (~ends[t]).float()
        error = rewards[t] + GAMMA * goes_on * next_value - values[t]
        advantage = error + GAMMA * GAE_LAMBDA * goes_on * advantage
        advantages[t], next_value = advantage, values[t]
    return advantages


def loss_of(policy: Policy, batch: Rollout) -> Tensor:
    actions, values = policy(batch.observations, batch.starts, batch.state)
    ratio = (actions.log_prob(batch.actions) - batch.log_probs).exp()
    advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
    return (
        VALUE_WEIGHT * nn.functional.mse_loss(values, batch.returns) - gain - ENTROPY_WEIGHT * actions.entropy().mean()
    )


class Learner:
    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE, eps=1e-5)

    def update(self, rollout: Rollout) -> list[float]:
        """Train some epochs on the rollout, in minibatches of whole environments."""
        losses = []
        for _ in range(EPOCHS):
            for environments in torch.randperm(rollout.starts.size(1)).chunk(MINIBATCHES):
                self.optimizer.zero_grad()
                loss = loss_of(self.policy, rollout.of(environments))
                loss.backward()
                nn.utils.clip_grad_norm_(self.policy.parameters(), MAX_GRADIENT_NORM)
                self.optimizer.step()
                losses.append(loss.item())
        return losses


def update_with_both(policy: Policy, rollout: Rollout, updates: int, warm_up: int) -> InterleavedTiming:
    """Losses and times of the loop (first) and fused_rnn, in turns, from the same weights on the same minibatches."""
    learners = [Learner(Policy(backend, policy.cell)) for backend in BACKENDS]
    for learner in learners:
        learner.policy.load_state_dict(policy.state_dict())
    return time_interleaved(*(partial(learner.update, rollout) for learner in learners), updates, warm_up)


def first_difference(policy: Policy, rollout: Rollout) -> float:
    """The largest difference of one update's losses between the backends."""
    both = update_with_both(policy, rollout, updates=1, warm_up=0)
    return max(abs(a - b) for a, b in zip(both.first.results[0], both.second.results[0], strict=True))


def train(player: Player, options: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Print a line per update until the updates or the seconds are used up; the learning rate falls to zero by then."""
    learner, began, done, update = Learner(player.policy), perf_counter(), 0.0, 0
    while done < 1:
        learner.optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - done)
        start = perf_counter()
        rollout = player.play(options.steps)
        played = perf_counter()
        losses = learner.update(rollout)
        now, update = perf_counter(), update + 1
        done = min(1.0, max(update / options.updates, (now - began) / options.seconds))
        line = {"update": update, "steps": update * rollout.starts.numel(), "seconds": now - began, "done": done}
        line |= {"mean_return": fmean(player.episode_returns or [0.0]), "loss": fmean(losses)}
        yield line | {"rollout_ms": 1000 * (played - start), "learner_ms": 1000 * (now - played)}


def write(lines: list[dict[str, float]], more: dict[str, Any], path: Path) -> None:
    """Write the learning curve as a picture and, beside it, as a CSV file."""
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*lines[0], *more])
        writer.writeheader()
        writer.writerows(line | more for line in lines)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["steps"] for line in lines], [line["mean_return"] for line in lines], color="#0b4f8a")
    axes.set(xlabel="environment steps", ylabel=f"mean return of the last {EPISODES} episodes", ylim=(0, 510))
    axes.set_title(LEARNER_TIMES.format(**more), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("CartPole without velocities: recurrent PPO, {cell}, {backend}, seed {seed}".format(**more))
    caption = "{device}, threads: {threads}, torch {torch_version}, fused_rnn {fused_rnn_version} {git_commit}, {date}"
    figure.supxlabel(caption.format(**more), fontsize=7, color="dimgray")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end earlier, after these")
    parser.add_argument("--envs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=128, help="of every environment in a rollout")
    parser.add_argument("--cell", choices=["lstm", "gru"], default="lstm")
    parser.add_argument("--backend", choices=BACKENDS, default="fused")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; for layers this small one is best")
    add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    policy = Policy(options.backend, options.cell)
    difference = first_difference(policy, Player(policy, options.envs, options.seed).play(options.steps))
    assert difference <= SAME_START, f"the losses of the first update differ by {difference:.1e} between the backends"

    player, lines = Player(policy, options.envs, options.seed), []
    with Progress() as progress:
        progress.console.print(f"The losses of the first update: loop and fused differ by {difference:.1e}")
        bar = progress.add_task(options.cell, total=1.0)
        for line in train(player, options):
            lines.append(line)
            progress.update(bar, completed=line["done"], description=f"return {line['mean_return']:5.1f}")
            if line["update"] % 20 == 1 or line["done"] == 1:
                progress.console.print(PROGRESS.format(**line))

    both = update_with_both(policy, player.play(options.steps), TIMED_UPDATES, WARM_UP)
    times = {"loop_ms": 1000 * both.first_median, "fused_ms": 1000 * both.second_median, "speed_up": both.speed_up}
    run = {name: getattr(options, name) for name in ("backend", "cell", "envs", "seed")}
    path = processor_folder(options.output) / "recurrent_ppo.png"
    write(lines, run | times | describe_machine(), path)
    print(f"{LEARNER_TIMES.format(**times)}\nWritten: {path} and {path.with_suffix('.csv')}")


if __name__ == "__main__":
    main()
