"""Codes where a group comes later and far off, and is fewer than one in 8: learned anew before it is lost, or it is told."""

import warnings

import numpy as np
import pytest

from anabranch.graph.hnsw import HNSW
from anabranch.graph.hnsw.changing import Changes
from anabranch.graph.hnsw.strays import LEAST, Strays
from hnsw_checks import drawn, naive, recall

KINDS = ("int4", "pq")
FIRST, GROUP = drawn(2000, 16, 3), drawn(240, 16, 4) + np.float32(500)
ALL = np.concatenate([FIRST, GROUP])

# Of the group, by walks over codes; before, not half as many.
LEAST_FOUND = {"int4": 0.9, "pq": 0.8}


def made(kind, rows=FIRST):
    index = HNSW(16, M=10, ef_construction=60, quantization=kind, workers=1)
    index.add(rows)
    return index


def found(index, rows=ALL, asked=GROUP[:40]):
    wanted = naive(rows, asked, 10, "l2")[0]
    return recall(index.search(asked, 10, 20)[0], wanted)


@pytest.fixture
def blind(monkeypatch):
    """As earlier releases were."""

    def undo():
        monkeypatch.undo()

    monkeypatch.setattr(Strays, "are_many", lambda self, count: False)
    return undo


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [10, 240])
def test_a_group_that_comes_later_is_found(kind, step):
    index = made(kind)
    for begin in range(0, len(GROUP), step):
        index.add(GROUP[begin : begin + step])
    index.repair()
    assert found(index) > LEAST_FOUND[kind]
    assert found(index, asked=FIRST[:40]) > 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_that_others_become_is_found(kind):
    index = made(kind)
    index.update(np.arange(240), GROUP)
    rows = np.concatenate([GROUP, FIRST[240:]])
    assert found(index, rows) > LEAST_FOUND[kind]


@pytest.mark.parametrize("way", ["add", "update", "repair"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_has_lost_a_group_is_looked_at_when_it_is_changed(kind, way, tmp_path, blind):
    index = made(kind)
    with pytest.warns(UserWarning, match="were learned from"):
        index.add(GROUP)
    index._linker.repair()
    index.save(tmp_path / "index.anb")
    blind()
    index = HNSW.load(tmp_path / "index.anb", workers=1)
    # The case is one.
    assert found(index) < LEAST_FOUND[kind] / 2
    rows = ALL
    if way == "add":
        index.add(FIRST[:1] + 1)
        rows = np.concatenate([ALL, FIRST[:1] + 1])
    elif way == "update":
        index.update([0], FIRST[:1])
    else:
        index.repair()
    assert found(index, rows) > LEAST_FOUND[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_repair_learns_codes_that_a_group_was_lost_by(kind, blind):
    index = made(kind)
    with pytest.warns(UserWarning, match="were learned from"):
        index.add(GROUP)
    index._linker.repair()
    assert found(index) < LEAST_FOUND[kind] / 2
    blind()
    index.repair()
    assert found(index) > LEAST_FOUND[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_too_small_to_learn_from_is_told(kind):
    many = drawn(8000, 16, 5)
    index = made(kind, many)
    with pytest.warns(
        UserWarning, match=rf"row 0 of vectors and others, .* codes of '{kind}' were learned from.*train\(\)"
    ):
        index.add(drawn(70, 16, 6) + np.float32(50))
    with pytest.warns(UserWarning, match="were learned from"):
        index.update(np.arange(8000, 8070), drawn(70, 16, 7) - np.float32(50))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_usual_vectors_are_neither_told_nor_learned_again(kind, metric, monkeypatch):
    index = HNSW(16, metric, M=6, ef_construction=20, quantization=kind, workers=1)
    index.add(FIRST)
    learned, learn = [], Changes.learn
    monkeypatch.setattr(Changes, "learn", lambda self, *rest: learned.append(learn(self, *rest)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for begin in range(0, 600, 100):
            index.add(drawn(100, 16, 50 + begin))
        index.add(drawn(1, 16, 7) + np.float32(50))
    assert not learned


def test_vectors_of_which_some_are_always_far_are_not_learned_again_and_again(monkeypatch):
    random = np.random.default_rng(5)
    rows = random.standard_t(1.5, (3000, 8)).astype(np.float32)
    index = HNSW(8, M=6, ef_construction=20, quantization="pq", workers=1)
    index.add(rows[:2000])
    learned, learn = [], Changes.learn
    monkeypatch.setattr(Changes, "learn", lambda self, *rest: learned.append(learn(self, *rest)))
    for begin in range(2000, 3000, 25):
        index.add(rows[begin : begin + 25])
    # Of 40 blocks; one in 8 has come three times.
    assert len(learned) <= 6


def test_how_many_make_a_look():
    strays = Strays()
    strays.number = LEAST - 1
    assert not strays.are_many(100)
    strays.number = LEAST
    assert strays.are_many(100)
    assert not strays.are_many(100 * LEAST + 1)
    strays.learned(100, strays.number, before=10.0, after=1.0)
    assert not strays.are_many(100)
    strays.number = 2 * LEAST
    assert strays.are_many(100)
    strays.learned(100, strays.number, before=10.0, after=9.0)
    strays.number = 1000
    assert not strays.are_many(199)
    assert strays.are_many(200)
    strays.looked()
    assert not strays.are_many(200)
    strays.number = LEAST
    strays.forget()
    assert strays.are_many(200)
    strays.looked()
    strays.is_unknown = True
    assert strays.are_many(0)
