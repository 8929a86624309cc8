"""First lines of numbers: those of ordinary lists of edges are rows, and those that data frames write are asked for."""

import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from anabranch.cli.graph.node_tables import read_edges
from anabranch.errors import DataError
from anabranch.graph import Graph, read_graph
from anabranch.graph.table_numbered import are_counted, are_numbered, are_positions

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
    if way == "C" and mark not in (" ", "\t", "  ") and rows[0] == ["0", "1", "2"] and len(rows) > 1:
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
@pytest.mark.parametrize("mark", [",", ";"])
def test_frames_whose_columns_have_no_names_are_asked_for(tmp_path, what, mark):
    """Node 0 was tied to node 1, with the weight 2."""
    frame = pd.DataFrame(FRAMES[what])
    path = tmp_path / "t.csv"
    frame.to_csv(path, index=False, sep=mark)
    with pytest.raises(DataError, match=ASKED):
        _edges(path)
    meant = sorted((*row[:2], pytest.approx(row[2])) for row in FRAMES[what])
    assert _edges(path, header=True, weight=2, ids="names") == meant
    if mark == ",":
        with pytest.raises(DataError, match=r"one of edges, or are these names of columns"):
            read_edges(str(path), Graph.from_edges([0, 5], [1, 7]))


def test_frames_of_four_columns_at_tabs_are_asked_for(tmp_path):
    pd.DataFrame([(5, 7, 1, 9), (7, 9, 1, 9)]).to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    with pytest.raises(DataError, match=ASKED):
        _edges(tmp_path / "t.tsv")


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
