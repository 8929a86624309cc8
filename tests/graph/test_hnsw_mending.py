"""What level 0 does not lead to is linked whatever the lists hold, nothing else is lost by it, and no change pays for what others did."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anabranch.graph import HNSW
from anabranch.graph.hnsw import layout, linking
from anabranch.graph.hnsw.linking import EQUALS
from hnsw_checks import check_graph, graph_bytes

DIM = 4


def group(rng, count, dim=16, apart=20):
    return (rng.standard_normal((count, dim)) + apart * rng.standard_normal(dim)).astype(np.float32)


def finds_itself(index):
    id_N = index.ids
    return (index.search(index.vectors(id_N), 1)[0][:, 0] == id_N).mean()


def with_links(lists, M, vector_ND=None, **options):
    """An index on level 0 alone whose lists are these."""
    if vector_ND is None:
        vector_ND = np.random.default_rng(0).standard_normal((len(lists), DIM)).astype(np.float32)
    index = HNSW(DIM, M=M, ef_construction=max(M, 4), flat=True, workers=1, **options)
    index.add(vector_ND)
    held = index._storage
    held.links[: len(lists)] = -1
    for slot, links in enumerate(lists):
        held.links[slot, : len(links)] = links
    held.graph[layout.ENTRY] = 0
    return index


def reached_from(index, start):
    """Plainly, by the lists as they are."""
    links, found, queue = index._storage.links, {start}, [start]
    while queue:
        for other in links[queue.pop()].tolist():
            if other >= 0 and other not in found:
                found.add(other)
                queue.append(other)
    return found


def test_a_full_list_gives_up_the_farthest_link_that_is_no_way_to_others():
    # 0 to 4 lead to each other, and nothing to 5. All lists are full.
    index = with_links([[other for other in range(5) if other != slot] for slot in range(5)] + [[0, 1, 2, 3]], M=2)
    held, vector_ND = index._storage, index.vectors(np.arange(6))
    distance_NN = ((vector_ND[:, None] - vector_ND) ** 2).sum(2)
    assert index.stats()["unreachable"] == 1
    assert index._linker.repair() == 1
    # 0's links are the ways to all others, so it keeps them, however near 5 is.
    assert held.links[0].tolist() == [1, 2, 3, 4]
    nearest = min(range(1, 5), key=lambda slot: distance_NN[5, slot])
    gone = max({*range(5)} - {nearest}, key=lambda slot: distance_NN[nearest, slot])
    assert set(held.links[nearest].tolist()) == {*range(6)} - {nearest, gone}
    assert reached_from(index, 0) == {*range(6)}


def test_room_is_taken_before_a_link():
    index = with_links([[1, 2, 3, 4], [0, 2, 3, 4], [0, 1], [0, 1, 2, 4], [0, 1, 2, 3], []], M=2)
    assert index._linker.repair() == 1
    assert index._storage.links[2].tolist() == [0, 1, 5, -1]


@pytest.mark.parametrize(
    ("places", "lists", "nearest_leads_to"),
    [
        # Nothing lies behind a gap: the farthest goes.
        (
            [0, 1, 2, 3, 4, 1000],
            [[1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3], [0]],
            {1, 2, 3, 5},
        ),
        # The farthest before the gap goes, so that what lies behind it is led to as before.
        (
            [0, 1, 2, 3, 4, 1000, -900],
            [[1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 4], [1, 2, 3, 6], [0], [0, 1, 2, 3]],
            {2, 3, 5, 6},
        ),
    ],
)
def test_what_no_list_takes_by_the_nearest_alone_is_put_in(places, lists, nearest_leads_to):
    vector_ND = np.zeros((len(places), DIM), np.float32)
    vector_ND[:, 0] = places
    index = with_links(lists, 2, vector_ND, heuristic="simple")
    held, slot_S = index._storage, np.array([5])
    with linking.Marks(held) as marks:
        assert linking.link_lost(held.graph, marks, slot_S, 0, 1, 32) == 1
    assert set(held.links[4].tolist()) == nearest_leads_to


@st.composite
def any_lists(draw):
    """Lists of any graph of some elements, most of them full."""
    count, M = draw(st.integers(2, 40)), draw(st.integers(2, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    parts = rng.integers(0, draw(st.integers(1, 5)), count)
    lists = []
    for slot in range(count):
        near = np.flatnonzero((parts == parts[slot]) & (np.arange(count) != slot))
        most = 2 * M if rng.random() < 0.8 else int(rng.integers(0, 2 * M + 1))
        lists.append(rng.permutation(near)[:most].tolist())
    return lists, M


@settings(max_examples=60, deadline=None)
@given(any_lists(), st.integers(1, 4))
@example(([[other for other in range(5) if other != slot][:4] for slot in range(9)], 2), 1)
def test_any_graph_is_whole_after_a_repair(graph, at_once):
    lists, M = graph
    index = with_links(lists, M)
    before = reached_from(index, 0)
    lost = {*range(len(lists))} - before
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(linking, "EQUALS", at_once)
        linked = index._linker.repair()
    assert reached_from(index, 0) == {*range(len(lists))}
    assert bool(lost) == (linked > 0)
    assert linked <= len(lost)
    check_graph(index)
    assert index._linker.repair() == 0


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_groups_that_move_by_the_nearest_alone_cost_what_they_touch(metric, monkeypatch):
    """R21b S1: nearly all were cut off, `repair` found no room, and each change took all of them again."""
    rng = np.random.default_rng(2)
    index = HNSW(16, metric, workers=1, ef_construction=40, heuristic="simple")
    index.add(np.concatenate([group(rng, 60) for _ in range(25)]))
    for size in (1, 20, 100, 1, 20, 100, 100, 20):
        index.add(group(rng, size), rng.choice(1500, size, replace=False), update=True)
        assert index.stats()["unreachable"] == 0
    touched = []
    for name in ("link_lost", "repair_links", "find_lost"):
        monkeypatch.setattr(linking, name, counted(getattr(linking, name), name, touched))
    index.add(group(rng, 1), [5], update=True)
    assert sum(touched) < 100
    index.repair()
    assert index.stats()["unreachable"] == 0
    check_graph(index)


def counted(kernel, name, touched):
    """A kernel that tells how many elements it looked for, or linked."""

    def called(*arguments):
        found = kernel(*arguments)
        touched.append(found[0] if name == "repair_links" else arguments[4] - arguments[3])
        return found

    return called


def test_a_repair_finds_what_the_nearest_alone_lose():
    rng = np.random.default_rng(1)
    index = HNSW(16, workers=1, heuristic="simple", M=8)
    index.add(np.concatenate([group(rng, 30) for _ in range(40)]))
    for size in (20, 100, 20):
        index.add(group(rng, size), rng.choice(1200, size, replace=False), update=True)
    before = finds_itself(index)
    assert index.repair() > 0
    assert finds_itself(index) > max(before, 0.98)
    assert index.stats()["unreachable"] == 0


def test_the_nearest_alone_are_not_looked_for():
    """So that it can be seen what the heuristic does."""
    rng = np.random.default_rng(0)
    index = HNSW(16, workers=1, heuristic="simple", ef_construction=40)
    index.add(np.concatenate([group(rng, 40) for _ in range(20)]))
    assert not index._storage.suspect[:800].any()


def test_searches_come_in_while_many_are_linked(monkeypatch):
    lists = [[] for _ in range(5 * EQUALS)]
    index = with_links(lists, M=2)
    rooms = []
    monkeypatch.setattr(index._lock, "make_room", lambda: rooms.append(1))
    assert index._linker.repair() == 5 * EQUALS - 1
    assert len(rooms) >= 5


def test_bytes_of_a_repair_are_those_of_any_threads():
    found = []
    for workers in (1, 2, 5):
        rng = np.random.default_rng(3)
        index = HNSW(16, workers=workers, ef_construction=40, heuristic="simple")
        index.add(np.concatenate([group(rng, 60) for _ in range(20)]))
        index.add(group(rng, 100), np.arange(0, 1200, 12), update=True)
        index.repair()
        found.append(graph_bytes(index))
    assert found[0] == found[1] == found[2]


NEXT = {
    "add": lambda index: index.add(np.zeros((1, 16), np.float32)),
    "remove": lambda index: index.remove([5]),
    "restore": lambda index: index.restore([1]),
    "update": lambda index: index.update([7], np.zeros((1, 16), np.float32)),
    "compact": lambda index: index.compact(),
    "compact of nothing": lambda index: index.compact(),
}


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("change", NEXT)
def test_what_was_not_to_be_repaired_is_so_by_the_next_change(change, is_read, tmp_path):
    rng = np.random.default_rng(0)
    index = HNSW(16, M=2, ef_construction=10, workers=1, compact_at=None)
    index.add(rng.standard_normal((800, 16)).astype(np.float32))
    if change != "compact of nothing":
        index.remove([1, 2])
    index.update(index.ids[:300], rng.standard_normal((300, 16)).astype(np.float32), repair=False)
    assert index.stats()["unreachable"] > 100
    if is_read:
        index.save(tmp_path / "i.anb")
        index = HNSW.load(tmp_path / "i.anb", mmap=True, workers=1)
    NEXT[change](index)
    assert index.stats()["unreachable"] == 0
    check_graph(index)
