"""Types of the extension's functions; csrc/bindings/module.cpp says what they do."""

from typing import Any, TypedDict

class BuildInfo(TypedDict):
    torch: str
    compiler: str
    openmp: int

class CellInfo(TypedDict):
    """A cell's constants; csrc/cells/cell_info.h says what each is."""

    name: str
    gates: int
    saved: int
    grads: int
    input_shift: int
    hidden_grads: int
    has_c: bool
    uses_h: bool
    saves_h: bool

class FrozenModel:
    """A frozen model with its packed weights, which live as long as this object; csrc/cpu/frozen_model.h."""

class Stream:
    """A stream of a frozen model, whose bytes are a buffer; csrc/bindings/stream.cpp."""

    def __init__(self, model: Any, batch: int, threads: int, /) -> None: ...
    def run(self, x: Any, out: Any, chunk: bool, /) -> None: ...
    def reset(self, rows: bytes | None, /) -> None: ...
    def get_state(self, h: Any, c: Any, /) -> None: ...
    def set_state(self, h: Any, c: Any, /) -> None: ...

NORM_EPS: float

# The CPU's operators without torch's dispatcher; csrc/bindings/cpu_operators.h.
def forward(*arguments: Any) -> Any: ...
def backward(*arguments: Any) -> Any: ...
def step(*arguments: Any) -> Any: ...
def stack(*arguments: Any) -> Any: ...
def in_place(parameters: dict[str, Any], names: list[str], weights: list[Any], /) -> bool: ...
def frozen_checksum(model: Any, /) -> int: ...
def frozen_model(model: Any, /) -> FrozenModel: ...
def cpu_isa() -> str: ...
def supported_cpu_isas() -> list[str]: ...
def build_info() -> BuildInfo: ...
def cells() -> list[CellInfo]: ...
def dtypes() -> list[str]: ...
def openmp_threads() -> int: ...
def cpu_bf16_unit() -> str: ...
def cpu_plan(
    cell: int,
    T: int,
    B: int,
    I: int,
    H: int,
    P: int,
    directions: int,
    threads: int,
    is_double: bool,
    precision: int,
    deterministic: bool,
    weights: int = 0,
    instance: int = -1,
) -> dict[str, Any]: ...
def cuda_plans(
    cell: int,
    element_bytes: int,
    batch: int,
    hidden_size: int,
    directions: int,
    backward: bool,
    sms: int,
    shared_bytes: int,
    capability: int,
    /,
) -> list[dict[str, Any]]: ...
def tile_product(isa: str, sums: Any, a: Any, b: Any, /) -> bytes: ...
def digit_product(isa: str, a: Any, b: Any, planes: int, products: int, rows: int, /) -> bytes: ...
def map_function(function: str, isa: str, values: Any, /) -> bytearray: ...
