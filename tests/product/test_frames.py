"""An upper limit on the package's Python functions per call: each takes time, and a reader must follow it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import functional

PACKAGE = str(Path(fused_rnn.__file__).parent)
T, B, SIZE, HIDDEN = 7, 2, 3, 5


def frames(call: Callable[[], Any]) -> list[str]:
    """The package's functions that `call` enters, as "file:function"."""
    entered = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        # Comprehensions and generators have frames in some versions of Python, but are not functions.
        if event == "call" and code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<"):
            entered.append(f"{Path(code.co_filename).name}:{code.co_name}")

    call()  # fills caches
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def calls() -> dict[str, tuple[Callable[[], Any], int, int]]:
    """By kind of call: the call, its limit on functions, its limit on files."""
    lstm = fused_rnn.LSTM(SIZE, HIDDEN)
    zoneout = fused_rnn.LSTM(SIZE, HIDDEN, zoneout=0.1)
    x, resets = torch.randn(T, B, SIZE), torch.zeros(T, B, dtype=torch.bool)
    packed = pack_padded_sequence(x, torch.tensor([T, 3]))
    weights = list(lstm.parameters())
    hx = torch.zeros(1, B, HIDDEN), torch.zeros(1, B, HIDDEN)

    def inference(call: Callable[[], Any]) -> Callable[[], Any]:
        def without_gradient() -> Any:
            with torch.inference_mode():
                return call()

        return without_gradient

    return {
        "inference": (inference(lambda: lstm(x)), 10, 3),
        "inference with states": (inference(lambda: lstm(x, hx)), 10, 3),
        "training": (lambda: lstm(x), 14, 5),  # autograd.py is one more
        "step": (inference(lambda: lstm.step(x[0], hx)), 10, 3),
        "resets": (lambda: lstm(x, resets=resets), 28, 8),
        "packed": (lambda: lstm(packed), 27, 8),
        "zoneout": (lambda: zoneout(x), 28, 9),
        "functional": (lambda: functional.lstm(x, weights), 25, 9),
    }


@pytest.mark.parametrize("kind", calls())
def test_frames(kind: str) -> None:
    call, most_functions, most_files = calls()[kind]
    entered = frames(call)
    files = {name.split(":")[0] for name in entered}
    assert entered, "the call has entered no function of the package: nothing was counted"
    assert len(entered) <= most_functions, f"{len(entered)} functions: {entered}"
    assert len(files) <= most_files, f"{len(files)} files: {entered}"
