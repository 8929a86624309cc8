"""The partitioned plan in this process: distributions, rounds, walkers, and that partitions change nothing."""

import math

import numpy as np
import pytest
from scipy import stats

from anabranch.graph import Graph
from anabranch.graph.counters import ABSORB, SOURCE, UNIFORM
from anabranch.graph.fully_ppr.devices import big_moves, last_round, make_records, rounds_formula, walkers_bound
from anabranch.graph.fully_ppr.rounds import (
    UNIT,
    Rows,
    Rules,
    Schedule,
    best_rows,
    joined,
    merged,
    move,
    newcomers,
    run_rounds,
    split,
)
from anabranch.graph.ppr import power_iteration

NAMES = {SOURCE: "source", ABSORB: "absorb", UNIFORM: "uniform"}


def random_graph(seed, nodes=12, edges=30, directed=True, weighted=True):
    rng = np.random.default_rng(seed)
    source, target = rng.integers(0, nodes, (2, edges))
    weight = rng.lognormal(0, 1, edges) if weighted else None
    return Graph.from_edges(source, target, weight, directed, nodes + 1)  # the last one is isolated


def counted(graph, walks, *, alpha=0.2, dangling=SOURCE, full=False, moves=0, theta=1 << 16, seed=0, gamma=None, **run):
    """Counts [N, N] of all sources, and the schedule. Fractions of visits are in units of one visit."""
    with_moves = big_moves(graph, alpha, moves) if moves else None
    records = make_records(graph, theta=theta, moves=with_moves, visits=full)
    unit = UNIT if full and moves else 1
    rules = Rules(seed, alpha, dangling, full, graph.num_nodes, unit)
    schedule = Schedule.make(graph.num_nodes, walks, alpha, math.inf, gamma or walks)
    found = run_rounds(records, np.arange(graph.num_nodes), schedule, rules, **run)
    dense = np.zeros((graph.num_nodes, graph.num_nodes))
    dense[found.source, found.key] = found.count / unit
    return dense, schedule


def exact(graph, alpha=0.2, dangling=SOURCE):
    rows = [power_iteration(graph, node, alpha, tol=1e-12, dangling=NAMES[dangling]) for node in range(graph.num_nodes)]
    return np.maximum(rows, 0)  # rounding


def p_value(count_NN, expected_NN):
    """Chi-square over all sources, cells expected less than 5 times pooled."""
    statistic, degrees = 0.0, 0
    for count_N, share_N in zip(count_NN, expected_NN, strict=True):
        expected_N = share_N * count_N.sum()
        large = expected_N >= 5
        cells = np.array([*count_N[large], count_N[~large].sum()])
        wished = np.array([*expected_N[large], expected_N[~large].sum()])
        cells, wished = cells[wished > 1e-9], wished[wished > 1e-9]
        statistic += ((cells - wished) ** 2 / wished).sum()
        degrees += len(cells) - 1
    return stats.chi2.sf(statistic, degrees)


@pytest.mark.parametrize("dangling", [SOURCE, ABSORB, UNIFORM])
@pytest.mark.parametrize("moves", [0, 2, 3])
@pytest.mark.parametrize("theta", [2, 1 << 16])
def test_ends_are_distributed_as_the_exact_scores(dangling, moves, theta):
    graph = random_graph(3, nodes=12, edges=36)
    found, _ = counted(graph, 20_000, dangling=dangling, moves=moves, theta=theta, seed=moves)
    assert (found.sum(1) == 20_000).all()
    assert p_value(found, exact(graph, dangling=dangling)) > 1e-3


def test_a_wrong_distribution_is_noticed():
    graph = random_graph(3, nodes=12, edges=36)
    found, _ = counted(graph, 20_000)
    assert p_value(found, exact(graph, alpha=0.21)) < 1e-6
    unweighted = Graph(graph.indptr, graph.indices, None, True)
    assert p_value(found, exact(unweighted)) < 1e-6


@pytest.mark.parametrize("moves", [0, 2, 3])
@pytest.mark.parametrize("dangling", [SOURCE, ABSORB, UNIFORM])
def test_visits_are_right_in_expectation(moves, dangling):
    graph = random_graph(4, nodes=10, edges=24)
    walks = 40_000
    found, _ = counted(graph, walks, full=True, moves=moves, dangling=dangling, theta=4)
    expected = exact(graph, dangling=dangling)
    # alpha visits / walks is unbiased. Visits of one walk vary by (2 - alpha) / alpha times their mean at most, roughly
    error = np.abs(0.2 * found / walks - expected)
    assert (error < 6 * np.sqrt(expected * 2 / walks) + 1e-6).all()
    assert found.sum() / (walks * graph.num_nodes) == pytest.approx(5, rel=0.01)  # 1 / alpha visits a walk


def test_visits_on_the_way_of_a_move_vary_less():
    graph = random_graph(4, nodes=10, edges=24)
    expected = exact(graph)
    errors = []
    for moves in (0, 3):
        found = [counted(graph, 50, full=True, moves=moves, seed=seed)[0] for seed in range(20)]
        errors.append(np.mean([((0.2 * of / 50 - expected) ** 2).sum() for of in found]))
    assert errors[1] < 0.6 * errors[0]


def test_counts_per_source_sum_to_the_walks():
    found, schedule = counted(random_graph(0), 7, gamma=3)
    assert (found.sum(1) == 7).all()
    assert [entry.started for entry in schedule.log[:4]] == [3, 3, 1, 0]


# Rounds


def test_rounds_of_walks_that_all_take_as_long():
    # A path of 5 steps that ends in a sink, and walks that hardly ever end by chance: L = 5 + 1 rounds, with the last look at the sink
    graph = Graph.from_edges(np.arange(5), np.arange(1, 6), directed=True)
    for walks, gamma in ((12, 1), (12, 5), (12, 12)):
        rounds = {}
        for pipelined in (True, False):
            records = make_records(graph)
            schedule = Schedule.make(1, walks, 1e-9, math.inf, gamma, pipelined=pipelined)
            found = run_rounds(records, np.array([0]), schedule, Rules(0, 1e-9, ABSORB, False, 6))
            assert (found.key.tolist(), found.count.tolist()) == ([5], [walks])
            rounds[pipelined] = len(schedule.log)
        pipelines = -(-walks // gamma)
        assert rounds[True] == pipelines - 1 + 6
        assert rounds[False] == pipelines * 6


def test_rounds_formula_holds_in_the_log():
    graph = random_graph(1, nodes=200, edges=1000, weighted=False)
    for gamma in (1, 4, 16):
        _, schedule = counted(graph, 48, gamma=gamma, alpha=0.3)
        expected = rounds_formula(graph.num_nodes, 48, gamma, 0.3)
        # The longest of many walks is a Gumbel variable of scale 1 / -ln .7 = 2.8 rounds
        assert -2 * 2.8 < len(schedule.log) - expected < 7 * 2.8
        assert [entry.started for entry in schedule.log][: 48 // gamma] == [gamma] * (48 // gamma)


def test_walkers_stay_below_the_bound():
    graph = random_graph(2, nodes=200, edges=1000)
    for gamma in (1, 3):
        _, schedule = counted(graph, 60, gamma=gamma, alpha=0.2)
        bound = walkers_bound(graph.num_nodes, gamma, 0.2)
        assert (
            0.9 * graph.num_nodes * gamma / 0.2 < schedule.peak <= bound
        )  # it comes near: the bound is that of steady state
        assert all(entry.rows <= entry.walks for entry in schedule.log)


def test_big_moves_halve_the_rounds_and_trees_add_levels():
    graph = random_graph(5, nodes=100, edges=500, weighted=False)
    rounds = {}
    for moves in (0, 2, 3):
        _, schedule = counted(graph, 50, moves=moves, alpha=0.1)
        rounds[moves] = len(schedule.log)
    assert rounds[2] < 0.65 * rounds[0]
    assert rounds[3] < rounds[2]
    _, schedule = counted(graph, 50, theta=2, alpha=0.1)
    assert len(schedule.log) > 1.5 * rounds[0]


# Same rows, however they are cut


@pytest.mark.parametrize("full", [False, True])
def test_partitions_change_nothing(full):
    graph = random_graph(6, nodes=30, edges=120)
    options = {"full": full, "moves": 2, "theta": 3, "gamma": 4, "seed": 9}
    one, first = counted(graph, 30, **options)
    for partitions in (2, 7):
        other, second = counted(graph, 30, partitions=partitions, **options)
        assert np.array_equal(one, other)
        assert first.log == second.log
    again, _ = counted(graph, 30, **options)
    assert np.array_equal(one, again)
    other, _ = counted(graph, 30, **{**options, "seed": 10})
    assert not np.array_equal(one, other)


def test_a_round_does_not_depend_on_how_rows_are_given():
    graph = random_graph(7)
    records, rules = make_records(graph), Rules(3, 0.2, SOURCE, False, graph.num_nodes)
    whole = newcomers(np.arange(graph.num_nodes), 6)
    parts = joined([newcomers(np.arange(graph.num_nodes)[::-1], count) for count in (1, 2, 3)])
    for left, right in zip(move(whole, records, None, rules, 5), move(parts, records, None, rules, 5), strict=True):
        for name in ("source", "key", "count"):
            assert np.array_equal(getattr(left, name), getattr(right, name))
    assert not np.array_equal(move(whole, records, None, rules, 6)[0].key, move(whole, records, None, rules, 5)[0].key)


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_pieces_of_a_round_change_nothing(piece, monkeypatch):
    graph = random_graph(7)
    for full in (False, True):
        moves = big_moves(graph, 0.2)
        records, rules = make_records(graph, moves=moves, visits=full), Rules(3, 0.2, SOURCE, full, graph.num_nodes, 8)
        walks = newcomers(np.arange(graph.num_nodes), 50)
        whole = move(walks, records, None, rules, 5)
        with monkeypatch.context() as patched:
            patched.setattr("anabranch.graph.fully_ppr.rounds.PIECE", piece)
            parts = move(walks, records, None, rules, 5)
        for left, right in zip(whole, parts, strict=True):
            for name in ("source", "key", "count"):
                assert np.array_equal(getattr(left, name), getattr(right, name))


def test_split_holds_every_record_once():
    graph = random_graph(8, nodes=40, edges=200)
    records = make_records(graph, theta=3, moves=big_moves(graph, 0.2, cap=4), visits=True)
    found = [split(records, part, 3) for part in range(3)]
    assert sorted(np.concatenate([ids for _, ids in found])) == list(range(len(records)))
    for held, ids in found:
        for place, record in enumerate(ids):
            here = slice(held.indptr[place], held.indptr[place + 1])
            there = slice(records.indptr[record], records.indptr[record + 1])
            assert held.kind[place] == records.kind[record]
            for name in ("code", "keep", "other", "share"):
                assert np.array_equal(getattr(held, name)[here], getattr(records, name)[there])


def rows(*triples):
    return Rows(*(np.array(column, np.int64) for column in zip(*triples, strict=True)))


def listed(found):
    return list(zip(found.source.tolist(), found.key.tolist(), found.count.tolist(), strict=True))


def test_merged_by_hand():
    assert listed(merged(rows((1, 5, 2), (0, 7, 1), (1, 5, 3), (0, 2, 4)))) == [(0, 2, 4), (0, 7, 1), (1, 5, 5)]
    huge = 2**40  # keys that do not fit into one number together
    assert listed(merged(rows((huge, huge, 2), (3, huge, 1), (huge, huge, 3)))) == [(3, huge, 1), (huge, huge, 5)]
    assert len(merged(joined([]))) == 0


def test_best_rows_by_hand():
    given = rows((4, 1, 2), (4, 0, 2), (4, 2, 6), (1, 9, 1), (1, 3, 3))
    found, score = best_rows(given, 2, 0.0)
    assert listed(found) == [(1, 3, 3), (1, 9, 1), (4, 2, 6), (4, 0, 2)]  # ties to the lower node
    assert score.tolist() == pytest.approx([0.75, 0.25, 0.6, 0.2])
    assert listed(best_rows(given, 0, 0.6)[0]) == [(1, 3, 3), (4, 2, 6)]
    assert len(best_rows(given, 0, 0.0)[0]) == 5


# Gamma


def test_gamma_grows_while_rounds_are_mostly_overhead_and_falls_when_memory_is_passed():
    graph = random_graph(9, nodes=100, edges=400)
    records, rules = make_records(graph), Rules(0, 0.2, SOURCE, False, graph.num_nodes)
    schedule = Schedule(graph.num_nodes, 400, 1, memory=24 * 3_000, overhead=5_000, patience=5)
    run_rounds(records, np.arange(graph.num_nodes), schedule, rules)
    gammas = [entry.gamma for entry in schedule.log]
    assert gammas[:16:5] == [1, 2, 3, 4]  # by half, rounded down, or by one
    assert sum(entry.started for entry in schedule.log) == 400
    rows = [entry.rows for entry in schedule.log]
    assert max(rows) < 1.5 * 3_000
    assert max(rows) > 0.7 * 3_000  # it came near what is allowed
    tight = Schedule(graph.num_nodes, 400, 64, memory=24 * 1_000, overhead=5_000, patience=5)
    run_rounds(records, np.arange(graph.num_nodes), tight, rules)
    gammas = [entry.gamma for entry in tight.log]
    assert gammas[:16:5] == [64, 32, 16, 8]


def test_a_schedule_goes_on_where_a_checkpoint_left_it():
    schedule = Schedule.make(10, 100, 0.2, 24 * 1000)
    for _ in range(5):
        schedule.finish(schedule.start(), 500, 400, 450)
    assert Schedule.from_dict(schedule.to_dict()) == schedule
    assert schedule.number == 5
    assert last_round(1, 0.2) == 1
