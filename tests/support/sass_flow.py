"""The paths through a disassembled kernel: its loops, what is between two instructions, who waits for a load.

Instructions are numbered in the order of their addresses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property

import networkx  # torch needs it, too

_LABEL = re.compile(r"(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_TARGET = re.compile(r"\.L_x_\d+")
_REGISTER = re.compile(r"\bR(\d+)(?:\.reuse)?(\.64)?")

MULTIPLY = r"HMMA"
BARRIER = r"BAR\."
LOAD = r"LDG?\.(?!.*STRONG)"  # from global memory, but not of exchanged words
STORE = r"STG?\.(?!.*STRONG)"
EXCHANGE_LOAD = r"LDG?\.\S*\b128\.STRONG\.GPU"
# Through L2, where 128 bits are a reset, or into the memory of another block of the cluster.
PUBLISH = r"STG?\.(?!\S*128)\S*STRONG\.GPU|STAS"

Nodes = set[int]


class Flow:
    def __init__(self, code: str) -> None:
        self.opcodes: list[str] = []
        self.operands: list[str] = []
        self.after: list[list[int]] = []
        falls_through: list[bool] = []
        targets: list[list[str]] = []
        labels: dict[str, int] = {}
        for line in code.splitlines():
            if match := _INSTRUCTION.match(line):
                guard, opcode, operands = match.groups()
                self.opcodes.append(opcode)
                self.operands.append(operands)
                # BSSY does not jump: it names the place where the threads of a diverged warp meet. BSYNC, where they
                # meet, stands directly before that place.
                targets.append([] if opcode.startswith("BSSY") else _TARGET.findall(operands))
                # A branch with further operands besides its target is conditional. A subroutine returns.
                leaves = opcode.split(".")[0] in ("BRA", "BRX", "EXIT", "RET")
                falls_through.append(not leaves or guard is not None or "," in operands)
            elif match := _LABEL.match(line.strip()):
                labels[match[1]] = len(self.opcodes)
        self.before: list[list[int]] = [[] for _ in self.opcodes]
        for at, names in enumerate(targets):
            places = [labels[name] for name in names]
            if falls_through[at] and at + 1 < len(self.opcodes):
                places.append(at + 1)
            self.after.append(places)
            for place in places:
                self.before[place].append(at)

    def all(self, pattern: str, among: Iterable[int] | None = None) -> Nodes:
        """The instructions whose opcode matches."""
        return {
            at for at in (range(len(self.opcodes)) if among is None else among) if re.match(pattern, self.opcodes[at])
        }

    @cached_property
    def time_loop(self) -> Nodes:
        """The outermost loop around the tensor-core instructions: all on a path from one of them back to itself."""
        multiply = min(self.all(MULTIPLY), default=None)
        if multiply is None:
            return set()
        return _reached([multiply], self.after) & _reached([multiply], self.before)

    def loops(self, within: Nodes) -> Iterator[Nodes]:
        """The loops that are within, outer ones first. Loops inside of another one are found without its head."""
        graph = networkx.DiGraph((at, place) for at in within for place in self.after[at] if place in within)
        for loop in networkx.strongly_connected_components(graph):
            if len(loop) == 1 and not loop & set(self.after[min(loop)]):
                continue
            yield loop
            heads = {at for at in loop if any(place not in loop for place in self.before[at])}
            yield from self.loops(loop - heads)

    def distance(self, start: int, ends: Nodes, stops: Nodes) -> int | None:
        """Instructions on the shortest path from `start` to one of `ends` that meets none of `stops`."""
        distances = {start: 0}
        queue = [start]
        for at in queue:
            if at in ends:
                return distances[at]
            for place in self.after[at]:
                if place not in distances and place not in stops:
                    distances[place] = distances[at] + 1
                    queue.append(place)
        return None

    def between(self, start: int, ends: Nodes, stops: Nodes) -> Nodes:
        """The instructions on paths from `start` to the first of `ends` that meet none of `stops`."""
        forward = _reached([start], self.after, ends | stops)
        return forward & _reached(ends & forward, self.before, {start}) - ends - stops

    def touched_loads(self, stops: Nodes) -> list[str]:
        """Instructions of the time loop, before any of `stops`, that wait for a load of the same iteration.

        Only those before a tensor-core instruction: behind the product waiting costs nothing.
        """
        before_product = _reached(self.all(MULTIPLY, self.time_loop), self.before, stops)
        loads = self.all(LOAD, self.time_loop)
        touches = [self._registers(operands) for operands in self.operands]
        heads = [at for at in self.time_loop if any(place not in self.time_loop for place in self.before[at])]
        pending = dict.fromkeys(heads, 0)  # a bit for each register that holds a load's result
        queue, found = list(heads), set()
        while queue:
            at = queue.pop()
            if at in stops:
                continue
            if pending[at] & touches[at] and at in before_product:
                found.add(at)
            result = 1 << int(_REGISTER.search(self.operands[at])[1]) if at in loads else 0
            left = pending[at] & ~touches[at] | result
            for place in self.after[at]:
                if place in self.time_loop and (place not in pending or left & ~pending[place]):
                    pending[place] = pending.get(place, 0) | left
                    queue.append(place)
        return [f"{self.opcodes[at]} {self.operands[at]}" for at in sorted(found)]

    @staticmethod
    def _registers(operands: str) -> int:
        """The named registers, as bits; of wide operands those that the text shows."""
        bits = 0
        for number, wide in _REGISTER.findall(operands):
            bits |= (3 if wide else 1) << int(number)
        return bits


def _reached(starts: Iterable[int], neighbours: list[list[int]], stops: Nodes = frozenset()) -> Nodes:
    """All instructions that can be reached in one step or more, without going on behind those of `stops`."""
    found: Nodes = set()
    left = list(starts)
    while left:
        new = set(neighbours[left.pop()]) - found
        found |= new
        left += new - stops
    return found
