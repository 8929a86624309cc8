import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.graph import Graph
from anabranch.graph.fully_ppr.devices import (
    INNER,
    MOVE,
    NODE,
    adapt_gamma,
    big_moves,
    choose_gamma,
    first_pieces,
    last_round,
    make_records,
    num_walks,
    pipelines,
    records_of,
    rounds_formula,
    slot_shares,
    walkers_bound,
)


def random_graph(seed, nodes=20, edges=60, directed=True, weighted=True):
    rng = np.random.default_rng(seed)
    source, target = rng.integers(0, nodes, (2, edges))
    weight = rng.lognormal(0, 1, edges) if weighted else None
    return Graph.from_edges(source, target, weight, directed, nodes)


def step_matrix(graph):
    """P, float64 [N, N]; rows of nodes without edges are 0."""
    dense = graph.to_scipy(np.float64).toarray()
    strength = dense.sum(1, keepdims=True)
    return np.divide(dense, strength, out=np.zeros_like(dense), where=strength > 0)


def marginal(records, record):
    """The node that a draw from a record ends at, following pieces: dict of node to probability."""
    found = {}
    start = records.indptr[record]
    for entry, share in enumerate(slot_shares(records, record)):
        to = records.code[start + entry] >> 1
        if to < records.num_nodes:
            found[to] = found.get(to, 0.0) + share
        else:
            for node, inner in marginal(records, to).items():
                found[node] = found.get(node, 0.0) + share * inner
    return found


# Alias tables and trees


def test_a_tree_by_hand():
    # Node 0 has 5 neighbours of weights 1 to 5; pieces of 2: leaves {1}, {2, 3}, {4, 5} would be linspace 0, 1.67, 3.33, 5
    graph = Graph.from_edges([0] * 5, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5], directed=True)
    records = make_records(graph, theta=2)
    # 3 leaves (6, 7, 8), then 2 inner (9, 10) over 3 children, then the root with 2
    assert len(records) == 11
    assert records.kind.tolist() == [NODE] * 6 + [INNER] * 5
    assert records.largest == 2
    assert marginal(records, 0) == pytest.approx({node: node / 15 for node in range(1, 6)}, abs=1e-6)


@pytest.mark.parametrize("theta", [2, 3, 7, 64])
@pytest.mark.parametrize("weighted", [True, False])
def test_a_hub_s_draw_has_the_weights_and_no_record_is_larger_than_theta(theta, weighted):
    rng = np.random.default_rng(theta)
    weight = rng.lognormal(0, 2, 200) if weighted else None
    graph = Graph.from_edges(np.zeros(200, int), np.arange(1, 201), weight)
    records = make_records(graph, theta=theta)
    assert records.largest <= theta
    expected = step_matrix(graph)
    for node in range(201):
        found = np.zeros(201)
        for to, share in marginal(records, node).items():
            found[to] = share
        assert found == pytest.approx(expected[node], abs=1e-6)
    assert records.largest_bytes < make_records(graph).largest_bytes


def test_depth_of_a_tree_is_logarithmic():
    graph = Graph.from_edges(np.zeros(1000, int), np.arange(1, 1001))
    records = make_records(graph, theta=10)
    depth, record = 0, 0
    while True:
        depth += 1
        record = records.code[records.indptr[record]] >> 1
        if record < graph.num_nodes:
            break
    assert depth == 3  # log_10 of 1000
    assert len(records) == 1001 + 100 + 10


def test_without_hubs_records_are_the_graph():
    graph = random_graph(0)
    records = make_records(graph)
    assert np.array_equal(records.indptr, graph.indptr)
    assert np.array_equal(records.code, 2 * graph.indices)
    assert np.array_equal(records.keep, graph.alias.keep_M)
    assert np.array_equal(records.other, graph.alias.other_M)


@pytest.mark.parametrize("theta", [3, 1 << 16])
@pytest.mark.parametrize("moves", [0, 2])
def test_records_of_slices_are_those_of_the_whole(theta, moves):
    graph = random_graph(4, nodes=50, edges=400)
    whole = make_records(graph, theta=theta, moves=big_moves(graph, 0.2, cap=40) if moves else None, visits=True)
    first_N = first_pieces(graph.indptr, theta)
    assert len(whole) == first_N[-1]
    seen = []
    for first, end in ((0, 20), (20, 21), (21, 50)):
        made = big_moves(graph, 0.2, cap=40, nodes=(first, end)) if moves else None
        ids, part = records_of(graph, first, end, first_N, theta=theta, moves=made, visits=True)
        seen += ids.tolist()
        for place, record in enumerate(ids):
            here = slice(part.indptr[place], part.indptr[place + 1])
            there = slice(whole.indptr[record], whole.indptr[record + 1])
            assert part.kind[place] == whole.kind[record]
            for name in ("code", "keep", "other", "share"):
                assert np.array_equal(getattr(part, name)[here], getattr(whole, name)[there])
    assert sorted(seen) == list(range(len(whole)))


def test_a_record_holds_at_least_two_entries():
    with pytest.raises(InputError, match="theta is 1"):
        make_records(random_graph(0), theta=1)


# Big moves


def outcomes_by_definition(step, degree, alpha, node, steps, cap):
    """[2, N]: alive and ended, by the definition."""
    alive, ended = np.zeros(len(step)), np.zeros(len(step))
    here = np.eye(len(step))[node]
    for _ in range(steps):
        stays = (degree == 0) | (degree > cap)
        alive += np.where(stays, here, 0)
        goes = np.where(stays, 0, here)
        ended += alpha * goes
        here = (1 - alpha) * goes @ step
    return np.array([alive + here, ended])


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_a_big_move_is_the_exact_distribution(seed, steps):
    graph = random_graph(seed, directed=seed % 2 == 0, weighted=seed < 2)
    moves = big_moves(graph, 0.2, steps, cap=256)
    step = step_matrix(graph)
    for node in range(graph.num_nodes):
        if graph.degree_N[node] == 0:
            assert moves.steps_N[node] == 0
            continue
        assert moves.steps_N[node] == steps
        row = slice(moves.indptr[node], moves.indptr[node + 1])
        found = np.zeros((2, graph.num_nodes))
        found[moves.code[row] & 1, moves.code[row] >> 1] = moves.probability[row]
        expected = outcomes_by_definition(step, graph.degree_N, 0.2, node, steps, 256)
        assert found == pytest.approx(expected, abs=1e-12)
        assert moves.probability[row].sum() == pytest.approx(1, abs=1e-12)
        assert (np.diff(moves.code[row]) > 0).all()


def test_a_big_move_on_a_path_by_hand():
    # 0 -> 1 -> 2 -> 3: from 0, ended at 0 (.2), at 1 (.8 x .2), alive at 2 (.64); node 3 has no edges
    moves = big_moves(Graph.from_edges([0, 1, 2], [1, 2, 3], directed=True), 0.2)
    assert moves.code[:3].tolist() == [1, 3, 4]
    assert moves.probability[:3] == pytest.approx([0.2, 0.16, 0.64], abs=1e-15)
    # from 2: ended at 2 (.2), alive at 3 (.8), which it cannot leave by an edge
    row = slice(moves.indptr[2], moves.indptr[3])
    assert moves.code[row].tolist() == [5, 6]
    assert moves.probability[row] == pytest.approx([0.2, 0.8], abs=1e-15)
    assert moves.steps_N.tolist() == [2, 2, 2, 0]


@pytest.mark.parametrize("cap", [2, 5, 12, 30])
def test_a_cap_bounds_outcomes_and_changes_no_distribution(cap):
    graph = random_graph(5, nodes=40, edges=90, weighted=False)
    moves = big_moves(graph, 0.2, 3, cap=cap)
    step = step_matrix(graph)
    length = np.diff(moves.indptr)
    assert length.max() <= cap
    assert (length > 0).any() or cap == 2
    for node in np.flatnonzero(length):
        row = slice(moves.indptr[node], moves.indptr[node + 1])
        found = np.zeros((2, graph.num_nodes))
        found[moves.code[row] & 1, moves.code[row] >> 1] = moves.probability[row]
        expected = outcomes_by_definition(step, graph.degree_N, 0.2, node, moves.steps_N[node], cap)
        assert found == pytest.approx(expected, abs=1e-12)
    # a node is left out only where 2 steps have too many outcomes
    for node in np.flatnonzero((length == 0) & (graph.degree_N > 0) & (graph.degree_N <= cap)):
        assert (outcomes_by_definition(step, graph.degree_N, 0.2, node, 2, cap) > 0).sum() > cap


def test_records_of_moves_draw_their_outcomes():
    graph = random_graph(1)
    moves = big_moves(graph, 0.15)
    records = make_records(graph, moves=moves, visits=True)
    for node in range(graph.num_nodes):
        assert records.kind[node] == (MOVE if moves.steps_N[node] else NODE)
        row = slice(moves.indptr[node], moves.indptr[node + 1])
        if moves.steps_N[node]:
            assert slot_shares(records, node) == pytest.approx(moves.probability[row], abs=1e-6)
            here = slice(records.indptr[node], records.indptr[node + 1])
            assert np.array_equal(records.code[here], moves.code[row])
            assert np.array_equal(records.share[here], moves.probability[row])


@pytest.mark.parametrize(
    ("steps", "cap", "words"), [(1, 9, "2 or 3 steps, not 1"), (4, 9, "not 4"), (2, 1, "cap is 1")]
)
def test_bad_moves_are_refused(steps, cap, words):
    with pytest.raises(InputError, match=words):
        big_moves(random_graph(0), 0.2, steps, cap)


# Numbers of walks, rounds and gamma


def test_number_of_walks_by_hand():
    # (2 + 2/3 * .5) ln(2 / .01) / (.25 * .01) = 2.33333 * 5.29832 / .0025
    assert num_walks(0.5, 0.01, 0.01) == math.ceil(2.3333333333 * 5.298317366548 / 0.0025)
    for bad in ({"delta": 0}, {"delta": 1}, {"p_f": 0}, {"eps": 0}, {"eps": math.nan}):
        with pytest.raises(InputError, match=next(iter(bad))):
            num_walks(**{"eps": 0.5, "delta": 0.01, "p_f": 0.1, **bad})


def test_rounds_by_hand():
    assert [pipelines(10, gamma) for gamma in (1, 3, 10, 20)] == [10, 4, 1, 1]
    assert last_round(1, 0.5) == 1
    assert last_round(1024, 0.5) == pytest.approx(11)  # half of them end each round
    # when the tenth pipeline of 1,024 walks starts, 1024 (1 + 1/2 + ... + 1/512) = 2046 walks are alive
    assert rounds_formula(512, 20, 2, 0.5) == pytest.approx(10 - 1 + math.log2(2046) + 1)
    assert rounds_formula(512, 20, 2, 0.5, pipelined=False) == pytest.approx(10 * 11)


def test_gamma_fits_the_memory():
    # 1000 sources at alpha .2 and 24 bytes: 5 walks alive per walk started, 120 kB per gamma
    assert choose_gamma(1000, 500, 0.2, 1_200_000) == 10
    assert choose_gamma(1000, 7, 0.2, 1_200_000) == 7
    assert choose_gamma(1000, 7, 0.2, 1) == 1
    assert walkers_bound(1000, 10, 0.2, 0) * 24 == 1_200_000


def test_gamma_follows_the_rule():
    assert adapt_gamma(8, 1000, 1000, 24_000, 10_000) == 8  # between 0.7 and 1 of the memory: stay
    assert adapt_gamma(8, 1001, 1000, 24_000, 10_000) == 4  # over: halve
    assert adapt_gamma(1, 1001, 1000, 24_000, 10_000) == 1
    assert adapt_gamma(8, 100, 1000, 24_000, 10_000) == 12  # little used, much overhead: grow
    assert adapt_gamma(1, 100, 1000, 24_000, 10_000) == 2
    assert adapt_gamma(8, 100, 1000, 24_000, 200) == 8  # the fixed cost is 1/6 of the round


@given(st.integers(0, 10_000), st.integers(2, 9))
def test_any_hub_keeps_its_weights(seed, theta):
    graph = random_graph(seed, nodes=8, edges=40)
    records = make_records(graph, theta=theta)
    assert records.largest <= theta
    expected = step_matrix(graph)
    for node in range(graph.num_nodes):
        found = np.zeros(graph.num_nodes)
        for to, share in marginal(records, node).items():
            found[to] += share
        assert found == pytest.approx(expected[node], abs=1e-6)
