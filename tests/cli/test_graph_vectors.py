"""``anabranch graph index`` and ``search`` with packed bits: from files to files, and what mistakes give."""

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
    differ = np.bitwise_count(held ^ query).sum(1)
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
