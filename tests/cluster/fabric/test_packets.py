import heapq
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.cluster.fabric import (
    SCHEMES,
    Flows,
    LinkEvent,
    PacketConfig,
    Topology,
    collective_flows,
    kernels,
    loads,
    packet_kernels,
    packet_state,
    packets,
    plan,
    simulate,
    simulate_packets,
)
from anabranch.errors import CapacityError, ConfigError, InputError

# 8 Gbit/s are a byte a nanosecond.
PLAIN = PacketConfig(payload=1000, header=0, window=1000, ecn_kb=1e6)
NS = 1e-9


def line(hosts=1, spines=1, **speeds):
    return Topology.leaf_spine(2, spines, hosts, **{"cap_up": 8, "cap_host": 8, **speeds})


def at_once(made):
    """The plan without start delays, which make numbers odd."""
    return replace(made, delay_ns_Q=np.zeros_like(made.delay_ns_Q))


def run(rows, topology, config=PLAIN, scheme="whole", **options):
    return simulate_packets(at_once(plan(Flows.of(rows), topology, scheme)), config, **options)


# By hand


def test_a_packet_by_hand():
    # Four links, each 1000 ns to send and 500 ns of latency.
    found = run([(0, 1, 1000)], line())
    assert found.completion_s == pytest.approx(6000 * NS, rel=1e-12)
    assert (found.packets, found.hops, found.marked, found.resent) == (1, 4, 0, 0)
    # With a header of 64 bytes, and 300 of payload: 364 ns a link.
    found = run([(0, 1, 300)], line(), PLAIN.replace(header=64))
    assert found.completion_s == pytest.approx(4 * 864 * NS, rel=1e-12)


def test_packets_follow_each_other():
    # The last of ten leaves after 10 us, and then takes three more links and four latencies.
    assert run([(0, 1, 10_000)], line()).completion_s == pytest.approx((10_000 + 3000 + 2000) * NS, rel=1e-12)
    # A slow uplink of 2 Gbit/s: 4000 ns a packet there.
    found = run([(0, 1, 10_000)], line(cap_up=2))
    assert found.completion_s == pytest.approx((1500 + 10 * 4000 + 500 + 4500 + 1500) * NS, rel=1e-12)


def test_a_window_of_one_waits_for_each_acknowledgement():
    # 6000 ns there and 4 x 500 back: 8000 for each but the last.
    found = run([(0, 1, 3000)], line(), PLAIN.replace(window=1, gain=1e-9, ecn_kb=0))
    # Marks at every queue: none waits longer than nothing, so nothing is marked, and the window grows by one a round.
    assert found.completion_s == pytest.approx((8000 + 6000 + 1000) * NS, rel=1e-12)


def test_two_senders_to_one_host_share_its_cable():
    # Ten packets each: the first is at the last link after 4500 ns, and twenty of 1000 ns follow.
    found = run([(0, 2, 10_000), (1, 2, 10_000)], line(hosts=2, spines=2))
    assert found.completion_s == pytest.approx((4500 + 20_000 + 500) * NS, rel=1e-12)


def test_a_host_takes_turns():
    # Flows of three packets to two hosts: the first begins when there is nobody else, and goes to the end of the line, which is empty;
    # so they leave as 1, 1, 2, 1, 2, 2, and the first is through after four.
    found = run([(0, 2, 3000), (0, 3, 3000)], line(hosts=2))
    assert found.finish_F == pytest.approx([(4000 + 3000 + 2000) * NS, (6000 + 3000 + 2000) * NS], rel=1e-12)


def test_steps_follow_each_other():
    # Rank 1 answers when it has what came: 6000 ns each way.
    found = run([(0, 1, 1000, 0), (1, 0, 1000, 1)], line())
    assert found.finish_F == pytest.approx([6000 * NS, 12_000 * NS], rel=1e-12)
    # Rank 0 goes on when its own packet is acknowledged, 2000 ns later.
    found = run([(0, 1, 1000, 0), (0, 1, 1000, 1)], line())
    assert found.finish_F == pytest.approx([6000 * NS, 14_000 * NS], rel=1e-12)


def test_windows_follow_each_other():
    # 6000 ns there and 2000 for the acknowledgement, then the next leaf's turn.
    topology = Topology.leaf_spine(3, 1, 1, cap_up=8, cap_host=8)
    made = at_once(plan(Flows.of([(0, 1, 1000), (0, 2, 1000)]), topology, "whole", window=1))
    assert sorted(simulate_packets(made, PLAIN).finish_F) == pytest.approx([6000 * NS, 14_000 * NS], rel=1e-12)


# Against a naive loop


def naive(made, header):
    """One packet a flow, no window: hosts send in order, links are first come first served. Seconds of each flow."""
    topology, flows = made.topology, made.flows
    free_at, finish, events = {}, {}, []
    for number, piece in enumerate(made):
        leaf, to = int(topology.leaf_H[piece.src]), int(topology.leaf_H[piece.dst])
        fabric = topology.paths(leaf, to)[piece.path].tolist()
        route = [int(topology.host_up_H[piece.src]), *fabric, int(topology.host_down_H[piece.dst])]
        events.append((0, number, route, piece.size + header))
    heapq.heapify(events)
    while events:
        now, number, route, size = heapq.heappop(events)
        if not route:
            finish[number] = now
            continue
        takes = round(size * 8e12 / int(topology.capacity_L[route[0]]))
        free_at[route[0]] = max(now, free_at.get(route[0], 0)) + takes
        heapq.heappush(events, (free_at[route[0]] + topology.latency_ns * 1000, number, route[1:], size))
    seconds = [0.0] * len(flows)
    for number, flow in enumerate(made.flow_Q.tolist()):
        seconds[flow] = max(seconds[flow], finish[number] / 1e12)
    return seconds


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from(["ecmp", "whole", "greedy"]))
def test_single_packets_end_when_the_naive_loop_says(seed, scheme):
    random = np.random.default_rng(seed)
    topology = Topology.leaf_spine(3, 2, 2, cap_up=float(random.uniform(1, 20)), cap_host=float(random.uniform(1, 20)))
    pairs = random.integers(0, 6, (int(random.integers(1, 30)), 2))
    # Sizes of many digits: no two events are at one time, whose order would be a matter of taste.
    rows = [(int(a), int(b), int(random.integers(10**6, 10**9))) for a, b in pairs if a != b]
    made = at_once(plan(Flows.of(rows), topology, scheme, seed=seed))
    config = PacketConfig(payload=1_000_000, header=77, window=1000, ecn_kb=1e9, buffer_mb=1e6, rto_us=1e9)
    # A packet is at most a megabyte.
    made = replace(made, size_Q=made.size_Q % 1_000_000 + 1)
    assert simulate_packets(made, config).finish_F.tolist() == pytest.approx(naive(made, 77), rel=1e-12)


# Whatever happens, every byte is there


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(SCHEMES),
    st.sampled_from(["any-order", "go-back-n"]),
    st.integers(0, 1000),
    st.sampled_from([1e6, 20.0, 3.0]),
)
def test_every_flow_ends_and_nothing_is_sent_for_nothing(scheme, receiver, seed, buffer_kb):
    random = np.random.default_rng(seed)
    topology = Topology.leaf_spine(3, 3, 2, cap_up=10, cap_host=10)
    rows = [
        (int(a), int(b), int(random.integers(1, 15_000)), int(s))
        for a, b, s in random.integers(0, 6, (10, 3))
        if a != b
    ]
    config = PacketConfig(receiver=receiver, payload=1000, header=40, buffer_mb=buffer_kb / 1e3, ecn_kb=5.0, rto_us=200)
    made = plan(Flows.of(rows), topology, scheme, seed=seed)
    found = simulate_packets(made, config, seed=seed, most_s=1.0)
    assert (found.finish_F > 0).all()
    assert found.completion_s == found.finish_F.max(initial=0.0)
    assert found.packets == sum(-(-size // 1000) for size in made.size_Q.tolist())
    if not found.dropped and not found.resent and scheme not in ("spray", "reps"):
        expected = loads(replace(made, size_Q=made.size_Q + 40 * -(-made.size_Q // 1000)))
        np.testing.assert_allclose(found.bytes_L, expected, rtol=1e-12)
    again = simulate_packets(made, config, seed=seed)
    assert (again.finish_F == found.finish_F).all()


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["spray", "reps"]), st.integers(0, 1000), st.sampled_from([15, 30, 60]))
def test_every_flow_ends_where_acknowledgements_come_behind_a_time_out(scheme, seed, rto_us):
    """A packet that was given up and is heard of late was counted as one that flew, and nobody waited for the last that did."""
    topology, flows = Topology.leaf_spine(2, 4, 3, cap_up=5, cap_host=10), collective_flows("all-to-all", 6, 100_000)
    config = PacketConfig(payload=1000, header=40, ecn_kb=5.0, rto_us=rto_us)
    made = plan(flows, topology, scheme, seed=seed)
    found = simulate_packets(made, config, events=[LinkEvent("leaf0-spine1")], seed=seed, most_s=10.0)
    assert (found.finish_F > 0).all()
    assert found.timeouts > 0


def test_a_full_buffer_drops_and_what_is_lost_is_sent_again():
    config = PacketConfig(payload=1000, header=0, window=64, buffer_mb=0.01, ecn_kb=1e6, rto_us=100)
    found = run([(host, 4, 64_000) for host in range(4)], line(hosts=4, spines=4), config)
    assert found.dropped > 0
    assert found.timeouts > 0
    assert found.resent >= found.dropped


def test_marks_make_windows_small_and_queues_short():
    rows = [(host, 8, 200_000) for host in range(8)]
    slow = PacketConfig(payload=1000, header=0, window=20, buffer_mb=0.2, ecn_kb=1e6, rto_us=1e5)
    marked = slow.replace(ecn_kb=20.0)
    without, with_marks = (run(rows, line(hosts=8, spines=8), config) for config in (slow, marked))
    assert (without.marked, with_marks.dropped) == (0, 0)
    assert without.dropped > 0
    assert with_marks.marked > 0
    # The receiver's cable is never idle: 1.6 MB at a byte a nanosecond.
    assert with_marks.completion_s == pytest.approx(1.6e-3, rel=0.02)


def test_spraying_is_out_of_order_and_receivers_may_mind():
    # Other flows make queues of different length on the two paths.
    rows = [(0, 4, 200_000), (1, 5, 100_000), (2, 6, 70_000)]
    topology = line(hosts=4, spines=2, cap_up=6)
    patient = run(rows, topology, PacketConfig(payload=1000, header=0), "spray")
    strict = run(rows, topology, PacketConfig(payload=1000, header=0, receiver="go-back-n"), "spray")
    pinned = run(rows, topology, PacketConfig(payload=1000, header=0, receiver="go-back-n"), "wrap")
    assert (patient.out_of_order, patient.resent) == (0, 0)
    assert strict.out_of_order > 0
    assert strict.resent > 0
    assert strict.completion_s > 1.1 * patient.completion_s
    assert (pinned.out_of_order, pinned.resent) == (0, 0)


def test_a_pinned_flow_leaves_a_path_that_times_out():
    made = at_once(plan(Flows.of([(0, 1, 10_000)]), line(spines=2), "whole"))
    spine = int(made.path_Q[0])
    failure = LinkEvent(f"leaf0-spine{spine}", at_us=3.2)
    found = simulate_packets(made, PLAIN.replace(rto_us=500), events=[failure])
    # Two of ten came through; the last acknowledgement is there by 7 + 2 us, and 500 us later the rest goes another way, one packet,
    # two, four and one, 8 us a round.
    assert (found.timeouts, found.moved, found.lost) == (1, 1, 8)
    assert found.completion_s == pytest.approx((9000 + 500_000 + 3 * 8000 + 6000) * NS, rel=1e-3)


def test_a_flow_without_another_path_waits_for_its_own():
    failure, repair = LinkEvent(("leaf0", "spine0")), LinkEvent(("leaf0", "spine0"), at_us=1700, works=True)
    found = run([(0, 1, 3000)], line(), PLAIN.replace(rto_us=500), events=[failure, repair])
    assert (found.timeouts, found.moved) == (4, 0)
    assert found.completion_s > 2e-3
    with pytest.raises(
        InputError, match=r"1 of 1 pieces were not through after .* from host 0 to 1; does a path to it work"
    ):
        run([(0, 1, 3000)], line(), PLAIN, events=[failure], most_s=0.01)


def test_a_host_that_nothing_reaches_is_given_up():
    with pytest.raises(InputError, match="1 of 2 pieces were not through"):
        run([(0, 2, 3000), (1, 3, 3000)], line(hosts=2), PLAIN.replace(rto_us=100), events=[LinkEvent("host2-leaf1")])
    # One that is repaired after longer than that is waited for.
    repair = LinkEvent("host2-leaf1", at_us=3e5, works=True)
    found = run([(0, 2, 3000)], line(hosts=2), PLAIN.replace(rto_us=100), events=[LinkEvent("host2-leaf1"), repair])
    assert 0.3 < found.completion_s < 0.301
    assert found.timeouts == 3000


CARDS = [{}, {"receiver": "go-back-n"}, {"card": "fifo"}, {"ack_bytes": 54}]


@pytest.mark.parametrize("options", CARDS, ids=str)
@pytest.mark.parametrize("scheme", ["ecmp", "spray", "reps", "ethereal"])
@pytest.mark.parametrize(("speed", "num_bytes"), [(1e-6, 4000), (1e-6, 400_000), (1e-3, 400_000), (0.1, 4_000_000)])
def test_cables_of_any_speed_are_waited_for(speed, num_bytes, scheme, options):
    """A packet takes up to a minute there, and a time-out of a millisecond would send it thousands of times."""
    topology = Topology.leaf_spine(2, 1, 2, cap_up=speed)
    made = plan(collective_flows("all-to-all", 4, num_bytes), topology, scheme)
    found, least_s = simulate_packets(made, PacketConfig(**options)), simulate(made).completion_s
    assert least_s * (1 - 1e-9) < found.completion_s < 1.5 * least_s
    assert found.resent < 20 * found.packets


def test_a_cable_that_fails_behind_a_slow_one_is_told_in_the_end():
    topology = Topology.leaf_spine(2, 1, 2, cap_up=1e-3)
    made = plan(collective_flows("all-to-all", 4, 40_000), topology, "ecmp")
    with pytest.raises(InputError, match=r"of 12 pieces were not through after .* does a path to it work"):
        simulate_packets(made, events=[LinkEvent("host2-leaf1")])


def test_recycled_paths_avoid_what_failed():
    topology, failure = line(hosts=4, spines=4), LinkEvent("spine1-leaf1")
    rows = [(host, 4 + host, 300_000) for host in range(4)]
    config = PacketConfig(payload=1000, header=0, rto_us=300)
    spray, reps = (run(rows, topology, config, scheme, events=[failure]) for scheme in ("spray", "reps"))
    assert 0 < reps.lost < 0.5 * spray.lost
    assert reps.completion_s < spray.completion_s


def test_recycled_paths_are_used_in_the_order_in_which_they_came():
    state, _ = packet_state.make_state(plan(Flows.of([(0, 1, 10)]), line(spines=4), "reps"), constants("reps"), 1, 8)
    chosen = []
    for step in (
        "put 2",
        "put 0",
        "take",
        "put 3",
        "take",
        "take",
        *(f"put {way}" for way in (0, 1, 2, 3, 0, 1, 2, 3, 1)),
        "take",
        "take",
    ):
        if step == "take":
            chosen.append(int(packet_kernels.choose_row(state, constants("reps"), 0)))
        else:
            packet_kernels.recycle(state, 0, int(step[-1]))
    # Of nine that came last the first made room.
    assert chosen == [2, 0, 3, 1, 2]
    assert state.pieces.cached[0] == 6


def constants(scheme):
    return packets.constants_of(plan(Flows.of([(0, 1, 10)]), line(spines=4), scheme), PacketConfig())


def test_ethereal_ends_when_spraying_does():
    topology = Topology.leaf_spine(4, 4, 4, cap_up=10, cap_host=10)
    flows = collective_flows("all-to-all", 16, 16 * 36_000)
    times = {
        scheme: simulate_packets(plan(flows, topology, scheme)).completion_s for scheme in ("ecmp", "ethereal", "spray")
    }
    assert times["ethereal"] < 1.05 * times["spray"]
    assert times["ethereal"] < times["ecmp"]


def test_arrays_grow_when_they_must(monkeypatch):
    topology, flows = (
        Topology.leaf_spine(2, 2, 4, cap_up=10, cap_host=10),
        collective_flows("all-to-all", 8, 8 * 30_000),
    )
    made = plan(flows, topology, "spray")
    usual = simulate_packets(made, seed=4)
    monkeypatch.setattr(packets, "ROOM", 2)
    monkeypatch.setattr(packets, "TURN", 7)
    heard = []
    grown = simulate_packets(made, seed=4, progress=lambda done, pieces: heard.append((done, pieces)))
    assert (grown.finish_F == usual.finish_F).all()
    assert heard[-1] == (56, 56)
    assert heard == sorted(heard)


@pytest.mark.slow
@pytest.mark.parametrize("receiver", ["any-order", "go-back-n"])
def test_the_same_comes_out_compiled(receiver, monkeypatch):
    """The loops are the same lines on arrays or on plain objects. (Compiling takes seconds, once per machine.)"""
    pytest.importorskip("numba")
    topology, flows = Topology.leaf_spine(3, 2, 2, cap_up=7, cap_host=10), collective_flows("all-to-all", 6, 120_000)
    config = PacketConfig(payload=1000, receiver=receiver, ecn_kb=4.0, buffer_mb=0.02, rto_us=150)
    failure = [LinkEvent("leaf0-spine1", at_us=30), LinkEvent("leaf0-spine1", at_us=900, works=True)]
    monkeypatch.setattr(packets, "ROOM", 8)
    for scheme in ("ecmp", "wrap", "spray", "reps"):
        made, found = plan(flows, topology, scheme), []
        for few in (1e18, -1):
            monkeypatch.setattr(kernels, "FEW", few)
            found.append(simulate_packets(made, config, events=failure))
        interpreted, compiled = (vars(one) for one in found)
        for name, value in interpreted.items():
            assert np.array_equal(value, compiled[name]), name


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: PacketConfig(payload=0), ConfigError, "payload is 0"),
        (lambda: PacketConfig(receiver="any"), ConfigError, "receiver is 'any'"),
        (lambda: PacketConfig(rto_us=float("nan")), ConfigError, "rto_us is nan"),
        (lambda: PacketConfig(window=0.5), ConfigError, "window is 0.5"),
        (lambda: run([(0, 1, 10)], line(), events=[LinkEvent("leaf0-spine7")]), InputError, "no node 'spine7'"),
        (lambda: run([(0, 1, 10)], line(), seed=-1), InputError, "seed is -1"),
        (lambda: run([(0, 1, 10)], line(), most_s=float("nan")), InputError, "most_s is nan"),
        (lambda: LinkEvent("leaf0-spine0", at_us=float("inf")), InputError, "at_us is inf"),
        (lambda: LinkEvent("leaf0-spine0", at_us=-1), InputError, "at_us is -1"),
        (
            lambda: run([(0, 1, 2**40)], line(), PLAIN.replace(payload=1)),
            CapacityError,
            "more than 2,147,483,648 packets",
        ),
    ],
)
def test_what_cannot_be_run_is_told(make, error, said):
    with pytest.raises(error) as caught:
        make()
    assert said in str(caught.value)


@pytest.mark.parametrize("scheme", ["ethereal", "spray", "reps"])
def test_nothing_to_send(scheme):
    found = simulate_packets(plan(Flows.of([]), line(), scheme))
    assert (found.completion_s, found.packets, found.hops) == (0.0, 0, 0)
