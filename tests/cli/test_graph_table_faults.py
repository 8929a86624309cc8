"""Tables that are not what they look like, to every reader: read as they were meant, or refused."""

import pytest

from anabranch.cli.graph.inputs import open_typed, read_items
from anabranch.cli.graph.node_tables import read_edges, read_labels, read_seeds
from anabranch.cli.graph.vectors import read_vectors
from anabranch.errors import DataError
from anabranch.graph import Graph, read_graph
from anabranch.graph.rank.clicks import read_clicks

GRAPH = Graph.from_edges([0, 1, 2], [1, 2, 0], names=["ann", "bob", "cy"])


def _edges_of(graph):
    source, target, _ = graph.edges()
    return list(zip(graph.names_of(source).tolist(), graph.names_of(target).tolist(), strict=True))


def _typed(path):
    return _edges_of(open_typed(path, "kind", None, "edges", directed=True, columns=None, quiet=True).graph)


def _labels(path):
    ids, labels = read_labels(path, GRAPH).nonzero()
    return list(zip(GRAPH.names_of(ids).tolist(), labels.tolist(), strict=True))


# What reads a table, and lines of one: names of its columns, and two rows.
READERS = {
    "graph": (lambda path: _edges_of(read_graph(path, directed=True)), ["source,target", "ann,bob", "bob,cy"]),
    "weights": (
        lambda path: _edges_of(read_graph(path, directed=True)),
        ["weight,source,target", "2,ann,bob", "3,bob,cy"],
    ),
    "edges": (
        lambda path: list(zip(*read_edges(path, GRAPH)[:2], strict=True)),
        ["source,target", "ann,bob", "bob,dan"],
    ),
    "kinds": (_typed, ["source,target,kind", "ann,bob,x", "bob,cy,y"]),
    "seeds": (lambda path: GRAPH.names_of(read_seeds(path, GRAPH)[0]).tolist(), ["node,weight", "ann,2", "bob,3"]),
    "labels": (_labels, ["node,label", "ann,x", "bob,y"]),
    "vectors": (lambda path: read_vectors(path).ids.tolist(), ["node,x0,x1", "ann,1,2", "bob,3,4"]),
    "items": (lambda path: [(item.id, item.title) for item in read_items(path)], ["id,title", "ann,x", "bob,y"]),
    "clicks": (lambda path: [part.tolist() for part in read_clicks(path)], ["node,term,item", "ann,x,7", "bob,y,9"]),
}
ENDS = {"of Unix": "\n", "of Windows": "\r\n", "of Python's csv on Windows": "\r\r\n", "of old Macs": "\r"}


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("reader", READERS)
def test_lines_may_end_as_any_program_ends_them(tmp_path, reader, ends):
    """Of \\r\\r\\n names in the last column kept one \\r, so that bob was two nodes; lines of \\r alone were one row."""
    read, lines = READERS[reader]
    (tmp_path / "plain.csv").write_text("\n".join(lines) + "\n")
    meant, path = read(str(tmp_path / "plain.csv")), tmp_path / "t.csv"
    for last in (ENDS[ends], ""):
        path.write_bytes((ENDS[ends].join(lines) + last).encode())
        if ends == "of old Macs" and reader in ("graph", "weights"):
            with pytest.raises(DataError, match=r"line 1: a carriage return within the line"):
                read(str(path))
        else:
            assert read(str(path)) == meant


@pytest.mark.parametrize("reader", READERS)
def test_a_carriage_return_within_a_line_is_refused(tmp_path, reader):
    read, lines = READERS[reader]
    path = tmp_path / "t.csv"
    path.write_bytes((lines[0] + "\n" + lines[1] + "\rcy\n" + lines[2] + "\n").encode())
    with pytest.raises(DataError):
        read(str(path))


@pytest.mark.parametrize("reader", READERS)
def test_a_second_file_behind_the_first_is_told_by_its_names(tmp_path, reader):
    """They were an edge from source to target, and an item called id."""
    read, lines = READERS[reader]
    path = tmp_path / "t.csv"
    path.write_text("\n".join([*lines[:2], lines[0], lines[2]]) + "\n")
    with pytest.raises(DataError, match=r"(row 1|line 3): the names of columns once more"):
        read(str(path))


@pytest.mark.parametrize("reader", READERS)
def test_a_second_file_behind_the_first_is_told_by_its_byte_order_mark(tmp_path, reader):
    """bob with a mark that nobody sees was another node."""
    read, lines = READERS[reader]
    path = tmp_path / "t.csv"
    path.write_text("\n".join([*lines[:2], "\ufeff" + lines[2]]) + "\n")
    with pytest.raises(DataError, match=r"byte order mark"):
        read(str(path))
    # At the beginning it says how the file is encoded.
    path.write_text("\n".join(lines) + "\n")
    meant = read(str(path))
    path.write_text("\ufeff" + "\n".join(lines) + "\n")
    assert read(str(path)) == meant


def test_rows_that_are_called_as_the_columns_are_may_be_meant(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('source,target\nann,bob\n"source","target"\n')
    assert _edges_of(read_graph(path, directed=True)) == [("ann", "bob"), ("source", "target")]
    path.write_text("source,target\nann,bob\nsource,target\n")
    assert _edges_of(read_graph(path, directed=True, header=True)) == [("ann", "bob"), ("source", "target")]
    graph = Graph.from_edges([0], [1], names=["source", "target"])
    assert read_edges(str(path), graph)[0] == ["ann", "source"]


@pytest.mark.parametrize(
    "text",
    [
        "(ann, bob)\n(bob, cy)\n",
        "source,target\n(ann, bob)\n(bob, cy)\n",
        "[ann, bob]\n",
        "source,target,weight\n[(ann, bob, 2)\n",
    ],
)
def test_rows_as_python_prints_them_are_refused(tmp_path, text):
    """(bob and bob) were two nodes, so that no edge met another."""
    path = tmp_path / "t.csv"
    path.write_text(text)
    for read in (read_graph, lambda path: read_edges(str(path), GRAPH)):
        with pytest.raises(DataError, match=r"as Python or JSON prints it|is its first line"):
            read(path)
    path.write_text("source,target\n(ann) x,bob (y)\n")
    assert read_graph(path).names.tolist() == ["(ann) x", "bob (y)"]
    assert read_edges(str(path), GRAPH)[0] == ["(ann) x"]


@pytest.mark.parametrize("mark", [" ", ";", "|"])
def test_commas_that_may_be_those_of_decimals_are_asked_for(tmp_path, mark):
    """R's ann bob 0,5 was an edge from ann bob 0 to 5."""
    path = tmp_path / "t.txt"
    rows = [["ann", "bob", "0,5"], ["bob", "cy", "0,25"]] if mark == " " else [["ann", "0,5"], ["bob", "2,5"]]
    path.write_text("".join(mark.join(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"line 1: split at ',', or at .*`delimiter` says which"):
        read_graph(path)
    assert read_graph(path, delimiter=",", weight=None).num_edges == 2
    # Names with marks in quotes, or below names of columns, are names.
    path.write_text(f'"ann{mark}x","7"\n"bob{mark}y","0,5"\n')
    assert read_graph(path).num_edges == 2
    path.write_text(f"source,target\nann{mark}x 7,5\nbob{mark}y 7,6\n")
    assert read_graph(path).num_edges == 2
