"""What operators load into the shelf of adapters and has to wait: whose word counts, and who is told what."""

from dataclasses import dataclass
from threading import Event
from typing import ClassVar

import pytest

from anabranch.errors import CheckpointError, InputError
from anabranch.serving.core.adapter_shelf import AdapterShelf
from anabranch.serving.core.client import BusyError, CalledOffError
from waiting import until


@dataclass(eq=False)
class Fake:
    nbytes: int
    version: str
    told: ClassVar[dict[str, str]] = {}


class Folders:
    """``SIZE/VERSION`` is a folder of so many bytes, unless it is ``gone``; all are read while the gate is open."""

    def __init__(self):
        self.gone, self.gate = {"gone"}, Event()
        self.gate.set()

    def __call__(self, folder, root, check):
        assert self.gate.wait(60)
        if folder in self.gone:
            raise CheckpointError(f"no adapter at /somewhere/{folder}")
        check(int(folder.partition("/")[0]))
        return Fake(int(folder.partition("/")[0]), folder)


@pytest.fixture
def folders():
    return Folders()


@pytest.fixture
def made(folders):
    """A shelf of 100 bytes with these adapters."""
    shelf = AdapterShelf(folders, 100)

    def make(*adapters):
        for name, folder in adapters:
            shelf.load(name, folder).result(60)
        return shelf

    yield make
    folders.gate.set()
    shelf.close()


@pytest.fixture
def full(made):
    """One whose memory the requests ``a`` and ``b`` use."""
    shelf = made(("a", "50/a"), ("b", "50/b"))
    for name in "ab":
        begin(shelf, name, name)
    return shelf


def begin(shelf, id, name):
    """A request with this adapter, of a key of its own, once that is read."""
    future = shelf.lease(id, ((name, 1.0),), f"key {id}")
    if future is not None:
        future.result(60)


def in_memory(shelf):
    return {facts["name"] for facts in shelf.facts() if facts["in_memory"]}


def waits(shelf, name, folder):
    """An operator's load that has found no room yet."""
    told = shelf.load(name, folder)
    shelf._submit(None, lambda: None).result(60)
    assert not told.done()
    return told


def folder_of(shelf, name):
    return next(facts["folder"] for facts in shelf.facts() if facts["name"] == name)


@pytest.mark.parametrize("is_there", [False, True])
def test_the_last_word_about_a_name_counts(full, is_there):
    if is_there:
        full.load("x", "0/old").result(60)
    old = waits(full, "x", "50/big")
    assert full.load("x", "0/small").result(60)["folder"] == "0/small"
    with pytest.raises(CalledOffError, match="adapter 'x' was loaded anew or unloaded while this waited"):
        old.result(60)
    # Its room is another's.
    new, other = waits(full, "x", "50/new"), waits(full, "c", "50/c")
    last = full.load("x", "50/last")
    with pytest.raises(CalledOffError):
        new.result(60)
    full.release("a")
    full.release("b")
    assert other.result(60)["in_memory"]
    assert last.result(60)["folder"] == folder_of(full, "x") == "50/last"


def test_unloading_calls_off_what_waits_to_be_loaded(full):
    old = waits(full, "x", "50/x")
    assert full.remove("x")["folder"] == "50/x"
    with pytest.raises(CalledOffError):
        old.result(60)
    with pytest.raises(InputError, match="no adapter 'x'"):
        full.remove("x")
    full.load("x", "0/x").result(60)
    newer = waits(full, "x", "50/new")
    assert full.remove("x")["folder"] == "0/x"
    full.release("a")
    full.release("b")
    with pytest.raises(CalledOffError):
        newer.result(60)
    assert full.names == ("a", "b")
    # Nobody waits, nor keeps any room.
    assert (len(full._line), full._room.used, full._loads._loads) == (0, set(), {})


def test_a_load_that_fails_calls_nothing_off(full):
    old = waits(full, "x", "50/x")
    with pytest.raises(CheckpointError):
        full.load("x", "gone").result(60)
    full.release("a")
    assert old.result(60)["folder"] == folder_of(full, "x") == "50/x"


@pytest.mark.parametrize("when", ["before it is read", "while it is read", "while it is read in its turn"])
def test_what_is_called_off_is_not_kept(full, folders, when):
    folders.gate.clear()
    busy = full.load("y", "0/y")
    if when == "before it is read":
        x = full.load("x", "0/x")
    elif when == "while it is read":
        folders.gate.set()
        busy.result(60)
        folders.gate.clear()
        x = full.load("x", "0/x")
        until(lambda: full._reads._running[None] == 1)
    else:
        folders.gate.set()
        x = waits(full, "x", "50/x")
        folders.gate.clear()
        full.release("a")
        until(lambda: full._reads._running["\n"] == 1)
    full.remove("x")
    with pytest.raises(CalledOffError):
        x.result(60)
    folders.gate.set()
    full._submit(None, lambda: None).result(60)
    full._submit("\n", lambda: None).result(60)
    assert full.names == ("a", "b", "y")
    assert in_memory(full) == {"a", "b", "y"}
    assert full._loads._loads == {}


def test_what_was_replaced_after_a_wait_gives_its_room(made):
    shelf = made(("a", "60/a"), ("x", "30/old"))
    begin(shelf, "1", "a")
    shelf.load("x", "30/newer").result(60)
    # Whoever waits with it knows it still.
    new, old = waits(shelf, "x", "50/new"), shelf._memory.entries["x"]
    shelf.release("1")
    assert new.result(60)["folder"] == "50/new"
    assert old.held is None
    # There was room for both, as it was a that left.
    assert shelf.stats().gauges == {"adapters_in_memory": 1, "adapter_resident_bytes": 50}


def test_what_was_loaded_after_a_wait_is_no_keys_part(full):
    new = waits(full, "x", "50/x")
    full.release("a")
    new.result(60)
    assert [entry.used_by for entry in full._memory.all() if entry.name == "x"] == [{}]


def test_whoever_waits_behind_what_is_loaded_begins_as_soon_as_that_is_there(full):
    new = waits(full, "x", "100/x")
    behind = full.lease("2", (("a", 1.0),), "k2")
    assert not behind.done()
    full.release("a")
    full.release("b")
    assert new.result(60)["in_memory"]
    behind.result(60)
    assert in_memory(full) == {"a"}


def test_nobody_cancels_what_an_operator_loads(full):
    told = full.load("x", "0/x")
    assert not told.cancel()
    assert told.result(60)["in_memory"]


def test_whose_folder_went_while_an_operator_waited_is_told_as_at_once(full, folders):
    told = waits(full, "x", "50/x")
    folders.gone.add("50/x")
    full.release("a")
    with pytest.raises(CheckpointError, match="no adapter at /somewhere/50/x"):
        told.result(60)


def test_whoever_waits_to_be_read_when_the_engine_ends_is_told(full, folders):
    full.register("c", "0/c")
    folders.gate.clear()
    # What is read, and what waits behind that: of an operator, and of a key.
    being_read = full.load("x", "50/x")
    until(lambda: full._reads._running[None] == 1)
    behind, of_key = full.load("y", "0/y"), full.lease("1", (("c", 1.0),), "k")
    full.close()
    folders.gate.set()
    for each in (being_read, behind, of_key, full.load("z", "0/z"), full.lease("2", (("c", 1.0),), "k")):
        with pytest.raises(BusyError, match="the engine ends"):
            each.result(60)
