"""`AdapterRoom` by hand: bytes count once, pinned ones are always there, and what falls idle is free."""

from anabranch.serving.core.adapter_entry import Entry
from anabranch.serving.core.adapter_room import AdapterRoom, Waiter


def made(most_bytes=10, **sizes):
    """A room, and adapters of these sizes; p is pinned."""
    room, entries = AdapterRoom(most_bytes), {}
    for name, size in sizes.items():
        entries[name] = entry = Entry(name, name, None, name == "p")
        entry.size = size
        if entry.is_pinned:
            entry.held = "there"
            room.pinned.append(entry)
    return room, lambda id, key, *names: Waiter(id, key, tuple((entries[name], 1.0) for name in names))


def names(entries):
    return [entry.name for entry in entries]


def test_an_adapter_takes_its_bytes_once_however_many_use_it():
    room, one = made(a=6, b=5)
    room.begin(one("1", "x", "a"))
    room.begin(one("2", "y", "a"))
    assert room.adds_nothing(one("3", "z", "a"))
    assert not room.fits(one("3", "z", "b"))
    assert room.end("1") == []
    assert not room.fits(one("3", "z", "b"))
    assert names(room.end("2")) == ["a"]
    assert room.fits(one("3", "z", "b"))
    assert room.end("2") is None


def test_pinned_ones_are_always_there_and_never_fall_idle():
    room, one = made(p=4, a=6, b=7)
    assert room.fits_ever(one("1", "x", "a", "p"))
    assert not room.fits_ever(one("1", "x", "b"))
    room.begin(one("1", "x", "a", "p"))
    assert names(room.closable(one("2", "y", "b"))) == ["a"]
    assert room.adds_nothing(one("2", "y", "p"))


def test_what_a_key_uses_itself_is_not_closed_for_it_and_the_least_used_goes_first():
    room, one = made(a=3, b=3, c=3, d=4)
    room.begin(one("1", "x", "a"))
    for number in "23":
        room.begin(one(number, "y", "b"))
    room.begin(one("4", "z", "c"))
    wanted = one("5", "x", "d")
    assert not room.fits(wanted)
    assert room.fits_beside_own(wanted)
    closable = room.closable(wanted)
    assert names(closable) == ["c", "b"]
    # Nine of ten are in use, and four are wanted.
    assert room.num_needed(wanted, closable) == 1
    # Beside the head, once c is idle: a and b and d fill the room.
    assert room.spares(one("6", "y", "a"), wanted, closable[:1])
