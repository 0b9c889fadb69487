"""What forward takes beyond torch.nn: resets inside a sequence, lengths, the states of every step, regularised layers.

Without them nothing here runs. With them, the same layers do, of `fused_rnn.ops` where the kernels may be used, else of
`fused_rnn.reference`, a loop over time: so functorch and devices without kernels get the same results, only slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import autocast, eligibility, ops, reference
from fused_rnn.functional import Extras
from fused_rnn.reference import Norms


@eligibility.runs_eagerly
def run(
    module: Any,
    input: Any,
    hx: Any,
    resets: Tensor | None,
    reset_state: Any,
    lengths: Tensor | None,
    return_state_sequence: bool,
) -> tuple[Any, ...]:
    """`fused_rnn.modules.FusedRNNBase.forward` with any of its keyword arguments; they are explained there."""
    if _is_usual(module, input, hx, resets, reset_state, lengths):
        try:
            return _usual(module, input, hx, resets, reset_state, lengths, return_state_sequence)
        except RuntimeError:
            pass  # something does not fit: find out below
    call = _Call(module, input, hx)
    if call.is_empty and resets is None and lengths is None and not return_state_sequence:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")  # as torch.nn
    call.check_resets(resets, reset_state)
    if isinstance(lengths, Tensor) and call.x.is_cpu:
        lengths = lengths.cpu()
    call.check_lengths(lengths)
    reset_states = call.reset_states(reset_state)
    if call.is_empty:
        return call.empty_results(return_state_sequence)
    weights, regularisation = module._weights_of_call(), module._regularisation()
    casts = module._casts(call.x, call.states, (*weights, *reset_states), call.packed is not None)
    if casts:
        (call.x,), call.states, reset_states, weights = (
            casts.into(tensors) for tensors in ((call.x,), call.states, reset_states, weights)
        )
        regularisation |= {"norms": [Norms(*casts.into(norms)) for norms in regularisation.get("norms", ())]}
    x, states = call.x, call.states
    resets = None if resets is None else call.time_major(resets)
    lengths = None if lengths is None else lengths.to(x.device, non_blocking=True)
    cuda = eligibility.on_cuda(x)
    fusible = (
        module.backend != "torch"
        and eligibility.fusible(x, *states, *reset_states, *weights, *chain(*regularisation.get("norms", ())))
        and not (cuda and (module.proj_size > 0 or x.numel() == 0))
    )
    if fusible and lengths is not None and (cuda or torch.compiler.is_compiling()):
        x = reference.without_what_follows(x, lengths)  # products over all steps read it
    extras = Extras(resets, reset_states, lengths, return_state_sequence, **regularisation)
    extras = extras if fusible else replace(extras, recompute=False)
    with autocast.left(x.device):
        output, *rest = module._stack(
            x, states, call.batch_sizes, weights, layer=ops.layer if fusible else reference.layer, extras=extras
        )
    hidden, of_steps = rest[: len(states)], rest[len(states) :]
    if casts:
        output, hidden, of_steps = output.to(casts.h), casts.out_of(hidden), casts.out_of(of_steps)
    results = call.results(output, hidden)
    return (*results, call.state_sequence(of_steps)) if return_state_sequence else results


def _is_usual(module: Any, input: Any, hx: Any, resets: Any, reset_state: Any, lengths: Any) -> bool:
    """Whether every check that is left is made by the operators."""
    if eligibility.watched() or module._varied:
        return False
    fresh = module._given_states(reset_state)
    return (
        (resets is None or eligibility.plain(resets, 2))
        and (lengths is None or eligibility.plain(lengths, 1))
        and fresh is not None
        and (not fresh or resets is not None)
        and all(eligibility.plain(s, 3) or eligibility.plain(s, 4) for s in fresh)
        and module._usual(input, 3, hx)
    )


def _usual(
    module: Any, input: Tensor, hx: Any, resets: Any, reset_state: Any, lengths: Any, return_state_sequence: bool
) -> tuple[Any, ...]:
    """A batch of plain tensors on the CPU, without options.

    Raises:
        RuntimeError: the operators cannot compute this.
    """
    x = input
    if module.batch_first:
        x, resets = input.transpose(0, 1), None if resets is None else resets.transpose(0, 1)
    sizes, fresh = module._state_sizes(), module._given_states(reset_state)
    if fresh:
        steps = (x.size(0),) if any(s.dim() == 4 for s in fresh) else ()
        rows = module._state_rows()
        fresh = [s.expand(*steps, rows, x.size(1), size) for s, size in zip(fresh, sizes, strict=True)]
    output, *rest = module._stack(
        x,
        (None, None) if hx is None else module._given_states(hx),
        extras=Extras(resets, fresh, lengths, return_state_sequence),
    )
    count = len(sizes)
    results = output.transpose(0, 1) if module.batch_first else output, module._pack_states(rest[:count])
    return (*results, module._pack_states(rest[count:])) if return_state_sequence else results


class _Call:
    """The arguments of one call in one form, and the way back from its results.

    Raises:
        ValueError, RuntimeError: as torch.nn, if input or hx do not fit.
    """

    def __init__(self, module: Any, input: Any, hx: Any) -> None:
        self.module = module
        self.name = module._get_name()
        self.packed = input if isinstance(input, PackedSequence) else None
        data = input.data if self.packed is not None else input
        if not isinstance(data, Tensor):
            raise TypeError(f"{self.name}: expected input to be a Tensor or PackedSequence, got {type(data).__name__}")
        if self.packed is None and data.dim() not in (2, 3):
            raise ValueError(f"{self.name}: Expected input to be 2D or 3D, got {data.dim()}D tensor instead")
        states = module._given_states(hx)
        if states is None:
            raise TypeError(f"{self.name}: expected hx to be None or a pair (h_0, c_0), got {_kind(hx)}")
        _check_tensors(self.name, "hx", states)
        self.batched = self.packed is not None or data.dim() == 3
        self.batch_sizes = None if self.packed is None else self.packed.batch_sizes
        self.batch_first = module.batch_first and self.batched and self.packed is None
        if not self.batched:
            if any(s.dim() != 2 for s in states):
                raise RuntimeError(
                    f"{self.name}: For unbatched 2-D input, hx should also be 2-D, got {states[0].dim()}-D"
                )
            data, states = data.unsqueeze(0 if module.batch_first else 1), tuple(s.unsqueeze(1) for s in states)
        elif any(s.dim() != 3 for s in states):
            raise RuntimeError(
                f"{self.name}: For batched 3-D input, hx should also be 3-D, got {states[0].dim()}-D tensor"
            )
        given = bool(states)
        batch = (
            int(self.packed.batch_sizes[0]) if self.packed is not None else data.size(0 if module.batch_first else 1)
        )
        hidden = module._pack_states(states or module._zero_states(data, batch))
        if self.packed is not None and given:
            hidden = module.permute_hidden(hidden, self.packed.sorted_indices)
        module._check_arguments(data, module._given_states(hidden), self.batch_sizes)
        self.is_empty = self.packed is None and data.size(1 if module.batch_first else 0) == 0
        self.x = data.transpose(0, 1) if module.batch_first and self.packed is None else data
        self.batch = batch
        self.states = module._given_states(hidden) if given else (None,) * len(module._state_sizes())

    def time_major(self, rows: Any) -> Any:
        """``[T, B]``, or packed ``[N]``, from how the user has it."""
        if self.packed is not None:
            return rows.data
        if not self.batched:
            return rows.unsqueeze(1)
        return rows.transpose(0, 1) if self.batch_first else rows

    def check_resets(self, resets: Any, reset_state: Any) -> None:
        if resets is None:
            if reset_state is not None:
                raise ValueError(f"{self.name}: reset_state needs resets, got None")
            return
        shape: tuple[int, ...]
        if self.packed is not None:
            if not isinstance(resets, PackedSequence):
                raise ValueError(
                    f"{self.name}: expected resets to be a PackedSequence as input is, got {_kind(resets)}"
                )
            if not _packed_alike(resets, self.packed):
                raise ValueError(f"{self.name}: expected resets to be packed as input is, in the same order")
            shape, resets = (self.x.size(0),), resets.data
        else:
            T, B, _ = self.x.shape
            shape = (T,) if not self.batched else (B, T) if self.batch_first else (T, B)
        if not isinstance(resets, Tensor) or resets.dtype is not torch.bool:
            raise ValueError(f"{self.name}: expected resets to be a bool tensor, got {_kind(resets)}")
        if resets.shape != shape:
            raise RuntimeError(f"{self.name}: Expected resets of shape {list(shape)}, got {list(resets.shape)}")
        if resets.device != self.x.device:
            raise RuntimeError(f"{self.name}: expected resets on {self.x.device}, got {resets.device}")

    def check_lengths(self, lengths: Any) -> None:
        if lengths is None:
            return
        if self.packed is not None or not self.batched:
            what = "a PackedSequence" if self.packed is not None else "unbatched input"
            raise ValueError(f"{self.name}: lengths go with a padded batch, got {what}")
        if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{self.name}: expected lengths to be an int32 or int64 tensor, got {_kind(lengths)}")
        if lengths.shape != (self.batch,):
            raise RuntimeError(f"{self.name}: Expected lengths of shape {[self.batch]}, got {list(lengths.shape)}")
        if not lengths.is_cpu or eligibility.watched() or lengths.numel() == 0:
            return  # the kernels stop at T; looking would mean waiting for a GPU
        if not 0 <= int(lengths.min()) <= int(lengths.max()) <= self.x.size(0):
            raise ValueError(
                f"{self.name}: expected lengths between 0 and {self.x.size(0)}, "
                f"got {int(lengths.min())} to {int(lengths.max())}"
            )

    def reset_states(self, reset_state: Any) -> tuple[Tensor | None, ...]:
        """``[L*D, B, size]`` each, or ``[T, L*D, B, size]``, from anything that broadcasts to the one or the other."""
        sizes = self.module._state_sizes()
        if reset_state is None:
            return (None,) * len(sizes)
        given = self.module._given_states(reset_state)
        if given is None:
            raise TypeError(f"{self.name}: expected reset_state to be a pair (h, c), got {_kind(reset_state)}")
        _check_tensors(self.name, "reset_state", given)
        rows = self.module._state_rows()
        given = given if self.batched else [state.unsqueeze(-2) for state in given]
        per_step = any(state.dim() == 4 for state in given)
        dtypes = autocast.CASTABLE if autocast.dtype_on(self.x.device) else (self.x.dtype,)
        T = self.x.size(0) if self.batch_sizes is None else self.batch_sizes.size(0)
        order = None if self.packed is None else self.packed.sorted_indices
        found = []
        for state, size in zip(given, sizes, strict=True):
            if state.dtype not in dtypes or state.device != self.x.device:
                raise ValueError(
                    f"{self.name}: expected reset_state to be {self.x.dtype} on {self.x.device} as input is, "
                    f"got {state.dtype} on {state.device}"
                )
            of_one = (rows, self.batch, size)
            wanted = (T, *of_one) if per_step else of_one
            state = state.unsqueeze(0) if per_step and state.dim() == 3 else state
            fits = state.dim() == len(wanted) and all(
                got == 1 or got == want for got, want in zip(state.shape, wanted, strict=True)
            )
            if not fits:
                raise RuntimeError(
                    f"{self.name}: Expected reset_state of shape {list(of_one)} or {[T, *of_one]}, "
                    f"got {list(state.shape)}"
                )
            state = state if order is None or state.size(-2) == 1 else state.index_select(-2, order)
            found.append(state.expand(wanted))
        return tuple(found)

    def empty_results(self, return_state_sequence: bool) -> tuple[Any, ...]:
        """No outputs, and the states as they were given: there is no time step."""
        module, x = self.module, self.x
        sizes, rows, D = module._state_sizes(), module._state_rows(), 2 if module.bidirectional else 1
        last = module.hidden_size[-1] if isinstance(module.hidden_size, tuple) else module.hidden_size
        output = x.new_empty(0, self.batch, D * (getattr(module, "proj_size", 0) or last))
        given = [
            x.new_zeros(rows, self.batch, size) if state is None else state.clone()
            for state, size in zip(self.states, sizes, strict=True)
        ]
        results = self.results(output, given)
        if not return_state_sequence:
            return results
        return (*results, self.state_sequence([x.new_empty(0, rows, self.batch, size) for size in sizes]))

    def results(self, output: Tensor, hidden: Sequence[Tensor]) -> tuple[Any, Any]:
        """As torch.nn returns them."""
        module, packed = self.module, self.packed
        if packed is not None:
            found = PackedSequence(output, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
            return found, module.permute_hidden(module._pack_states(hidden), packed.unsorted_indices)
        if not self.batched:
            return output.squeeze(1), module._pack_states([h.squeeze(1) for h in hidden])
        return output.transpose(0, 1) if self.batch_first else output, module._pack_states(hidden)

    def state_sequence(self, of_steps: Sequence[Tensor]) -> Any:
        packed = self.packed
        if packed is not None:
            indices = (packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
            return self.module._pack_states([PackedSequence(s, *indices) for s in of_steps])
        return self.module._pack_states(of_steps if self.batched else [s.squeeze(2) for s in of_steps])


def _check_tensors(name: str, argument: str, states: Sequence[Any]) -> None:
    for state in states:
        if not isinstance(state, Tensor):
            raise TypeError(f"{name}: expected {argument} to be made of tensors, got {_kind(state)}")


def _packed_alike(a: PackedSequence, b: PackedSequence) -> bool:
    if a.sorted_indices is not b.sorted_indices and (
        a.sorted_indices is None or b.sorted_indices is None or not torch.equal(a.sorted_indices, b.sorted_indices)
    ):
        return False
    return torch.equal(a.batch_sizes, b.batch_sizes)


def _kind(value: Any) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
