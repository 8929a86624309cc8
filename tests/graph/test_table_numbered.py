"""First lines of numbers: those of ordinary lists of edges are rows, and those that data frames write are asked for."""

import csv
import logging

import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from anabranch.cli.graph.node_tables import read_edges
from anabranch.errors import DataError
from anabranch.graph import Graph, read_graph
from anabranch.graph.table_numbered import are_counted, are_numbered, are_positions, are_quoted

ASKED = r"line 1: a row, or names of columns\? .* header=False says that it is a row"


def _edges(path, **options):
    graph = read_graph(path, directed=True, duplicates="first", **options)
    source, target, weight = graph.edges()
    ends = [graph.names_of(end).tolist() for end in (source, target)]
    return sorted(zip(*ends, *([] if weight is None else [weight.tolist()]), strict=True))


def _written(path, rows, mark):
    path.write_text("".join(mark.join(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("first", ["0 1", "0 1 1", "0 1 1.0", "0 1 2", "0 1 2.0", "1 2", "1 2 3", "0 2 1"])
@pytest.mark.parametrize("mark", [" ", "\t", ",", ";", "|"])
def test_first_rows_of_lists_from_0_are_rows(tmp_path, first, mark):
    """0 1 2 was taken for the numbers of columns, where the next row had a fraction."""
    cells = first.split()
    rows = [cells, ["0", "3", "0.5"][: len(cells)], ["3", "1", "1.5"][: len(cells)]]
    meant = sorted((int(row[0]), int(row[1]), *map(float, row[2:])) for row in rows)
    assert _edges(_written(tmp_path / "t.txt", rows, mark), ids="names") == meant


WAYS = {"whole": str, "decimals": "{:.3f}".format, "Python": lambda value: repr(float(value)), "C": "{:g}".format}


@given(
    ends=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=12, unique=True),
    numerators=st.lists(st.integers(1, 24), min_size=12, max_size=12),
    way=st.sampled_from([None, *WAYS]),
    mark=st.sampled_from([" ", "\t", ",", ";", "|", "  ", ", "]),
    begins_at_0=st.booleans(),
)
def test_an_ordinary_list_of_edges_is_read_as_written(tmp_path_factory, ends, numerators, way, mark, begins_at_0):
    if begins_at_0:
        # The row that looks most like numbers of columns.
        ends, numerators = [(0, 1), *(pair for pair in ends if pair != (0, 1))], [16, *numerators]
    values = [numerator if way == "whole" else numerator / 8 for numerator in numerators]
    cells = [[] if way is None else [WAYS[way](value)] for value in values]
    rows = [[*map(str, pair), *cell] for pair, cell in zip(ends, cells, strict=False)]
    if way == "C" and mark not in (" ", "  ") and rows[0] == ["0", "1", "2"] and len(rows) > 1:
        # Where no other weight is whole, only ends or their number tell.
        is_known = any(end in (0, 1) for pair in ends[1:] for end in pair)
        assume(any(cell[0].isdecimal() for cell in cells[1 : len(rows)]) or (is_known and len(rows) < 9))
    path = _written(tmp_path_factory.mktemp("list") / "t.txt", rows, mark)
    meant = [(*pair, *(float(text) for text in cell)) for pair, cell in zip(ends, cells, strict=False)]
    assert _edges(path, ids="names") == sorted(meant)


FRAMES = {
    "other ends": [(5, 7, 0.5), (7, 9, 1.5)],
    "ends from 0, a whole weight": [(0, 5, 0.5), (1, 7, 2.0)],
    "ends from 0, the same edge": [(0, 1, 0.5), (1, 2, 1.5)],
    "ends from 0, many": [(number, number + 1, 0.5) for number in range(1, 9)],
    "ends from 0, exponents": [(0, 5, 1e-7), (1, 7, 3.0)],
    "four columns": [(0, 5, 1, 9), (1, 7, 1, 9)],
    "five columns, from 0": [(0, 5, 1, 9, 0.5), (1, 7, 1, 9, 0.5)],
}


@pytest.mark.parametrize("what", FRAMES)
@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_frames_whose_columns_have_no_names_are_asked_for(tmp_path, what, mark):
    """Node 0 was tied to node 1, with the weight 2."""
    frame = pd.DataFrame(FRAMES[what])
    path = tmp_path / ("t.tsv" if mark == "\t" else "t.csv")
    frame.to_csv(path, index=False, sep=mark)
    with pytest.raises(DataError, match=ASKED):
        _edges(path)
    meant = sorted((*row[:2], pytest.approx(row[2])) for row in FRAMES[what])
    assert _edges(path, header=True, weight=2, ids="names") == meant
    if mark != ";":
        with pytest.raises(DataError, match=r"one of edges, or are these names of columns"):
            read_edges(str(path), Graph.from_edges([0, 5], [1, 7]))


@pytest.mark.parametrize("mark", [" ", "\t", ",", ";", "|"])
@pytest.mark.parametrize(
    "rows", [[(0, 2, 0.5), (1, 3, 0.25)], [(5, 7, 3), (7, 9, 4)], [("ann", "bob", 0.5), ("bob", "cy", 2.0)]]
)
def test_numbers_in_quotes_above_bare_ones_are_names(tmp_path, mark, rows):
    """Who writes all text in quotes writes no number so: it was an edge of two nodes that do not exist."""
    path = tmp_path / ("t.csv" if mark == "," else "t.tsv")
    frame = pd.DataFrame(rows, columns=["0", "1", "2"])
    frame.to_csv(path, index=False, sep=mark, quoting=csv.QUOTE_NONNUMERIC)
    with pytest.raises(
        DataError, match=r"line 1: columns are called 0,1,2, which tells of no weight: call them source,target,weight"
    ):
        _edges(path)
    assert _edges(path, source=0, target=1, weight=2, ids="names") == sorted(rows)
    assert _edges(path, weight=None, ids="names") == sorted(row[:2] for row in rows)
    if mark in (",", "\t"):
        with pytest.raises(DataError, match=r"one of edges, or are these names of columns"):
            read_edges(str(path), Graph.from_edges([0, 5, 7], [1, 7, 9]))
    if isinstance(rows[0][0], str):
        return
    frame[["0", "1"]].to_csv(path, index=False, sep=mark, quoting=csv.QUOTE_NONNUMERIC)
    pairs = [row[:2] for row in rows]
    assert _edges(path, ids="names") == sorted(pairs)
    if mark in (",", "\t"):
        graph = Graph.from_edges([0, 5, 7], [1, 7, 9])
        assert read_edges(str(path), graph)[:2] == tuple(map(list, zip(*pairs, strict=True)))


@pytest.mark.parametrize(
    ("first", "second", "is_so"),
    [
        ('"0" "1"', "5 7", True),
        ('"0" "1" "2"', '"ann" "bob" 0.5', True),
        ('"" "0" "1"', '"0" 5 7', True),
        ('"0" "1"', '"5" "7"', False),
        ('"0" "1"', '"5" 7', False),
        ('"0" 1', "5 7", False),
        ("0 1", "5 7", False),
        ('"ann" "bob" "2"', '"bob" "cy" 3', False),
        ('"0" "1"', "", False),
        ('""', "5", False),
    ],
)
def test_numbers_in_quotes(first, second, is_so):
    cells = [[(cell.strip('"'), '"' in cell) for cell in line.split()] for line in (first, second)]
    assert are_quoted(*cells) == is_so


# Whether something speaks for names of columns, though the row is read as an edge.
TOLD = {
    "whole, from 0": ([(0, 2, 1), (1, 2, 3)], False),
    "mixed, from 0": ([(0, 2, 1), (1, 2, "0.5")], False),
    "whole, no 0 or 1": ([(5, 7, 3), (7, 9, 4)], True),
    "fractions, from 0": ([(0, 2, 0.5), (1, 3, 0.25)], True),
}


@pytest.mark.parametrize("what", TOLD)
@pytest.mark.parametrize("mark", [" ", "\t", ",", ";"])
def test_a_first_row_that_may_be_names_is_told_of(tmp_path, caplog, what, mark):
    """It cannot be seen in the graph that it was read wrongly."""
    rows, is_told = TOLD[what]
    cells = [["0", "1", "2"], *(list(map(str, row)) for row in rows)]
    path = _written(tmp_path / ("t.csv" if mark == "," else "t.tsv"), cells, mark)
    says = "its first line, 0,1,2, is read as an edge, and may be of the numbers of columns"
    with caplog.at_level(logging.WARNING, logger="anabranch.graph"):
        assert (0, 1, 2.0) in _edges(path, ids="names")
        assert [says in message for message in caplog.messages] == [True] * is_told
        assert all("header=True with weight=2 says" in message for message in caplog.messages)
        caplog.clear()
        if mark in (",", "\t"):
            assert read_edges(str(path), Graph.from_edges(range(10), range(1, 11)))[2][0] == 2.0
            assert [says in message for message in caplog.messages] == [True] * is_told
        caplog.clear()
        for said in ({"header": True}, {"header": False}, {"source": 0}):
            _edges(path, weight=None, **said)
        assert not caplog.messages


def test_a_first_row_among_fractions_at_blanks_is_told_of_where_it_has_four(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="anabranch.graph"):
        _edges(_written(tmp_path / "t.txt", [["0", "1", "2", "3"], ["0", "5", "0.5", "9"]], " "))
    assert ["may be of the numbers of columns" in message for message in caplog.messages] == [True, False]


def test_lists_whose_first_row_looks_like_numbers_of_columns_are_added(tmp_path):
    graph = Graph.from_edges([0, 1], [1, 2])
    rows = [["0", "1", "2"], ["0", "2", "0.5"]]
    for name, mark in (("t.csv", ","), ("t.tsv", "\t"), ("t.txt", "\t")):
        assert read_edges(str(_written(tmp_path / name, rows, mark)), graph) == ([0, 0], [1, 2], [2.0, 0.5])


@pytest.mark.parametrize(
    ("first", "rows", "at_blanks", "is_so"),
    [
        ("0 1", ["5 7"], False, False),
        ("0 1 2", [], False, False),
        ("0 1 2", ["5 7 0.5"], False, True),
        ("0 1 2", ["5 7 -.5e3"], False, True),
        ("0 1 2", ["5 7 1e-07"], False, True),
        ("0 1 2", ["5 7 0.5"], True, False),
        ("0 1 2", ["5 7 0.5", "7 9 3"], False, False),
        ("0 1 2", ["5 7 0.5", "7 9 x"], False, False),
        ("0 1 2", ["5 7 0.5", "7 1 0.5"], False, False),
        ("0 1 2", ["5 7 0.5", "0 7 0.5"], False, False),
        ("0 1 2", ["5 7 0.5", "0 7 2."], False, True),
        ("0 1 2", ["1 0 0.5"], False, False),
        ("0 1 2", ["0 1 0.5"], False, True),
        ("0 1 2", ["0 7 0.5"] * 7, False, False),
        ("0 1 2", ["0 7 0.5"] * 8, False, True),
        ("1 2 3", ["5 7 0.5"], False, False),
        ("0 1 3", ["5 7 0.5"], False, False),
        ("0 1 2 3", [], False, True),
        ("0 1 2 3", ["0 7 1 9"], False, True),
        ("0 1 2 3", ["5 7 1 9"], True, True),
        ("0 1 2 3", ["0 7 1 9"], True, False),
    ],
)
def test_numbers_of_columns(first, rows, at_blanks, is_so):
    cells = [row.split() for row in rows]
    assert are_positions(first.split(), cells, at_blanks=at_blanks) == is_so


def test_cells_are_counted_from_0():
    assert are_counted(["0", "1 ", " 2"])
    assert not any(map(are_counted, (["0", "1"], ["1", "2", "3"], ["0", "2", "1"], ["a", "b", "c"])))


def test_names_of_columns_are_numbered_from_0_or_1():
    assert are_numbered(["V1", "V2"], ["ann", "bob"])
    assert are_numbered(["", "_c0", "_c1"], ["0", "ann", "bob"])
    assert not are_numbered(["V2", "V3"], ["ann", "bob"])
    assert not are_numbered(["V1", "V2"], ["V2", "V3"])
