"""What few-bit rows and codes are rounded about: no one vector decides it, and what it was learned from may go."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CapacityError
from anabranch.graph.hnsw import HNSW, ShardedHNSW, changing, coded
from anabranch.graph.hnsw.centres import ENOUGH, better_centre, centre_of, spread_places
from anabranch.graph.hnsw.checks import MAX_LENGTH
from anabranch.graph.hnsw.coded import PQ
from hnsw_checks import WAIT_S, check_graph, drawn, graph_bytes, naive, recall, thread

# Vectors lie far from all others on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:row .* of vectors holds a number"),
    pytest.mark.filterwarnings("ignore:row .* of vectors and others, .* are rounded"),
    pytest.mark.filterwarnings("ignore:.* elements came when others lay about another centre"),
]

KINDS = (
    *({"dtype": dtype, "rerank": rerank} for dtype in ("f16", "i8") for rerank in (True, False)),
    *({"quantization": quantization} for quantization in ("int4", "pq")),
)
NAMES = ["-".join(map(str, kind.values())) for kind in KINDS]
VECTORS = np.random.default_rng(3).standard_normal((1300, 12)).astype(np.float32)
QUERIES = VECTORS[100:150]


def made(kind, metric="l2", **options):
    return HNSW(12, metric, M=8, ef_construction=40, workers=1, **kind, **options)


def found(index, metric="l2", rows=VECTORS, queries=QUERIES):
    """Share of the nearest 10 that is found, of rows with their places as ids."""
    return recall(index.search(queries, 10, 100)[0], naive(rows, queries, 10, metric)[0])


# The centre


def test_the_middle_half_counts():
    rows = np.array([[1, 5], [2, 5], [3, -1e9], [4, 7], [100, 6], [1e18, 6], [-1e18, 6], [3, 6]], np.float32)
    assert centre_of(rows).tolist() == [np.mean([2, 3, 3, 4]), np.mean([5, 6, 6, 6])]
    assert centre_of(rows[:0]).tolist() == [0, 0]
    assert centre_of(rows[5:6]).tolist() == rows[5].tolist()
    assert centre_of(rows[4:6]).tolist() == [100, 6]
    assert centre_of(rows[[5, 4]]).tolist() == [100, 6]
    assert centre_of(rows[4:7]).tolist() == [100, 6]
    assert centre_of(rows[3:7]).tolist() == [52, 6]


def test_of_many_rows_some_are_enough_and_all_places_count():
    place = spread_places(10 * ENOUGH)
    assert (len(place), place[0], place[-1]) == (ENOUGH, 0, 10 * ENOUGH - 1)
    assert np.diff(place).min() >= 1
    assert spread_places(7).tolist() == list(range(7))
    rows = np.random.default_rng(0).standard_normal((3 * ENOUGH, 4)).astype(np.float32) + 9
    assert np.abs(centre_of(rows) - 9).max() < 0.1


def test_rows_between_two_values_lie_about_the_middle():
    """A median would lie at one end, and cost a bit of each number."""
    rows = np.random.default_rng(0).choice([-1.0, 1.0], (2000, 8)).astype(np.float32)
    assert np.abs(centre_of(rows)).max() < 0.4


@given(st.integers(3, 60), st.integers(0, 2**32 - 1), st.floats(-(2.0**59), 2.0**59, width=32), st.floats(-1e3, 1e3))
@settings(max_examples=60, deadline=None)
def test_no_one_row_moves_a_centre_beyond_the_others(count, seed, value, offset):
    rows = (np.random.default_rng(seed).standard_normal((count, 3)) + offset).astype(np.float32)
    others = np.delete(rows, seed % count, 0)
    rows[seed % count] = value
    centre, slack = centre_of(rows), 1e-6 * abs(offset)
    assert (centre >= others.min(0) - slack).all()
    assert (centre <= others.max(0) + slack).all()


def test_a_centre_is_given_up_where_another_is_far_better():
    rows = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
    assert better_centre(np.zeros(4, np.float32), rows) is None
    assert better_centre(np.full(4, 2, np.float32), rows) is None
    np.testing.assert_array_equal(better_centre(np.full(4, 50, np.float32), rows), centre_of(rows))
    assert better_centre(np.full(4, 50, np.float32), rows[:0]) is None
    assert better_centre(rows[0], rows[:2]) is None
    # Of few, the one that is far came first.
    far = np.array([[1e5, 1e5], [1, 2]], np.float32)
    assert better_centre(far[0], far).tolist() == [1, 2]


# One vector


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@given(
    st.integers(0, 1299),
    st.sampled_from([10.0, 1e3, 1e5, 1e9, 0.28 * MAX_LENGTH]),
    st.lists(st.sampled_from([-1.0, 0.0, 1.0, 1e-3]), min_size=12, max_size=12).filter(any),
    st.integers(0, 2),
)
@settings(max_examples=2, deadline=None)
def test_one_vector_of_any_length_harms_no_other(kind, metric, place, length, direction, cut):
    """Whichever it is of those that come, and however they are cut into calls: others are found as if it were none of the far ones."""
    rows = VECTORS.copy()
    rows[place] = np.array(direction) * length
    index = made(kind, metric)
    for part in np.split(rows, [[], [place, place + 1], [1, 2, 5, 900]][cut]):
        index.add(part)
    plain = made({}, metric)
    plain.add(rows)
    queries = QUERIES if not 100 <= place < 150 else VECTORS[200:250]
    # All that is found without rounding, but for what rounding costs with no far one among them.
    before = made(kind, metric)
    before.add(VECTORS)
    least = min(found(plain, metric, rows, queries), found(before, metric, VECTORS, queries))
    assert found(index, metric, rows, queries) > least - 0.1
    check_graph(index)


@pytest.mark.parametrize("kind", KINDS[:4], ids=NAMES[:4])
def test_one_far_vector_that_comes_first_and_alone(kind):
    """It is all that a centre can be of; the next say better, and are rounded about that."""
    rows = VECTORS.copy()
    rows[0] = 0.28 * MAX_LENGTH
    index = made(kind)
    for row in rows[:40]:
        index.add(row)
    assert np.abs(index._storage.encoding.centre_D).max() < 3
    index.add(rows[40:])
    assert found(index, rows=rows) > 0.85
    # What is told by rows alone is as near as their precision is, also of those that came early.
    kept = index.vectors(np.arange(2, 1300))
    assert np.abs(kept - rows[2:]).max() < 0.1
    if not kind["rerank"]:
        assert np.abs(kept[:38] - rows[2:40]).max() > 0


def test_a_far_vector_in_each_shard_harms_none():
    rows = np.concatenate([VECTORS, VECTORS[::-1] + 0.01])
    rows[[7, 8]] = 1e9
    index = ShardedHNSW(12, 2, M=8, ef_construction=40, quantization="int4")
    index.add(rows)
    assert found(index, rows=rows) > 0.9


# Many that go


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2], *KINDS[4:]], ids=lambda kind: "-".join(map(str, kind.values())))
@pytest.mark.parametrize("way", ["compact", "by itself", "add"])
def test_when_those_that_codes_were_learned_from_go_others_are_learned(kind, way):
    """Most were far; when they go, what stays is told apart again. (Rows without vectors beside them have lost what they said.)"""
    far = 1e4 * (5 + np.random.default_rng(1).standard_normal((2600, 12)))
    index = made(kind, compact_at=0.2 if way == "by itself" else None)
    ids = np.arange(5000, 7600)
    index.add(far, ids=ids)
    index.add(VECTORS[:700], ids=np.arange(700))
    # They had a centre of their own; "pq" has learned them beside the others.
    if kind in (KINDS[2], KINDS[4]):
        assert found(index, rows=VECTORS[:700]) > 0.9
    index.remove(ids)
    if way == "compact":
        index.compact()
    elif way == "add":
        index.add(VECTORS[700:], ids=np.arange(700, 1300))
    rows = VECTORS if way == "add" else VECTORS[:700]
    assert found(index, rows=rows) > 0.9
    check_graph(index)


@pytest.mark.parametrize("kind", [KINDS[2], *KINDS[4:]], ids=lambda kind: "-".join(map(str, kind.values())))
def test_vectors_that_are_as_they_were_are_not_learned_again(kind, monkeypatch):
    index = made(kind)
    index.add(drawn(1100, 12))
    learned = []
    monkeypatch.setattr(coded.Coded, "learned", lambda *_: learned.append(1))
    before = None if index._storage.encoding.centre_D is None else index._storage.encoding.centre_D.tolist()
    index.add(drawn(2000, 12, 1))
    index.remove(np.arange(500))
    index.compact()
    index.add(drawn(30, 12, 2))
    assert not learned
    assert before is None or index._storage.encoding.centre_D.tolist() == before


# Many that move


FAR = VECTORS[::-1] + np.float32(1e4) * (np.arange(12) == 3).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("way", ["update", "add", "one by one", "in halves"])
def test_when_vectors_are_updated_they_are_rounded_about_what_they_are(kind, way, monkeypatch):
    """A new model's vectors lie elsewhere: all is looked at again as elements move, not only as they come and go."""
    count = 400 if way == "one by one" else 1100
    monkeypatch.setattr(coded, "FIRST", 300)
    index, ids = made(kind), np.arange(count)
    index.add(FAR[:count], ids)
    if way == "update":
        index.update(ids, VECTORS[:count])
    elif way == "add":
        index.add(np.concatenate([VECTORS[:count], VECTORS[:50] + 9]), np.arange(count + 50), update=True)
    elif way == "in halves":
        for part in np.array_split(ids, 2):
            index.update(part, VECTORS[part])
    else:
        for number in range(count):
            index.update([number], VECTORS[number : number + 1], repair=False)
    rows = VECTORS[:count] if way != "add" else np.concatenate([VECTORS[:count], VECTORS[:50] + 9])
    fresh = made(kind)
    fresh.add(rows)
    # Rows without vectors beside them have lost what they said before the middle was another.
    lost = not kind.get("rerank", True) and way in ("one by one", "in halves")
    assert lost or found(index, rows=rows) > found(fresh, rows=rows) - 0.05
    assert index.stats()["unreachable"] == 0 or way in ("one by one", "add")
    check_graph(index)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2], *KINDS[4:]], ids=lambda kind: "-".join(map(str, kind.values())))
def test_a_look_is_for_many_changes(kind, monkeypatch):
    """Elements that go and come, or move, one by one: what all is rounded about is looked at once in an eighth of all, beside searches."""
    index = made(kind)
    index.add(VECTORS[:1040])
    looks, worn = [], []
    whole_look, whole_worn = changing.better_centre, coded.Coded.is_worn

    def beside():
        # One that comes while it is looked is let in at once.
        reader = thread(lambda: index.search(QUERIES[:2], 3))
        reader.join(WAIT_S)
        assert not reader.is_alive()

    def look(*asked):
        looks.append(index._changes.drawn)
        beside()
        return whole_look(*asked)

    def wear(self, sample, **asked):
        worn.append(len(sample))
        beside()
        return whole_worn(self, sample, **asked)

    monkeypatch.setattr(changing, "better_centre", look)
    monkeypatch.setattr(coded.Coded, "is_worn", wear)
    for number in range(260):
        if number % 2:
            index.update([number], VECTORS[1040 + number % 260][None], repair=False)
        else:
            index.remove([number])
            index.add(VECTORS[1040 + number % 260][None], [number])
    # Of 1,040, with 130 from one to the next.
    assert len(looks if "dtype" in kind else worn) == 2


def test_what_is_linked_anew_is_led_to():
    """Those that stay lie far from all that moved, and nothing led there."""
    index = made({"dtype": "i8"})
    index.add(FAR[:1150], np.arange(1150))
    index.add(VECTORS[:900], np.arange(900), update=True)
    assert np.abs(index._storage.encoding.centre_D).max() < 9
    assert index.stats()["unreachable"] == 0


def test_who_comes_while_what_is_left_is_looked_at_finds_it_by_its_new_places(monkeypatch):
    index, whole, seen = made(KINDS[2], compact_at=None), changing.better_centre, []
    index.add(VECTORS, np.arange(1300) + 7)
    index.remove(np.arange(400) + 7)

    def look(*asked):
        reader = thread(lambda: seen.append((index.vectors(np.arange(900) + 407), index.contains([7, 406, 407]))))
        reader.join(WAIT_S)
        return whole(*asked)

    monkeypatch.setattr(changing, "better_centre", look)
    assert index.compact() == 400
    ((rows, known),) = seen
    np.testing.assert_array_equal(rows, VECTORS[400:])
    assert known.tolist() == [False, False, True]


def test_a_file_knows_how_much_has_changed(tmp_path):
    """So that what comes later is the same, whether it was loaded in between or not."""
    index = made(KINDS[2])
    index.add(VECTORS[:800])
    index.update(np.arange(90), FAR[:90])
    index.save(tmp_path / "i.anb")
    again = HNSW.load(tmp_path / "i.anb", workers=1)
    assert again._changes.changed == index._changes.changed == 90
    for held in (index, again):
        held.update(np.arange(90, 500), FAR[90:500])
        held.update(np.arange(500, 800), FAR[500:800])
    assert graph_bytes(index) == graph_bytes(again)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("way", ["at once", "one by one"])
def test_some_that_come_and_lie_far_off_harm_no_other(kind, way):
    """A fourth of all: codes of the others' middle said of them that they were near, and walks were full of them."""
    index, far = made(kind), VECTORS[:400] + np.float32(1e5) * (np.arange(12) == 3)
    index.add(VECTORS)
    for part in np.split(far, 1 if way == "at once" else 400):
        index.add(part)
    before = made(kind)
    before.add(VECTORS)
    rows = np.concatenate([VECTORS, far.astype(np.float32)])
    assert found(index, rows=rows) > found(before) - 0.05


@pytest.mark.parametrize("kind", KINDS[:4], ids=NAMES[:4])
def test_as_many_again_are_looked_at_however_many_there_are(kind, monkeypatch):
    """Nobody looked beyond 65,535, nor where one call went beyond."""
    monkeypatch.setattr(coded, "SAMPLE", 127)
    monkeypatch.setattr(changing, "SAMPLE", 127)
    index = made(kind)
    index.add(FAR[:300], np.arange(5000, 5300))
    index.add(VECTORS, np.arange(1300))
    assert np.abs(index._storage.encoding.centre_D).max() < 9
    assert found(index) > 0.85
    assert index.stats()["unreachable"] == 0


@pytest.mark.parametrize("num_parts", [1, 5, 12])
def test_codes_are_worn_where_vectors_use_few_of_them(num_parts):
    coder = PQ(12, "l2", num_parts).trained(VECTORS, 0, 1)
    assert not coder.is_worn(VECTORS[:1000])
    assert not coder.is_worn(VECTORS[:3])
    assert not coder.is_worn(VECTORS[:0])
    assert coder.is_worn(VECTORS[:1000] * 1e-3)
    assert coder.is_worn(VECTORS[:1000] + 1e4)
    # In one part alone.
    assert coder.is_worn(FAR[:1000])
    # Some of them; few are no reason.
    far = VECTORS[:1000] + np.float32(1e5) * (np.arange(12) == 3)
    assert coder.is_worn(np.concatenate([VECTORS[:900], far[:100]]))
    assert not coder.is_worn(np.concatenate([VECTORS[:970], far[:30]]))
    # No others can be told apart.
    assert not coder.is_worn(np.ones((500, 12), np.float32))


def test_no_memory_to_round_anew_leaves_the_index_as_it_was(monkeypatch):
    index = made(KINDS[2], compact_at=None)
    index.add(VECTORS[:1000] + 1e4)
    before = graph_bytes(index)

    def none(*_):
        raise MemoryError

    monkeypatch.setattr("anabranch.graph.hnsw.storage.Encoding.with_centre", lambda self, centre: Short())

    class Short:
        encode = none

    with pytest.raises(CapacityError, match="no memory to round 1,000 elements anew"):
        index.add(np.concatenate([VECTORS] * 2))
    assert graph_bytes(index) == before
    # Compaction goes on without.
    index.remove(np.arange(5))
    assert index.compact() == 5


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("mmap", [False, True])
def test_a_file_keeps_the_centre_that_was_found_later(kind, mmap, tmp_path):
    index = made(kind)
    index.add(VECTORS[:3] + 1e6)
    index.add(VECTORS, ids=np.arange(10, 1310))
    index.save(tmp_path / "i.anb")
    again = HNSW.load(tmp_path / "i.anb", mmap=mmap, workers=1)
    for one, other in zip(index.search(QUERIES, 5), again.search(QUERIES, 5), strict=True):
        assert one.tolist() == other.tolist()
    # Also one by one, which takes another way.
    assert [again.search(query, 5)[0][0].tolist() for query in QUERIES] == index.search(QUERIES, 5)[0].tolist()
    for held in (index, again):
        held.add(1e6 * VECTORS + 1e7, ids=np.arange(5000, 6300))
        held.remove(np.arange(10, 1310))
        held.compact()
    assert graph_bytes(index) == graph_bytes(again)
