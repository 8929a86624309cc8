"""Vectors of groups far from each other: each group is rounded about a centre of its own, and none is lost."""

import pickle
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import DataError
from anabranch.graph.hnsw import HNSW, groups
from anabranch.graph.hnsw.centres import better_centre, centre_of, centres_of
from anabranch.graph.hnsw.coded import Int4
from anabranch.graph.hnsw.encoding import WORTH, Encoding
from anabranch.graph.hnsw.measuring import MOST, distance
from anabranch.graph.hnsw.raw import L2_I4_GROUPS, L2_I8_GROUPS, kernel
from hnsw_checks import check_graph, drawn, lists, naive, recall

DIM = 24
SMALL, LARGE = 500, 1500
PLAIN = np.random.default_rng(0).standard_normal((SMALL + LARGE, DIM)).astype(np.float32)
KINDS = {"i8": {"dtype": "i8"}, "int4": {"quantization": "int4"}}


def apart(off):
    """A small group, and a large one so far from it in each dimension."""
    rows = PLAIN.copy()
    rows[SMALL:] += np.float32(off)
    return rows


def made(rows, **options):
    index = HNSW(DIM, M=8, ef_construction=40, workers=1, **options)
    index.add(rows)
    return index


def found(index, rows, which, ef=64):
    return recall(index.search(rows[which], 10, ef)[0], naive(rows, rows[which], 10)[0])


# Parts


def test_one_group_is_none():
    generator = np.random.default_rng(1)
    for dim in (8, 100):
        assert not groups.parts_of(generator.standard_normal((250, dim)).astype(np.float32))
    # Of few dimensions some at the edge may be, by chance; they gain too little.
    for dim in (2, 3):
        assert centres_of(generator.standard_normal((4000, dim)).astype(np.float32), WORTH).ndim == 1
    assert not groups.parts_of(drawn(250))
    assert not groups.parts_of(np.ones((250, 3), np.float32))
    # Copies of some: each is one.
    assert not groups.parts_of(np.repeat(generator.standard_normal((20, 8)), 12, 0).astype(np.float32))


@pytest.mark.parametrize("width", [1.0, 1e-3])
@pytest.mark.parametrize("count", [8, 60])
def test_groups_are_found_whatever_their_widths(width, count):
    rows = np.random.default_rng(2).standard_normal((250, 8)).astype(np.float32)
    rows[:count] = rows[:count] * np.float32(width) + 100
    rows[count : count + 20] -= 300
    # Three that are far off are no group, nor is one.
    rows[-3:] = 1e4
    rows[-4] = -1e9
    parts = [sorted(part.tolist()) for part in groups.parts_of(rows)]
    assert sorted(parts) == sorted([list(range(count)), list(range(count, count + 20)), list(range(count + 20, 246))])


def test_there_are_at_most_so_many_groups_the_largest():
    rows = np.random.default_rng(3).standard_normal((250, 4)).astype(np.float32)
    rows += np.float32(1e3) * np.minimum(np.arange(250) // 8, 25)[:, None]
    parts = groups.parts_of(rows)
    assert len(parts) == MOST
    assert sorted(parts[0].tolist()) == list(range(200, 250))


def test_groups_have_centres_where_these_say_far_more():
    rows = apart(50)
    centres = centres_of(rows, WORTH)
    assert centres.shape == (3, DIM)
    np.testing.assert_array_equal(centres[0], centre_of(rows))
    np.testing.assert_allclose(np.sort(centres[1:, 0]), [0, 50], atol=1)
    for one in (centres_of(rows), centres_of(apart(20), WORTH), centres_of(apart(0), 3.0), centres_of(rows[:7], WORTH)):
        assert one.shape == (DIM,)
    # Not for the few.
    few = apart(0)
    few[:10] += 50
    assert centres_of(few, WORTH).ndim == 1
    assert better_centre(centres, rows, WORTH) is None
    assert better_centre(centres[0], rows, WORTH).shape == (3, DIM)
    assert better_centre(centre_of(few), few, WORTH) is None
    # Where all lie by centres that there are, they stay.
    assert better_centre(centres, rows[:SMALL], WORTH) is None
    assert better_centre(centres, rows + 1000, WORTH) is not None


def test_a_group_that_one_look_does_not_see_stays(monkeypatch):
    rows = np.concatenate([apart(50), PLAIN[:100] - 200])
    held, whole = centres_of(rows[SMALL:], WORTH), groups.parts_of
    assert held.shape == (3, DIM)
    monkeypatch.setattr(groups, "parts_of", lambda some: [part for part in whole(some) if some[part].mean() > -100])
    better = better_centre(held, rows, WORTH)
    np.testing.assert_allclose(np.sort(better[1:, 0]), [-200, 0, 50], atol=1)


# Kernels


@kernel
def measured(kind, query, scale, norm, row, aux, slot, width):
    return distance(kind, query, scale, norm, row, aux, slot, width)


def coder_of(kind, dim, rows):
    """What makes rows and queries, of groups: kind, width, the makers and what rows say."""
    if kind == "i8":
        coder = Encoding(dim, "l2", "i8", True)
        coder.settle(rows)
        return coder, lambda x: coder.encode(x)[:2], lambda x: coder.encode_queries(x)[0]
    coder = Int4(dim, "l2").trained(rows, 0, 1)
    return coder, coder.encode, lambda x: coder.encode_queries(x)[0]


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(1, 150), st.integers(0, 2**32 - 1), st.integers(2, 6))
@settings(max_examples=15, deadline=None)
def test_distances_are_those_between_what_codes_stand_for(kind, dim, seed, count):
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((count * 20, dim)) + 1000 * np.repeat(np.arange(count), 20)[:, None]
    rows = rows.astype(np.float32)
    coder, encode, encode_queries = coder_of(kind, dim, rows)
    assert coder.kind == (L2_I8_GROUPS if kind == "i8" else L2_I4_GROUPS)
    assert len(coder.centre_GD) == count
    some = generator.permutation(len(rows))[:9]
    code, aux = encode(rows[some])
    group = groups.groups_in(aux)
    np.testing.assert_array_equal(np.argsort(coder.centre_GD[:, 0])[some // 20], group)
    query = (rows[some[:2]] + generator.standard_normal((2, dim))).astype(np.float32)
    asked = encode_queries(query)
    for number, vector in enumerate(query):
        for place, row in enumerate(some):
            head = asked[number].ctypes.data, np.float32(0), np.float32(0)
            got = measured(coder.kind, *head, code[place].ctypes.data, aux.ctypes.data, place, coder.width)
            centre = coder.centre_GD[group[place]]
            most = 127 if kind == "i8" else 7
            one, other = (
                np.rint(x / np.abs(x).max() * by) * (np.abs(x).max() / by)
                for x, by in ((vector - centre, 127), (rows[row] - centre, most))
            )
            exact = ((one.astype(np.float64) - other) ** 2).sum()
            np.testing.assert_allclose(got, exact, rtol=1e-3, atol=1e-2 + 1e-5 * float((one**2).sum()))


@pytest.mark.parametrize("dim", [1, 30, 130])
def test_equal_codes_lie_at_no_distance(dim):
    """To the bit: what is equal is not told from another by errors that grow with how far both are from the centre."""
    rows = np.random.default_rng(dim).standard_normal((600, dim)).astype(np.float32)
    rows[:150] += 30
    index = HNSW(dim, M=8, ef_construction=40, dtype="i8", rerank=False, workers=1)
    index.add(rows)
    index.repair()
    ids, distances = index.search(rows, 1, 300)
    is_found = ids[:, 0] == np.arange(600)
    assert is_found.mean() > (0.99 if dim > 1 else 0)
    assert (distances[is_found] == 0).all()


# An index


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("off", [5, 10, 20, 50, 1000, 1e5])
def test_no_group_is_lost(kind, off):
    """As i8 and int4 lost the smaller one: recall .04 to .5, and nothing led to many of it."""
    rows = apart(off)
    index = made(rows, **KINDS[kind])
    check_graph(index)
    # As many as of the vectors themselves.
    assert index.stats()["unreachable"] < 15
    for which in (np.arange(30), np.arange(SMALL, SMALL + 30)):
        assert found(index, rows, which) > 0.93


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["small first", "large first", "mixed", "moved", "singly"])
def test_however_groups_come(kind, way):
    rows = apart(60)
    order = {"small first": np.arange(2000), "large first": np.arange(2000)[::-1]}.get(
        way, np.random.default_rng(0).permutation(2000)
    )
    index = HNSW(DIM, M=8, ef_construction=40, workers=1, **KINDS[kind])
    if way == "moved":
        index.add(rows[::-1], np.arange(2000))
        for part in np.array_split(np.arange(2000), 4):
            index.update(part, rows[part])
    elif way == "singly":
        index.add(rows[SMALL : SMALL + 1200], np.arange(SMALL, SMALL + 1200))
        for number in range(300):
            index.add(rows[number], [number])
        left = np.r_[300:SMALL, SMALL + 1200 : 2000]
        index.add(rows[left], left)
    else:
        for part in np.array_split(order, 2):
            index.add(rows[part], part)
    check_graph(index)
    index.repair()
    for which in (np.arange(30), np.arange(SMALL, SMALL + 30)):
        assert found(index, rows, which, 100) > 0.93


def test_many_groups_of_many_widths():
    generator = np.random.default_rng(5)
    centre, width = 1e3 * generator.standard_normal((10, DIM)), 10.0 ** generator.integers(-2, 2, 10)
    which = generator.integers(0, 10, 3000)
    rows = (centre[which] + width[which, None] * generator.standard_normal((3000, DIM))).astype(np.float32)
    index = made(rows, dtype="i8")
    index.repair()
    assert len(index._storage.encoding.centre_GD) == 10
    for group in range(10):
        assert found(index, rows, np.flatnonzero(which == group)[:20], 100) > 0.9


def test_the_graph_of_groups_is_that_of_the_vectors():
    rows = apart(50)
    short, plain = made(rows, dtype="i8"), made(rows)
    assert short._storage.encoding.centre_GD is not None
    for level in (0, 1):
        assert lists(short, level) == lists(plain, level)
    # And when one comes alone, or they are linked anew.
    for index in (short, plain):
        index.add(PLAIN[3] + 25)
        index.update([7, 1500], rows[[8, 9]] + np.float32(0.5))
    assert lists(short, 0) == lists(plain, 0)


def test_usual_vectors_have_one_centre():
    for rows in (PLAIN, drawn(2000, DIM), np.abs(PLAIN) ** 3, apart(20)):
        assert made(rows[:600], dtype="i8")._storage.encoding.centre_GD is None
    assert made(drawn(2000, DIM), quantization="int4")._storage.coded.coder.centre_GD is None
    for metric in ("ip", "cosine"):
        index = made(apart(50)[::3], metric=metric, dtype="i8")
        assert index._storage.encoding.centre_GD is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mmap", [False, True])
def test_a_file_has_the_groups(kind, mmap, tmp_path):
    rows = apart(50)
    index = made(rows, **KINDS[kind])
    index.save(tmp_path / "i.anb")
    for again in (HNSW.load(tmp_path / "i.anb", mmap=mmap), pickle.loads(pickle.dumps(index))):
        for one, other in zip(index.search(rows[:40], 5), again.search(rows[:40], 5), strict=True):
            np.testing.assert_array_equal(one, other)
        again.add(rows[:9] + 1, np.arange(9000, 9009))
        assert again.search(rows[:9] + 1, 1)[0][:, 0].tolist() == list(range(9000, 9009))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_whose_groups_are_not_there_is_damaged(kind):
    index = made(apart(50), **KINDS[kind])
    names = {"i8": ("groups", "aux"), "int4": ("code_groups", "code_aux")}[kind]

    def read(change):
        state = index.__getstate__()
        change(state["arrays"], *names)
        return HNSW._made(state["arrays"], state["meta"], mapped=False, source="s", workers=1)

    def other_group(arrays, groups, aux):
        arrays[aux][5, 1] = (arrays[aux][5, 1:].view(np.uint32) | np.uint32(15)).view(np.float32)[0]

    assert len(read(lambda *_: None)) == 2000
    for change, said in (
        (other_group, "a row is of a group that is not there"),
        (lambda arrays, groups, _: arrays[groups].__setitem__((0, 0), np.nan), "centre is not finite"),
        (lambda arrays, groups, _: arrays.update({groups: arrays[groups][:1]}), f"'{names[0]}' is float32"),
        (lambda arrays, groups, _: arrays.update({groups: np.zeros((17, DIM), "f4")}), f"'{names[0]}' is float32"),
        (lambda arrays, groups, _: arrays.update({groups: arrays[groups][:, 1:]}), f"'{names[0]}' is float32"),
    ):
        with pytest.raises(DataError, match=said):
            read(change)
    # Not where rows have none.
    plain = made(PLAIN[:300], dtype="i8", rerank=False).__getstate__()
    plain["arrays"]["groups"] = np.zeros((2, DIM), np.float32)
    with pytest.raises(DataError, match="it holds the arrays"):
        HNSW._made(plain["arrays"], plain["meta"], mapped=False, source="s", workers=1)


@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_to_ask_see_the_same(kind):
    rows = apart(50)
    index = made(rows, **KINDS[kind])
    many, single = index.search(rows[:30], 8, 80), [index.search(row, 8, 80) for row in rows[:30]]
    np.testing.assert_array_equal(many[0], np.concatenate([one[0] for one in single]))
    true = naive(rows, rows[:5], 2000)
    radius = np.float32(true[1][:, 20])
    exact = index.range_search(rows[:5], radius, exact=True)
    for number in range(5):
        got = exact.ids[exact.indptr[number] : exact.indptr[number + 1]]
        assert set(true[0][number, :20].tolist()) <= set(got.tolist())
    assert index.nearest_within(rows[:5], radius, 3, 400)[0].tolist() == true[0][:, :3].tolist()
    even = np.arange(2000) % 2 == 0
    ids, _ = index.search(rows[:30], 5, 100, filter=even)
    assert recall(ids, naive(rows[even], rows[:30], 5, ids=np.flatnonzero(even))[0]) > 0.9
    index.remove(np.arange(0, 2000, 2))
    index.compact()
    ids, _ = index.search(rows[:30], 5, 100)
    assert recall(ids, naive(rows[1::2], rows[:30], 5, ids=np.arange(1, 2000, 2))[0]) > 0.9
    np.testing.assert_array_equal(index.vectors([1, 1999]), rows[[1, 1999]])
    check_graph(index)


def test_walks_over_codes_alone_tell_distances_of_groups():
    rows = apart(50)
    index = made(rows, quantization="int4", rerank=False)
    ids, distances = index.search(rows[:40], 5, 100)
    off = ((rows[ids] - rows[:40, None]) ** 2).sum(2)
    assert (distances >= 0).all()
    assert np.abs(distances - off).max() < 12


# What cannot be mended


def test_it_is_told_where_rows_say_too_little():
    rows = apart(2000)
    with pytest.warns(
        UserWarning, match=r"row 0 of vectors and others, \d+% of \d+ looked at, are rounded .* rerank=True"
    ):
        made(rows, dtype="i8", rerank=False)
    with pytest.warns(UserWarning, match="dtype 'f16'"):
        made(apart(50_000), dtype="f16")
    # Nor where there are more groups than have centres.
    many = PLAIN + np.float32(1e4) * (np.arange(2000) % 40)[:, None].astype(np.float32)
    with pytest.warns(UserWarning, match="build the index with dtype 'f32'"):
        made(many[:, :DIM], dtype="i8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ({"dtype": "i8"}, {"dtype": "i8", "rerank": False}, {"dtype": "f16"}):
            made(drawn(500, DIM), **kind)
            made(np.repeat(PLAIN[:40], 10, 0), **kind)
        made(rows, dtype="i8")
        # Alone, or a few.
        index = made(PLAIN[:500], dtype="i8", rerank=False)
        index.add(np.full((1, DIM), 1e6))
        index.add(np.full((63, DIM), 1e6) + PLAIN[:63])


@pytest.mark.parametrize("dtype", ["i8", "f16"])
def test_it_is_told_where_rows_keep_errors_of_another_centre(dtype):
    far = PLAIN[:400] + np.float32(1e4) * (np.arange(DIM) == 0)
    index = HNSW(DIM, M=8, ef_construction=40, dtype=dtype, rerank=False, workers=1)
    index.add(far)

    def move():
        for number in range(400):
            index.update([number], PLAIN[number : number + 1])

    with pytest.warns(UserWarning, match=r"\d+ of 400 elements came when others lay about another centre"):
        move()
    # Told once; and when they are given again, they are as good as any.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index.update(np.arange(400), PLAIN[:400])
    assert np.abs(index.vectors(np.arange(400)) - PLAIN[:400]).max() < 0.1
