"""Rows that are none of a table of edges, and first lines that are none: refused, where good ones near them are read."""

import pytest

from anabranch.cli.graph.inputs import open_typed
from anabranch.cli.graph.node_tables import read_edges
from anabranch.errors import DataError
from anabranch.graph import Graph, read_graph

GRAPH = Graph.from_edges([0, 1], [1, 2], names=["ann", "bob", "cy"])


def _read(tmp_path, text, **options):
    path = tmp_path / "t.csv"
    path.write_text(text)
    graph = read_graph(path, directed=True, **options)
    source, target, _ = graph.edges()
    return list(zip(graph.names_of(source).tolist(), graph.names_of(target).tolist(), strict=True))


# Two rows, as programs print or write them.
PRINTED = {
    "networkx, two attributes": "0 1 {'weight': 0.5, 'color': 'red'}\n1 2 {'weight': 2.0, 'color': 'red'}\n",
    "networkx, text": "ann bob {'weight': 0.5, 'color': 'red'}\nbob cy {'weight': 0.5, 'color': 'red'}\n",
    "networkx, nodes of a grid": "(0, 0) (0, 1) {}\n(0, 1) (1, 1) {}\n",
    "a dict of lists": "0: [1, 2]\n1: [0, 2]\n",
    "named tuples": "Edge(1, 2)\nEdge(2, 3)\n",
    "sets": "frozenset({1, 2})\nfrozenset({2, 3})\n",
    "counted": "0 (1, 2)\n1 (2, 3)\n",
    "arrays": "[1 2]\n[2 3]\n",
    "below names": "source,target\nEdge(1, 2)\nEdge(2, 3)\n",
    "arrows": "1 -> 2\n2 -> 3\n",
    "arrows of names": "ann <=> 2\nbob <=> 3\n",
    "lines": "1 -- 2\n2 -- 3\n",
    "a line": "1 - 2\n2 - 3\n",
    "arrows between commas": "1,->,2\n2,->,3\n",
    "neighbours": "1: 2 3\n2: 1 3\n",
    "neighbours between commas": "1: 2, 3\n2: 1, 3\n",
    "neighbours of names": "ann: 2\nbob: 3\n",
}


@pytest.mark.parametrize("what", PRINTED)
def test_what_is_printed_is_no_table_of_edges(tmp_path, what):
    """A star around a node "->", and an edge from "0 1 {'weight': 0.5" to "'color': 'red'}"."""
    with pytest.raises(DataError, match=r"as Python or JSON|is '.*' a node|third field .* is not a number"):
        _read(tmp_path, PRINTED[what])


def test_attributes_of_networkx_are_left_out_where_one_says_so(tmp_path):
    edges = [(0, 1), (1, 2)]
    assert _read(tmp_path, PRINTED["networkx, two attributes"], weight=None) == edges
    assert _read(tmp_path, "0 1 {}\n1 2 {}\n", source=0, target=1, weight=None) == edges
    assert _read(tmp_path, "0,1,{'a': 1, 'b': 2}\n1,2,{'a': 1, 'b': 2}\n", weight=None) == edges


GOOD = {
    "brackets in both names": ("(ann) x,bob (y)\nbob (y),cy\n", [("(ann) x", "bob (y)"), ("bob (y)", "cy")]),
    "chemistry": ("(CH3)2NH\tNH3(g)\nNH3(g)\tN2\n", [("(CH3)2NH", "NH3(g)"), ("NH3(g)", "N2")]),
    "in brackets": ("[a]\t[b]\n[b]\t[c]\n", [("[a]", "[b]"), ("[b]", "[c]")]),
    "smiles": (":(,:)\n:),:(\n", [(":(", ":)"), (":)", ":(")]),
    "one that opens and none that closes": ("x (a,b\nb,c\n", [("b", "c"), ("x (a", "b")]),
    "one that closes first": ("a) x,b (y\nb,c\n", [("a) x", "b (y"), ("b", "c")]),
    "signs as nodes": ("+,-\n-,*\n", [("+", "-"), ("-", "*")]),
    "one node is a sign": ("ann,-,3\nbob,cy,2\n", [("ann", "-"), ("bob", "cy")]),
    "signs below names": ("source,sign,target\nann,->,bob\nbob,->,cy\n", [("ann", "bob"), ("bob", "cy")]),
    "names with a sign": ("a->b,c\nc,a->b\n", [("a->b", "c"), ("c", "a->b")]),
    "negative numbers": ("-1,-2\n-2,-3\n", [(-2, -3), (-1, -2)]),
    "colons within": ("go:1,go:2\ngo:2,go:3\n", [("go:1", "go:2"), ("go:2", "go:3")]),
    "titles": ("Alien: x,Aliens\nDune: y,Alien: x\n", [("Alien: x", "Aliens"), ("Dune: y", "Alien: x")]),
    "one with a colon": ("v1:,b\nb,c\n", [("b", "c"), ("v1:", "b")]),
    "colons below names": ("source,target\na:,b:\nb:,c:\n", [("a:", "b:"), ("b:", "c:")]),
    "times": ("12:30,12:40\n12:40,12:50\n", [("12:30", "12:40"), ("12:40", "12:50")]),
    "uris": (
        "<http://a>\t<http://b>\n<http://b>\t<http://c>\n",
        [("<http://a>", "<http://b>"), ("<http://b>", "<http://c>")],
    ),
    "numbered": ("n1,n2\nn2,n3\n", [("n1", "n2"), ("n2", "n3")]),
    "numbered, of two kinds": ("x1,x2\ny1,y2\n", [("x1", "x2"), ("y1", "y2")]),
    "numbered as in R": ("V1,V2\nV2,V3\n", [("V1", "V2"), ("V2", "V3")]),
    "numbered from 2": ("v2,v3\nann,bob\n", [("ann", "bob"), ("v2", "v3")]),
    "letters": ("A,B\nann,bob\n", [("A", "B"), ("ann", "bob")]),
    "parts of nodes": ("node_a,node_b\nnode_b,node_c\n", [("node_a", "node_b"), ("node_b", "node_c")]),
    "one edge": ("n1,n2\n", [("n1", "n2")]),
    "OGB's": ("0,1\n5,7\n", [(0, 1), (5, 7)]),
    "whole weights": ("0,1,2\n5,7,3\n", [(0, 1), (5, 7)]),
    "no positions": ("0,1,3\n5,7,0.5\n", [(0, 1), (5, 7)]),
}


@pytest.mark.parametrize("what", GOOD)
def test_names_near_these_are_names(tmp_path, what):
    text, edges = GOOD[what]
    assert sorted(_read(tmp_path, text)) == sorted(edges)


@pytest.mark.parametrize(
    "names",
    [
        "_1,_2",
        "_c0,_c1",
        "column_1,column_2",
        "column0,column1",
        "f0,f1",
        "...1,...2",
        "v1,v2",
        "node_a,node_b",
        "Var1,Var2,Freq",
        '"","_1","_2"',
        "person 1,person 2",
    ],
)
def test_names_that_programs_give_by_themselves_are_no_nodes(tmp_path, names):
    """Spark's _1 and _2 were the ends of an edge."""
    rows = [["ann", "bob", "2"], ["bob", "cy", "3"]]
    has_index = names.startswith('""')
    count = names.count(",") + 1 - has_index
    text = "".join(",".join([*([str(n)] if has_index else []), *row[:count]]) + "\n" for n, row in enumerate(rows))
    if has_index:
        assert _read(tmp_path, f"{names}\n{text}") == [("ann", "bob"), ("bob", "cy")]
        return
    with pytest.raises(DataError, match=r"line 1: a row, or names of columns"):
        _read(tmp_path, f"{names}\n{text}")
    assert _read(tmp_path, f"{names}\n{text}", header=True) == [("ann", "bob"), ("bob", "cy")]


@pytest.mark.parametrize("text", ["0,1,2\n5,7,0.5\n7,9,2.0\n", "0,1,2,3\n5,7,3,4\n7,9,3,4\n"])
def test_numbers_of_columns_are_no_edge(tmp_path, text):
    """As pandas writes columns that have no names: node 0 was tied to node 1, with the weight 2."""
    with pytest.raises(DataError, match=r"line 1: a row, or names of columns"):
        _read(tmp_path, text)
    assert _read(tmp_path, text, header=True) == [(5, 7), (7, 9)]
    assert _read(tmp_path, text, header=False) == [(0, 1), (5, 7), (7, 9)]
    with pytest.raises(DataError, match=r"one of edges, or are these names of columns"):
        read_edges(str(tmp_path / "t.csv"), Graph.from_edges([0, 5], [1, 7]))


@pytest.mark.parametrize("text", ["source,target,kind\n", "source,target,kind", "a,b,kind\n"])
def test_edges_of_kinds_without_rows_are_refused(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(DataError, match="has no rows"):
        open_typed(str(path), "kind", None, "edges", directed=True, columns=None, quiet=True)
