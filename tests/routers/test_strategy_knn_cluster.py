"""Neighbours and clusters: small cases by hand, naive loops, and what k-means must keep."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import DataError, InputError
from anabranch.kmeans import MOST_ITERATIONS, _lloyd, _seeds, by_size, distances, kmeans
from anabranch.routers import strategies
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Model, Pool, Query
from anabranch.routers.strategies.knn import Knn, top_k

POOL = Pool((Model(name="a"), Model(name="b")))


def recorded(vector, score, cost=None):
    vector = np.array(vector, np.float32)
    return Recorded(
        query=tuple(f"q{row}" for row in range(len(vector))),
        models=("a", "b", "c")[: len(score[0])],
        score_NM=np.array(score, float),
        cost_NM=None if cost is None else np.array(cost, float),
        vector_ND=vector / np.linalg.norm(vector, axis=1, keepdims=True),
    )


ANGLES = np.deg2rad([0, 10, 20, 90, 100])
CIRCLE = np.stack((np.cos(ANGLES), np.sin(ANGLES)), 1)
SCORES = [[1, 0], [0, 0.5], [0.5, 1], [0, 1], [0, 1]]


def at(degrees):
    return Query(text="", vector_D=np.array([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))], np.float32))


def test_knn_by_hand():
    one = strategies.make("knn", k=2).fit(recorded(CIRCLE, SCORES))
    decision = one.route(at(4), POOL)  # nearest: 0 and 10 degrees; a (1 + 0) / 2, b (0 + 0.5) / 2
    assert [(c.model, c.quality) for c in decision.candidates] == [("a", 0.5), ("b", 0.25)]
    assert [item["row"] for item in decision.details["neighbours"]] == [0, 1]
    assert decision.confidence == 0.5  # a is best on row 0 alone
    assert one.route(at(96), POOL).model == "b"


def test_knn_with_temperature_by_hand():
    one = strategies.make("knn", k=2, temperature=0.01).fit(recorded(CIRCLE, SCORES))
    near, far = np.cos(np.deg2rad(4)), np.cos(np.deg2rad(6))
    weight = 1 / (1 + np.exp((far - near) / 0.01))
    assert one.route(at(4), POOL).candidates[0].quality == pytest.approx(weight, abs=1e-5)


def test_knn_over_holes():
    score = [[1, np.nan], [np.nan, np.nan], [0, np.nan], [0, 0.2], [0.3, 0.4]]
    one = strategies.make("knn", k=2).fit(recorded(CIRCLE, score))
    assert len(one.predictor.vector_ND) == 4  # a row without scores tells nothing
    quality = one.predictor.predict_one(at(4)).quality_NM[0]
    np.testing.assert_allclose(quality, [0.5, 0.3])  # rows 0 and 20 degrees; b by its overall mean


def test_knn_equals_a_naive_loop():
    rng = np.random.default_rng(0)
    data = recorded(rng.standard_normal((80, 6)), rng.random((80, 3)))
    test = recorded(rng.standard_normal((20, 6)), np.full((20, 3), np.nan))
    quality = Knn.Config(k=7).build().fit(data).predict(test).quality_NM
    for row, vector in enumerate(test.vector_ND):
        nearest = sorted(range(80), key=lambda n: (-float(vector @ data.vector_ND[n]), n))[:7]
        np.testing.assert_allclose(quality[row], data.score_NM[nearest].mean(0))


@pytest.mark.slow
def test_hnsw_finds_what_exact_search_finds():
    pytest.importorskip("numba")
    rng = np.random.default_rng(0)
    data = recorded(rng.standard_normal((300, 8)), rng.random((300, 2)))
    test = recorded(rng.standard_normal((30, 8)), np.full((30, 2), np.nan))
    exact = Knn.Config(k=10).build().fit(data)
    index = Knn.Config(k=10, index="hnsw").build().fit(data)
    np.testing.assert_allclose(index.predict(test).quality_NM, exact.predict(test).quality_NM, atol=1e-6)
    twin = Knn.Config(k=10, index="hnsw").build()
    twin.models = index.models
    twin.load_state(*index.state())
    assert np.array_equal(twin.predict(test).quality_NM, index.predict(test).quality_NM)


def test_a_neighbour_that_a_walk_did_not_find_is_none():
    class Walk:
        def search(self, query_QD, k, ef):
            assert (k, ef) == (3, 7)
            return np.array([[4, 2, 0]]), np.array([[0.9, 0.8, -np.inf]], np.float32)

    for temperature in (None, 0.1):
        one = Knn.Config(k=3, ef=7, temperature=temperature).build().fit(recorded(CIRCLE, SCORES))
        one._index = Walk()
        found = one.predict_one(Query(text="", vector_D=recorded(CIRCLE, SCORES).vector_ND[0]))
        weight = np.array([1, 1 if temperature is None else np.exp(-1)])
        np.testing.assert_allclose(found.quality_NM[0], weight @ one.score_NM[[4, 2]] / weight.sum(), rtol=1e-5)
        assert [near["row"] for near in found.details["neighbours"]] == [4, 2]


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_top_k_is_a_stable_sort(columns, levels, seed):
    value = np.random.default_rng(seed).integers(0, levels, (3, columns)).astype(float)
    for k in range(1, columns + 1):
        column, found = top_k(value, k)
        expected = np.argsort(-value, axis=1, kind="stable")[:, :k]
        assert np.array_equal(column, expected)
        assert np.array_equal(found, np.take_along_axis(value, expected, 1))


@pytest.mark.parametrize("vector", [np.zeros(3, np.float32), np.array([np.nan, 1], np.float32)])
def test_knn_refuses_other_vectors(vector):
    one = strategies.make("knn").fit(recorded(CIRCLE, SCORES))
    with pytest.raises(InputError, match="vector"):
        one.route(Query(text="", vector_D=vector), POOL)


def test_learning_from_vectors_that_are_not_finite():
    data = recorded(CIRCLE, SCORES)
    bad = data.with_vectors(np.where(np.arange(5)[:, None] == 3, np.nan, data.vector_ND))
    for name in ("knn", "ridge", "cluster", "sw_elo", "mf", "mlp", "irt", "hybrid", "semantic", "linucb"):
        with pytest.raises(DataError, match="row 3 is not finite"):
            strategies.make(name).fit(bad)


# -- k-means


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_three_heaps(seed):
    rng = np.random.default_rng(seed)
    heap = rng.permutation(np.repeat([0, 1, 2], 20))
    x = np.array([[0, 0], [10, 0], [0, 10]])[heap] + rng.normal(0, 0.1, (60, 2))
    centre, cluster = kmeans(x, 3, seed=seed)
    for number in range(3):
        assert len(set(cluster[heap == number])) == 1
        np.testing.assert_allclose(centre[cluster[heap == number][0]], x[heap == number].mean(0), atol=1e-5)


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_kmeans_ends_where_lloyd_stands_still(rows, clusters, seed):
    x = np.random.default_rng(seed).integers(0, 4, (rows, 2)).astype(np.float32)
    centre, cluster = kmeans(x, clusters, num_starts=1, seed=seed)
    assert len(centre) <= min(clusters, len(np.unique(x, axis=0)))
    assert np.array_equal(np.unique(cluster), np.arange(len(centre)))  # none is empty
    for number in range(len(centre)):
        np.testing.assert_allclose(centre[number], x[cluster == number].mean(0), atol=1e-5)
    naive = ((x[:, None] - centre) ** 2).sum(2)
    np.testing.assert_allclose(distances(x, centre), naive, atol=1e-4)
    np.testing.assert_allclose(naive[np.arange(rows), cluster], naive.min(1), atol=1e-4)


def test_kmeans_gives_each_empty_cluster_a_row_of_its_own():
    x = np.array([[0], [1], [2], [10]], np.float32)
    centre, cluster, _ = _lloyd(x, np.array([[0.9], [100], [200]], np.float32), 1, False)
    assert cluster.tolist() == [0, 0, 2, 1]
    assert centre[:, 0].tolist() == [0.5, 10, 2]


def test_kmeans_keeps_the_best_of_its_starts():
    """Of rows without heaps, where each start ends elsewhere."""
    x = np.random.default_rng(1).normal(size=(60, 2)).astype(np.float32)
    found = set()
    for seed in range(8):
        each = [
            _lloyd(x, _seeds(x, 6, np.random.default_rng([seed, start])), MOST_ITERATIONS, False)[2]
            for start in range(4)
        ]
        centre, cluster = kmeans(x, 6, seed=seed)
        assert ((x - centre[cluster]) ** 2).sum() == pytest.approx(min(each), rel=1e-4)
        found.add(int(np.argmin(each)))
    # None of them is always it.
    assert len(found) > 2


@pytest.mark.parametrize("seed", range(4))
def test_a_row_that_is_there_again_makes_no_cluster(seed):
    """By products of float32 it is not quite at the place of the other."""
    row = np.random.default_rng(seed).normal(size=(1, 384)).astype(np.float32)
    x = np.tile(row / np.linalg.norm(row), (6, 1))
    assert len(kmeans(x, 3)[0]) == 1


def test_kmeans_is_what_scikit_learn_finds_from_the_same_seeds():
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 5)).astype(np.float32)
    start = _seeds(x, 7, np.random.default_rng([3, 0]))
    theirs = KMeans(7, init=start, n_init=1, max_iter=100, tol=0, algorithm="lloyd").fit(x)
    centre, cluster = kmeans(x, 7, num_starts=1, seed=3)
    np.testing.assert_array_equal(cluster, theirs.labels_)
    np.testing.assert_allclose(centre, theirs.cluster_centers_, atol=1e-5)


def test_kmeans_on_the_sphere_stands_still_there(monkeypatch):
    x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    centre, cluster = kmeans(x, 6, num_starts=1, on_sphere=True)
    np.testing.assert_allclose(np.linalg.norm(centre, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(cluster, (x @ centre.T).argmax(1))
    for number in range(6):
        mean = x[cluster == number].mean(0)
        np.testing.assert_allclose(centre[number], mean / np.linalg.norm(mean), atol=1e-5)
    # In blocks of rows it is the same.
    monkeypatch.setattr("anabranch.kmeans.PIECE", 50)
    again, same = kmeans(x, 6, num_starts=1, on_sphere=True)
    np.testing.assert_array_equal(cluster, same)
    np.testing.assert_allclose(centre, again, atol=1e-6)


def test_clusters_by_size_and_what_makes_none():
    assert by_size(np.array([2, 0, 1, 1, 2, 2, 3])).tolist() == [0, 2, 1, 1, 0, 0, 3]
    assert kmeans(np.ones((3, 2), np.float32), 5)[1].tolist() == [0, 0, 0]
    for rows, number in ((3, 0), (0, 1)):
        with pytest.raises(InputError, match=f"num_clusters is {number} for {rows} rows"):
            kmeans(np.ones((rows, 2), np.float32), number)


# -- the ranking of clusters


def test_cluster_ranking_by_hand():
    """Two heaps on a circle; every cluster's means, their pull to the overall mean, and the weights of the two nearest."""
    data = recorded(CIRCLE, SCORES)
    one = strategies.make("cluster", num_clusters=2, nearest=2, beta=9.0, prior=1.0).fit(data).predictor
    heap = int(distances(data.vector_ND[:1], one.centre_CD)[0].argmin())
    # heap of 0, 10, 20 degrees: a (1 + 0 + 0.5) = 1.5, b 1.5; overall mean a 0.3, b 0.7
    np.testing.assert_allclose(one.score_CM[heap], [(1.5 + 0.3) / 4, (1.5 + 0.7) / 4])
    np.testing.assert_allclose(one.score_CM[1 - heap], [(0 + 0.3) / 3, (2 + 0.7) / 3])
    vector = at(40).vector_D
    away = np.linalg.norm(one.centre_CD - vector, axis=1)
    weight = np.exp(-9 * away) / np.exp(-9 * away).sum()
    np.testing.assert_allclose(one.predict_one(at(40)).quality_NM[0], weight @ one.score_CM, rtol=1e-5)


def test_cluster_with_performance_weight_by_hand():
    data = recorded(CIRCLE, SCORES, cost=[[1, 4]] * 5)
    one = strategies.make("cluster", num_clusters=1, nearest=1, prior=0.0, performance_weight=0.7).fit(data).predictor
    # means a 0.3, b 0.7: performance 0 and 1; cost 1 and 4 of at most 4: saving 0.75 and 0
    np.testing.assert_allclose(one.predict_one(at(0)).quality_NM[0], [0.7 * 0 + 0.3 * 0.75, 0.7 * 1 + 0])
    with pytest.raises(DataError, match="costs"):
        strategies.make("cluster", performance_weight=0.7).fit(recorded(CIRCLE, SCORES))


def test_nearest_clusters_are_three_by_default():
    rng = np.random.default_rng(0)
    one = strategies.make("cluster", num_clusters=5).fit(recorded(rng.standard_normal((40, 4)), rng.random((40, 2))))
    query = Query(text="", vector_D=rng.standard_normal(4).astype(np.float32))
    found = one.route(query, POOL).details["clusters"]
    assert len(found) == 3
    assert sum(item["weight"] for item in found) == pytest.approx(1, abs=1e-3)
