"""The recurrent part of a training step: forward and backward of its RNNs alone, on recorded arguments.

A training step also computes a loss, runs an optimiser, other layers, and Python. To separate them, the arguments of
every call of a recurrent module are recorded in one training step, and those calls are timed by themselves. They
compute the same gradients as in training: of the weights, and of the arguments that require them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from harness.timing import InterleavedTiming, Pace, TimedSide, sample_in_turns

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


class Call(NamedTuple):
    module: nn.Module
    args: tuple[Any, ...]  # detached


def recorded_calls(model: nn.Module, step: Callable[[], Any]) -> list[Call]:
    """The calls of the recurrent modules of `model` that `step` makes."""
    calls: list[Call] = []

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.append(Call(module, tree_map(without_history, args)))

    hooks = [module.register_forward_pre_hook(record) for module in model.modules() if isinstance(module, RECURRENT)]
    step()
    for hook in hooks:
        hook.remove()
    return calls


def without_history(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def time_recurrent_part(torch_calls: list[Call], fused_calls: list[Call], pace: Pace) -> InterleavedTiming:
    """Time forward and backward of all calls, one side after the other in turns."""
    sides = {"torch": partial(forward_and_backward, torch_calls), "fused": partial(forward_and_backward, fused_calls)}
    seconds = sample_in_turns(sides, pace)
    return InterleavedTiming(*(TimedSide(seconds=seconds[side]) for side in sides), 0, torch.get_num_threads())


def forward_and_backward(calls: list[Call]) -> None:
    for module, args in calls:
        output = next(tree_iter(module(*args)))
        tensors = [*tree_iter(args), *module.parameters()]
        wanted = [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.requires_grad]
        torch.autograd.grad(output, wanted, torch.ones_like(output))
