"""Generated graphs are the same for one seed, have the shape that their model says, and refuse what makes none."""

import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.graph import csr
from anabranch.graph.formats import to_networkx
from anabranch.graph.generate import (
    barabasi_albert,
    erdos_renyi,
    hubs,
    planted,
    power_law,
    random_regular,
    random_weights,
    rmat,
    star,
)

MAKERS = {
    "rmat": lambda seed: rmat(7, 400, seed=seed),
    "rmat, directed": lambda seed: rmat(7, 400, directed=True, seed=seed),
    "power_law": lambda seed: power_law(200, 600, seed=seed),
    "planted": lambda seed: planted(200, 600, 4, seed=seed)[0],
    "barabasi_albert": lambda seed: barabasi_albert(200, 3, seed=seed),
    "erdos_renyi": lambda seed: erdos_renyi(200, 6.0, seed=seed),
    "erdos_renyi, directed": lambda seed: erdos_renyi(200, 6.0, directed=True, seed=seed),
    "random_regular": lambda seed: random_regular(200, 6, seed=seed),
    "hubs": lambda seed: hubs(200, 2, mean_degree=3.0, seed=seed),
    "random_weights": lambda seed: random_weights(star(50), seed=seed),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_seed_is_a_graph(name):
    graph = MAKERS[name](3)
    assert graph.equals(MAKERS[name](3))
    assert not graph.equals(MAKERS[name](4))
    assert MAKERS[name](-1).num_nodes == graph.num_nodes  # any whole number is a seed
    assert csr.find_fault(graph.indptr, graph.indices, len(graph.indices)) == -1
    assert graph.num_self_loops == 0 or name.startswith("rmat")


def test_rmat_falls_into_quarters_as_often_as_it_should():
    graph = rmat(12, 20_000, probabilities=(0.5, 0.1, 0.15, 0.25), directed=True, shuffle=False, seed=1)
    source, target, _ = graph.edges()
    assert graph.num_nodes == 4096
    assert graph.num_edges > 19_000  # few fall together
    half = 2048
    share = [((source >= half) == down).mean() for down in (0, 1)]
    # Source low: 0.6, target low: 0.65; deviation of a share of 20,000 is at most 0.0036.
    assert share[0] == pytest.approx(0.6, abs=0.015)
    assert (target < half).mean() == pytest.approx(0.65, abs=0.015)
    assert ((source < half) & (target < half)).mean() == pytest.approx(0.5, abs=0.015)
    assert (source[source < half] % half < half // 2).mean() == pytest.approx(0.6, abs=0.02)  # and again within
    shuffled = rmat(12, 20_000, probabilities=(0.5, 0.1, 0.15, 0.25), directed=True, seed=1)
    assert sorted(shuffled.degree_N.tolist()) == sorted(graph.degree_N.tolist())
    assert graph.degree_N[:64].mean() > 5 * graph.degree_N[-64:].mean()  # low ids have most
    one = rmat(3, 50, probabilities=(0, 1, 0, 0), directed=True, shuffle=False)
    assert [ends.tolist() for ends in one.edges()[:2]] == [[0], [7]]


def test_power_law_has_the_degrees_it_was_asked_for():
    graph = power_law(20_000, 100_000, exponent=2.5, max_degree=500, seed=0)
    degree = np.sort(graph.degree_N)[::-1]
    assert graph.degree_N[0] == pytest.approx(500, rel=0.15)  # Poisson, deviation 22; some edges fall together
    assert graph.num_edges == pytest.approx(100_000, rel=0.02)
    # The tail: P(degree >= d) falls as d ** -(exponent - 1), so from 20 to 100 by 5 ** 1.5 = 11.2.
    assert (degree >= 20).sum() / (degree >= 100).sum() == pytest.approx(11.2, rel=0.35)
    flat = power_law(20_000, 100_000, exponent=4.0, seed=0)
    assert flat.degree_N.max() < graph.degree_N.max()


def test_planted_communities_hold_their_edges():
    graph, community = planted(5000, 40_000, 5, mixing=0.2, seed=0)
    source, target, _ = graph.edges()
    assert np.bincount(community).tolist() == [1000] * 5
    assert community.dtype == np.int32
    # 0.8 stay for sure and a fifth of the others falls into the same: 0.84, and somewhat less as edges within fall together.
    assert (community[source] == community[target]).mean() == pytest.approx(0.84, abs=0.02)
    anywhere, label = planted(5000, 40_000, 5, mixing=1.0, seed=0)
    source, target, _ = anywhere.edges()
    assert (label[source] == label[target]).mean() == pytest.approx(0.2, abs=0.03)
    apart, label = planted(500, 4000, 5, mixing=0.0, seed=0)
    source, target, _ = apart.edges()
    assert (label[source] == label[target]).all()


@given(st.integers(1, 5), st.integers(0, 30), st.integers(0, 100))
def test_barabasi_albert_joins_each_new_node_to_distinct_earlier_ones(each, more, seed):
    graph = barabasi_albert(each + 1 + more, each, seed=seed)
    assert graph.num_edges == (graph.num_nodes - each) * each  # none falls together with another
    rows = [graph.neighbors(node) for node in range(graph.num_nodes)]
    assert all((row < node).sum() == each for node, row in enumerate(rows) if node >= each)
    assert graph.describe()["components"] == 1


def test_barabasi_albert_has_a_power_law():
    assert barabasi_albert(5, 4).neighbors(4).tolist() == [0, 1, 2, 3]
    degree_N = barabasi_albert(20_000, 5, seed=3).degree_N
    # P(degree >= d) = m (m + 1) / (d (d + 1)): 30 / (20 * 21) = 0.071 at 20, 30 / (50 * 51) = 0.0118 at 50
    assert (degree_N >= 20).mean() == pytest.approx(0.0714, abs=0.008)
    assert (degree_N >= 50).mean() == pytest.approx(0.0118, abs=0.003)
    assert degree_N.max() > 300


@pytest.mark.parametrize("directed", [False, True])
def test_erdos_renyi_has_every_edge_equally_often(directed):
    count = np.zeros((6, 6))
    for seed in range(2000):
        graph = erdos_renyi(6, 2.0, directed=directed, seed=seed)
        count += graph.to_scipy().toarray()
    off = count[~np.eye(6, dtype=bool)]
    assert count.trace() == 0
    # Each edge has the probability 0.4: 800 of 2000, deviation 22.
    assert np.abs(off - 800).max() < 4.2 * 22
    graph = erdos_renyi(3000, 20.0, directed=directed, seed=1)
    assert graph.degree_N.mean() == pytest.approx(20, rel=0.03)
    assert graph.degree_N.var() == pytest.approx(20, rel=0.1)
    assert erdos_renyi(5, 4.0, directed=directed).num_edges == (20 if directed else 10)
    assert erdos_renyi(5, 0.0, directed=directed).num_edges == 0
    assert erdos_renyi(1, 0.0).num_nodes == 1


def test_random_regular_is_nearly_so():
    graph = random_regular(2000, 6, seed=0)
    assert graph.degree_N.max() == 6
    assert (graph.degree_N == 6).mean() > 0.97
    assert networkx.is_connected(to_networkx(graph))
    assert random_regular(5, 0).num_edges == 0


def test_stars_and_hubs():
    graph = star(4)
    assert [ends.tolist() for ends in graph.edges()[:2]] == [[0, 0, 0, 0], [1, 2, 3, 4]]
    assert star(3, directed=True).neighbors(2).tolist() == [0]
    assert star(0).num_nodes == 1
    two = hubs(6, 2)
    assert two.degree_N.tolist() == [5, 5, 2, 2, 2, 2]
    assert hubs(6, 0).num_edges == 0


def test_random_weights_are_the_same_both_ways():
    graph = random_weights(rmat(6, 300), 1.0, 3.0, seed=0)  # with_weights refuses any others
    assert 1 < graph.weights.min() < 1.1
    assert 2.9 < graph.weights.max() <= 3
    assert random_weights(star(10_000), seed=1).weights.mean() == pytest.approx(0.5, abs=0.02)
    directed = random_weights(rmat(6, 300, directed=True), seed=0)
    assert len(np.unique(directed.weights)) > 0.99 * len(directed.weights)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rmat(-1, 10), "scale is -1; it must be a whole number, at least 0"),
        (lambda: rmat(40, 10), "scale is 40; it must be at most 31"),
        (lambda: rmat(3, 1.5), "num_edges is 1.5"),
        (lambda: rmat(3, 1, probabilities=(0.5, 0.5, 0.5, 0)), "must be four, not negative, that add up to 1"),
        (lambda: rmat(3, 1, probabilities=(1.5, -0.5, 0, 0)), "must be four, not negative"),
        (lambda: rmat(3, 1, seed=0.5), "seed is 0.5; it must be a whole number"),
        (lambda: power_law(0, 5), "num_nodes is 0"),
        (lambda: power_law(5, 5, exponent=2.0), "exponent is 2.0; it must be above 2"),
        (lambda: power_law(5, 5, max_degree=-1), "max_degree is -1; it must be above 0"),
        (lambda: planted(5, 5, 6), "num_communities is 6; it must be at most 5"),
        (lambda: planted(5, 5, 2, mixing=1.5), "mixing is 1.5; it must be 0 to 1"),
        (lambda: barabasi_albert(3, 3), "edges_each is 3; it must be 1 to 2, below the number of nodes"),
        (lambda: barabasi_albert(3, 0), "edges_each is 0"),
        (lambda: barabasi_albert(1, 1), "edges_each is 1"),
        (lambda: barabasi_albert(3, 1.5), "edges_each is 1.5"),
        (lambda: erdos_renyi(5, 5.0), "mean_degree is 5.0; it must be 0 to 4"),
        (lambda: erdos_renyi(5, float("nan")), "mean_degree is nan"),
        (lambda: random_regular(5, 3), "which is odd"),
        (lambda: random_regular(4, 4), "degree is 4; it must be at most 3"),
        (lambda: star(-1), "num_leaves is -1"),
        (lambda: hubs(3, 4), "num_hubs is 4; it must be at most 3"),
        (lambda: random_weights(star(2), 1.0, 1.0), "must be 0 <= low < high"),
    ],
)
def test_arguments_out_of_range(make, words):
    with pytest.raises(InputError, match=words):
        make()
