"""Streams of frozen modules, from Python and from C."""

from __future__ import annotations

import copy
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import fused_rnn
from processes import python, succeeded
from sources import installed_kernels, run

FORMATS = ("float32", "bfloat16", "int8")
I, H, T = 3, 20, 60  # noqa: E741 - the fields' letters; more steps than a stream takes at once
MODULES = {
    "rnn_relu": lambda: nn.RNN(I, H, nonlinearity="relu"),
    "lstm": lambda: nn.LSTM(I, H, 3),
    "lstm_proj": lambda: nn.LSTM(I, H, 2, proj_size=5),
    "gru": lambda: nn.GRU(I, H, bias=False),
    "gru_cell": lambda: nn.GRUCell(I, H),
    "lstm_cell": lambda: nn.LSTMCell(I, H),
}
EXAMPLE = Path(__file__).resolve().parents[2] / "benchmarks" / "examples" / "stream.c"


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def steps(frozen: Any, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The outputs and the final states by forward, of a cell by its calls one after another."""
    if isinstance(frozen, fused_rnn.FrozenRNN):
        return frozen(x)
    outputs, hx = [], None
    for x_t in x:
        hx = frozen(x_t, hx)
        outputs.append(hx[0] if isinstance(hx, tuple) else hx)
    return torch.stack(outputs), tuple(s.unsqueeze(0) for s in hx) if isinstance(hx, tuple) else hx.unsqueeze(0)


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, tuple):
        for a, b in zip(found, expected, strict=True):
            assert_equal(a, b)
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("key", MODULES)
def test_steps_and_chunks_are_forward(key: str, batch: int, weights: str) -> None:
    """Bit for bit: steps, steps into a given tensor, one long chunk, and chunks between steps."""
    frozen = fused_rnn.freeze(MODULES[key](), weights)
    x = torch.randn(T, batch, I)
    y, state = steps(frozen, x)
    stream = frozen.stream(batch)
    assert_equal(torch.stack([stream(x_t) for x_t in x]), y)
    assert_equal(stream.state, state)
    stream.reset()
    out = torch.empty(batch, y.size(2))
    for x_t, y_t in zip(x, y, strict=True):
        assert stream(x_t, out=out) is out
        assert_equal(out, y_t)
    stream.state = None
    assert_equal(stream.chunk(x), y)
    assert_equal(stream.state, state)
    stream.reset()
    assert_equal(torch.cat([stream.chunk(x[:7]), stream(x[7])[None], stream.chunk(x[8:8]), stream.chunk(x[8:])]), y)


def test_a_single_row_needs_no_batch_dimension() -> None:
    stream = fused_rnn.freeze(nn.GRU(I, H)).stream()
    x = torch.randn(T, I)
    y = stream.chunk(x[:, None])
    stream.reset()
    assert_equal(stream.chunk(x), y[:, 0])
    stream.reset()
    assert_equal(stream(x[0]), y[0, 0])


def test_arrays() -> None:
    """Numpy arrays come in and out, without torch and without copies."""
    frozen = fused_rnn.freeze(nn.LSTM(I, H))
    a, b = frozen.stream(), frozen.stream()
    x = numpy.random.default_rng(0).standard_normal((T, 1, I), numpy.float32)
    y = a.chunk(x)
    assert type(y) is numpy.ndarray and y.dtype == numpy.float32
    assert_equal(torch.from_numpy(y), b.chunk(torch.from_numpy(x)))
    out = numpy.empty((1, H), numpy.float32)
    assert a(x[0], out=out) is out
    assert_equal(torch.from_numpy(out), b(torch.from_numpy(x[0])))
    a.state = tuple(s.numpy() for s in b.state)
    assert_equal(a.state, b.state)


def test_state() -> None:
    frozen = fused_rnn.freeze(nn.LSTM(I, H, 2))
    x, hx = torch.randn(T, 3, I), (torch.randn(2, 3, H), torch.randn(2, 3, H))
    stream = frozen.stream(3)
    stream.state = hx
    assert_equal(stream.state, hx)
    assert stream.state[0].data_ptr() != stream.state[0].data_ptr()  # copies
    y, after = frozen(x, hx)
    assert_equal(stream.chunk(x), y)
    assert_equal(stream.state, after)
    stream.reset(torch.tensor([True, False, True]))
    for state, kept in zip(stream.state, after, strict=True):
        assert state[:, [0, 2]].eq(0).all()
        assert_equal(state[:, 1], kept[:, 1])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda s: s(torch.randn(4)), RuntimeError, r"expected x of shape \[1, 3\] or \[3\], got \[4\]"),
        (lambda s: s(torch.randn(2, 3)), RuntimeError, r"got \[2, 3\]"),
        (lambda s: s(torch.randn(3).double()), RuntimeError, "x must be float32"),
        (lambda s: s(torch.randn(3, 2)[:, 0]), RuntimeError, "x must be contiguous"),
        (lambda s: s(torch.randn(3), out=torch.empty(20, device="meta")), RuntimeError, "out must be .* on the CPU"),
        (lambda s: s(numpy.zeros(3)), RuntimeError, "x must be float32"),
        (lambda s: s(numpy.zeros(3, ">f4")), RuntimeError, "x must be float32"),
        (lambda s: s(numpy.zeros((3, 2), numpy.float32)[:, 0]), RuntimeError, "contiguous float32 array"),
        (lambda s: s([1.0, 2.0, 3.0], out=torch.empty(20)), RuntimeError, "x must be a float32 tensor or .*got list"),
        (lambda s: s([1.0, 2.0, 3.0]), RuntimeError, "x must be a float32 tensor or .*got list"),
        (lambda s: s.chunk(None), RuntimeError, "x must be a float32 tensor or .*got NoneType"),
        (lambda s: s(torch.randn(3), out=torch.empty(1, 20)), RuntimeError, "out must have as many dimensions"),
        (lambda s: s(torch.randn(3), out=torch.empty(19)), RuntimeError, r"expected out of shape.*got \[19\]"),
        (lambda s: s.chunk(torch.randn(3)), RuntimeError, r"expected x of shape \[T, 1, 3\]"),
        (lambda s: s.chunk(torch.randn(5, 3), out=torch.empty(4, 20)), RuntimeError, "T = 5, got"),
        (lambda s: s.reset([1]), RuntimeError, "rows to be bool"),
        (lambda s: s.reset(torch.tensor([True, False])), RuntimeError, r"rows to be bool of shape \[1\]"),
        (lambda s: setattr(s, "state", torch.zeros(1, 1, 20)), TypeError, "expected a pair"),
        (lambda s: setattr(s, "state", (torch.zeros(1, 1, 20), torch.zeros(20))), RuntimeError, "expected c of shape"),
        (lambda s: setattr(s, "state", "hc"), TypeError, "expected a pair"),
        (lambda s: setattr(s, "state", ("h", "c")), TypeError, "state: expected tensors or arrays, got str"),
        (lambda s: setattr(s, "state", ((torch.zeros(1, 1, 20),), None)), TypeError, "or arrays, got tuple"),
    ],
)  # fmt: skip
def test_wrong_arguments(call: Any, error: Any, message: str) -> None:
    stream = fused_rnn.freeze(nn.LSTM(3, 20)).stream()
    with pytest.raises(error, match=message):
        call(stream)
    assert stream(torch.randn(3)).isfinite().all()


def test_out_must_not_overlap() -> None:
    stream = fused_rnn.freeze(nn.GRU(8, 8)).stream()
    x = torch.randn(12)
    with pytest.raises(RuntimeError, match="must not overlap"):
        stream(x[:8], out=x[4:])


def test_wrong_streams() -> None:
    with pytest.raises(RuntimeError, match="bidirectional model has no streams"):
        fused_rnn.freeze(nn.GRU(I, H, bidirectional=True)).stream()
    for numbers, message in (
        ({"batch": 0}, "expected batch to be between 1 and 2147483647, got 0"),
        ({"batch": 2**31}, "expected batch to be between 1 and 2147483647, got 2147483648"),
        ({"threads": 0}, "expected threads to be between 1 and 1024, got 0"),
        ({"threads": 1025}, "expected threads to be between 1 and 1024, got 1025"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fused_rnn.freeze(nn.GRU(I, H)).stream(**numbers)
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        fused_rnn.freeze(nn.GRU(I, H)).stream(1.5)  # type: ignore[arg-type]
    for module, kind in ((nn.GRU(I, H), "GRU"), (3, "int")):
        with pytest.raises(TypeError, match=f"Stream: expected module to be a FrozenRNN or FrozenCell, got {kind}"):
            fused_rnn.Stream(module)


@pytest.mark.parametrize("weights", FORMATS)
def test_a_stream_follows_its_module(weights: str) -> None:
    """After load_state_dict it goes on from its state with the new weights."""
    first, second = (fused_rnn.freeze(nn.LSTM(I, H, 2), weights) for _ in range(2))
    x = torch.randn(T, 3, I)
    stream = first.stream(3)
    stream.chunk(x[:10])
    state = stream.state
    first.load_state_dict(second.state_dict())
    assert_equal(stream.state, state)
    y, after = second(x[10:], state)
    assert_equal(stream.chunk(x[10:]), y)
    assert_equal(stream.state, after)
    with pytest.raises(RuntimeError, match="Missing key"):
        first.load_state_dict({})
    stream.state = state
    assert_equal(stream.chunk(x[10:]), y)


def test_negated_views() -> None:
    stream = fused_rnn.freeze(nn.GRU(1, 1)).stream()
    negated = torch.ones(1, dtype=torch.complex64).mul(1j).conj().imag
    assert negated.is_neg()
    for x, out in ((negated, torch.empty(1)), (torch.ones(1), negated)):
        with pytest.raises(RuntimeError, match=r"must not be a negated view: call resolve_neg\(\)"):
            stream(x, out=out)
    stream.state = negated.view(1, 1, 1)
    assert_equal(stream.state, torch.full((1, 1, 1), -1.0))
    wide = fused_rnn.freeze(nn.GRU(I, H)).stream()
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        wide(torch.randn(I, dtype=torch.complex64).conj().imag)
    with pytest.raises(RuntimeError, match="x must be float32"):
        wide(torch.randn(I, dtype=torch.complex64).conj())


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_have_a_state_of_their_own(way: str) -> None:
    stream = fused_rnn.freeze(nn.GRU(I, H), "int8").stream(2)
    x = torch.randn(T, 2, I)
    stream.chunk(x)
    other = copy.deepcopy(stream) if way == "deepcopy" else pickle.loads(pickle.dumps(stream))
    y = stream.chunk(x)
    assert_equal(other.chunk(x), y)


def test_threads_have_streams_of_their_own() -> None:
    frozen, x = fused_rnn.freeze(nn.LSTM(64, 256), "int8"), torch.randn(40, 1, 64)
    expected = frozen.stream().chunk(x)

    def agrees(stream: fused_rnn.Stream) -> bool:
        return all(torch.equal(stream.chunk(x), expected) for _ in range(20) if stream.reset() is None)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(agrees, [frozen.stream() for _ in range(4)]))


def test_two_threads_of_a_step() -> None:
    frozen, x = fused_rnn.freeze(nn.LSTM(64, 320)), torch.randn(10, 1, 64)
    assert_equal(frozen.stream(threads=2).chunk(x), frozen.stream().chunk(x))


# From C


def compiled(source: Path, program: Path, *options: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc)")
    command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", source, f"-I{fused_rnn.INCLUDE}"]
    succeeded(run(*command, *installed_kernels(), "-o", program, *options))
    return program


@pytest.mark.slow("compiles C")
@pytest.mark.parametrize("weights", FORMATS)
def test_the_example_in_c(weights: str, tmp_path: Path) -> None:
    """Bit for bit what Python computes, in a process that has loaded neither Python nor torch."""
    frozen = fused_rnn.freeze(nn.LSTM(I, H, 2, proj_size=5), weights)
    frozen.save(tmp_path / "model.frnn")
    x = torch.randn(T, 1, I)
    x.numpy().tofile(tmp_path / "x")
    program = compiled(EXAMPLE, tmp_path / "stream")
    assert succeeded(run(program, "model.frnn", "x", "y", cwd=tmp_path)).startswith(f"{T} steps, ")
    assert_equal(torch.from_numpy(numpy.fromfile(tmp_path / "y", numpy.float32)).view(T, 1, 5), frozen(x)[0])
    needed = succeeded(run("ldd", program))
    assert "_stream.so" in needed and "libtorch" not in needed and "libpython" not in needed
    for damaged in (b"", (tmp_path / "model.frnn").read_bytes()[:-8]):
        (tmp_path / "damaged").write_bytes(damaged)
        done = run(program, "damaged", "x", "y", cwd=tmp_path)
        assert done.returncode == 1 and "the frozen model" in done.stderr


@pytest.mark.slow("compiles C")
@pytest.mark.parametrize("weights", FORMATS)
def test_a_step_allocates_nothing_takes_no_lock_and_makes_no_system_call(weights: str, tmp_path: Path) -> None:
    fused_rnn.freeze(nn.LSTM(64, 64, 2), weights).save(tmp_path / "model.frnn")
    program = compiled(Path(__file__).with_name("stream_check.c"), tmp_path / "check", "-ldl")
    done = run(program, "model.frnn", "10000", cwd=tmp_path)
    if done.returncode == 3:
        pytest.skip("this system forbids seccomp")
    assert (done.returncode, done.stdout) == (0, "nothing\n"), done.stderr


def test_the_header_is_in_the_package() -> None:
    assert (Path(fused_rnn.INCLUDE) / "fused_rnn" / "stream.h").is_file()


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    stream = fused_rnn.freeze(nn.LSTM(3, 5)).stream()
    with pytest.raises(RuntimeError, match="expected c of shape"):
        stream.state = torch.ones(1, 1, 5), torch.ones(1, 1, 4)
    assert not stream.state[0].any()


def test_memory_that_was_taken_away() -> None:
    stream, x = fused_rnn.freeze(nn.GRU(3, 5)).stream(), torch.ones(3)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="x has no storage"):
        stream(x)


def test_autograd_sees_that_out_was_written_to() -> None:
    stream, out, w = fused_rnn.freeze(nn.GRU(3, 5)).stream(), torch.zeros(5), torch.ones(5, requires_grad=True)
    with torch.enable_grad():
        loss = (w * out).sum()
        stream(torch.ones(3), out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


WITHOUT_NUMPY = """
import sys
sys.modules["numpy"] = None
import torch, fused_rnn
frozen = fused_rnn.freeze(torch.nn.LSTM(3, 5))
stream, x = frozen.stream(batch=2), torch.randn(4, 2, 3)
steps = torch.stack([stream(x_t) for x_t in x])
stream.reset([True, False])
frozen.save(sys.argv[1])
h, c = stream.state
print(torch.equal(steps, fused_rnn.load_frozen(sys.argv[1])(x)[0].detach()), h[0, 0].any().item(), h[0, 1].any().item())
"""


def test_without_numpy(tmp_path: Path) -> None:
    """Neither torch nor this package requires it."""
    done = python("-W", "ignore", "-c", WITHOUT_NUMPY, tmp_path / "model.frnn", cwd=tmp_path)
    assert succeeded(done) == "True False True\n"
    assert (tmp_path / "model.frnn").stat().st_size > 0


def test_weights_elsewhere() -> None:
    frozen = fused_rnn.freeze(nn.GRU(3, 5)).to("meta")
    with pytest.raises(RuntimeError, match="frozen modules run on the CPU, got weights on meta"):
        frozen.stream()
