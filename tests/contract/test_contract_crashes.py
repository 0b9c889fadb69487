"""Calls that have crashed torch.nn, or would crash without the operators' own checks: an error, or the right result.

They run in one process of their own, which must end normally.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from contract import (
    BASIC_SEQUENCES,
    BATCH,
    HIDDEN,
    INPUT,
    ONE_OF_EACH,
    SEQUENCES,
    TIME,
    arguments,
    close,
    error_of,
    gradients,
    pair,
    tensors,
    unchanged,
)
from processes import survives


def wrong_weights():
    """Stricter than torch.nn, whose float32 LSTM does not check them and reads out of bounds: it is not called."""
    for key in ONE_OF_EACH:
        for packed in (False, True):
            _, module = pair(key)
            sequence = not key.endswith("cell")
            if packed and not sequence:
                continue
            args = arguments(module, packed=packed)
            for name, weight in list(module.named_parameters()):
                for shape in ([n + 1 for n in weight.shape], [n - 1 for n in weight.shape], [0]):
                    setattr(module, name, nn.Parameter(torch.zeros(shape)))
                    error_of(module, *args)
                setattr(module, name, weight)
            close(module(*args), pair(key)[0](*args))


def unchecked_lstm():
    batch_sizes = torch.tensor([3, 2, 1])
    for key in ("lstm", "lstm_deep", "lstm_proj"):
        for dtype in (torch.float32, torch.float64):
            plain, module = pair(key, dtype)
            lead = len(module.all_weights)
            h = torch.zeros(lead, 3, module.proj_size or HIDDEN, dtype=dtype)
            c = torch.zeros(lead, 3, HIDDEN, dtype=dtype)
            data = torch.zeros(6, INPUT, dtype=dtype)
            calls = [
                (PackedSequence(data[:, :2], batch_sizes), (h, c)),
                (PackedSequence(torch.zeros(6, 9, dtype=dtype), batch_sizes), (h, c)),
                (PackedSequence(data[:, 0], batch_sizes), (h, c)),
                (PackedSequence(data.int(), batch_sizes), (h, c)),
                (PackedSequence(data, batch_sizes), (h[..., :1], c)),
                (PackedSequence(data, batch_sizes), (h, c[..., :1])),
                (PackedSequence(data, batch_sizes), (h[:, :2], c[:, :2])),
                (PackedSequence(data, batch_sizes), (h[:0], c[:0])),
                (PackedSequence(data, batch_sizes), (h.half(), c.half())),
                (PackedSequence(data, batch_sizes), (h[0], c[0])),
            ]
            for args in calls:
                error_of(module, *args)
                with fused_rnn.patched():
                    error_of(plain, *args)


def odd_batch_sizes():
    """Any exception is accepted, but a result must equal torch.nn's."""
    for key in BASIC_SEQUENCES:
        for grad in (False, True):
            for sizes in ([1, 2], [2, 3, 1], [], [3, 3], [2, 1], [2, 0], [-1], [2, -1, 1]):
                expected, actual = pair(key)
                data = torch.randn(4, INPUT, requires_grad=grad)
                packed = PackedSequence(data, torch.tensor(sizes, dtype=torch.int64))
                with unchanged(data, actual):
                    try:
                        result = actual(packed)
                    except Exception:
                        continue
                    close(result, expected(packed))


def no_python_checks():
    """Stricter than torch.nn's operators, which broadcast or read out of bounds without check_forward_args."""
    for name in SEQUENCES:

        class Unchecked(getattr(fused_rnn, name)):
            def check_forward_args(self, input, hidden, batch_sizes):
                pass

        module = Unchecked(INPUT, HIDDEN)
        good, hx = arguments(module)
        shapes = [(1, 1, HIDDEN), (1, BATCH, 1), (0, BATCH, HIDDEN), (2, BATCH, HIDDEN)]
        wrong_states = [tensors(hx)[0].new_zeros(shape) for shape in shapes]
        calls = [(good, (h, h) if name == "LSTM" else h) for h in wrong_states]
        calls += [(good[..., :1], hx), (torch.zeros(TIME, BATCH, 9), hx)]
        for args in calls:
            error_of(module, *args)
        gradients(module, good, hx)


def all_of_them():
    torch.set_num_threads(1)
    wrong_weights()
    unchecked_lstm()
    odd_batch_sizes()
    no_python_checks()


def test_no_call_crashes():
    survives(all_of_them)
