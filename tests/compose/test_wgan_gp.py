"""WGAN-GP (Gulrajani et al. 2017) with a recurrent critic, whose penalty is a function of the critic's own gradient.

Its derivative by the critic's parameters needs a second derivative of the layer, which cuDNN does not have. Gradients
and training are compared with torch.nn; padded batches with `lengths`, with torch.nn on packed sequences.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from contract import close
from tolerances import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, FEATURES, HIDDEN, NOISE = 9, 6, 4, 16, 5
LENGTHS = torch.tensor([3, 9, 1, 7, 9, 5])

each_name = pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
each_length = pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "ragged"])


class Critic(nn.Module):
    """A score per sequence, from the state after its last step."""

    def __init__(self, library: Any, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.rnn = getattr(library, name)(FEATURES, HIDDEN, num_layers=2, dtype=dtype)
        self.score = nn.Linear(HIDDEN, 1, dtype=dtype)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        if lengths is None:
            _, state = self.rnn(x)
        elif isinstance(self.rnn, fused_rnn.modules.FusedRNNBase):
            _, state = self.rnn(x, lengths=lengths)
        else:
            _, state = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return self.score((state[0] if isinstance(state, tuple) else state)[-1])


def critics(name: str, *of: tuple[Any, torch.dtype]) -> list[Critic]:
    torch.manual_seed(0)
    found = [Critic(library, name, dtype) for library, dtype in of]
    for critic in found[1:]:
        critic.load_state_dict(found[0].state_dict())
    return found


def penalty(critic: Critic, real: Tensor, fake: Tensor, lengths: Tensor | None) -> Tensor:
    """(|gradient of the score by the sequence| - 1) squared, between real and generated sequences."""
    share = torch.linspace(0.1, 0.9, B, dtype=real.dtype).view(1, B, 1)
    between = (share * real + (1 - share) * fake).detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(between, lengths).sum(), between, create_graph=True)
    return (slope.transpose(0, 1).flatten(1).norm(dim=1) - 1).square().mean()


def sequences(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, T, B, FEATURES, generator=generator).to(dtype).unbind())  # type: ignore[return-value]


@each_length
@each_name
def test_gradients_of_the_penalty(name: str, lengths: Tensor | None) -> None:
    """In float32, as accurate as torch.nn's against float64."""
    of = (nn, torch.float32), (fused_rnn, torch.float32), (nn, torch.float64)
    grads = []
    for critic, (_, dtype) in zip(critics(name, *of), of, strict=True):
        found = penalty(critic, *sequences(dtype), lengths)
        grads.append(torch.autograd.grad(10 * found, list(critic.rnn.parameters())))
    assert all(g.any() for g in grads[1][:2])
    for theirs, ours, exact in zip(*grads, strict=True):
        assert_as_accurate(ours, theirs, exact, "dweight")


def trained(critic: Critic, lengths: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Losses and gradients of some training steps, two of the critic for each of the generator."""
    torch.manual_seed(2)
    generator = nn.GRU(NOISE, FEATURES, dtype=dtype)  # torch.nn's: only the critic is under test
    of_critic = torch.optim.Adam(critic.parameters(), lr=0.01, betas=(0.0, 0.9))
    of_generator = torch.optim.Adam(generator.parameters(), lr=0.01, betas=(0.0, 0.9))
    real, _ = sequences(dtype)
    seen = []
    for _ in range(3):
        for _ in range(2):
            fake = generator(torch.randn(T, B, NOISE, dtype=dtype))[0].detach()
            loss = critic(fake, lengths).mean() - critic(real, lengths).mean()
            loss = loss + 10 * penalty(critic, real, fake, lengths)
            of_critic.zero_grad()
            loss.backward()
            of_critic.step()
            seen += [loss.detach(), *(p.grad.clone() for p in critic.parameters())]
        loss = -critic(generator(torch.randn(T, B, NOISE, dtype=dtype))[0], lengths).mean()
        of_generator.zero_grad()
        loss.backward()
        of_generator.step()
        seen += [loss.detach(), *(p.grad.clone() for p in generator.parameters())]
    return seen


@each_length
@each_name
def test_training(name: str, lengths: Tensor | None) -> None:
    theirs, ours = critics(name, (nn, torch.float64), (fused_rnn, torch.float64))
    wanted, found = (trained(critic, lengths, torch.float64) for critic in (theirs, ours))
    close(found, wanted, grad=True)
    close(list(ours.parameters()), list(theirs.parameters()))
