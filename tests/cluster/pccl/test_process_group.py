"""``dist.init_process_group("pccl")``: what is written against torch.distributed runs on it."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from anabranch.errors import InputError
from anabranch.testing import RankError, run_ranks


def joined(rank, world):
    import anabranch.cluster.pccl.process_group  # noqa: F401

    dist.init_process_group(
        "pccl", init_method=f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}", rank=rank, world_size=world
    )


def collectives(rank, world):
    joined(rank, world)
    value = torch.full((3,), rank + 1.0)
    dist.all_reduce(value)
    mean = torch.full((2,), float(rank))
    dist.all_reduce(mean, op=dist.ReduceOp.AVG)
    told = torch.tensor([float("nan"), -0.0, 7.0]) if rank == 1 else torch.zeros(3)
    dist.broadcast(told, 1)
    parts = [torch.empty(2, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(parts, torch.tensor([rank, -rank]))
    whole = torch.empty(2 * world)
    dist.all_gather_into_tensor(whole, torch.tensor([rank, rank + 0.5]))
    mine = torch.empty(2)
    dist.reduce_scatter_tensor(mine, torch.arange(2.0 * world))
    dist.barrier()
    objects = [None] * world
    dist.all_gather_object(objects, {"rank": rank})
    with pytest.raises(InputError, match="BAND is no operation"):
        dist.all_reduce(torch.ones(1, dtype=torch.int32), op=dist.ReduceOp.BAND)
    dist.destroy_process_group()
    bits = told.view(torch.int32).tolist()
    gathered = [part.tolist() for part in parts]
    return value.tolist(), mean.tolist(), bits, gathered, whole.tolist(), mine.tolist(), objects


def trained(rank, world):
    """A model that learns by DDP, and the same in one process."""
    joined(rank, world)
    torch.manual_seed(0)
    model, alone = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    alone.load_state_dict(model.state_dict())
    shared = DistributedDataParallel(model)
    x_ND = torch.randn(2 * world, 4, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        (shared(x_ND[2 * rank : 2 * rank + 2]).square().mean() * (step + 1)).backward()
        (alone(x_ND).square().mean() * (step + 1)).backward()
        for each in (model, alone):
            for value in each.parameters():
                value.data.sub_(0.1 * value.grad)
                value.grad = None
    off = max(
        float((one - other).abs().max()) for one, other in zip(model.parameters(), alone.parameters(), strict=True)
    )
    weights = model.weight.tolist()
    dist.destroy_process_group()
    return off, weights


def one_dies(rank, world):
    joined(rank, world)
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        os._exit(7)
    dist.all_reduce(torch.ones(1))


def test_collectives_are_those_of_torch():
    nan, minus_zero, seven = torch.tensor([float("nan"), -0.0, 7.0]).view(torch.int32).tolist()
    found = run_ranks(collectives, 2, backend=None, timeout_s=240)
    for rank, (value, mean, bits, parts, whole, mine, objects) in enumerate(found):
        assert value == [3.0] * 3
        assert mean == [0.5] * 2
        assert bits == [nan, minus_zero, seven]
        assert parts == [[0, 0], [1, -1]]
        assert whole == [0.0, 0.5, 1.0, 1.5]
        assert mine == [4.0 * rank, 4.0 * rank + 2]
        assert objects == [{"rank": 0}, {"rank": 1}]


@pytest.mark.slow
def test_ddp_learns_as_one_process():
    (first_off, first), (second_off, second) = run_ranks(trained, 2, backend=None, timeout_s=240)
    assert max(first_off, second_off) < 1e-6
    assert first == second


@pytest.mark.slow
def test_a_rank_that_dies_is_told_at_once():
    with pytest.raises(RankError, match=r"ended with code 7|PeerLost"):
        run_ranks(one_dies, 2, backend=None, timeout_s=60)
