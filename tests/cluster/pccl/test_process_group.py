"""``dist.init_process_group("pccl")``: what is written against torch.distributed runs on it."""

import os
import re
import socket
import threading
from concurrent.futures import Future
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from anabranch.cluster.pccl import Communicator, Master, PeerLost
from anabranch.errors import InputError
from anabranch.testing import Ranks, run_ranks
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


def one_dies(rank, world, who):
    """Between two collectives. What the others hear of it; the ranks' bound is the test's own."""
    joined(rank, world)
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
    model = DistributedDataParallel(torch.nn.Linear(2, 1))
    dist.barrier()
    if rank == who:
        # The others have heard the end of it by then, also where the master is a thread of this process.
        store.wait([f"past {each}" for each in range(world) if each != who])
        os._exit(7)
    store.set(f"past {rank}", "it")
    told = []
    for call in (lambda: dist.all_reduce(torch.ones(1)), lambda: model(torch.ones(1, 2)).sum().backward()):
        try:
            call()
        except Exception as error:
            told.append(str(error))
        else:
            told.append("nothing")
    return told


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
@pytest.mark.parametrize("who", [0, 2])
def test_a_rank_that_dies_is_told_at_once(who):
    """Also the first, with which the master goes; DDP learned on from gradients of those who were left."""
    with Ranks(3, one_dies, who, backend=None, timeout_s=120) as ranks:
        ranks.expect_end(who)
        found = ranks.wait()
    assert len(found) == 2
    for told in found:
        assert all(re.search(r"first rank of the group is lost|are left|was lost|peer", why) for why in told), told


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


def options(**values):
    return SimpleNamespace(reduceOp=dist.ReduceOp.SUM, rootRank=0, **values)


COLLECTIVES = {
    "allreduce": lambda group, out, given: group.allreduce([given], options()),
    "allreduce of several": lambda group, out, given: group.allreduce([given, out], options()),
    "allreduce_coalesced": lambda group, out, given: group.allreduce_coalesced([given], options()),
    "broadcast": lambda group, out, given: group.broadcast([given], options()),
    "allgather": lambda group, out, given: group.allgather([list(out.chunk(3))], [given]),
    "_allgather_base": lambda group, out, given: group._allgather_base(out, given),
    "allgather_into_tensor_coalesced": lambda group, out, given: group.allgather_into_tensor_coalesced([out], [given]),
    "reduce_scatter": lambda group, out, given: group.reduce_scatter([given], [list(out.chunk(3))], options()),
    "_reduce_scatter_base": lambda group, out, given: group._reduce_scatter_base(given, out, options()),
    "reduce_scatter_tensor_coalesced": lambda group, out, given: group.reduce_scatter_tensor_coalesced(
        [given], [out], options()
    ),
    "barrier": lambda group, out, given: group.barrier(),
}


def ranks_of(made, world, timeout_s=BOUND_S):
    """As many of a group, made by threads of this process."""
    store, found = dist.HashStore(), [None] * world

    def join(rank):
        found[rank] = made(store, rank, world, timeout_s)

    threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
    assert None not in found
    return found


def test_all_that_torch_may_ask_of_a_group_is_among_what_is_tried():
    from anabranch.cluster.pccl.process_group import PCCLGroup

    others = {"getBackendName", "getGroupName", "shutdown", "abort", "group_name", "all_gather_single"}
    asked = {
        name
        for name, value in vars(PCCLGroup).items()
        if callable(value) and not name.startswith("__") and name not in others
    }
    own = {"_begin", "_work", "_slots", "_set_group_name", "reduce_scatter_single"}
    assert asked - own == COLLECTIVES.keys() - {"allreduce of several"}


@pytest.mark.parametrize("who", [2, 0], ids=["another", "the first"])
def test_a_rank_that_is_lost_between_two_is_told_in_every_collective(made, who):
    """Sums without it once went on in silence; and where the first was lost, the others waited for its master for minutes."""
    groups = ranks_of(made, 3)
    handles = [group.barrier() for group in groups]
    for handle in handles:
        in_time(handle.wait)
    gone = groups[who]
    if gone._master is not None:
        gone._master.stop()
    gone._peers._die()
    for group in (groups[1], groups[2 - who]):
        for name, call in COLLECTIVES.items():
            out, given = torch.full((6,), 5.0), torch.full((2,), 7.0)
            with pytest.raises(PeerLost, match=r"3|first rank"):
                in_time(lambda group=group, call=call, out=out, given=given: call(group, out, given).wait())
            assert (out.tolist(), given.tolist()) == ([5.0] * 6, [7.0] * 2), name


def test_a_master_elsewhere_may_come_back(made, monkeypatch, tmp_path):
    journal = tmp_path / "j"
    with a_master(journal=journal) as master:
        monkeypatch.setenv("ANABRANCH_CLUSTER_MASTER", master.address)
        groups = ranks_of(made, 2)
        address = master.address
    with Master(address, journal=journal):
        values = [torch.ones(2), torch.ones(2)]
        handles = [group.allreduce([value]) for group, value in zip(groups, values, strict=True)]
        for handle in handles:
            in_time(handle.wait)
        assert [value.tolist() for value in values] == [[2.0, 2.0]] * 2


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


def test_a_work_is_completed_once_its_collectives_are():
    """Torch's own answer knows nothing of them: it said no after `wait` too."""
    from anabranch.cluster.pccl.process_group import _Work

    handle = Future()
    work = _Work([handle], [1], lambda: None, lambda error: error)
    assert not work.is_completed()
    handle.set_result(None)
    assert work.wait()
    assert work.is_completed()
    failed = Future()
    work = _Work([failed], [1], lambda: None, lambda error: error)
    failed.set_exception(PeerLost("gone"))
    assert work.is_completed()
