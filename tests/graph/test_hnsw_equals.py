"""Equal vectors: groups larger than a list stay connected, among themselves and outwards, and nothing else changes."""

import threading

import numpy as np
import pytest

from anabranch.graph.hnsw import HNSW, changing, layout
from anabranch.graph.hnsw.linking import Linker
from hnsw_checks import WAIT_S, check_graph, drawn, graph_bytes, lists

ORDER = np.random.default_rng(1).permutation(10_000)
VECTORS_16 = drawn(40, 16, 9)
KINDS = {
    "l2": {},
    "cosine": {"metric": "cosine"},
    "i8": {"dtype": "i8"},
    "f16 alone": {"dtype": "f16", "rerank": False},
    "hamming": {"metric": "hamming"},
}


def drawn_for(options, count, seed=0):
    generator = np.random.default_rng(seed)
    if options.get("metric") == "hamming":
        return generator.integers(0, 256, (count, 8), np.uint8)
    return generator.standard_normal((count, 16)).astype(np.float32)


def empty(options, **more):
    return HNSW(64 if options.get("metric") == "hamming" else 16, **{**options, **more})


def check_halves(index, vectors):
    """At most half of a list leads to equals of its element."""
    for level in range(int(index._storage.graph[layout.TOP]) + 1):
        cap = 2 * index.M if level == 0 else index.M
        for slot, links in lists(index, level).items():
            assert (vectors[links] == vectors[slot]).all(1).sum() <= cap // 2


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_fifty_are_all_found(kind):
    """200 vectors, 50 times each, in any order; before, most could not be reached, and a tenth of the searches had no exact hit."""
    base = drawn_for(KINDS[kind], 200)
    vectors = np.repeat(base, 50, 0)[ORDER]
    index = empty(KINDS[kind], workers=2)
    index.add(vectors)
    ids, _ = index.search(base, 10)
    assert (vectors[ids] == base[:, None]).all()
    assert index.stats()["unreachable"] == 0
    check_graph(index)
    check_halves(index, vectors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [2, 4])
def test_with_few_links_every_exact_hit_can_be_reached(kind, M):
    """As before, where a list has room for less than there are copies of one vector near it: whole groups were cut off."""
    base = drawn_for(KINDS[kind], 60)
    vectors = np.repeat(base, 30, 0)[ORDER[ORDER < 1800]]
    index = empty(KINDS[kind], M=M, ef_construction=60, workers=1)
    index.add(vectors)
    assert index.stats()["unreachable"] == 0
    ids, _ = index.search(base, 30, len(vectors))
    assert (vectors[ids] == base[:, None]).all()
    check_graph(index)


def test_copies_that_come_singly_can_be_reached_after_a_while(tmp_path):
    base = drawn_for({}, 40)
    vectors = np.repeat(base, 20, 0)[ORDER[ORDER < 800]]
    made = [HNSW(16, M=3, ef_construction=30, workers=1) for _ in range(2)]
    for index in made:
        index.add(vectors[:400])
        assert index.stats()["unreachable"] == 0
    for row in vectors[400:]:
        made[0].add(row)
    # In two parts, and read from a file between them: the same bytes.
    for row in vectors[400:530]:
        made[1].add(row)
    made[1].save(tmp_path / "i.anb")
    again = HNSW.load(tmp_path / "i.anb", workers=1)
    assert again._linker.num_copies == made[1]._linker.num_copies > 0
    for row in vectors[530:]:
        again.add(row)
    assert graph_bytes(again) == graph_bytes(made[0])
    # At most an eighth of them came since it was looked.
    assert made[0]._linker.num_copies <= 100
    made[0].add(vectors[:200])
    assert made[0].stats()["unreachable"] == 0


def test_lists_of_many_are_looked_at_beside_searches(monkeypatch):
    monkeypatch.setattr(changing, "LOOKED_BESIDE", 500)
    index, seen, own = HNSW(16, M=3, ef_construction=30, workers=1), [], Linker.reached

    def reached(linker):
        # Another thread's search comes in.
        one = threading.Thread(target=lambda: seen.append(len(index.search(VECTORS_16[:3], 1)[0])))
        one.start()
        one.join(WAIT_S)
        return own(linker)

    monkeypatch.setattr(Linker, "reached", reached)
    index.add(np.repeat(VECTORS_16, 20, 0))
    assert seen
    assert set(seen) == {3}
    assert index.stats()["unreachable"] == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_copies_are_counted_however_they_come(threads):
    vectors = drawn(1200, 16, 11)
    index = HNSW(16, M=8, ef_construction=60, workers=threads)
    index.add(vectors)
    # Side by side: each is the first of its kind in its batch.
    index.add(vectors[:40])
    assert index._linker.num_copies == 40
    # One after the other, and alone.
    index.add(np.repeat(vectors[50:51], 9, 0))
    index.add(vectors[60])
    assert index._linker.num_copies == 50


def test_different_vectors_are_no_copies():
    index = HNSW(16, M=2, ef_construction=20, workers=1)
    index.add(drawn(1500, 16, 3))
    assert index._linker.num_copies == 0
    # With so few links some could not be reached, which nobody looked for.
    assert index.stats()["unreachable"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [True, False])
def test_one_group_is_found_whole(kind, at_once):
    vectors = np.repeat(drawn_for(KINDS[kind], 1), 1500, 0)
    index = empty(KINDS[kind], ef_construction=50, workers=1)
    for part in np.array_split(vectors, 1 if at_once else 7):
        index.add(part)
    ids, _ = index.search(vectors[0], 200, 2000)
    assert len(set(ids[0].tolist()) - {-1}) == 200
    assert index.search(vectors[0], 1500, 2000)[0].tolist() == [list(range(1500))]
    assert index.stats()["unreachable"] == 0
    check_graph(index)


def test_a_group_has_its_way_out():
    """1,200 equal vectors, then others: a search that begins among the equals still finds these."""
    others = drawn(300, 16, 2)
    index = HNSW(16, M=8, ef_construction=60, workers=1)
    index.add(np.concatenate([np.ones((1200, 16), np.float32), others]))
    ids, _ = index.search(others, 1, 64)
    assert (ids[:, 0] == 1200 + np.arange(300)).mean() > 0.9
    # 1,465 before, and no other was found. Those that came among nothing but equals have few links.
    assert index.stats()["unreachable"] <= 30
    index.repair()
    assert index.stats()["unreachable"] == 0


@pytest.mark.parametrize("kind", ["l2", "hamming"])
def test_equals_come_to_the_same_bytes_for_any_number_of_threads(kind):
    base = drawn_for(KINDS[kind], 40)
    vectors = np.concatenate([drawn_for(KINDS[kind], 1100, 3), np.repeat(base, 30, 0)[ORDER[ORDER < 1200]]])
    made = []
    for threads in (1, 2, 5):
        index = empty(KINDS[kind], M=6, ef_construction=40, workers=threads)
        index.add(vectors)
        made.append(graph_bytes(index))
    assert made[0] == made[1] == made[2]


def test_equals_that_go_and_come_again_are_found():
    vectors = np.concatenate([np.repeat(drawn_for({}, 10), 60, 0), drawn(600, 16, 5)])
    index = HNSW(16, M=6, ef_construction=50, workers=1)
    index.add(vectors)
    index.remove(np.arange(0, 600, 2))
    index.add(vectors[:600:2], ids=np.arange(5000, 5300), repair=True)
    index.update(np.arange(1, 200, 2), vectors[1:200:2])
    assert index.stats()["unreachable"] == 0
    check_graph(index)
    found = index.search(vectors[:600:60], 60, 700)[1]
    assert (found == 0).all()


def test_the_first_of_equals_is_known_by_all_bytes():
    index = HNSW(16, dtype="i8", workers=1)
    row = drawn(1, 16)
    # The codes of one are those of its double; their scales differ.
    index.add(np.concatenate([row, row, 2 * row, -row, row]))
    index._storage.encoding.centre_D = None
    assert index._storage.are_first(np.arange(5)).tolist() == [True, False, True, True, False]


def test_the_one_that_makes_room_is_led_to_by_the_one_it_makes_room_for():
    """With M = 2 a new element has one link to an equal: only by what it takes over from that can the others be reached."""
    index = HNSW(16, M=2, ef_construction=10, workers=1)
    index.add(np.ones((300, 16), np.float32))
    assert index.stats()["unreachable"] == 0


@pytest.mark.parametrize("M", [3, 8])
@pytest.mark.parametrize("cut", [1, 10])
def test_what_moves_onto_copies_can_be_reached(M, cut, tmp_path):
    """What is taken out, too, cuts groups off: hundreds could not be reached, and only those that came were counted."""
    base = drawn_for({}, 60)
    vectors = base[np.random.default_rng(5).integers(0, 60, 600)]
    index = HNSW(16, M=M, ef_construction=16, workers=1)
    index.add(drawn_for({}, 600, 7))
    for begin in range(0, 600, cut):
        ids = np.arange(begin, begin + cut)
        index.add(vectors[ids], ids, update=True)
        # Before, some that came were no copies.
        if begin % 50 == 0 and begin >= 400:
            assert index.stats()["unreachable"] == 0
            assert not index._changes.is_crowded
    assert (index.search(vectors, 1, 700)[1] == 0).all()
    check_graph(index)
    # Where a call is not to look, the next does, also of what a file holds.
    index.update(np.arange(300), base[np.arange(300) % 7], repair=False)
    index.save(tmp_path / "i.anb")
    for held in (index, HNSW.load(tmp_path / "i.anb")):
        assert held._changes.is_crowded
        held.add(drawn_for({}, 1, 9))
        assert held.stats()["unreachable"] == 0
