"""What rounded weights cost trained models: loss, accuracy, and how far a state drifts in a thousand steps."""

from __future__ import annotations

from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fused_rnn
from examples import char_lm, image_rows

pytestmark = pytest.mark.slow("trains models")

# The largest difference of h from float32's in 1,000 steps on a text, of values between -1 and 1.
DRIFT = {"bfloat16": 0.02, "int8": 0.06}
each_format = pytest.mark.parametrize("weights", ["bfloat16", "int8"])
EXAMPLES = {example.name: example for example in [*char_lm.EXAMPLES, *image_rows.EXAMPLES]}
CHARACTERS = [example.name for example in char_lm.EXAMPLES]


@cache
@torch.enable_grad()
def trained(name: str) -> Any:
    torch.manual_seed(1)
    example = EXAMPLES[name]
    model = example.build(fused_rnn)
    list(islice(example.train(model), example.steps))
    return model.eval()


def loss_and_accuracy(name: str, model: Any) -> tuple[float, float]:
    if name == "image_rows":
        digits = image_rows.load_digits(None)
        scores, labels = model(digits.test_images), digits.test_labels
    else:
        scores, labels = char_lm.held_out_scores(model, None)
    return F.cross_entropy(scores, labels).item(), (scores.argmax(1) == labels).float().mean().item()


@torch.no_grad()
@each_format
@pytest.mark.parametrize("name", EXAMPLES)
def test_loss_and_accuracy_are_within_one_percent(name: str, weights: str) -> None:
    model = trained(name)
    loss, accuracy = loss_and_accuracy(name, model)
    assert accuracy > (0.8 if name == "image_rows" else 0.25)  # it has learnt something
    rounded_loss, rounded_accuracy = loss_and_accuracy(name, fused_rnn.freeze(model, weights))
    print(f"{name} {weights}: loss {loss:.5f} {rounded_loss:.5f}, accuracy {accuracy:.4f} {rounded_accuracy:.4f}")
    assert abs(rounded_loss - loss) <= 0.01 * loss
    assert abs(rounded_accuracy - accuracy) <= 0.01 * accuracy


@torch.no_grad()
@each_format
@pytest.mark.parametrize("name", CHARACTERS)
def test_states_do_not_drift(name: str, weights: str) -> None:
    """Trained weights forget; so does the difference."""
    recurrent = trained(name).recurrent
    _, text = char_lm.load_text(None)
    x = F.one_hot(text[:1000], len(char_lm.SYMBOLS)).float()
    expected, found = (fused_rnn.freeze(recurrent, w).stream().chunk(x) for w in ("float32", weights))
    difference = (found - expected).abs().amax(1)
    print(f"{name} {weights}: largest difference of h {difference.max():.3f}, mean {difference.mean():.4f}")
    assert difference.max() <= DRIFT[weights]
    assert difference[500:].mean() <= 3 * difference[:500].mean()
