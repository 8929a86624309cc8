"""Tables and arrays that people have: damaged, of other tools, or with two columns of one name: one line says what is wrong."""

import io
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.cli.graph.files import read_arrow
from anabranch.cli.graph.vectors import read_vectors
from anabranch.errors import DataError


def npy(header):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        npy(b"{'descr':'<f4','fortran_order':False,'shape':(9223372036854775808,8)}\n"),
        npy(b"{'descr':'<f4','fortran_order':False,'shape':(-1,8)}\n") + bytes(64),
        npy(b"{'descr':(((((\n"),
        npy(b"{'descr':'<f4','fortran_order':False,'shape':(2\n"),
        npy(b"[" * 60_000),
    ],
)
def test_what_is_no_array_is_told(tmp_path, content):
    path = tmp_path / "v.npy"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"v\.npy is not a numpy array, or is damaged: \S"):
        read_vectors(path)


def _file(name):
    made = io.BytesIO()
    rows = np.arange(80, dtype=np.float32).reshape(10, 8)
    if name == "v.npy":
        np.save(made, rows)
    elif name == "v.npz":
        np.savez_compressed(made, vectors=rows)
    elif name == "v.csv":
        made.write(b"id,x,y\na,1,2\nb,3,4\n")
    else:
        pq.write_table(pa.table({"id": ["a", "b"], "x": [1.0, 2.0]}), made)
    return made.getvalue()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["v.npy", "v.npz", "v.csv", "v.parquet"]), st.data())
def test_a_damaged_file_is_read_or_told(tmp_path, name, data):
    content = bytearray(_file(name))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / name
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with suppress(DataError):
        read_vectors(path)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_two_columns_of_one_name_are_told(tmp_path, ending):
    path = tmp_path / f"t.{ending}"
    if ending == "csv":
        path.write_text("node,weight,weight\na,1,2\n")
    else:
        columns = [pa.array(["a"]), pa.array([1.0]), pa.array([2.0])]
        pq.write_table(pa.Table.from_arrays(columns, names=["node", "weight", "weight"]), path)
    with pytest.raises(DataError, match="weight"):
        read_arrow(path)
    with pytest.raises(DataError, match="weight"):
        read_vectors(path)


@pytest.mark.parametrize(
    ("text", "says"), [("id,x\ncaf\xe9,1\n", "'id' holds text"), ("caf\xe9,x\na,1\n", "names of columns")]
)
def test_text_in_another_encoding_is_told(tmp_path, text, says):
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(DataError, match=f"{says}.* not UTF-8"):
        read_arrow(path)


@pytest.mark.parametrize(
    "line",
    [
        ("index", "t.csv", "--out", "i.anb"),
        ("ppr", "karate", "--seeds", "t.csv"),
        ("embed", "karate", "--labels", "t.csv", "--out", "v.npy"),
    ],
)
def test_commands_that_read_tables_say_so_in_a_line(here, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("node,weight,weight\n0,1,2\n1,2,3\n")
    code, out, err = here("graph", *line)
    assert (code, out) == (2, "")
    assert err == "error: t.csv has several columns called 'weight'\n"


@pytest.mark.parametrize("memory", ["nan", "inf", "1e300", "0", "-1"])
def test_memory_that_is_no_amount_is_told(here, tmp_path, memory):
    code, _, err = here("graph", "ppr", "karate", "--all", "--memory", memory, "--out", tmp_path / "p.anb")
    assert code == 2
    assert err.startswith("error: --memory is ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "names", "count"),
    [
        ("x,y\n1,2\n3,4\n", ["x", "y"], 2),
        ("0.5,-1e3\n1,2\n3,4\n", ["f0", "f1"], 3),
        ("nan,1\n1,2\n", ["f0", "f1"], 2),
        # A name, and numbers.
        ("king,0.1,0.2\nqueen,0.3,0.4\n", ["f0", "f1", "f2"], 2),
        ("word,x,y\nqueen,0.3,0.4\n", ["word", "x", "y"], 1),
        # As data frames write columns without names, with an index and without.
        ("0,1,2,3\n0.5,1,2,3\n", ["0", "1", "2", "3"], 1),
        ("1,2,3,4\n0.5,2,3,4\n", ["1", "2", "3", "4"], 1),
        ("id,0,1\n7,0.5,2\n", ["id", "0", "1"], 1),
        # Edges and other whole numbers.
        ("3,1\n1,2\n", ["f0", "f1"], 2),
        ("5\n6\n", ["f0"], 2),
        ("x\n6\n", ["x"], 1),
        # One line, which does not end.
        ("0.5,0.25", ["f0", "f1"], 1),
        ("king,0.5", ["f0", "f1"], 1),
        ("x,y\n1,2", ["x", "y"], 1),
        ("2,2\n1,2\n", ["f0", "f1"], 2),
        # Columns that are called by numbers, behind one that says what it is.
        ("id,2019,2020\n7,.5,.1\n8,.25,.2\n", ["id", "2019", "2020"], 2),
        ("Name,3,7\na,.5,.1\n", ["Name", "3", "7"], 1),
        (",2019,2020\n0,.5,.1\n", ["", "2019", "2020"], 1),
        ("id,0,1\n7,1,0\n8,0,1\n", ["id", "0", "1"], 2),
        # Text above numbers is no name of a row.
        ("user_id,2019,2020\n7,.5,.1\n8,.25,.2\n", ["user_id", "2019", "2020"], 2),
        ("user_id,0,1\n7,.5,.1\n", ["user_id", "0", "1"], 1),
        ("Unnamed: 0,5,9\n7,.5,.1\n", ["Unnamed: 0", "5", "9"], 1),
    ],
)
def test_a_first_line_of_numbers_is_a_row(tmp_path, text, names, count):
    """It was taken for names of columns: the first vector or edge was lost without a word."""
    for ending, sign in ((".csv", ","), (".tsv", "\t")):
        path = tmp_path / f"v{ending}"
        path.write_text(text.replace(",", sign))
        table = read_arrow(path)
        assert (table.column_names, table.num_rows) == (names, count)


@pytest.mark.parametrize(
    "text",
    [
        "0,1\n1,2\n2,3\n",
        "king,0,1\nqueen,3,4\n",
        "1,2\n2,3\n",
        "0,1,2\n3,4,5\n",
        "0,1\n",
        "0,1\n.6,.8\n.8,.6\n",
        "0,1,2\n.5,1,2\n",
        # Words above words, and whole numbers.
        "country,2019,2020\nDE,.5,.1\n",
        "country,2019,2020\nDE,5,1\n",
        "king,1,0\nqueen,0,1\n",
    ],
)
def test_numbers_of_columns_above_whole_numbers_may_be_either(tmp_path, text):
    path = tmp_path / "v.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=r"v\.csv: is its first line, .*, a row, .*Begin it with a line of names"):
        read_arrow(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=1, max_size=6))
def test_what_numpy_writes_is_read_whole(tmp_path, rows):
    path = tmp_path / "v.csv"
    np.savetxt(path, np.array(rows, np.float32) + np.float32(0.1), delimiter=",", fmt="%.9e")
    np.testing.assert_array_equal(read_vectors(path).array, np.array(rows, np.float32) + np.float32(0.1))


def test_a_column_without_a_name_in_front_names_the_rows(tmp_path):
    """As data frames write their index: it was taken for a number of each vector."""
    path = tmp_path / "v.csv"
    for text in (
        ",a,b\n5,.5,.25\n9,1,0\n",
        ",a,b\n5.0,.5,.25\n9.0,1,0\n",
        "Unnamed: 0,a,b\n5,.5,.25\n9,1,0\n",
        # Beside names it says nothing.
        ",id,a,b\n0,5,.5,.25\n1,9,1,0\n",
    ):
        path.write_text(text)
        found = read_vectors(path)
        assert (found.array.tolist(), found.names.tolist()) == ([[0.5, 0.25], [1, 0]], [5, 9])
    path.write_text(",a,b\n5.5,.5,.25\n")
    assert read_vectors(path).names.tolist() == ["5.5"]
    pq.write_table(pa.table({"id": [5.5], "a": [0.5]}), tmp_path / "v.parquet")
    with pytest.raises(DataError, match="names rows, and has numbers that are not whole"):
        read_vectors(tmp_path / "v.parquet")
