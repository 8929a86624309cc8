"""Walks, pairs and pools of GraphVite."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.graph import Graph
from anabranch.graph.graphvite.augmentation import Sampler, auto_augmentation, pairs_of_walk, shuffled
from anabranch.graph.graphvite.partition import zig_zag
from anabranch.graph.workers import Workers

QUANTILE = 3.7  # standard deviations that a chi-square statistic may lie above its mean: p < 1e-3, seeds are fixed


def chi_square_fits(count, expected):
    """Whether counts fit; cells that are expected less than 5 times are taken together."""
    few = expected < 5
    count, expected = np.append(count[~few], count[few].sum()), np.append(expected[~few], expected[few].sum())
    count, expected = count[expected > 0], expected[expected > 0]
    statistic, freedom = ((count - expected) ** 2 / expected).sum(), len(count) - 1
    return statistic <= freedom + QUANTILE * np.sqrt(2 * freedom) + 1e-9  # of one cell: all counts are in it


def small_graph(weighted=True):
    generator = np.random.default_rng(1)
    source, target = generator.integers(0, 7, (2, 16))
    return Graph.from_edges(source, target, generator.integers(1, 6, 16).astype(float) if weighted else None)


def dense(graph):
    return graph.to_scipy(np.float64).toarray()


def pairs_in(pool, partition):
    """(head, tail) nodes of every sample, block after block."""
    found = []
    for number in range(partition.num_parts**2):
        head, tail = pool.block(number)
        starts = partition.start_P[number // partition.num_parts], partition.start_P[number % partition.num_parts]
        found.append(np.column_stack([partition.node_N[starts[0] + head], partition.node_N[starts[1] + tail]]))
    return np.concatenate(found)


# The formula


@pytest.mark.parametrize(
    ("nodes", "edges", "step"),
    [
        (10_312, 333_983, 2),  # ln 1600 / ln 32.39 = 7.378 / 3.478 = 2.12
        (51_264, 127_968, 8),  # / ln 2.496 = 0.915: 8.06
        (1_138_499, 4_945_382, 5),  # Youtube: / ln 4.344 = 1.469: 5.02, the reference's 5
        (100, 10_000, 1),  # / ln 100: 1.60
        (100, 1_000_000, 1),  # denser than 1600: 0.80, at least 1
        (100, 110, 10),  # 77, at most DeepWalk's window
        (100, 100, 10),
        (100, 50, 10),
    ],
)
def test_auto_augmentation(nodes, edges, step):
    assert auto_augmentation(nodes, edges) == step


def test_pairs_of_a_walk():
    assert pairs_of_walk(40, 1) == 40
    assert pairs_of_walk(40, 5) == 190  # 40 + 39 + 38 + 37 + 36
    assert pairs_of_walk(2, 9) == 3


# Pseudo shuffle


def test_pseudo_shuffle_by_hand():
    # 6 samples, base 2: (o mod 2) 3 + o div 2
    assert [shuffled.py_func(o, 6, 2) for o in range(6)] == [0, 3, 1, 4, 2, 5]
    # 7 samples: the class 0 has one more
    assert [shuffled.py_func(o, 7, 2) for o in range(7)] == [0, 4, 1, 5, 2, 6, 3]


@given(st.integers(1, 200), st.integers(1, 12))
def test_pseudo_shuffle_is_a_permutation(count, base):
    slots = [shuffled.py_func(o, count, base) for o in range(count)]
    assert sorted(slots) == list(range(count))
    if count % base == 0:
        assert slots == [o % base * (count // base) + o // base for o in range(count)]


def test_line_pools_are_the_shuffled_pools():
    graph = small_graph()
    partition = zig_zag(graph.strength_N, 2)
    plain = Sampler.of(graph, partition, 3, walk_length=9, augmentation=3).pool(0, 50)
    mixed = Sampler.of(graph, partition, 3, walk_length=9, augmentation=3, shuffle_base=3).pool(0, 50)
    for number in range(4):
        head, tail = plain.block(number)
        slots = [shuffled.py_func(o, len(head), 3) for o in range(len(head))]
        assert np.array_equal(mixed.block(number)[0][slots], head)
        assert np.array_equal(mixed.block(number)[1][slots], tail)


# Walks


@pytest.mark.parametrize("weighted", [True, False])
def test_walks_start_at_edges_by_weight_and_follow_the_chain(weighted):
    graph = small_graph(weighted)
    adjacency = dense(graph)
    walk_CL = Sampler.of(graph, zig_zag(graph.strength_N, 1), 0, walk_length=2).walks(0, 40_000)
    first = np.zeros_like(adjacency)
    np.add.at(first, (walk_CL[:, 0], walk_CL[:, 1]), 1)
    assert chi_square_fits(first.ravel(), 40_000 * (adjacency / adjacency.sum()).ravel())
    second = np.zeros_like(adjacency)
    np.add.at(second, (walk_CL[:, 1], walk_CL[:, 2]), 1)
    chance = adjacency / np.maximum(adjacency.sum(1, keepdims=True), 1e-9)
    assert chi_square_fits(second.ravel(), (second.sum(1, keepdims=True) * chance).ravel())


def test_walks_end_at_dangling_nodes():
    graph = Graph.from_edges([0, 1], [1, 2], directed=True)
    walk_CL = Sampler.of(graph, zig_zag(graph.strength_N, 1), 0, walk_length=4).walks(0, 20)
    assert {tuple(walk) for walk in walk_CL.tolist()} == {(0, 1, 2, -1, -1), (1, 2, -1, -1, -1)}
    pool = Sampler.of(graph, zig_zag(graph.strength_N, 1), 0, walk_length=4, augmentation=2).pool(0, 20)
    longs = int((walk_CL[:, 0] == 0).sum())
    assert pool.size == 3 * longs + (20 - longs)  # (0,1) (0,2) (1,2), or (1,2)


def second_order(graph, before, node, p, q):
    """The distribution of the next node, by the definition of node2vec."""
    adjacency = dense(graph)
    bias = np.where(adjacency[before] > 0, 1.0, 1 / q)
    bias[before] = 1 / p
    weight = adjacency[node] * bias
    return weight / weight.sum()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("p", "q"), [(0.25, 4.0), (4.0, 0.25), (1.0, 0.1), (0.01, 1.0), (1.0, 50.0), (1e3, 1e4)])
def test_second_order_walks_have_the_distribution_of_node2vec(weighted, p, q):
    graph = small_graph(weighted)
    sampler = Sampler.of(graph, zig_zag(graph.strength_N, 1), 0, walk_length=12, p=p, q=q)
    walk_CL = sampler.walks(0, 4000)
    triples = np.lib.stride_tricks.sliding_window_view(walk_CL, 3, axis=1).reshape(-1, 3)
    count = np.zeros((7, 7, 7))
    np.add.at(count, tuple(triples.T), 1)
    for before, node in np.argwhere(count.sum(2) > 500):
        chance = second_order(graph, before, node, p, q)
        assert (count[before, node][chance == 0] == 0).all()
        assert chi_square_fits(count[before, node], count[before, node].sum() * chance), (before, node)


def test_second_order_walks_of_a_directed_graph_may_not_go_back():
    graph = Graph.from_edges([0, 1, 1, 2], [1, 2, 3, 0], directed=True)  # no edge 1 -> 0; 3 dangles
    walk_CL = Sampler.of(graph, zig_zag(graph.strength_N, 1), 0, walk_length=6, p=0.01, q=2).walks(0, 200)
    steps = {pair for walk in walk_CL.tolist() for pair in itertools.pairwise(walk) if pair[1] >= 0}
    assert steps == {(0, 1), (1, 2), (1, 3), (2, 0)}


# Pools


@pytest.mark.parametrize("distance", [1, 2, 3])
def test_pairs_at_a_distance_come_as_the_power_of_the_chain(distance):
    graph = small_graph()
    adjacency = dense(graph)
    strength = adjacency.sum(1)
    chain = adjacency / np.maximum(strength[:, None], 1e-9)
    partition = zig_zag(graph.strength_N, 2)
    made = [
        Sampler.of(graph, partition, 7, walk_length=3, augmentation=s).pool(0, 60_000) for s in (distance - 1, distance)
    ]
    count = np.zeros((2, 7, 7))
    for number, pool in enumerate(made):
        if distance > 1 or number == 1:
            np.add.at(count[number], tuple(pairs_in(pool, partition).T), 1)
    at_distance = count[1] - count[0]  # the same walks: those of s without those of s - 1
    starts = 3 + 1 - distance
    assert at_distance.sum() == 60_000 * starts
    expected = 60_000 * starts * (strength / strength.sum())[:, None] * np.linalg.matrix_power(chain, distance)
    # Pairs of one walk depend on each other, so the statistic is judged at the first start alone where there is one only.
    if starts == 1:
        assert chi_square_fits(at_distance.ravel(), expected.ravel())
    else:
        likely = expected > 50
        error = np.abs(at_distance - expected)[likely] / np.sqrt(starts * expected[likely])
        assert error.max() < 4.5
    assert at_distance[expected == 0].sum() == 0


def test_pools_hold_all_pairs_of_their_walks_in_order():
    graph = small_graph()
    partition = zig_zag(graph.strength_N, 3)
    sampler = Sampler.of(graph, partition, 11, walk_length=6, augmentation=2)
    pool, blocks = sampler.pool(5, 30), [[] for _ in range(9)]
    for walk in sampler.walks(5, 30).tolist():
        for j, head in enumerate(walk):
            for tail in walk[j + 1 : j + 3]:
                blocks[partition.part_N[head] * 3 + partition.part_N[tail]].append(
                    (partition.local_N[head], partition.local_N[tail])
                )
    for number, expected in enumerate(blocks):
        assert np.column_stack(pool.block(number)).tolist() == [list(pair) for pair in expected]
    assert pool.num_walks == 30
    assert pool.size == 30 * pairs_of_walk(6, 2)


def test_pools_are_the_same_however_they_are_made(monkeypatch):
    graph = small_graph()
    sampler = Sampler.of(graph, zig_zag(graph.strength_N, 2), 2, walk_length=5, augmentation=2, shuffle_base=2)
    whole = sampler.pool(100, 90)
    monkeypatch.setattr("anabranch.graph.graphvite.augmentation.CHUNK", 7)
    with Workers(3) as workers:
        split = sampler.pool(100, 90, workers)
    for name in ("head_S", "tail_S", "start_B", "count_B"):
        assert np.array_equal(getattr(whole, name), getattr(split, name)), name
    assert sampler.pool(100, 0).size == 0


def test_walks_differ_by_seed_and_number():
    graph = small_graph()
    partition = zig_zag(graph.strength_N, 1)
    walks = Sampler.of(graph, partition, 0).walks(0, 4)
    assert np.array_equal(Sampler.of(graph, partition, 0).walks(2, 2), walks[2:])
    assert not np.array_equal(Sampler.of(graph, partition, 1).walks(0, 4), walks)
    assert len({tuple(walk) for walk in walks.tolist()}) == 4
