"""The bytes of a frozen model: what their header says, and where each weight lies.

csrc/cpu/frozen_model.h describes the layout, and the library checks it. A file of a frozen model holds these bytes.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fused_rnn import _C
from fused_rnn.cell_info import GATES, NAMES, NUMBER

WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""The formats of weights, in the order of their numbers in a file, from 1 on."""

_HEADER = struct.Struct("<8s2I2Q2I4Q")
_MAGIC, _VERSION = b"frnn\r\n\x1a\n", 1
_FLAGS = ("bias", "bidirectional", "batch_first", "is_cell")  # of the lowest bit first
_CHECKSUM_AT = 24


def buffer(model: Tensor) -> Any:
    """A model's bytes as a buffer, to be used while the tensor lives. torch's own way needs numpy, which it may lack.

    Raises:
        RuntimeError: the bytes are not there.
    """
    if not model.is_cpu or model.untyped_storage().nbytes() < model.nbytes:
        where = "without storage" if model.is_cpu else f"on {model.device}"
        raise RuntimeError(f"frozen modules run on the CPU, got weights {where}")
    return (ctypes.c_ubyte * model.nbytes).from_address(model.data_ptr())


@dataclass(frozen=True)
class Layout:
    """What the header of a frozen model says.

    Attributes:
        weights: a name in `WEIGHTS`.
        is_cell: whether the module is a cell, not a layer.
        mode, input_size, hidden_size, num_layers, bias, batch_first, bidirectional, proj_size: as in torch.nn.
    """

    mode: str
    weights: str
    input_size: int
    hidden_size: int
    num_layers: int = 1
    proj_size: int = 0
    bias: bool = True
    bidirectional: bool = False
    batch_first: bool = False
    is_cell: bool = False

    @classmethod
    def of(cls, model: Tensor) -> Layout:
        """What the header of these bytes says, which the library has checked."""
        header = _HEADER.unpack(bytes(buffer(model)[: _HEADER.size]))
        flags, (cell, weights, num_layers, input_size, hidden_size, proj_size) = header[2], header[5:]
        return cls(
            NAMES[cell].upper(), [*WEIGHTS][weights - 1], input_size, hidden_size, num_layers, proj_size,
            **{name: bool(flags >> bit & 1) for bit, name in enumerate(_FLAGS)},
        )  # fmt: skip

    @property
    def name(self) -> str:
        """torch.nn's class."""
        return self.mode.split("_")[0] + "Cell" * self.is_cell

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names and shapes of the weights, in torch.nn's order and the file's."""
        rows, P = GATES[self.mode.lower()] * self.hidden_size, self.proj_size or self.hidden_size
        directions = ("", "_reverse") if self.bidirectional else ("",)
        for layer in range(self.num_layers):
            for direction in directions:
                suffix = "" if self.is_cell else f"_l{layer}{direction}"
                yield f"weight_ih{suffix}", (rows, P * len(directions) if layer else self.input_size)
                yield f"weight_hh{suffix}", (rows, P)
                if self.bias:
                    yield f"bias_ih{suffix}", (rows,)
                    yield f"bias_hh{suffix}", (rows,)
                if self.proj_size:
                    yield f"weight_hr{suffix}", (P, self.hidden_size)

    @cached_property
    def _places(self) -> list[tuple[str, torch.dtype, tuple[int, ...], int]]:
        """The name, dtype and shape of each part, and the byte that it begins at; last, the end of all."""
        places, at = [], _HEADER.size

        def place(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
            nonlocal at
            places.append((name, dtype, shape, at))
            at += -(-torch.Size(shape).numel() * dtype.itemsize // 8) * 8

        for name, shape in self.shapes():
            place(name, WEIGHTS[self.weights] if len(shape) == 2 else torch.float32, shape)
            if self.weights == "int8" and len(shape) == 2:
                place(f"{name}_scale", torch.float32, shape[:1])
        return [*places, ("", torch.uint8, (0,), at)]

    def parts(self, model: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each weight, and of int8 each scale, by its name, as a view of a model's bytes."""
        for name, dtype, shape, begin in self._places[:-1]:
            end = begin + torch.Size(shape).numel() * dtype.itemsize
            yield name, model[begin:end].view(dtype).view(shape)

    def written(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The bytes of a model with these parts."""
        size = self._places[-1][-1]
        flags = sum(getattr(self, name) << bit for bit, name in enumerate(_FLAGS))
        numbers = (NUMBER[self.mode.lower()], [*WEIGHTS].index(self.weights) + 1, self.num_layers, self.input_size,
                   self.hidden_size, self.proj_size)  # fmt: skip
        header = bytearray(_HEADER.pack(_MAGIC, _VERSION, flags, size, 0, *numbers))
        model = torch.zeros(size, dtype=torch.uint8, device="cpu")
        model[: len(header)] = torch.frombuffer(header, dtype=torch.uint8)
        for name, view in self.parts(model):
            view.copy_(parts[name])
        checksum = bytearray(_C.frozen_checksum(buffer(model)).to_bytes(8, "little"))
        model[_CHECKSUM_AT : _CHECKSUM_AT + 8] = torch.frombuffer(checksum, dtype=torch.uint8)
        return model
