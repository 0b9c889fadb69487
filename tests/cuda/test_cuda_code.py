"""The machine code of the built CUDA library: every kernel is there, none spills registers, and the time loop reads no
weights from global memory. No GPU is needed.

The code is disassembled (sass.py) and compared with numbers computed from the sources.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product

import pytest

import sass
import sass_flow
from fused_rnn import reference
from sources import CSRC, needs_sources
from test_cuda_build import LIBRARY
from test_cuda_build import pytestmark as pytestmark

Kernels = dict[str, dict[sass.Name, sass.Kernel]]


def source(name: str) -> str:
    return (CSRC / name).read_text().replace("\\\n", "")


def constant(name: str) -> int:
    (value,) = re.findall(rf"constexpr int (?:\w+ = \d+, )*{name} = (\d+)[,;]", source("cuda/layout.h"))
    return int(value)


def policies() -> dict[str, str]:
    """The cells' template names in kernels (Tanh for RnnCell<Tanh>), and their names in Python."""
    entries = re.findall(r'X\(\w+, (\w+)(?:<(\w+)>)?, "(\w+)"\)', source("cells/cells.h"))
    return {inner or outer: label for outer, inner, label in entries}


def instances() -> list[tuple[int, ...]]:
    """FUSED_RNN_INSTANCES: exchange, unit_warps, depth_warps, row_tiles."""
    text = source("cuda/layout.h")
    entries = re.findall(r"X\((k\w+), (\d+), (\d+), (\d+)\)", text)
    return [(exchanges().index(exchange), *map(int, numbers)) for exchange, *numbers in entries]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The kernels of each architecture. Disassembling them takes a minute."""
    missing = [name for name in ("cuobjdump", "nvdisasm") if sass.find_tool(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return sass.kernels(LIBRARY, tmp_path_factory.mktemp("cubins"))


def exchanges() -> list[str]:
    (names,) = re.findall(r"enum class Exchange : int \{ (.*?) \}", source("cuda/layout.h"))
    return names.split(", ")


def resident(kernels: Kernels) -> list[tuple[str, sass.Name, sass.Kernel]]:
    """The kernels that keep the recurrent weights on the chip, without those for clusters on sm_80, which has none."""
    clusters = ("kThroughCluster", "kSplitColumns")
    return [
        (architecture, name, kernel)
        for architecture, found in kernels.items()
        for name, kernel in found.items()
        if name.shape and not (architecture == "sm_80" and exchanges()[name.shape[0]] in clusters)
    ]


def flows(
    kernels: Kernels, *exchanging: str, where: Callable[[str, sass.Name], bool]
) -> Iterator[tuple[str, sass.Name, sass_flow.Flow]]:
    """The paths through the resident kernels with these exchanges, where `where(architecture, name)` is true."""
    for architecture, name, kernel in resident(kernels):
        if exchanges()[name.shape[0]] in exchanging and where(architecture, name):
            yield architecture, name, sass_flow.Flow(kernel.code)


def rows_per_thread(name: sass.Name) -> int:
    """Rows of a tile that a thread computes: a block's threads are spread over its units first."""
    _, unit_warps, depth_warps, row_tiles = name.shape
    row_step = 32 * unit_warps * depth_warps // (constant("kTileUnits") * unit_warps)
    return -(-constant("kTileRows") * row_tiles // row_step)


def matching(instructions: Counter[str], pattern: str) -> int:
    return sum(count for opcode, count in instructions.items() if re.match(pattern, opcode))


@needs_sources
def test_every_kernel_is_there_for_every_architecture(kernels: Kernels) -> None:
    whole = ("forward", "backward")
    steps = [f"{kind}_{function}" for kind in ("step", "normalised") for function in whole]
    expected = {sass.Name(*key) for key in product(whole, policies(), ("Bf16", "Fp16", "Tf32"), instances())}
    # A cluster that splits columns has only backward.
    expected = {n for n in expected if n.function == "backward" or exchanges()[n.shape[0]] != "kSplitColumns"}
    expected |= {sass.Name(*key) for key in product(steps, policies(), ("Bf16", "Fp16", "Float32", "Float64"))}
    assert len(policies()) == len(reference.CELLS)
    assert instances()
    assert kernels
    for architecture, found in kernels.items():
        assert set(found) == expected, architecture


def test_no_kernel_spills(kernels: Kernels) -> None:
    """Spilled registers would go to the GPU's memory and back at every step."""
    for architecture, found in kernels.items():
        for name, kernel in found.items():
            assert kernel.instructions, (architecture, name)
            assert kernel.resources["STACK"] == kernel.resources["LOCAL"] == 0, (architecture, name)
            assert matching(kernel.instructions, r"(LDL|STL)\b") == 0, (architecture, name)


def test_a_block_of_every_kernel_can_be_launched(kernels: Kernels) -> None:
    """A multiprocessor has 65536 registers and allocates them to threads in multiples of eight."""
    for architecture, found in kernels.items():
        for name, kernel in found.items():
            _, unit_warps, depth_warps, _ = name.shape or (0, 8, 1, 1)
            registers = kernel.resources["REG"]
            assert registers <= 255, (architecture, name)
            assert -(-registers // 8) * 8 * 32 * unit_warps * depth_warps <= 65536, (architecture, name)


def splits(name: sass.Name) -> bool:
    return exchanges()[name.shape[0]] == "kSplitColumns"


def weights(name: sass.Name) -> tuple[int, int, int]:
    """For one tile: tensor-core instructions, those with weights from registers, and places that load rows.

    A warp takes the columns of its weights in pairs of tensor-core steps, one instruction for each step and gate, and
    the pairs in chunks of kChunkPairs. Chunks that begin with pairs in registers are unrolled; the others share a loop,
    whose code occurs once. Backward has one product, of all gates' gradients, or one for each block of a cluster that
    splits columns. An instruction takes four registers of weights, which gives the second number without counting
    pairs.
    """
    gates = reference.GATES[policies()[name.cell]] if name.function == "forward" else 1
    gates = constant("kSplitBlocks") if splits(name) else gates
    kept, chunk = constant("kWeightRegisters"), constant("kSplitChunkPairs" if splits(name) else "kChunkPairs")
    chunks = -(-kept // (8 * gates * chunk)) + 1
    return chunks * chunk * 2 * gates, kept // 4, (1 + chunks) * chunk


@needs_sources
def test_the_time_loop_multiplies_as_the_source_says(kernels: Kernels) -> None:
    """The expected number of tensor-core instructions, of the right type for the element.

    The compilers known so far do not unroll the loop over tiles of rows; if one does, the count is multiplied by
    their number.
    """
    opcodes = {"Bf16": "HMMA.16816.F32.BF16", "Fp16": "HMMA.16816.F32", "Tf32": "HMMA.1688.F32.TF32"}
    for architecture, name, kernel in resident(kernels):
        products, _, _ = weights(name)
        count = kernel.time_loop[opcodes[name.element]]
        assert count in (products, products * name.shape[3]), (architecture, name)
        # No others: neither outside of the loop nor of another type.
        assert count == matching(kernel.instructions, "[A-Z]*MMA"), (architecture, name)


@needs_sources
def test_the_time_loop_takes_weights_from_the_chip(kernels: Kernels) -> None:
    """Weights are loaded before the loop, in 16-byte loads, which otherwise only the exchange between blocks uses.

    The exchange through L2 is recognised by its memory order (relaxed, scope of the GPU); others use shared memory.
    """
    wide, exchange = r"LDG?\.\S*\b(64|128|256)\b", r"LDG?\.\S*\b128\.STRONG\.GPU"
    for architecture, name, kernel in resident(kernels):
        products, from_registers, rows = weights(name)
        exchanged = matching(kernel.time_loop, exchange)
        assert matching(kernel.time_loop, wide) == exchanged, (architecture, name)
        assert matching(kernel.instructions, wide) > exchanged, (architecture, name)  # proves that the pattern matches
        assert (exchanged > 0) == (exchanges()[name.shape[0]] in ("kThroughL2", "kSplitColumns")), (architecture, name)

        # Operands that are not in registers are in shared memory, with one load each. So are the partial sums of
        # several gates, one load for each depth warp and row of a thread; and those that a block of a cluster adds up
        # for another one, one load for each depth warp and tile of rows.
        several_gates = name.function == "forward" and reference.GATES[policies()[name.cell]] > 1
        sums = name.shape[2] * (name.shape[3] if splits(name) else rows_per_thread(name) if several_gates else 0)
        tiles = kernel.time_loop["LDS.128"] - (0 if exchanged else rows) - sums
        copies = matching(kernel.time_loop, "HMMA") // products
        assert tiles == copies * (products - from_registers), (architecture, name)


@needs_sources
def test_the_time_loop_reads_no_more_than_its_data(kernels: Kernels) -> None:
    """The data of forward: input gates. Of backward: saved values and dy. Of both: lengths, resets with their states,
    dropout and zoneout.

    The compiler may duplicate a part of the loop for two cases; reading weights would be far more loads.
    """
    saved = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 5, "gru": 5}  # kSaved values, and c or h before the step
    for architecture, name, kernel in resident(kernels):
        label, rows = policies()[name.cell], rows_per_thread(name)
        values = rows * (reference.GATES[label] + 1 if name.function == "forward" else saved[label] + 2)
        loads = matching(kernel.time_loop, r"LDG?\.(?!.*STRONG)")
        of_segments = 8 * rows  # row ends and resets, each read twice, and two reset states
        regularised = 8 * rows  # drop_h, two zoneout masks, h before dropout; code emitted twice
        assert values <= loads <= 2 * values + of_segments + regularised, (architecture, name, loads, values)


def test_no_load_is_waited_for_before_the_product(kernels: Kernels) -> None:
    """The loads of a step's data are in flight together, and while the blocks wait for each other's words."""
    waiting = {}
    exchanging = ("kThroughL2", "kThroughCluster", "kSplitColumns")
    for architecture, name, flow in flows(kernels, *exchanging, where=lambda architecture, name: True):
        barriers = flow.all(sass_flow.BARRIER, flow.time_loop)
        assert barriers, name
        if touched := flow.touched_loads(barriers):
            waiting[architecture, name] = touched
    assert waiting == {}


@needs_sources
def test_a_chunks_missing_words_are_loaded_again_together(kernels: Kernels) -> None:
    """A loop that polls has the loads of a whole chunk: one latency, not one for each. All elements poll alike."""
    exchanging = ("kThroughL2", "kSplitColumns")
    for architecture, name, flow in flows(kernels, *exchanging, where=lambda _, name: name.element == "Bf16"):
        chunk = constant("kSplitChunkPairs" if splits(name) else "kChunkPairs")
        loads = [
            len(flow.all(sass_flow.EXCHANGE_LOAD, loop))
            for loop in flow.loops(flow.time_loop)
            if not flow.all(sass_flow.MULTIPLY, loop)
        ]
        assert set(loads) - {0} == {chunk}, (architecture, name, loads)


# The most instructions from the barrier behind forward's product to the publication of h, on sm_90a, with one row per
# thread, by the number of depth warps, whose sums are added: five more than nvcc 13.0 emits.
TO_PUBLICATION = {
    "lstm": {8: 225, 4: 204},
    "gru": {8: 163, 4: 145},
    "rnn_tanh": {8: 92, 4: 84},
    "rnn_relu": {8: 63, 4: 55},
}


@needs_sources
def test_h_is_published_before_anything_else_is_stored(kernels: Kernels) -> None:
    """And after few instructions, since other blocks wait for it."""
    checked = 0

    def publishes_once(_: str, name: sass.Name) -> bool:  # a thread with several rows publishes one after the other
        return name.function == "forward" and rows_per_thread(name) == 1

    for architecture, name, flow in flows(kernels, "kThroughL2", where=publishes_once):
        publish, barriers = (flow.all(kind, flow.time_loop) for kind in (sass_flow.PUBLISH, sass_flow.BARRIER))
        for barrier in barriers:
            others = barriers - {barrier}
            distance = flow.distance(barrier, publish, others)
            if distance is None:
                continue  # the barrier behind the cell
            stores = flow.all(sass_flow.STORE, flow.between(barrier, publish, others))
            assert stores == set(), (architecture, name)
            if architecture == "sm_90a" and name.element == "Bf16":
                assert distance <= TO_PUBLICATION[policies()[name.cell]][name.shape[2]], (name, distance)
            checked += 1
    assert checked > 0
