"""Columns that have no names, beside those that are read: told of, or refused where they may be meant."""

import logging

import pandas as pd
import pytest

from anabranch.cli.graph.inputs import open_graph, open_typed
from anabranch.cli.graph.node_tables import read_edges
from anabranch.errors import DataError
from anabranch.graph import Graph, read_graph
from anabranch.graph.formats import from_table
from anabranch.graph.table_numbered import nameless

GRAPH = Graph.from_edges([0], [1], num_nodes=10)


def _edges(graph):
    source, target, weight = graph.edges()
    ends = [graph.names_of(end).tolist() for end in (source, target)]
    return sorted(zip(*ends, *([] if weight is None else [weight.tolist()]), strict=True))


@pytest.mark.parametrize("mark", [" ", "\t", ",", ";"])
@pytest.mark.parametrize("count", [4, 5])
def test_columns_behind_the_weight_of_a_list_without_names_are_told_of(tmp_path, caplog, mark, count):
    """Times of SNAP and KONECT, behind weights: they were left out without a word."""
    rows = [["3", "5", "2", "1289", "x"], ["5", "7", "4", "1290", "y"]]
    path = tmp_path / "t.txt"
    path.write_text("".join(mark.join(row[:count]) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING, logger="anabranch.graph"):
        assert _edges(read_graph(path, directed=True)) == [(3, 5, 2.0), (5, 7, 4.0)]
    (said,) = caplog.messages
    assert said.startswith(
        f"{path} has {count} columns and no line of names: column 0 is the source, 1 the target and 2 the weight"
    )
    assert f"what is in {'3' if count == 4 else '3, 4'} is left out" in said
    assert "--columns 0,1,2" in said
    caplog.clear()
    # Who says what is the weight, or that none is, knows of the others.
    assert _edges(read_graph(path, directed=True, weight=3)) == [(3, 5, 1289.0), (5, 7, 1290.0)]
    assert _edges(read_graph(path, directed=True, weight=None)) == [(3, 5), (5, 7)]
    assert _edges(open_graph(str(path), directed=True, columns="0,1,2", quiet=True).graph)[0] == (3, 5, 2.0)
    path.write_text("3 5 2\n5 7 4\n")
    read_graph(path)
    path.write_text("3 5 2 {}\n5 7 x {}\n")
    with pytest.raises(DataError, match="line 2: the weight 'x' is not a number"):
        read_graph(path, source=0, target=1, weight=2)
    path.write_text("3 5 x 2\n5 7 x 4\n")
    with pytest.raises(DataError, match="line 1: the third field 'x' is not a number"):
        read_graph(path)
    path.write_text("source,target,weight,time\n3,5,2,1289\n5,7,4,1290\n")
    assert _edges(read_graph(path, directed=True)) == [(3, 5, 2.0), (5, 7, 4.0)]
    assert not caplog.messages


# Names of columns, and two rows: refused, with the number of the column.
FILLED = {
    "a weight": ("source,target,", ["3,5,0.5", "5,7,1.5"], 2),
    "between": ("source,,target", ["3,9,5", "5,9,7"], 1),
    "only in the second row": ("source,target, ", ["3,5,", "5,7,2e-3"], 2),
    "behind a remark": ("source,target,,", ["3,5,,9", "5,7,see Bob,9"], 3),
    "as pandas reads it": ("source,target,Unnamed: 2", ["3,5,0.5", "5,7,1.5"], 2),
    "not called as ends": ("a,b,", ["3,5,0.5", "5,7,1.5"], 2),
}


@pytest.mark.parametrize("what", FILLED)
def test_a_column_of_numbers_without_a_name_is_asked_for_where_no_weight_is_known(tmp_path, what):
    """A weight was left out without a word."""
    names, rows, place = FILLED[what]
    path = tmp_path / "t.csv"
    path.write_text("\n".join([names, *rows]) + "\n")
    says = rf"column {place} has no name, and .* in it: is it a weight\? Name it, leave it out"
    with pytest.raises(DataError, match=rf"t\.csv, line [23]: {says}, or say which they are"):
        read_graph(path)
    with pytest.raises(DataError, match=f"{says}, or say which they are by --columns SOURCE,TARGET"):
        open_graph(str(path), quiet=True)
    with pytest.raises(DataError, match=f"{says}$"):
        read_edges(str(path), GRAPH)
    source, target = (0, 2) if place == 1 else (0, 1)
    meant = [(3, 5), (5, 7)]
    assert _edges(open_graph(str(path), directed=True, columns=f"{source},{target}", quiet=True).graph) == meant
    frame = pd.read_csv(path)
    if len(set(names.split(","))) < len(frame.columns):
        return
    frame.columns = names.split(",")
    with pytest.raises(DataError, match=says):
        from_table(frame)
    assert _edges(from_table(frame, source=source, target=target, weight=None, directed=True)) == meant
    frame.to_parquet(tmp_path / "t.parquet", index=False)
    with pytest.raises(DataError, match=rf"t\.parquet: {says}"):
        read_graph(tmp_path / "t.parquet")
    path.write_text("\n".join([f"{names},kind", *(f"{row},k" for row in rows)]) + "\n")
    with pytest.raises(DataError, match=f"{says}$"):
        open_typed(str(path), "kind", None, "edges", directed=True, columns=None, quiet=True)


# Names of columns, and two rows: read, with a warning of the number of the column.
REMARKS = {
    "behind a weight": ("source,target,weight,", ["3,5,2,9", "5,7,4,9"], 3),
    "a remark": ("source,target,", ["3,5,", "5,7,see Bob"], 2),
    "a remark behind a weight": ("source,target,weight,,", ["3,5,2,,ok", "5,7,4,,"], 4),
    "a day": ("source,target,", ["3,5,2019-01-01", "5,7,2019-01-02"], 2),
    "a mark": ("source,target,", ["3,5,x", "5,7,"], 2),
    "between": ("source,,target", ["3,x,5", "5,y,7"], 1),
    "a truth value": ("source,target,", ["3,5,True", "5,7,False"], 2),
    "as pandas reads it": ("source,target,Unnamed: 2", ["3,5,see Bob", "5,7,"], 2),
}


@pytest.mark.parametrize("what", REMARKS)
def test_a_remark_in_a_column_without_a_name_is_told_of_once(tmp_path, caplog, what):
    """Spreadsheets leave such beside a table: the whole file was refused."""
    names, rows, place = REMARKS[what]
    path = tmp_path / "t.csv"
    path.write_text("\n".join([names, *rows]) + "\n")
    frame = pd.read_csv(path)
    if len(set(names.split(","))) == len(frame.columns):
        frame.columns = names.split(",")
    frame.to_parquet(tmp_path / "t.parquet", index=False)
    ways = {
        f"{path}, line ": lambda: _edges(read_graph(path, directed=True)),
        f"{path}, line": lambda: _edges(open_graph(str(path), directed=True, quiet=True).graph),
        f"{path}: ": lambda: list(zip(*read_edges(str(path), GRAPH)[:2], strict=True)),
        "the table: ": lambda: _edges(from_table(frame, directed=True)),
        f"{tmp_path / 't.parquet'}: ": lambda: _edges(read_graph(tmp_path / "t.parquet", directed=True)),
    }
    for where, read in ways.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="anabranch.graph"):
            assert [edge[:2] for edge in read()] == [(3, 5), (5, 7)]
        (said,) = caplog.messages
        assert said.startswith(where)
        assert f"column {place} has no name, and " in said
        assert said.endswith("it is left out")


def test_a_column_of_numbers_without_a_name_is_left_out_where_a_weight_is_said(tmp_path, caplog):
    path = tmp_path / "t.csv"
    path.write_text("source,target,cost,\n3,5,2,9\n5,7,4,9\n")
    with pytest.raises(DataError, match="is it a weight"):
        read_graph(path)
    frame = pd.read_csv(path)
    with pytest.raises(DataError, match="is it a weight"):
        from_table(frame, weight="auto")
    with caplog.at_level(logging.WARNING, logger="anabranch.graph"):
        for weight, meant in (("cost", [(3, 5, 2.0), (5, 7, 4.0)]), (None, [(3, 5), (5, 7)])):
            assert _edges(read_graph(path, directed=True, weight=weight)) == meant
            assert _edges(from_table(frame, directed=True, weight=weight)) == meant
    assert len(caplog.messages) == 4


def test_a_remark_far_behind_is_found(tmp_path, caplog):
    path = tmp_path / "t.csv"
    rows = [f"{number},{number + 1}," for number in range(5000)]
    path.write_text("\n".join(["source,target,", *rows, "7,9,see Bob"]) + "\n")
    with caplog.at_level(logging.WARNING, logger="anabranch.graph"):
        assert read_graph(path).num_edges == 5001
        assert len(read_edges(str(path), Graph.from_edges([0], [1], num_nodes=6000))[0]) == 5001
    assert ["'see Bob'" in message for message in caplog.messages] == [True, True]


# Of a delimiter at the end of each line, of an index in front, and of a matrix that was stacked.
EMPTY = {
    "nothing": ("source,target,", ["3,5,", "5,7,"]),
    "blanks and quotes": ("source,target,weight,", ["3,5,1, ", '5,7,1,""']),
    "as pandas reads it": ("source,target,Unnamed: 2", ["3,5,", "5,7,"]),
    "an index": (",source,target", ["9,3,5", "8,5,7"]),
    "an index that was read twice": ("Unnamed: 0.1,Unnamed: 0,source,target", ["9,9,3,5", "8,8,5,7"]),
    "an index of another place": ("source,target,Unnamed: 0", ["3,5,9", "5,7,8"]),
    "two parts of an index": (",,weight", ["3,5,1", "5,7,1"]),
}


@pytest.mark.parametrize("what", EMPTY)
def test_columns_without_names_that_mean_nothing_are_left_out(tmp_path, what):
    names, rows = EMPTY[what]
    path = tmp_path / "t.csv"
    path.write_text("\n".join([names, *rows]) + "\n")
    meant = [(3, 5), (5, 7)]
    assert [edge[:2] for edge in _edges(read_graph(path, directed=True))] == meant
    frame = pd.read_csv(path)
    if len(set(names.split(","))) == len(frame.columns):
        frame.columns = names.split(",")
        assert [edge[:2] for edge in _edges(from_table(frame, directed=True))] == meant
    if "index" not in what:
        assert read_edges(str(path), GRAPH)[:2] == ([3, 5], [5, 7])


def test_columns_have_no_name_behind_one_that_has():
    assert nameless(["", "a", "", " ", "b"]) == [2, 3]
    assert nameless(["a", "Unnamed: 1", "Unnamed: 1", "__index_level_0__"]) == [1]
    assert nameless(["", "Unnamed: 1"]) == nameless(["a", "b"]) == nameless([]) == []
