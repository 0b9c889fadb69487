"""Distributed training with torch's own tools on two gloo processes: DDP, FSDP, distributed checkpoints and torchrun.

Both processes are started once, with one thread each. Each writes its results of all jobs to a file, which the tests
compare with one process on the joint batch.
"""

import os
import re
import subprocess
import sys
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel

import fused_rnn
from contract import close, fused_calls, tensors
from processes import survives

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow("starts processes that train together")]

RANKS = 2
T, B, I, H = 5, 6, 4, 9  # noqa: E741 - B rows, split over the ranks
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
SHARDED = {
    f"{name}-{'reshard' if reshard else 'keep'}-{'bf16' if policy else 'f32'}": (name, reshard, policy)
    for name in NAMES
    for reshard in (True, False)
    for policy in (None, BF16)
}
WRAPPERS = {
    "ddp": DistributedDataParallel,
    "ddp_static_graph": lambda m: DistributedDataParallel(m, static_graph=True),
    "ddp_bucket_view": lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True),
    "fsdp1": lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu")),
    "fsdp1_orig_params": lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu"), use_orig_params=True),
    "fsdp2": lambda m: sharded(m),
}
LENGTHS = {"ragged": [5, 1, 3, 0, 5, 2], "one rank has nothing to do": [4, 5, 1, 0, 0, 0]}


class Model(nn.Module):
    """Layers and a cell, called as torch.nn's."""

    def __init__(self, library):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = library.LSTM(I, H, 2, bidirectional=True)
        self.gru = library.GRU(2 * H, H)
        self.cell = library.GRUCell(H, H)

    def forward(self, x):
        return self.cell(self.gru(self.lstm(x)[0])[0][-1])


class Ragged(nn.Module):
    """All three layers with resets and lengths."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = fused_rnn.LSTM(I, H, bidirectional=True)
        self.gru = fused_rnn.GRU(2 * H, H)
        self.rnn = fused_rnn.RNN(H, H)
        self.fresh = nn.Parameter(torch.randn(1, 1, H))

    def forward(self, x, resets, lengths):
        x, _ = self.lstm(x, resets=resets, lengths=lengths)
        x, _ = self.gru(x, resets=resets, reset_state=self.fresh, lengths=lengths)
        return self.rnn(x, lengths=lengths)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def of_rank(rows, rank, dim=0):
    return rows if rank is None else rows.chunk(RANKS, dim)[rank]


def trained(model, rank=None):
    """The model's output for one rank's rows, or for all, after three training steps on them."""
    x = of_rank(draw(T, B, I), rank, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model(x).detach()


def ragged_gradients(model, lengths, rank=None):
    """Gradients after two backward passes, on one rank's rows or on all."""
    x, resets = draw(T, B, I), draw(T, B) > 0.8
    for _ in range(2):
        for p in model.parameters():
            p.grad = None
        arguments = of_rank(x, rank, 1), of_rank(resets, rank, 1), of_rank(torch.tensor(lengths), rank)
        output, h_n = model(*arguments)
        (output.square().sum(0).mean() + h_n.mean()).backward()
    return [p.grad.clone() for p in model.parameters()]


def build(library, name, **options):
    torch.manual_seed(0)
    return getattr(library, name)(I, H, **options)


def all_six(library):
    return nn.Sequential(OrderedDict((name, build(library, name)) for name in NAMES))


def sharded(module, **options):
    return fully_shard(module, mesh=init_device_mesh("cpu", (RANKS,)), **options)


def one_backward(module, rank=None, dtype=torch.float32):
    x = draw(B, I).to(dtype) if isinstance(module, nn.RNNCellBase) else draw(T, B, I).to(dtype)
    with fused_calls() as calls:
        outputs = tensors(module(of_rank(x, rank, x.dim() - 2)))
        sum((o.float() * torch.linspace(-1, 2, H)).mean() for o in outputs).backward()
    return [p.grad for p in module.parameters()], calls


def sharded_gradients(rank, name, reshard, policy):
    module = sharded(build(fused_rnn, name), reshard_after_forward=reshard, **({"mp_policy": policy} if policy else {}))
    module.backend = "fused"
    grads, calls = one_backward(module, rank)
    return [g.full_tensor() for g in grads], calls


def written_output(rank):
    """In-place operations on a layer's output, which FSDP2 cannot track on a view."""
    module = sharded(build(fused_rnn, "GRU", batch_first=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output, _ = module(of_rank(draw(B, T, I), rank))
    output.mul_(2).mean().backward()
    return [p.grad.full_tensor() for p in module.parameters()], [str(w.message) for w in caught]


def stepped(rank):
    """`step` is not forward, so FSDP2 must be told to gather the weights for it."""
    module = sharded(build(fused_rnn, "LSTM"))
    register_fsdp_forward_method(module, "step")
    with fused_calls() as calls:
        y, hx = module.step(of_rank(draw(B, I), rank))
        y, _ = module.step(of_rank(draw(B, I), rank), hx)
        y.mean().backward()
    return y.detach(), [p.grad.full_tensor() for p in module.parameters()], calls


def checkpointed(rank, folder, source, target):
    """Save a sharded model of one library and load it into a sharded model of the other."""
    saved = sharded(all_six(source))
    path = f"{folder}/checkpoint_of_{source.__name__}"
    dcp.save(get_model_state_dict(saved), checkpoint_id=path)
    loaded = sharded(all_six(target))
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    state = get_model_state_dict(loaded)
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(loaded, state)
    return {name: value.full_tensor() for name, value in loaded.state_dict().items()}


def work_of_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    work = {
        f"ddp-{name}": lambda lengths=lengths: ragged_gradients(DistributedDataParallel(Ragged()), lengths, rank)
        for name, lengths in LENGTHS.items()
    }
    work |= {name: lambda wrap=wrap: trained(wrap(Model(fused_rnn)), rank) for name, wrap in WRAPPERS.items()}
    work |= {key: lambda given=given: sharded_gradients(rank, *given) for key, given in SHARDED.items()}
    work |= {"written": lambda: written_output(rank), "stepped": lambda: stepped(rank)}
    work["from torch.nn"] = lambda: checkpointed(rank, folder, nn, fused_rnn)
    work["to torch.nn"] = lambda: checkpointed(rank, folder, fused_rnn, nn)
    results = {}
    for name, run in work.items():
        try:
            results[name] = run()
        except Exception as error:
            results[name] = repr(error)
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder with the processes' results and checkpoints; `survives` limits their time."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    with ThreadPoolExecutor(RANKS) as pool:
        for rank in [pool.submit(survives, work_of_rank, rank, folder) for rank in range(RANKS)]:
            rank.result()
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return [torch.load(f"{folder}/{rank}") for rank in range(RANKS)]


def found(results, key):
    """The results of each rank; fails if one raised."""
    of_ranks = [result[key] for result in results]
    assert not any(isinstance(result, str) for result in of_ranks), of_ranks
    return of_ranks


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_training_under(results, wrapper):
    close(torch.cat(found(results, wrapper)), trained(Model(nn)), grad=True)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_resets_and_lengths_under_ddp(results, lengths):
    """Gradients equal those of one process on the joint batch, also where the ranks' rows differ in length."""
    wanted = ragged_gradients(Ragged(), LENGTHS[lengths])
    for grads in found(results, f"ddp-{lengths}"):
        close(grads, wanted, grad=True)


@pytest.mark.parametrize("key", SHARDED)
def test_fsdp2(results, key):
    """The kernels get whole, plain weights in the policy's dtype; gradients equal those of the joint batch."""
    name, _, policy = SHARDED[key]
    expected = build(nn, name)
    dtype = torch.bfloat16 if policy else torch.float32
    wanted, _ = one_backward(expected.to(dtype), dtype=dtype)
    for grads, calls in found(results, key):
        if name != "RNNCell":  # which trains on torch.nn's operations
            assert {"fused_rnn::forward", "fused_rnn::backward"} <= set(calls)
        assert all(g.dtype is torch.float32 for g in grads)
        close([g.to(dtype) for g in grads], wanted, grad=True)


def test_an_output_that_is_written_to_under_fsdp2(results):
    expected = build(nn, "GRU", batch_first=True)
    expected(draw(B, T, I))[0].mul_(2).mean().backward()
    for grads, warned in found(results, "written"):
        assert warned == []
        close(grads, [p.grad for p in expected.parameters()], grad=True)


def test_steps_under_fsdp2(results):
    expected = build(nn, "LSTM")
    output, _ = expected(draw(B, I).expand(2, B, I))
    output[-1].mean().backward()
    of_ranks = found(results, "stepped")
    close(torch.cat([y for y, _, _ in of_ranks]), output[-1])
    for _, grads, calls in of_ranks:
        assert any(call.startswith("fused_rnn::") for call in calls)
        close(grads, [p.grad for p in expected.parameters()], grad=True)


@pytest.mark.parametrize("direction", ["from torch.nn", "to torch.nn"])
def test_sharded_checkpoints_between_the_libraries(results, direction):
    wanted = all_six(nn).state_dict()
    for state in found(results, direction):
        assert list(state) == list(wanted)
        assert all(torch.equal(state[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("source", [nn, fused_rnn], ids=["from torch.nn", "to torch.nn"])
def test_a_sharded_checkpoint_in_one_process(folder, source):
    """A checkpoint saved by two processes loads in one process, in the other library."""
    model = all_six(fused_rnn if source is nn else nn)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = model.state_dict()
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint_of_{source.__name__}", no_dist=True)
    model.load_state_dict(state)
    close(tensors(model.LSTM(draw(T, B, I))), tensors(build(nn, "LSTM")(draw(T, B, I))))


def test_the_language_model_under_torchrun():
    """Two processes that share every batch print the same losses as one."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "examples" / "char_lm.py"
    arguments = [str(script), "--cell", "rnn", "--backend", "fused", "--steps", "5"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    printed = []
    for command in ([*arguments, "--threads", "1"], torchrun + arguments):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        with subprocess.Popen([sys.executable, *command], env=environment, **pipes) as process:
            try:
                output, errors = process.communicate(timeout=600)
            finally:
                process.terminate()  # torchrun passes it on to its processes
        assert process.returncode == 0, errors
        printed.append([float(loss) for loss in re.findall(r"^ +\d+ +(\d\.\d+)$", output, re.MULTILINE)])
    alone, together = printed
    assert len(alone) == len(together) == 5 and alone[-1] < alone[0]
    assert together == pytest.approx(alone, rel=1e-4)
