"""``anabranch graph index`` and ``search`` with packed bits, by radius and over codes: from files to files, and what mistakes give."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from anabranch.cli.graph.inputs import element_ids
from anabranch.cli.graph.vectors import Vectors, read_vectors, write_vectors
from anabranch.errors import DataError, InputError
from anabranch.graph import HNSW
from anabranch.graph.names import Names, read_names, write_names


@pytest.fixture
def facts(here, tmp_path, monkeypatch):
    """A command in a folder of its own, with ``--json``: its one object."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        code, out, err = here("graph", *arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return command


def rows(count, dim, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, dim // 8), np.uint8)


def nearest(held, query, k):
    differ = np.unpackbits(held ^ query, axis=1).sum(1)
    return np.lexsort((np.arange(len(held)), differ))[:k].tolist()


def test_packed_bits(facts):
    held = rows(200, 64)
    np.save("v.npy", held)
    np.save("b.npy", np.unpackbits(held, axis=1).astype(bool))
    found = facts("index", "v.npy", "--metric", "hamming", "--out", "i.anb")
    assert (found["dim"], found["metric"], found["dtype"]) == (64, "hamming", "b1")
    ids = facts("search", "i.anb", "--rows", "7", "-k", "3", "--ef", "200")["results"][0]["ids"]
    assert ids == [id for id in nearest(held, held[7], 4) if id != 7]
    assert facts("search", "i.anb", "--check", "--ef", "200", "--sample", "20")["recall"] == 1.0
    assert facts("search", "i.anb", "--queries", "b.npy", "-k", "1")["results"][9]["distances"] == [0.0]
    assert facts("index", "b.npy", "--metric", "hamming", "--out", "i.anb")["dim"] == 64
    assert facts("update", "i.anb", "v.npy", "--rows", "100-299")["vectors"] == 300
    assert facts("info", "i.anb")["metric"] == "hamming"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("index f.npy --metric hamming --out z.anb", "f.npy holds float32"),
        ("index big.npy --metric hamming --out z.anb", "big.npy, row 1: a number is not a byte"),
        ("index odd.npy --metric hamming --out z.anb", "odd.npy has 9 truth values in a row"),
        ("index v.npy --metric hamming --dtype i8 --out z.anb", "metric is 'hamming' and dtype 'i8'"),
        ("index none.npy --metric hamming --out z.anb", "none.npy holds no vectors"),
    ],
)
def test_what_are_no_bits_is_refused(here, tmp_path, monkeypatch, line, says):
    monkeypatch.chdir(tmp_path)
    np.save("v.npy", rows(20, 64))
    np.save("f.npy", np.zeros((3, 8), np.float32))
    np.save("big.npy", np.array([[1, 2], [3, 256]]))
    np.save("odd.npy", np.zeros((3, 9), bool))
    np.save("none.npy", np.zeros((0, 8), np.uint8))
    code, _, err = here("graph", *line.split())
    assert code == 2
    assert says in err
    assert not (tmp_path / "z.anb").exists()


def test_all_within_a_radius(facts, here, tmp_path):
    held = np.random.default_rng(0).integers(-3, 4, (300, 3)).astype(np.float32)
    np.save("v.npy", held)
    facts("index", "v.npy", "--out", "i.anb")
    far = ((held[:, None] - held[None]) ** 2).sum(2)
    found = facts("search", "i.anb", "--rows", "7,9", "--radius", "2", "--exact", "--out", "near.csv")
    for row, result in zip((7, 9), found["results"], strict=True):
        wanted = [id for id in np.lexsort((np.arange(300), far[row])).tolist() if far[row, id] <= 2 and id != row]
        assert result["ids"] == wanted
        assert result["distances"] == far[row, wanted].tolist()
    assert (found["k"], found["radius"]) == (None, 2.0)
    assert len((tmp_path / "near.csv").read_text().splitlines()) == 1 + sum(len(one["ids"]) for one in found["results"])
    checked = facts("search", "i.anb", "--radius", "3", "--check", "--sample", "30")
    assert checked["recall"] == 1.0
    assert facts("search", "i.anb", "--queries", "v.npy", "--radius", "-1", "--check")["recall"] == 1.0
    code, out, _ = here("graph", "search", "i.anb", "--rows", "7", "--radius", "2", "--only", "0-99")
    assert code == 0
    assert "radius 2, ef 64" in out
    assert f"within  {int((far[7, :100] <= 2).sum()) - 1:,} in all" in out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--rows 0 --exact", "--exact is only for --radius"),
        ("--radius 1 --curve c.svg", "--curve is only for the K nearest"),
        ("--rows 0 --radius nan", "radius is nan"),
    ],
)
def test_a_radius_that_is_none_is_refused(facts, here, line, says):
    np.save("v.npy", np.eye(4))
    facts("index", "v.npy", "--out", "i.anb")
    code, _, err = here("graph", "search", "i.anb", *line.split())
    assert code == 2
    assert says in err


@pytest.mark.parametrize(("quantization", "each"), [("pq", 8), ("int4", 40)])
def test_codes(facts, here, quantization, each):
    np.save("v.npy", np.random.default_rng(0).normal(size=(1200, 32)).astype(np.float32))
    found = facts("index", "v.npy", "--out", "i.anb", "--quantization", quantization, "--workers", "1")
    assert (found["quantization"], found["code_bytes"]) == (quantization, each)
    assert facts("search", "i.anb", "--check", "--ef", "300", "--sample", "50")["recall"] > 0.95
    assert facts("info", "i.anb")["code_bytes"] == each
    code, out, _ = here("graph", "index", "v.npy", "--out", "i.anb", "--quantization", quantization)
    assert code == 0
    assert f"codes   {quantization}, {each} bytes each beside 128" in out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--quantization pq9", "quantization is 'pq9'"),
        ("--code-bytes 4", "--code-bytes is for --disk and --quantization pq"),
        ("--quantization pq --code-bytes 9", "code_bytes is 9; it must be an integer from 1 to the dimension, 4"),
        ("--quantization int4 --dtype f16", "dtype is 'f16'"),
    ],
)
def test_codes_that_are_none_are_refused(here, tmp_path, monkeypatch, line, says):
    monkeypatch.chdir(tmp_path)
    np.save("v.npy", np.eye(4))
    code, _, err = here("graph", "index", "v.npy", "--out", "z.anb", *line.split())
    assert code == 2
    assert says in err
    assert not (tmp_path / "z.anb").exists()


def test_an_index_on_disk_has_other_ways(facts, here):
    np.save("v.npy", np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32))
    facts("index", "v.npy", "--out", "d.anb", "--disk")
    for line, says in (
        ("search d.anb --rows 0 --radius 2", "--radius is for an index in memory"),
        ("index v.npy --out z.anb --disk --quantization int4", "--quantization is int4; with --disk"),
        ("index v.npy --out z.anb --walks 3 --quantization int4", "--quantization is for vectors"),
    ):
        code, _, err = here("graph", *line.split())
        assert code == 2
        assert says in err


@pytest.fixture
def named(here, tmp_path, monkeypatch):
    """An index whose elements have names, and vectors of which one is new."""
    monkeypatch.chdir(tmp_path)
    index = HNSW(8, workers=1)
    index.add(np.eye(8, dtype=np.float32))
    index.save("n.anb")
    write_names("n.anb", Names([f"e{number}" for number in range(8)]))
    np.savez("more.npz", vectors=np.ones((1, 8), np.float32), names=np.array(["new"]))
    return index


def test_an_update_that_is_killed_leaves_an_index_with_its_names(named, facts, monkeypatch):
    real, before = Path.replace, Path("n.anb").read_bytes()

    def killed(self, target):
        if Path(target).name == "n.anb":
            raise KeyboardInterrupt
        return real(self, target)

    # Between the names and the index, which are two files.
    monkeypatch.setattr(Path, "replace", killed)
    with suppress(KeyboardInterrupt, SystemExit, AssertionError):
        facts("update", "n.anb", "more.npz")
    assert Path("n.anb").read_bytes() == before
    assert facts("search", "n.anb", "e1", "-k", "2")["results"]
    monkeypatch.setattr(Path, "replace", real)
    assert facts("update", "n.anb", "more.npz")["vectors"] == 9
    assert read_names("n.anb").array.tolist()[7:] == ["e7", "new"]
    # The names of the old index fit it still; those of another do not.
    Path("n.anb").write_bytes(before)
    assert len(read_names("n.anb")) == 9
    named.remove([0])
    named.save("n.anb")
    with pytest.raises(DataError, match="belongs to another index"):
        read_names("n.anb")


@pytest.mark.parametrize(
    "line",
    [
        "remove n.anb e1 --out y.anb",
        "update n.anb more.npz --out y.anb",
        "remove x.anb --rows 0 --out y.anb",
        "index v.npy --out y.anb",
        "remove y.anb --rows 0",
    ],
)
def test_a_list_of_the_user_is_no_file_of_names(here, named, line):
    named.save("x.anb")
    named.save("y.anb")
    np.save("v.npy", np.eye(8, dtype=np.float32))
    before = Path("y.anb").read_bytes()
    Path("y.anb.names").write_text("my own list")
    code, _, said = here("graph", *line.split())
    assert code == 2
    assert "y.anb.names" in said
    assert "Traceback" not in said
    assert Path("y.anb.names").read_text() == "my own list"
    assert Path("y.anb").read_bytes() == before


@pytest.mark.parametrize("text", ["--5", "\u00b2", "9" * 23, "9" * 5000, str(2**63), "-" + "9" * 20])
def test_what_is_no_id_is_no_element(text):
    for called in (None, Names([10, 20])):
        with pytest.raises(InputError, match=r"there is no "):
            element_ids(called, [text])
    assert element_ids(None, ["7", "-1"]).tolist() == [7, -1]
    assert element_ids(Names(np.array([2**64 - 1], np.uint64)), [str(2**64 - 1)]).tolist() == [0]


def test_names_of_a_link_are_those_of_its_file(named):
    Path("alias.anb").symlink_to("n.anb")
    assert read_names("alias.anb").array.tolist()[0] == "e0"


@pytest.mark.parametrize("ids", [[0, 1, 2], [1, 2, 3], [2, 1, 0], [0], [8, 0]])
@pytest.mark.parametrize("ending", ["parquet", "csv", "anb"])
def test_vectors_whose_table_says_their_ids_are_moved(facts, ids, ending):
    """Ids 0 ... k - 1 were taken for no ids: the vectors came in anew."""
    index = HNSW(4, workers=1)
    index.add(np.eye(8, 4, dtype=np.float32))
    index.save("i.anb")
    table = pa.table({"id": ids, **{f"x{column}": [9.0 + one for one in ids] for column in range(4)}})
    pq.write_table(table, "v.parquet")
    pa.csv.write_csv(table, "v.csv")
    own = HNSW(4, workers=1)
    own.add(np.array([[9.0 + one] * 4 for one in ids], np.float32), ids)
    own.save("v.anb")
    told = facts("update", "i.anb", f"v.{ending}", "--out", "new.anb")
    new = sum(one >= 8 for one in ids)
    assert (told["new"], told["moved"], told["vectors"]) == (new, len(ids) - new, 8 + new)
    np.testing.assert_array_equal(HNSW.load("new.anb").vectors(ids), [[9.0 + one] * 4 for one in ids])
    # A file that says none: they come in behind what there is.
    np.save("v.npy", np.ones((2, 4), np.float32))
    assert facts("update", "i.anb", "v.npy", "--out", "more.anb")["new"] == 2


@pytest.mark.parametrize("name", ["v.csv", "v.tsv", "v.parquet", "v.npz"])
def test_names_come_back_as_they_were(tmp_path, name):
    """007 came back as 7, true as True, and a time with seconds."""
    names = ["007", "1e5", "true", "12:30", "2020-01-01 10:00", "1.0"]
    vectors = Vectors(np.eye(6, 2, dtype=np.float32), np.array(names, object))
    write_vectors(tmp_path / name, vectors)
    found = read_vectors(tmp_path / name)
    assert found.names.tolist() == names
    np.testing.assert_array_equal(found.array, vectors.array)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_text_of_parquet_calls_the_rows_however_it_is_kept(tmp_path, kind):
    pq.write_table(pa.table({"word": pa.array(["1", "x"]).cast(kind), "a": [0.5, 0.25]}), tmp_path / "v.parquet")
    found = read_vectors(tmp_path / "v.parquet")
    assert (found.names.tolist(), found.array.tolist()) == (["1", "x"], [[0.5], [0.25]])


def test_a_data_frames_index_is_no_number_of_a_vector(tmp_path):
    pq.write_table(pa.table({"a": [0.5, 0.25], "__index_level_0__": [7, 8]}), tmp_path / "v.parquet")
    (tmp_path / "v.csv").write_text("Unnamed: 0.1,Unnamed: 0,a\n0,7,.5\n1,8,.25\n")
    for name in ("v.parquet", "v.csv"):
        found = read_vectors(tmp_path / name)
        assert (found.names.tolist(), found.array.tolist()) == ([7, 8], [[0.5], [0.25]])


def test_names_of_vectors_are_one_column_without_blanks(tmp_path):
    path = tmp_path / "v.csv"
    path.write_text("x0, node\n.5, ann\n.25, bob\n")
    found = read_vectors(path)
    assert (found.names.tolist(), found.array.tolist()) == (["ann", "bob"], [[0.5], [0.25]])
    path.write_text("node,x0\n1.0,.5\n2.0,.25\n")
    # The numbers 1 and 2, or these words.
    with pytest.raises(DataError, match=r"'node' has whole numbers that are written as '1\.0' is"):
        read_vectors(path)
    path.write_text("node,x0\n1.0,.5\n2.1,.25\n")
    assert read_vectors(path).names.tolist() == ["1.0", "2.1"]
    for name in ("v.csv", "v.parquet"):
        if name == "v.csv":
            path.write_text("id,name,x0\n17,ann,.5\n")
        else:
            pq.write_table(pa.table({"id": [17], "name": ["ann"], "x0": [0.5]}), tmp_path / name)
        with pytest.raises(DataError, match="which of 'id', 'name' calls the rows"):
            read_vectors(tmp_path / name)


@pytest.mark.parametrize("text", [",x0\n0,.5\n1,.25\n", '"","x0"\n"1",.5\n"2",.25\n'])
def test_an_index_that_counts_rows_calls_none_of_them(tmp_path, text):
    """`update` moved the vectors 0 and 1."""
    (tmp_path / "v.csv").write_text(text)
    found = read_vectors(tmp_path / "v.csv")
    assert (found.names, found.is_named, found.array.tolist()) == (None, False, [[0.5], [0.25]])
