"""The common tolerance: a result's error may be at most a multiple of torch.nn's own error.

A result passes if its distance from a float64 reference is at most twice that of torch.nn's result in the same dtype,
plus one rounding at the scale of the arithmetic: torch.nn's result may happen to be nearly exact, and both libraries
compute with gates and states of size one, however small the result. A gradient may be four times as far: it comes from
long chains of sums in different orders, and the largest of a few thousand errors varies (by up to 2.5 times so far).
"""

import torch
from torch import Tensor


def assert_as_accurate(actual: Tensor, expected: Tensor, reference: Tensor, what: str) -> None:
    """Assert that `actual` (ours) is as near to `reference` (float64) as `expected` (torch.nn's, in the same dtype).

    `what` names the result; names of gradients begin with d.
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
