"""The roofline: a lower bound on the time of a row on this machine, for any implementation.

Two things bound a recurrent layer. Its products cannot run faster than a large matrix product does. And every time
step needs all of W_hh, which depends on the step before it: the weights come from the caches to the cores once per
step, however narrow the batch is. The floor of a row is the larger of the two times. Activations, element-wise
functions and the cost of a call are not included, so it is a bound, not a prediction.

The rates are measured: clock rates, cores and caches differ from the data sheet. The bandwidths are measured with
torch's own operations, a little below the hardware's; and weights that fit a core's innermost cache can be read faster,
so a row may come out above 100 %.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from time import perf_counter

import torch

from harness.measurement import Floor, Row
from harness.shapes import Shape
from harness.workload import GATES, dtype_of

MATRIX = 1024  # rows and columns of the matrix product
MIB = 2**20
OWN, SHARED, MEMORY = 1 * MIB, 16 * MIB, 256 * MIB  # bytes that are read, of a size of each level


@dataclass(frozen=True)
class Ceilings:
    """The machine's rates with a number of threads.

    Attributes:
        flops: operations per second of a large matrix product in the run's dtype.
        own_caches: bytes per second for repeated reading of 1 MiB per thread.
        shared_cache, memory: the same for 16 and 256 MiB in all.
    """

    flops: float
    own_caches: float
    shared_cache: float
    memory: float

    def bandwidth(self, size: int) -> float:
        """Bytes per second for repeated reading of `size` bytes; the levels part at the geometric means of sizes."""
        if size**2 <= prod((OWN, SHARED)):
            return self.own_caches
        return self.shared_cache if size**2 <= prod((SHARED, MEMORY)) else self.memory

    def __str__(self) -> str:
        return (
            f"matrix product {self.flops / 1e9:.0f} GFLOP/s, reading from own caches {self.own_caches / 1e9:.0f} GB/s, "
            f"from the shared one {self.shared_cache / 1e9:.0f}, from memory {self.memory / 1e9:.0f}"
        )


def measure_ceilings(dtype: torch.dtype, threads: int, seconds: float) -> Ceilings:
    """Measure with this many threads, about `seconds` for each rate; sets torch's number of threads.

    1 MiB is read by one thread, and the rate is multiplied by the number of threads: every core has its own
    cache, and starting the threads would take longer than the reading.
    """
    torch.set_num_threads(1)
    one_core = read_bandwidth(OWN, seconds)
    torch.set_num_threads(threads)
    memory, shared_cache = read_bandwidth(MEMORY, seconds), read_bandwidth(SHARED, seconds)
    a, b = torch.randn(2, MATRIX, MATRIX).to(dtype)
    product = torch.empty_like(a)
    flops = 2 * MATRIX**3 / least_seconds(lambda: torch.mm(a, b, out=product), seconds)
    # The cost of a call lowers the rate of 1 MiB more than that of 16; an inner cache is at least as fast.
    shared_cache = max(shared_cache, memory)
    return Ceilings(flops, max(threads * one_core, shared_cache), shared_cache, memory)


def read_bandwidth(size: int, seconds: float) -> float:
    """Bytes per second for `size` bytes of float32, by the quicker of a matrix-vector product and a sum."""
    columns = 512
    matrix = torch.ones(size // (4 * columns), columns)
    vector, product = torch.ones(columns), torch.empty(matrix.size(0))
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


def floor(row: Row, ceilings: Ceilings) -> Floor:
    """The least work of one call of the row, and the machine's rates for it."""
    weights = GATES[row.cell] * row.shape.H**2 * dtype_of(row).itemsize  # bytes of W_hh, which every step reads
    return Floor(operations(row), streamed_bytes(row), ceilings.flops, ceilings.bandwidth(weights))


def operations(row: Row) -> int:
    """Multiplications and additions of the products with W_ih and W_hh: of forward, and in training of backward.

    Backward has two products of the same size for each one of forward: for the gradient of the factor of the weights,
    and for the gradient of the weights. Unneeded products are not counted: those with zero states, and those for the
    gradients of x and of the given state.
    """
    shape, training = row.shape, row.mode == "training"
    total = 0
    for layer, input_size in layers(shape):
        step = 2 * shape.B * GATES[row.cell] * shape.H  # operations for one input of a step
        total += shape.T * step * input_size * (1 + training + (training and layer > 0))
        total += step * shape.H * (recurrent_steps(row) * (1 + training) + (shape.T - 1) * training)
    return total


def streamed_bytes(row: Row) -> int:
    """Bytes of weights that come from the caches: W_hh for every step, W_ih once, or for every step of a loop."""
    shape, training = row.shape, row.mode == "training"
    total = 0
    for layer, input_size in layers(shape):
        rows = GATES[row.cell] * shape.H * dtype_of(row).itemsize  # bytes of one column of the weights
        passes = 1 + (training and layer > 0)  # through W_ih: forward, and the gradient for the layer below
        total += rows * input_size * passes * (1 if row.call == "module" else shape.T)
        total += rows * shape.H * (recurrent_steps(row) + (shape.T - 1) * training)
    return total


def layers(shape: Shape) -> list[tuple[int, int]]:
    """(index, input size) of every layer, and of every direction of it."""
    sizes = [shape.I] + [shape.directions * shape.H] * (shape.L - 1)
    return [layer for layer in enumerate(sizes) for _ in range(shape.directions)]


def recurrent_steps(row: Row) -> int:
    """The number of steps with a product with W_hh: the first step has one only if the state is given."""
    return row.shape.T if row.given_state else row.shape.T - 1
