"""Tables of edges, labels and seeds, as others write them."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from anabranch.cli.graph.inputs import names_of, open_typed, read_items
from anabranch.cli.graph.node_tables import (
    LABELS,
    SEEDS,
    read_columns,
    read_edges,
    read_labels,
    read_names,
    read_seeds,
)
from anabranch.cli.graph.vectors import read_vectors
from anabranch.errors import AnabranchError, DataError
from anabranch.graph import Graph, read_graph
from anabranch.graph.rank.clicks import read_clicks
from anabranch.graph.table_columns import as_names

GRAPHS = {
    "named": Graph.from_edges([0, 1, 2], [1, 2, 0], names=["ann", "bob", "cy"]),
    "numbered": Graph.from_edges([0, 5], [5, 6], num_nodes=7),
}


@pytest.mark.parametrize(
    ("graph", "text", "rows"),
    [
        ("named", "ann\nbob\n", ["ann", "bob"]),
        ("named", "ann\n", ["ann"]),
        ("named", "node\nann\n", ["ann"]),
        ("named", "ann,2\nbob,1\n", ["ann", "bob"]),
        ("numbered", "5,red\n6,blue\n0,red\n", [5, 6, 0]),
        ("numbered", "0,1\n1,0\n", [0, 1]),
        ("numbered", "id,weight\n5,1\n", [5]),
        ("numbered", "5\n", [5]),
        ("numbered", "person\n5\n", [5]),
        # Of one that is not there whoever looks is told.
        ("numbered", "100\n5\n", [100, 5]),
        ("numbered", "100,red\n5,blue\n", [100, 5]),
    ],
)
def test_a_first_line_that_begins_with_a_node_is_a_row(tmp_path, graph, text, rows):
    path = tmp_path / "s.csv"
    path.write_text(text)
    read = GRAPHS[graph]
    form = LABELS if "red" in text else SEEDS
    assert names_of(read, read_columns(str(path), form, read)["node"]) == rows


@pytest.mark.parametrize(
    ("graph", "text", "count"),
    [
        ("named", "ann,bob\nbob,cy\ncy,ann\n", 3),
        ("named", "ann,dan\n", 1),
        ("named", "dan,ann\n", 1),
        ("named", "from,to\ndan,eve\n", 1),
        ("numbered", "follower,followee\n5,6\n", 1),
        # Between new nodes, above some that are known.
        ("numbered", "100,101\n0,5\n", 2),
        ("numbered", "7,8,0.5\n0,7,0.5\n", 2),
        ("numbered", "5,6,0.5\n6,0,0.5\n", 2),
        ("numbered", "0,1\n1,5\n", 2),
        ("numbered", "5,9\n", 1),
    ],
)
def test_a_first_line_of_edges_is_a_row_or_names(tmp_path, graph, text, count):
    """It was taken for names wherever it was not all numbers: one edge of each table was lost without a word."""
    path = tmp_path / "e.csv"
    path.write_text(text)
    source, target, _ = read_edges(str(path), GRAPHS[graph])
    assert len(source) == len(target) == count


def test_nodes_of_which_nobody_can_tell_are_refused(tmp_path):
    """One that was typed wrong was passed over."""
    path = tmp_path / "s.csv"
    path.write_text("anne\nbob\n")
    with pytest.raises(
        DataError, match=r"s\.csv: is its first line, anne, one of seeds, .*Begin it with the line node"
    ):
        read_seeds(str(path), GRAPHS["named"])


@pytest.mark.parametrize("text", ["dan,eve\n", "dan,eve\nfay,gus\n", "dan,eve\nann,bob\n"])
def test_edges_of_which_nobody_can_tell_are_refused(tmp_path, text):
    path = tmp_path / "e.csv"
    path.write_text(text)
    with pytest.raises(
        DataError, match=r"e\.csv: is its first line, dan,eve, one of edges, .*Begin it with the line source,target"
    ):
        read_edges(str(path), GRAPHS["named"])


@pytest.mark.parametrize(
    ("text", "edges"),
    [
        # R, a data frame with its index, Gephi, names in another order, of a column that had an empty cell once.
        ('"","from","to"\n"1",5,6\n"2",0,5\n', [(5, 6), (0, 5)]),
        (",a,b\n0,5,6\n1,0,5\n", [(5, 6), (0, 5)]),
        ("Source,Target,Type,Id,Label,Weight\n5,6,Undirected,0,x,2.5\n", [(5, 6, 2.5)]),
        ("weight,to,from\n0.5,6,5\n", [(5, 6, 0.5)]),
        ("user,item\n5.0,6.0\n", [(5.0, 6.0)]),
        ("5.0,6.0\n0.0,5.0\n", [(5.0, 6.0), (0.0, 5.0)]),
        # A column of another name is no weight.
        ("a,b,score\n5,6,0.5\n", [(5, 6)]),
        ("source,target,year\n5,6,2019\n", [(5, 6)]),
        ("Unnamed: 0,a,b\n0,5,6\n", [(5, 6)]),
    ],
)
def test_edges_as_others_write_them(tmp_path, text, edges):
    """Their index was taken for an end, and ends for weights."""
    path = tmp_path / "e.csv"
    path.write_text(text)
    columns = [column for column in read_edges(str(path), GRAPHS["numbered"]) if column is not None]
    assert list(zip(*columns, strict=True)) == edges


def test_names_that_look_like_numbers_or_times_are_read_as_they_are(tmp_path):
    """They became 7, True and 2020-01-01 10:00:00: new nodes, on which edges hung without a word."""
    names = ["007", "1.0", "true", "2020-01-01 10:00"]
    graph = Graph.from_edges([0, 1, 2], [1, 2, 3], names=names)
    path = tmp_path / "e.csv"
    path.write_text("source,target,weight\n007,true,2\n1.0,2020-01-01 10:00,0.5\n")
    assert read_edges(str(path), graph) == (["007", "1.0"], ["true", "2020-01-01 10:00"], [2.0, 0.5])
    path.write_text("007\ntrue\n")
    assert graph.names_of(read_seeds(str(path), graph)[0]).tolist() == ["007", "true"]
    path.write_text("007,05\ntrue,5\n")
    assert read_labels(str(path), graph).sum() == 2
    path.write_text("007,true,much\n")
    with pytest.raises(DataError, match="row 0: the weight 'much' is not a number"):
        read_edges(str(path), graph)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("node\n5\n6\n", ["5", "6"]),
        ("5\n6\n", ["5", "6"]),
        ("weight,node\n1,5\n", ["5"]),
        ("ann\nbob\n", ["ann", "bob"]),
        ("user_id\n5\n6\n", ["5", "6"]),
        (",user\n0,5\n1,6\n", ["5", "6"]),
    ],
)
def test_seeds_of_files_of_edges_are_read_without_a_graph(tmp_path, text, rows):
    path = tmp_path / "s.csv"
    path.write_text(text)
    assert read_names(str(path)) == rows


# What a table may hold, and how people and programs write it. Each reader has to read each of these as it was meant, or to refuse it.

NODES = {
    "numbers": [5, 6, 0, 100000],
    "words": ["ann", "bob", "node", "key"],
    "padded": ["007", "7", "1e5", "1.0"],
    "times": ["true", "2020-01-01 10:00", "12:30", "nan"],
}
GRAPH_OF = {
    kind: Graph.from_edges([0, 1, 2], [1, 2, 3], names=names if kind != "numbers" else np.array(names))
    for kind, names in NODES.items()
}


def _as_csv(rows, header=None, *, index=None, comma=","):
    """Lines of cells; ``index``: what its own column is called, in front of rows numbered from 0 (R: from 1)."""
    lines = [] if header is None else [header]
    lines += [[str(cell) for cell in row] for row in rows]
    if index is not None:
        first = 0 if header is None else 1
        start = 1 if index == '""' else 0
        numbers = [index] * first + [str(number + start) for number in range(len(rows))]
        lines = [[number, *line] for number, line in zip(numbers, lines, strict=True)]
    return "".join(comma.join(line) + "\n" for line in lines)


def written(roles, words, rows):
    """Texts by how they are written, of rows whose columns are called ``roles``, or in other ways ``words``."""
    turned = [list(reversed(row)) for row in rows]
    yield "by hand", _as_csv(rows)
    yield "with names", _as_csv(rows, roles)
    yield "in capitals", _as_csv(rows, [role.title() for role in roles])
    yield "in another order", _as_csv(turned, list(reversed(roles)))
    yield "in other words", _as_csv(rows, words)
    yield "with blanks", _as_csv(rows, roles, comma=", ")
    yield "with blanks, by hand", _as_csv(rows, comma=", ")
    yield "a data frame", _as_csv(rows, roles, index="")
    yield "a data frame of other words", _as_csv(rows, words, index="")
    yield "a data frame read again", _as_csv(rows, roles, index="Unnamed: 0")
    yield "R", _as_csv(rows, [f'"{role}"' for role in roles], index='""')
    yield "R of other words", _as_csv(rows, [f'"{word}"' for word in words], index='""')
    yield "numbered columns", _as_csv(rows, [str(number) for number in range(len(roles))], index="")
    if all(isinstance(cell, int) for row in rows for cell in row[:1]):
        yield "as fractions", _as_csv([[f"{row[0]}.0", *row[1:]] for row in rows], roles)
        yield "as fractions, by hand", _as_csv([[f"{row[0]}.0", *row[1:]] for row in rows])
        yield "as R writes large ones", _as_csv([["1e+05", *row[1:]] for row in rows if row[0] == 100000])


CLEAR = (
    "with names",
    "in capitals",
    "in another order",
    "with blanks",
    "a data frame",
    "a data frame read again",
    "R",
    "as fractions",
)
# Begun with each node once: the first line is the one that gets lost.
TURNS = range(4)


def _edges(kind, turn):
    names = NODES[kind]
    return [[names[(turn + place) % 4], names[(turn + place + 1) % 4]] for place in range(3)]


def _labels(kind, turn):
    return [[name, label] for name, label in zip(_turned(kind, turn), ("red", "05", "key"), strict=False)]


def _seeds(kind, turn):
    return [[name, weight] for name, weight in zip(_turned(kind, turn), (2.5, 1.0, 0.5), strict=False)]


def _turned(kind, turn):
    return NODES[kind][turn:] + NODES[kind][:turn]


def _read_labels(path, graph):
    found = read_columns(path, LABELS, graph)
    return list(zip(names_of(graph, found["node"]), found["label"], strict=True))


def _read_seeds(path, graph):
    ids, weights = read_seeds(path, graph)
    return list(zip(graph.names_of(ids).tolist(), weights.tolist(), strict=True))


def _read_edges(path, graph):
    source, target, weight = read_edges(path, graph)
    assert weight is None
    return list(zip(source, target, strict=True))


FORMS = {
    "edges": (("source", "target"), ("a", "b"), _edges, _read_edges),
    "labels": (("node", "label"), ("person", "team"), _labels, _read_labels),
    "seeds": (("node", "weight"), ("person", "pagerank"), _seeds, _read_seeds),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("kind", NODES)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read_or_refused(tmp_path, form, kind, turn):
    """First lines were lost, an index was taken for nodes, weights for nodes, and 007 for 7: each without a word."""
    roles, words, make, read = FORMS[form]
    rows, path = make(kind, turn), tmp_path / "t.csv"
    for how, text in written(list(roles), list(words), rows):
        path.write_text(text)
        meant = [tuple(row) for row in rows if "R writes large" not in how or row[0] == 100000]
        if not meant:
            continue
        try:
            found = read(str(path), GRAPH_OF[kind])
        except DataError:
            assert how not in CLEAR, (how, text)
            continue
        assert found == meant, (how, text)


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("kind", NODES)
def test_edges_of_graphs_are_read_as_they_are_written_or_refused(tmp_path, kind, turn):
    """Ends were turned round where one name was known and stood second, and an index was taken for the source."""
    rows, path = _edges(kind, turn), tmp_path / "t.csv"
    for how, text in written(["source", "target"], ["a", "b"], rows):
        path.write_text(text)
        if "R writes large" in how:
            continue
        try:
            graph = read_graph(path, directed=True, ids="auto" if kind == "numbers" else "text")
        except AnabranchError:
            assert how not in CLEAR or how == "as fractions", (how, text)
            continue
        # A line of names above text is told by well-known ones alone, as `read_graph` says.
        if how in ("in other words", "numbered columns", "a data frame of other words") and kind != "numbers":
            continue
        names = graph.names_of(np.arange(graph.num_nodes)).tolist()
        ends = [(names[source], names[target]) for source, target in zip(*graph_ends(graph), strict=True)]
        assert sorted(ends) == sorted(tuple(row) for row in rows), (how, text)


def graph_ends(graph):
    """Ids of sources and of targets of all edges."""
    return np.repeat(np.arange(graph.num_nodes), np.diff(graph.indptr)).tolist(), graph.indices.tolist()


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("kind", NODES)
def test_vectors_are_read_by_name_as_they_are_written_or_refused(tmp_path, kind, turn):
    rows, path = [[name, 0.5 + place, 0.25] for place, name in enumerate(_turned(kind, turn))], tmp_path / "t.csv"
    for how, text in written(["node", "x0", "x1"], ["who", "a", "b"], rows):
        path.write_text(text)
        if how in ("numbered columns", "a data frame of other words", "R of other words"):
            # The index calls the rows, as the docs say, and what then is no number is refused.
            continue
        try:
            found = read_vectors(path)
        except DataError:
            assert how not in CLEAR or how == "as fractions", (how, text)
            continue
        if "R writes large" in how or (
            kind in ("numbers", "padded")
            and how in ("by hand", "with blanks, by hand", "in other words", "as fractions, by hand")
        ):
            # Numbers under another word, or under none, are numbers of the vectors.
            continue
        assert found.ids.tolist() == [row[0] for row in rows], (how, text)
        turned = -1 if how == "in another order" else 1
        assert found.array.tolist() == [row[1:][::turned] for row in rows]


@pytest.mark.parametrize(
    ("table", "edges"),
    [
        ({"a": [5, 6], "b": [6, 0], "__index_level_0__": [7, 9]}, [(5, 6), (6, 0)]),
        ({"target": [6.0], "source": [5.0]}, [(5, 6)]),
        ({"target": pa.array(["6"]).cast(pa.large_string()), "source": pa.array([5], pa.uint64())}, [(5, 6)]),
        ({"from": pa.array(["5"]).dictionary_encode(), "to": pa.array(["6"])}, [(5, 6)]),
    ],
)
def test_edges_of_parquet(tmp_path, table, edges):
    pq.write_table(pa.table(table), tmp_path / "e.parquet")
    source, target, weight = read_edges(str(tmp_path / "e.parquet"), GRAPHS["numbered"])
    assert (list(zip(source, target, strict=True)), weight) == (edges, None)


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ([b"ann"], "of binary"),
        ([1.0], "of double; text call nodes here"),
        ([True], "of bool"),
    ],
)
def test_cells_of_parquet_that_call_no_node_are_told(tmp_path, ends, says):
    """Nodes "b'ann'" and '1.0' were new ones."""
    pq.write_table(pa.table({"source": ends, "target": ["bob"]}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match=f"the column 'source' is {says}"):
        read_edges(str(tmp_path / "e.parquet"), GRAPHS["named"])


def test_whole_numbers_are_read_exactly(tmp_path):
    """Arrow takes those from 2^63 on, and all beside a 5.0, for fractions: another node."""
    names = np.array([2**63 + 1, 2**53 + 1, 5], np.uint64)
    graph = Graph.from_edges([0, 1], [1, 2], names=names)
    path = tmp_path / "e.csv"
    path.write_text(f"source,target\n{2**63 + 1},5.0\n{2**53 + 1},5\n")
    assert read_edges(str(path), graph) == ([2**63 + 1, 2**53 + 1], [5, 5], None)
    path.write_text(f"source,target\n{float(2**60)!r},5\n")
    with pytest.raises(DataError, match=r"written as a decimal, which cannot tell whole numbers beyond 2\^53 apart"):
        read_edges(str(path), graph)


@pytest.mark.parametrize("text", ["1_0\n", "5.5\n", "inf\n", "1e400\n", "..e1\n"])
def test_what_is_no_whole_number_is_no_node(tmp_path, text):
    (tmp_path / "s.csv").write_text("node\n" + text)
    with pytest.raises(DataError, match="there is no node"):
        read_seeds(str(tmp_path / "s.csv"), GRAPHS["numbered"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("node,pagerank\n5,0.5\n", "is the column 'pagerank' a weight"),
        (",0\n5,0.5\n", "which of '', '0' are columns of node"),
        (",user,team\n3,5,6\n", "which of"),
        ("node,weight\n5,1_0\n", "row 0: the weight '1_0' is not a number"),
        ("O5,2\n6,2\n", "is its first line, O5,2,"),
        (",2\n5,3\n6,2\n", "is its first line, ,2,"),
        ("node,weight\n5,nan\n", "row 0: the weight 'nan' is not a number"),
        ("node,weight\n5,\n", "row 0: an empty cell"),
        ("node\n", "has no rows"),
        (",0.5,0.25\n1,5,6\n", "is its first line"),
    ],
)
def test_seeds_of_which_nobody_can_tell_are_refused(tmp_path, text, says):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        read_seeds(str(tmp_path / "s.csv"), GRAPHS["numbered"])


def test_a_series_calls_its_rows_by_their_nodes(tmp_path):
    (tmp_path / "l.csv").write_text(",label\n5,red\n6,blue\n")
    assert read_labels(str(tmp_path / "l.csv"), GRAPHS["numbered"]).nonzero()[0].tolist() == [5, 6]


@pytest.mark.parametrize(
    ("text", "names", "edges"),
    [
        ("source,target,kind\n007,8,a\n7,9,a\n", ["007", "7", "8", "9"], {("007", "8"), ("7", "9")}),
        ("source,target,kind\n1,p1,a\n2,1,a\n", ["1", "2", "p1"], {("1", "p1"), ("2", "1")}),
        (",a,b,kind\n0,5,6,x\n1,6,7,x\n", [5, 6, 7], {(5, 6), (6, 7)}),
        ("source,target,kind\n5, 6,01\n6, 7,1\n", [5, 6, 7], {(5, 6), (6, 7)}),
        ("source, target, kind\nann, bob, x\nbob, cy, x\n", ["ann", "bob", "cy"], {("ann", "bob"), ("bob", "cy")}),
    ],
)
def test_edges_of_several_kinds_are_called_as_they_are_written(tmp_path, text, names, edges):
    """007 and 7 were one node, and 1 and '1' were two."""
    (tmp_path / "e.csv").write_text(text)
    graph = open_typed(str(tmp_path / "e.csv"), "kind", None, "edges", directed=True, columns=None, quiet=True).graph
    found = graph.names.tolist()
    assert found == names
    assert {(found[source], found[target]) for source, target in zip(*graph_ends(graph), strict=True)} == edges


# Of what is in a table beside its ends, some is called as ends are elsewhere.
HEADERS = {
    "i,j,v": (0, 1),
    "user,item,start": (0, 1),
    "a,b,end": (0, 1),
    "u,v,w": (0, 1),
    "u,v,time": (0, 1),
    "v,u": (1, 0),
    "start,end,weight": (0, 1),
    "id,source,destination": (1, 2),
    "No.,Time,Source,Destination": (2, 3),
    "year,source,dest": (1, 2),
    "receiver,sender,year": (1, 0),
    "dest,source": (1, 0),
    "friend,source": (1, 0),
    "weight,friend,source": (2, 1),
    "from,to,source": (0, 1),
    "source,target,from": (0, 1),
    "source,target,from,to": (0, 1),
    "weight,a,b": (1, 2),
    "u,w,x": (0, 2),
    # Nobody can tell.
    "from,to,src,dst": None,
    "from,source,target_id,to_id": None,
    "a,b,start,end": None,
    "year,source,friend": None,
    "source,a,b": None,
    "source,day,end": None,
}


@pytest.mark.parametrize("header", HEADERS)
def test_what_is_called_as_ends_are_is_an_end_or_asked_for(tmp_path, header):
    """One word was enough: the matrix i,j,v was read as the edges i,v turned round, and a number of rows as a source."""
    path, ends = tmp_path / "t.csv", HEADERS[header]
    row = ["5", "6", "7", "8"][: header.count(",") + 1]
    path.write_text(f"{header}\n{','.join(row)}\n")
    graph = GRAPH_OF["numbers"]
    for read in (lambda: read_edges(str(path), graph)[:2], lambda: _only_edge(read_graph(path, directed=True))):
        if ends is None:
            with pytest.raises(DataError, match="are source and target"):
                read()
        else:
            assert [int(end[0]) for end in read()] == [int(row[place]) for place in ends]


def _only_edge(graph):
    [source], [target] = graph_ends(graph)
    return graph.names_of([source]), graph.names_of([target])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("source,target,kind\n5.0,6,x\n", "'source' has whole numbers that are written as '5.0' is"),
        ("source,target,kind\nann,,x\n", "row 0: an empty cell"),
        ("source,target,kind\nann,bob,x\n,bob,x\n", "row 1: an empty cell"),
    ],
)
def test_cells_of_edges_of_several_kinds_that_call_no_node_are_told(tmp_path, text, says):
    (tmp_path / "e.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        open_typed(str(tmp_path / "e.csv"), "kind", None, "edges", directed=True, columns=None, quiet=True)


def test_a_matrix_is_no_table_of_edges(tmp_path):
    """Its first two columns were taken for ends."""
    path = tmp_path / "m.csv"
    path.write_text(",ann,bob,cy\nann,0,1,0\nbob,1,0,1\ncy,0,1,0\n")
    with pytest.raises(DataError, match="is a matrix whose rows are called as its columns"):
        read_edges(str(path), GRAPHS["named"])
    with pytest.raises(DataError, match="is a matrix whose rows are called as its columns"):
        read_graph(path)


def test_two_columns_that_may_be_the_label_are_refused(tmp_path):
    (tmp_path / "l.csv").write_text("Id,Label,modularity_class,class\n5,five,0,red\n")
    with pytest.raises(DataError, match="which of 'Label', 'class' is the label"):
        read_labels(str(tmp_path / "l.csv"), GRAPHS["numbered"])


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        # An index of fractions counts rows too; so does R's from 1.
        (",user,team\n0.0,5,red\n1.0,6,blue\n", [(5, "red"), (6, "blue")]),
        ('"","user","team"\n"1",5,red\n"2",6,blue\n', [(5, "red"), (6, "blue")]),
        # Columns without names, of which only the index can be of nodes, or nobody can tell.
        (",0,1\n0,5,6\n1,6,0\n", None),
        # A series whose nodes count its rows, and one whose do not.
        (",label\n0,red\n1,blue\n", None),
        (",label\n6,red\n5,blue\n", [(6, "red"), (5, "blue")]),
        (" node , label \n5, red\n", [(5, "red")]),
    ],
)
def test_an_index_calls_nodes_where_it_does_not_count_rows(tmp_path, text, rows):
    (tmp_path / "l.csv").write_text(text)
    if rows is None:
        with pytest.raises(DataError, match="which of"):
            _read_labels(str(tmp_path / "l.csv"), GRAPHS["numbered"])
    else:
        assert _read_labels(str(tmp_path / "l.csv"), GRAPHS["numbered"]) == rows


def test_a_node_that_is_called_with_blanks_is_found_and_others_lose_theirs(tmp_path):
    graph = Graph.from_edges([0, 1], [1, 2], names=[" ann", "ann", "bob"])
    (tmp_path / "s.csv").write_text("node\n ann\n bob\nann\n")
    assert graph.names_of(read_seeds(str(tmp_path / "s.csv"), graph)[0]).tolist() == [" ann", "bob", "ann"]


def test_the_line_that_docs_give_is_one_of_names_though_nodes_are_called_so(tmp_path):
    graph = Graph.from_edges([0, 1, 2], [1, 2, 3], names=["node", "label", "ann", "2.5"])
    path = tmp_path / "t.csv"
    path.write_text("node,label\nann,red\n")
    assert _read_labels(str(path), graph) == [("ann", "red")]
    path.write_text("node,2.5\nann,1\n")
    with pytest.raises(DataError, match=r"is its first line, node,2\.5"):
        read_seeds(str(path), graph)
    path.write_text("node,age\nann,\n")
    assert _read_seeds(str(path), graph) == [("ann", 1.0)]


def test_whoever_says_one_end_is_given_another_column_for_the_other(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("source,target,year\n5,6,2019\n")
    for asked, edge in (
        ({"target": "source"}, (6, 5)),
        ({"source": "target"}, (6, 5)),
        ({"source": "year"}, (2019, 6)),
    ):
        found = _only_edge(read_graph(path, directed=True, **asked))
        assert tuple(int(end[0]) for end in found) == edge, asked


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        (["5", "6"], [5, 6]),
        (["5", "06"], ["5", "06"]),
        ([str(2**63), "5"], [2**63, 5]),
        ([str(2**64), "5"], [str(2**64), "5"]),
        (["-5", "+5"], ["-5", "+5"]),
        ([" 5", "6 "], [5, 6]),
    ],
)
def test_names_are_numbers_where_all_are_written_as_one_writes_them(cells, names):
    assert as_names(pa.chunked_array([cells])).to_pylist() == names


def test_lines_of_numbers_that_may_be_names_are_asked_for(tmp_path):
    path = tmp_path / "v.csv"
    for text in ("who,2019,2020\nann,.5,.25\n", "0,1\n,\n"):
        path.write_text(text)
        with pytest.raises(DataError, match="is its first line, "):
            read_vectors(path)
    # Two columns have not one name.
    path.write_text("who,2019,2019\nann,.5,.25\n")
    assert read_vectors(path).names.tolist() == ["who", "ann"]


# Who reads it, and a table with the nodes ann, X and bob, as R writes one.
OF_R = {
    "edges": (
        lambda path: read_edges(path, GRAPHS["named"])[1],
        '"","source","target"\n"1","ann","X"\n"2","X","bob"\n',
    ),
    "seeds": (lambda path: read_columns(path, SEEDS, None)["node"], '"","node","weight"\n"1","ann",1\n"2","X",2\n'),
    "labels": (
        lambda path: read_columns(path, LABELS, None)["node"],
        '"","node","label"\n"1","ann","a"\n"2","X","b"\n',
    ),
    "classes": (
        lambda path: read_columns(path, LABELS, None)["label"],
        '"","node","label"\n"1","ann","a"\n"2","bob","X"\n',
    ),
    "graph": (lambda path: read_graph(path).names.tolist(), '"","source","target"\n"1","ann","X"\n"2","X","bob"\n'),
    "kinds": (
        lambda path: open_typed(
            path, "kind", None, "edges", directed=True, columns=None, quiet=True
        ).graph.names.tolist(),
        '"","source","target","kind"\n"1","ann","X","a"\n"2","X","bob","a"\n',
    ),
    "vectors": (lambda path: list(read_vectors(path).names), '"","node","x0","x1"\n"1","ann",1,2\n"2","X",3,4\n'),
    "clicks": (
        lambda path: list(read_clicks(path)[0]),
        '"","node","term","item"\n"1","ann","a","b"\n"2","X","c","d"\n',
    ),
    "terms": (
        lambda path: list(read_clicks(path)[1]),
        '"","node","term","item"\n"1","ann","a","b"\n"2","bob","X","d"\n',
    ),
    "items": (lambda path: [item.id for item in read_items(path)], '"","id","title"\n"1","ann","a"\n"2","X","b"\n'),
}


@pytest.mark.parametrize("what", OF_R)
def test_a_cell_that_is_missing_is_none_that_is_called_so(tmp_path, what):
    """A bare NA was a new node of that name."""
    read, text = OF_R[what]
    path = tmp_path / "t.csv"
    path.write_text(text.replace('"X"', '"NA"'))
    assert "NA" in list(read(str(path)))
    path.write_text(text.replace('"X"', "NA"))
    with pytest.raises(DataError, match=r"row 1|line [23]|row 0|click 1"):
        read(str(path))
    # Where no words are in quotes, it is one as any.
    path.write_text(text.replace('"X"', "NA").replace('"', "").replace("\n1,", "\n0,").replace("\n2,", "\n1,"))
    assert "NA" in list(read(str(path)))


def test_a_title_that_is_missing_is_none(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text('"id","title","tags"\n"a",NA,NA\n"b","NA","x;y"\n')
    assert [(item.title, item.tags) for item in read_items(str(path))] == [("", ()), ("NA", ("x", "y"))]


def test_a_kind_that_is_missing_is_told(tmp_path):
    path = tmp_path / "e.csv"
    path.write_text('"source","target","kind"\n"ann","bob","a"\n"bob","cy",NA\n')
    with pytest.raises(DataError, match="row 1"):
        open_typed(str(path), "kind", None, "edges", directed=True, columns=None, quiet=True)


@pytest.mark.parametrize("kind", ["int64", "str"])
def test_an_index_with_a_name_calls_the_rows_of_parquet(tmp_path, kind):
    """pandas writes it last: it was taken for a label, or for a component of a vector."""
    path = str(tmp_path / "t.parquet")
    # Of even steps, which are a note in the file and no column.
    users = pd.Series([5, 6]).astype(kind)
    pd.DataFrame({"community": ["a", "b"], "user": users}).set_index("user").to_parquet(path)
    assert read_columns(path, LABELS, GRAPHS["numbered"]) == {"node": ["5", "6"], "label": ["a", "b"]}
    for numbers in ([7, 9], [9, 2]):
        users = pd.Series(numbers).astype(kind)
        pd.DataFrame({"a": [0.5, 1], "b": [2.0, 3], "user": users}).set_index("user").to_parquet(path)
        found = read_vectors(path)
        assert (found.array.tolist(), list(found.names)) == ([[0.5, 2], [1, 3]], users.tolist())


def test_rows_that_were_chosen_from_1_on_keep_their_numbers(tmp_path):
    """They were called by one less. R counts from 1, in quotes."""
    frame = pd.DataFrame({"a": [0.5, 1], "b": [2.0, 3]}, index=[1, 2])
    frame.to_csv(tmp_path / "v.csv")
    assert read_vectors(tmp_path / "v.csv").names.tolist() == [1, 2]
    frame.to_parquet(tmp_path / "v.parquet")
    assert read_vectors(tmp_path / "v.parquet").ids.tolist() == [1, 2]
    (tmp_path / "v.csv").write_text('"","a","b"\n"1",0.5,2\n"2",1,3\n')
    assert read_vectors(tmp_path / "v.csv").ids is None


def test_arrays_beside_vectors_are_not_passed_over(tmp_path):
    np.savez(tmp_path / "v.npz", vectors=np.ones((2, 3)), ids=np.array([7, 9]))
    with pytest.raises(DataError, match=r"v\.npz holds ids beside the vectors; call names of the rows 'names'"):
        read_vectors(tmp_path / "v.npz")
