"""Faults of files say what may be typed where a command reads them; and tables near those that are refused are read."""

import numpy as np
import pytest

from anabranch.cli.graph.hints import OPTIONS
from anabranch.cli.graph.inputs import open_graph, open_typed, read_items
from anabranch.cli.graph.node_tables import LABELS, read_columns, read_edges
from anabranch.cli.graph.vectors import read_vectors
from anabranch.errors import DataError
from anabranch.graph import Graph, read_graph

# A file that Python is told this of.
TOLD = {
    "weight=None leaves it out, weight=COLUMN takes another": "0 1 {}\n1 2 {}\n",
    "ids='text' reads": "1,2\nann,3\n",
    "ids='numbers' as": "1,2\n03,3\n",
    "`directed` says what all are": "source,target,Type\n1,2,Directed\n2,3,Undirected\n",
    ", or say which they are": "a,b,c\n0,1,1\n1,0,1\n1,1,0\n",
    "; or `delimiter` says which": "a b 0,5\nb c 0,5\n",
    "; or `header` says which": "_1,_2\nann,bob\nbob,cy\n",
    "; or header=False says that it is a row": "0,1,2\n5,7,0.5\n7,9,2.0\n",
    "; `delimiter` says what else": "1:2\n2:3\n",
    " (give `format` if it is of another kind)": "1,2\n\0,3\n",
    " (give `format`)": "1" * ((1 << 20) + 1) + ",2\n1,2\n",
    "; `comment` says what comments begin with": "ann,bob\n#cy,dan\n",
}


@pytest.mark.parametrize("words", OPTIONS)
def test_commands_are_told_options(tmp_path, words):
    path = tmp_path / "t.csv"
    path.write_text(TOLD[words])
    with pytest.raises(DataError) as python:
        read_graph(path)
    assert words in str(python.value)
    with pytest.raises(DataError) as command:
        open_graph(str(path), quiet=True)
    meant = str(python.value)
    for said, option in OPTIONS.items():
        meant = meant.replace(said, option)
    assert str(command.value) == meant != str(python.value)
    assert "`" not in str(command.value)


def test_what_commands_are_told_is_right(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("0 1 {'a': 1, 'b': 2}\n1 2 {'a': 1, 'b': 2}\n")
    with pytest.raises(DataError, match="--columns 0,1 leaves it out"):
        open_graph(str(path), quiet=True)
    assert open_graph(str(path), columns="0,1", quiet=True).graph.num_edges == 2
    path.write_text("1,2\nann,3\n")
    with pytest.raises(DataError, match="--ids text reads all of them as text"):
        open_graph(str(path), quiet=True)
    assert open_graph(str(path), ids="text", quiet=True).graph.num_nodes == 4
    path.write_text(TOLD["; or header=False says that it is a row"])
    with pytest.raises(DataError, match="--columns 0,1,2 says that it is a row"):
        open_graph(str(path), quiet=True)
    assert open_graph(str(path), columns="0,1,2", quiet=True).graph.num_edges == 3


def test_tables_whose_ends_no_option_says_are_not_told_of_one(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b,c,kind\n0,1,1,k\n1,0,1,k\n1,1,0,k\n")
    with pytest.raises(DataError, match=r"call two columns source and target in its first line$"):
        open_typed(str(path), "kind", None, "edges", directed=None, columns=None, quiet=True)
    path.write_text("a,b,c\n0,1,1\n1,0,1\n1,1,0\n")
    with pytest.raises(DataError, match=r"call two columns source and target in its first line$"):
        read_edges(str(path), Graph.from_edges([0, 1], [1, 2]))


def _edges(tmp_path, text, name="t.csv", **options):
    (tmp_path / name).write_bytes(text.encode())
    graph = read_graph(tmp_path / name, directed=True, **options)
    source, target, weight = graph.edges()
    ends = [graph.names_of(end).tolist() for end in (source, target)]
    return sorted(zip(*ends, *([] if weight is None else [weight.tolist()]), strict=True))


GOOD = {
    "blanks before commas": ("1 ,2 ,3\n2 ,3 ,4\n", [(1, 2, 3.0), (2, 3, 4.0)]),
    "names with numbers": ("Area 51,7 Eleven\nRoute 66,3 Com\n", [("Area 51", "7 Eleven"), ("Route 66", "3 Com")]),
    "two words and a number": ("a b,7\nc d,5\n", [("a b", "7"), ("c d", "5")]),
    "one word and a number": ("room 1,7\nroom 2,5\n", [("room 1", "7"), ("room 2", "5")]),
    "four, no matrix": ("a,b,n,m\n1,2,5,9\n2,3,4,9\n3,1,3,9\n4,1,3,8\n", [(1, 2), (2, 3), (3, 1), (4, 1)]),
    "marks of one row": ("P1;P2,Q1\nP3,Q2\n", [("P1;P2", "Q1"), ("P3", "Q2")]),
    "words of other numbers": ("ann b 0,5\nbob x y 0,7\n", [("ann b 0", "5"), ("bob x y 0", "7")]),
    "words of one row": ("ann b 0,5\nbob,5\n", [("ann b 0", "5"), ("bob", "5")]),
    "a comment with a carriage return": ("# a\rb\n1 2\n# x\r\n2 3\n", [(1, 2), (2, 3)]),
    "a carriage return in quotes": ('ann,"b\rc"\nbob,cy\n', [("ann", "b\rc"), ("bob", "cy")]),
    "an order mark in quotes": ('ann,bob\n"\ufeffcy",bob\n', [("ann", "bob"), ("\ufeffcy", "bob")]),
    "ratings": ("user,item,rating\n0,1,3\n1,0,4\n2,1,0\n", [(0, 1), (1, 0), (2, 1)]),
    "five of ratings": (
        "user,item,rating,timestamp,sess\n1,2,5,9,1\n2,3,4,9,1\n3,1,3,9,2\n4,1,3,9,2\n5,2,3,9,2\n",
        [(1, 2), (2, 3), (3, 1), (4, 1), (5, 2)],
    ),
    "words of ends": (
        "source,target\nfrom,to\nto,from\nsource,word\n",
        [("from", "to"), ("source", "word"), ("to", "from")],
    ),
    "names once more in quotes": ('from,to\ngo,to\n"from","to"\n', [("from", "to"), ("go", "to")]),
    "other names in another case": ("x,y,weight\nann,bob,1\nX,Y,2\n", [("X", "Y", 2.0), ("ann", "bob", 1.0)]),
}


@pytest.mark.parametrize("what", GOOD)
def test_tables_near_those_that_are_refused_are_read(tmp_path, what):
    text, edges = GOOD[what]
    assert _edges(tmp_path, text) == edges


@pytest.mark.parametrize(
    "text",
    [
        "a b 0,5\nb c 1,5\n",
        "a b 1,5e-05\nb c 1,5\n",
        "0,5 a b\n2,5 b c\n",
        "1 2,5 2\n2 3,5 3\n",
        "a 0,5 b\nb 0,7 c\n",
        "a b 1\nb c 0,7\n",
    ],
)
def test_commas_of_decimals_are_asked_for(tmp_path, text):
    if text.startswith("a b 1\n"):
        # Of which the first row has none, so that it is split at blanks.
        with pytest.raises(DataError, match="line 2: the weight '0,7' is not a number"):
            _edges(tmp_path, text)
        return
    with pytest.raises(DataError, match=r"split at ',', or at blanks"):
        _edges(tmp_path, text)


def test_ratings_of_few_rows_are_added(tmp_path):
    (tmp_path / "t.csv").write_text(GOOD["ratings"][0])
    assert read_edges(str(tmp_path / "t.csv"), Graph.from_edges([0, 1], [1, 2])) == ([0, 1, 2], [1, 0, 1], None)


def test_columns_that_are_not_called_as_ends_are_told_by_the_same_names_alone(tmp_path):
    assert _edges(tmp_path, "x,y\nann,bob\nX,Y\n", source="x") == [("X", "Y"), ("ann", "bob")]
    with pytest.raises(DataError, match="names of columns once more"):
        _edges(tmp_path, "x,y\nann,bob\nx,y\n", source="x")


SECOND = {
    "in another case": ("source,target\nann,bob\nSource,Target\nbob,cy\n", "names of columns once more"),
    "in another order": ("source,target\nann,bob\ntarget,source\nbob,cy\n", "names of columns once more"),
    "with blanks": ("source,target\nann,bob\n source , target\nbob,cy\n", "names of columns once more"),
    "with a mark within the line": ("source,target\nann,bob\nbob,\ufeffann\n", "byte order mark"),
    "with a mark behind a blank": ("source,target\nann,bob\n \ufeffbob,cy\n", "byte order mark"),
}


@pytest.mark.parametrize("what", SECOND)
def test_a_second_file_behind_the_first_is_told(tmp_path, what):
    text, says = SECOND[what]
    with pytest.raises(DataError, match=says):
        _edges(tmp_path, text)
    graph = Graph.from_edges([0, 1], [1, 2], names=["ann", "bob", "cy"])
    with pytest.raises(DataError, match=says):
        read_edges(str(tmp_path / "t.csv"), graph)
    lines = text.splitlines()
    (tmp_path / "k.csv").write_text(
        "".join(f"{line},{'kind' if line == lines[0] or 'ource' in line else 'k'}\n" for line in lines)
    )
    with pytest.raises(DataError, match=says):
        open_typed(str(tmp_path / "k.csv"), "kind", None, "edges", directed=None, columns=None, quiet=True)
    # Nodes that the graph knows may be called so.
    known = Graph.from_edges([0], [1], names=["Source", "Target"])
    (tmp_path / "t.csv").write_text("source,target\nSource,Target\n")
    assert read_edges(str(tmp_path / "t.csv"), known)[0] == ["Source"]


def test_edges_of_more_columns_without_names_are_refused_where_they_are_added(tmp_path):
    """The fourth was left out without a word."""
    path = tmp_path / "t.csv"
    path.write_text("0,2,2,9\n1,2,5,9\n")
    graph = Graph.from_edges([0, 1], [1, 2])
    with pytest.raises(
        DataError, match="has 4 columns and no names of them, and edges are source and target and weight"
    ):
        read_edges(str(path), graph)
    path.write_text("source,target,weight,time\n0,2,2,9\n1,2,5,9\n")
    assert read_edges(str(path), graph) == ([0, 1], [2, 2], [2.0, 5.0])
    path.write_text("0,2,2\n1,2,5\n")
    assert read_edges(str(path), graph) == ([0, 1], [2, 2], [2.0, 5.0])
    path.write_text("0,x\n1,y\n")
    assert read_columns(str(path), LABELS, graph)["label"] == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("item_id,name\n7,x\n9,y\n", [(7, "x"), (9, "y")]),
        ("artistID,name,url\n7,x,u\n9,y,v\n", [(7, "x"), (9, "y")]),
        (",movieId,title,name\n0,7,x,n\n1,9,y,n\n", [(7, "x"), (9, "y")]),
        ("title,artist_id\nx,7\ny,7\n", [("x", "x"), ("y", "y")]),
        ("name,tags\nx,a\ny,b\n", [("x", ""), ("y", "")]),
    ],
)
def test_ids_of_items_may_be_called_as_ids_are(tmp_path, text, items):
    (tmp_path / "t.csv").write_text(text)
    assert [(item.id, item.title) for item in read_items(str(tmp_path / "t.csv"))] == items


def test_items_without_any_known_column_are_refused(tmp_path):
    (tmp_path / "t.csv").write_text("paid,grid\n1,2\n")
    with pytest.raises(DataError, match="begin it with the line id,title"):
        read_items(str(tmp_path / "t.csv"))


def test_years_above_days_are_names_of_columns(tmp_path):
    path = tmp_path / "v.csv"
    path.write_text("date,1990,1991\n2020-01-01,1.5,2\n2020-01-02,3,4\n")
    found = read_vectors(path)
    np.testing.assert_array_equal(found.array, [[1.5, 2], [3, 4]])
    assert found.ids.tolist() == ["2020-01-01", "2020-01-02"]
    path.write_text("2019-12-31,1990,1991\n2020-01-01,1.5,2\n")
    with pytest.raises(DataError, match="is its first line"):
        read_vectors(path)
