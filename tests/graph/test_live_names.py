"""An index whose elements have names takes changes by name: what was acknowledged is there after a crash, under its name."""

import contextlib
import json
import shutil
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from anabranch.errors import DataError, InputError
from anabranch.graph.hnsw import HNSW
from anabranch.graph.live import LiveIndex, background, live_folder, open_named
from anabranch.graph.live.changes import Change, decode, encode, payload_bytes
from anabranch.graph.live.log import Log
from anabranch.graph.names import GrowingNames, Names, names_path, write_names
from anabranch.graph.serve import Limits, Sources, Writes, create_app
from hnsw_checks import check_graph, drawn
from waiting import until

DIM, COUNT = 4, 20
VECTORS = drawn(300, DIM, 3)


def saved(path, names):
    index = HNSW(DIM, M=6, ef_construction=30, workers=1)
    index.add(VECTORS[: len(names)])
    index.save(path)
    write_names(path, Names(names))
    return path


@pytest.fixture
def path(tmp_path):
    return saved(tmp_path / "index.anb", [f"n{number}" for number in range(COUNT)])


def start():
    return {f"n{number}": VECTORS[number].tolist() for number in range(COUNT)}


def content(index, names):
    ids = index.ids
    return dict(zip(names.of(ids), index.vectors(ids).tolist(), strict=True))


def held(live):
    return content(live.index, live.names)


def after_a_crash(path):
    """What a new process finds: a copy of the files as they are now."""
    place = path.parent / f"crash-{time.monotonic_ns()}"
    place.mkdir()
    for file in filter(Path.exists, (path, names_path(path))):
        shutil.copy(file, place / file.name)
    if live_folder(path).exists():
        shutil.copytree(live_folder(path), live_folder(place / path.name))
    with LiveIndex.open(place / path.name, workers=1) as live:
        check_graph(live.index)
        found = held(live)
    assert content(*open_named(place / path.name)) == found
    shutil.rmtree(place)
    return found


def test_elements_come_move_and_go_by_name(path):
    with LiveIndex.open(path, workers=1) as live:
        number, known = live.upsert_named(["n3", "ä", "n5", "new"], VECTORS[100:104])
        assert (number, known.tolist()) == (1, [True, False, True, False])
        expected = start() | dict(zip(["n3", "ä", "n5", "new"], VECTORS[100:104].tolist(), strict=True))
        assert held(live) == expected == after_a_crash(path)
        assert live.names.ids_of(["n3", "ä", "new"]).tolist() == [3, COUNT, COUNT + 1]
        number, known = live.delete_named(["nobody", "ä", "n1"])
        assert (number, known.tolist()) == (2, [False, True, True])
        del expected["ä"], expected["n1"]
        assert held(live) == expected == after_a_crash(path)
        # It was there, and keeps its id.
        assert live.delete_named(["ä"])[1].tolist() == [False]
        live.upsert_named(["ä", "last"], VECTORS[110:112])
        assert live.names.ids_of(["ä", "last"]).tolist() == [COUNT, COUNT + 2]
        expected |= {"ä": VECTORS[110].tolist(), "last": VECTORS[111].tolist()}
        assert held(live) == expected == after_a_crash(path)
        # By id those that have a name.
        live.upsert([COUNT + 2], VECTORS[120:121])
        with pytest.raises(
            InputError, match=r"ids\[1\] is 23; elements of this index have names, so bring new ones in by name"
        ):
            live.upsert([0, COUNT + 3], VECTORS[:2])
        before = live.number
        assert live.delete_named(["nobody"])[0] == before == live.number
        assert (live.counts.upserted, live.counts.deleted) == (7, 2)


def test_a_snapshot_keeps_names(path, monkeypatch):
    own = background.write_snapshot
    with LiveIndex.open(path, workers=1) as live:
        live.upsert_named(["a", "b"], VECTORS[100:102])

        def watched(*arguments):
            # Changes go on meanwhile.
            live.upsert_named(["c"], VECTORS[102:103])
            assert "c" in after_a_crash(path)
            own(*arguments)

        monkeypatch.setattr(background, "write_snapshot", watched)
        live.snapshot()
        monkeypatch.undo()
        live.upsert_named(["d", "b"], VECTORS[103:105])
        assert held(live) == after_a_crash(path)
        live.snapshot()
        expected = held(live)
        assert expected == after_a_crash(path)
    assert list(expected)[-4:] == ["a", "b", "c", "d"]
    assert not [file for file in live_folder(path).iterdir() if file.name == "log-00000001"]
    # The file itself stays as it is.
    assert len(HNSW.load(path)) == COUNT


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("uds"), st.lists(st.integers(0, 40), min_size=1, max_size=4, unique=True)),
        max_size=12,
    )
)
def test_any_order_of_changes_is_there_again(tmp_path_factory, steps):
    path = saved(tmp_path_factory.mktemp("names") / "index.anb", list(range(100, 110)))
    expected = {100 + number: VECTORS[number].tolist() for number in range(10)}
    with LiveIndex.open(path, workers=1) as live:
        for place, (kind, numbers) in enumerate(steps):
            names = [95 + number for number in numbers]
            if kind == "u":
                rows = VECTORS[place * 4 : place * 4 + len(names)]
                known = live.upsert_named(names, rows)[1]
                assert known.tolist() == [name in expected for name in names]
                expected |= dict(zip(names, rows.tolist(), strict=True))
            elif kind == "d":
                assert live.delete_named(names)[1].tolist() == [name in expected for name in names]
                expected = {name: row for name, row in expected.items() if name not in names}
            else:
                live.snapshot()
        assert held(live) == expected
    assert content(*open_named(path)) == expected


def test_threads_that_bring_one_name_share_its_element(path, monkeypatch):
    own, gate = Log.sync, threading.Event()

    def slow(self):
        gate.wait(60)
        own(self)

    monkeypatch.setattr(Log, "sync", slow)
    with LiveIndex.open(path, workers=1) as live:
        found = []

        def bring(number):
            found.append(live.upsert_named(["both", f"own{number}"], VECTORS[[100 + number, 110 + number]])[1].tolist())

        threads = [threading.Thread(target=bring, args=(number,)) for number in range(6)]
        threads.append(threading.Thread(target=lambda: live.delete_named(["own99", "n0"])))
        for thread in threads:
            thread.start()
        until(lambda: len(live.groups.waiting) >= 6)
        gate.set()
        for thread in threads:
            thread.join(60)
        # One write of who came first, one of all others.
        assert live.number == 2
        assert sorted(found) == [[False, False]] + [[True, False]] * 5
        assert len(live.names) == COUNT + 7
        assert held(live) == after_a_crash(path)
        assert held(live).keys() == start().keys() - {"n0"} | {"both"} | {f"own{number}" for number in range(6)}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a"], r"names\[1\] is 'a', which stands there before"),
        (["a", 3], r"names\[1\] is 3; elements are called by text here"),
        (["\ud800", "a"], r"names\[0\] is '\\ud800'; elements are called by text here"),
        (["a"], "there are 1 names for 2 vectors"),
        (["a", "b" * 4097], r"names\[1\] is 'b{40}'\.\.\. of 4,097 characters; a new name has at most 4,096"),
    ],
)
def test_bad_names_change_nothing(path, names, message):
    with LiveIndex.open(path, workers=1) as live:
        with pytest.raises(InputError, match=message):
            live.upsert_named(names, VECTORS[:2])
        assert not live.has_changes
        live.upsert_named([], np.empty((0, DIM)))
        live.delete_named([])
        assert not live.has_changes


def test_long_names_that_are_there_stay(tmp_path):
    path = saved(tmp_path / "index.anb", ["a" * 5000, "b"])
    with LiveIndex.open(path, workers=1) as live:
        assert live.upsert_named(["a" * 5000, "c" * 4096], VECTORS[50:52])[1].tolist() == [True, False]
        assert live.delete_named(["a" * 5000])[1].tolist() == [True]


def test_a_long_name_in_a_log_of_before_is_read(path, monkeypatch):
    """From when names had no bound."""
    check = GrowingNames.check
    monkeypatch.setattr(GrowingNames, "check", lambda self, names, longest=None: check(self, names, longest=None))
    with LiveIndex.open(path, workers=1) as live:
        live.upsert_named(["d" * 5000], VECTORS[50:51])
    monkeypatch.undo()
    assert "d" * 5000 in after_a_crash(path)


def test_numbers_as_names(tmp_path):
    path = saved(tmp_path / "index.anb", [7, -5, 2**62])
    with LiveIndex.open(path, workers=1) as live:
        live.upsert_named([2**63 - 1, -5], VECTORS[50:52])
        for bad in ("a", True, 2**63, 1.0):
            with pytest.raises(InputError, match=r"names\[0\] is .*; elements are called by whole numbers here"):
                live.delete_named([bad])
        assert after_a_crash(path).keys() == {7, -5, 2**62, 2**63 - 1}
        assert live.names.array.tolist() == [7, -5, 2**62, 2**63 - 1]
    # Without signs where they had none.
    wide = saved(tmp_path / "wide.anb", np.array([2**64 - 1, 5], np.uint64))
    with LiveIndex.open(wide, workers=1) as live:
        live.upsert_named([2**64 - 2, 5], VECTORS[50:52])
        with pytest.raises(InputError, match="called by whole numbers"):
            live.upsert_named([-1], VECTORS[:1])
        assert live.names.array.tolist() == [2**64 - 1, 5, 2**64 - 2]
        assert after_a_crash(wide).keys() == {2**64 - 1, 5, 2**64 - 2}
    unnamed, index = tmp_path / "unnamed.anb", HNSW(DIM)
    index.add(VECTORS[:1])
    index.save(unnamed)
    with LiveIndex.open(unnamed) as live:
        for change in (lambda: live.upsert_named([7], VECTORS[:1]), lambda: live.delete_named([7])):
            with pytest.raises(InputError, match="have no names; give ids"):
                change()


def empty(path):
    HNSW(DIM, M=6, ef_construction=30, workers=1).save(path)
    return path


@pytest.mark.parametrize(
    ("names", "other"),
    [(["a", "ä"], 3), ([7, -5], "a"), ([2**63, 1], -1)],
    ids=["text", "numbers", "numbers without signs"],
)
@pytest.mark.parametrize("is_snapshot", [False, True])
def test_the_first_elements_of_an_empty_index_bring_names(tmp_path, names, other, is_snapshot):
    path = empty(tmp_path / "index.anb")
    with LiveIndex.open(path, workers=1) as live:
        assert (live.names, live.takes_names) == (None, True)
        # Nothing is there to be deleted, which decides nothing.
        assert live.delete_named(["nobody"])[1].tolist() == live.delete_named([99])[1].tolist() == [False]
        assert not live.has_changes
        assert live.upsert_named(names, VECTORS[:2])[1].tolist() == [False, False]
        if is_snapshot:
            live.snapshot()
        assert held(live) == after_a_crash(path) == dict(zip(names, VECTORS[:2].tolist(), strict=True))
        with pytest.raises(InputError, match=r"names\[0\] is .*; elements are called by"):
            live.upsert_named([other], VECTORS[:1])
        with pytest.raises(InputError, match=r"ids\[0\] is 2; elements of this index have names"):
            live.upsert([2], VECTORS[:1])
        live.upsert([1], VECTORS[7:8])
        live.delete_named(names)
        # They keep their ids, and others are still no names of it.
        with pytest.raises(InputError, match=r"names\[0\] is .*; elements are called by"):
            live.upsert_named([other], VECTORS[:1])
        live.upsert_named([names[1]], VECTORS[5:6])
        assert held(live) == after_a_crash(path) == {names[1]: VECTORS[5].tolist()}
        assert live.names.ids_of([names[1]]).tolist() == [1]
    with LiveIndex.open(path, workers=1) as live:
        assert live.names.array.tolist() == names
        assert live.new_names() == names
        live.snapshot()
        assert held(live) == after_a_crash(path)


def test_the_first_elements_of_an_empty_index_may_have_none(tmp_path):
    path = empty(tmp_path / "index.anb")
    with LiveIndex.open(path, workers=1) as live:
        live.upsert([0, 1], VECTORS[:2])
        for change in (lambda: live.upsert_named(["a"], VECTORS[:1]), lambda: live.delete_named(["a"])):
            with pytest.raises(InputError, match="have no names; give ids"):
                change()
        # Once it is empty again it is as it was.
        live.delete([0, 1])
        live.upsert_named(["a"], VECTORS[5:6])
        assert held(live) == after_a_crash(path) == {"a": VECTORS[5].tolist()}
        live.snapshot()
        assert held(live) == after_a_crash(path)


def test_a_file_without_a_name_lets_the_first_say_what_they_are(tmp_path):
    path = empty(tmp_path / "index.anb")
    write_names(path, Names([]))
    with LiveIndex.open(path, workers=1) as live:
        with pytest.raises(InputError, match=r"ids\[0\] is 0; elements of this index have names"):
            live.upsert([0], VECTORS[:1])
        live.upsert_named([5], VECTORS[:1])
        assert held(live) == after_a_crash(path) == {5: VECTORS[0].tolist()}


def test_a_write_that_fails_brings_no_names(tmp_path, monkeypatch):
    path = empty(tmp_path / "index.anb")
    with LiveIndex.open(path, workers=1, most=1) as live:
        with pytest.raises(InputError, match="takes 1; 2 more do not fit"):
            live.upsert_named(["a", "b"], VECTORS[:2])
        assert live.names is None
        live.upsert_named([1], VECTORS[:1])
        assert held(live) == {1: VECTORS[0].tolist()}


def test_names_that_an_index_had_before_are_missed_behind_a_snapshot(path):
    with LiveIndex.open(path, workers=1) as live:
        live.upsert_named(["a"], VECTORS[100:101])
        live.snapshot()
    names_path(path).unlink()
    with pytest.raises(DataError, match=r"those that were there before are missing"):
        open_named(path)


def test_names_that_do_not_belong_together_are_told(path):
    with LiveIndex.open(path, workers=1) as live:
        live.upsert_named(["a"], VECTORS[100:101])
    kept, place = names_path(path).read_bytes(), names_path(path)
    place.unlink()
    with pytest.raises(DataError, match=r"those that were there before are missing: bring .*index\.anb\.names back"):
        open_named(path)
    shutil.move(live_folder(path), path.with_suffix(".aside"))
    for names in ([f"n{number}" for number in range(COUNT + 1)], ["a", *(f"n{number}" for number in range(1, COUNT))]):
        write_names(path, Names(names))
        shutil.move(path.with_suffix(".aside"), live_folder(path))
        with pytest.raises(DataError, match=r"behind others than those in .*: bring the file back that was there"):
            LiveIndex.open(path)
        shutil.move(live_folder(path), path.with_suffix(".aside"))
    place.write_bytes(kept)
    shutil.move(path.with_suffix(".aside"), live_folder(path))
    assert after_a_crash(path).keys() == start().keys() | {"a"}
    # Names that were replaced while they are served.
    shutil.rmtree(live_folder(path))
    with LiveIndex.open(path, workers=1) as live:
        write_names(path, Names([f"m{number}" for number in range(COUNT)]))
        with pytest.raises(DataError, match="was changed by another process"):
            live.delete_named(["n1"])


def test_names_in_a_log_that_are_none_are_damage(path):
    """With checksums that are right: written so by something else."""
    with LiveIndex.open(path, workers=1) as live:
        for names, first in (((3,), COUNT), (("n1",), COUNT), (("b", "b"), COUNT), (("b",), COUNT + 1)):
            change = Change(np.array([1]), VECTORS[:1], names, first)
            live.delete([0])
            size = live.logs.current.size
            live.logs.append([change], sync=True)
            with pytest.raises(DataError, match=r"index\.anb\.live brings names"):
                open_named(path)
            log = live.logs.current
            with open(log.path, "r+b") as file:
                file.truncate(size)
            log.size, log.number, live.logs.number = size, log.number - 1, log.number - 1
    assert after_a_crash(path).keys() == start().keys() - {"n0"}


NAME = st.text(st.characters(exclude_categories=("Cs",)), max_size=5) | st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.lists(NAME, max_size=3), st.integers(0, 2**40)), max_size=4)
)
def test_a_payload_is_read_as_it_was_written(parts):
    changes = [
        Change(
            np.arange(count, dtype=np.int64),
            VECTORS[:count] if is_upsert else None,
            tuple(names) if is_upsert else (),
            first if is_upsert and names else 0,
        )
        for is_upsert, count, names, first in parts
    ]
    payload = encode(changes)
    assert len(payload) == sum(map(payload_bytes, changes))
    found = decode(payload, DIM)
    assert [
        (c.ids.tolist(), None if c.vectors is None else c.vectors.tolist(), c.names, c.first_named) for c in found
    ] == [(c.ids.tolist(), None if c.vectors is None else c.vectors.tolist(), c.names, c.first_named) for c in changes]
    # Cut anywhere it is no payload, or one of fewer changes.
    for end in range(len(payload)):
        with contextlib.suppress(ValueError, struct.error):
            assert len(decode(payload[:end], DIM)) < len(changes)


def test_growing_names_are_found_both_ways():
    names = GrowingNames(Names(["a", "b"]))
    names.add(["c", "d"])
    assert (len(names), names.of(np.array([3, 0])), names.ids_of(["c"]).tolist()) == (4, ["d", "a"], [2])
    assert (names.array.tolist(), names.since(2), names.find("x")) == (["a", "b", "c", "d"], ["c", "d"], None)
    with pytest.raises(InputError, match="there is no 'x' among the 4 names"):
        names.ids_of(["x"])


# Over HTTP


def served(path, **writes):
    client = TestClient(
        create_app(Sources([path], writes=Writes(**writes)), Limits(batch=4)), base_url="http://localhost"
    )
    client.__enter__()
    deadline = time.monotonic() + 60
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return client


def test_a_server_takes_changes_by_name(path):
    client = served(path)
    answer = client.post("/upsert", json={"names": ["n3", "new"], "vectors": VECTORS[100:102].tolist()}).json()
    assert answer == {"upserted": 2, "new": 1, "vectors": COUNT + 1, "number": 1, "generation": 1}
    result = client.post("/search", json={"vectors": [VECTORS[101].tolist()], "k": 1}).json()["results"][0]
    assert result["names"] == ["new"]
    found = client.post("/search", json={"names": ["new"], "k": 1, "filter": {"names": ["n3", "new"]}}).json()
    assert found["results"][0]["names"] == ["n3"]
    answer = client.post("/v1/delete", json={"names": ["n1", "nobody"]}).json()
    assert (answer["deleted"], answer["missing"]) == (1, ["nobody"])
    for body, field in (
        ({"names": ["a", "a"], "vectors": VECTORS[:2].tolist()}, "names[1]"),
        ({"names": [4], "vectors": VECTORS[:1].tolist()}, "names[0]"),
        ({"names": ["a", "b"], "vectors": VECTORS[:1].tolist()}, "names"),
        ({"ids": [COUNT + 1], "vectors": VECTORS[:1].tolist()}, "ids[0]"),
    ):
        refused = client.post("/upsert", json=body)
        assert (refused.status_code, refused.json()["error"]["field"]) == (400, field), refused.json()
    assert client.post("/admin/reload").status_code == 403
    expected = start() | {"n3": VECTORS[100].tolist(), "new": VECTORS[101].tolist()}
    del expected["n1"]
    assert after_a_crash(path) == expected
    client.__exit__(None, None, None)
    # A server that only reads knows them, too.
    found = Sources([path]).load()
    assert content(found.vectors.index, found.vectors.names) == expected
    client = served(path)
    result = client.post("/search", json={"names": ["new"], "k": 1}).json()["results"][0]
    assert len(result["names"]) == 1
    schema = client.get("/openapi.json").json()["components"]["schemas"]["DeleteRequest"]
    assert json.dumps(schema["oneOf"]) == '[{"required": ["ids"]}, {"required": ["names"]}]'
    client.__exit__(None, None, None)


def test_names_without_a_change_are_no_payload():
    change = Change(np.array([4]), VECTORS[:1], ("x",), 4)
    alone = payload_bytes(change) - payload_bytes(Change(np.array([4]), VECTORS[:1]))
    with pytest.raises(ValueError, match="names of no change"):
        decode(encode([change])[:alone], DIM)


def test_a_server_lets_an_empty_index_take_names(tmp_path):
    path = empty(tmp_path / "index.anb")
    client = served(path)
    assert not client.get("/v1/info").json()["search"]["named"]
    assert client.post("/search", json={"vectors": [VECTORS[0].tolist()]}).json()["results"] == [
        {"ids": [], "distances": []}
    ]
    answer = client.post("/upsert", json={"names": ["a", "b"], "vectors": VECTORS[:2].tolist()}).json()
    assert (answer["upserted"], answer["new"]) == (2, 2)
    assert client.get("/v1/info").json()["search"]["named"]
    result = client.post("/search", json={"vectors": [VECTORS[1].tolist()], "k": 1}).json()["results"][0]
    assert result["names"] == ["b"]
    refused = client.post("/upsert", json={"ids": [7], "vectors": VECTORS[:1].tolist()})
    assert (refused.status_code, refused.json()["error"]["field"]) == (400, "ids[0]")
    assert after_a_crash(path) == {"a": VECTORS[0].tolist(), "b": VECTORS[1].tolist()}
    client.__exit__(None, None, None)
    client = served(path)
    assert client.post("/search", json={"names": ["a"], "k": 1}).json()["results"][0]["names"] == ["b"]
    client.__exit__(None, None, None)
