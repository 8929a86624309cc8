"""All-reduce over a ring of peers: exact to the bit, counted to the byte."""

import contextlib
import socket
import struct
import threading
import time
import warnings

import numpy as np
import pytest
import torch

from anabranch.cluster.pccl import (
    CollectiveError,
    Communicator,
    Kicked,
    Mismatch,
    PeerLost,
    Quantiser,
    Reduced,
    Reduction,
    SharedState,
    TagInUse,
    part,
    ring,
)
from anabranch.cluster.pccl.communicator import DTYPES
from anabranch.cluster.pccl.links import LinkError, Links
from anabranch.cluster.pccl.ring import HEAD, OPS, WIDER, chunk_ranges
from anabranch.errors import InputError
from pccl_peers import BOUND_S, a_master, together
from waiting import until

SIZES = (0, 1, 3, 7, 1000)
FLOATS = [dtype for dtype in DTYPES if dtype.is_floating_point]


@pytest.fixture(scope="module")
def master():
    with a_master() as found:
        yield found


def drawn(rank, size, dtype):
    generator = torch.Generator().manual_seed(1000 * rank + size)
    if dtype.is_floating_point:
        return torch.randn(size, generator=generator).to(dtype)
    return torch.randint(-5 if dtype.is_signed else 0, 6, (size,), generator=generator).to(dtype)


def naive(values, op):
    """In the order in which a ring reduces chunk c: ranks c, c + 1, ... ; every step in the type's own arithmetic."""
    world, count, dtype = len(values), len(values[0]), values[0].dtype
    if op == "avg":
        values = [value.to(WIDER.get(dtype, dtype)) for value in values]
    out = torch.empty_like(values[0])
    steps = {"sum": torch.add, "avg": torch.add, "prod": torch.mul, "max": torch.maximum, "min": torch.minimum}
    for chunk, (start, end) in enumerate(chunk_ranges(count, world)):
        held = values[chunk][start:end]
        for step in range(1, world):
            held = steps[op](values[(chunk + step) % world][start:end], held)
        out[start:end] = held
    if op == "avg":
        out = out / world if out.is_floating_point() else torch.div(out, world, rounding_mode="floor")
    return out.to(dtype)


def bits(tensor):
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes()) if tensor.numel() else b""


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_every_type_and_operation_has_the_bits_of_a_plain_sum_in_ring_order(master, world):
    # All sizes with two peers; with more, those that differ by them.
    sizes = SIZES if world == 2 else (3, 9)
    types = sorted(DTYPES, key=str) if world < 5 else [torch.float32, torch.bfloat16, torch.int8]
    cases = [(size, dtype, op) for size in sizes for dtype in types for op in OPS]

    def work(number, peers):
        rank, found = peers.ring_order.index(peers.peer), []
        for size, dtype, op in cases:
            value = drawn(rank, size, dtype)
            told = peers.all_reduce(value, op=op)
            assert told == Reduced(world, world == 1)
            found.append(bits(value))
        return rank, found

    found = dict(together(master.address, world, work))
    for place, (size, dtype, op) in enumerate(cases):
        expected = bits(naive([drawn(rank, size, dtype) for rank in range(world)], op))
        assert {found[rank][place] for rank in range(world)} == {expected}, (size, dtype, op)


@pytest.mark.parametrize("world", [2, 4])
def test_a_quantised_sum_is_one_for_all_and_within_its_bound(master, world):
    cases = [
        (size, dtype, kind, width)
        for size in (1, 3, 1000)
        for dtype in sorted(FLOATS, key=str)
        for kind in ("min_max", "zero_point")
        for width in (8, 16)
    ]

    def work(number, peers):
        rank, found = peers.ring_order.index(peers.peer), []
        for size, dtype, kind, width in cases:
            value = drawn(rank, size, dtype)
            peers.all_reduce(value, op="avg", quantise=Quantiser(kind, width))
            found.append(value)
        return rank, found

    found = dict(together(master.address, world, work))
    for place, (size, dtype, kind, width) in enumerate(cases):
        values = [drawn(rank, size, dtype) for rank in range(world)]
        assert len({bits(found[rank][place]) for rank in range(world)}) == 1
        exact = sum(value.double() for value in values) / world
        # Each of the world writings of a partial sum is off by half a step of its range at most (a whole one where the zero is rounded
        # too); partial sums of k values lie within k times the largest.
        largest = max(float(value.double().abs().max()) for value in values)
        steps = sum(range(1, world + 1)) * 2 * largest / (2**width - 1)
        slack = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-6) * world * largest
        assert (found[0][place].double() - exact).abs().max() <= steps / world + slack, (size, dtype, kind, width)


@pytest.mark.parametrize("quantise", [None, "min_max", "zero_point"])
def test_chunks_go_in_pieces(master, monkeypatch, quantise):
    """Many of them in a chunk, the last one shorter, and another number of them in each chunk."""
    monkeypatch.setattr(ring, "PIECE", 64)
    world, size = 3, 3 * 16 * 4 + 17

    def work(number, peers):
        rank = peers.ring_order.index(peers.peer)
        value = drawn(rank, size, torch.float32)
        peers.all_reduce(value, quantise=quantise)
        return value

    found = together(master.address, world, work)
    values = [drawn(rank, size, torch.float32) for rank in range(world)]
    assert len({bits(value) for value in found}) == 1
    if quantise is None:
        assert bits(found[0]) == bits(naive(values, "sum"))
    else:
        largest = max(float(value.abs().max()) for value in values)
        assert (found[0] - sum(values)).abs().max() <= sum(range(1, world + 1)) * 2 * largest / 255 + 1e-5


def test_what_fails_here_alone_ends_this_peer_s_part(master, monkeypatch):
    """Memory, say: others are told at once, and do not wait for its part."""

    def work(number, peers):
        if number == 1:
            monkeypatch.setattr(peers, "_backup", lambda flat: (_ for _ in ()).throw(MemoryError("no room")))
            with pytest.raises(MemoryError):
                peers.all_reduce(torch.ones(3))
            with pytest.raises(Kicked, match="MemoryError"):
                peers.all_reduce(torch.ones(3))
            return None
        value = torch.ones(3)
        with pytest.raises(PeerLost):
            peers.all_reduce(value)
        return peers.all_reduce(value).alone, value.tolist()

    assert together(master.address, 2, work) == [(True, [1.0] * 3), None]


def test_bytes_are_those_of_the_formula(master):
    count, world = 4096 + 3, 4

    def work(number, peers):
        sent = {}
        for name, quantiser in (("plain", None), ("quantised", Quantiser())):
            peers.all_reduce(torch.ones(count))
            sockets = peers._links.to_next
            before = sum(map(_sent, sockets))
            peers.all_reduce(torch.ones(count), quantise=quantiser)
            # What the neighbour has acknowledged comes with the end of the call at the latest.
            peers.all_reduce(torch.ones(0))
            sent[name] = sum(map(_sent, sockets)) - before - 2 * HEAD.size
        return peers.ring_order.index(peers.peer), sent

    ranges = chunk_ranges(count, world)
    for rank, sent in together(master.address, world, work):
        sizes = [end - start for start, end in ranges]
        numbers = sum(sizes) * 2 - sizes[(rank + 1) % world] - sizes[(rank + 2) % world]
        assert sent == {"plain": 4 * numbers, "quantised": numbers + 16 * 2 * (world - 1)}


def _sent(sock):
    """Bytes that Linux has sent and not repeated: tcpi_bytes_sent - tcpi_bytes_retrans of struct tcp_info."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    if len(info) < 216:
        pytest.skip("this kernel does not count")
    sent, again = struct.unpack_from("QQ", info, 200)
    return sent - again


def test_results_go_where_they_are_asked_for(master):
    def work(number, peers):
        rank = peers.ring_order.index(peers.peer)
        send, recv = torch.full((3, 4), 1.0 + rank), torch.zeros(3, 4)
        peers.all_reduce(send, recv)
        strided = torch.arange(12.0).reshape(3, 4).t()
        assert not strided.is_contiguous()
        peers.all_reduce(strided, op="avg")
        grown = torch.ones(3, requires_grad=True)
        peers.all_reduce(grown)
        return float(send[0, 0]) == 1.0 + rank, recv.tolist(), strided.tolist(), grown.tolist()

    for kept, recv, strided, grown in together(master.address, 2, work):
        assert kept
        assert recv == [[3.0] * 4] * 3
        assert strided == torch.arange(12.0).reshape(3, 4).t().tolist()
        assert grown == [2.0] * 3


def test_many_tags_at_a_time_over_several_connections(master):
    world, count = 3, 24

    def work(number, peers):
        rank = peers.ring_order.index(peers.peer)
        values = [torch.full((1000 + tag,), float(rank + tag)) for tag in range(count)]
        told = peers.all_reduce_many([Reduction(value, tag=tag) for tag, value in enumerate(values)], max_in_flight=6)
        assert told == [Reduced(world, False)] * count
        assert len(peers._links.to_next) == 4
        return [bits(value) for value in values]

    found = together(master.address, world, work, pool=4)
    assert all(one == found[0] for one in found)
    assert np.frombuffer(found[0][5], np.float32)[0] == 0 + 1 + 2 + 3 * 5


def test_in_the_midst_of_one_nothing_else_begins(master):
    gate = threading.Event()

    def work(number, peers):
        if number == 1:
            assert gate.wait(60)
            return peers.all_reduce(torch.ones(3))
        handle = peers.all_reduce_async(torch.ones(3))
        for call in (
            lambda: peers.all_reduce(torch.ones(3)),
            peers.update_topology,
            peers.are_peers_pending,
        ):
            with pytest.raises(TagInUse, match="under way"):
                call()
        gate.set()
        return handle.result()

    assert together(master.address, 2, work) == [Reduced(2, False)] * 2


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        (
            lambda p: p.all_reduce(torch.ones(3)),
            lambda p: p.all_reduce(torch.ones(4)),
            "count=3.*count=4|count=4.*count=3",
        ),
        (lambda p: p.all_reduce(torch.ones(3)), lambda p: p.all_reduce(torch.ones(3), op="max"), "op=.*op="),
        (
            lambda p: p.all_reduce(torch.ones(3)),
            lambda p: p.all_reduce(torch.ones(3).int()),
            "float32.*int32|int32.*float32",
        ),
        (lambda p: p.all_reduce(torch.ones(3)), lambda p: p.all_reduce(torch.ones(3), quantise="min_max"), "quantise="),
        (lambda p: p.all_reduce(torch.ones(3)), lambda p: p.update_topology(), "waits for"),
        (lambda p: p.are_peers_pending(), lambda p: p.update_topology(), "pending.*accept|accept.*pending"),
    ],
)
def test_peers_that_want_different_things_are_all_told_at_once(master, first, second, named):
    def work(number, peers):
        with pytest.raises(Mismatch, match=named):
            (first if number else second)(peers)
        # And go on.
        return peers.all_reduce(torch.ones(2)).world

    assert together(master.address, 2, work) == [2, 2]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda p: p.all_reduce(torch.ones(3), op="xor"), "op is 'xor'"),
        (lambda p: p.all_reduce(torch.ones(3), tag=-1), "tag is -1"),
        (lambda p: p.all_reduce(torch.ones(3).bool()), "bool cannot be reduced"),
        (lambda p: p.all_reduce([1.0]), "list cannot be reduced"),
        (lambda p: p.all_reduce(torch.ones(3), torch.ones(4)), "recv has 4"),
        (lambda p: p.all_reduce(torch.ones(3).int(), quantise="min_max"), "not quantised"),
        (lambda p: p.all_reduce(torch.ones(3), quantise="magic"), "'magic'"),
        (lambda p: p.all_reduce(torch.ones(3), quantise=3), "quantise is 3"),
        (lambda p: p.all_reduce(torch.ones(3), world=0), "world is 0"),
        (lambda p: p.all_reduce(nested()), "nested tensor"),
        (lambda p: p.all_reduce(torch.nn.UninitializedParameter()), "not initialised"),
        (lambda p: p.all_reduce(freed()), "memory was freed"),
        (lambda p: p.all_reduce(freed(), torch.ones(3)), "memory was freed"),
        (lambda p: p.all_reduce(torch.ones(3), freed()), "memory was freed"),
        (lambda p: p.sync_shared_state(shared({"w": nested()})), "nested tensor"),
        (lambda p: p.sync_shared_state(shared({"w": torch.nn.UninitializedParameter()})), "not initialised"),
        (lambda p: p.sync_shared_state(shared({"w": freed()})), "memory was freed"),
        (lambda p: p.sync_shared_state(shared({}, 1, -1)), "progress is -1"),
        (lambda p: p.wait_for(0), "world is 0"),
        (lambda p: Quantiser(bits=7), "bits is 7"),
        (lambda p: p.all_reduce_many([Reduction(torch.ones(1))] * 2), "its own"),
        (lambda p: p.all_reduce(torch.ones(1).expand(3)), "expanded tensor"),
        (lambda p: p.all_reduce(torch.ones(3), torch.ones(1).expand(3)), "expanded tensor"),
        (lambda p: p.all_reduce(inferred()), "inference mode"),
        (lambda p: p.all_reduce(torch.ones(3, device="meta")), "meta device"),
        (lambda p: p.all_reduce(torch.ones(3), torch.ones(3).to_sparse()), "layout torch.sparse_coo"),
        (lambda p: p.all_reduce(torch.ones(3), [0.0]), "in a list"),
        (lambda p: p.all_reduce_many([Reduction(torch.ones(1))], attempts=0), "attempts is 0"),
        (lambda p: p.all_reduce_many([Reduction(torch.ones(1)), Reduction(torch.ones(1), op="x", tag=1)]), "op is 'x'"),
        (lambda p: p.sync_shared_state(shared({}, -1)), "revision is -1"),
        (lambda p: p.sync_shared_state(shared({"w": torch.ones(2).to_sparse()})), "layout"),
        (lambda p: p.sync_shared_state(shared({"w": torch.ones(2, dtype=torch.complex64).conj()})), "conjugate view"),
        (lambda p: p.sync_shared_state(shared({"w": torch.ones(2, dtype=torch.complex64).conj().imag})), "negated"),
        (lambda p: p.sync_shared_state(shared({"w": torch.ones(1).expand(2)})), "expanded tensor"),
        (lambda p: p.sync_shared_state(shared({"w": torch.ones([1] * 17)})), "17 dimensions"),
        (lambda p: p.sync_shared_state(shared({"\ud800": torch.ones(1)})), "is none"),
        (lambda p: p.optimize_topology(seconds=0), "seconds is 0"),
        (lambda p: p.sync_shared_state(None, "mine"), "strategy is 'mine'"),
    ],
)
def test_wrong_arguments_are_told_before_anyone_is_asked(master, call, told):
    def work(number, peers):
        with pytest.raises(InputError, match=told):
            call(peers)
        return peers.all_reduce(torch.ones(1)).alone

    assert together(master.address, 1, work) == [True]


def inferred():
    with torch.inference_mode():
        return torch.ones(3)


def freed():
    """As FSDP leaves a parameter whose numbers are elsewhere."""
    value = torch.ones(3)
    value.untyped_storage().resize_(0)
    return value


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def shared(tensors, revision=1, progress=0):
    """A state whose parts are put there after it was made."""
    state = SharedState({})
    state.tensors, state.revision, state.progress = tensors, revision, progress
    return state


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"pool": 0}, "pool is 0"),
        ({"pool": 65}, "pool is 65"),
        ({"group": -1}, "group is -1"),
        ({"idle_s": 0}, "idle_s is 0"),
        ({"wait_s": -1.0}, "wait_s is -1"),
        ({"wait_s": 0}, "wait_s is 0"),
        ({"idle_s": "1"}, "idle_s is '1'"),
        ({"master_wait_s": float("nan")}, "master_wait_s is nan"),
        ({"master": "::1"}, "not clear"),
        ({"advertise": "host:port"}, "has no port"),
        ({"congestion": "none of that name"}, "congestion is"),
    ],
)
def test_settings_that_are_none_are_told(settings, told):
    with pytest.raises(InputError, match=told):
        Communicator(**{"master": "127.0.0.1:1", **settings})


def test_who_names_a_world_reduces_with_that_or_not_at_all(master):
    def work(number, peers):
        value = torch.ones(2)
        worlds = [peers.all_reduce(value, world=3).world]
        if number == 2:
            return None
        while peers.group_size == 3:
            # What is of whoever is there goes on.
            with contextlib.suppress(PeerLost):
                peers.all_reduce(torch.ones(1))
        kept = value.clone()
        with pytest.raises(PeerLost, match="2 peers are left, and collective 0 is of 3"):
            peers.all_reduce(value, world=3)
        assert torch.equal(value, kept)
        with pytest.raises(Mismatch, match="2 peers are there, and collective 0 is of 1"):
            peers.all_reduce(value, world=1)
        return [*worlds, peers.all_reduce(value, world=2).world]

    assert together(master.address, 3, work) == [[3, 2], [3, 2], None]


def test_more_at_a_time_than_go_in_other_orders_are_told_and_nobody_hangs(master):
    """130 threads with a tag each: what would have to come first waits behind what does not come."""

    def work(number, peers):
        tags = list(range(130) if number else range(129, -1, -1))
        found = []

        def one(tag):
            try:
                found.append(peers.all_reduce(torch.ones(2), tag=tag).world)
            except CollectiveError as error:
                found.append(error)

        def many(tags):
            threads = [threading.Thread(target=one, args=(tag,), daemon=True) for tag in tags]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(BOUND_S)

        # As many as go at a time, none of which the other has: threads begin in any order.
        many(tags[:64])
        many(tags[64:])
        return found

    # Where a tag has failed at one before the other began it, it waits for nobody.
    for found in together(master.address, 2, work, wait_s=5):
        assert len(found) == 130
        told = [str(error) for error in found if isinstance(error, Mismatch)]
        assert len(told) >= 64
        assert all("in the same order" in why for why in told)


def test_who_closes_in_the_midst_of_a_collective_is_told_so(master):
    """Its thread once ended with what `select` says of a socket that is closed."""
    going = threading.Event()

    def work(number, peers):
        if number:
            # Its links stand, and nothing comes over them.
            peers._before = lambda name: name == "ring" and going.wait(BOUND_S)
            with pytest.raises(PeerLost):
                peers.all_reduce(torch.ones(1 << 20))
            return None
        is_there = threading.Event()
        peers._before = lambda name: is_there.set() if name == "ring" else None
        handle = peers.all_reduce_async(torch.ones(1 << 20))
        assert is_there.wait(BOUND_S)
        time.sleep(0.2)
        peers.close()
        going.set()
        return handle.exception(BOUND_S)

    found = together(master.address, 2, work, idle_s=BOUND_S)
    assert isinstance(found[0], CollectiveError)


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([torch.tensor([100, -128, 127], dtype=torch.int8)] * 3, [100, -128, 127]),
        ([torch.tensor([200, 255, 0], dtype=torch.uint8)] * 3, [200, 255, 0]),
        ([torch.tensor([2**31 - 1, -(2**31), -1], dtype=torch.int32)] * 3, [2**31 - 1, -(2**31), -1]),
        ([torch.tensor([2**63 - 1, -(2**63), -1])] * 3, [2**63 - 1, -(2**63), -1]),
        ([torch.tensor([value, -value]) for value in (2**62, 2**62 + 1, 2)], [(2**63 + 3) // 3, -(2**63 + 3) // 3]),
        ([torch.tensor([40000.0, -60000.0], dtype=torch.float16)] * 3, [40000.0, -60000.0]),
        ([torch.tensor([value], dtype=torch.int8) for value in (-1, 0, 0)], [-1]),
        ([torch.empty(0, dtype=torch.int64)] * 3, []),
    ],
    ids=lambda one: str(one[0].dtype) if one and isinstance(one[0], torch.Tensor) else "",
)
def test_a_mean_is_right_where_the_sum_is_too_large(master, values, mean):
    """They once wrapped: 100 and 100 in int8 had the mean -28."""

    def work(number, peers):
        given = values[peers.ring_order.index(peers.peer)]
        own, kept = given.clone(), given.clone()
        peers.all_reduce(own, op="avg")
        into = torch.zeros_like(given)
        peers.all_reduce(kept, into, op="avg")
        assert torch.equal(kept, given)
        return own.tolist(), into.tolist(), own.dtype == given.dtype

    assert together(master.address, 3, work) == [(mean, mean, True)] * 3


def test_a_view_of_negated_numbers_is_reduced(master):
    def work(number, peers):
        value = torch.tensor([1 + 2j, 3 + 4j]).conj().imag
        assert value.is_neg()
        peers.all_reduce(value)
        return value.tolist()

    assert together(master.address, 2, work) == [[-4.0, -8.0]] * 2


def test_more_at_a_time_than_the_master_takes_wait_for_each_other(master):
    """64 in threads and one beside them: legal, and it once had the peer dropped."""
    gate = threading.Event()

    def work(number, peers):
        if number:
            assert gate.wait(60)
        handles = [peers.all_reduce_async(torch.ones(2), tag=tag) for tag in range(64)]
        if not number:
            until(lambda: sum(len(member.initiates) for member in master.state.members.values()) >= 64)
            gate.set()
        peers.all_reduce(torch.ones(2), tag=99)
        return sum(handle.result().world for handle in handles)

    assert together(master.address, 2, work) == [128, 128]


def test_one_that_is_not_connected_says_so_and_one_that_is_connects_once(master):
    peers = Communicator(master.address)
    for call in (lambda: peers.all_reduce(torch.ones(1)), peers.are_peers_pending, lambda: peers.wait_for(1)):
        with pytest.raises(InputError, match="not connected"):
            call()
    with peers:
        number = peers.peer
        assert peers.connect() is peers
        assert (peers.peer, peers.ring_order) == (number, [number])
        assert peers.all_reduce(torch.ones(1)).alone
    with pytest.raises(InputError, match="was closed"):
        peers.connect()


def test_buffers_of_earlier_calls_are_kept_up_to_a_bound(master, monkeypatch):
    monkeypatch.setattr(part, "_MOST_KEPT", 100)

    def work(number, peers):
        for size in (5, 6, 7, 8, 9):
            peers.all_reduce(torch.ones(size))
        return [one.numel() for one in peers._kept]

    assert together(master.address, 1, work) == [[7, 8, 9]]


def test_what_an_older_verdict_says_of_the_ring_is_not_taken():
    """Verdicts of several collectives come in the order of the master, and are read by threads in any."""
    peers = part.Part(None, None, lambda name: None)
    peers._topology = {"epoch": 5, "ring": [[1, "h", 1, 1]], "world": 1, "groups": 1, "largest": 1}
    older = {
        "aborted": False,
        "epoch": 4,
        "ring": [[1, "h", 1, 1], [2, "h", 1, 1]],
        "world": 2,
        "groups": 1,
        "largest": 2,
    }
    peers._vote = lambda body: older
    assert not peers._verdict(part._Op(0, 0, 4), None)
    assert peers._topology["world"] == 1
    peers._vote = lambda body: {**older, "epoch": 6}
    peers._verdict(part._Op(0, 0, 4), None)
    assert peers._topology["world"] == 2


def test_who_does_not_take_what_it_is_sent_is_late_and_not_who_sent_before():
    """Of the two neighbours, the one that is waited for."""
    ours, previous = socket.socketpair()
    out, following = socket.socketpair()
    with ours, previous, out, following:
        wires = ring.Wires(out, ours, 7, 8, 0, 0, 0.2, lambda: None)
        value = torch.ones(1 << 15)
        # All of the previous one has come; the next takes nothing, and there is little room on the way to it.
        out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        previous.settimeout(60)
        previous.sendall(HEAD.pack(b"pccl", 2, 0, 0, value.numel()) + bytes(value.numel() * 4))
        with pytest.raises(LinkError, match="peer 7 did nothing") as told:
            ring.ring_all_reduce(value, "sum", 0, 2, wires, None)
        assert told.value.accused == 7
    ours, previous = socket.socketpair()
    out, following = socket.socketpair()
    wires = ring.Wires(out, ours, 7, 8, 0, 0, 0.2, lambda: None)
    with ours, previous, out, following, pytest.raises(LinkError, match="peer 8 did nothing") as told:
        ring.ring_all_reduce(torch.ones(4), "sum", 0, 2, wires, None)
    assert told.value.accused == 8


def test_an_offer_of_the_ring_that_stands_is_closed():
    """Its links are there; one more is of nobody."""
    links = Links(b"", 1.0, None)
    links.epoch = 5
    for epoch, is_kept in ((4, False), (5, False), (6, True)):
        mine, other = socket.socketpair()
        with mine, other:
            links.offer(mine, {"epoch": epoch, "from": 1, "index": 0})
            assert (mine.fileno() >= 0) == is_kept
    links.close()
