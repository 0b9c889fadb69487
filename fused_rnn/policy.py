"""Who computes a call, and why: the kernels, torch.nn, or the specification.

Modules, cells and `fused_rnn.plan` ask `choose` wherever torch.nn could compute the call as well, except for plain
float32, float64 and float16 calls on a CPU, which the kernels run unless the user's table (`fused_rnn.tuned`) may say
something else. They take plain tensors of one dtype on one device, while nothing but a compiler observes or rewrites
torch's operations (`fusible`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from fused_rnn import _C, cuda, self_check, tuned
from fused_rnn.options import NO_OPTIONS, PLANNED, LayerOptions

BACKENDS = ("auto", "fused", "torch")
PLAIN_TYPES = (Tensor, torch.nn.Parameter)  # subclasses may mean something else by any operation
FAKE_TYPES = (FakeTensor, FunctionalTensor)  # the types of plain tensors while a compiler traces
COMPILERS_TYPES = (*PLAIN_TYPES, *FAKE_TYPES)
DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in _C.dtypes())
KERNEL_DTYPES = DTYPES[:2]  # float32 and float64; on the CPU the others are widened
ALWAYS_FUSED = (*KERNEL_DTYPES, torch.float16)  # for bfloat16 it depends on sizes and on the processor
CASTABLE = (torch.float32, torch.bfloat16, torch.float16)  # by autocast
HAS_BF16_PRODUCTS = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
CPU = torch.device("cpu")
Kind = Literal["sequence", "packed", "step", "cell"]
HIGHEST, HIGH, MEDIUM = range(3)  # of the CPU's products of float32: cpu::Precision in csrc/cpu/dispatch.h
deterministic = torch.are_deterministic_algorithms_enabled
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Choice(NamedTuple):
    """Whether the kernels compute a call of ours (else torch.nn does), and why.

    Attributes:
        source: "tuned" if the user's table says so, "shipped" if the rules of this package do.
        instance: of the kernels (`fused_rnn.options`).
    """

    fused: bool
    reason: str
    source: str = "shipped"
    instance: int = PLANNED

    def options(self, batch_sizes: Tensor | None = None) -> LayerOptions:
        """The options of torch.nn's layers on the chosen kernels."""
        if batch_sizes is None and self.instance == PLANNED:
            return NO_OPTIONS
        return LayerOptions(batch_sizes, instance=self.instance)


def check_backend(backend: Any) -> None:
    """Refuse what no module can have as its backend.

    Raises:
        ValueError: it is none of `BACKENDS`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")


def choose(
    cell: str,
    dtype: torch.dtype,
    T: int,
    B: int,
    I: int,  # noqa: E741 - the field's letter
    H: int,
    *,
    kind: Kind = "sequence",
    num_layers: int = 1,
    directions: int = 1,
    proj_size: int = 0,
    steps: int = 1,
    backend: str = "auto",
    differentiable: bool = False,
    half: torch.dtype | None = None,
    on_gpu: bool = False,
    device: torch.device = CPU,
    properties: cuda.Properties | None = None,
    may_measure: bool = True,
) -> Choice:
    """Choose between the kernels and torch.nn for a call that both can compute.

    Args:
        cell: one of `fused_rnn.reference.CELLS`.
        dtype: of the tensors.
        T, B, I, H: time steps, rows, input and hidden size. A packed sequence counts as one row of all its steps.
        kind: "sequence", "packed", "step" for `step`, "cell" for a cell's forward.
        num_layers, directions, proj_size: of the module.
        steps: the time steps of a packed sequence.
        backend: of the module: "auto", "fused" or "torch".
        differentiable: whether the call records a gradient.
        half: autocast's dtype, or None outside of autocast.
        on_gpu: whether the device is a CUDA device.
        device: of the tensors.
        properties: of a CUDA device that is not in this machine; None means `device`'s own.
        may_measure: whether a call that the user's table does not have may be measured, where the user wants that.

    The rules for the CPU were measured (benchmarks/NOTES.md). Those for CUDA are in `fused_rnn.cuda`.
    """
    if backend == "torch":
        return Choice(False, "backend is 'torch'")
    if on_gpu and (proj_size or kind == "cell"):
        return Choice(False, "the CUDA kernels have no projections and no cells")
    if on_gpu and T * B * I == 0:
        return Choice(False, "the input is empty")
    if backend == "fused":
        refused = self_check.why_not(device) if on_gpu and properties is None else None
        return Choice(refused is None, refused or "backend is 'fused'")
    if torch.compiler.is_compiling():  # sizes may be symbols, which a comparison would guard
        return Choice(not on_gpu, "in a compiled graph the device decides")
    if properties is None and (tuned.table.asked or (on_gpu and tuned.table.measures(device))):
        # A plain step of a module on a CPU never asks; another is a sequence of one step.
        step_asks = on_gpu or half is not None or dtype not in ALWAYS_FUSED
        if kind != "step" or step_asks:
            size = (steps, T // max(1, steps) or 1) if kind == "packed" else (T, B)
            wide = dtype is torch.float32 and half is None
            call = tuned.Call(
                cell, dtype, half, *size, I, H, proj_size, num_layers, directions,
                "sequence" if kind == "step" else kind, differentiable,
                0 if not wide else int(cuda.tf32_allowed()) if on_gpu else precision(FLOAT32, size[0] == 1),
            )  # fmt: skip
            choice = tuned_choice(call, device, may_measure)
            if choice is not None:
                return choice
    if on_gpu:
        is_here = properties is None
        properties = cuda.device_properties(device) if properties is None else properties
        packed = kind == "packed"
        reason = cuda.why_cudnn(cell, half or dtype, T, B, I, H, num_layers, directions, properties, packed)
        if reason is None and is_here:
            reason = self_check.why_not(device)
        return Choice(reason is None, reason or "the weights stay on the chip")
    if deterministic():
        return Choice(True, "deterministic: a row's result does not depend on its batch")
    if kind == "cell" and differentiable and half is None and tuned.torch_trains(cell, dtype, B, H):
        return Choice(False, "the autograd nodes of torch's function for an RNN's cell cost less than ours")
    if (half or dtype) is not torch.bfloat16 or not HAS_BF16_PRODUCTS or (cell == "lstm" and lacks_threads()):
        return Choice(True, "measured to be at least as fast")
    if _torch_is_faster(cell, T, B, H, kind, differentiable, half):
        return Choice(False, "this processor multiplies bfloat16 fast")
    return Choice(True, "measured to be at least as fast")


def _torch_is_faster(
    cell: str, T: int, B: int, H: int, kind: Kind, differentiable: bool, half: torch.dtype | None
) -> bool:
    """Whether torch.nn is faster in bfloat16, on a processor that multiplies it at twice the speed of float32 or more.

    The kernels use those instructions, too, unless FUSED_RNN_CPU_ISA makes them widen bfloat16 to float32.
    """
    unit = bf16_unit()
    if half is not None and T == 1:
        return differentiable and B * H**2 >= 2**21
    alone = cell == "lstm" and kind != "cell" and torch.get_num_threads() == 1  # oneDNN's can be a third faster then
    if unit == "amx":
        return alone and B >= 16 and H % 32 == 0 and (8 if differentiable else 16) * B >= H
    if unit == "avx512_bf16":
        return alone and B >= 3 and T * B * H >= 2**14 and not (differentiable and H >= 256)
    if unit:
        return False
    if half is None:
        # torch.nn's LSTM gains from that unless it runs row by row, its RNN and GRU where their products are large.
        return kind != "cell" and (B >= 3 if cell == "lstm" else B >= 8 and H >= 384)
    if cell == "lstm":
        return T * B * H >= 8192 and (B >= 3 or not differentiable)
    return B * H**2 >= 3 * 2**20


def tuned_choice(call: tuned.Call, device: torch.device, may_measure: bool = True) -> Choice | None:
    """What the user's table says of a call; None if it says nothing, or nothing that holds for this call."""
    if deterministic() or call.T * call.B * call.I * call.H == 0:
        return None
    result = tuned.ask(call, device, may_measure)
    if result is None:
        return None
    fused, instance = result.backend == "fused", result.instance
    if device.type == "cpu":
        sets = tuned.instruction_sets()
        if (result.instruction_set not in sets) if fused else (call.cell == "lstm" and lacks_threads()):
            return None
        instance = sets[result.instruction_set] if fused else PLANNED
    elif fused and (self_check.why_not(device) or not _has_kernel(call, result, device)):
        return None
    return Choice(fused, "fused_rnn.tune measured it on this machine", "tuned", instance)


def _has_kernel(call: tuned.Call, result: tuned.Result, device: torch.device) -> bool:
    """Whether the table's kernel is there: another build may have numbered them in another way."""
    if result.instance < 0:
        return True
    dtype, properties = call.autocast or call.dtype, cuda.device_properties(device)
    plans = cuda.plans(call.cell, dtype, call.B, call.H, call.directions, False, properties)
    return result.instance in {plan["instance"] for plan in plans}


def tuned_plain(
    cell: str,
    x: Tensor,
    T: int,
    B: int,
    H: int,
    proj_size: int,
    num_layers: int,
    directions: int,
    tensors: Sequence[Tensor | None],
    *,
    kind: Kind = "sequence",
    may_measure: bool = True,
) -> Choice | None:
    """`tuned_choice` of a call outside of autocast, on a CPU, with x and these tensors."""
    train = torch.is_grad_enabled() and any_requires_grad((x, *tensors))
    sizes = T, B, x.size(-1), H, proj_size, num_layers, directions
    return tuned_choice(tuned.Call(cell, x.dtype, None, *sizes, kind, train, precision(x, T == 1)), CPU, may_measure)


def tuned_cell(
    cell: str, x: Any, H: int, h0: Any, c0: Any, weights: Sequence[Any], may_measure: bool = True
) -> Choice | None:
    """`tuned_plain` of a cell's call with any arguments, if the table may say something of its hidden size."""
    if H not in tuned.table.cell_hidden_sizes or not plain_call(2, x, h0, c0, weights):
        return None
    sizes = 1, x.size(0), H, 0, 1, 1
    return tuned_plain(cell, x, *sizes, (h0, c0, *weights), kind="cell", may_measure=may_measure)


@cache
def bf16_unit() -> str:
    """The CPU kernels' instructions for products of bfloat16: the name of an instruction set, or "" without any."""
    return str(_C.cpu_bf16_unit())


def precision(x: Tensor, single_step: bool = False) -> int:
    """How accurately torch's switches want float32 multiplied, if the kernels have a choice for such an input.

    They have none in a single step: splitting its weights takes longer than multiplying by them.

    torch's own switch for recurrent layers on oneDNN counts, ``torch.backends.mkldnn.rnn.fp32_precision``, and where it
    says nothing that for products, which ``torch.set_float32_matmul_precision`` sets, too.
    """
    if single_step or x.dtype is not torch.float32 or not x.is_cpu or not bf16_unit():
        return HIGHEST
    # What the switch's property asks, at a tenth of its time.
    own = torch._C._get_fp32_precision_getter("mkldnn", "rnn")
    if own == "none":
        own = torch._C._get_fp32_precision_getter("mkldnn", "matmul")
    return _PRECISIONS.get(own, HIGHEST)


_PRECISIONS = {"tf32": HIGH, "bf16": MEDIUM}
FLOAT32 = torch.empty(0, dtype=torch.float32, device=CPU)  # whatever torch's defaults are


def autocast_precision(half: torch.dtype | None) -> int:
    """The precision of a call's products under autocast to `half`."""
    if half is not torch.bfloat16:
        return HIGHEST
    return MEDIUM if torch.compiler.is_compiling() or bf16_unit() else HIGHEST  # a graph may run on another processor


def layer_precision(dtype: torch.dtype, half: torch.dtype | None, single_step: bool) -> int:
    """The precision of all products of a layer on a CPU: of tensors of `dtype`, under autocast to `half`, now."""
    if dtype is torch.bfloat16:
        return MEDIUM
    if half is not None or dtype is not torch.float32:
        return autocast_precision(half)
    return precision(FLOAT32, single_step)


def torch_trains_cell(cell: str, x: Any, h0: Tensor, weights: Sequence[Tensor | None]) -> bool:
    """Whether torch's function computes a cell's call that nothing observes, with h0 ``[B, H]`` and these weights."""
    if not (torch.is_grad_enabled() and tuned.torch_trains(cell, x.dtype, *h0.shape)):
        return False
    return any_requires_grad((x, h0, *weights)) and not deterministic()


def lacks_threads() -> bool:
    """Whether OpenMP may give fewer threads than torch asks for: OMP_DYNAMIC, OMP_THREAD_LIMIT, OMP_MAX_ACTIVE_LEVELS.

    oneDNN's LSTM, on which torch.nn.LSTM runs, then leaves out a part of the work, and returns wrong numbers without an
    error. The kernels share the work among the threads that they get.
    """
    return torch.get_num_threads() > _C.openmp_threads()


def plain(tensor: Any, dim: int) -> bool:
    """Whether `tensor` is a CPU tensor of `dim` dimensions, and of none of torch.Tensor's subclasses."""
    return type(tensor) in PLAIN_TYPES and tensor.dim() == dim and tensor.is_cpu


def plain_call(dim: int, x: Any, h0: Any, c0: Any, weights: Sequence[Any]) -> bool:
    """Whether the operators check all that is left to check, and compute it.

    True for CPU tensors, x and states of `dim` dimensions, if nothing observes torch's operations. `h0`, `c0` and all
    weights but the first two may be None.
    """
    for t in (x, h0, c0, *weights):
        if t is not None and (type(t) not in PLAIN_TYPES or not t.is_cpu):
            return False
    if x is None or x.dim() != dim or x.dtype not in DTYPES or weights[0] is None or weights[1] is None:
        return False
    for state in (h0, c0):  # torch.nn takes some of another dtype or layout
        if state is not None and (
            state.dim() != dim or state.dtype is not x.dtype or state.layout is not torch.strided
        ):
            return False
    return not (torch.is_autocast_enabled("cpu") or watched())


def any_requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd records what is computed from `tensors`, if it is recording."""
    for t in tensors:  # noqa: SIM110 - several times faster than any()
        if t is not None and t.requires_grad:
            return True
    return False


def on_cuda(x: Tensor) -> bool:
    """Whether the CUDA operators compute with such tensors."""
    return x.is_cuda


def kernels_work(x: Tensor) -> bool:
    """Whether the kernels of x's device are right; a GPU's are checked before their first use."""
    return x.is_cpu or self_check.why_not(x.device) is None


def fusible(x: Any, *others: Any, castable: bool = False) -> bool:
    """Whether the kernels can compute with these tensors; None counts as absent.

    Args:
        castable: whether the dtypes may differ, because autocast casts them.
    """
    compiling = torch.compiler.is_compiling()
    types = COMPILERS_TYPES if compiling else PLAIN_TYPES
    if type(x) not in types or (transformed() if compiling else watched()):
        return False
    dtype, is_cpu = x.dtype, x.is_cpu
    if dtype not in DTYPES or x.is_nested or not (is_cpu or (x.is_cuda and cuda.available())):
        return False
    for t in (x, *others):
        if t is not None and (
            type(t) not in types
            or (t.dtype is not dtype and not (castable and t.dtype in CASTABLE))
            or not (t.is_cpu if is_cpu else t.device == x.device)  # comparing devices takes three times as long
            or t.layout is not torch.strided
        ):
            return False
    return True


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on `device`, or None outside of autocast."""
    kind = device.type
    if (kind != "cpu" and not torch.amp.is_autocast_available(kind)) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def watched() -> bool:
    """Whether a compiler, a tracer, a mode or a functorch transform looks at torch's operations."""
    return (
        torch.compiler.is_compiling()
        or _C.watched()
        or (torch._C._len_torch_function_stack() > 0 and _function_mode_matters())
    )


def transformed() -> bool:
    """Whether a functorch transform or a forward-mode derivative rewrites torch's operations."""
    # Every torch's compiler can trace this question, 2.10's not the one for the transforms' depth.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _function_mode_matters() -> bool:
    # torch.set_default_device and `with torch.device(...)` are modes, too, but only steer factories.
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def torch_has_rule(packed: bool = False) -> bool:
    """Whether torch.nn computes under the functorch transforms and forward-mode derivatives in force.

    It has no rule for packed sequences in any functorch transform, none for vmap in RNN, LSTM, GRU and LSTMCell, and in
    forward mode none for a float32 LSTM and for batched tangents.
    """
    if not transformed() or torch.compiler.is_compiling():  # a graph holds what torch.nn does
        return True
    if packed:
        return False
    transforms = torch._C._functorch.TransformType
    levels = [level.key() for level in torch._C._functorch.get_interpreter_stack() or []]
    return forward_ad._current_level < 0 and transforms.Vmap not in levels and transforms.Jvp not in levels


def runs_eagerly(function: _Function) -> _Function:
    """Keeps torch.compile from compiling `function` on its own when an eager frame calls it.

    So torch.nn's modules behave, whose files are on the compiler's list of skipped ones: the graph breaks at the
    module, and the module runs as it is. A frame that is being compiled can still inline the function. What a user can
    hand to torch.compile, `forward` and `step`, is not marked, but all that it calls is.
    """
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return function
