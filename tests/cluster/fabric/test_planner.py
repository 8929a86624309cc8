import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.cli.cluster.fabric_picture import _busiest_s
from anabranch.cluster.fabric import (
    SCHEMES,
    SPREAD,
    Flows,
    PathHealth,
    Topology,
    busiest,
    check,
    collective_flows,
    exact_loads,
    loads,
    lower_bound,
    moe_dispatch,
    plan,
    plan_trace,
    routes,
    simulate,
)
from anabranch.cluster.fabric.schemes import num_pieces, num_wrapped
from anabranch.errors import InputError

UNIT = 720_720  # every number up to 16 divides it


def two_leaves(flows, paths, size=UNIT):
    """n flows of host 0, each to another host of the other leaf."""
    topology = Topology.leaf_spine(2, paths, flows)
    return Flows.of((0, flows + number, size) for number in range(flows)), topology


def by_path(made):
    """Bytes over each spine from leaf 0."""
    topology = made.topology
    found = loads(made)
    return {
        topology.names[topology.link_to[link]]: found[link]
        for link in range(topology.num_links)
        if topology.names[topology.link_from[link]] == "leaf0" and topology.names[topology.link_to[link]][:5] == "spine"
    }


# By hand


def test_two_flows_over_three_paths_by_hand():
    # n = 2, s = 3: r = 2, g = 1, so each flow is cut into three thirds, and each path gets a third of both.
    flows, topology = two_leaves(2, 3, 300)
    made = plan(flows, topology)
    assert sorted((piece.dst, piece.offset, piece.size) for piece in made) == [
        (dst, offset, 100) for dst in (2, 3) for offset in (0, 100, 200)
    ]
    assert by_path(made) == {"spine0": 200, "spine1": 200, "spine2": 200}
    # Wrapped, 600 bytes are cut at 200, 300 (where the second flow begins) and 400: four pieces.
    made = plan(flows, topology, "wrap")
    assert sorted(piece.size for piece in made) == [100, 100, 200, 200]
    assert by_path(made) == {"spine0": 200, "spine1": 200, "spine2": 200}


def test_six_flows_over_four_paths_by_hand():
    # r = 2, g = 2: four whole, two in halves; each path has one flow and a half.
    flows, topology = two_leaves(6, 4, 100)
    made = plan(flows, topology)
    assert sorted(piece.size for piece in made) == [50] * 4 + [100] * 4
    assert set(by_path(made).values()) == {150}


def test_bytes_that_do_not_divide_are_not_lost():
    flows, topology = two_leaves(1, 3, 100)
    made = plan(flows, topology)
    assert sorted((piece.offset, piece.size) for piece in made) == [(0, 33), (33, 33), (66, 34)]
    # A flow with fewer bytes than there are paths has fewer pieces.
    flows, topology = two_leaves(1, 16, 5)
    assert sorted(piece.size for piece in plan(flows, topology)) == [1] * 5


def test_flows_within_a_rack_are_left_alone():
    topology = Topology.leaf_spine(2, 4, 3)
    made = plan(Flows.of([(0, 1, 10), (0, 2, 20)]), topology)
    assert [piece[:] for piece in made] == [(0, 1, 0, 0, 10), (0, 2, 0, 0, 20)]
    assert loads(made).sum() == 60  # up and down again


def test_the_leaf_plans_for_all_its_hosts():
    # 4 hosts send one flow each over 4 paths: alone each must cut fourfold, together none.
    topology = Topology.leaf_spine(2, 4, 4)
    flows = Flows.of((host, 4 + host, 400) for host in range(4))
    alone, together = plan(flows, topology), plan(flows, topology, scope="leaf")
    assert (len(alone), len(together)) == (16, 4)
    assert set(by_path(alone).values()) == set(by_path(together).values()) == {400}


def test_a_slow_path_gets_its_share():
    topology = Topology.leaf_spine(2, 3, 2).with_capacity({"leaf1-spine0": 200})
    made = plan(Flows.of([(0, 2, 1000)]), topology, "wrap")
    assert by_path(made) == {"spine0": 200, "spine1": 400, "spine2": 400}
    assert not made.fell_back
    equal = plan(Flows.of([(0, 2, 1000)]), topology)
    assert equal.fell_back
    assert by_path(equal) == by_path(made)


def test_unequal_flows_are_wrapped_and_the_plan_says_so():
    topology = Topology.leaf_spine(2, 2, 2)
    made = plan(Flows.of([(0, 2, 10), (0, 3, 30)]), topology)
    assert made.fell_back
    assert by_path(made) == {"spine0": 20, "spine1": 20}
    # Unequal only in different groups is equal.
    assert not plan(Flows.of([(0, 2, 10), (1, 3, 30)]), topology).fell_back


def test_bounds_by_hand():
    # 2 leaves x 2 spines of 100 Gbit/s, 4 hosts a leaf of 100: four flows of 1 GB cross: 32 Gbit over 200 Gbit/s.
    topology = Topology.leaf_spine(2, 2, 4, cap_up=100, cap_host=100)
    flows = Flows.of((host, 4 + host, 10**9) for host in range(4))
    assert lower_bound(flows, topology) == pytest.approx(0.16)
    assert busiest(plan(flows, topology)) == pytest.approx(0.16)
    # With a failed uplink all goes over the other.
    failed = topology.with_failed(["leaf0-spine0"])
    assert lower_bound(flows, failed) == busiest(plan(flows, failed)) == pytest.approx(0.32)
    # Within a rack the hosts' cables are what there is.
    inside = Flows.of([(0, 1, 10**9), (2, 1, 10**9)])
    assert lower_bound(inside, topology) == busiest(plan(inside, topology)) == pytest.approx(0.16)
    # Steps follow each other.
    twice = Flows.of([(0, 4, 10**9, 0), (0, 4, 10**9, 1)])
    assert lower_bound(twice, topology) == busiest(plan(twice, topology)) == pytest.approx(0.16)


def test_a_cut_off_leaf_has_no_bound():
    topology = Topology.leaf_spine(2, 1, 1).with_failed(["leaf0-spine0"])
    assert lower_bound(Flows.of([(0, 1, 8)]), topology) == math.inf


# Exact

PAIRS = [(1, 1), (1, 16), (7, 3), (12, 8), (24, 16), (23, 16), (16, 16), (5, 10)]


@pytest.mark.parametrize(("count", "paths"), PAIRS)
def test_pieces_are_as_many_as_the_formulas_say(count, paths):
    flows, topology = two_leaves(count, paths)
    assert len(plan(flows, topology)) == num_pieces(count, paths)
    assert len(plan(flows, topology, "wrap")) == num_wrapped(count, paths)
    left = count % paths
    naive = count - left + sum(paths // math.gcd(left, paths) for _ in range(left))
    assert num_pieces(count, paths) == naive
    assert num_wrapped(count, paths) <= num_pieces(count, paths)


SHAPES = st.tuples(st.integers(2, 4), st.integers(1, 6), st.integers(1, 3))


@st.composite
def networks(draw):
    """A leaf-spine network, some cables failed or slow, and flows that still have a path."""
    leaves, spines, hosts = draw(SHAPES)
    topology = Topology.leaf_spine(leaves, spines, hosts)
    cables = [(f"leaf{a}", f"spine{b}") for a in range(leaves) for b in range(1, spines)]
    topology = topology.with_failed([c for c in cables if draw(st.integers(0, 9)) == 0])
    slow = {c: draw(st.sampled_from([100, 200])) for c in cables if draw(st.integers(0, 9)) == 0}
    topology = topology.with_capacity(slow)
    pairs = list(itertools.permutations(range(leaves * hosts), 2))
    rows = draw(st.lists(st.tuples(st.sampled_from(pairs), st.integers(1, 5000), st.integers(0, 2)), max_size=20))
    return topology, Flows.of((*pair, size, step) for pair, size, step in rows)


@settings(deadline=None, max_examples=60)
@given(networks(), st.sampled_from(SCHEMES), st.sampled_from(["host", "leaf"]), st.integers(0, 3))
def test_every_plan_keeps_every_byte(network, scheme, scope, seed):
    topology, flows = network
    made = plan(flows, topology, scheme, scope=scope, seed=seed)
    check(made)
    again = plan(flows, topology, scheme, scope=scope, seed=seed)
    assert list(made) == list(again)
    assert (made.delay_ns_Q == again.delay_ns_Q).all()
    assert ((made.delay_ns_Q >= 0) & (made.delay_ns_Q <= 50)).all()
    # No path with a failed link carries anything.
    assert not loads(made)[~topology.is_up_L].any()
    assert busiest(made) >= lower_bound(flows, topology) * (1 - 1e-12)
    # What the sum is of: the busiest link of each step. No link works for longer than that in all steps.
    seconds = [8 * loads(made, step) / topology.capacity_L for step in range(flows.num_steps)]
    assert busiest(made) == pytest.approx(sum(taken.max(initial=0.0) for taken in seconds), rel=1e-9)
    assert np.sum(seconds, axis=0).max(initial=0.0) <= busiest(made) * (1 + 1e-9)
    np.testing.assert_allclose(loads(made), np.array([float(x) for x in exact_loads(made)]), rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(networks(), st.integers(0, 3))
def test_wrap_is_within_a_byte_of_each_share(network, seed):
    topology, flows = network
    made = plan(flows, topology, "wrap", seed=seed)
    for flow_set in range(flows.num_steps):
        groups = {}
        for place, piece in zip(range(len(made)), made, strict=True):
            leaf, to = topology.leaf_H[piece.src], topology.leaf_H[piece.dst]
            if leaf != to and flows.step_F[made.flow_Q[place]] == flow_set:
                groups.setdefault((piece.src, int(leaf), int(to)), {}).setdefault(piece.path, []).append(piece.size)
        for (_, leaf, to), paths in groups.items():
            capacity = topology.path_capacity(leaf, to)
            total = sum(sum(sizes) for sizes in paths.values())
            for path, sizes in paths.items():
                assert abs(sum(sizes) - Fraction(total * int(capacity[path]), int(capacity.sum()))) < 1


def test_windows_by_hand():
    # Host 0 sends two flows to each of three leaves: two leaves fill a window of four or five, the third waits; one of three takes turns.
    topology = Topology.leaf_spine(4, 1, 2)
    flows = Flows.of((0, 2 + number, 10) for number in range(6))
    for window, counts in ((None, [6]), (6, [6]), (5, [4, 2]), (4, [4, 2]), (3, [2, 2, 2]), (1, [2, 2, 2])):
        made = plan(flows, topology, "whole", window=window)
        assert np.bincount(made.window_Q).tolist() == counts
        for number in range(len(counts)):
            dst = [piece.dst for piece, place in zip(made, made.window_Q, strict=True) if place == number]
            assert len({topology.leaf_H[host] for host in dst}) == counts[number] / 2
    # Which leaf is first is drawn.
    assert len({tuple(plan(flows, topology, "whole", window=2, seed=seed).window_Q) for seed in range(9)}) > 1


@settings(deadline=None, max_examples=40)
@given(networks(), st.integers(1, 6), st.sampled_from(["ethereal", "split:2"]))
def test_windows_hold_no_more_than_they_may(network, window, scheme):
    topology, flows = network
    made = plan(flows, topology, scheme, window=window)
    held = {}
    for piece, flow, number in zip(made, made.flow_Q, made.window_Q, strict=True):
        held.setdefault((piece.src, int(flows.step_F[flow])), {}).setdefault(int(number), []).append(
            int(topology.leaf_H[piece.dst])
        )
    for windows in held.values():
        assert sorted(windows) == list(range(len(windows)))
        for leaves in windows.values():
            assert len(leaves) <= window or len(set(leaves)) == 1
        # Each leaf of a step is in one window.
        assert sum(len(set(leaves)) for leaves in windows.values()) == len(set().union(*windows.values()))


def test_seeds_draw_other_paths():
    flows, topology = collective_flows("permutation", 16, 10**6), Topology.leaf_spine(4, 4, 4)
    for scheme in ("ecmp", "split:2", "whole", "wrap"):
        plans = [list(plan(flows, topology, scheme, seed=seed)) for seed in range(3)]
        assert plans[0] != plans[1] or plans[0] != plans[2]


# What comes of it at the paper's size


def test_all_to_all_needs_no_splits_at_the_papers_size():
    topology = Topology.leaf_spine(16, 16, 16)
    flows = collective_flows("all-to-all", 256, 256 * 4096)
    made, ideal = plan(flows, topology), plan(flows, topology, "spray")
    # 16 flows to each leaf over 16 paths: whole, 255 pieces a host with those of the own rack.
    assert len(made) == 256 * 255
    np.testing.assert_allclose(loads(made), loads(ideal), rtol=1e-12)
    assert busiest(made) == pytest.approx(lower_bound(flows, topology), rel=1e-12)
    assert busiest(plan(flows, topology, "ecmp")) > 1.02 * busiest(ideal)


def test_the_far_step_of_halving_is_where_hashing_fails():
    topology = Topology.leaf_spine(16, 16, 16)
    far = collective_flows("all-reduce", 256, 256 * 65_536, "halving-doubling").step(0)
    ideal = busiest(plan(far, topology, "spray"))
    alone = plan(far, topology)
    assert (busiest(alone) / ideal, len(alone)) == (pytest.approx(1.0, rel=1e-12), 256 * 16)
    together = plan(far, topology, scope="leaf")
    assert (busiest(together) / ideal, len(together)) == (pytest.approx(1.0, rel=1e-12), 256)
    assert busiest(plan(far, topology, "ecmp")) > 2 * ideal


def test_a_fat_tree_is_balanced_on_every_tier():
    topology = Topology.fat_tree(4)
    flows = collective_flows("all-to-all", 16, 16 * UNIT)
    for scheme in ("ethereal", "wrap"):
        assert exact_loads(plan(flows, topology, scheme)) == exact_loads(plan(flows, topology, "spray"))


def test_dispatch_of_experts_is_wrapped_to_the_bound():
    random = np.random.default_rng(0)
    rows_RR = random.integers(0, 200, (16, 16))
    # Half of what hosts send goes up at once; otherwise the busiest host's cable would hide all else.
    topology = Topology.leaf_spine(4, 4, 4, cap_up=200)
    flows = moe_dispatch(rows_RR, 14_336)
    ours, hashed = plan(flows, topology, "wrap"), plan(flows, topology, "ecmp")
    bound = lower_bound(flows, topology)
    # Sixteen groups of a leaf's hosts, each off by less than a byte a path.
    assert busiest(ours) == pytest.approx(bound, rel=1e-4)
    assert busiest(hashed) > 1.05 * busiest(ours)


def test_greedy_is_between_hashing_and_spraying():
    flows, topology = collective_flows("permutation", 64, 10**6, seed=1), Topology.leaf_spine(8, 8, 8)
    worst = {scheme: busiest(plan(flows, topology, scheme, seed=1)) for scheme in ("ecmp", "greedy", "spray")}
    assert worst["spray"] <= worst["greedy"] < worst["ecmp"]


# Routes, checks, health


def test_routes_are_the_links_of_a_piece():
    topology = Topology.leaf_spine(2, 2, 1)
    made = plan(Flows.of([(0, 1, 100)]), topology, "spray")
    start, link_E, weight_E = routes(made)
    assert start.tolist() == [0, 6]
    named = {topology.link_name(link): weight for link, weight in zip(link_E, weight_E, strict=True)}
    assert named == {
        "host0 > leaf0": 1.0,
        "leaf0 > spine0": 0.5,
        "leaf0 > spine1": 0.5,
        "spine0 > leaf1": 0.5,
        "spine1 > leaf1": 0.5,
        "leaf1 > host1": 1.0,
    }
    whole = routes(plan(Flows.of([(0, 1, 100)]), topology, "whole"))
    assert (whole.start.tolist(), set(whole.weight_E)) == ([0, 4], {1.0})


def test_a_path_that_timed_out_gets_nothing_until_its_mark_ends():
    topology, health = Topology.leaf_spine(2, 2, 2), PathHealth(hold_s=0.1)
    leaf = int(topology.leaf_H[2])
    health.mark(0, leaf, 1, now_s=1.0)
    flows = Flows.of([(0, 2, 100)])
    assert by_path(plan(flows, topology, health=health, now_s=1.05)) == {"spine0": 100, "spine1": 0}
    assert by_path(plan(flows, topology, health=health, now_s=1.1)) == {"spine0": 50, "spine1": 50}
    # Another sender knows nothing of it, but its leaf plans for both.
    assert by_path(plan(Flows.of([(1, 2, 100)]), topology, health=health, now_s=1.05))["spine1"] == 50
    both = Flows.of([(0, 2, 100), (1, 2, 100)])
    assert by_path(plan(both, topology, scope="leaf", health=health, now_s=1.05)) == {"spine0": 200, "spine1": 0}
    health.mark(0, leaf, 0, now_s=1.0)
    with pytest.raises(
        InputError, match="no good path from leaf0 to leaf1: all 2 have failed links or timed out lately"
    ):
        plan(flows, topology, health=health, now_s=1.05)
    health.reset(0, leaf, 0)
    assert by_path(plan(flows, topology, health=health, now_s=1.05)) == {"spine0": 100, "spine1": 0}


@pytest.mark.parametrize("scheme", ["wrap", "spray"])
def test_a_trace_says_what_each_link_carries(scheme):
    topology = Topology.leaf_spine(3, 2, 2)
    made = plan(Flows.of([(0, 2, 1000, 0), (0, 1, 300, 0), (3, 5, 77, 1)]), topology, scheme)
    trace = plan_trace(made)
    layer = trace.layer(0)
    assert (layer.num_destinations, layer.name, trace.domains) == (topology.num_links, "links", [scheme])
    carried = np.bincount(trace.column("destination", 0), trace.column("weight", 0), topology.num_links)
    np.testing.assert_allclose(carried, loads(made), rtol=1e-6)
    # Choices stand in the order in which links are passed.
    first = trace.decisions(0).index_NK[0]
    assert first[0] == topology.host_up_H[made.flows.src_F[made.flow_Q[0]]]
    assert set(trace.column("position", 0)) == {0, 1}
    assert len(plan_trace(plan(Flows.of([]), topology, scheme))) == 0


def broken(change):
    topology = Topology.leaf_spine(2, 2, 2)
    made = plan(Flows.of([(0, 2, 100), (1, 3, 60)]), topology)
    check(made)
    return change(made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: replace(made, size_Q=made.size_Q - 1), "pieces of flow 0 are not its 100 bytes"),
        (lambda made: replace(made, offset_Q=made.offset_Q + 1), "pieces of flow 0 are not"),
        (lambda made: replace(made, offset_Q=np.zeros_like(made.offset_Q)), "are not its"),
        (lambda made: replace(made, flow_Q=np.zeros_like(made.flow_Q)), "are not its"),
        (lambda made: replace(made, flow_Q=made.flow_Q + 1), "a piece of flow 2; there are 2 flows"),
        (lambda made: replace(made, path_Q=made.path_Q + 2), "goes over path"),
        (
            lambda made: replace(made, topology=made.topology.with_failed(["leaf1-spine0"])),
            "over path 0 from leaf0 to leaf1",
        ),
    ],
)
def test_a_wrong_plan_is_found(change, said):
    with pytest.raises(InputError) as caught:
        check(broken(change))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f, t: plan(f, t, "etherial"), "no scheme 'etherial'; known: ecmp, split:4"),
        (lambda f, t: plan(f, t, None), "no scheme None"),
        (lambda f, t: lower_bound(Flows.of([(0, 9, 1)]), t), "flows name host 9"),
        (lambda f, t: plan(f, t, "split:0"), "splits into 0 pieces; 1 to 64"),
        (lambda f, t: plan(f, t, "split:999999999"), "splits into 999999999 pieces"),
        (lambda f, t: plan(f, t, scope="rack"), "scope is 'rack'"),
        (lambda f, t: plan(f, t, seed=-1), "seed is -1"),
        (lambda f, t: plan(f, t, window=0), "window is 0"),
        (lambda f, t: plan(Flows.of([(0, 9, 1)]), t), "flows name host 9, but the network has hosts 0 to 3"),
        (lambda f, t: plan(f, t.with_failed(["host2-leaf1"])), "the cable of host2 has failed, and flow 0 needs it"),
        (
            lambda f, t: plan(f, t.with_failed(["leaf0-spine0", "leaf1-spine1"])),
            "no good path from leaf0 to leaf1: all 2 have failed",
        ),
    ],
)
def test_what_cannot_be_planned_is_told(make, said):
    with pytest.raises(InputError) as caught:
        make(Flows.of([(0, 2, 100)]), Topology.leaf_spine(2, 2, 2))
    assert said in str(caught.value)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_to_send(scheme):
    topology = Topology.leaf_spine(2, 2, 2)
    made = plan(Flows.of([]), topology, scheme)
    check(made)
    assert (len(made), busiest(made), loads(made).sum(), lower_bound(made.flows, topology)) == (0, 0.0, 0.0, 0.0)


def test_packets_of_a_spread_flow_are_on_no_path():
    made = plan(Flows.of([(0, 2, 100)]), Topology.leaf_spine(2, 2, 2), "spray")
    assert [piece.path for piece in made] == [SPREAD]


@pytest.mark.parametrize("scheme", ["ecmp", "wrap", "spray"])
@pytest.mark.parametrize("traffic", ["all-reduce:ring", "all-reduce:halving-doubling", "all-gather:doubling"])
@pytest.mark.parametrize("slow", [{}, {"leaf0-spine1": 40.0}], ids=["even", "one slow cable"])
def test_nothing_ends_before_the_busiest_link_of_all_steps(traffic, scheme, slow):
    """Which is where the picture draws its line; the sum over steps may be longer than what ranks take that go on by themselves."""
    topology = Topology.leaf_spine(4, 4, 4).with_capacity(slow)
    kind, algo = traffic.split(":")
    made = plan(collective_flows(kind, 16, 6_400_000, algo), topology, scheme)
    line = _busiest_s(made)
    assert line == pytest.approx((8 * loads(made) / topology.capacity_L).max(), rel=1e-12)
    assert 0 < line <= simulate(made).completion_s * (1 + 1e-9)
    assert line <= busiest(made) * (1 + 1e-9)
