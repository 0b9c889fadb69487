"""Sequences of length 0 with fused_rnn's keywords; torch.nn raises for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fused_rnn
from test_segments import each_name, each_option


@pytest.mark.parametrize("keyword", ["resets", "lengths", "return_state_sequence"])
@pytest.mark.parametrize("batch_first", [False, True])
@each_option
@each_name
def test_the_states_stay_as_they_are(name: str, options: dict[str, Any], batch_first: bool, keyword: str) -> None:
    """The output is empty and the states are unchanged; without keywords, torch.nn's error is raised."""
    module = getattr(fused_rnn, name)(3, 5, **options | {"batch_first": batch_first})
    x = torch.randn((2, 0, 3) if batch_first else (0, 2, 3))
    keywords = {
        "resets": torch.zeros(x.shape[:2], dtype=torch.bool),
        "lengths": torch.zeros(2, dtype=torch.int64),
        "return_state_sequence": True,
    }
    rows = module.num_layers * (2 if module.bidirectional else 1)
    hx = [torch.randn(rows, 2, size, requires_grad=True) for size in module._spec().state_sizes]
    for given in (None, hx):
        states = None if given is None else tuple(given) if name == "LSTM" else given[0]
        output, hidden, *sequence = module(x, states, **{keyword: keywords[keyword]})
        width = (2 if module.bidirectional else 1) * module._spec().state_sizes[0]
        assert output.shape == (*x.shape[:2], width) and output.numel() == 0
        hidden = hidden if name == "LSTM" else (hidden,)
        for state, initial in zip(hidden, hx, strict=True):
            assert torch.equal(state, initial if given else torch.zeros_like(initial))
        if given:
            for gradient in torch.autograd.grad(sum(state.sum() for state in hidden), hx):
                assert torch.equal(gradient, torch.ones_like(gradient))
        assert len(sequence) == (keyword == "return_state_sequence")
        for states in sequence:
            assert [s.shape for s in (states if name == "LSTM" else (states,))] == [(0, *s.shape) for s in hx]
        with pytest.raises(RuntimeError, match="larger than 0"):
            module(x)
