"""Tables of edges that have two meanings, in every form and to every reader: refused until somebody says which."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from anabranch.cli.graph.inputs import open_typed
from anabranch.cli.graph.node_tables import read_edges
from anabranch.errors import DataError
from anabranch.graph import Graph, read_graph
from anabranch.graph.formats import from_table

GRAPH = Graph.from_edges([0, 1, 2], [1, 2, 3], names=[1, 2, 3, 4])


def _typed(path):
    names = (
        pd.read_parquet(path).columns if path.endswith("parquet") else Path(path).read_text().splitlines()[0].split(",")
    )
    kind = names[-1]
    return open_typed(path, kind.strip('"'), None, "edges", directed=True, columns=None, quiet=True)


READERS = {
    "graph": lambda path: read_graph(path, directed=True),
    "edges": lambda path: read_edges(path, GRAPH),
    "kinds": _typed,
}


def _quoted(frame):
    """As R's write.csv without names of rows."""
    made = io.StringIO()
    frame.to_csv(made, index=False, quoting=0)
    names, rest = made.getvalue().split("\n", 1)
    return ",".join(f'"{name}"' for name in names.split(",")) + "\n" + rest


WRITERS = {
    "t.csv": lambda frame, path: frame.to_csv(path, index=False),
    "r.csv": lambda frame, path: path.write_text(_quoted(frame)),
    "windows.csv": lambda frame, path: frame.to_csv(path, index=False, lineterminator="\r\n"),
    "index.csv": lambda frame, path: frame.to_csv(path),
    "t.parquet": lambda frame, path: frame.to_parquet(path),
    "bare.parquet": lambda frame, path: frame.to_parquet(path, index=False),
}
RING = np.array([[0, 1, 0, 0, 1], [1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 1], [1, 0, 0, 1, 0]])
NAMES = ["ann", "bob", "cy", "dan", "eve"]
# What nobody can tell, and what says so.
DOUBTFUL = {
    "five of 0 and 1": (pd.DataFrame(RING, columns=NAMES), "is it a matrix"),
    "five": (pd.DataFrame(RING * 3 + np.eye(5, dtype=int), columns=NAMES), "is it a matrix"),
    "four, empty on the diagonal": (
        pd.DataFrame([[0, 2, 3, 1], [1, 0, 1, 1], [5, 1, 0, 1], [1, 1, 2, 0]], columns=NAMES[:4]),
        "is it a matrix",
    ),
    "three, symmetric": (pd.DataFrame([[1, 2, 3], [2, 4, 5], [3, 5, 6]], columns=NAMES[:3]), "is it a matrix"),
    "tail and head": (
        pd.DataFrame({"tail": [1, 1], "head": [2, 3], "kind": ["a", "b"]}),
        "does an edge go from 'tail' to 'head'",
    ),
    "Tail and Head of facts": (
        pd.DataFrame({"Tail": [1, 1], "weight": [2, 3], "Head": [2, 3], "kind": ["a", "b"]}),
        "does an edge go from 'Tail' to 'Head'",
    ),
    "groups": (
        pd.DataFrame({":START_ID(User)": [1, 2], ":END_ID(Item)": [1, 1], ":TYPE": ["a", "b"]}),
        "are of two groups",
    ),
    "a group and none": (
        pd.DataFrame({"user:START_ID(User)": [1, 2], ":END_ID": [1, 1], ":TYPE": ["a", "b"]}),
        "are of two groups",
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", DOUBTFUL)
def test_what_has_two_meanings_is_asked_for(tmp_path, what, reader, writer):
    """A matrix was a graph of two nodes, tail,head was turned round, and user 1 and item 1 were one node."""
    frame, says = DOUBTFUL[what]
    path = tmp_path / writer
    WRITERS[writer](frame, path)
    with pytest.raises(DataError, match=says):
        READERS[reader](str(path))


def test_who_says_which_columns_are_ends_is_believed(tmp_path):
    path = tmp_path / "t.csv"
    for what, ends in (
        ("five", ("bob", "cy")),
        ("tail and head", ("tail", "head")),
        ("groups", (":START_ID(User)", ":END_ID(Item)")),
    ):
        frame, _ = DOUBTFUL[what]
        frame.to_csv(path, index=False)
        read_graph(path, source=ends[0], target=ends[1], weight=None)
        from_table(frame, source=ends[0], target=ends[1], weight=None)
        with pytest.raises(DataError):
            from_table(frame)


# Tables of edges that have as many rows as columns, or whose words have one meaning.
CLEAR = {
    "three of ratings": (
        pd.DataFrame({"user": [1, 2, 3], "item": [4, 1, 2], "rating": [5, 3, 4]}),
        [(1, 4), (2, 1), (3, 2)],
    ),
    "with ends": (pd.DataFrame(RING[1:, :4] + 1, columns=["source", "target", "a", "b"]), None),
    "two": (pd.DataFrame({"a": [1, 2], "b": [2, 1]}), [(1, 2), (2, 1)]),
    "more rows": (pd.DataFrame(np.vstack([RING, RING])[:6] + 1, columns=NAMES), None),
    "words beside": (pd.DataFrame({"a": [1, 2, 3], "b": [2, 3, 1], "c": ["x", "y", "z"]}), [(1, 2), (2, 3), (3, 1)]),
    "head and tail": (pd.DataFrame({"head": [1, 1], "tail": [2, 3], "relation": ["a", "b"]}), [(1, 2), (1, 3)]),
    "one group": (pd.DataFrame({":START_ID(User)": [1, 2], ":END_ID(User)": [2, 3]}), [(1, 2), (2, 3)]),
    "no group": (pd.DataFrame({":START_ID": [1, 2], ":END_ID": [2, 3]}), [(1, 2), (2, 3)]),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("what", CLEAR)
def test_what_has_one_meaning_is_read(tmp_path, what, writer):
    frame, edges = CLEAR[what]
    path = tmp_path / writer
    WRITERS[writer](frame, path)
    source, target, _ = read_edges(str(path), GRAPH)
    graph = read_graph(path, directed=True, ids="names", duplicates="max")
    assert len(source) == len(frame)
    if edges is not None:
        assert list(zip(source, target, strict=True)) == edges
        ends = [graph.names_of(end).tolist() for end in graph.edges()[:2]]
        assert sorted(zip(*ends, strict=True)) == sorted(edges)


@pytest.mark.parametrize("names", ["V1,V2", '"V1","V2"', "X1,X2", '"","V1","V2"', '"V1" "V2"', "V1 V2 V3"])
def test_names_that_r_gives_are_no_nodes(tmp_path, names):
    """V1 and V2 were the ends of an edge. Above numbers a line of words is one of names."""
    path, mark = tmp_path / "t.txt", " " if " " in names else ","
    has_index = '"",' in names
    count = names.count(mark) + 1
    rows = [(["1"] if has_index else []) + ["ann", "bob", "2"], (["2"] if has_index else []) + ["bob", "cy", "3"]]
    path.write_text(names + "\n" + "".join(mark.join(row[:count]) + "\n" for row in rows))
    if has_index:
        assert read_graph(path).names.tolist() == ["ann", "bob", "cy"]
    else:
        with pytest.raises(DataError, match=r"line 1: a row, or names of columns"):
            read_graph(path)
    assert read_graph(path, header=True, weight=None).names.tolist() == ["ann", "bob", "cy"]
    # Nodes that are called so.
    path.write_text("V1,V2\nV2,V3\n")
    assert read_graph(path).num_nodes == 3
    path.write_text("x1,x2\ny1,y2\n")
    assert read_graph(path).num_nodes == 4
