"""Vector indexes: exact against loops, clustered against exact, HNSW near it, and never across namespaces."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.config import from_dict, to_dict
from anabranch.errors import InputError
from anabranch.routers.retrieve import Clustered, Exact, Hnsw, Index
from anabranch.routers.retrieve.clustered import centres, closest

CONFIGS = [Exact.Config(), Clustered.Config(probes=None), Clustered.Config(probes=2), Hnsw.Config()]
EXACT = CONFIGS[:2]


def name_of(config):
    return f"{config.owner.kind}{getattr(config, 'probes', '') or ''}"


each = pytest.mark.parametrize("config", CONFIGS, ids=name_of)
each_exact = pytest.mark.parametrize("config", EXACT, ids=name_of)


def vectors(count, dim=8, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def naive(vector_by_id, query, k):
    """Cosines one by one, sorted, ties by id."""
    found = []
    for id, vector in vector_by_id.items():
        length = math.sqrt(sum(float(x) ** 2 for x in vector)) * math.sqrt(sum(float(x) ** 2 for x in query))
        cosine = sum(float(x) * float(y) for x, y in zip(vector, query, strict=True)) / length if length else 0.0
        found.append((-round(cosine, 5), id))
    return [id for _, id in sorted(found)[:k]]


@each
def test_by_hand(config):
    index = config.build(2)
    assert index.add([[3, 0], [0, 2], [1, 1]]).tolist() == [0, 1, 2]
    ids, similarity = index.search([10, 0], k=2)
    assert ids.tolist() == [0, 2]
    np.testing.assert_allclose(similarity, [1, math.sqrt(0.5)], atol=1e-6)
    np.testing.assert_allclose(index.vectors([2, 1]), [[math.sqrt(0.5)] * 2, [0, 1]], atol=1e-6)
    assert index.vectors([]).shape == (0, 2)


@each_exact
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_equals_loops_over_any_changes(config, data):
    """Few values, so that ties and zero vectors are common."""
    index, held, next_id = config.build(3), {}, 0
    row = st.lists(st.integers(-1, 1), min_size=3, max_size=3)
    for _ in range(data.draw(st.integers(1, 8))):
        if held and data.draw(st.booleans()):
            gone = data.draw(st.lists(st.sampled_from(sorted(held)), unique=True))
            assert index.remove([*gone, 999]) == len(gone)
            held = {id: vector for id, vector in held.items() if id not in gone}
        else:
            rows = data.draw(st.lists(row, min_size=1, max_size=9))
            ids = index.add(np.array(rows))
            assert ids.tolist() == list(range(next_id, next_id + len(rows)))
            next_id += len(rows)
            held |= dict(zip(ids.tolist(), rows, strict=True))
    query, k = data.draw(row), data.draw(st.integers(1, 12))
    assert index.search(query, k=k)[0].tolist() == naive(held, query, k)
    assert len(index) == len(held) == sum(index.sizes().values())


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30, 500, 2000])
def test_probing_all_clusters_equals_exact_and_k_is_the_root(count):
    vector_ND = vectors(count)
    exact, clustered = Exact.Config().build(8), Clustered.Config(probes=None).build(8)
    exact.add(vector_ND), clustered.add(vector_ND)
    assert clustered.num_clusters() == round(math.sqrt(count))
    for query in vectors(20, seed=1):
        for k in (1, 10):
            ours, theirs = clustered.search(query, k=k), exact.search(query, k=k)
            assert ours[0].tolist() == theirs[0].tolist()
            assert ours[1].tolist() == theirs[1].tolist()  # to the bit: candidates are measured row by row


def test_more_probes_find_more():
    vector_ND = vectors(3000, 16)
    exact = Exact.Config().build(16)
    exact.add(vector_ND)
    recalls = []
    for probes in (1, 4, 16, 55):
        index = Clustered.Config(probes=probes).build(16)
        index.add(vector_ND)
        hits = [
            len(np.intersect1d(index.search(q, k=10)[0], exact.search(q, k=10)[0])) / 10
            for q in vectors(50, 16, seed=2)
        ]
        recalls.append(np.mean(hits))
    assert recalls == sorted(recalls)
    assert recalls[0] < 0.5
    assert recalls[-1] == 1.0


def test_few_probes_still_give_k_results():
    index = Clustered.Config(probes=1).build(8)
    index.add(vectors(100))
    assert len(index.search(vectors(1)[0], k=60)[0]) == 60


def test_clusters_follow_growth_and_shrinking():
    index = Clustered.Config(rebuild_at=0.5).build(8)
    for start in range(0, 400, 10):
        index.add(vectors(10, seed=start))
    grown = index.num_clusters()
    assert math.sqrt(400 / 1.5) - 1 <= grown <= 20
    index.remove(range(0, 390))
    assert index.num_clusters() <= round(math.sqrt(10 * 1.5))
    assert sorted(index.search(vectors(1)[0], k=50)[0].tolist()) == list(range(390, 400))


def test_k_means_finds_clear_groups_and_does_not_leave_a_cluster_empty():
    corners = np.eye(4, dtype=np.float32)
    vector_ND = np.repeat(corners, 30, axis=0) + 0.01 * vectors(120, 4)
    vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    for seed in range(5):
        cluster_N = closest(vector_ND, centres(vector_ND, 4, seed=seed))
        assert len(set(cluster_N.tolist())) == 4
    same = np.ones((9, 2), np.float32) / math.sqrt(2)
    np.testing.assert_allclose(centres(same, 3, seed=0), same[:1], atol=1e-6)
    assert centres(0 * same, 3, seed=0).tolist() == [[0, 0]]


def test_hnsw_finds_nearly_all():
    vector_ND = vectors(2000, 16)
    exact, index = Exact.Config().build(16), Hnsw.Config().build(16)
    exact.add(vector_ND), index.add(vector_ND)
    hits = [len(np.intersect1d(index.search(q)[0], exact.search(q)[0])) / 10 for q in vectors(50, 16, seed=3)]
    assert np.mean(hits) > 0.97
    graph = index._shards[""]._graph
    index.remove(range(0, 300))
    assert graph.stats()["deleted"] == 300
    assert index.search(vector_ND[3], k=5)[0].min() >= 300
    index.compact()
    assert graph.stats()["deleted"] == 0
    assert sorted(index.search(vector_ND[3], k=2000)[0].tolist()) == list(range(300, 2000))


@each
def test_namespaces_never_mix(config):
    random = np.random.default_rng(0)
    index = config.build(4)
    owner = {}
    for step in range(60):
        namespace = f"n{random.integers(5)}"
        owner |= dict.fromkeys(index.add(vectors(3, 4, seed=step), namespace=namespace).tolist(), namespace)
        if step % 7 == 0:
            gone = random.choice(sorted(owner), 2, replace=False).tolist()
            index.remove(gone)
            owner = {id: name for id, name in owner.items() if id not in gone}
    for number in range(500):
        namespace = f"n{random.integers(7)}"  # two of them hold nothing
        ids, _ = index.search(vectors(1, 4, seed=number)[0], k=8, namespace=namespace)
        assert {owner[id] for id in ids.tolist()} <= {namespace}
        assert len(ids) == min(8, sum(name == namespace for name in owner.values()))
    everywhere = index.search(vectors(1, 4)[0], k=1000, namespace=None)[0]
    assert sorted(everywhere.tolist()) == sorted(owner)
    assert index.namespace_of(sorted(owner)[0]) == owner[sorted(owner)[0]]


@each
def test_allow_is_obeyed(config):
    index = config.build(8)
    index.add(vectors(200))
    ids, _ = index.search(vectors(1)[0], k=50, allow=lambda id_N: id_N % 10 == 3)
    assert len(ids) == 20
    assert (ids % 10 == 3).all()
    assert len(index.search(vectors(1)[0], allow=lambda id_N: np.zeros(len(id_N), bool))[0]) == 0


@each
def test_state_reads_back(config):
    index = config.build(8)
    index.add(vectors(150), namespace="a")
    index.add(vectors(40, seed=1), ids=range(1000, 1040), namespace="b")
    index.remove(range(5, 60))
    arrays, facts = index.state()
    other = from_dict(Index.Config, json.loads(json.dumps(to_dict(config)))).build(8)
    other.load_state(arrays, json.loads(json.dumps(facts)))
    assert other.sizes() == index.sizes() == {"a": 95, "b": 40}
    for query in vectors(20, seed=2):
        for namespace in ("a", "b", None):
            ours, theirs = (i.search(query, k=7, namespace=namespace) for i in (index, other))
            if config.owner is Hnsw:
                assert len(np.intersect1d(ours[0], theirs[0])) >= 6  # another graph of the same vectors
            else:
                assert ours[0].tolist() == theirs[0].tolist()
                assert ours[1].tolist() == theirs[1].tolist()
    assert other.add(vectors(1)).tolist() == [1040]
    with pytest.raises(InputError, match="8 dimensions, the index has 9"):
        config.build(9).load_state(arrays, facts)


@each
def test_empty_and_bad_input(config):
    index = config.build(3)
    assert index.search([1, 2, 3])[0].tolist() == []
    assert index.add(np.zeros((0, 3))).tolist() == []
    assert index.remove([4]) == 0
    index.add([[0, 0, 0], [1, 0, 0]])  # an empty text has a vector of zeros
    assert index.search([1, 0, 0])[1].tolist() == [1, 0]
    assert index.search([0, 0, 0])[1].tolist() == [0, 0]
    for bad, message in (
        (lambda: index.add([[1, 2]]), r"vectors has shape \[1, 2\]; the index holds vectors of 3 numbers"),
        (lambda: index.search([1, 2, 3, 4]), "query has shape"),
        (lambda: index.search([1, np.nan, 3]), "not finite"),
        (lambda: index.add([[np.inf, 0, 0]]), "not finite"),
        (lambda: index.add([[1, 0, 0]], ids=[1]), "id 1 is in the index"),
        (lambda: index.add([[1, 0, 0]] * 2, ids=[7, 7]), "differ"),
        (lambda: index.add([[1, 0, 0]], ids=[-1]), "at least 0"),
        (lambda: index.add([[1, 0, 0]], ids=[5, 6]), "2 ids for 1 vectors"),
        (lambda: index.search([1, 0, 0], k=0), "k is 0"),
        (lambda: index.namespace_of(77), "no vector with id 77"),
        (lambda: config.build(0), "dim is 0"),
    ):
        with pytest.raises(InputError, match=message):
            bad()
    assert len(index) == 2


def test_nothing_of_a_removed_vector_stays_in_memory():
    for config in EXACT:
        index = config.build(4)
        index.add(vectors(20, 4) + 100)
        index.remove(range(20))
        assert index.size_bytes == 0
        index.add(vectors(5, 4))
        index.remove([0, 22])
        shard = index._shards[""]
        held = [shard._rows] if config.owner is Exact else shard._clusters
        assert all((rows._vector[len(rows) :] == 0).all() for rows in held)


def test_naming_the_kinds_loads_no_compiler():
    code = "import sys, anabranch.routers.retrieve; print('numba' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("size", [3e38, 1e20, 1e-30])
def test_huge_and_tiny_vectors_are_scaled_as_any(size):
    index = Exact.Config().build(3)
    index.add(np.array([[0, -size, 0], [0.6, 0.8, 0], [0, 0, 0]]), [0, 1, 2])
    np.testing.assert_allclose(index.vectors([0, 1, 2]), [[0, -1, 0], [0.6, 0.8, 0], [0, 0, 0]], rtol=1e-6)
    _, similarity_K = index.search(np.array([0, -size, 0]), 1)
    assert similarity_K[0] == pytest.approx(1)
    with pytest.raises(InputError, match="not finite"):
        index.add(np.array([1e300, 0, 0]), [3])
