"""`AdapterMemory` by hand: which adapters leave for one more."""

import itertools
from types import SimpleNamespace

import pytest

from anabranch.errors import CapacityError
from anabranch.serving.core.adapter_entry import Entry
from anabranch.serving.core.adapter_memory import KEPT_S, AdapterMemory, NoRoomError
from anabranch.serving.core.adapter_room import AdapterRoom, Waiter


class Memory:
    """Room for 100 bytes. ``p50`` is an adapter of 50."""

    def __init__(self):
        self.now, self.serial = 1000.0, itertools.count()
        self.room = AdapterRoom(100)
        self.memory = AdapterMemory(self.room, lambda: self.now)

    def entry(self, name):
        return self.memory.entries.setdefault(name, Entry(name, name, size=int(name[1:])))

    def leaves(self, name, key=None, **how):
        return [entry.name for entry in self.memory.find_room(self.entry(name), key=key, **how)]

    def use(self, key, *names, ends=True):
        one = Waiter(f"{next(self.serial)}", key, tuple((self.entry(name), 1.0) for name in names))
        self.room.begin(one)
        for entry in one.adapters:
            if entry.held is None:
                self.memory.hold(entry, SimpleNamespace(nbytes=entry.size, version="v"), together=one.adapters, key=key)
        if ends:
            assert self.memory.end(one.id)
        return one

    @property
    def there(self):
        return {name for name, entry in self.memory.entries.items() if entry.held is not None}


def test_the_least_recently_used_leaves_first_and_no_more_than_have_to():
    made = Memory()
    for name in ("p30", "q30", "r30"):
        made.use("a", name)
    made.use("a", "p30")
    assert made.leaves("s10") == []
    assert made.leaves("s20", "a") == ["q30"]
    assert made.leaves("s50", "a") == ["q30", "r30"]
    assert made.memory.num_evictions == 0


def test_what_is_in_use_or_pinned_stays():
    made = Memory()
    made.use("a", "p30", ends=False)
    made.use("a", "q30")
    made.entry("r30").is_pinned = True
    made.memory.hold(made.entry("r30"), SimpleNamespace(nbytes=30, version="v"))
    assert made.leaves("s40") == ["q30"]
    with pytest.raises(NoRoomError, match="takes 50 bytes, and those in use 60 of 100"):
        made.leaves("s50")
    with pytest.raises(CapacityError, match="beside 30 of those that are pinned"):
        made.leaves("s80")


def test_a_flood_of_one_key_s_pushes_out_its_own():
    made = Memory()
    made.use("b", "b10")
    made.use("b", "c10")
    for number in range(30):
        made.use("h", f"{chr(100 + number)}20")
        assert {"b10", "c10"} <= made.there
    # Of a key that is not there yet, too, it is the flood's that go.
    assert all(name.endswith("20") for name in made.leaves("x50", "c"))
    # Beyond its part a key has what nobody else wants.
    assert len(made.there) == 6


def test_a_key_s_own_part_goes_before_that_of_another():
    made = Memory()
    made.use("b", "b50")
    made.use("h", "h50")
    assert made.leaves("i50", "h") == ["h50"]
    assert made.leaves("i50", "b") == ["b50"]
    assert made.leaves("i100", "h") == ["h50", "b50"]
    # Neither is an operator's, nor a third key's.
    assert made.leaves("i50", "c") == made.leaves("i50") == ["b50"]


def test_a_part_is_kept_for_a_minute_after_it_was_used():
    made = Memory()
    made.use("b", "b20")
    made.now += KEPT_S - 1
    made.use("b", "b20")
    made.now += KEPT_S - 1
    for number in range(8):
        made.use("h", f"{chr(100 + number)}20")
        assert "b20" in made.there
    made.now += 1
    made.use("h", "z20")
    assert "b20" not in made.there


def test_what_another_key_uses_once_stays_of_the_part_of_those_that_used_it():
    made = Memory()
    for _ in range(3):
        made.now += 1
        made.use("b", "p10")
        made.use("h", "p10")
        for number in range(10):
            made.use("h", f"{chr(100 + number)}10")
            assert "p10" in made.there
    # It is of another's part also for who has used it last.
    assert made.leaves("z100", "h")[-1] == "p10"
    assert set(made.entry("p10").used_by) == {"b", "h"}
    # A minute later it is of the part of none but who uses it again.
    made.now += KEPT_S
    made.use("h", "p10")
    assert set(made.entry("p10").used_by) == {"h"}
    for number in range(10):
        made.use("h", f"{chr(100 + number)}10")
    assert "p10" not in made.there


def test_what_a_key_s_request_uses_is_of_its_part_however_long_that_takes():
    made = Memory()
    first = made.use("b", "c20", ends=False)
    one = made.use("b", "b40", ends=False)
    made.use("b", "b40")
    made.now += 2 * KEPT_S
    assert made.memory.end(first.id)
    made.use("h", "h10")
    # Of its 50 the one that is in use has 40, whatever else it used less than a minute ago.
    assert made.leaves("i40", "h") == ["c20"]
    assert made.leaves("i60", "h") == ["c20", "h10"]
    # The minute begins when the last request of the key has ended, not the first.
    assert made.memory.end(one.id)
    made.now += KEPT_S - 1
    made.use("h", "h10")
    assert made.leaves("i70", "h") == ["c20", "h10", "b40"]
    made.now += 2
    assert made.leaves("i70", "h") == ["c20", "b40"]


def test_what_no_key_has_asked_for_goes_first():
    made = Memory()
    made.use("a", "p50")
    made.memory.hold(made.entry("x40"), SimpleNamespace(nbytes=40, version="v"))
    made.room.touch(made.entry("x40"))
    assert made.leaves("s50", "a") == made.leaves("s50", "b") == ["x40"]


def test_what_takes_the_place_of_another_has_its_room_unless_that_is_in_use():
    made = Memory()
    made.use("a", "p60")
    new = Entry("p60", "new", size=80)
    assert made.memory.find_room(new, before=made.entry("p60")) == []
    one = made.use("a", "p60", ends=False)
    with pytest.raises(NoRoomError):
        made.memory.find_room(new, before=made.entry("p60"))
    # It is known no more, and leaves with the last that used it.
    old = made.entry("p60")
    made.memory.entries["p60"] = new
    assert made.memory.all() == [new, old]
    assert made.memory.end(one.id)
    assert old.held is None
    assert made.memory.all() == [new]
    assert not made.memory.end(one.id)
