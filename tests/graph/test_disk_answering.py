"""How queries of one call are answered: by a walk, by codes of what a filter lets through, or by measuring it all."""

import numpy as np
import pytest

from anabranch.graph.disk import DiskIndex, answering, build
from anabranch.graph.disk.answering import POOL, Asked
from anabranch.graph.disk.search import BAD, BLOCKS, CODES, EXACT
from anabranch.graph.hnsw.filters import Filter

COUNT, DIM, K = 900, 10, 5
DRAW = np.random.default_rng(0)
VECTORS = DRAW.standard_normal((COUNT, DIM)).astype(np.float32)
QUERIES = DRAW.standard_normal((7, DIM)).astype(np.float32)
FAR = ((VECTORS.astype(np.float64) - QUERIES[:, None]) ** 2).sum(2)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    path = tmp_path_factory.mktemp("answering") / "i.anb"
    build(VECTORS, path, M=6, ef_construction=40, workers=1).close()
    with DiskIndex(path, workers=1) as made:
        yield made


def asked(index, allowed=None, ef=30, beam=3):
    wanted = None if allowed is None else Filter(allowed).on(index._slots)
    id_QK, distance_QK = np.full((len(QUERIES), K), -1), np.full((len(QUERIES), K), np.inf, np.float32)
    return Asked(index._held, index._form, index._cache_CW, index._wide(QUERIES), wanted, id_QK, distance_QK, ef, beam)


def true(allowed=None):
    """Ids of the nearest, all of those that are allowed."""
    far = FAR if allowed is None else np.where(np.isin(np.arange(COUNT), allowed), FAR, np.inf)
    order = np.argsort(far, 1, kind="stable")[:, :K]
    return np.where(np.isfinite(np.take_along_axis(far, order, 1)), order, -1)


def test_without_a_filter_it_walks(index):
    wanted = asked(index, ef=COUNT)
    counts = wanted.answer(0, len(QUERIES))
    np.testing.assert_array_equal(wanted.id_QK, true())
    assert wanted._slot_S is None
    assert wanted._allowed == 0
    # Each block once for each query, and all in it measured.
    assert counts[EXACT] == len(QUERIES) * COUNT
    assert counts[BLOCKS] == len(QUERIES) * -(-COUNT // index._form.per)
    assert counts[BAD] == -1


def test_queries_are_answered_from_one_to_another(index):
    wanted = asked(index)
    wanted.answer(2, 4)
    assert (wanted.id_QK[2:4] >= 0).all()
    assert (np.delete(wanted.id_QK, [2, 3], 0) == -1).all()
    assert np.isinf(np.delete(wanted.distance_QK, [2, 3], 0)).all()
    whole = asked(index)
    whole.answer(0, len(QUERIES))
    np.testing.assert_array_equal(wanted.id_QK[2:4], whole.id_QK[2:4])


def test_few_are_all_measured(index):
    # Up to 2 ef.
    allowed = DRAW.permutation(COUNT)[:40]
    wanted = asked(index, allowed, ef=20)
    counts = wanted.answer(0, len(QUERIES))
    np.testing.assert_array_equal(wanted.id_QK, true(allowed))
    slots = index._slots.find(allowed)
    blocks = len(np.unique(slots // index._form.per))
    assert counts[BLOCKS] == blocks
    assert counts[CODES] == 0
    assert counts[BAD] == -1


def test_of_a_tenth_the_codes_are_compared(index):
    allowed = DRAW.permutation(COUNT)[: COUNT // 10]
    wanted = asked(index, allowed, ef=44)
    counts = wanted.answer(0, len(QUERIES))
    assert counts[CODES] == len(QUERIES) * len(allowed)
    # Half of them, by codes, hold the nearest few.
    assert (wanted.id_QK == true(allowed)).mean() > 0.9
    assert np.isin(wanted.id_QK, allowed).all()
    for number in range(len(QUERIES)):
        np.testing.assert_allclose(wanted.distance_QK[number], FAR[number, wanted.id_QK[number]], rtol=1e-5)


def test_of_more_a_walk_holds_more(index, monkeypatch):
    seen = []
    own = answering.search.search_many

    def watched(*arguments):
        seen.append(arguments[6])
        own(*arguments)

    monkeypatch.setattr(answering.search, "search_many", watched)
    allowed = np.arange(0, COUNT, 3)
    wanted = asked(index, allowed, ef=30)
    wanted.answer(0, len(QUERIES))
    # ef divided by their share.
    assert seen == [90]
    assert np.isin(wanted.id_QK, allowed).all()
    asked(index, allowed, ef=149).answer(0, 1)
    monkeypatch.setattr(answering, "POOL", 50)
    asked(index, allowed, ef=30).answer(0, 1)
    asked(index, allowed, ef=60).answer(0, 1)
    # No more than a pool grows; what was asked for stays.
    assert seen[1:] == [447, 50, 60]
    assert POOL > COUNT


def test_what_was_found_stays_among_the_results(index):
    wanted, per = asked(index), index._form.per
    blocks = np.arange(-(-COUNT // per))
    for part in np.array_split(blocks, 4):
        wanted.measure(part, 0, len(QUERIES))
    np.testing.assert_array_equal(wanted.id_QK, true())


def test_nothing_is_let_through(index):
    wanted = asked(index, np.zeros(COUNT, bool))
    counts = wanted.answer(0, len(QUERIES))
    assert counts.tolist() == [0, 0, 0, -1]
    assert (wanted.id_QK == -1).all()


@pytest.mark.parametrize("share", [None, 30, 88])
def test_a_bad_block_ends_it_with_its_number(index, tmp_path, share):
    data = bytearray(index.path.read_bytes())
    data[index._form.place + 8] ^= 1
    (tmp_path / "bad.anb").write_bytes(data)
    with DiskIndex(tmp_path / "bad.anb", workers=1) as bad:
        first = bad._slots.labels()[: bad._form.per]
        allowed = (
            None if share is None else np.append(first, np.setdiff1d(np.arange(COUNT), first)[: share - len(first)])
        )
        wanted = asked(bad, allowed, ef=COUNT if share is None else 20 if share == 30 else share // 2 - 1)
        assert wanted.answer(0, len(QUERIES))[BAD] == 0
