"""What is to be looked for: found by blocks as by a look at all, and kept in files and pickles, which go on as if they had never been."""

import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anabranch.errors import DataError, InputError
from anabranch.graph import HNSW, FullyPPR, Graph, PowerWalk
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.hnsw import ShardedHNSW, layout, watch
from anabranch.graph.hnsw.storage import KIND, VERSION, VERSIONS
from anabranch.graph.hnsw.suspects import NOW, WATCHED
from anabranch.graph.hnswlib_compat import Index
from anabranch.graph.live import LiveIndex
from hnsw_checks import check_graph, graph_bytes

DIM, APART = 16, 20


def around(rng, count, apart=0):
    return (rng.standard_normal((count, DIM)) + apart * rng.standard_normal(DIM)).astype(np.float32)


def made(**options):
    return HNSW(DIM, **{"M": 8, "ef_construction": 40, "workers": 1, **options})


def blocks_hold_all(index):
    """Whether each block has all marks of its slots."""
    held = index._storage
    for slot in np.flatnonzero(held.suspect[: held.count] & (NOW | WATCHED)).tolist():
        mark = int(held.suspect[slot]) & (NOW | WATCHED)
        if int(held.blocks[slot >> layout.BLOCK]) & mark != mark:
            return False
    return True


@settings(max_examples=40, deadline=None)
@given(
    marked=st.lists(st.tuples(st.integers(0, 4999), st.sampled_from([NOW, WATCHED, NOW | WATCHED])), max_size=40),
    piece=st.sampled_from([1, 3, 1 << 12]),
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=8),
)
def test_marked_slots_are_found_as_by_a_look_at_all(marked, piece, counts):
    index = EMPTY
    held, known = index._storage, index._linker.watch
    held.suspect[:5000] = 0
    held.blocks[:] = 0
    known._turn = 0
    for slot, mark in marked:
        known.mark(np.array([slot, -1], np.int32), mark)
    now = sorted({slot for slot, mark in marked if mark & NOW})
    watched = np.array(sorted({slot for slot, mark in marked if mark & WATCHED}), np.int64)
    turn = 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(watch, "PIECE", piece)
        for count in counts:
            place = int(np.searchsorted(watched, turn))
            wanted = np.concatenate([watched[place:], watched[:place]])[:count]
            assert known.in_turn(count).tolist() == wanted.tolist()
            turn = int(wanted[-1]) + 1 if len(wanted) else 0
        assert known.take().tolist() == now
        assert known.take().tolist() == []
    assert not (held.suspect[:5000] & NOW).any()
    # So nothing is looked through for what was taken.
    assert not (held.blocks & NOW).any()
    assert np.flatnonzero(held.suspect[:5000]).tolist() == watched.tolist()


EMPTY = made()
EMPTY.add(np.random.default_rng(0).standard_normal((5000, DIM)).astype(np.float32)[:, :DIM], workers=2)


def test_marks_come_along_when_slots_are_numbered_anew():
    index = made()
    index.add(around(np.random.default_rng(0), 3000))
    index._storage.suspect[:3000] = 0
    index._storage.blocks[:] = 0
    index._linker.watch.mark(np.array([2500, 2999]), WATCHED)
    # More than a fifth, which is taken out; arrays stay as large as they are.
    index.remove(np.arange(700))
    assert index._storage.count == 2300 < index._storage.capacity
    assert set(np.flatnonzero(index._storage.suspect[:2300] & WATCHED).tolist()) >= {1800, 2299}
    assert blocks_hold_all(index)
    # More room is made.
    index.add(around(np.random.default_rng(1), 4000))
    assert blocks_hold_all(index)


@pytest.mark.parametrize("how", ["file", "mapped", "pickle"])
def test_what_is_due_is_due_when_it_is_read(tmp_path, how):
    index = made()
    index.add(around(np.random.default_rng(0), 300))
    index._linker.is_suspect, index._linker.watch.owed, index._linker.watch._turn = True, 5, 77
    read = again(index, how, tmp_path)
    assert (read._linker.is_suspect, read._linker.watch.owed, read._linker.watch._turn) == (True, 5, 77)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "one", "move", "update", "remove", "out and in", "compact", "repair", "restore"]),
        st.integers(1, 50),
        st.sampled_from([0, APART]),
    ),
    min_size=2,
    max_size=9,
)


def take_step(index, kind, group, rng):
    size = min(len(group), len(index) // 2)
    id_N = rng.choice(index.ids, size, replace=False)
    if kind == "add":
        index.add(group)
    elif kind == "one":
        for vector in group[:6]:
            index.add(vector)
    elif kind == "move":
        index.add(group[:size], id_N, update=True)
    elif kind == "update":
        index.update(id_N, group[:size], repair=False)
    elif kind == "remove":
        index.remove(id_N)
    elif kind == "restore":
        index.remove(id_N)
        index.restore(id_N)
    elif kind == "out and in":
        # Others stay vacant.
        index.remove(id_N)
        index.add(group[: -(-size // 2)], id_N[: -(-size // 2)])
    else:
        getattr(index, kind)()


def again(index, how, folder):
    if how == "pickle":
        return pickle.loads(pickle.dumps(index))
    index.save(folder / "i.anb")
    return HNSW.load(folder / "i.anb", mmap=how == "mapped", workers=1)


@settings(max_examples=25, deadline=None)
@given(STEPS, st.integers(0, 2**20), st.sampled_from(["file", "mapped", "pickle"]), st.sampled_from(["l2", "cosine"]))
@example([("add", 40, APART)] * 6 + [("one", 6, APART)] * 3, 0, "file", "l2")
@example([("out and in", 50, APART), ("out and in", 50, 0), ("one", 4, 0), ("add", 30, 0)], 1, "pickle", "l2")
@example([("update", 50, APART), ("remove", 20, 0), ("one", 4, APART), ("move", 30, APART)], 2, "mapped", "cosine")
def test_what_is_read_goes_on_to_the_same_bytes(tmp_path_factory, steps, seed, how, metric):
    """R21b F1: marks were not kept, nor which places were vacant."""
    folder = tmp_path_factory.mktemp("again")
    rng = np.random.default_rng(seed)
    start, index = around(rng, 200), made(metric=metric, compact_at=None)
    index.add(start)
    read = again(index, how, folder)
    for kind, size, apart in steps:
        group, state = around(rng, size, apart), rng.integers(2**30)
        for one in (index, read):
            take_step(one, kind, group, np.random.default_rng(state))
        assert blocks_hold_all(index)
        assert graph_bytes(index) == graph_bytes(read)
        read = again(read, how, folder)
        assert blocks_hold_all(read)
        assert graph_bytes(index) == graph_bytes(read)
    assert index._storage.vacant_S.tolist() == read._storage.vacant_S.tolist()
    assert index._linker.linked == read._linker.linked
    check_graph_but_vacant(read)


def check_graph_but_vacant(index):
    """`check_graph` looks at levels, which places that are vacant have none of."""
    index.compact()
    check_graph(index)


def groups_of(index, rng, count):
    for _ in range(count):
        index.add(around(rng, 30, APART))


def test_shards_and_hnswlib_go_on_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    shards, other = ShardedHNSW(DIM, 2, M=8, ef_construction=40, workers=1), Index("l2", DIM)
    other.init_index(2000, ef_construction=40, M=8)
    for _ in range(8):
        group = around(rng, 40, APART)
        shards.add(group)
        other.add_items(group)
    shards.save(tmp_path / "shards")
    other.save_index(str(tmp_path / "other"))
    shards_again, other_again = ShardedHNSW.load(tmp_path / "shards"), Index("l2", DIM)
    other_again.load_index(str(tmp_path / "other"), 2000)
    for _ in range(8):
        group = around(rng, 20, APART)
        for one in (shards, shards_again):
            one.add(group)
        for one in (other, other_again):
            one.add_items(group)
    pairs = [*zip(shards.shards, shards_again.shards, strict=True), (other._made(), other_again._made())]
    assert all(graph_bytes(one) == graph_bytes(two) for one, two in pairs)


def test_a_live_index_goes_on_from_its_snapshot(tmp_path):
    rng = np.random.default_rng(3)
    index = made()
    index.add(around(rng, 300))
    index.save(tmp_path / "i.anb")
    live = LiveIndex.open(tmp_path / "i.anb", fsync="never", workers=1)
    for number in range(6):
        live.upsert(range(1000 + 40 * number, 1040 + 40 * number), around(rng, 40, APART))
    live.snapshot()
    live.close()
    with LiveIndex.open(tmp_path / "i.anb", fsync="never", workers=1) as again:
        assert graph_bytes(again.index) == graph_bytes(live.index)
        for number in range(4):
            group, ids = around(rng, 20, APART), range(2000 + 20 * number, 2020 + 20 * number)
            again.upsert(ids, group)
            live.index.add(group, list(ids), update=True)
        assert graph_bytes(again.index) == graph_bytes(live.index)


def as_before(path):
    """The file as an earlier release wrote it."""
    found = read_arrays(path, KIND, versions=VERSIONS)
    assert found.version == VERSION
    arrays = {name: array for name, array in found.arrays.items() if name != "suspect"}
    arrays["deleted"] = np.minimum(arrays["deleted"], 1)
    meta = {name: value for name, value in found.meta.items() if name != "watched"}
    write_arrays(path, KIND, arrays, meta, 1)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_file_of_an_earlier_release_is_watched_by_its_lists(tmp_path, mmap):
    rng = np.random.default_rng(6)
    index = made(M=16)
    index.add(np.concatenate([around(rng, 500), around(rng, 30, APART)]))
    index.save(tmp_path / "index.anb")
    as_before(tmp_path / "index.anb")
    again = HNSW.load(tmp_path / "index.anb", mmap=mmap, workers=1)
    assert not again._storage.suspect[:530].any()
    # Saved again before that was seen.
    again.save(tmp_path / "index.anb")
    again = HNSW.load(tmp_path / "index.anb", mmap=mmap, workers=1)
    again.add(around(rng, 30, APART))
    is_watched_N = again._storage.suspect[:560] & WATCHED > 0
    assert is_watched_N[500:].mean() > 0.5
    assert is_watched_N[:500].mean() < 0.2
    assert blocks_hold_all(again)


def test_vacant_places_of_an_earlier_release_are_used_again(tmp_path):
    index = with_vacant()
    index.save(tmp_path / "index.anb")
    as_before(tmp_path / "index.anb")
    again = HNSW.load(tmp_path / "index.anb", workers=1)
    assert again._storage.vacant_S.tolist() == index._storage.vacant_S.tolist()
    again.add(around(np.random.default_rng(1), 10))
    assert again._storage.count == index._storage.count
    check_graph_but_vacant(again)


def test_an_entry_without_an_id_of_an_earlier_release_is_no_vacant_place(tmp_path):
    """All else is gone: nothing leads to it, and it leads nowhere, as to and from a place that is vacant."""
    index = made(compact_at=None)
    index.add(around(np.random.default_rng(0), 1))
    index.remove([0])
    index.save(tmp_path / "index.anb")
    as_before(tmp_path / "index.anb")
    found = read_arrays(tmp_path / "index.anb", KIND, versions=VERSIONS)
    arrays = {name: np.array(array) for name, array in found.arrays.items()}
    arrays["label"][0] = -1
    write_arrays(tmp_path / "index.anb", KIND, arrays, dict(found.meta), 1)
    again = HNSW.load(tmp_path / "index.anb", workers=1)
    assert (len(again), len(again._storage.vacant_S)) == (0, 0)
    group = around(np.random.default_rng(1), 40)
    id_N = again.add(group)
    assert (again.search(group, 1)[0][:, 0] == id_N).all()
    assert again.stats()["unreachable"] == 0


def test_a_file_of_an_earlier_release_has_no_mark_of_a_vacant_place(tmp_path):
    index = with_vacant()
    index.save(tmp_path / "index.anb")
    as_before(tmp_path / "index.anb")
    found = read_arrays(tmp_path / "index.anb", KIND, versions=VERSIONS)
    arrays = {name: np.array(array) for name, array in found.arrays.items()}
    arrays["deleted"][index._storage.vacant_S[3]] = 2
    write_arrays(tmp_path / "index.anb", KIND, arrays, dict(found.meta), 1)
    with pytest.raises(DataError, match="do not fit together"):
        HNSW.load(tmp_path / "index.anb")


CHANGES = {
    "nothing": lambda index: None,
    "repair": lambda index: index.repair(),
    "move": lambda index: index.add(around(np.random.default_rng(2), 1), [100], update=True),
    "add": lambda index: index.add(around(np.random.default_rng(2), 30), reuse=False),
}


@pytest.mark.parametrize("is_linked", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_what_an_earlier_release_held_is_saved_so_that_it_can_be_read(tmp_path, what, is_linked):
    """R21c: places without an id were linked again by a repair, and the file that was saved then led to vacant places."""
    path, index = tmp_path / "index.anb", with_vacant()
    vacant = int(index._storage.vacant_S[3])
    index.save(path)
    as_before(path)
    if is_linked:
        # As a repair of that release left them.
        found = read_arrays(path, KIND, versions=VERSIONS)
        arrays = {name: np.array(array) for name, array in found.arrays.items()}
        roomy = int(np.flatnonzero((arrays["links"][:, -1] < 0) & (arrays["deleted"] == 0))[0])
        arrays["links"][roomy, (arrays["links"][roomy] >= 0).sum()] = vacant
        write_arrays(path, KIND, arrays, dict(found.meta), 1)
    again = HNSW.load(path, workers=1)
    assert len(again._storage.vacant_S) == 20 - is_linked
    CHANGES[what](again)
    again.save(path)
    read = HNSW.load(path, workers=1)
    for one in (read, pickle.loads(pickle.dumps(read))):
        assert {**one.stats(), "size_bytes": 0} == {**again.stats(), "size_bytes": 0}
    assert again.stats()["unreachable"] == 0
    # Nothing comes back under no id.
    assert (read.ids >= 0).all()
    check_graph_but_vacant(read)


def with_vacant():
    rng = np.random.default_rng(0)
    index = made(compact_at=None)
    index.add(around(rng, 300))
    index.remove(np.arange(40))
    index.add(around(rng, 20))
    assert len(index._storage.vacant_S) == 20
    return index


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("what", ["links", "entry", "deleted", "shape", "turn", "watched"])
def test_files_that_lead_to_vacant_places_are_damaged(tmp_path, what, mmap):
    index = with_vacant()
    vacant, path = int(index._storage.vacant_S[3]), tmp_path / "i.anb"
    index.save(path)
    found = read_arrays(path, KIND, versions=VERSIONS)
    arrays, meta = {name: np.array(array) for name, array in found.arrays.items()}, dict(found.meta)
    if what == "links":
        arrays["links"][200, 0] = vacant
    elif what == "entry":
        meta["entry"], meta["top"] = vacant, int(arrays["level"][vacant])
        arrays["level"][arrays["deleted"] == 0] = 0
    elif what == "deleted":
        arrays["deleted"][200] = 3
    elif what == "shape":
        arrays["suspect"] = arrays["suspect"][:-1]
    elif what == "turn":
        meta["watched"] = {**meta["watched"], "turn": -1}
    else:
        meta["watched"] = 3
    write_arrays(path, KIND, arrays, meta, VERSION)
    with pytest.raises(DataError):
        HNSW.load(path, mmap=mmap)


def test_whatever_marks_a_file_holds_do_no_harm(tmp_path):
    rng = np.random.default_rng(0)
    index = made()
    index.add(around(rng, 300))
    path = tmp_path / "i.anb"
    index.save(path)
    found = read_arrays(path, KIND, versions=VERSIONS)
    arrays = {**found.arrays, "suspect": rng.integers(0, 256, 300).astype(np.uint8)}
    meta = {**found.meta, "watched": {"turn": 2**40, "owed": 2**40, "known": 7, "suspect": "x"}}
    write_arrays(path, KIND, arrays, meta, VERSION)
    again = HNSW.load(path, workers=1)
    again.add(around(rng, 20, APART))
    again.remove([3])
    again.compact()
    check_graph(again)
    assert again.stats()["unreachable"] == 0


@pytest.mark.parametrize("is_read", [False, True])
def test_what_is_restored_is_looked_for(tmp_path, is_read):
    rng = np.random.default_rng(1)
    index = made(compact_at=None)
    index.add(around(rng, 1000))
    id_GS = [np.arange(1000 + 40 * number, 1040 + 40 * number) for number in range(6)]
    for id_S in id_GS:
        index.add(around(rng, 40, APART), id_S)
    gone = np.concatenate(id_GS[:3])
    index.remove(gone)
    for _ in range(8):
        index.add(around(rng, 60, APART), rng.choice(1000, 60, replace=False), update=True, reuse=False)
    if is_read:
        # What is mapped may not be written.
        index.save(tmp_path / "i.anb")
        index = HNSW.load(tmp_path / "i.anb", mmap=True, workers=1)
    index.restore(gone)
    assert (index.search(index.vectors(gone), 1)[0][:, 0] == gone).all()
    assert index.stats()["unreachable"] == 0


@pytest.mark.parametrize("wrong", [{"verify": "x"}, {"verify": 3}, {"verify": 0}, {"mmap": "no"}, {"mmap": 1}])
def test_how_a_file_is_read_is_said_by_truth_values(tmp_path, wrong):
    graph = Graph.from_edges([0, 1, 2], [1, 2, 0])
    made().save(tmp_path / "index")
    ShardedHNSW(DIM, 2).save(tmp_path / "shards")
    graph.save(tmp_path / "graph")
    PowerWalk(walks=2).build(graph).save(tmp_path / "walks")
    FullyPPR(walks=2).fit(graph).save(tmp_path / "scores")
    for load in (
        lambda **how: HNSW.load(tmp_path / "index", **how),
        lambda **how: ShardedHNSW.load(tmp_path / "shards", **how),
        lambda **how: Graph.load(tmp_path / "graph", **how),
        lambda **how: PowerWalk.load(tmp_path / "walks", graph, **how),
        lambda **how: FullyPPR.load(tmp_path / "scores", **how),
        lambda **how: FullyPPR.load(tmp_path, **how),
    ):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} is .*; it must be True or False"):
            load(**wrong)
    for right in (np.True_, False):
        HNSW.load(tmp_path / "index", mmap=right, verify=right)
