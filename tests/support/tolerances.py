"""The one rule of how close is close enough: measured against torch.nn's own error, not guessed.

A result passes if its distance from a float64 reference is at most twice that of torch.nn's result in the same dtype,
plus what one round trip through the scale of the arithmetic costs: torch.nn may happen to be nearly exact, and both
compute with gates and states of size one, however small the result. A gradient may be four times as far: it is the end
of a long chain of sums whose order differs, and the largest of a few thousand errors varies (seen: up to 2.5 times).
"""

import torch
from torch import Tensor


def assert_as_accurate(actual: Tensor, expected: Tensor, reference: Tensor, what: str) -> None:
    """`actual` (ours) against `expected` (torch.nn, the same dtype) and `reference` (float64).

    `what` names the result; a name that begins with d is a gradient's.
    """
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, torch.nn {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, torch.nn {expected.dtype}"
    if actual.numel() == 0:
        return
    reference = reference.double()
    ours = (actual.double() - reference).abs().max().item()
    theirs = (expected.double() - reference).abs().max().item()
    round_trip = torch.finfo(actual.dtype).eps * max(reference.abs().max().item(), 1.0)
    factor = 4 if what.startswith("d") else 2
    assert ours <= factor * theirs + round_trip, (
        f"{what}: error {ours:.2e}, torch.nn's {theirs:.2e}, round trip {round_trip:.1e}"
    )
