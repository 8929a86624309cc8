"""``dist.init_process_group("pccl")``: what is written against torch.distributed runs on it."""

import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from anabranch.cluster.pccl import Communicator, PeerLost
from anabranch.errors import InputError
from anabranch.testing import RankError, run_ranks
from pccl_peers import BOUND_S, a_master, in_time


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


def groups_of_groups(rank, world, address):
    """A master that is named, and groups beside the first."""
    os.environ["ANABRANCH_CLUSTER_MASTER"] = address
    joined(rank, world)
    found = []
    for ranks in ([0, 1], [1], [1, 0]):
        group = dist.new_group(ranks, backend="pccl")
        value = torch.tensor([rank + 1.0])
        if rank in ranks:
            dist.all_reduce(value, group=group)
        found.append(value.item())
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    value = torch.tensor([rank + 1.0])
    dist.all_reduce(value, group=mesh.get_group("replicate"))
    dist.all_reduce(value, group=mesh.get_group("shard"))
    dist.barrier()
    dist.destroy_process_group()
    return [*found, value.item()]


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


@pytest.fixture
def made(monkeypatch):
    """Makes groups of this process, as torch does for `init_process_group`; they are left at the end."""
    from anabranch.cluster.pccl import process_group

    monkeypatch.delenv("ANABRANCH_CLUSTER_MASTER", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    groups = []

    def make(store, rank=0, size=1, timeout_s=BOUND_S):
        groups.append(process_group._made(store, rank, size, timedelta(seconds=timeout_s)))
        return groups[-1]

    yield make
    for group in groups:
        group.shutdown()


@pytest.mark.parametrize(
    "begin",
    [
        lambda group: group.allgather([[torch.zeros(3)]], [torch.ones(2)]),
        lambda group: group.allgather([[torch.zeros(2), torch.zeros(2)]], [torch.ones(2)]),
        lambda group: group._allgather_base(torch.zeros(3), torch.ones(2)),
        lambda group: group.allgather_into_tensor_coalesced([torch.zeros(3)], [torch.ones(2)]),
        lambda group: group.reduce_scatter([torch.zeros(3)], [[torch.ones(2)]]),
        lambda group: group._reduce_scatter_base(torch.zeros(3), torch.ones(2)),
        lambda group: group.reduce_scatter_tensor_coalesced([torch.zeros(3)], [torch.ones(2)]),
    ],
)
def test_a_result_that_does_not_fit_is_told_to_who_waits(made, begin):
    group = made(dist.HashStore())
    with pytest.raises((RuntimeError, ValueError), match=r"size|shape|shorter|longer"):
        in_time(lambda: begin(group).wait())
    # And the group goes on.
    value = torch.ones(2)
    assert in_time(group.allreduce([value]).wait)


def test_a_group_beside_the_first_has_a_master_of_its_own(monkeypatch):
    import anabranch.cluster.pccl.process_group  # noqa: F401

    with a_master() as master:
        monkeypatch.setenv("ANABRANCH_CLUSTER_MASTER", master.address)
        dist.init_process_group("pccl", store=dist.HashStore(), rank=0, world_size=1)
        try:
            assert len(master.state.members) == 1
            group = in_time(lambda: dist.new_group([0], backend="pccl"))
            for one in (None, group):
                value = torch.ones(2)
                in_time(lambda one=one, value=value: dist.all_reduce(value, group=one))
                assert value.tolist() == [1.0, 1.0]
            assert len(master.state.members) == 1
        finally:
            dist.destroy_process_group()


@pytest.mark.slow
def test_groups_and_meshes_beside_a_named_master():
    with a_master() as master:
        found = run_ranks(groups_of_groups, 2, master.address, backend=None, timeout_s=240)
    assert found == [[3.0, 1.0, 3.0, 3.0], [3.0, 2.0, 3.0, 3.0]]


def test_a_rank_that_never_comes_is_told_after_the_timeout(made):
    store = dist.HashStore()
    with pytest.raises(PeerLost, match=r"1 of 2 ranks were there after 0\.4 s; start the others"):
        in_time(lambda: made(store, 0, 2, timeout_s=0.4))
    # Nothing of it is left.
    host, port = store.get("pccl").decode().split()[0].rsplit(":", 1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=BOUND_S)


def test_a_master_that_another_job_holds_is_told_after_the_timeout(made, monkeypatch):
    with a_master() as master, Communicator(master.address):
        monkeypatch.setenv("ANABRANCH_CLUSTER_MASTER", master.address)
        with pytest.raises(PeerLost, match=r"lets nobody in; .* a master of its own"):
            in_time(lambda: made(dist.HashStore(), timeout_s=0.4))


def test_the_first_group_may_be_reached_by_ipv6(made, monkeypatch):
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    monkeypatch.setenv("MASTER_ADDR", "::1")
    store = dist.HashStore()
    group = in_time(lambda: made(store))
    assert store.get("pccl").decode().startswith("[::1]:")
    value = torch.ones(2)
    assert in_time(group.allreduce([value]).wait)


def test_a_group_that_begins_on_another_machine_names_that_one(made, monkeypatch):
    """As of ``new_group([2, 3])`` over two machines: what torch calls on rank 2."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.2")
    store = dist.HashStore()
    in_time(lambda: made(store))
    assert store.get("pccl").decode().startswith("127.0.0.2:")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    # This machine's address on the way to that of rank 0.
    store = dist.HashStore()
    in_time(lambda: made(store))
    assert store.get("pccl").decode().startswith("127.0.0.1:")
