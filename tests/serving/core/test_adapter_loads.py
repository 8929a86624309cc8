"""What operators load into the shelf of adapters and has to wait: whose word counts, and who is told what."""

from concurrent.futures import Future
from dataclasses import dataclass
from threading import Event
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CapacityError, CheckpointError, InputError
from anabranch.serving.core.adapter_entry import Entry
from anabranch.serving.core.adapter_loads import Load
from anabranch.serving.core.adapter_shelf import AdapterShelf
from anabranch.serving.core.client import BusyError, CalledOffError
from waiting import until


@dataclass(eq=False)
class Fake:
    nbytes: int
    version: str
    told: ClassVar[dict[str, str]] = {}


class Folders:
    """``SIZE/VERSION`` is a folder of so many bytes, unless it is ``gone`` or has another size; all are read while the gate is open."""

    def __init__(self):
        self.gone, self.gate, self.sizes = {"gone"}, Event(), {}
        self.gate.set()

    def __call__(self, folder, root, check):
        assert self.gate.wait(60)
        if folder in self.gone:
            raise CheckpointError(f"no adapter at /somewhere/{folder}")
        size = self.sizes.get(folder, int(folder.partition("/")[0]))
        check(size)
        return Fake(size, folder)


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


def in_order(**told):
    """The names of those that are done, as they come to be."""
    ends = []
    for name, future in told.items():
        future.add_done_callback(lambda _, name=name: ends.append(name))
    return ends


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


def test_the_same_load_again_joins_the_one_that_waits(full):
    """Whoever gave up waiting and asked again called its own off each time, and came to the end of the line."""
    first, other = waits(full, "x", "50/x"), waits(full, "c", "50/c")
    again = [full.load("x", "50/x") for _ in range(3)]
    assert len(full._line) == 2
    ends = in_order(x=first, again=again[-1], c=other)
    full.release("a")
    facts = first.result(60)
    assert [told.result(60) for told in again] == [facts] * 3
    assert (facts["folder"], facts["in_memory"]) == ("50/x", True)
    until(lambda: len(ends) == 3)
    assert ends[-1] == "c"
    # What is there is loaded once more by the same word: its folder may hold other numbers by now.
    num = full.stats().counters["adapter_loads"]
    full.load("x", "50/x").result(60)
    assert full.stats().counters["adapter_loads"] == num + 1


def test_a_load_of_another_folder_takes_over_the_place_in_the_line(full):
    first, other = waits(full, "x", "50/x"), waits(full, "c", "50/c")
    joined, root = full.load("x", "50/x"), full.load("x", "50/x", "/root")
    for told in (first, joined):
        with pytest.raises(CalledOffError):
            told.result(60)
    last = waits(full, "x", "50/new")
    with pytest.raises(CalledOffError):
        root.result(60)
    ends = in_order(x=last, c=other)
    full.release("a")
    assert last.result(60)["folder"] == folder_of(full, "x") == "50/new"
    until(lambda: len(ends) == 2)
    assert ends == ["x", "c"]


@pytest.mark.parametrize("end", ["unloaded", "over", "closed"])
def test_whoever_has_joined_is_told_the_same_end(folders, end):
    now = [0.0]
    shelf = AdapterShelf(folders, 100, lambda: now[0])
    shelf.load("a", "100/a").result(60)
    begin(shelf, "1", "a")
    first = waits(shelf, "x", "50/x")
    now[0] = 20.0
    again = waits(shelf, "x", "50/x")
    if end == "unloaded":
        shelf.remove("x")
    elif end == "over":
        now[0] = 30.0
        shelf.advance()
    shelf.close()
    errors = [told.exception(60) for told in (first, again)]
    assert errors[0] is errors[1]
    assert isinstance(errors[0], CalledOffError if end == "unloaded" else BusyError)


def test_the_same_loads_that_wait_to_be_looked_at_are_one_in_the_line(full, folders):
    folders.gate.clear()
    loads = [full.load("x", "50/x") for _ in range(3)]
    folders.gate.set()
    full._submit(None, lambda: None).result(60)
    assert len(full._line) == 1
    full.release("a")
    assert [told.result(60)["folder"] for told in loads] == ["50/x"] * 3


def test_what_was_asked_for_between_two_that_are_the_same_is_called_off(full, folders):
    first = waits(full, "x", "50/x")
    folders.gate.clear()
    between, last = full.load("x", "0/between"), full.load("x", "50/x")
    folders.gate.set()
    # It was looked at first, and had room.
    assert between.result(60)["folder"] == "0/between"
    with pytest.raises(CalledOffError):
        first.result(60)
    full.release("a")
    assert last.result(60)["folder"] == folder_of(full, "x") == "50/x"
    begin(full, "1", "x")
    first = waits(full, "y", "50/y")
    folders.gate.clear()
    between, last = full.load("y", "50/between"), full.load("y", "50/y")
    folders.gate.set()
    for told in (between, first):
        with pytest.raises(CalledOffError):
            told.result(60)
    full.release("b")
    assert last.result(60)["folder"] == "50/y"


@pytest.mark.parametrize("size", [50, 60, 200])
def test_the_same_load_while_the_one_before_is_to_be_read_in_its_turn_ends_as_that(full, folders, size):
    """Also where the folder is larger by now than when that had its turn: it comes back into the line, or never has room."""
    first = waits(full, "x", "50/x")
    folders.gate.clear()
    busy = full.load("z", "0/z")
    until(lambda: full._reads._running[None] == 1)
    full.release("a")
    assert len(full._line) == 0
    folders.sizes["50/x"] = size
    again = full.load("x", "50/x")
    folders.gate.set()
    busy.result(60)
    if size == 60:
        full._submit(None, lambda: None).result(60)
        full._submit("\n", lambda: None).result(60)
        assert [one.adapters for one in full._line] == [{full._loads.before(Load(Entry("x", ""), 99)).entry}]
        full.release("b")
    errors = [told.exception(60) for told in (first, again)]
    if size == 200:
        assert all(isinstance(error, CapacityError) for error in errors)
    else:
        assert errors == [None, None]
        assert first.result() == again.result()
        assert folder_of(full, "x") == "50/x"


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


# Whatever operators say, in whatever order


@dataclass(eq=False)
class Word:
    """What was said of a name: a folder to load, None to unload; what came of it."""

    name: str
    folder: str | None
    told: Any = None


class Said:
    """A shelf of 100 bytes that does all at once, by a clock; requests that use ``a`` and ``b``, and what operators say of other names."""

    def __init__(self):
        self.now, self.words, self.users, self.ends = 0.0, [], [], []
        self.shelf = AdapterShelf(Folders(), 100, lambda: self.now)
        self.shelf._submit = self._at_once
        self.shelf._watch = lambda: None
        for name in "abc":
            self.shelf.register(name, f"50/{name}")

    @staticmethod
    def _at_once(key, work):
        done = Future()
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)
        return done

    def say(self, name, folder):
        word = Word(name, folder)
        if folder is None:
            word.told = Future()
            try:
                word.told.set_result(self.shelf.remove(name))
            except InputError as error:
                word.told.set_exception(error)
        else:
            word.told = self.shelf.load(name, folder)
            # Whoever asked has left, and it goes on.
            assert not word.told.cancel()
            number = len(self.words)
            word.told.add_done_callback(lambda _: self.ends.append((self.now, number)))
        self.words.append(word)

    def again(self, name):
        """Say the last word about a name once more, if that waits; it changes nothing for anybody."""
        word = next((word for word in reversed(self.words) if word.name == name), None)
        if word is None or word.told.done():
            return
        before = [one.id for one in self.shelf._line], self.shelf._line.closed(self.now), self.shelf._line.next_end()
        told = self.shelf.load(name, word.folder)
        told.add_done_callback(lambda done: self.same(word.told, done))
        assert before == (
            [one.id for one in self.shelf._line],
            self.shelf._line.closed(self.now),
            self.shelf._line.next_end(),
        )

    def same(self, first, second):
        assert first.done()
        assert first.exception() is second.exception()
        self.ends.append("the same")
        if first.exception() is None:
            assert first.result() == second.result()

    def use(self, name):
        id = f"r{self.now}-{len(self.users)}"
        self.shelf.lease(id, ((name, 1.0),), f"key {len(self.users) % 3}")
        self.users.append(id)

    def pass_by(self, seconds):
        for _ in range(seconds):
            self.now += 1.0
            self.shelf.advance()

    def finish(self):
        for id in self.users:
            self.shelf.release(id)
        self.pass_by(31)
        assert (len(self.shelf._line), self.shelf._loads._loads, self.shelf._room.used) == (0, {}, set())
        assert all(word.told.done() for word in self.words)
        outcomes = [type(word.told.exception()) for word in self.words]
        for name in "xy":
            own = [word for word in self.words if word.name == name]
            done = [word for word in own if word.told.exception() is None]
            # The last word that was done counts.
            there = next((facts["folder"] for facts in self.shelf.facts() if facts["name"] == name), None)
            assert there == (done[-1].folder if done else None)
            for number, word in enumerate(own):
                # Nobody is called off by the same word, nor by what was said before.
                if isinstance(word.told.exception(), CalledOffError):
                    assert any(later.folder != word.folder for later in own[number + 1 :])
        return outcomes, [end for end in self.ends if end != "the same"], self.shelf.facts()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["load", "load", "again", "again", "unload", "use", "use", "release", "wait"]),
        st.sampled_from("xy"),
        st.integers(0, 40),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_the_last_word_counts_and_to_say_it_again_changes_nothing(steps):
    """Whatever is loaded, loaded again, left and unloaded, while requests come and go."""
    found = []
    for with_again in (True, False):
        said = Said()
        for what, name, number in steps:
            if what == "load":
                said.say(name, ("50/one", "50/other", "90/large", "0/none")[number % 4])
            elif what == "again" and with_again:
                said.again(name)
            elif what == "unload":
                said.say(name, None)
            elif what == "use":
                said.use("abc"[number % 3])
            elif what == "release" and said.users:
                said.shelf.release(said.users[number % len(said.users)])
            elif what == "wait":
                said.pass_by(number // 4)
        found.append(said.finish())
        said.shelf.close()
    assert found[0] == found[1]
