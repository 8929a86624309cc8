from dataclasses import replace

import numpy as np
import pytest

from anabranch.errors import InputError
from anabranch.graph import Graph
from anabranch.graph.delta import with_changes


def weighted(directed=False):
    return Graph.from_edges([0, 1, 2], [1, 2, 2], [1.0, 2.0, 3.0], directed)


def listed(graph):
    return list(zip(*(column.tolist() for column in graph.edges() if column is not None), strict=True))


@pytest.mark.parametrize("directed", [True, False])
def test_edges_come_go_and_change_their_weight(directed):
    graph = weighted(directed)
    found = with_changes(graph, [(0, 1, 0.5), (3, 0, 4)], [(2, 2)])
    ends = (3, 0) if directed else (0, 3)
    assert listed(found) == sorted([(0, 1, 1.5), (1, 2, 2.0), (*ends, 4.0)])
    assert found.is_directed == directed
    # To set a weight is to remove and to add.
    assert (0, 1, 9.0) in listed(with_changes(graph, ([0], [1], [9.0]), ([0], [1])))
    assert graph.num_edges == 3
    assert with_changes(graph).equals(graph)
    assert with_changes(graph, [], []).equals(graph)


def test_an_undirected_edge_goes_in_either_direction_a_directed_one_in_its_own():
    assert with_changes(weighted(), removed=[(2, 1)]).num_edges == 2
    with pytest.raises(InputError, match=r"the graph has no edge \(2, 1\)"):
        with_changes(weighted(True), removed=[(2, 1)])


def test_new_nodes_are_numbers_or_names():
    assert with_changes(weighted(), [(1, 5, 1.0)]).num_nodes == 6
    assert with_changes(weighted(), num_nodes=9).num_nodes == 9
    text = Graph.from_edges([0], [1], names=["a", "b"])
    found = with_changes(text, (["b", "c"], ["d", "a"]), [["b", "a"]])
    assert found.names.tolist() == ["a", "b", "c", "d"]
    assert listed(found) == [(0, 2), (1, 3)]
    # Integers are ids, unless the graph says that they are names.
    by_id = with_changes(text, [(1, "e"), (1, 1)])
    assert listed(by_id) == [(0, 1), (1, 1), (1, 2)]
    called = replace(Graph.from_edges([0], [1], names=[10, 20]), by_name=True)
    numbers = with_changes(called, np.array([[20, 30], [30, 10]]), [(20, 10)])
    assert numbers.names.tolist() == [10, 20, 30]
    assert numbers.names.dtype.kind == "i"
    assert numbers.by_name
    assert numbers.num_edges == 2
    table = np.array([[0, 3, 1.5]])
    assert listed(with_changes(weighted(), table))[1] == (0, 3, 1.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"added": [(0, 1, 2, 3)]}, "row 0 has 4 parts"),
        ({"added": [(0, 1), (0, 1, 2.0)]}, "row 1 has 3 parts"),
        ({"added": ([0], [1, 2])}, "columns are of different lengths"),
        ({"added": 3}, "are rows"),
        ({"added": ["ab"]}, "are rows"),
        ({"added": [(0, -1)]}, "whole numbers from 0"),
        ({"added": [(0, 1.5)]}, "whole numbers from 0"),
        ({"added": [(0, "b")]}, "this graph has no names"),
        ({"added": [(0, 1, 0.0)]}, "edge 0 to add has the weight 0.0"),
        ({"added": [(0, 1, float("nan"))]}, "edge 0 to add has the weight nan"),
        ({"added": [(0, 1, "much")]}, "weights of edges to add are numbers"),
        ({"removed": [(0, 2)]}, r"no edge \(0, 2\)"),
        ({"removed": [(0, 7)]}, "node 7 is not one of"),
        ({"removed": [(0, 1, 1.0)]}, "third column"),
        ({"num_nodes": 2}, "num_nodes is 2"),
    ],
)
def test_what_is_no_change_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        with_changes(weighted(), **change)


def test_names_and_weights_that_do_not_fit_are_refused():
    text = Graph.from_edges([0], [1], names=["ann", "bob"])
    for change, message in (
        ({"removed": [("ann", "bop")]}, "did you mean 'bob'"),
        ({"added": [("ann", 3)]}, "node 3 is not one of"),
        ({"added": [("ann", None)]}, "None cannot be the name of a new node"),
        ({"added": [("ann", "cat", 2.0)]}, "have weights and the graph has none"),
        ({"num_nodes": 5}, "nodes without an edge would have none"),
    ):
        with pytest.raises(InputError, match=message):
            with_changes(text, **change)


def called(names=(10, 20, 30), by_name=False):
    graph = Graph.from_edges([0, 1, 2], [1, 2, 0], [1.0, 1.0, 1.0], names=list(names))
    return replace(graph, by_name=by_name)


def test_a_float_is_a_number_of_a_node_and_no_name():
    row = np.array([[0, 1, 2.5]])
    found = with_changes(called(), row)
    assert found.names.tolist() == [10, 20, 30]
    assert listed(found)[0] == (0, 1, 3.5)
    for table in (row[:, :2], ([0.0], [np.float32(1)])):
        assert with_changes(called(), removed=table).num_edges == 2
    # Where callers say names, it is the name.
    found = with_changes(called(by_name=True), np.array([[10, 35, 2.5]]))
    assert found.names.tolist() == [10, 20, 30, 35]
    assert found.names.dtype.kind == "i"
    # And text is not called by numbers.
    assert with_changes(called("abc"), row).names.tolist() == ["a", "b", "c"]
    with pytest.raises(InputError, match="node 7 is not one of"):
        with_changes(called("abc"), np.array([[0, 7, 2.5]]))


def test_floats_are_names_where_the_names_are_floats():
    graph = called([0.5, 1.5, 2.0], by_name=True)
    found = with_changes(graph, [(0.5, 1.5, 1.0), (2.0, 3.25, 1.0)], [(1.5, 2.0)])
    assert found.names.tolist() == [0.5, 1.5, 2.0, 3.25]
    assert listed(found)[0] == (0, 1, 2.0)
    # A tuple may be a name too, one and not several.
    made = with_changes(called([("a", 1), ("b", 2), ("c", 3)]), [(("a", 1), ("d", 4))])
    assert made.names.tolist()[3] == ("d", 4)


@pytest.mark.parametrize(
    "end", [35.7, float("nan"), float("inf"), -float("inf"), 2**70, (1, 2), [1], None, True, "x", b"x"]
)
@pytest.mark.parametrize("by_name", [False, True])
def test_an_end_that_can_be_no_name_is_refused(end, by_name):
    for change in ({"added": [(10 if by_name else 0, end, 1.0)]}, {"removed": [(end, 10 if by_name else 0)]}):
        with pytest.raises(InputError, match=r"cannot be the name|is no node|has no node|node ids are|is not one of"):
            with_changes(called(by_name=by_name), **change)
    if not isinstance(end, str):
        with pytest.raises(InputError):
            with_changes(called("abc", by_name=by_name), [("a", end, 1.0)])


def test_several_edges_go_at_once():
    assert with_changes(weighted(), removed=[(0, 1), (2, 2)]).num_edges == 1
