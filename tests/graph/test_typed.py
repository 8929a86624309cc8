import types

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.graph import FastRP, FullyPPR, Graph, GraphVite, PageRank, PowerWalk, TypedGraph, as_graph

EDGES = {"cites": (["p", "q", "p"], ["q", "r", "r"], [1.0, 2.0, 1.0]), "wrote": (["ann", "bob"], ["p", "r"])}
NODES = ["ann", "bob", "p", "q", "r"]


def dense(typed):
    return as_graph(typed).to_scipy(np.float64).toarray()


def of(name):
    """The matrix of a relation, undirected."""
    found = np.zeros((5, 5))
    source, target, *weight = EDGES[name]
    for number, (u, v) in enumerate(zip(source, target, strict=True)):
        value = weight[0][number] if weight else 1.0
        found[NODES.index(u), NODES.index(v)] = found[NODES.index(v), NODES.index(u)] = value
    return found


def test_edges_count_by_their_relation():
    typed = TypedGraph.from_edges(EDGES, weights={"cites": 3})
    assert dense(typed).tolist() == (3 * of("cites") + of("wrote")).tolist()
    assert not as_graph(typed).is_directed
    assert as_graph(typed).names.tolist() == NODES
    assert dense(typed.with_weights(wrote=0.5)).tolist() == (3 * of("cites") + 0.5 * of("wrote")).tolist()
    assert dense(typed.with_weights({"cites": 0})).tolist() == of("wrote").tolist()
    assert as_graph(typed.with_weights({"cites": 0})).weights is None
    assert typed.graph is typed.graph
    assert "cites x 3: 3, wrote x 1: 2" in repr(typed)


def test_a_walk_draws_the_relation_first():
    typed = TypedGraph.from_edges(EDGES, weights={"cites": 3}, share="relations")
    cites, wrote = of("cites"), of("wrote")
    step = np.zeros((5, 5))
    for matrix, weight in ((cites, 3), (wrote, 1)):
        sums = matrix.sum(1, keepdims=True)
        step += weight * np.divide(matrix, sums, out=np.zeros_like(matrix), where=sums > 0)
    assert dense(typed) == pytest.approx(step)
    step /= step.sum(1, keepdims=True)
    alpha = 0.15
    expected = alpha * np.linalg.solve(np.eye(5) - (1 - alpha) * step.T, np.eye(5)[0])
    assert PageRank(alpha, tol=1e-12).vector(typed, "ann") == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_relations_of_one_kind_are_one_graph(data):
    ends = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)
    parts = data.draw(st.lists(ends, min_size=1, max_size=3))
    is_directed = data.draw(st.booleans())
    edges = {f"r{i}": ([u for u, _ in part], [v for _, v in part], [1.0] * len(part)) for i, part in enumerate(parts)}
    weights = {name: data.draw(st.sampled_from([0.5, 1, 4])) for name in edges}
    found = as_graph(TypedGraph.from_edges(edges, weights=weights, directed=is_directed, names=range(6)))
    source, target = (np.concatenate([edge[side] for edge in edges.values()]) for side in (0, 1))
    weight = np.concatenate([np.full(len(edge[0]), weights[name]) for name, edge in edges.items()])
    whole = Graph.from_edges(source, target, weight, is_directed, 6)
    assert found.is_directed is is_directed
    assert np.array_equal(found.to_scipy().toarray(), whole.to_scipy().toarray())


@pytest.mark.parametrize(
    "ask",
    [
        lambda g: PageRank().vector(g, "ann"),
        lambda g: PowerWalk().build(g).query("ann")[1],
        lambda g: FullyPPR(engine="local", method="exact").fit(g).top("ann")[1],
        lambda g: FastRP(8).fit_transform(g),
        lambda g: GraphVite(4, epochs=5).fit_transform(g),
    ],
)
def test_every_estimator_takes_it(ask):
    typed = TypedGraph.from_edges(EDGES, weights={"wrote": 0.25})
    assert np.array_equal(ask(typed), ask(typed.graph))
    assert not np.array_equal(ask(typed), ask(typed.with_weights(wrote=8.0)))


def test_of_a_table():
    table = pa.table({"kind": ["a", "b", "a"], "source": [1, 2, 5], "target": [2, 5, 1], "weight": [1.0, 2.0, 3.0]})
    typed = TypedGraph.from_table(table, "kind", weights={"b": 2}, directed=["b"])
    assert as_graph(typed).names.tolist() == [1, 2, 5]
    assert dense(typed).tolist() == [[0, 1, 3], [1, 0, 4], [3, 0, 0]]
    assert as_graph(typed).resolve(5).tolist() == [2]  # by name
    with pytest.raises(InputError, match="no column 'relation'; there are kind, source"):
        TypedGraph.from_table(table)
    with pytest.raises(InputError, match="empty cell"):
        TypedGraph.from_table(pa.table({"relation": ["a", None], "source": [1, 2], "target": [2, 3]}))


def test_of_heterogeneous_data():
    data = types.SimpleNamespace(
        edge_index_dict={("author", "wrote", "paper"): torch.tensor([[0, 0], [1, 0]])},
        edge_weight_dict={("author", "wrote", "paper"): torch.tensor([2.0, 1.0])},
        num_nodes_dict={"author": 2, "paper": None},
    )
    typed = TypedGraph.from_pyg(data)
    graph = as_graph(typed)
    assert list(typed.relations) == ["author wrote paper"]
    assert graph.names.tolist() == [("author", 0), ("author", 1), ("paper", 0), ("paper", 1)]
    assert graph.is_directed
    assert dense(typed)[0].tolist() == [0, 0, 1, 2]
    assert PageRank().personalized(typed, ("author", 0), top_k=2)[0].tolist() == [("author", 0), ("paper", 1)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TypedGraph({}), "at least one relation"),
        (lambda: TypedGraph.from_edges(EDGES, weights={"cite": 1}), "no relation 'cite'; did you mean 'cites'"),
        (
            lambda: TypedGraph.from_edges(EDGES, weights={"cites": -1}),
            "the weight -1; it must be a number of at least 0",
        ),
        (lambda: TypedGraph.from_edges(EDGES, weights={"cites": float("nan")}), "at least 0"),
        (lambda: TypedGraph.from_edges(EDGES, weights={"cites": 0, "wrote": 0}), "all relations have the weight 0"),
        (lambda: TypedGraph.from_edges(EDGES, share="nodes"), "share is 'nodes'"),
        (lambda: TypedGraph.from_edges(EDGES, names=["p"]), "'q', which is not among the names"),
        (lambda: TypedGraph.from_edges({"a": ([1], [2, 3])}), "1 sources and 2 targets"),
        (lambda: TypedGraph.from_edges({"a": [1]}), "needs"),
        (lambda: TypedGraph({"a": Graph.from_edges([0], [1]), "b": Graph.from_edges([0], [2])}), "the same nodes"),
        (lambda: TypedGraph({"a": Graph.from_edges([0], [1], [-1.0], allow_negative=True)}), "negative edge weights"),
    ],
)
def test_what_does_not_fit(make, message):
    with pytest.raises(InputError, match=message):
        make()
