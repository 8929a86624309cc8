"""TokenRing inside nodes, a ring of keys between them: one process's attention, and messages that are those of the formula."""
# Shapes: N ranks, P of a node, n rows of a rank, H query heads, G key heads, D head width

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ring_ranks
from anabranch.cluster.ring import RingOptions, Topology, Traffic, plan_attention, simulated_attention
from anabranch.cluster.ring.attention import simulated_placed_attention
from anabranch.cluster.ring.hybrid import Hybrid
from anabranch.cluster.ring.layout import Layout, Placement, Run
from anabranch.cluster.ring.pieces import Mask
from anabranch.errors import ConfigError, InputError
from anabranch.testing import run_ranks
from naive_attention import drawn, naive

KINDS = ("contiguous", "zigzag", "stripe")
LINKS = Topology("nodes", bandwidth=50e9, latency_s=0.0, node_size=4, between=25e9, gather_bytes=0)


def check(case, world, size, causal, told, **options):
    *leaves, dout = case
    expected = naive(*leaves, causal=causal, **told)
    found = simulated_attention(
        *leaves, world, causal, scheme="hybrid", topology=Topology(node_size=size), **told, **options
    )
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    grads = zip(torch.autograd.grad(found, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True)
    for part, right in grads:
        torch.testing.assert_close(part, right, atol=1e-11, rtol=0)


@pytest.mark.parametrize(("world", "size"), [(4, 2), (6, 3), (6, 2), (4, 1), (4, 4), (1, 1)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", KINDS)
def test_nodes_of_any_size_at_an_odd_length(layout, causal, world, size):
    check(drawn(1, 29, 4, 2, 4), world, size, causal, {}, layout=layout)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    nodes=st.integers(1, 3),
    size=st.integers(1, 3),
    length=st.integers(1, 26),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 9),
    seed=st.integers(0, 10**6),
    draw=st.randoms(),
)
def test_packs_windows_and_messages_that_come_late(kind, nodes, size, length, causal, window, seed, draw):
    documents = (0, *sorted(draw.choices(range(length + 1), k=draw.randrange(4))), length)
    told = {"window": window if causal else None, "documents": documents}
    check(drawn(1, length, 2, 1, 4, seed=seed), nodes * size, size, causal, told, layout=kind, seed=seed)


def test_new_queries_over_keys_that_are_there():
    """Placed otherwise than their keys, and two ranks of a node have none."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, length, heads, 4, generator=generator, dtype=torch.float64)
        for length, heads in ((8, 2), (20, 1), (20, 1))
    )
    queries = Placement((2, 2, 2, 2), tuple((Run(0, range(12 + 2 * rank, 14 + 2 * rank)),) for rank in range(4)))
    keys = Placement((0, 13, 0, 7), ((), (Run(0, range(13)),), (), (Run(0, range(13, 20)),)))
    rows, ends = [(2 * rank, 2 * rank + 2) for rank in range(4)], [(0, 0), (0, 13), (0, 0), (13, 20)]
    parts = [
        (query[:, slice(*own)], key[:, slice(*kept)], value[:, slice(*kept)])
        for own, kept in zip(rows, ends, strict=True)
    ]
    options = RingOptions(scheme="hybrid", causal=True, topology=Topology(node_size=2))
    found = torch.cat(simulated_placed_attention(parts, queries, keys, options), 1)
    whole = torch.zeros(1, 20, 2, 4, dtype=torch.float64)
    whole[:, 12:] = query
    torch.testing.assert_close(found, naive(whole, key, value, causal=True)[:, 12:], atol=1e-12, rtol=0)


def test_the_order_of_messages_changes_no_bit():
    *leaves, dout = drawn(1, 24, 4, 2, 4, torch.float32)
    made = []
    for seed in (None, 1, 2):
        out = simulated_attention(
            *leaves, 6, True, layout="zigzag", scheme="hybrid", topology=Topology(node_size=3), seed=seed
        )
        made.append([out, *torch.autograd.grad(out, leaves, dout)])
    for other in made[1:]:
        assert all(torch.equal(one, two) for one, two in zip(made[0], other, strict=True))


def test_bytes_between_nodes_are_those_of_the_keys_that_cross():
    """N - P blocks of keys out of a node, and nothing else; those of queries and results stay inside."""
    world, size, rows, heads, groups, width = 6, 3, 4, 4, 2, 8
    *leaves, _ = drawn(1, world * rows, heads, groups, width)
    traffic = Traffic()
    told = {"scheme": "hybrid", "topology": Topology(node_size=size), "traffic": traffic}
    simulated_attention(*leaves, world, False, **told)
    sent = traffic.sent.bytes_RR
    node_of = [rank // size for rank in range(world)]
    across = sum(int(sent[one, two]) for one in range(world) for two in range(world) if node_of[one] != node_of[two])
    block = 2 * rows * groups * width * 8
    assert across == 2 * (world - size) * block
    inside = int(sent.sum()) - across
    hops = (world // size) * (size - 1) * world
    assert inside == hops * rows * heads * (width * 8 + width * 8 + 8)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_the_plan_counts_what_is_sent(causal, backward):
    *leaves, dout = drawn(2, 48, 4, 2, 8)
    topology = Topology(node_size=2, gather_bytes=0)
    traffic = Traffic()
    out = simulated_attention(*leaves, 6, causal, layout="zigzag", scheme="hybrid", topology=topology, traffic=traffic)
    forward = traffic.size_bytes
    torch.autograd.grad(out, leaves, dout)
    sent = traffic.size_bytes - forward if backward else forward
    planned = plan_attention(
        48, 6, 4, 2, 8, torch.float64, batch=2, causal=causal, backward=backward, topology=topology, schemes=["hybrid"]
    )
    assert planned.costs[0].size_bytes == sent
    assert sum(traffic.pairs.values()) == 48 * 49 // 2 if causal else 48**2
    assert planned.costs[0].memory_bytes > 0


def test_the_plan_chooses_it_where_links_between_nodes_are_what_is_slow():
    """9 heads do not divide by 8 ranks; over links alone a node sends 4 blocks of keys, where the ring of 8 sends 7."""
    told = {"length": 8192, "world": 8, "heads": 9, "head_dim": 64, "causal": False, "layout": "contiguous"}
    planned = plan_attention(**told, topology=LINKS, out_dtype=torch.bfloat16)
    assert planned.choice == "hybrid"
    cost = {one.scheme: one for one in planned.costs}
    # Of the hybrid the busiest is one inside a node.
    assert cost["hybrid"].link_bytes < 0.6 * cost["ring"].link_bytes
    # Where nodes are as well connected as their ranks, it is not.
    quick = Topology("nodes", bandwidth=50e9, latency_s=0.0, node_size=4, between=4e12, gather_bytes=0)
    assert plan_attention(**told, topology=quick).choice != "hybrid"
    assert "hybrid" not in {one.scheme for one in plan_attention(**told).costs}


def test_auto_runs_what_the_plan_chooses():
    *leaves, _ = drawn(1, 64, 9, 9, 4)
    expected = naive(*leaves, causal=False)
    traffic = Traffic()
    found = simulated_attention(*leaves, 8, False, scheme="auto", topology=LINKS, traffic=traffic)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    # Of all schemes it alone sends nothing from the first rank of a node to others of another than that of its place.
    sent = traffic.sent.bytes_RR
    assert int(sent[0, 4] + sent[4, 0]) > 0
    assert not any(int(sent[0, other]) for other in (5, 6, 7))
    assert all(int(sent[1, other]) for other in (0, 2, 3))


@pytest.mark.parametrize(
    ("topology", "match"),
    [
        (None, "nothing says which ranks are of a node"),
        (Topology(), "nothing says which ranks are of a node"),
        (Topology(node_size=3), "a node has 3 ranks, and there are 4"),
    ],
)
def test_nodes_that_are_none(topology, match):
    *leaves, _ = drawn(1, 8, 2, 2, 4)
    with pytest.raises(InputError, match=match):
        simulated_attention(*leaves, 4, scheme="hybrid", topology=topology)


def test_placements_on_different_ranks():
    one, two = (Layout("contiguous", world, 8).placement for world in (2, 4))
    with pytest.raises(InputError, match="queries are on 2 ranks and keys on 4"):
        Hybrid(one, two, Mask(), 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "nodes"},
        {"kind": "nodes", "node_size": 2},
        {"between": 1e9},
        {"node_size": 0},
        {"kind": "nodes", "node_size": 2, "between": -1.0},
    ],
)
def test_topologies_that_are_none(wrong):
    with pytest.raises(ConfigError):
        Topology(**wrong)


@pytest.mark.slow
def test_real_processes():
    """Outputs, gradients and bytes between pairs are those of simulated ranks."""
    found = run_ranks(ring_ranks.nodes, 4)
    for errors, same_bytes in found:
        assert max(errors) < 1e-11
        assert same_bytes
