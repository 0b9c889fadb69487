"""The rule by which two trainings of one model agree.

torch.nn and fused_rnn compute the same formulas, but add the terms of a matrix product in a
different order, so each result differs by the rounding of float32, about 1e-7 relative. Training
feeds every difference back into the weights, and a recurrent network multiplies it again at each
time step: the difference grows, in some models exponentially, so after hundreds of steps two
correct implementations can differ visibly. Hence two conditions:

- At the start, before rounding errors can grow, the losses of the first START_STEPS steps are equal
  to START_TOLERANCE. The first loss tests the forward pass, the following ones the gradients that
  the optimiser has applied by then. A wrong formula fails here.
- At the end, the two models are equally good: the losses, averaged over the last tenth of the steps
  because a single batch says little, are equal to FINAL_TOLERANCE, and a share of at least
  SAME_PREDICTIONS of the predictions is the same. It is below 1 because rounding decides where a
  model finds two answers nearly equally probable: the character RNN, in which rounding errors grow
  most, agreed with itself, summed in another order, on 86 % to 97 % of the next letters.

The tours train nothing, so their results are compared entry by entry, to TOUR_TOLERANCE.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

START_STEPS = 10
START_TOLERANCE = 1e-5
FINAL_TOLERANCE = 1e-2
SAME_PREDICTIONS = 0.75
TOUR_TOLERANCE = 1e-5

# Cross-entropy is computed from numbers near 1, whose rounding is 1e-7: a loss far below this has
# few correct digits, and its relative difference would mean nothing.
SMALLEST_LOSS = 1e-3


@dataclass(frozen=True)
class Agreement:
    """The differences between two trainings: relative differences of the losses, share of equal predictions."""

    start_difference: float
    final_difference: float
    largest_difference: float
    same_predictions: float

    @property
    def holds(self) -> bool:
        return (
            self.start_difference <= START_TOLERANCE
            and self.final_difference <= FINAL_TOLERANCE
            and self.same_predictions >= SAME_PREDICTIONS
        )

    def __str__(self) -> str:
        return (
            f"the losses of the first {START_STEPS} steps differ by {self.start_difference:.1e} "
            f"(allowed {START_TOLERANCE:.0e}), those of the last tenth by "
            f"{self.final_difference:.1e} (allowed {FINAL_TOLERANCE:.0e}), and "
            f"{self.same_predictions:.1%} of the predictions are the same "
            f"(required {SAME_PREDICTIONS:.0%})"
        )


def compare(
    torch_losses: Sequence[float],
    fused_losses: Sequence[float],
    torch_predictions: Tensor,
    fused_predictions: Tensor,
) -> Agreement:
    """Compare two trainings of the same model from the same seed."""
    differences = [
        relative_difference(expected, found) for expected, found in zip(torch_losses, fused_losses, strict=True)
    ]
    last_tenth = math.ceil(len(differences) / 10)
    return Agreement(
        start_difference=max(differences[:START_STEPS]),
        final_difference=relative_difference(fmean(torch_losses[-last_tenth:]), fmean(fused_losses[-last_tenth:])),
        largest_difference=max(differences),
        same_predictions=(torch_predictions == fused_predictions).float().mean().item(),
    )


def relative_difference(expected: float, found: float) -> float:
    if not (math.isfinite(expected) and math.isfinite(found)):
        return math.inf  # a training that diverged agrees with no other
    return abs(found - expected) / max(abs(expected), SMALLEST_LOSS)


def compare_tours(torch_results: Sequence[tuple[str, Tensor]], fused_results: Sequence[tuple[str, Tensor]]) -> float:
    """The largest difference of any entry; infinite if labels or shapes differ."""
    largest = 0.0
    for (label, expected), (found_label, found) in zip(torch_results, fused_results, strict=True):
        if label != found_label or expected.shape != found.shape:
            return math.inf
        largest = max(largest, (found - expected).abs().max().item())
    return largest
