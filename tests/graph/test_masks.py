"""What is masked has no value: every door refuses it, and takes masked arrays in which nothing is masked."""

from types import SimpleNamespace

import numpy as np
import pytest
from numpy import ma

from anabranch.errors import InputError
from anabranch.graph import HNSW, FastRP, Graph, PageRank, PowerWalk, evaluate, hnswlib_compat
from anabranch.graph.delta import with_changes
from anabranch.graph.disk import build
from anabranch.graph.estimator import most_similar
from anabranch.graph.graphvite import GraphVite
from anabranch.graph.masks import unmasked
from anabranch.graph.names import Names
from anabranch.graph.rank.measures import ndcg, rank_distance
from anabranch.graph.typed import TypedGraph

GRAPH = Graph.from_edges([0, 1, 2, 3], [1, 2, 3, 0], [1.0, 2.0, 1.0, 2.0])
VECTORS = np.arange(24, dtype=np.float32).reshape(6, 4) + 1


def masked(values, place=1, dtype=None):
    """The values, of which one is masked: the last of a row, where there are rows."""
    found = ma.array(values, dtype=dtype)
    found[place if found.ndim == 1 else (place, -1)] = ma.masked
    return found


def filled(values):
    return ma.array(values, mask=np.zeros(np.shape(values), bool))


def test_the_place_of_the_first_is_told():
    with pytest.raises(InputError, match=r"x has 1 masked entries, which have no value; the first is \[2, 3\]; fill"):
        unmasked(masked(VECTORS, 2), "x")
    with pytest.raises(InputError, match=r"x, entry 1, has 1 masked entries, which have no value; fill"):
        unmasked([1.0, ma.masked], "x")
    with pytest.raises(InputError, match=r"x, entry 0, has 1 masked entries, which have no value; the first is \[1\]"):
        unmasked((masked([1, 2]), [3, 4]), "x")
    plain = unmasked(filled(VECTORS), "x")
    assert type(plain) is np.ndarray
    np.testing.assert_array_equal(plain, VECTORS)
    assert type(unmasked([filled([1])], "x")[0]) is np.ndarray
    for other in (None, "text", [1, 2], (3,), VECTORS):
        assert unmasked(other, "x") is other


def index():
    made = HNSW(4, M=4, workers=1)
    made.add(VECTORS)
    return made


def compat():
    made = hnswlib_compat.Index("l2", 4)
    made.init_index(20, M=4)
    return made


def hetero(edges, weights):
    key = ("a", "to", "a")
    return SimpleNamespace(edge_index_dict={key: edges}, edge_weight_dict={key: weights})


def fitted():
    if not hasattr(fitted, "kept"):
        fitted.kept = GraphVite(dim=4, epochs=1, workers=1, samplers=0).fit(GRAPH)
    return fitted.kept


EDGES = np.array([[0, 2], [1, 3]])
DOORS = {
    "HNSW.add": lambda bad: index().add(bad(VECTORS)),
    "HNSW.add, rows": lambda bad: index().add([VECTORS[0], bad(VECTORS[1])]),
    "HNSW.add, ids": lambda bad: index().add(VECTORS, bad(np.arange(10, 16))),
    "HNSW.search": lambda bad: index().search(bad(VECTORS), 2),
    "HNSW.search, one": lambda bad: index().search(bad(VECTORS[0]), 2),
    "HNSW.search, filter": lambda bad: index().search(VECTORS, 2, filter=bad(np.ones(6, bool))),
    "HNSW.prepare_filter": lambda bad: index().prepare_filter(bad(np.arange(3))),
    "HNSW.range_search": lambda bad: index().range_search(VECTORS, bad(np.ones(6, np.float32))),
    "HNSW.remove": lambda bad: index().remove(bad(np.arange(3))),
    "HNSW bits": lambda bad: HNSW(32, "hamming").add(bad(VECTORS.astype(np.uint8))),
    "compat, vectors": lambda bad: compat().add_items(bad(VECTORS)),
    "compat, labels": lambda bad: compat().add_items(VECTORS, bad(np.arange(6))),
    "from_edges, ends": lambda bad: Graph.from_edges(bad(np.array([0, 1])), [1, 2]),
    "from_edges, weights": lambda bad: Graph.from_edges([0, 1], [1, 2], bad(np.ones(2))),
    "from_edges, a list": lambda bad: Graph.from_edges([0, 1], [1, 2], list(bad(np.ones(2)))),
    "from_edges, names": lambda bad: Graph.from_edges([0, 1], [1, 2], names=bad(np.array([7, 8, 9]))),
    "as_graph": lambda bad: PageRank().vector(bad(EDGES), 0),
    "reweighted": lambda bad: GRAPH.with_weights(bad(np.ones(4))),
    "nodes": lambda bad: GRAPH.resolve(bad(np.array([0, 1]))),
    "ids": lambda bad: GRAPH.check_nodes(bad(np.array([0, 1]))),
    "seeds": lambda bad: PageRank().personalized(GRAPH, bad(np.array([0, 1]))),
    "weights of seeds": lambda bad: PageRank().personalized(GRAPH, ([0, 1], bad(np.ones(2)))),
    "changes": lambda bad: with_changes(GRAPH, added=bad(EDGES)),
    "changes, columns": lambda bad: with_changes(
        GRAPH, added=([0], [2], bad(np.ones(1)) if bad is filled else masked([1.0], 0))
    ),
    "names": lambda bad: Names(bad(np.array([5, 6]))),
    "features": lambda bad: FastRP(dim=8, features=bad(VECTORS[:4]), feature_ratio=0.5).fit(GRAPH),
    "predict": lambda bad: fitted().predict(bad(EDGES)),
    "similar": lambda bad: most_similar(bad(VECTORS), 0),
    "similar, names": lambda bad: most_similar(VECTORS, "a", names=bad(np.array(list("abcdef"), object))),
    "auc": lambda bad: evaluate.auc(bad(np.ones(2)), [1.0]),
    "link_auc": lambda bad: evaluate.link_auc(bad(VECTORS), EDGES, EDGES),
    "link_auc, pairs": lambda bad: evaluate.link_auc(VECTORS, bad(EDGES), EDGES),
    "rankings": lambda bad: rank_distance(bad(np.array([1, 2])), [2, 1]),
    "gains": lambda bad: ndcg(bad(np.ones(3)), 2),
    "typed": lambda bad: TypedGraph.from_pyg(hetero(bad(EDGES), np.ones(2))),
    "typed, weights": lambda bad: TypedGraph.from_pyg(hetero(EDGES, bad(np.ones(2)))),
}


@pytest.mark.parametrize("door", DOORS)
def test_doors_refuse_what_is_masked(door):
    with pytest.raises((InputError, RuntimeError), match="masked entries, which have no value"):
        DOORS[door](masked)
    # Where nothing is masked it is an array as any other.
    DOORS[door](filled)


def test_results_are_those_of_plain_arrays():
    ids, distances = index().search(filled(VECTORS), 2)
    plain_ids, plain_distances = index().search(VECTORS, 2)
    np.testing.assert_array_equal(ids, plain_ids)
    np.testing.assert_array_equal(distances, plain_distances)


def test_an_index_on_disk_refuses_what_is_masked(tmp_path):
    with pytest.raises(InputError, match="masked entries"):
        build(masked(VECTORS), tmp_path / "x.anb")
    with build(filled(VECTORS), tmp_path / "x.anb") as made, pytest.raises(InputError, match="masked"):
        made.search(masked(VECTORS), 2)
    assert len(made) == len(VECTORS)


def test_an_index_of_walks_refuses_masked_seeds():
    walks = PowerWalk(walks=10, workers=1).build(GRAPH)
    with pytest.raises(InputError, match="masked entries"):
        walks.query_batch([masked(np.array([0, 1]))])
