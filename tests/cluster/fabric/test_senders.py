"""What senders do with what they hear: DCTCP's windows, time-outs, recycled paths; and how hosts' cards and acknowledgements queue."""

from types import SimpleNamespace

import numpy as np
import pytest

from anabranch.cluster.fabric import (
    SCHEMES,
    Flows,
    PacketConfig,
    Topology,
    collective_flows,
    packet_kernels,
    plan,
    simulate_packets,
)
from anabranch.cluster.fabric import packet_state as ps
from anabranch.cluster.fabric.packets import constants_of

# 8 Gbit/s are a byte a nanosecond.
PLAIN = PacketConfig(payload=1000, header=0, window=1000, ecn_kb=1e6)
NS = 1e-9


def line(hosts=1, spines=1, **speeds):
    return Topology.leaf_spine(2, spines, hosts, **{"cap_up": 8, "cap_host": 8, **speeds})


def run(rows, topology, config=PLAIN, scheme="whole", **options):
    made = plan(Flows.of(rows), topology, scheme)
    made.delay_ns_Q[:] = 0
    return simulate_packets(made, config, **options)


def prepared(scheme="spray", receiver="any-order", spines=4, **settings):
    """The state of one flow of 64 packets that has begun, in plain objects, and the constants."""
    made = plan(Flows.of([(0, 1, 64_000)]), line(spines=spines), scheme)
    config = PLAIN.replace(receiver=receiver, **settings)
    state, constants = ps.make_state(made, constants_of(made, config), seed=1, room=1024)
    state = ps.plain(state)
    state.pieces[0].active = 1
    return state, constants


# DCTCP


def test_the_mean_share_of_marks_moves_by_the_gain():
    """alpha <- alpha + g (F - alpha), once a round; then the window shrinks by half of it."""
    c = SimpleNamespace(gain=0.25)
    piece = SimpleNamespace(window=8.0, slow=8.0, alpha=1.0, acks=0, marks=0, span=8)
    for _ in range(8):
        packet_kernels.control(c, piece, 1, False)
    assert (piece.alpha, piece.acks) == (1.0, 8)
    before = piece.window
    packet_kernels.control(c, piece, 1, True)
    # One of nine was marked.
    alpha = 1.0 + 0.25 * (1 / 9 - 1.0)
    assert piece.alpha == pytest.approx(alpha, rel=1e-12)
    assert piece.window == pytest.approx(before * (1 - alpha / 2), rel=1e-12)
    assert piece.slow == piece.window
    assert (piece.acks, piece.marks, piece.span) == (0, 0, int(piece.window))
    # A round without marks: the share falls, and the window grows by one over it.
    window = piece.window
    for _ in range(piece.span + 1):
        packet_kernels.control(c, piece, 1, False)
    assert piece.alpha == pytest.approx(0.75 * alpha, rel=1e-12)
    assert window < piece.window <= window + 1.5


def test_few_marks_cost_less_than_many():
    """Windows settle by the share of marks: with alpha at rest all marks would cost half."""
    c = SimpleNamespace(gain=1 / 16)

    def settled(every):
        piece = SimpleNamespace(window=32.0, slow=1.0, alpha=1.0, acks=0, marks=0, span=32)
        windows = []
        for number in range(20_000):
            packet_kernels.control(c, piece, 1, number % every == 0)
            windows.append(piece.window)
        return piece.alpha, np.mean(windows[10_000:])

    few, many = settled(50), settled(4)
    assert few[0] < many[0] < 0.6
    assert few[1] > 2 * many[1]


@pytest.mark.parametrize(("window", "threshold"), [(12.0, 6.0), (3.0, 2.0), (1.0, 2.0)])
@pytest.mark.parametrize("receiver", ["any-order", "go-back-n"])
def test_a_time_out_halves_the_threshold_and_begins_with_one_packet(window, threshold, receiver):
    state, c = prepared(receiver=receiver)
    piece = state.pieces[0]
    piece.window, piece.slow, piece.flying, piece.following, piece.progress = window, 1000.0, 3, 3, 0
    packet_kernels.time_out(state, c, 0, c.rto_ps)
    assert (piece.slow, piece.window) == (threshold, 1.0)
    assert (state.clock[ps.TIMEOUTS], state.clock[ps.RESENT]) == (1, 3)


def test_a_clock_that_looks_too_early_changes_nothing():
    state, c = prepared()
    piece = state.pieces[0]
    piece.window, piece.slow, piece.flying, piece.progress = 12.0, 1000.0, 3, 5
    packet_kernels.time_out(state, c, 0, c.rto_ps)
    assert (piece.slow, piece.window, state.clock[ps.TIMEOUTS]) == (1000.0, 12.0, 0)


# REPS


def hear(state, c, number, row, marked):
    """An acknowledgement of a packet that went over a path."""
    state.clock[ps.FREE] -= 1
    slot = state.free_K[state.clock[ps.FREE]]
    packet = state.packets[slot]
    packet.piece, packet.number, packet.row, packet.marked, packet.says = 0, number, row, int(marked), ps.PLAIN
    packet_kernels.acknowledge(state, c, slot, 1000)


def test_paths_are_used_again_unless_they_were_marked():
    # No room in the window: what is heard is kept and not used at once.
    state, c = prepared("reps", window=1)
    piece = state.pieces[0]
    piece.flying = piece.following = 9
    for number, (way, marked) in enumerate([(3, False), (1, True), (2, False), (0, True)]):
        hear(state, c, number, piece.first_row + way, marked)
        piece.window = 1.0
    assert (piece.acked, piece.cached) == (4, 2)
    taken = [packet_kernels.choose_row(state, c, 0) - piece.first_row for _ in range(2)]
    assert (taken, piece.cached) == ([3, 2], 0)


@pytest.mark.parametrize("scheme", ["spray", "whole"])
def test_only_reps_keeps_paths(scheme):
    state, c = prepared(scheme, window=1)
    piece = state.pieces[0]
    piece.flying = piece.following = 9
    hear(state, c, 0, piece.first_row, marked=False)
    assert piece.cached == 0


# Cards and acknowledgements


def test_a_first_come_card_sends_a_whole_window_of_one_piece_first():
    rows = [(0, 2, 3000), (0, 3, 3000)]
    found = run(rows, line(hosts=2), PLAIN.replace(card="fifo"))
    # Three packets, then three: each four links and latencies.
    assert found.finish_F == pytest.approx([(6000 + 2000) * NS, (9000 + 2000) * NS], rel=1e-12)
    # A window of two: 1 1 2 2, and the others when their acknowledgements are there.
    found = run(rows, line(hosts=2), PLAIN.replace(card="fifo", window=2))
    assert found.packets == 6
    assert found.finish_F[0] < found.finish_F[1]


def test_more_than_is_looked_at_at_once_is_sent_all_the_same():
    packets = 3 * ps.AT_ONCE + 5
    found = run([(0, 1, 1000 * packets)], line(), PLAIN.replace(card="fifo"))
    assert found.packets == packets
    assert found.completion_s == pytest.approx((1000 * packets + 3000 + 2000) * NS, rel=1e-12)


def test_an_acknowledgement_with_bytes_takes_time_on_every_link_back():
    # 6000 ns there; back four links of 100 ns and four latencies, in place of latencies alone.
    config = PLAIN.replace(window=1, gain=1e-9, ecn_kb=0)
    free = run([(0, 1, 1000, 0), (0, 1, 1000, 1)], line(), config)
    paid = run([(0, 1, 1000, 0), (0, 1, 1000, 1)], line(), config.replace(ack_bytes=100))
    assert free.finish_F == pytest.approx([6000 * NS, 14_000 * NS], rel=1e-12)
    assert paid.finish_F == pytest.approx([6000 * NS, 14_400 * NS], rel=1e-12)
    # They go over the same cables the other way: two packets of data, two of acknowledgement; that of the last may still be under way.
    assert paid.bytes_L.sum() >= free.bytes_L.sum() + 4 * 100


def test_an_acknowledgement_waits_behind_what_its_host_sends():
    # Host 1 sends a long flow of its own, all of it in its card at once.
    rows = [(0, 2, 1000, 0), (0, 2, 1000, 1), (2, 1, 20_000, 0)]
    config = PLAIN.replace(ack_bytes=100, ecn_kb=1e6)
    queued = run(rows, line(hosts=2), config.replace(card="fifo")).finish_F[1]
    in_turn = run(rows, line(hosts=2), config).finish_F[1]
    # The card has 20,000 ns of data from the start; taking turns, at most a packet is before it.
    assert queued > 20_000 * NS
    assert in_turn < 17_000 * NS


@pytest.mark.parametrize("card", ["turns", "fifo"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_flow_ends_however_packets_queue(scheme, card):
    topology = Topology.leaf_spine(3, 3, 2, cap_up=10, cap_host=10)
    made = plan(collective_flows("permutation", 6, 40_000, seed=1), topology, scheme, seed=1)
    config = PacketConfig(payload=1000, header=40, buffer_mb=0.01, ecn_kb=5.0, rto_us=200, card=card, ack_bytes=64)
    found = simulate_packets(made, config, seed=1, most_s=1.0)
    assert (found.finish_F > 0).all()
    assert found.packets == sum(-(-size // 1000) for size in made.size_Q.tolist())
    assert (simulate_packets(made, config, seed=1).finish_F == found.finish_F).all()


def test_bursts_and_queued_acknowledgements_together_delay_pinned_pieces():
    """What made ns-3 take 1.6 times as long: neither does it alone."""
    topology = Topology.leaf_spine(4, 4, 4, cap_up=10, cap_host=10)
    made = plan(collective_flows("permutation", 16, 1_000_000, seed=0), topology, "ethereal", seed=0)
    plain = PacketConfig(payload=8960, header=42, window=8, ecn_kb=1e9, buffer_mb=1e6, rto_us=1e9)

    def ends(**changes):
        return simulate_packets(made, plain.replace(**changes), seed=0).completion_s

    alone = ends()
    assert ends(ack_bytes=54) < 1.05 * alone
    assert ends(card="fifo") < 1.15 * alone
    assert ends(card="fifo", ack_bytes=54) > 1.35 * alone
