"""What the links between peers bear: how long an all-reduce of so many bytes takes over them, and how fast each sends to each.

    with Communicator("10.0.0.1:48148", pool=4) as peers:         # on every machine, with the same numbers
        found = bench(peers, world=3, sizes=[1 << 24], connections=4, quantise="min_max")
    found.timings[0].rate()                                        # GB/s; the same on every peer

    found = bench_here(3, sizes=[1 << 24])                         # three processes of this machine

A round is over when the slowest peer has its result; that time is what all peers report. Every result is compared with the sum that it
must be, or with what the quantiser may make of it.
"""
# Shapes: X numbers of a buffer, S settings, P peers

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from anabranch.bounds import shown
from anabranch.cluster.pccl.checks import check_flood, check_settings
from anabranch.cluster.pccl.communicator import Communicator
from anabranch.cluster.pccl.faults import CollectiveError, TopologyFailed
from anabranch.cluster.pccl.master import Master
from anabranch.cluster.pccl.part import Reduced, Reduction, quantiser_of
from anabranch.cluster.pccl.quantise import Quantiser
from anabranch.cluster.ranks import RankError, run_ranks
from anabranch.errors import InputError

__all__ = ["Bench", "Timing", "bench", "bench_here"]

MOST_SIZE, MOST_ROUNDS, MOST_PEERS = 1 << 34, 10_000, 64
_NUMBER_BYTES = 4
# Numbers that are summed are whole and below this, so that float32 holds every sum of 256 peers exactly.
_PATTERN = 251
_MOST_LATENCIES = 100
# Tries to form the ring: a machine may come late.
_TRIES = 8
# Of processes on this machine that wait for each other to begin.
_LOCAL_WAIT_S = 120.0
_LOCAL_BOUND_S = 86_400.0


@dataclass(frozen=True)
class Timing:
    """All-reduces of one size.

    Attributes:
        size_bytes: of the buffer, as float32.
        world: peers that took part.
        seconds: of each round, of the slowest peer.
        sent_bytes: that the peer which sent most put on the wire in a round.
    """

    size_bytes: int
    world: int
    seconds: tuple[float, ...]
    sent_bytes: int

    def rate(self, share: float = 0.5) -> float:
        """GB/s (1e9) of the buffer; ``share`` of all rounds were as fast or slower, by default the median."""
        ordered = sorted(self.size_bytes / seconds / 1e9 for seconds in self.seconds)
        place = share * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low + (high - low) * (place - math.floor(place))

    @property
    def spread(self) -> float:
        """Between the quartiles of the rounds' GB/s, as a share of the median."""
        return (self.rate(0.75) - self.rate(0.25)) / self.rate()

    @property
    def link_rate(self) -> float:
        """GB/s that the busiest peer sent to its neighbour, on average over a median round."""
        return self.sent_bytes / statistics.median(self.seconds) / 1e9

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "size_bytes": self.size_bytes,
            "world": self.world,
            "seconds": list(self.seconds),
            "sent_bytes": self.sent_bytes,
            "gb_per_s": self.rate(),
            "gb_per_s_quartiles": [self.rate(0.25), self.rate(0.75)],
            "spread": self.spread,
            "link_gb_per_s": self.link_rate,
        }


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        peers: ``(number, host)`` of each, in the order of the ring.
        me: this peer's number.
        latency_s: of an all-reduce of one number, the median.
        timings: of each size.
        rates: Mbit/s from each peer (row) to each (column), in the order of ``peers``; NaN from a peer to itself, and where a link could
            not be measured. None where links were not measured.
    """

    peers: tuple[tuple[int, str], ...]
    me: int
    latency_s: float
    timings: tuple[Timing, ...]
    rates: tuple[tuple[float, ...], ...] | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "peers": [{"peer": number, "host": host} for number, host in self.peers],
            "me": self.me,
            "latency_s": self.latency_s,
            "timings": [timing.to_dict() for timing in self.timings],
            "mbit_per_s": None if self.rates is None else [list(row) for row in self.rates],
        }


def bench(
    peers: Communicator,
    *,
    world: int,
    sizes: Sequence[int] = (1 << 20, 1 << 24, 1 << 26),
    rounds: int = 10,
    connections: int = 1,
    quantise: Quantiser | str | None = None,
    links_s: float | None = None,
) -> Bench:
    """Measure with the other peers of a run that does nothing else; all call it with the same values.

    Args:
        peers: connected, with a ``pool`` of ``connections``.
        world: begin when so many are there.
        sizes: bytes of the buffers, which hold float32: multiples of 4.
        rounds: of each size, after one that is not counted.
        connections: a buffer goes in so many parts, each by a connection of its own.
        quantise: as of `Communicator.all_reduce`.
        links_s: first flood each link, one way after the other, for so many seconds, and take the best ring. None does not.

    Raises InputError for values that are none and, on all peers, for values that differ between them; PeerLost where a peer goes away;
    CollectiveError where a sum is wrong.
    """
    check_bench(world, sizes, rounds, connections, links_s)
    made = quantiser_of(quantise)
    peers.wait_for(world)
    group = _Group(peers, peers.group_size)
    group.agree(_settings(world, sizes, rounds, connections, made, links_s))
    rates = None if links_s is None else group.links(links_s)
    latency = [group.latency() for _ in range(min(rounds, _MOST_LATENCIES) + 1)][1:]
    timings = tuple(group.time(size, rounds, connections, made) for size in sizes)
    return Bench(tuple(peers.places.items()), peers.peer, statistics.median(latency), timings, rates)


def bench_here(world: int, **values: Any) -> Bench:
    """The same between ``world`` processes of this machine, which are started for it; ``values`` as of `bench`.

    Raises InputError for values that are none, CollectiveError where a process failed.
    """
    if type(world) is not int or not 2 <= world <= MOST_PEERS:
        raise InputError(f"peers is {shown(world)}; use 2 to {MOST_PEERS}")
    with Master("127.0.0.1:0") as master:
        try:
            found = run_ranks(peer_of_bench, world, master.address, values, backend=None, timeout_s=_LOCAL_BOUND_S)
        except RankError as error:
            raise CollectiveError(f"a process failed: {error.why}") from None
    made: Bench = found[0]
    return made


def peer_of_bench(rank: int, world: int, address: str, values: dict[str, Any]) -> Bench:
    """A process of `bench_here`."""
    with Communicator(address, pool=values.get("connections", 1), wait_s=_LOCAL_WAIT_S, master_returns=False) as peers:
        return bench(peers, world=world, **values)


def check_bench(world: int, sizes: Sequence[int], rounds: int, connections: int, links_s: float | None) -> None:
    """Raises InputError for what cannot be measured."""
    check_settings(0, connections, {})
    if type(world) is not int or not 2 <= world <= 256:
        raise InputError(f"peers is {shown(world)}; use 2 to 256")
    for size in sizes:
        if type(size) is not int or not _NUMBER_BYTES <= size <= MOST_SIZE or size % _NUMBER_BYTES:
            raise InputError(f"a buffer of {shown(size)} bytes; use 4 bytes to 16 GiB, a multiple of 4 (float32)")
    if not sizes or len(sizes) > 64:
        raise InputError(f"there are {len(sizes)} sizes; use 1 to 64")
    if type(rounds) is not int or not 1 <= rounds <= MOST_ROUNDS:
        raise InputError(f"rounds is {shown(rounds)}; use 1 to {MOST_ROUNDS}")
    if links_s is not None:
        check_flood(links_s, 1)


def _settings(
    world: int, sizes: Sequence[int], rounds: int, connections: int, made: Quantiser | None, links_s: float | None
) -> dict[str, int]:
    """What must be the same on all peers, as whole numbers."""
    written = hashlib.sha256(",".join(map(str, sizes)).encode()).digest()
    kinds = ("min_max", "zero_point")
    return {
        "peers": world,
        "rounds": rounds,
        "connections": connections,
        "quantisation (0 none, 1 min_max, 2 zero_point)": 0 if made is None else 1 + kinds.index(made.kind),
        "bits": 32 if made is None else made.bits,
        "milliseconds of a flood": 0 if links_s is None else max(round(links_s * 1000), 1),
        "sizes": len(sizes),
        "sum of the sizes": sum(sizes),
        "sizes' hash": int.from_bytes(written[:7], "big"),
    }


@dataclass(frozen=True)
class _Group:
    """Those who measure.

    Attributes:
        peers: this peer among them.
        world: how many they are: one less is the end, rather than numbers of fewer.
    """

    peers: Communicator
    world: int

    def reduce(self, send: Tensor, op: str = "sum") -> Tensor:
        """The result of a small one, which nobody times."""
        found = torch.empty_like(send)
        self.peers.all_reduce(send, found, op=op, world=self.world)
        return found

    def agree(self, settings: dict[str, int]) -> None:
        """Raises InputError on all peers where one was told another value."""
        mine_S = torch.tensor(list(settings.values()), dtype=torch.int64)
        low_S, high_S = self.reduce(mine_S, "min"), self.reduce(mine_S, "max")
        for (name, mine), low, high in zip(settings.items(), low_S.tolist(), high_S.tolist(), strict=True):
            if low != high:
                raise InputError(
                    f"the peers of this measurement were told different things: {name} is {mine} here, and {low} to {high} among "
                    "them; start all with the same values"
                )

    def links(self, seconds: float) -> tuple[tuple[float, ...], ...]:
        """Mbit/s from each peer to each, in the order of the new ring."""
        told: dict[int, float] = {}
        for attempt in range(_TRIES):
            try:
                told |= self.peers.optimize_topology(seconds=seconds)
                break
            except TopologyFailed:
                if attempt + 1 == _TRIES:
                    raise
        order = self.peers.ring_order
        mine_PP = torch.zeros(len(order), len(order), dtype=torch.float64)
        for place, other in enumerate(order):
            mine_PP[order.index(self.peers.peer), place] = told.get(other, 0.0)
        rates = self.reduce(mine_PP).tolist()
        return tuple(tuple(rate or math.nan for rate in row) for row in rates)

    def latency(self) -> float:
        """Seconds of an all-reduce of one number."""
        one = torch.ones(1)
        began = time.perf_counter()
        self.peers.all_reduce(one, world=self.world)
        return self.slowest(time.perf_counter() - began)

    def slowest(self, seconds: float) -> float:
        """The most that any peer says; after it all are here."""
        return float(self.reduce(torch.tensor([seconds], dtype=torch.float64), "max"))

    def time(self, size: int, rounds: int, connections: int, made: Quantiser | None) -> Timing:
        """All rounds of one size."""
        share = 1 + self.peers.ring_order.index(self.peers.peer)
        value_X = torch.arange(size // _NUMBER_BYTES, dtype=torch.float32).remainder_(_PATTERN)
        buffer_X = torch.empty_like(value_X)
        seconds: list[float] = []
        sent = 0
        for number in range(rounds + 1):
            torch.mul(value_X, share, out=buffer_X)
            self.slowest(0.0)
            before, began = self.peers.sent_bytes, time.perf_counter()
            parts = _parts(buffer_X, connections, made, self.world)
            for done in self.peers.all_reduce_many(parts, max_in_flight=connections, attempts=1):
                if not isinstance(done, Reduced):
                    raise done
            taken = time.perf_counter() - began
            sent = max(sent, self.peers.sent_bytes - before)
            _check(buffer_X, value_X, self.world, made)
            slowest = self.slowest(taken)
            if number:
                seconds.append(slowest)
        return Timing(size, self.world, tuple(seconds), int(self.slowest(float(sent))))


def _parts(buffer_X: Tensor, connections: int, made: Quantiser | None, world: int) -> list[Reduction]:
    """One collective for each connection, over about as many numbers each."""
    ends = [buffer_X.numel() * number // connections for number in range(connections + 1)]
    pieces = [(low, high) for low, high in pairwise(ends) if low < high]
    return [
        Reduction(buffer_X[low:high], quantise=made, tag=tag, world=world) for tag, (low, high) in enumerate(pieces)
    ]


def _check(buffer_X: Tensor, value_X: Tensor, world: int, made: Quantiser | None) -> None:
    """Raises CollectiveError for a sum that is not what it must be."""
    whole = world * (world + 1) // 2
    # Each of the ring's steps rounds once, to one of the quantiser's steps over a range that is at most the sums'.
    allowed = 0.0 if made is None else world * whole * (_PATTERN - 1) / made.steps
    wrong = float((buffer_X - whole * value_X).abs().max())
    if not wrong <= allowed:
        raise CollectiveError(f"a sum is wrong by {wrong:g}, and at most {allowed:g} is rounded away")
