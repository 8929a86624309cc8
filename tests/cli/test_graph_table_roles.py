"""What columns of labels, seeds, items and vectors are for, and what they say of all edges: read as meant, or asked for."""

import numpy as np
import pandas as pd
import pytest

from anabranch.cli.graph.inputs import open_typed, read_items
from anabranch.cli.graph.node_tables import LABELS, read_columns, read_labels, read_seeds
from anabranch.cli.graph.vectors import read_vectors
from anabranch.errors import DataError
from anabranch.graph import Graph, read_graph
from anabranch.graph.formats import from_table

GRAPH = Graph.from_edges([0, 1, 2], [1, 2, 3])


@pytest.mark.parametrize("to", ["t.csv", "index.csv", "named.csv", "t.parquet", "named.parquet", "chosen.parquet"])
@pytest.mark.parametrize(
    "columns",
    [("cat", "dog"), ("cat", "dog", "eel"), ("node", "cat", "dog"), ("node", "team", "age"), ("person", "team", "age")],
)
def test_a_label_that_may_be_in_several_columns_is_asked_for(tmp_path, to, columns):
    """The first of a column for each class was the label, its 0 and 1 the classes; beside an index it was the node."""
    cells = {
        "cat": [0, 1, 1, 0],
        "dog": [1, 0, 0, 1],
        "eel": [0, 0, 1, 0],
        "team": ["x", "y", "x", "y"],
        "age": [5, 6, 5, 6],
    }
    frame = pd.DataFrame({name: cells.get(name, [0, 1, 2, 3]) for name in columns})
    if to.startswith("named"):
        frame.index = pd.Index([3, 2, 0, 1], name="number")
    if to.startswith("chosen"):
        frame.index = pd.Index([3, 2, 0, 1])
    path = tmp_path / to
    (frame.to_parquet if to.endswith("parquet") else frame.to_csv)(path, **({"index": False} if to == "t.csv" else {}))
    with pytest.raises(DataError, match=r"which of .* are columns of (node and )?label"):
        read_labels(str(path), GRAPH)
    frame.rename(columns={"cat": "label", "team": "label", "person": "node"}).assign(
        **({} if {"node", "person"} & {*columns} else {"node": [0, 1, 2, 3]})
    ).to_csv(path.with_suffix(".csv"), index=False)
    assert read_labels(str(path.with_suffix(".csv")), GRAPH).shape == (4, 2)


def test_a_label_of_0_and_1_is_one(tmp_path):
    (tmp_path / "l.csv").write_text("node,cat\n0,1\n1,0\n")
    assert read_columns(str(tmp_path / "l.csv"), LABELS, GRAPH) == {"node": ["0", "1"], "label": ["1", "0"]}


@pytest.mark.parametrize("read", [read_seeds, read_labels])
@pytest.mark.parametrize("text", ["1,0,5\n2,0,25\n", "1,2,5\n3,4,5\n", "1,2,\n"])
def test_columns_beyond_those_of_the_table_are_not_passed_over(tmp_path, read, text):
    """A weight of 0,5 was 0, and 2,5 was 2."""
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(DataError, match=r"s\.csv has 3 columns and no names of them"):
        read(str(tmp_path / "s.csv"), GRAPH)


ITEMS = {
    "id,title\n7,a\n9,b\n": [(7, "a"), (9, "b")],
    "track,title\n7,a\n9,b\n": [(7, "a"), (9, "b")],
    "title,artist,id\na,x,7\nb,y,9\n": [(7, "a"), (9, "b")],
    # A data frame's index is the id where no other column can be.
    ",title\n7,a\n9,b\n": [(7, "a"), (9, "b")],
    ",title\n7.0,a\n9.0,b\n": [(7, "a"), (9, "b")],
    ",track,title\n0,7,a\n1,9,b\n": [(7, "a"), (9, "b")],
    '"","track","title"\n"1",7,a\n"2",9,b\n': [(7, "a"), (9, "b")],
    ",id,title\n5,7,a\n6,9,b\n": [(7, "a"), (9, "b")],
    # It was 7.
    "track,title\n007,2001\n9,true\n": [("007", "2001"), ("9", "true")],
    "7,a\n9,b\n": "none of its columns '7', 'a' is called id",
    "7\n9\n": "none of its columns",
    "id;title\n7;a\n9;b\n": "none of its columns 'id;title' is called id",
    ",title\n0,a\n1,b\n": "which of its columns '', 'title' is the id",
    ",track,title\n5,7,a\n6,9,b\n": "which of its columns '', 'track', 'title' is the id",
}


@pytest.mark.parametrize("text", ITEMS)
def test_items_are_called_by_their_ids_or_asked_for(tmp_path, text):
    """The first item was lost where no line named the columns, and titles were ids beside a data frame's index."""
    (tmp_path / "i.csv").write_text(text)
    if isinstance(ITEMS[text], str):
        with pytest.raises(DataError, match=ITEMS[text]):
            read_items(str(tmp_path / "i.csv"))
    else:
        assert [(item.id, item.title) for item in read_items(str(tmp_path / "i.csv"))] == ITEMS[text]


def test_items_of_parquet_are_called_by_their_index(tmp_path):
    frame = pd.DataFrame({"title": ["a", "b"]}, index=[9, 7])
    for name in (None, "id", "track"):
        frame.rename_axis(name).to_parquet(tmp_path / "i.parquet")
        assert [(item.id, item.title) for item in read_items(str(tmp_path / "i.parquet"))] == [(9, "a"), (7, "b")]


@pytest.mark.parametrize("name", ["2024-01-01", "12:30", "true", "2024-01-01 10:00", "a", "node"])
def test_a_first_vector_is_not_lost_whatever_calls_it(tmp_path, name):
    """A name that looks like a time or a truth value made its line one of names of columns."""
    path, second = tmp_path / "v.csv", {"true": "false", "12:30": "12:31"}.get(name, name.replace("01-01", "01-02"))
    path.write_text(f"{name},1,2\n{second},3,4\n")
    if name != "node":
        with pytest.raises(DataError, match=r"is its first line, .*, a row, or are these names of columns"):
            read_vectors(path)
    path.write_text(f"node,x0,x1\n{name},1,2\n")
    assert read_vectors(path).ids.tolist() == [name]
    if name not in ("a", "node"):
        path.write_text(f"{name},0.5,2\n{second},3,4\n")
        assert read_vectors(path).ids.tolist() == [name, second]


def _gephi(types, text=False):
    names = ["ann", "bob", "cy", "dan"] if text else [5, 6, 7, 8]
    count = len(types)
    return pd.DataFrame(
        {
            "Source": names[:count],
            "Target": names[1 : count + 1],
            "Type": types,
            "Id": range(count),
            "Weight": [1.0] * count,
        }
    )


SAVED = {
    "t.csv": lambda frame, path: frame.to_csv(path, index=False),
    "t.tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    "index.csv": lambda frame, path: frame.to_csv(path),
    "t.parquet": lambda frame, path: frame.to_parquet(path),
    "category.parquet": lambda frame, path: frame.astype({"Type": "category"}).to_parquet(path),
}


@pytest.mark.parametrize("to", SAVED)
@pytest.mark.parametrize("text", [False, True])
def test_edges_of_gephi_say_whether_they_are_directed(tmp_path, to, text):
    """A column that said Directed of every edge was passed over, and the graph was undirected."""
    path = tmp_path / to

    def read(types, **options):
        SAVED[to](_gephi(types, text), path)
        return read_graph(path, **options)

    assert read(["Directed", "Directed", "directed"]).is_directed
    assert not read(["Undirected"] * 3).is_directed
    assert not read(["Directed"] * 3, directed=False).is_directed
    # Another thing that is called so.
    assert not read(["knows", "Directed", "knows"]).is_directed
    with pytest.raises(
        DataError,
        match=r"(line 4|row 2): an edge of the type 'Undirected', where those before are directed; `directed` says",
    ):
        read(["Directed", "Directed", "Undirected"])
    assert read(["Directed", "Directed", "Undirected"], directed=True).num_edges == 3


def test_tables_and_edges_of_several_kinds_say_whether_they_are_directed(tmp_path):
    frame = _gephi(["Directed"] * 2)
    assert from_table(frame).is_directed
    assert not from_table(frame, directed=False).is_directed
    with pytest.raises(DataError, match="the table, row 1: an edge of the type"):
        from_table(_gephi(["Undirected", "Directed"]))

    def typed(frame, relation="Label", **options):
        frame.assign(Label="x").to_csv(tmp_path / "t.csv", index=False)
        return open_typed(
            str(tmp_path / "t.csv"), relation, None, "edges", columns=None, quiet=True, **{"directed": None, **options}
        ).graph

    assert typed(frame).is_directed
    assert not typed(frame, directed=False).is_directed
    assert not typed(frame, relation="Type").is_directed
    with pytest.raises(DataError, match="row 1: an edge of the type 'Undirected'"):
        typed(_gephi(["Directed", "Undirected"]))


def test_a_direction_is_looked_for_in_all_blocks(tmp_path):
    """Wherever one block of 8 KiB ends: what the next begins with is held against what the first said."""
    path, count = tmp_path / "t.csv", 900

    def write(kinds):
        rows = [f"n{number:04},n{number + 1:04},{kind}\n" for number, kind in enumerate(kinds)]
        path.write_text("Source,Target,Type\n" + "".join(rows))

    write(["Directed"] * count)
    assert read_graph(path, memory_limit=1 << 20).is_directed
    write(["Directed"] * (count - 1) + [""])
    with pytest.raises(DataError, match=rf"line {count + 1}: the type is empty"):
        read_graph(path, memory_limit=1 << 20)
    # Rows are of 21 bytes.
    for change in range((1 << 13) // 21 - 3, (1 << 13) // 21 + 4):
        write(["Directed"] * change + ["Undirected"] * (count - change))
        with pytest.raises(DataError, match=rf"line {change + 2}: an edge of the type 'Undirected'"):
            read_graph(path, memory_limit=1 << 20)


def test_arrays_of_edges_say_their_shape_and_their_weights(tmp_path):
    """Nodes without edges were lost, and so was the one number that PyTorch Geometric keeps of an edge."""
    path = tmp_path / "g.npz"
    np.savez(path, row=[0, 1], col=[1, 2], data=[5, 6], shape=[9, 9])
    assert read_graph(path).equals(Graph.from_edges([0, 1], [1, 2], [5, 6], True, 9))
    np.savez(path, row=[0, 1], col=[1, 2], shape=[9, 9], num_nodes=4)
    assert read_graph(path).num_nodes == 4
    for shape in ([9, 8], [9], [9.0, 9.0]):
        np.savez(path, row=[0, 1], col=[1, 2], shape=shape)
        with pytest.raises(DataError, match=r"g\.npz: shape is .*; the matrix of a graph is square"):
            read_graph(path)
    np.savez(path, row=[0, 9], col=[1, 2], shape=[9, 9])
    with pytest.raises(DataError, match="9"):
        read_graph(path)
    for attribute in ([2.0, 3.0], [[2.0], [3.0]]):
        np.savez(path, edge_index=np.array([[0, 1], [1, 2]]), edge_attr=attribute)
        assert read_graph(path).equals(Graph.from_edges([0, 1], [1, 2], [2, 3], True))
    np.savez(path, edge_index=np.array([[0, 1], [1, 2]]), edge_attr=np.ones((2, 3)), edge_weight=[4.0, 5.0])
    assert read_graph(path).equals(Graph.from_edges([0, 1], [1, 2], [4, 5], True))
