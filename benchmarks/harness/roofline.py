"""The roofline: a lower bound on the time of a row on this machine, for any implementation.

Two things bound a recurrent layer. Its products cannot run faster than a large matrix product does.
And every time step needs all of W_hh, which depends on the step before it and so cannot be merged
into one product: with a narrow batch, most time is spent on bringing the weights from the caches to the
cores. The floor of a row is the time of the merged products plus, for the steps, the larger of these two
times. Activations, element-wise functions and the cost of a call are not included, so it is a
bound, not a prediction.

Both rates are measured: clock rates, cores and caches differ from the data sheet. The bandwidth is
measured with torch's own operations, a little below the hardware's; and weights that fit a core's innermost
cache can be read faster, so a row may come out above 100 %.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

from harness.measurement import Row
from harness.shapes import Shape
from harness.workload import GATES, dtype_of

MATRIX = 1024  # rows and columns of the matrix product
MIB = 2**20
SMALL, LARGE = 1 * MIB, 16 * MIB  # bytes of weights that fit a core's own cache, and the shared cache
BETWEEN = 4 * MIB  # the geometric mean of the two


@dataclass(frozen=True)
class Ceilings:
    """The machine's rates with a number of threads.

    Attributes:
        flops: operations per second of a large matrix product in the run's dtype.
        small_bandwidth: bytes per second for repeated reading of 1 MiB per thread.
        large_bandwidth: the same for 16 MiB in all.
    """

    flops: float
    small_bandwidth: float
    large_bandwidth: float

    def __str__(self) -> str:
        return (
            f"matrix product {self.flops / 1e9:.0f} GFLOP/s, "
            f"reading from own caches {self.small_bandwidth / 1e9:.0f} GB/s, from the shared one "
            f"{self.large_bandwidth / 1e9:.0f} GB/s"
        )


def measure_ceilings(dtype: torch.dtype, threads: int, seconds: float) -> Ceilings:
    """Measure with this many threads, about `seconds` for each rate; sets torch's number of threads.

    1 MiB is read by one thread, and the rate is multiplied by the number of threads: every core has its own
    cache, and starting the threads would take longer than the reading.
    """
    torch.set_num_threads(1)
    of_one_core = read_bandwidth(SMALL, seconds)
    torch.set_num_threads(threads)
    large = read_bandwidth(LARGE, seconds)
    a, b = torch.randn(2, MATRIX, MATRIX).to(dtype)
    product = torch.empty_like(a)
    flops = 2 * MATRIX**3 / least_seconds(lambda: torch.mm(a, b, out=product), seconds)
    # The cost of a call lowers the rate of 1 MiB more than that of 16; a core's own cache is at least as fast.
    return Ceilings(flops, max(threads * of_one_core, large), large)


def read_bandwidth(size: int, seconds: float) -> float:
    """Bytes per second for `size` bytes of float32, by the quicker of a matrix-vector product and a sum."""
    columns = 512
    matrix = torch.randn(size // (4 * columns), columns)
    vector, product = torch.randn(columns), torch.empty(matrix.size(0))
    by_product = least_seconds(lambda: torch.mv(matrix, vector, out=product), seconds / 2)
    by_sum = least_seconds(matrix.sum, seconds / 2)
    return size / min(by_product, by_sum)


def least_seconds(call: Callable[[], object], budget: float) -> float:
    """The time of the quickest of two or more calls, which was not interrupted."""
    least = float("inf")
    began = perf_counter()
    calls = 0
    while calls < 2 or perf_counter() - began < budget:
        start = perf_counter()
        call()
        least = min(least, perf_counter() - start)
        calls += 1
    return least


@dataclass(frozen=True)
class Work:
    """The minimum work of one call of a row; see `work`.

    Attributes:
        merged: operations (multiplications and additions) of the products over all time steps at once.
        stepwise: operations of the products that each wait for the step before.
        streamed: bytes of weights that the stepwise products read.
    """

    merged: int
    stepwise: int
    streamed: int


def work(row: Row) -> Work:
    """The products with W_ih and W_hh: of forward, and in training of backward.

    A sequence multiplies all of x by W_ih at once; a loop over a cell cannot. Backward has two products
    of the same size for each one of forward: for the gradient of the factor of the weights, and for the
    gradient of the weights, which again is one product over all steps. Unneeded products are not counted:
    those with zero states, and those for the gradients of x and of the given state.
    """
    shape, training = row.shape, row.mode == "training"
    itemsize = dtype_of(row).itemsize
    merged = stepwise = streamed = 0
    for layer, input_size in layers(shape):
        rows = GATES[row.cell] * shape.H  # rows of both weights
        of_x, of_h = 2 * shape.B * rows * input_size, 2 * shape.B * rows * shape.H  # operations of a step
        steps = recurrent_steps(row) + (shape.T - 1 if training else 0)
        stepwise += steps * of_h
        streamed += steps * rows * shape.H * itemsize
        passes = 1 + (layer > 0 if training else 0)  # over x: forward, and the gradient for the layer below
        if row.call == "module":
            merged += passes * shape.T * of_x
        else:
            stepwise += passes * shape.T * of_x
            streamed += passes * shape.T * rows * input_size * itemsize
        if training:
            merged += shape.T * of_x + recurrent_steps(row) * of_h
    return Work(merged, stepwise, streamed)


def layers(shape: Shape) -> list[tuple[int, int]]:
    """(index, input size) of every layer, and of every direction of it."""
    sizes = [shape.I] + [shape.directions * shape.H] * (shape.L - 1)
    return [layer for layer in enumerate(sizes) for _ in range(shape.directions)]


def recurrent_steps(row: Row) -> int:
    """The number of steps with a product with W_hh: the first step has one only if the state is given."""
    return row.shape.T if row.given_state else row.shape.T - 1


def floor_seconds(row: Row, ceilings: Ceilings) -> float:
    """The least time for one call of the row, in seconds."""
    needed = work(row)
    weights = GATES[row.cell] * row.shape.H**2 * dtype_of(row).itemsize  # bytes of W_hh, which every step reads
    bandwidth = ceilings.small_bandwidth if weights <= BETWEEN else ceilings.large_bandwidth
    return needed.merged / ceilings.flops + max(needed.stepwise / ceilings.flops, needed.streamed / bandwidth)
