"""The contract of `as_graph`: every estimator and function x every kind of graph gives one result, by number and by name."""

import inspect
import tempfile
import types

import igraph
import networkx
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from scipy.sparse import coo_array, csc_matrix

from anabranch.errors import InputError
from anabranch.graph import (
    FastRP,
    FullyPPR,
    Graph,
    GraphVite,
    PageRank,
    PowerWalk,
    delta,
    evaluate,
    fastrp,
    formats,
    generate,
    graphvite,
    powerwalk,
    ppr,
)
from anabranch.graph import fully_ppr as fully
from anabranch.graph.coerce import as_graph
from anabranch.graph.delta import with_changes
from anabranch.graph.evaluate import hold_out_edges
from anabranch.graph.fastrp import tune
from anabranch.graph.formats import read_graph, to_igraph, to_networkx, to_table, write_graph
from anabranch.graph.fully_ppr import fully_ppr
from anabranch.graph.generate import random_weights
from anabranch.graph.ppr import (
    Transition,
    forward_push,
    monte_carlo,
    parse_seeds,
    power_block,
    power_iteration,
    power_rows,
    prepare,
    solve,
)

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")
SOURCE = [0, 0, 1, 2, 3, 4, 5, 6, 7, 2, 0]
TARGET = [1, 2, 2, 3, 4, 5, 6, 7, 0, 6, 5]
WEIGHT = [1.0, 2.0, 0.5, 4.0, 1.0, 3.0, 0.25, 1.0, 2.0, 1.0, 0.5]
COUNT = 8
# To an edge of the sixth node, by every name that it has.
TARGET_OF_B = {5: 6, "fay": "gus", 41: 50}
TEXT = ["ann", "bob", "cay", "dan", "eve", "fay", "gus", "hal"]
NUMBERS = [3, 10, 20, 25, 40, 41, 50, 70]


def network(nodes):
    made = networkx.Graph()
    made.add_nodes_from(nodes)
    made.add_weighted_edges_from((nodes[u], nodes[v], w) for u, v, w in zip(SOURCE, TARGET, WEIGHT, strict=True))
    return made


def table(nodes):
    return pa.table({"source": [nodes[u] for u in SOURCE], "target": [nodes[v] for v in TARGET], "weight": WEIGHT})


def csv_file(nodes, folder):
    path = folder / "edges.csv"
    lines = [f"{nodes[u]},{nodes[v]},{w}" for u, v, w in zip(SOURCE, TARGET, WEIGHT, strict=True)]
    path.write_text("source,target,weight\n" + "\n".join(lines) + "\n")
    return path


def parquet_file(nodes, folder):
    pyarrow.parquet.write_table(table(nodes), folder / "edges.parquet")
    return str(folder / "edges.parquet")


def own_file(nodes, folder):
    plain(nodes).save(folder / "graph.anb")
    return folder / "graph.anb"


def plain(nodes=None):
    names = None if nodes is None or nodes == list(range(COUNT)) else nodes
    return Graph.from_edges(SOURCE, TARGET, WEIGHT, num_nodes=COUNT, names=names)


def vertices(nodes):
    made = igraph.Graph(n=COUNT, edges=list(zip(SOURCE, TARGET, strict=True)))
    made.es["weight"] = WEIGHT
    if isinstance(nodes[0], str):
        made.vs["name"] = nodes
    return made


def entries():
    return SOURCE + TARGET, TARGET + SOURCE, WEIGHT + WEIGHT


def matrix(form):
    source, target, weight = entries()
    return form((weight, (source, target)), shape=(COUNT, COUNT))


def tensor():
    source, target, weight = entries()
    return torch.sparse_coo_tensor([source, target], weight, (COUNT, COUNT))


def geometric():
    source, target, weight = entries()
    edges = torch.tensor([source, target])
    return types.SimpleNamespace(edge_index=edges, edge_weight=torch.tensor(weight), num_nodes=COUNT)


NAMED = {
    "networkx": lambda nodes, folder: network(nodes),
    "csv": csv_file,
    "parquet": parquet_file,
    "own": own_file,
    "arrow": lambda nodes, folder: table(nodes),
    "batch": lambda nodes, folder: table(nodes).to_batches()[0],
}
TEXTUAL = {**NAMED, "graph": lambda nodes, folder: plain(nodes), "igraph": lambda nodes, folder: vertices(nodes)}
NUMBERED = {
    **TEXTUAL,
    "scipy": lambda nodes, folder: matrix(coo_array),
    "scipy matrix": lambda nodes, folder: matrix(csc_matrix),
    "torch": lambda nodes, folder: tensor(),
    "pyg": lambda nodes, folder: geometric(),
    "lists": lambda nodes, folder: (SOURCE, TARGET, WEIGHT),
}
CASES = [
    *((kind, make, list(range(COUNT))) for kind, make in NUMBERED.items()),
    *((f"{kind} text", make, TEXT) for kind, make in TEXTUAL.items()),
    *((f"{kind} numbers", make, NUMBERS) for kind, make in NAMED.items()),
]


def ranked(found):
    nodes, scores = (found.ids, found.scores) if hasattr(found, "ids") else found
    return dict(zip(nodes.tolist(), scores.tolist(), strict=True))


def rows(found):
    return [dict(found.named(number)) for number in range(len(found))]


def numbers(nodes, found):
    """An array with a row for each node, by what nodes are called."""
    return {node: np.asarray(row).tolist() for node, row in zip(nodes, found, strict=True)}


def small_vite():
    return GraphVite(dim=8, epochs=20, partitions=2)


def updated(given):
    model = PowerWalk().build(given)
    assert not len(model.update(given))
    return model


def hidden(given):
    found = hold_out_edges(given, 0.2)
    return [found.positive_E2.tolist(), found.negative_E2.tolist(), found.graph.indices.tolist()]


def solved(given, node):
    """By the steps that `PageRank` takes."""
    transition = Transition(given)
    ids, share = parse_seeds(given, node)
    scores, _, _ = solve(transition, prepare(transition), ids, transition.start(ids, share), 1e-8)
    return transition.finish(scores, ids, share)


def changed(given, a, b):
    graph = with_changes(given, [(a, b, 2.0)], [(b, TARGET_OF_B[b])])
    return [graph.num_edges, sorted(graph.edges()[2].tolist())]


def stored(given):
    with tempfile.TemporaryDirectory() as folder:
        write_graph(given, f"{folder}/g.anb")
        found = read_graph(f"{folder}/g.anb")
    return [found.num_nodes, found.indices.tolist(), found.weights.tolist()]


def kept(given, index_of):
    """An index that was saved, opened with its graph in this form."""
    with tempfile.TemporaryDirectory() as folder:
        PowerWalk(walks=30).build(index_of).save(f"{folder}/index.anb")
        return PowerWalk.load(f"{folder}/index.anb", given)


def weighed(theirs):
    """Edges of a networkx graph, of igraph or of a table, however their ends are called."""
    if hasattr(theirs, "es"):
        return [theirs.vcount(), sorted(theirs.es["weight"])]
    if hasattr(theirs, "column_names"):
        return [theirs.column_names, theirs["weight"].to_pylist()]
    return [len(theirs), sorted(weight for *_, weight in theirs.edges(data="weight"))]


def tuned(given):
    found = tune(FastRP(8), given, [0, 1] * (COUNT // 2), trials=2, dim=4, train_fraction=0.5)
    return [found.best.beta, list(found.best.weights)]


def newcomer(given):
    """The vector of a node with two edges."""
    row = coo_array(([1.0, 2.0], ([0, 0], [0, 5])), shape=(1, COUNT))
    return FastRP(8, keep_powers=True).fit(given).transform(row)


# (graph, nodes in order, two of them) -> what can be compared; nodes of answers are called as the graph calls them.
ESTIMATORS = {
    "solve": lambda g, nodes, a, b: ranked(PageRank().personalized(g, a)),
    "power": lambda g, nodes, a, b: ranked(PageRank(method="power").personalized(g, [a, b], top_k=3)),
    "push": lambda g, nodes, a, b: ranked(PageRank(method="push").personalized(g, {a: 1, b: 3})),
    "walks": lambda g, nodes, a, b: ranked(PageRank(method="monte_carlo", walks=500).personalized(g, ([a, b], [1, 2]))),
    "scores": lambda g, nodes, a, b: numbers(nodes, PageRank().scores(g)),
    "vector": lambda g, nodes, a, b: numbers(nodes, PageRank().vector(g, {a: 1, b: 3})),
    "push vector": lambda g, nodes, a, b: numbers(nodes, PageRank(method="push").vector(g, a)),
    "batch": lambda g, nodes, a, b: rows(PageRank().batch(g, [a, [a, b]], top_k=4)),
    "power batch": lambda g, nodes, a, b: rows(PageRank(method="power").batch(g, [a, {b: 2}])),
    "power_iteration": lambda g, nodes, a, b: numbers(nodes, power_iteration(g, [a, b])),
    "power_block": lambda g, nodes, a, b: numbers(nodes, power_block(g, [a, b])),
    "power_rows": lambda g, nodes, a, b: rows(power_rows(g, [a, b], top_k=2)),
    "forward_push": lambda g, nodes, a, b: ranked(forward_push(g, a)),
    "monte_carlo": lambda g, nodes, a, b: ranked(monte_carlo(g, [a, b], walks=300)),
    "powerwalk": lambda g, nodes, a, b: ranked(PowerWalk().build(g).query({a: 1, b: 2})),
    "powerwalk fit": lambda g, nodes, a, b: ranked(PowerWalk().fit(g).query(a)),
    "powerwalk nodes": lambda g, nodes, a, b: ranked(PowerWalk().build(g, [a, b]).query(b)),
    "powerwalk batch": lambda g, nodes, a, b: rows(PowerWalk().build(g).query_batch([a, [a, b]])),
    "fingerprint": lambda g, nodes, a, b: ranked(PowerWalk().build(g).fingerprint(a)),
    "powerwalk update": lambda g, nodes, a, b: ranked(updated(g).query(a)),
    "fully_ppr": lambda g, nodes, a, b: ranked(fully_ppr(g, walks=100, engine="local").top(a, 3)),
    "fully_ppr exact": lambda g, nodes, a, b: ranked(
        FullyPPR(method="exact", engine="local", sources=[b, a]).fit(g).top(b)
    ),
    "fully_ppr named": lambda g, nodes, a, b: (
        FullyPPR(method="decompose", engine="local").fit(g).result_.top_named(a, 3)
    ),
    "fastrp": lambda g, nodes, a, b: numbers([*nodes, a], [*(m := FastRP(8)).fit_transform(g), m.vectors(a)[0]]),
    "graphvite": lambda g, nodes, a, b: numbers(nodes, small_vite().fit_transform(g)),
    "graphvite nodes": lambda g, nodes, a, b: numbers([b, a], small_vite().fit(g).transform([b, a])),
    "graphvite edges": lambda g, nodes, a, b: small_vite().fit(g).predict([[a, b], [b, a]]).tolist(),
    "graphvite resume": lambda g, nodes, a, b: numbers(nodes, small_vite().fit(g).resume(g, 5).transform()),
    "hold_out_edges": lambda g, nodes, a, b: hidden(g),
    "prepared": lambda g, nodes, a, b: ranked(PageRank(method="solve").prepare(g).personalized(g, a)),
    "blocks": lambda g, nodes, a, b: PageRank().blocks(g) is None,
    "from_rows": lambda g, nodes, a, b: ranked(
        PowerWalk.from_rows(g, fully_ppr(as_graph(g), walks=50, top_k=None).rows).query(a)
    ),
    "fastrp powers": lambda g, nodes, a, b: (m := FastRP(8)).combine(m.powers(g)).tolist(),
    "graphvite bytes": lambda g, nodes, a, b: small_vite().peak_bytes(g),
    "solve by steps": lambda g, nodes, a, b: numbers(nodes, solved(g, a)),
    "seeds": lambda g, nodes, a, b: [part.tolist() for part in parse_seeds(g, {a: 1, b: 3})],
    "with_changes": lambda g, nodes, a, b: changed(g, a, b),
    "random_weights": lambda g, nodes, a, b: random_weights(g).weights.tolist(),
    "tune": lambda g, nodes, a, b: tuned(g),
    "write_graph": lambda g, nodes, a, b: stored(g),
    "to_networkx": lambda g, nodes, a, b: weighed(to_networkx(g)),
    "to_igraph": lambda g, nodes, a, b: weighed(to_igraph(g)),
    "to_table": lambda g, nodes, a, b: weighed(to_table(g)),
    "powerwalk load": lambda g, nodes, a, b: ranked(kept(g, as_graph(g)).query(a)),
    "powerwalk edges": lambda g, nodes, a, b: ranked(
        (m := PowerWalk().build(g), m.update(edges_added=[(a, b, 1.0)]))[0].query(a)
    ),
    "fastrp new": lambda g, nodes, a, b: newcomer(g).tolist(),
}


@pytest.fixture(scope="module")
def expected():
    """By estimator and by what nodes are called: the result on a `Graph`, asked in its own words."""
    known = {}

    def of(name, nodes):
        key = (name, str(nodes))
        if key not in known:
            graph = as_graph(network(nodes)) if nodes == NUMBERS else plain(nodes)
            known[key] = ESTIMATORS[name](graph, nodes, nodes[0], nodes[5])
        return known[key]

    return of


# What takes a graph, and where above it is asked; `test_nothing_that_takes_a_graph_is_left_out` finds them.
TAKERS = {
    "FastRP": {"fit": "fastrp", "fit_transform": "fastrp", "powers": "fastrp powers", "tune": "tune"},
    "tune": "tune",
    "GraphVite": {
        "fit": "graphvite nodes",
        "fit_transform": "graphvite",
        "resume": "graphvite resume",
        "peak_bytes": "graphvite bytes",
    },
    "FullyPPR": {"fit": "fully_ppr exact"},
    "fully_ppr": "fully_ppr",
    "PowerWalk": {
        "build": "powerwalk",
        "fit": "powerwalk fit",
        "from_rows": "from_rows",
        "update": "powerwalk update",
        "load": "powerwalk load",
    },
    "PageRank": {
        "scores": "scores",
        "prepare": "prepared",
        "personalized": "solve",
        "vector": "vector",
        "batch": "batch",
        "blocks": "blocks",
    },
    "Transition": "solve by steps",
    "parse_seeds": "seeds",
    "forward_push": "forward_push",
    "monte_carlo": "monte_carlo",
    "power_block": "power_block",
    "power_iteration": "power_iteration",
    "power_rows": "power_rows",
    "to_igraph": "to_igraph",
    "to_networkx": "to_networkx",
    "to_table": "to_table",
    "write_graph": "write_graph",
    "hold_out_edges": "hold_out_edges",
    "with_changes": "with_changes",
    "random_weights": "random_weights",
}


def takes_graph(work):
    return "graph" in inspect.signature(work).parameters


def test_nothing_that_takes_a_graph_is_left_out():
    """All public functions, classes and methods with a parameter ``graph``; what makes a graph of one library's takes that alone."""
    found = {}
    for module in (fastrp, graphvite, fully, powerwalk, ppr, formats, evaluate, delta, generate):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", [name for name in own if not name.startswith("_")]):
            value = getattr(module, name)
            if inspect.isclass(value):
                methods = {of for of in dir(value) if not of.startswith("_") and callable(getattr(value, of))}
                taken = {of for of in methods if takes_graph(getattr(value, of))}
                if taken:
                    found[name] = taken
                elif issubclass(value, Transition):
                    found[name] = None
            elif inspect.isfunction(value) and not name.startswith("from_") and takes_graph(value):
                found[name] = None
    assert found == {name: set(of) if isinstance(of, dict) else None for name, of in TAKERS.items()}
    asked = [one for of in TAKERS.values() for one in (of.values() if isinstance(of, dict) else [of])]
    assert set(asked) <= set(ESTIMATORS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_kind_of_graph_gives_one_result(name, expected, tmp_path):
    for kind, make, nodes in CASES:
        found = ESTIMATORS[name](make(nodes, tmp_path), nodes, nodes[0], nodes[5])
        assert found == expected(name, nodes), kind


@pytest.mark.parametrize("name", ESTIMATORS)
def test_names_change_no_number(name, expected):
    def anonymous(found):
        """With names as ids."""
        back = {
            **{node: number for number, node in enumerate(TEXT)},
            **{node: number for number, node in enumerate(NUMBERS)},
        }
        if isinstance(found, dict):
            return {back[node]: value for node, value in found.items()}
        if isinstance(found, list) and found and isinstance(found[0], (dict, tuple)):
            return [anonymous(one) if isinstance(one, dict) else (back[one[0]], one[1]) for one in found]
        return found

    numbered = expected(name, list(range(COUNT)))
    for nodes in (NUMBERS, TEXT):
        if name in ("fastrp", "fastrp new", "fastrp powers", "tune"):  # its rows are keyed by names, as documented
            assert name != "fastrp" or expected(name, nodes).keys() == set(nodes)
        else:
            assert anonymous(expected(name, nodes)) == numbered


def test_what_comes_in_is_the_same_graph(tmp_path):
    for kind, make, nodes in CASES:
        found = as_graph(make(nodes, tmp_path))
        assert found.difference(plain(nodes)) is None, kind
        assert found.by_name is (nodes != list(range(COUNT)) and not kind.startswith(("graph", "igraph"))), kind


def test_directed_graphs_stay_directed(tmp_path):
    graph = Graph.from_edges(SOURCE, TARGET, WEIGHT, True, COUNT, names=TEXT)
    write_graph(graph, tmp_path / "g.anb")
    for given in (to_networkx(graph), to_igraph(graph), to_table(graph), tmp_path / "g.anb"):
        assert as_graph(given).difference(graph) is None


def test_numbers_are_ids_of_a_graph_and_names_of_what_came_from_elsewhere():
    numbered, named = plain(NUMBERS), as_graph(network(NUMBERS))
    assert numbered.resolve([3, 1]).tolist() == [3, 1]
    assert named.resolve([3, 10]).tolist() == [0, 1]
    assert PageRank().personalized(numbered, 3)[0].dtype == np.int64
    assert ranked(PageRank().personalized(numbered, 3)).keys() == set(range(COUNT))
    assert ranked(PageRank().personalized(named, 3)).keys() == set(NUMBERS)
    # Made of it, it is spoken to alike.
    for made in (
        named.subgraph([3, 10, 20]),
        named.to_directed(),
        named.with_weights(None),
        named.to_directed().reversed,
    ):
        assert made.by_name
        assert made.resolve(10).tolist() == [1]
    assert named.numbered().resolve(3).tolist() == [3]
    assert numbered.numbered() is numbered


def test_nodes_may_be_tuples():
    graph = as_graph(networkx.grid_2d_graph(2, 3))
    assert graph.resolve((0, 1)).tolist() == [1]
    assert graph.resolve([(0, 1), (1, 2)]).tolist() == [1, 5]
    found, _ = PageRank().personalized(networkx.grid_2d_graph(2, 3), (0, 1), top_k=1)
    assert found.tolist() == [(0, 1)]
    assert ranked(PageRank().personalized(graph, {(0, 0): 1, (1, 2): 1})).keys() == set(graph.names.tolist())


def test_a_changed_network_is_seen():
    given, model = network(TEXT), PageRank(tol=1e-10)
    before = model.vector(given, "ann")
    assert model.vector(given, "ann").tolist() == before.tolist()
    prepared = model._last
    model.vector(network(TEXT), "ann")
    assert model._last is prepared  # the same graph, converted again
    given.add_edge("ann", "hal", weight=9.0)
    assert model.vector(given, "ann").tolist() == PageRank(tol=1e-10).vector(given, "ann").tolist() != before.tolist()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda g: PageRank().personalized(g, "anne"), "no node 'anne'; did you mean 'ann'"),
        (lambda g: PageRank().personalized(g, ["ann", 3]), "no node 3"),
        (lambda g: PowerWalk().build(g).query({"zed": 1}), "no node 'zed'"),
        (lambda g: FullyPPR(sources=["zed"], engine="local").fit(g), "no node 'zed'"),
        (lambda g: FullyPPR(engine="local").fit(g).top("zed"), "no node 'zed'"),
        (lambda g: small_vite().fit(g).transform(["zed"]), "no node 'zed'"),
        (lambda g: small_vite().fit(g).predict([["ann", "zed"]]), "no node 'zed'"),
        (lambda g: small_vite().fit(g).resume(network(TEXT[::-1]), 1), "another order"),
        (lambda g: FastRP(8).fit(g).vectors("zed"), "no node 'zed'"),
        (lambda g: PageRank().personalized(matrix(coo_array), "ann"), "its nodes have no names, only numbers from 0"),
        (lambda g: as_graph(42), "a int is no graph; give a Graph or TypedGraph, the path"),
    ],
)
def test_unknown_names(ask, message):
    with pytest.raises(InputError, match=message):
        ask(plain(TEXT))
