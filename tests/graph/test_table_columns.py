"""What columns and cells of tables are taken for."""

import gzip
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from anabranch.errors import DataError, InputError
from anabranch.graph.table_columns import (
    are_alike,
    are_fractions,
    called,
    check_no_matrix,
    chosen_ends,
    column_of,
    has_quoted_words,
    index_first,
    is_index,
    is_matrix,
    is_of_r,
    known_ends,
    named_index,
    names_ends,
    plain_name,
    range_index,
    with_index,
)


@pytest.mark.parametrize(
    ("first", "is_so"),
    [
        ([("", True), ("from", True), ("to", True)], True),
        ([("ann", True), ("2.5", False), ("1e+05", False)], True),
        ([("from", True), ("to", False)], False),
        ([("", True), ("1", False)], False),
        ([("1", False), ("2", False)], False),
        ([], False),
    ],
)
def test_words_are_in_quotes_where_all_are_and_there_are_some(first, is_so):
    assert has_quoted_words(first) == is_so


@pytest.mark.parametrize(
    ("text", "delimiter", "is_so"),
    [
        ('"","from","to"\r\n"1",5,6\r\n', ",", True),
        ('\ufeff"from","to"\n', ",", True),
        ('"a,b","c ""d"" e"\n', ",", True),
        ('"from"\t"to"\n', "\t", True),
        ('"ann","bob",2\n', ",", True),
        ('from,"to"\n', ",", False),
        (",from,to\n", ",", False),
        ("1,2\n", ",", False),
        ("\n", ",", False),
        ("", ",", False),
    ],
)
def test_words_of_r_are_in_quotes(tmp_path, text, delimiter, is_so):
    (tmp_path / "t.csv").write_bytes(text.encode())
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert is_of_r(tmp_path / "t.csv", delimiter) == is_so
    assert is_of_r(tmp_path / "t.csv.gz", delimiter) == is_so


@pytest.mark.parametrize(
    ("name", "is_so"),
    [
        ("", True),
        ("  ", True),
        ("Unnamed: 0", True),
        ("Unnamed: 0.1", True),
        ("__index_level_0__", True),
        ("unnamed", False),
    ],
)
def test_an_index_is_called_as_data_frames_call_it(name, is_so):
    assert is_index(name) == is_so


def test_a_column_is_found_by_the_first_word_that_is_there():
    assert called(["To", " from "], ("source", "from", "to")) == 1
    assert called(["x"], ("source",)) is None
    assert names_ends(["weight", "to", "from"])
    assert not names_ends(["weight", "from"])


@pytest.mark.parametrize(
    ("names", "ends"),
    [
        (["weight", "to", "from"], (2, 1)),
        (["id", "source", "destination"], (1, 2)),
        (["source", "target", "from", "to"], (0, 1)),
        # A word that means other things too counts where nothing else may be an end.
        (["u", "v", "weight"], (0, 1)),
        (["i", "j", "v"], (None, None)),
        # One is known, and there is one other.
        (["friend", "source"], (1, 0)),
        # Neo4j's, and names of columns in other programs.
        ([":START_ID", "since", ":END_ID", ":TYPE"], (0, 2)),
        ([":START_ID(User)", "weight:float", ":END_ID(User)"], (0, 2)),
        (["fromId", "type", "toId"], (0, 2)),
        (["id", "source_id", "target_id"], (1, 2)),
        (["id", "dst_id", "src_id"], (2, 1)),
        (["Source Node", "Target Node"], (0, 1)),
        # The plain one of two alike.
        (["sender", "sender_id", "receiver", "receiver_id"], (0, 2)),
        (["id", "friend"], (None, None)),
        (["user_id", "item_id", "rating"], (None, None)),
    ],
)
def test_ends_are_known_by_what_they_are_called(names, ends):
    assert known_ends("e.csv", names) == ends


@pytest.mark.parametrize(
    "names",
    [
        ["from", "to", "src", "dst"],
        ["source", "a", "b"],
        ["a", "b", "start", "end"],
        ["edge_id", "a", "b"],
        ["id", "user", "item"],
    ],
)
def test_ends_that_nobody_can_tell_are_asked_for(names):
    with pytest.raises(DataError, match=r"e\.csv: which of its columns .* are source and target"):
        known_ends("e.csv", names)


def test_who_says_one_end_is_given_another_for_the_other():
    assert chosen_ends("e.csv", "target", None, ["source", "target"], 2) == (1, 0)
    assert chosen_ends("e.csv", 2, None, None, 3) == (2, 0)
    # A word that means other things too counts beside its own pair alone.
    assert chosen_ends("e.csv", "user", None, ["user", "item", "end"], 3) == (0, 1)
    assert chosen_ends("e.csv", None, "item", ["user", "item", "start"], 3) == (0, 1)
    assert chosen_ends("e.csv", "u", None, ["u", "w", "v"], 3) == (0, 2)
    assert chosen_ends("e.csv", None, "item", ["day", "item", "src"], 3) == (2, 1)


def test_an_index_of_a_data_frame_may_be_an_end():
    # Of a matrix that was stacked, and of a series.
    assert chosen_ends("e.csv", None, None, ["", "", "0"], 3) == (0, 1)
    assert chosen_ends("e.csv", None, None, ["", "", "weight"], 3) == (0, 1)
    assert chosen_ends("e.csv", None, None, ["", "friend"], 2) == (0, 1)
    # One with a name may call the edges.
    assert chosen_ends("e.parquet", None, None, ["user", "item", "weight"], 3, ["user"]) == (0, 1)
    with pytest.raises(DataError, match=r"e\.parquet: which of its columns"):
        chosen_ends("e.parquet", None, None, ["event", "user", "item"], 3, ["event"])


def test_a_node_is_called_as_the_one_below():
    assert are_alike(["node1", "node2"], ["node7", "x"])
    assert not are_alike(["node1", "node2"], ["5", "6"])
    assert not are_alike(["source", "target"], ["source", "ann"])


def test_columns_of_one_name_are_no_matrix():
    table = pa.table([[1, 2], [3, 4]], names=["", ""])
    check_no_matrix("m.parquet", table.schema, table.num_rows, table.column)
    with pytest.raises(InputError, match=r"source and target are both column a of e\.csv"):
        chosen_ends("e.csv", "a", "a", ["a", "b"], 2)


def test_a_column_that_there_is_not_is_told_with_a_near_name():
    with pytest.raises(InputError, match=r"'sorce'.*source"):
        column_of("e.csv", "sorce", ["source", "target"], 2, None)
    with pytest.raises(InputError, match="columns are 0 to 1"):
        column_of("e.csv", 2, None, 2, None)
    with pytest.raises(InputError, match="no header"):
        column_of("e.csv", "a", None, 2, None)


def test_a_matrix_calls_its_rows_as_its_columns():
    assert is_matrix(["", "ann", "bob"], ["ann", "0", "1"])
    assert not is_matrix(["", "from", "to"], ["0", "ann", "bob"])
    # Edges of a data frame whose columns have no names.
    assert not is_matrix(["", "0", "1"], ["0", "5", "6"])


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        (" Weight:float ", "weight"),
        ("tags:string[]", "tags"),
        (":END_ID(User)", "end_id"),
        ("person:START_ID", "start_id"),
        ("Source Node", "source node"),
        # None of its types.
        ("u:1", "u:1"),
        ("from(a)", "from(a)"),
        (":", ":"),
    ],
)
def test_a_column_is_called_without_its_type(name, plain):
    assert plain_name(name) == plain


def test_a_named_index_of_a_data_frame_is_the_first_column(tmp_path):
    frame = pd.DataFrame({"item": [2, 1, 4], "user": [5, 9, 6]})
    assert index_first(pa.Table.from_pandas(frame.set_index("user")).schema) == ["user", "item"]
    # One without a name is an index by what it is called.
    schema = pa.Table.from_pandas(frame.set_index(pd.Index([7, 9, 8]))).schema
    assert (named_index(schema), schema.names[-1]) == ([], "__index_level_0__")
    # Notes of others, or damaged ones.
    for note in (b"{", b"[]", b'{"index_columns": 3}', b'{"index_columns": [{"kind": "range"}, "gone"]}', b"\xff"):
        assert named_index(pa.schema([("a", pa.int64())], metadata={b"pandas": note})) == []


def test_an_index_of_even_steps_is_a_column_again():
    frame = pd.DataFrame({"a": [0.5, 1.5]})
    for index, name, values in (
        (pd.RangeIndex(5, 9, 2, name="user"), "user", [5, 7]),
        (pd.RangeIndex(5, 7), "__index_level_0__", [5, 6]),
    ):
        table = with_index(pa.Table.from_pandas(frame.set_index(index)))
        assert table.column_names == [name, "a"]
        assert table.column(name).to_pylist() == values
    # Rows that are counted have none, nor has a table that somebody cut since.
    assert with_index(pa.Table.from_pandas(frame)).column_names == ["a"]
    assert with_index(pa.Table.from_pandas(frame.rename_axis("event"))).column_names == ["a"]
    cut = pa.Table.from_pandas(frame.set_index(pd.RangeIndex(5, 9, 2))).slice(1)
    assert with_index(cut).column_names == ["a"]


@pytest.mark.parametrize(
    ("start", "stop", "is_one"),
    [(0, 2**62, True), (-(2**62), 0, True), (0, 2**62 + 1, False), (-(2**62) - 1, 0, False), (0, 10**30, False)],
)
def test_an_index_beyond_what_its_numbers_hold_is_none(start, stop, is_one):
    note = {"index_columns": [{"kind": "range", "name": None, "start": start, "stop": stop, "step": 2**61}]}
    schema = pa.schema([("a", pa.int64())], metadata={b"pandas": json.dumps(note).encode()})
    assert (range_index(schema) is not None) == is_one


def test_a_matrix_in_a_table_is_told_from_edges():
    def check(frame):
        table = pa.Table.from_pandas(frame)
        check_no_matrix("m.parquet", table.schema, table.num_rows, table.column)

    names = ["ann", "bob", "cy"]
    for matrix in (
        pd.DataFrame(np.eye(3), index=names, columns=names),
        pd.DataFrame(np.eye(3), index=pd.Index(names, name="who"), columns=names),
        pd.DataFrame(np.eye(4), columns=[str(number) for number in range(4)]),
    ):
        with pytest.raises(DataError, match=r"m\.parquet is a matrix"):
            check(matrix)
    check(pd.DataFrame({"0": [5, 6, 7], "1": [1, 2, 3], "2": [1, 1, 1]}))
    check(pd.DataFrame({"a": [5, 6], "b": [1, 2]}, index=[3, 4]))


def test_whole_numbers_that_are_written_as_fractions():
    assert are_fractions(["5.0", "-6.00"])
    assert not are_fractions(["5.0", "6"])
    assert not are_fractions([5.0])


@pytest.mark.parametrize("names", [["node", "weight"], ["weight", "w"], ["source", "weight"], ["", "weight", "head"]])
def test_weights_are_no_ends(names):
    """node,weight was an edge to a node of that number."""
    with pytest.raises(DataError, match="which of its columns"):
        chosen_ends("e.csv", None, None, names, len(names))
