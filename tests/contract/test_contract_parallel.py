"""DDP, FSDP1 and FSDP2 on two gloo processes train like one process of torch.nn.

The processes are started once; each rank writes its result of every variant to a file, which the
tests read.
"""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_rnn
from contract import close
from processes import survives

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow("starts processes that train together")]

VARIANTS = {
    "ddp": DistributedDataParallel,
    "ddp_static_graph": lambda m: DistributedDataParallel(m, static_graph=True),
    "ddp_bucket_view": lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True),
    "fsdp1": lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu")),
    "fsdp1_orig_params": lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu"), use_orig_params=True),
    "fsdp2": lambda m: fully_shard(m, mesh=init_device_mesh("cpu", (2,))),
}
RANKS = 2


class Model(nn.Module):
    def __init__(self, library):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = library.LSTM(4, 8, 2, bidirectional=True)
        self.gru = library.GRU(16, 8)
        self.cell = library.GRUCell(8, 8)

    def forward(self, input):
        return self.cell(self.gru(self.lstm(input)[0])[0][-1])


def part(rank):
    """This rank's part of the batch, (T, B, 4)."""
    return torch.linspace(-1, 1, 5 * 4 * 4).view(5, 4, 4).chunk(RANKS, 1)[rank]


def train(model, input):
    """Do three training steps; return the model's output for the same input after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(input).square().mean().backward()
        optimizer.step()
    return model(input).detach()


def train_on_rank(rank, folder):
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    results = {}
    for name, wrap in VARIANTS.items():
        try:
            results[name] = train(wrap(Model(fused_rnn)), part(rank))
        except Exception as error:
            results[name] = repr(error)
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    with ThreadPoolExecutor(RANKS) as pool:
        ranks = [pool.submit(survives, train_on_rank, rank, folder) for rank in range(RANKS)]
        for rank in ranks:
            rank.result()
    return [torch.load(f"{folder}/{rank}") for rank in range(RANKS)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_like_one_process(results, variant):
    expected = Model(nn)
    wanted = train(expected, torch.cat([part(rank) for rank in range(RANKS)], 1))
    found = [result[variant] for result in results]
    assert not any(isinstance(result, str) for result in found), found
    close(torch.cat(found), wanted, grad=True)


def test_models_start_alike():
    expected, actual = Model(nn), Model(fused_rnn)
    close(list(actual.state_dict().values()), list(expected.state_dict().values()))
    close(copy.deepcopy(actual)(part(0)), expected(part(0)))
