"""What walks may miss is looked for: whatever came, moved and went, every element can be reached, and finds itself as in a fresh index."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anabranch.graph import HNSW
from anabranch.graph.hnsw import layout
from anabranch.graph.hnsw.linking import Linker
from anabranch.graph.hnsw.raw import address, kernel
from anabranch.graph.hnsw.suspects import NOW, WATCHED, behind_gap, is_far_off
from anabranch.graph.live import LiveIndex
from hnsw_checks import check_graph, graph_bytes

DIM, COUNT, APART = 16, 1600, 20
# Elements of a group that moves, one group after another.
SIZES = [20, 160, 80, 20, 160, 100, 160, 20, 100, 160, 80, 160]


def around(rng, count, apart=0):
    """A group about a middle of its own."""
    return (rng.standard_normal((count, DIM)) + apart * rng.standard_normal(DIM)).astype(np.float32)


def made(**options):
    return HNSW(DIM, **{"ef_construction": 40, "workers": 1, **options})


def finds_itself(index):
    """Share of the elements that are the nearest of their own vectors."""
    id_N = index.ids
    return (index.search(index.vectors(id_N), 1)[0][:, 0] == id_N).mean()


def fresh(index, seed=0):
    """The same vectors in an index of their own, in any order."""
    id_N = np.random.default_rng(seed).permutation(index.ids)
    other = HNSW(DIM, index.metric, index.M, index.ef_construction, workers=1)
    other.add(index.vectors(id_N), id_N)
    return other


def check(index, margin=0.01):
    """Nothing is cut off, and nothing found less than where all came at once, by more than a margin."""
    check_graph(index)
    assert index.stats()["unreachable"] == 0
    assert finds_itself(index) >= finds_itself(fresh(index)) - margin


WAYS = {
    "add": lambda index, id_N, vector_ND: index.add(vector_ND, id_N, update=True),
    "update": lambda index, id_N, vector_ND: index.update(id_N, vector_ND),
    "in parts": lambda index, id_N, vector_ND: [
        index.add(vector_ND[begin : begin + 32], id_N[begin : begin + 32], update=True)
        for begin in range(0, len(id_N), 32)
    ],
    "out and in": lambda index, id_N, vector_ND: (index.remove(id_N), index.add(vector_ND, id_N)),
}


@pytest.mark.parametrize("way", WAYS)
def test_groups_that_move_are_found(way):
    rng = np.random.default_rng(0)
    index = made()
    index.add(around(rng, COUNT))
    for size in SIZES:
        WAYS[way](index, rng.choice(COUNT, size, replace=False), around(rng, size, APART))
    assert index.stats()["unreachable"] == 0
    assert finds_itself(index) >= 0.98
    check(index)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("M", [4, 16])
def test_single_elements_that_move_one_by_one_are_found(metric, M):
    rng = np.random.default_rng(1)
    index = made(metric=metric, M=M)
    index.add(around(rng, 600))
    for size in (20, 100, 60):
        for id, vector in zip(rng.choice(600, size, replace=False), around(rng, size, APART), strict=True):
            index.add(vector, [id], update=True)
    check(index, margin=0.02)


def test_a_live_index_finds_groups_that_are_put_again(tmp_path):
    rng = np.random.default_rng(0)
    index = made()
    index.add(around(rng, COUNT))
    index.save(tmp_path / "index.anb")
    with LiveIndex.open(tmp_path / "index.anb", fsync="never", workers=1) as live:
        for size in SIZES:
            live.upsert(rng.choice(COUNT, size, replace=False), around(rng, size, APART))
        check(live.index)


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_sorted_by_far_groups_are_found(seed):
    rng = np.random.default_rng(seed)
    of_N, middle = np.sort(rng.integers(0, 15, 3000)), rng.standard_normal((15, DIM)) * APART
    index = made()
    index.add((middle[of_N] + rng.standard_normal((3000, DIM))).astype(np.float32))
    check(index, margin=0.005)


def test_small_groups_among_a_large_batch_are_found(monkeypatch):
    """They lie anywhere in it, so that no two of a group need be held against each other."""
    from anabranch.graph.hnsw import linking

    rng = np.random.default_rng(5)
    index = made()
    index.add(around(rng, 4000))
    groups = np.concatenate([around(rng, 12, 4) for _ in range(20)])
    some = np.concatenate([groups, around(rng, 760)])
    order = rng.permutation(len(some))
    monkeypatch.setattr(linking, "SHARE", 4)
    index.add(some[order])
    id_G = 4000 + np.flatnonzero(order < len(groups))
    assert (index.search(some[order][id_G - 4000], 1)[0][:, 0] == id_G).mean() == 1
    assert index.stats()["unreachable"] == 0


@pytest.mark.parametrize("when", [1, 3, 6])
def test_what_ends_in_the_middle_leaves_nothing_cut_off(when, monkeypatch):
    rng = np.random.default_rng(2)
    index = made()
    index.add(around(rng, COUNT))
    own = Linker._one_by_one
    for turn, size in enumerate(SIZES[:6]):
        left = [when]

        def ends(linker, *arguments, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise MemoryError
            return own(linker, *arguments)

        group = around(rng, size, APART)
        monkeypatch.setattr(Linker, "_one_by_one", ends)
        try:
            if turn % 2:
                index.update(rng.choice(COUNT, size, replace=False), group)
            else:
                index.add(group)
        except MemoryError:
            pass
        monkeypatch.setattr(Linker, "_one_by_one", own)
        assert index.stats()["unreachable"] == 0
    check_graph(index)
    assert finds_itself(index) > 0.97


def test_bytes_of_moved_groups_are_the_same_with_any_threads():
    found = []
    for workers in (1, 3):
        rng = np.random.default_rng(3)
        index = made()
        index.add(around(rng, COUNT), workers=workers)
        for size in SIZES[:5]:
            ids = rng.choice(COUNT, size, replace=False)
            index.add(around(rng, size, APART), ids, update=True, workers=workers)
        found.append(graph_bytes(index))
    assert found[0] == found[1]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "move", "move alone", "update", "out and in", "remove", "interrupt"]),
        st.integers(1, 60),
        st.sampled_from([0, 2, APART]),
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=12, deadline=None)
@given(STEPS, st.sampled_from(["l2", "cosine"]), st.integers(0, 2**20))
@example([("move", 60, APART)] * 10, "l2", 0)
def test_any_history_leaves_every_element_where_walks_find_it(steps, metric, seed):
    rng = np.random.default_rng(seed)
    index = made(metric=metric)
    index.add(around(rng, 300))
    for kind, size, apart in steps:
        group, size = around(rng, size, apart), min(size, len(index))
        id_N = rng.choice(index.ids, size, replace=False)
        if kind == "add":
            index.add(group)
        elif kind == "move":
            index.add(group[:size], id_N, update=True)
        elif kind == "move alone":
            for id, vector in zip(id_N[:8], group, strict=False):
                index.add(vector, [id], update=True)
        elif kind == "update":
            index.update(id_N, group[:size])
        elif kind == "remove":
            index.remove(id_N[: len(index) // 3])
        elif kind == "out and in":
            index.remove(id_N)
            index.add(group[:size], id_N)
        else:
            ends_early(index, group)
    check(index, margin=0.03)


def ends_early(index, group):
    """An `add` for which memory ends behind its first elements."""
    own = Linker.link

    def link(linker, slot_S, *arguments):
        own(linker, slot_S[: len(slot_S) // 2], *arguments)
        raise MemoryError

    try:
        Linker.link = link
        with pytest.raises(MemoryError):
            index.add(np.concatenate([group, group + 1]))
    finally:
        Linker.link = own


def test_a_repair_looks_for_every_element():
    rng = np.random.default_rng(4)
    index = made()
    index.add(around(rng, 900))
    held = index._storage
    # No list leads to these any more, and no change tells of that.
    for slot in (5, 800):
        for row in held.links[:900]:
            row[:] = np.append(row[row != slot], [-1] * (row == slot).sum())
        held.upper[: held.num_upper][held.upper[: held.num_upper] == slot] = held.graph[layout.ENTRY]
    held.suspect[:900] = 0
    assert finds_itself(index) < 1
    assert index.repair() > 0
    assert finds_itself(index) == 1
    assert index.repair() == 0


GRAPH = made()._storage.graph


# Helpers are for kernels alone.
@kernel
def gap(graph, found_d):
    return behind_gap(graph, found_d, len(found_d))


@kernel
def far_off(graph, found_d, found_i, scratch):
    return is_far_off(graph, found_d, found_i, len(found_d), address(scratch))


@pytest.mark.parametrize(
    ("distances", "first"),
    [
        ([], 0),
        ([1], 1),
        ([1, 63], 2),
        ([1, 65], 1),
        ([1, 2, 31], 3),
        ([1, 2, 33], 2),
        ([1, 2, 3, 25], 3),
        ([1, 2, 3, 4, 15], 5),
        ([1, 2, 3, 4, 17], 4),
        ([1, 2, 3, 4, 5, 21, 22], 5),
        # Equals are no scale.
        ([0, 0, 0, 0, 0, 9], 6),
    ],
)
def test_where_a_gap_is(distances, first):
    assert gap(GRAPH, np.array(distances, np.float32)) == first


def test_inner_products_have_no_gaps():
    plain, cosine = (HNSW(DIM, metric, workers=1)._storage.graph for metric in ("ip", "cosine"))
    distance_C = np.array([1, 100], np.float32)
    assert gap(plain, distance_C) == 2
    assert gap(cosine, distance_C) == 1


def test_distances_of_bits_are_not_squared():
    bits = HNSW(64, "hamming", workers=1)._storage.graph
    for distances, first in (([1, 7], 2), ([1, 9], 1), ([1, 2, 3, 4, 7], 5), ([1, 2, 3, 4, 9], 4)):
        assert gap(bits, np.array(distances, np.float32)) == first


def test_what_the_nearest_alone_leave_out_is_not_marked():
    simple = HNSW(DIM, heuristic="simple", workers=1)._storage.graph
    assert gap(simple, np.array([1, 100], np.float32)) == 2


def test_far_off_is_by_what_lies_about_the_nearest():
    index = HNSW(2, workers=1)
    index.add(np.array([[0, 0], [1, 0], [0, 1], [1, 1], [2, 0], [0, 2]], np.float32))
    graph, own = index._storage.graph, np.empty(index._storage.graph[layout.WIDTH], np.float32)
    links = index._storage.links[0]
    most = max(float((index.vectors([slot]) ** 2).sum()) for slot in links[links >= 0][:4])
    for times, is_far in ((3.9, False), (4.1, True)):
        found_d, found_i = np.array([times * most], np.float32), np.zeros(1, np.int32)
        assert bool(far_off(graph, found_d, found_i, own)) == is_far


def test_even_vectors_are_hardly_ever_suspects():
    """So looking for them costs nothing there."""
    index = made(ef_construction=100)
    index.add(around(np.random.default_rng(7), 3000))
    assert (index._storage.suspect[:3000] & (NOW | WATCHED) > 0).mean() < 0.03
