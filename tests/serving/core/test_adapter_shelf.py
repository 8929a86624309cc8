"""The shelf of adapters: names, room, and who uses what, with made-up adapters."""

import gc
import threading
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CapacityError, CheckpointError, InputError
from anabranch.serving.core.adapter_shelf import MOST_WAITING, WAIT_S, AdapterShelf
from anabranch.serving.core.client import BusyError
from waiting import until


@dataclass(eq=False)
class Fake:
    nbytes: int
    version: str
    told: ClassVar[dict[str, str]] = {"kind": "made up"}


class Folders:
    """``SIZE`` or ``SIZE/VERSION`` is a folder of so many bytes; ``gone`` is not there, nor what is put into it."""

    def __init__(self):
        self.read, self.gone, self.roots = [], {"gone"}, []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, folder, root, check):
        assert self.gate.wait(60)
        self.roots.append(root)
        if folder in self.gone:
            raise CheckpointError(f"no adapter at /somewhere/{folder}")
        size = int(folder.partition("/")[0])
        check(size)
        self.read.append(folder)
        return Fake(size, folder)


@pytest.fixture
def folders():
    return Folders()


@pytest.fixture
def shelf(folders):
    # Who finds no room is told so.
    made = AdapterShelf(folders, 100, wait_s=0.0)
    yield made
    folders.gate.set()
    made.close()


def in_memory(shelf):
    return {facts["name"] for facts in shelf.facts() if facts["in_memory"]}


def begin(shelf, id, *names, key=""):
    """A request with these adapters, once all are read."""
    future = shelf.lease(id, tuple((name, 1.0) for name in names), key)
    if future is not None:
        future.result(60)
    return [held.version for _, held, _ in shelf.held_by(id)]


def test_the_least_recently_used_leaves_and_comes_again(shelf, folders):
    for name in "abc":
        assert shelf.load(name, f"40/{name}").result(60)["in_memory"]
    assert in_memory(shelf) == {"b", "c"}
    assert begin(shelf, "1", "b") == ["40/b"]
    shelf.release("1")
    assert begin(shelf, "2", "a") == ["40/a"]  # c was used less recently than b
    assert in_memory(shelf) == {"a", "b"}
    assert folders.read == ["40/a", "40/b", "40/c", "40/a"]
    assert shelf.names == ("a", "b", "c")
    stats = shelf.stats()
    assert stats.counters == {"adapter_loads": 4, "adapter_evictions": 2}
    assert stats.gauges == {"adapters_in_memory": 2, "adapter_resident_bytes": 80}


def test_what_is_used_or_pinned_stays(shelf):
    shelf.load_now("p", "50", is_pinned=True)
    shelf.load("a", "50/a").result(60)
    assert begin(shelf, "1", "a") == ["50/a"]
    with pytest.raises(BusyError, match="'b' takes 50 bytes, and those in use 100 of 100"):
        shelf.load("b", "50/b").result(60)
    assert shelf.names == ("p", "a")
    shelf.register("b", "50/b")
    with pytest.raises(BusyError):
        begin(shelf, "2", "b")
    shelf.release("2")
    shelf.release("1")
    assert begin(shelf, "3", "b") == ["50/b"]
    assert in_memory(shelf) == {"p", "b"}
    with pytest.raises(
        CapacityError, match="takes 60 bytes beside 50 of those that are pinned, and adapters may take 100"
    ):
        shelf.load("c", "60").result(60)
    assert in_memory(shelf) == {"p", "b"}


def test_what_an_operator_loads_waits_for_room_as_requests_do(folders):
    shelf = AdapterShelf(folders, 100)
    for name in "ab":
        shelf.load(name, f"50/{name}").result(60)
        assert begin(shelf, name, name, key="k") == [f"50/{name}"]
    new, other = shelf.load("c", "50/c"), shelf.load("a", "50/new")
    # Both are read in turn, and find that there is no room yet.
    shelf._submit(None, lambda: None).result(60)
    assert not new.done()
    assert shelf.names == ("a", "b")
    shelf.release("b")
    assert (new.result(60)["in_memory"], new.result(60)["requests"]) == (True, 0)
    assert other.result(60)["folder"] == "50/new"
    # Who began with the one before ends with it.
    assert [held.version for _, held, _ in shelf.held_by("a")] == ["50/a"]
    assert shelf.names == ("a", "b", "c")
    assert begin(shelf, "1", "a") == ["50/new"]
    shelf.close()


def test_an_operator_who_waits_in_vain_is_told_and_all_is_as_it_was(folders):
    now = [0.0]
    shelf = AdapterShelf(folders, 100, clock=lambda: now[0])
    shelf.load("a", "100/a").result(60)
    assert begin(shelf, "1", "a") == ["100/a"]
    waits = shelf.load("b", "50/b")
    shelf._submit(None, lambda: None).result(60)
    assert not waits.done()
    now[0] += WAIT_S + 1
    shelf.advance()
    with pytest.raises(BusyError, match="there was no memory"):
        waits.result(60)
    ends = shelf.load("a", "50/new")
    shelf._submit(None, lambda: None).result(60)
    shelf.close()
    with pytest.raises(BusyError, match="the engine ends"):
        ends.result(60)
    assert shelf.names == ("a",)
    assert in_memory(shelf) == {"a"}


def test_one_takes_the_place_of_another(shelf):
    shelf.load("a", "40/1").result(60)
    assert begin(shelf, "old", "a") == ["40/1"]
    shelf.load("a", "40/2").result(60)
    assert [held.version for _, held, _ in shelf.held_by("old")] == ["40/1"]
    assert begin(shelf, "new", "a") == ["40/2"]
    assert shelf.stats().gauges["adapters_in_memory"] == 2
    shelf.release("old")
    assert shelf.stats().gauges == {"adapters_in_memory": 1, "adapter_resident_bytes": 40}
    shelf.release("new")
    # Nobody uses the one before, which gives its room.
    assert shelf.load("a", "100").result(60)["bytes"] == 100
    with pytest.raises(CheckpointError):
        shelf.load("a", "gone").result(60)
    assert begin(shelf, "1", "a") == ["100"]


def test_unloading(shelf):
    shelf.load("a", "40/a").result(60)
    begin(shelf, "1", "a")
    assert shelf.remove("a") == {
        "name": "a",
        "folder": "40/a",
        "pinned": False,
        "in_memory": True,
        "bytes": 40,
        "version": "40/a",
        "requests": 1,
        "kind": "made up",
    }
    with pytest.raises(InputError, match="no adapter 'a'; there is none"):
        shelf.lease("2", (("a", 1.0),))
    with pytest.raises(InputError, match="no adapter 'a'"):
        shelf.remove("a")
    assert [held.version for _, held, _ in shelf.held_by("1")] == ["40/a"]
    shelf.release("1")
    assert shelf.stats().gauges["adapter_resident_bytes"] == 0
    shelf.release("1")  # nothing
    shelf.load_now("p", "1", is_pinned=True)
    for refused in (
        lambda: shelf.remove("p"),
        lambda: shelf.load("p", "2"),
        lambda: shelf.load_now("p", "2", is_pinned=True),
    ):
        with pytest.raises(InputError, match="'p' is"):
            refused()


def test_what_cannot_be_read_leaves_nothing(shelf):
    with pytest.raises(CheckpointError):
        shelf.load("a", "gone").result(60)
    with pytest.raises(InputError, match="name of an adapter"):
        shelf.load("a+b", "40")
    with pytest.raises(InputError, match="name of an adapter"):
        shelf.register("", "40")
    assert shelf.names == ()
    shelf.register("a", "gone")
    with pytest.raises(BusyError):
        begin(shelf, "1", "a")
    shelf.release("1")
    assert shelf.facts()[0]["requests"] == 0
    with pytest.raises(InputError, match="no adapter 'b'; there are 'a'"):
        shelf.lease("2", (("a", 1.0), ("b", 1.0)))
    assert shelf.facts()[0]["requests"] == 0


def test_reading_holds_nobody_up_and_is_done_once(shelf, folders):
    shelf.load_now("b", "10/b")
    folders.gate.clear()
    shelf.register("a", "10/a")
    first, second = shelf.lease("1", (("a", 1.0),)), shelf.lease("2", (("a", 0.5), ("b", 2.0)))
    assert begin(shelf, "3", "b") == ["10/b"]
    assert not first.done()
    assert shelf.facts()[0]["requests"] == 2
    folders.gate.set()
    first.result(60), second.result(60)
    assert folders.read == ["10/b", "10/a"]
    assert [(held.version, weight) for _, held, weight in shelf.held_by("2")] == [("10/a", 0.5), ("10/b", 2.0)]


def test_who_asks_for_one_whose_folder_went_is_not_told_where_it_was(shelf, folders, caplog):
    shelf.load("a", "40/a").result(60)
    shelf.load("b", "80/b").result(60)
    folders.gone.add("40/a")
    with pytest.raises(BusyError, match="'a' is known and cannot be read now") as raised:
        begin(shelf, "1", "a")
    assert "40/a" not in str(raised.value)
    assert "/somewhere/40/a" in caplog.text
    shelf.release("1")
    folders.gone.remove("40/a")
    assert begin(shelf, "2", "a") == ["40/a"]


@pytest.mark.parametrize("is_known", [False, True])
def test_one_whose_folder_holds_other_numbers_by_now_is_not_read_again(folders, is_known, caplog):
    """Whoever asks would have other answers from what is called the same; who loaded it says which there are."""
    shelf = AdapterShelf(lambda folder, root, check: Fake(40, made[0]), 100, wait_s=0.0)
    made = ["1"]
    if is_known:
        shelf.register("a", "somewhere", version="1")
    else:
        shelf.load("a", "somewhere").result(60)
        shelf.load("b", "elsewhere").result(60)
        shelf.load("c", "elsewhere").result(60)
        assert in_memory(shelf) == {"b", "c"}
    made[0] = "2"
    with pytest.raises(BusyError, match="adapter 'a' is known and cannot be read now"):
        begin(shelf, "1", "a")
    assert "somewhere holds other numbers than when the adapter was loaded" in caplog.text
    made[0] = "1"
    assert begin(shelf, "1", "a") == ["1"]
    shelf.release("1")
    made[0] = "2"
    shelf.load("a", "somewhere").result(60)
    assert begin(shelf, "1", "a") == ["2"]
    shelf.close()


class Places:
    """Folders in which something else may be at any time: bytes and version by folder."""

    def __init__(self, **found):
        self.found = found

    def __call__(self, folder, root, check):
        nbytes, version = self.found[folder]
        check(nbytes)
        return Fake(nbytes, version)


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize("asked", ["a", "ab", "ba"])
def test_one_that_grew_beyond_the_room_is_refused_until_its_files_are_back(is_restarted, asked, caplog):
    """What is in its folder by now is no fault of the request, and says nothing of how large it is once its files are back."""
    places = Places(p=(20, "p"), a=(40, "a"), b=(40, "b"), c=(70, "c"))
    shelf = AdapterShelf(places, 100, wait_s=0.0)
    shelf.load_now("p", "p", is_pinned=True)
    for name in "abc":
        if is_restarted:
            shelf.register(name, name, version=name)
        else:
            shelf.load(name, name).result(60)
    places.found["a"] = (90, "other")
    for number in range(2):
        with pytest.raises(BusyError, match="adapter 'a' is known and cannot be read now"):
            begin(shelf, str(number), *asked)
    assert "adapter a cannot be read again: adapter 'a' takes 90 bytes beside 20" in caplog.text
    # Nor is it in anybody's way.
    assert begin(shelf, "others", "c") == ["c"]
    shelf.release("others")
    places.found["a"] = (40, "a")
    assert begin(shelf, "back", *asked) == list(asked)
    shelf.close()


def test_one_that_grew_beyond_the_room_is_measured_by_its_own_size_while_others_ask_for_it():
    """Whoever asked beside another was told how large it had become, as if that were a fault of the request."""
    places, turns = Places(a=(110, "other")), threading.Semaphore(0)

    def read(folder, root, check):
        assert turns.acquire(timeout=60)
        return places(folder, root, check)

    shelf = AdapterShelf(read, 100, wait_s=0.0)
    shelf.register("a", "a", version="a")
    first, second = (shelf.lease(id, (("a", 1.0),)) for id in "12")
    turns.release()
    with pytest.raises(BusyError, match="adapter 'a' is known and cannot be read now"):
        first.result(60)
    # The second uses it, and reads nothing before its turn.
    third = shelf.lease("3", (("a", 1.0),))
    assert not third.done()
    turns.release()
    with pytest.raises(BusyError, match="adapter 'a' is known and cannot be read now"):
        second.result(60)
    # Once its files are back it is there, though somebody has used it all the time.
    fourth = shelf.lease("4", (("a", 1.0),))
    places.found["a"] = (40, "a")
    turns.release()
    third.result(60)
    fourth.result(60)
    assert [held.version for _, held, _ in shelf.held_by("4")] == ["a"]
    shelf.close()


def test_what_a_pinned_one_that_came_later_leaves_no_room_is_no_fault_of_who_asks_for_it(caplog):
    """It was loaded while the files of that were away."""
    places = Places(p=(40, "other"), a=(70, "a"), b=(20, "b"))
    shelf = AdapterShelf(places, 100, wait_s=0.0)
    shelf.register("p", "p", version="p", is_pinned=True)
    for name in "ba":
        shelf.load(name, name).result(60)
    places.found["p"] = (40, "p")
    assert begin(shelf, "1", "p") == ["p"]
    for number, asked in enumerate(("a", "ab", "ba", "pa")):
        with pytest.raises(BusyError, match="adapter 'a' is known and cannot be read now"):
            begin(shelf, str(number), *asked)
    assert (
        "adapter a cannot be read again: adapter 'a' takes 70 bytes beside 40 of those that are pinned" in caplog.text
    )
    assert begin(shelf, "2", "b", "p") == ["b", "p"]
    shelf.close()


def test_a_mixture_is_measured_again_once_its_files_are_back():
    places = Places(a=(90, "other"), b=(40, "b"))
    shelf = AdapterShelf(places, 100, wait_s=0.0)
    for name in "ab":
        shelf.register(name, name, version=name)
    with pytest.raises(CapacityError):
        begin(shelf, "1", "b", "a")
    places.found["a"] = (40, "a")
    assert begin(shelf, "2", "b", "a") == ["b", "a"]
    shelf.close()


def test_a_pinned_one_that_comes_later_is_as_any_other_until_it_is_there():
    places = Places(p=(90, "other"), q=(20, "q"), a=(60, "a"), b=(40, "b"))
    shelf = AdapterShelf(places, 100, wait_s=0.0)
    shelf.register("p", "p", version="p", is_pinned=True)
    shelf.load_now("q", "q", is_pinned=True)
    assert [(facts["name"], facts["pinned"], facts["in_memory"]) for facts in shelf.facts()] == [
        ("p", True, False),
        ("q", True, True),
    ]
    for refused in (lambda: shelf.remove("p"), lambda: shelf.load("p", "b")):
        with pytest.raises(InputError, match="'p' is pinned"):
            refused()
    with pytest.raises(BusyError, match="adapter 'p' is known and cannot be read now"):
        begin(shelf, "1", "p", "q")
    places.found["p"] = (40, "p")
    shelf.load("a", "a").result(60)
    # It waits for what others use, as they do.
    begin(shelf, "2", "a")
    with pytest.raises(BusyError, match="no memory for its adapters"):
        begin(shelf, "3", "p")
    shelf.release("2")
    assert begin(shelf, "4", "p", "q") == ["p", "q"]
    shelf.release("4")
    assert in_memory(shelf) == {"p", "q"}
    # From now on it stays, and its room is nobody else's.
    shelf.load("b", "b").result(60)
    assert in_memory(shelf) == {"p", "q", "b"}
    with pytest.raises(CapacityError, match="takes 60 bytes beside 60 of those that are pinned"):
        shelf.load("a", "a").result(60)
    shelf.close()


def test_one_that_cannot_be_read_for_no_reason_that_is_known(shelf, folders, caplog):
    def broken(folder, root, check):
        raise OSError(5, "Input/output error", "/somewhere/x")

    shelf._source.read = broken
    shelf.register("a", "40/a")
    with pytest.raises(BusyError) as raised:
        begin(shelf, "1", "a")
    assert "somewhere" not in str(raised.value)
    assert "/somewhere/x" in caplog.text


def test_the_root_is_known_at_every_read(shelf, folders):
    shelf.load("a", "40/a", "/root").result(60)
    shelf.load_now("p", "10", is_pinned=True)
    shelf.load("b", "80/b").result(60)
    begin(shelf, "1", "a")
    shelf.release("1")
    shelf.register("c", "40/c", "/other")
    begin(shelf, "2", "c")
    assert folders.roots == ["/root", None, None, "/root", "/other"]


def test_what_has_no_room_is_not_read(shelf, folders):
    shelf.load("a", "60/a").result(60)
    begin(shelf, "1", "a")
    for folder, error in (("101/b", CapacityError), ("41/b", BusyError)):
        with pytest.raises(error):
            shelf.load("b", folder).result(60)
        shelf.register(f"later-{error.__name__}", folder)
        with pytest.raises(error):
            begin(shelf, "2", f"later-{error.__name__}")
        shelf.release("2")
    assert folders.read == ["60/a"]


def test_a_mixture_that_never_fits_is_not_asked_for_again(shelf, folders):
    shelf.load_now("p", "20", is_pinned=True)
    for name in "abc":
        shelf.load(name, f"40/{name}").result(60)
    with pytest.raises(
        CapacityError, match="takes 40 bytes beside 20 of those that are pinned and 80 of the others in its mixture"
    ):
        begin(shelf, "1", "a", "b", "c", "p")
    shelf.release("1")
    # Two of them do, whoever is in memory; a third that another uses is no fault of theirs.
    assert begin(shelf, "2", "a", "b", "p") == ["40/a", "40/b", "20"]
    with pytest.raises(BusyError):
        begin(shelf, "3", "b", "c")
    shelf.release("2")
    shelf.release("3")
    assert begin(shelf, "4", "b", "c") == ["40/b", "40/c"]


def test_room_is_looked_for_again_where_the_size_was_told_too_small(shelf):
    def read(folder, root, check):
        check(1)
        return Fake(int(folder.partition("/")[0]), folder)

    shelf._source.read = read
    for name in "abc":
        shelf.register(name, f"60/{name}")
    with pytest.raises(CapacityError, match="takes 60 bytes beside 60 of the others in its mixture"):
        begin(shelf, "1", "a", "b")
    shelf.release("1")
    with pytest.raises(CapacityError, match="takes 101 bytes, and"):
        shelf.load("d", "101").result(60)
    assert begin(shelf, "2", "c") == ["60/c"]


def test_an_error_keeps_nothing_of_what_was_read(shelf, folders):
    class Watched(Fake):
        pass

    def read(folder, root, check):
        made.append(weakref.ref(held := Watched(101, folder)))
        try:
            raise OSError("the frame of this one has it too", held)
        except OSError:
            if folder == "bad":
                raise CheckpointError("damaged")  # noqa: B904 - the context is what is tested
        return held

    made, shelf._source.read = [], read
    gc.disable()
    try:
        for folder, error in (("large", CapacityError), ("bad", CheckpointError)):
            future = shelf.load("a", folder)
            kept = future.exception(10)
            assert isinstance(kept, error)
            until(lambda: made[-1]() is None)
    finally:
        gc.enable()


# Requests that wait


@pytest.fixture
def timed(folders):
    """A shelf, and the seconds that it is told."""
    now = [0.0]
    made = AdapterShelf(folders, 100, lambda: now[0])
    for name in "pqrs":
        made.register(name, f"50/{name}")
    made.register("all", "100/all")
    yield made, now
    made.close()


def waits(shelf, id, *names, key):
    """What a request waits by; it does not have its adapters yet."""
    future = shelf.lease(id, tuple((name, 1.0) for name in names), key)
    assert future is not None

    def is_waiting():
        with shelf._lock:
            return id in {one.id for one in shelf._line}

    # What was never read is looked at first.
    until(lambda: is_waiting() or future.done())
    assert not future.done()
    return future


def test_who_waits_begins_as_soon_as_there_is_room(timed):
    shelf, _ = timed
    assert begin(shelf, "1", "p", key="a") == ["50/p"]
    assert begin(shelf, "2", "q", key="a") == ["50/q"]
    ready = waits(shelf, "3", "r", key="b")
    shelf.release("1")
    ready.result(60)
    assert [held.version for _, held, _ in shelf.held_by("3")] == ["50/r"]
    assert in_memory(shelf) == {"q", "r"}


@pytest.mark.parametrize("wanted", ["r", "all"])
def test_a_key_whose_requests_always_overlap_makes_room_for_another(timed, wanted):
    shelf, _ = timed
    begin(shelf, "1", "p", key="a")
    begin(shelf, "2", "q", key="a")
    ready = waits(shelf, "b", wanted, key="b")
    # Of a's the next come before the last have ended; with what has to fall idle they wait behind b's, with the rest they begin.
    first = waits(shelf, "3", "p", key="a")
    second = waits(shelf, "4", "q", key="a") if wanted == "all" else shelf.lease("4", (("q", 1.0),), "a")
    shelf.release("1")
    shelf.release("2")
    ready.result(60)
    assert not first.done()
    assert second is None or not second.done()
    shelf.release("b")
    first.result(60)
    if second is not None:
        second.result(60)


def test_keys_take_turns(timed):
    """Of a key that asks for much at once nobody waits for more than the first."""
    shelf, _ = timed
    begin(shelf, "0", "all", key="z")
    asked = [(f"a{number}", "pq"[number % 2], "a") for number in range(6)] + [("b", "r", "b"), ("c", "s", "c")]
    futures = {id: waits(shelf, id, name, key=key) for id, name, key in asked}
    order = []
    for id, future in futures.items():
        future.add_done_callback(lambda _, id=id: order.append(id))
    shelf.release("0")
    for number in range(len(asked)):
        until(lambda number=number: len(order) > number)
        shelf.release(order[number])
    # Beside its first go those that want the same.
    assert order[:2] == ["a0", "b"]
    assert order.index("c") < order.index("a1")


@pytest.mark.parametrize("pinned", [False, True])
def test_who_is_kept_waiting_by_its_own_key_keeps_nobody_waiting(folders, pinned):
    """A key with two long requests that asked for a third shut all others out: also out of what was in memory, in use or pinned."""
    shelf = AdapterShelf(folders, 150 if pinned else 100)
    if pinned:
        shelf.load_now("mine", "50/mine", is_pinned=True)
    for name in "pqr":
        shelf.register(name, f"50/{name}")
    begin(shelf, "1", "p", key="h")
    begin(shelf, "2", "q", key="h")
    hers = waits(shelf, "3", "r", key="h")
    for number in range(20):
        assert begin(shelf, f"b{number}", "mine" if pinned else "q", key="b")
        shelf.release(f"b{number}")
    shelf.release("1")
    hers.result(60)
    shelf.close()


def test_nobody_waits_for_ever_nor_keeps_others_waiting_for_more_than_half_of_the_time(timed):
    shelf, now = timed
    begin(shelf, "1", "p", key="h1")
    begin(shelf, "2", "q", key="h2")
    hers, his = waits(shelf, "3", "r", key="h3"), waits(shelf, "4", "p", key="b")
    now[0] += WAIT_S - 1
    shelf.advance()
    assert not hers.done()
    assert not his.done()
    now[0] += 1
    shelf.advance()
    with pytest.raises(BusyError, match="there was no memory for its adapters beside those in use; ask again"):
        hers.result(60)
    # Of one that came as late nobody knows; it asks again, and goes before h3, which waits without the right of way.
    again = waits(shelf, "5", "r", key="h3")
    assert begin(shelf, "6", "p", key="b") == ["50/p"]
    shelf.release("6")
    now[0] += WAIT_S / 2
    assert begin(shelf, "7", "p", key="b") == ["50/p"]
    shelf.release("7")
    # Room that falls idle is its own all the same.
    shelf.release("1")
    again.result(60)


def test_who_goes_away_while_waiting_is_forgotten(timed):
    shelf, _ = timed
    begin(shelf, "1", "all", key="a")
    gone, kept = waits(shelf, "2", "p", key="b"), waits(shelf, "3", "q", key="c")
    gone.cancel()
    shelf.release("2")
    shelf.release("1")
    kept.result(60)
    assert shelf.held_by("2") == ()
    assert in_memory(shelf) == {"q"}
    shelf.release("3")
    assert all(facts["requests"] == 0 for facts in shelf.facts())


def test_so_many_wait_and_no_more_of_one_key_than_its_part(timed):
    shelf, _ = timed
    begin(shelf, "0", "p", key="z")
    shelf.release("0")
    begin(shelf, "0", "all", key="z")
    waiting = [shelf.lease(f"a{number}", (("p", 1.0),), "a") for number in range(MOST_WAITING)]
    refused = [future for future in waiting if future.done()]
    assert len(refused) == MOST_WAITING // 2
    with pytest.raises(BusyError, match="too many requests wait for memory for adapters; ask again"):
        refused[0].result()
    waits(shelf, "b", "q", key="b")


def test_who_waits_when_the_engine_ends_is_told(timed):
    shelf, _ = timed
    begin(shelf, "1", "all", key="a")
    future = waits(shelf, "2", "p", key="b")
    shelf.close()
    with pytest.raises(BusyError, match="the engine ends"):
        future.result(60)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["p", "q", "r", "s", "pq", "all"])), max_size=30))
def test_every_request_has_its_adapters_in_the_end(asked):
    """Whatever keys ask for at once, each ends a step after it began, and memory is never overdrawn."""
    shelf = AdapterShelf(Folders(), 100)
    for name in "pqrs":
        shelf.register(name, f"50/{name}")
    shelf.register("all", "100/all")
    futures = {}
    for number, (key, names) in enumerate(asked):
        mixture = tuple((name, 1.0) for name in (["all"] if names == "all" else names))
        futures[str(number)] = shelf.lease(str(number), mixture, key)
    while futures:
        until(lambda: any(future is None or future.done() for future in futures.values()))
        for id, future in list(futures.items()):
            if future is None or future.done():
                assert future is None or future.result() is None
                assert len(shelf.held_by(id)) == (2 if asked[int(id)][1] == "pq" else 1)
                assert shelf.stats().gauges["adapter_resident_bytes"] <= 100
                shelf.release(id)
                del futures[id]
    assert all(facts["requests"] == 0 for facts in shelf.facts())
    shelf.close()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["load", "begin", "end", "remove"]), st.sampled_from("abcd"), st.integers(1, 60)),
        max_size=40,
    )
)
def test_no_room_is_ever_overdrawn_and_nobody_loses_an_adapter(steps):
    shelf, running, versions = AdapterShelf(Folders(), 100, wait_s=0.0), {}, {}
    for number, (step, name, size) in enumerate(steps):
        try:
            if step == "load":
                shelf.load_now(name, f"{size}/{number}")
                versions[name] = f"{size}/{number}"
            elif step == "remove":
                shelf.remove(name)
                del versions[name]
            elif step == "begin":
                future = shelf.lease(str(number), ((name, 1.0),))
                try:
                    if future is not None:
                        future.result(60)
                except BusyError:
                    shelf.release(str(number))
                else:
                    running[str(number)] = versions[name]
            elif running:
                id = next(iter(running))
                shelf.release(id)
                del running[id]
        except (InputError, BusyError):
            pass
        assert {id: shelf.held_by(id)[0][1].version for id in running} == running
        assert shelf.stats().gauges["adapter_resident_bytes"] <= 100
        assert set(shelf.names) == set(versions)
    for id in running:
        shelf.release(id)
    assert all(facts["requests"] == 0 for facts in shelf.facts())
    shelf.close()
