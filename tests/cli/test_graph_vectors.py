"""``anabranch graph index`` and ``search`` with packed bits, by radius and over codes: from files to files, and what mistakes give."""

import json

import numpy as np
import pytest


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
        ("index big.npy --metric hamming --out z.anb", "big.npy, row 1: a number is no byte"),
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
        ("--rows 0 --exact", "--exact is for --radius"),
        ("--radius 1 --curve c.svg", "--curve is of the K nearest"),
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
    found = facts("index", "v.npy", "--out", "i.anb", "--quantization", quantization, "--threads", "1")
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
