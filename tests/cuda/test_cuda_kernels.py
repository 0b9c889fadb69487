"""The CUDA kernels without a GPU: `cuda_check.cpp` runs them in the emulator and compares them with a plain loop.

The emulator detects races, missing barriers and dependence on the order of messages; the comparison detects wrong
numbers. Each mutant below is a fault in a kernel that the check must detect, which proves that both can fail.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

import emulated
from sources import COMPILER, CSRC, assert_passes, build, compiled, needs_sources, run

HERE = Path(__file__).resolve().parent
EMULATOR = emulated.EMULATOR
FLAGS = ["-std=c++17", "-DFUSED_RNN_EMULATOR", f"-I{EMULATOR}", f"-I{HERE}", f"-I{CSRC / 'cuda'}", "-x", "c++"]
CELLS = {"lstm": "LstmCell", "gru": "GruCell", "rnn_tanh": "RnnCell<Tanh>", "rnn_relu": "RnnCell<Relu>"}
ELEMENTS = {"bf16": "Bf16", "fp16": "Fp16", "tf32": "Tf32"}
# The instances for mutants, as in csrc/cuda/layout.h: few, since compiling them takes most of the time.
INSTANCES = {
    "alone": "X(kAlone, 8, 1, 1)",
    "cluster": "X(kThroughCluster, 1, 8, 1)",
    "split": "X(kThroughL2, 1, 8, 1) X(kSplitColumns, 1, 8, 1)",  # split_columns has no forward of its own
    "ring": "X(kThroughL2, 1, 8, 1)",
    "few": "X(kAlone, 8, 1, 1) X(kThroughL2, 1, 8, 1) X(kThroughL2, 2, 4, 2)",
}
# sigmoid and tanh shift their constants' sign bits out, which every supported compiler defines.
SANITIZER = ["-fsanitize=address,undefined", "-fno-sanitize=shift-base", "-fno-sanitize-recover=all"]
PROCESSES = 2

pytestmark = [
    pytest.mark.slow("compiles the CUDA kernels for the emulator many times, each with a fault put in"),
    needs_sources,
    pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"there is no C++ compiler ({COMPILER[0]})"),
]


def one_instance(cell: str, element: str) -> list[str]:
    return [f"-DCHECK_CELL={CELLS[cell]}", f"-DCHECK_ELEMENT={ELEMENTS[element]}"]


def only(instances: str) -> str:
    return f"-DCHECK_INSTANCES(X)={INSTANCES[instances]}"


def require_sanitizer(folder: Path) -> None:
    (folder / "empty.cpp").write_text("int main() {}")
    if run(*COMPILER, *SANITIZER, folder / "empty.cpp", "-o", folder / "empty").returncode:
        pytest.skip(f"{COMPILER[0]} has no address sanitizer (Debian, Ubuntu: it comes with g++; Fedora: libasan)")


@pytest.fixture(scope="module")
def objects() -> dict[str, Path]:
    """The object files of the emulator and of the library's kernels."""
    return {path.name.removesuffix(".o"): path for path in emulated.built().with_suffix(".objects").glob("*.o")}


@pytest.fixture(scope="module")
def every_instance(tmp_path_factory: pytest.TempPathFactory, objects: dict[str, Path]) -> Path:
    """The program with all cells, elements and the instances of the library."""
    parts = [f"{cell}.cu" for cell in CELLS] + ["plan.cpp", "recurrence.cpp", "emulator.cpp"]
    program = tmp_path_factory.mktemp("every_instance") / "cuda_check"
    return build(program, [HERE / "cuda_check.cpp"], *FLAGS, "-O2", also=[objects[part] for part in parts])


def test_the_emulator_is_right(tmp_path: Path) -> None:
    program = build(tmp_path / "self_test", sorted(EMULATOR.glob("*.cpp")), *FLAGS, "-O1")
    done = run(program)
    assert done.returncode == 0, done.stdout + done.stderr


# The pairs that are checked in all instances. The others have the order of events of one of these, and are checked in
# a few; test_cuda_layers.py runs all instances of all of them in a layer.
IN_FULL = [("lstm", "bf16"), ("lstm", "tf32"), ("gru", "bf16"), ("rnn_tanh", "tf32")]


def test_every_instance_agrees_with_the_reference(every_instance: Path) -> None:
    def check(cell: str, element: str) -> subprocess.CompletedProcess[str]:
        quick = [] if (cell, element) in IN_FULL else ["--quick"]
        return run(every_instance, "--cell", cell, "--element", element, "--seeds", 1, *quick)

    with ThreadPoolExecutor(PROCESSES) as pool:
        for done in [pool.submit(check, *pair) for pair in product(CELLS, ELEMENTS)]:
            assert_passes(done.result())


def test_no_access_beyond_memory_and_nothing_undefined(tmp_path: Path) -> None:
    require_sanitizer(tmp_path)
    # The emulator's addresses alone: three quarters of the time are spent there.
    emulator = compiled(EMULATOR / "emulator.cpp", tmp_path / "emulator.o", *FLAGS, "-O2", "-fsanitize=address")
    sources = [HERE / "cuda_check.cpp", CSRC / "cuda" / "plan.cpp"]

    def check(cell: str, element: str, *instances: str) -> subprocess.CompletedProcess[str]:
        flags = [*FLAGS, "-O0", *SANITIZER, *one_instance(cell, element), *instances]
        return run(build(tmp_path / cell, sources, *flags, also=[emulator], processes=1), "--quick", "--seeds", "1")

    with ThreadPoolExecutor(PROCESSES) as pool:
        for done in [pool.submit(check, "lstm", "bf16"), pool.submit(check, "gru", "tf32", only("few"))]:
            assert_passes(done.result())


@dataclass(frozen=True)
class Mutant:
    """A fault: replaces `old`, which occurs once in `file`, by `new`. Checking `cell` with `element` must detect it."""

    name: str
    file: str
    old: str
    new: str
    cell: str = "lstm"
    element: str = "bf16"
    sanitized: bool = False  # only the address sanitizer detects it
    exchange: str = "few"  # the set of instances that must detect it


_FORWARD, _BACKWARD, _PRODUCT, _EXCHANGE = "forward.cuh", "backward.cuh", "product.cuh", "exchange.cuh"
_BLOCK, _ELEMENT, _REGULARISED, _OPTIONS = "block.cuh", "element.h", "regularised.cuh", "row_options.cuh"
_REDUCTION = "reduction.cuh"
_EXISTS = "is_unit ? operand : 0.0f, row < tile.rows && unit < Hp"
_ALONE, _CLUSTER, _SPLIT = {"exchange": "alone"}, {"exchange": "cluster"}, {"exchange": "split"}
_RING = {"exchange": "ring"}
# Faults that cannot be detected and are left out:
# - Both sync_warp() of product.cuh: mma itself synchronises the emulator's warps, and a lane reads only those weights
#   in shared memory that it wrote. They make a GPU's lanes converge and do not order memory.
# - The barrier before backward's steps: nothing shared is written before it.
# - Forward's `is_unit ? operand : 0.0f`: beyond H everything is zero, from the weights to the state.
# - The bound of rows in a single block: rows beyond the tile have memory of their own, and their sums are unused.
# - `last_row` in Block::tile: all launches but the last consist of whole tiles.
# - Rings: a reset without fences between it and earlier loads. An emulated load gives what is in memory at its time.
# A cluster's behaviour after one of its threads has given up needs a delayed block, and so a test of its own,
# cuda_emulator/self_test_cluster.cpp: the barrier at the end, no pushes after giving up. So does a ring's:
# self_test_ring.cpp.
MUTANTS = [
    # Barriers.
    Mutant("forward: none before the steps", _FORWARD, "  }\n  sync_block();\n", "  }\n"),
    Mutant("forward: none behind the product", _FORWARD, "sums);\n      sync_block();", "sums);"),
    Mutant("forward: none behind the cell", _FORWARD, "      sync_block();\n    }\n", "    }\n"),
    Mutant("backward: none behind the product", _BACKWARD, "      sync_block();\n      if (step", "      if (step"),
    Mutant("backward: none behind the cell", _BACKWARD, "      sync_block();\n    }\n", "    }\n"),
    # The exchange through L2.
    Mutant("nothing is ever missing", _EXCHANGE, "return v.w[0] == kNotReady ||", "return false &&"),
    Mutant(
        "three words of four are looked at", _EXCHANGE, "v.w[2] == kNotReady || v.w[3]", "v.w[2] == kNotReady || v.w[2]"
    ),
    Mutant("forward: published for this step", _FORWARD, "exchange.target(next, tile,", "exchange.target(t, tile,"),
    Mutant(
        "only the first of a chunk's words is looked at", _EXCHANGE, "missing || is_missing(v[i])", "is_missing(v[0])"
    ),
    Mutant("backward: waits for this step", _BACKWARD, "exchange.source(after,", "exchange.source(t < 0 ? after : t,"),
    Mutant("loads rows behind the tile", _EXCHANGE, "kTileRows * row_tile < rows_ && ", ""),
    Mutant("loads columns behind the last", _EXCHANGE, " && column < columns_", ""),
    Mutant("publishes rows behind the tile", _FORWARD, _EXISTS, "is_unit ? operand : 0.0f, unit < Hp"),
    Mutant("publishes units behind the last", _FORWARD, _EXISTS, "is_unit ? operand : 0.0f, row < tile.rows"),
    Mutant("backward: publishes units behind the last", _BACKWARD, "row < tile.rows && unit < Hp", "row < tile.rows"),
    Mutant("two lanes store a word", _ELEMENT, "return thread_index() % kElementsPerWord<E> == 0;", "return true;"),
    Mutant("not yet there is 0", _ELEMENT, "kNotReady = 0xffffffffu", "kNotReady = 0"),
    Mutant(
        "a NaN is published as it is",
        _ELEMENT,
        "static Stored stored(float value) { return bf16_bits(value); }",
        "static Stored stored(float v) { return v != v ? math::bits<uint32_t>(v) >> 16 : bf16_bits(v); }",
    ),
    Mutant(
        "TF32: a NaN is published as it is",
        _ELEMENT,
        "return tf32_bits(value);",
        "return value != value ? math::bits<uint32_t>(value) : tf32_bits(value);",
        element="tf32",
    ),
    Mutant("GRU: the wrong gradients are read", _EXCHANGE, " + exchange.rows_.offset + column", " + column", "gru"),
    # The ring.
    Mutant("ring: no fence", _EXCHANGE, "step % kFenceSteps == 0) fence();", "false) fence();", **_RING),
    Mutant("ring: fences too rare", _EXCHANGE, "kFenceSteps = kAhead / 2", "kFenceSteps = kAhead", **_RING),
    Mutant("ring: no reset", _FORWARD, "exchange.reset(t, tile, block);", ";", **_RING),
    Mutant(
        "ring: a reset one step too late, reverse",
        _FORWARD,
        "exchange.reset(t, tile",
        "exchange.reset(t + 1, tile",
        **_RING,
    ),
    Mutant("ring: resets what is read", _EXCHANGE, "index(t ^ kAhead, tile", "index(t, tile", **_RING),
    Mutant(
        "ring: resets what is published", _FORWARD, "exchange.reset(t, tile", "exchange.reset(next ^ 32, tile", **_RING
    ),
    Mutant(
        "ring: resets half as far ahead", _EXCHANGE, "index(t ^ kAhead, tile", "index(t ^ kAhead / 2, tile", **_RING
    ),
    Mutant(
        "ring: resets the first rows",
        _EXCHANGE,
        "tile.first + row) + block.unit(), kNot",
        "row) + block.unit(), kNot",
        **_RING,
    ),
    Mutant(
        "ring: resets rows behind the tile", _EXCHANGE, "row < tile.rows; row +=", "row < Shape::kRows; row +=", **_RING
    ),
    Mutant("ring: resets units behind the last", _EXCHANGE, "block.unit() >= rows_.columns || block", "block", **_RING),
    Mutant("ring: resets a row of several", _EXCHANGE, "row += Shape::kRowStep) {", "row += Shape::kRows) {"),
    # The watchdog.
    Mutant("never gives up", _EXCHANGE, "now - since_ <= patience_", "now >= since_"),
    Mutant("waits again after giving up", _EXCHANGE, "if (gave_up_) return false;", ""),
    Mutant("adds up all waits", _EXCHANGE, "{ turns_ = 0, since_ = 0; }", "{ turns_ += 0; }"),
    Mutant("does not say so", _EXCHANGE, "store_to_host(error_, 1);", ""),
    # A single block.
    Mutant("alone: columns behind the last", _EXCHANGE, " || column >= columns_", ""),
    Mutant("alone: all tiles in one slot", _EXCHANGE, "(tile.index * Shape::kRows + row)", "row"),
    Mutant(
        "alone, GRU: keeps what nobody reads", _EXCHANGE, "if (column_ + column >= rows.offset)", "if (true)", "gru"
    ),
    # The product.
    Mutant("forward: weights not padded", _FORWARD, "d.w_hh), H, Hp,", "d.w_hh), H, H,"),
    Mutant("weights of units behind the last", _PRODUCT, " && row < H && ", " && ", sanitized=True),
    Mutant("weights of columns behind the last", _PRODUCT, " && column(pair) < columns_", ""),
    Mutant("partial sums dropped", _PRODUCT, "k < kSplit; ++k) sum", "k < 1; ++k) sum"),
    Mutant("depth warps dropped", _PRODUCT, "depth < Shape::kDepthWarps; ++depth", "depth < 1; ++depth"),
    Mutant("shared weights: warps overlap", _PRODUCT, "first_shared_ = warp() *", "first_shared_ = 0 *"),
    Mutant("shared weights: operands overlap", _PRODUCT, "kRegisterOperands) * 2 + step", "kRegisterOperands) + step"),
    Mutant(
        "the next tile's rows too late", _PRODUCT, "start(source, tile + 1, 0, next)", "start(source, tile, 0, next)"
    ),
    # Rows, units and their states.
    Mutant("forward: rows never end", _FORWARD, "active = o.active(t);", "active = true;"),
    Mutant("backward: rows never end", _BACKWARD, "if (o.active(t))", "if (t >= 0)"),
    Mutant("backward, GRU: rows that ended have gradients", _BACKWARD, "saved_bits[i][k] = {};", ";", "gru"),
    Mutant("a layer with lengths has no options", "instances.cuh", "q.lengths || q.resets;", "q.resets;"),
    Mutant("y behind a row's end", _FORWARD, "active ? h : 0.0f", "h"),
    Mutant("h is not kept", _FORWARD, "        state.store(0, i, h_next);\n", ""),
    Mutant("c is not kept", _FORWARD, "state.store(1, i, c_next);", ";"),
    Mutant("c saved after the step", _FORWARD, "Cell::kHasC ? c_prev : h_prev;", "Cell::kHasC ? c : h_prev;"),
    Mutant("backward: dc is not kept", _BACKWARD, "        state.store(1, i, dc + dc_split.to_old);\n", ""),
    Mutant("backward: rows that ended lose dh", _BACKWARD, "dh_split = {0.0f, dh}", "dh_split = {0.0f, 0.0f}"),
    Mutant("backward: rows that ended lose dc", _BACKWARD, "dc_split = {0.0f, dc}", "dc_split = {0.0f, 0.0f}"),
    Mutant("one state for all tiles", _BLOCK, "tile.index * 2 * kElements", "0 * kElements"),
    Mutant("rows of no tile", _FORWARD, "if (row >= Shape::kRows) break;\n        const", "const"),
    Mutant("the second launch takes the first rows", _BLOCK, "sequence_.first_row + static_cast", "static_cast"),
    Mutant("both directions run the same way", _BLOCK, "(direction_ == 1)", "false"),
    # Resets.
    Mutant("resets of rows that have ended", _OPTIONS, "reset && active(later)", "reset", **_ALONE),
    Mutant("a reset of the first step", _OPTIONS, "later > 0", "later >= 0", **_ALONE),
    Mutant("a reset behind the last step", _OPTIONS, "later < sequence.T", "true", **_ALONE),
    Mutant("resets before the step, reverse", _OPTIONS, "direction == 0 ? t + 1 : t", "t + 1", **_ALONE),
    Mutant("resets never", _OPTIONS, "return reset && active(later);", "return false;", **_ALONE),
    Mutant(
        "forward: resets h to zero",
        _FORWARD,
        "h_next = value_or_zero<E>(d.reset.h, next",
        "h_next = 0 * (next",
        **_ALONE,
    ),
    Mutant(
        "forward: resets c to zero",
        _FORWARD,
        "c_next = value_or_zero<E>(d.reset.c, next",
        "c_next = 0 * (next",
        **_ALONE,
    ),
    Mutant("forward: resets h as of this step", _FORWARD, "d.reset.h, next *", "d.reset.h, t *", **_ALONE),
    Mutant("forward: resets c as of this step", _FORWARD, "d.reset.c, next *", "d.reset.c, t *", **_ALONE),
    Mutant("backward: a reset does not end dh and dc", _BACKWARD, "dh = dc = 0.0f;", "", **_ALONE),
    Mutant("backward: a reset does not end dh", _BACKWARD, "dh = dc = 0.0f;", "dc = 0.0f;", **_ALONE),
    Mutant(
        "dreset without the product", _BACKWARD, "d.dreset.h, at, dh)", "d.dreset.h, at, state.load(0, i))", **_ALONE
    ),
    Mutant("dreset of this step", _BACKWARD, "block.time(step - 1, true) * d.dreset", "t * d.dreset", **_ALONE),
    Mutant("dreset of c is that of h", _BACKWARD, "d.dreset.c, at, dc)", "d.dreset.c, at, dh)", **_ALONE),
    # The sequence of c.
    Mutant("c_sequence behind a row's end", _FORWARD, "active ? c : 0.0f", "c", **_ALONE),
    Mutant("c_sequence in rows of H", _FORWARD, "(d.c_sequence, y_index,", "(d.c_sequence, n * H + unit,", **_ALONE),
    Mutant("dc_sequence is not added", _BACKWARD, "dc_split.to_new += dc_sequence[i].value();", ";", **_ALONE),
    Mutant("dc_sequence is not added, with options", _BACKWARD, "dc + dc_sequence[i].value());", "dc);", **_ALONE),
    Mutant(
        "dc_sequence in rows of H",
        _BACKWARD,
        "d.dc_sequence, n * d.dy_stride + unit",
        "d.dc_sequence, n * H + unit",
        **_ALONE,
    ),
    # Recurrent dropout and zoneout.
    Mutant("forward: all of h is multiplied", _FORWARD, "operand = d.drop_h ?", "operand = false ?", **_ALONE),
    Mutant("forward: h takes the share of c", _FORWARD, "d.zones.h, o.share_h", "d.zones.h, o.share_c", **_ALONE),
    Mutant("backward: all of the product comes back", _BACKWARD, "dh += d.drop_h ?", "dh += false ?", **_ALONE),
    Mutant("dropout of the first row", _OPTIONS, "d.drop_h, b * sequence.H", "d.drop_h, 0 * sequence.H", **_ALONE),
    Mutant("GRU: backward takes h as it was dropped", _BACKWARD, "d.state_prev ? state", "false ? state", "gru"),
    Mutant("one share for all rows", _OPTIONS, "n * d.zones.h.stride + unit", "unit", **_ALONE),
    Mutant("zoneout: nothing of the old state", _REGULARISED, "old_state + share", "share", **_ALONE),
    Mutant("zoneout: no gradient of the old state", _REGULARISED, "d - d * share}", "T(0)}", **_ALONE),
    Mutant("forward: rows that ended are mixed", _FORWARD, "c = active ? mixed", "c = true ? mixed", **_ALONE),
    Mutant("backward: c loses what zoneout kept", _BACKWARD, "dc + dc_split.to_old", "dc", **_ALONE),
    Mutant("backward: h loses what zoneout kept", _BACKWARD, "dh_prev + dh_split.to_old", "dh_prev", **_ALONE),
    # The exchange through a cluster.
    Mutant("cluster: nothing is expected again", _EXCHANGE, "gave_up()) expect(t, tile);", "gave_up()) {}", **_CLUSTER),
    Mutant("cluster: all expect", _EXCHANGE, "if (thread_index() == 0 && !watchdog_", "if (!watchdog_", **_CLUSTER),
    Mutant("cluster: nothing is expected at first", _EXCHANGE, "          expect(t, block.tile(j));\n", "", **_CLUSTER),
    Mutant("cluster: expects whole tiles", _EXCHANGE, "expect(tile.rows *", "expect(Shape::kRows *", **_CLUSTER),
    Mutant("cluster: parity of every step", _EXCHANGE, ">> 1 & 1;", "& 1;", **_CLUSTER),
    Mutant("cluster: time from 0", _EXCHANGE, "static_cast<int>(t) - first_", "static_cast<int>(t)", **_CLUSTER),
    Mutant("cluster: one slot", _EXCHANGE, "(buffer(t, tile) * Shape::kRows", "(tile.index * Shape::kRows", **_CLUSTER),
    Mutant("cluster: one tile's barriers", _EXCHANGE, "return tile.index * 2 +", "return 0 * 2 +", **_CLUSTER),
    Mutant("cluster: does not wait", _EXCHANGE, "if (tile.rows > 0) wait(t, tile);", "", **_CLUSTER),
    Mutant("cluster: no barrier at the start", _EXCHANGE, "    }\n    sync_cluster();\n", "    }\n", **_CLUSTER),
    Mutant("cluster: pushes to itself", _EXCHANGE, "words, arrivals_, rank)", "words, arrivals_, 0)", **_CLUSTER),
    Mutant(
        "cluster, GRU: pushes what nobody reads",
        _EXCHANGE,
        "if (column_ + column >= 0 && column_",
        "if (column_",
        "gru",
        **_CLUSTER,
    ),
    # Clusters that split columns.
    Mutant(
        "split: no barrier behind the product",
        _BACKWARD,
        "      sync_block();\n      if (step",
        "      if (step",
        **_SPLIT,
    ),
    Mutant("split: no barrier behind the cell", _BACKWARD, "      sync_block();\n    }\n", "    }\n", **_SPLIT),
    Mutant("split: no barrier at the start", _REDUCTION, "    }\n    sync_cluster();\n", "    }\n", **_SPLIT),
    Mutant(
        "split: does not wait", _REDUCTION, "while (!arrivals(slot).complete(parity) &&", "while (false &&", **_SPLIT
    ),
    Mutant("split: parity of every product", _REDUCTION, "products_ >> 1 & 1;", "products_ & 1;", **_SPLIT),
    Mutant("split: one slot", _REDUCTION, "slots_ + slot * kSlotBytes", "slots_ + 0 * kSlotBytes", **_SPLIT),
    Mutant("split: one barrier", _REDUCTION, "arrivals_ + slot * 8", "arrivals_ + 0 * slot", **_SPLIT),
    Mutant(
        "split: nothing is expected at first", _REDUCTION, "        arrivals(slot).expect(kSlotBytes);\n", "", **_SPLIT
    ),
    Mutant(
        "split: nothing is expected again",
        _REDUCTION,
        "gave_up()) arrivals(slot).expect(kSlotBytes);",
        "gave_up()) {}",
        **_SPLIT,
    ),
    Mutant("split: all expect", _REDUCTION, "if (thread_index() == 0 && !watchdog_", "if (!watchdog_", **_SPLIT),
    Mutant(
        "split: expects less",
        _REDUCTION,
        "kSplitBlocks * Shape::kRows * Shape::kUnits * 4;",
        "Shape::kRows * 16;",
        **_SPLIT,
    ),
    Mutant(
        "split: all push to one place",
        _REDUCTION,
        "Block<Shape>::rank(), row, unit), words",
        "0, row, unit), words",
        **_SPLIT,
    ),
    Mutant(
        "split: pushes to itself",
        _REDUCTION,
        "arrivals(slot), to);",
        "arrivals(slot), Block<Shape>::rank());",
        **_SPLIT,
    ),
    Mutant(
        "split: pushes another's sums", _REDUCTION, "at(depth, row, unit, to)", "at(depth, row, unit, to ^ 1)", **_SPLIT
    ),
    Mutant("split: depth warps dropped", _REDUCTION, "depth < Shape::kDepthWarps;", "depth < 1;", **_SPLIT),
    Mutant("split: blocks dropped", _REDUCTION, "from < kSplitBlocks;", "from < 1;", **_SPLIT),
    Mutant(
        "split: all take the first columns",
        _BACKWARD,
        "block.rank() * share.columns",
        "0 * share.columns",
        **_SPLIT,
    ),
    Mutant("split: columns behind the last", _BACKWARD, "rest < share.columns ?", "false ?", **_SPLIT),
    Mutant("split: weights of its own units", _PRODUCT, "kSplits ? gate * Shape::kUnits : 0", "0", **_SPLIT),
]


def outcome(mutant: Mutant, folder: Path, host: list[Path]) -> subprocess.CompletedProcess[str]:
    """The result of the check on a copy of the sources with the fault."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    target = csrc / "cuda" / mutant.file
    text = target.read_text()
    assert text.count(mutant.old) == 1, (
        f"{mutant.file} has changed: {mutant.old!r} occurs {text.count(mutant.old)} times"
    )
    target.write_text(text.replace(mutant.old, mutant.new))
    sources, also = [HERE / "cuda_check.cpp"], host
    flags = [f"-I{csrc / 'cuda'}", *FLAGS, "-O0", only(mutant.exchange), *one_instance(mutant.cell, mutant.element)]
    if mutant.sanitized:
        sources, also = [*sources, csrc / "cuda" / "plan.cpp", EMULATOR / "emulator.cpp"], []
        flags += SANITIZER
    program = build(folder / "mutant", sources, *flags, also=also, processes=1)
    done = run(program, "--quick")
    shutil.rmtree(folder)
    return done


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, objects: dict[str, Path]
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """The results of the selected mutants, several at a time."""
    host = [objects["emulator.cpp"], objects["plan.cpp"]]
    mutants = [item.callspec.params["mutant"] for item in request.session.items if "[mutant: " in item.name]
    with ThreadPoolExecutor(PROCESSES) as pool:
        yield {m.name: pool.submit(outcome, m, tmp_path_factory.mktemp("mutant"), host) for m in mutants}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"mutant: {m.name}" for m in MUTANTS])
def test_a_fault_is_found(
    mutant: Mutant, outcomes: dict[str, Future[subprocess.CompletedProcess[str]]], tmp_path: Path
) -> None:
    if mutant.sanitized:
        require_sanitizer(tmp_path)
    done = outcomes[mutant.name].result()
    print(done.stdout, done.stderr[:2000])
    assert done.returncode != 0, "nobody has noticed"
    # Reported by the check or the sanitizer: a mere crash does not count as detected.
    assert "FAILED: " in done.stdout or "AddressSanitizer" in done.stderr
