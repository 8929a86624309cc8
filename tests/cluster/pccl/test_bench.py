"""What links bear: times of the slowest peer, equal on all; bytes by the formula; wrong sums and settings that differ are told."""

import math

import pytest
import torch

from anabranch.cluster.pccl import PeerLost, Quantiser
from anabranch.cluster.pccl.bench import Timing, _check, bench_here
from anabranch.cluster.pccl.bench import bench as measured
from anabranch.cluster.pccl.faults import CollectiveError
from anabranch.errors import InputError
from pccl_peers import Killed, Peer, a_master, together


def test_rates_and_their_spread():
    timing = Timing(1_000_000_000, 2, (1.0, 0.5, 0.25, 0.2, 0.1), 2_000_000_000)
    assert (timing.rate(), timing.rate(0.0), timing.rate(1.0)) == (4.0, 1.0, 10.0)
    assert (timing.rate(0.25), timing.rate(0.75)) == (2.0, 5.0)
    assert timing.spread == 0.75
    assert timing.link_rate == 8.0
    assert timing.to_dict()["gb_per_s_quartiles"] == [2.0, 5.0]


@pytest.mark.parametrize(
    ("world", "quantise", "connections"),
    [(2, None, 1), (3, None, 3), (3, "min_max", 2), (2, Quantiser("zero_point", 16), 1)],
)
def test_all_peers_report_the_same(world, quantise, connections):
    sizes = [4, 48_000]
    with a_master() as master:
        found = together(
            master.address,
            world,
            lambda number, peers: measured(
                peers, world=world, sizes=sizes, rounds=3, connections=connections, quantise=quantise, links_s=0.02
            ),
            pool=connections,
        )
    first = found[0]
    assert all(
        (one.timings, one.peers, one.latency_s) == (first.timings, first.peers, first.latency_s) for one in found
    )
    assert sorted(one.me for one in found) == sorted(number for number, _ in first.peers) == list(range(world))
    for timing, size in zip(first.timings, sizes, strict=True):
        assert (timing.size_bytes, timing.world, len(timing.seconds)) == (size, world, 3)
        assert min(timing.seconds) > 0
    # Around the ring each peer sends 2 (N - 1) / N of the buffer, in chunks with headers.
    numbers = sizes[1] // 4
    width = 4 if quantise is None else 1 if quantise == "min_max" else 2
    ideal = 2 * (world - 1) / world * numbers * width
    assert ideal <= first.timings[1].sent_bytes <= ideal * 1.1
    assert first.rates is not None
    assert found[1].rates is not None
    for row, (line, again) in enumerate(zip(first.rates, found[1].rates, strict=True)):
        for column, (rate, same) in enumerate(zip(line, again, strict=True)):
            assert math.isnan(rate) if row == column else rate == same > 0


@pytest.mark.slow
def test_processes_of_this_machine():
    found = bench_here(2, sizes=[4096], rounds=2)
    assert len(found.timings[0].seconds) == 2
    assert found.rates is None
    assert found.to_dict()["peers"] == [{"peer": number, "host": "127.0.0.1"} for number, _ in found.peers]


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"rounds": 3}, "rounds"),
        ({"sizes": [8]}, "sum of the sizes"),
        ({"sizes": [4, 16, 12]}, "sizes' hash"),
        ({"quantise": "min_max"}, "quantisation"),
        ({"links_s": 0.5}, "milliseconds"),
    ],
)
def test_values_that_differ_are_told_on_all(other, name):
    values = {"world": 2, "sizes": [4, 12, 16] if len(other.get("sizes", ())) == 3 else [16], "rounds": 2}
    told = []

    def work(number, peers):
        with pytest.raises(InputError, match="different things") as caught:
            measured(peers, **{**values, **(other if number else {})})
        told.append(str(caught.value))

    with a_master() as master:
        together(master.address, 2, work)
    assert len(told) == 2
    assert all(name in line for line in told)


@pytest.mark.parametrize("collectives", [1, 5, 25, 60])
def test_a_peer_that_goes_away_ends_it_for_the_others(collectives):
    """No table of fewer peers than were asked for, wherever it went; latencies went on alone, and so did all that came after them."""
    left = [collectives]

    def dies(name):
        left[0] -= name == "ring"
        if not left[0]:
            raise Killed

    def work(number, peers):
        if number == 1:
            peers._before = dies
        measured(peers, world=3, sizes=[4096, 64], rounds=10)

    with a_master() as master:
        found = [Peer(master.address, work, number, 3).wait for number in range(3)]
        first, gone, last = [wait() for wait in found]
    assert gone.is_killed
    assert isinstance(first.error, PeerLost)
    assert isinstance(last.error, PeerLost)


def test_a_wrong_sum_is_told():
    value = torch.arange(300, dtype=torch.float32).remainder(251)
    _check(3 * value, value, 2, None)
    with pytest.raises(CollectiveError, match="wrong by 1, and at most 0"):
        _check(3 * value + (torch.arange(300) == 17), value, 2, None)
    with pytest.raises(CollectiveError, match="wrong by nan"):
        _check(value * math.nan, value, 2, Quantiser())
    _check(3 * value + 2.9, value, 2, Quantiser())
    with pytest.raises(CollectiveError):
        _check(3 * value + 7, value, 2, Quantiser())


@pytest.mark.parametrize(
    "wrong",
    [
        {"world": 1},
        {"world": 257},
        {"sizes": []},
        {"sizes": [3]},
        {"sizes": [4.0]},
        {"sizes": [1 << 40]},
        {"rounds": 0},
        {"connections": 0},
        {"connections": 65},
        {"links_s": 0.0},
        {"links_s": math.nan},
        {"quantise": "much"},
    ],
)
def test_what_cannot_be_measured(wrong):
    with pytest.raises(InputError):
        measured(None, **{"world": 2, **wrong})


@pytest.mark.parametrize("wrong", [1, 65, 2.0])
def test_processes_that_are_none(wrong):
    with pytest.raises(InputError, match="peers is"):
        bench_here(wrong)
