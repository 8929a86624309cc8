"""Reads of adapters that take time, by a clock of their own: keys take turns, one read each, and keep what is theirs."""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CapacityError
from anabranch.serving.core.adapter_shelf import AdapterShelf

READ_S = 0.3


@dataclass(eq=False)
class Numbers:
    nbytes: int
    version: str
    told: ClassVar[dict[str, str]] = {}


class Reading:
    """A shelf with room for ``most`` bytes whose every adapter has ten and is read in `READ_S`; what is read by whoever calls `step`."""

    def __init__(self, most):
        self.now, self.numbers, self.read, self.then = 0.0, itertools.count(), [], {}
        # Called while the next is read.
        self.meanwhile = []
        self.shelf = AdapterShelf(self._read, most, lambda: self.now)
        self.shelf._watch = lambda: None
        self.shelf._reads._threads.shutdown()
        self.shelf._reads._threads = SimpleNamespace(submit=lambda work: None, shutdown=lambda **how: None)

    def _read(self, folder, root, check):
        check(10)
        self.now += READ_S
        self.read.append(folder)
        while self.meanwhile:
            self.meanwhile.pop()()
        return Numbers(10, folder)

    def know(self, *names):
        """Adapters that were in memory once, so that their sizes are known."""
        for name in names:
            self.shelf.register(name, name)
            self.ask("nobody", name)
            self.settle()
        self.now, self.read = 1000.0, []

    def ask(self, key, *names):
        """A request of one token; what follows it is called, with the seconds that it waited, as soon as it has its adapters."""
        id, asked_at = f"{key}-{next(self.numbers)}", self.now
        one = SimpleNamespace(id=id, key=key, waited=None, then=lambda: None)
        future = self.shelf.lease(id, tuple((name, 1.0) for name in names), key)

        def told(future):
            one.waited = self.now - asked_at
            assert future is None or future.exception() is None
            self.then[id] = one

        told(None) if future is None else future.add_done_callback(told)
        return one

    def end(self):
        """All that have their adapters end, and what comes then comes."""
        there, self.then = self.then, {}
        for one in there.values():
            self.shelf.release(one.id)
            one.then()

    def step(self):
        """One read, or a while without one."""
        self.end()
        if not self.shelf._reads.run_next():
            self.now += 0.1
        self.shelf.advance()
        self.end()

    def settle(self):
        self.end()
        while self.shelf._reads.run_next():
            self.end()


def flood(made, key, names, many):
    """A key has so many requests under way at a time, each for the next of its adapters."""
    wanted = itertools.cycle(names)

    def ask():
        made.ask(key, next(wanted)).then = ask

    for _ in range(many):
        ask()


FLOODS = st.tuples(st.integers(1, 3), st.integers(1, 60), st.booleans(), st.sampled_from([200, 1000]))


def waits_for_few_reads(num_keys, many, is_known, most):
    made = Reading(most)
    names = {key: [f"{key}{number}" for number in range(100)] for key in "hij"[:num_keys]}
    for name in ["b0", "b1", "b2", *itertools.chain(*names.values())]:
        made.know(name) if is_known else made.shelf.register(name, name)
    for key, own in names.items():
        flood(made, key, own, many)
    waits = []
    for number in range(12):
        made.step()
        one = made.ask("b", f"b{number % 3}")
        until = made.now + 20.0
        while one.waited is None and made.now < until:
            made.step()
        waits.append(one.waited)
    # The one that is read, one of each other key where something has to fall idle for it, one of each other key, and its own.
    assert max(waits) <= (2 * num_keys + 2) * READ_S + 0.11
    # Its own stay in memory, its part of which they are.
    assert sorted(made.read.count(f"b{number}") for number in range(3)) == [1, 1, 1]
    if 10 * (num_keys * many + 1) <= most:
        assert max(waits[3:]) == 0.0


@settings(max_examples=4, deadline=None)
@given(FLOODS)
def test_a_key_waits_for_one_read_of_each_other_however_many_they_ask_for(scene):
    """All waited in one line in the order of asking: a key with a hundred made each request of another wait for a hundred reads."""
    waits_for_few_reads(*scene)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(FLOODS)
def test_a_key_waits_for_one_read_of_each_other_in_many_scenes(scene):
    waits_for_few_reads(*scene)


def test_a_mixture_has_a_turn_for_each_of_its_adapters():
    made = Reading(1000)
    for name in ["b", *(f"h{number}" for number in range(20))]:
        made.shelf.register(name, name)
    mixed, others = made.ask("h", *(f"h{number}" for number in range(20))), []
    made.meanwhile.append(lambda: others.append(made.ask("b", "b")))
    made.settle()
    assert others[0].waited == pytest.approx(READ_S)
    assert mixed.waited == pytest.approx(21 * READ_S)
    assert made.read == ["h0", "b", *(f"h{number}" for number in range(1, 20))]


def test_what_an_operator_loads_has_its_turn():
    made = Reading(1000)
    for number in range(20):
        made.shelf.register(f"h{number}", f"h{number}")
        made.ask("h", f"h{number}")
    loads = []
    made.meanwhile.append(lambda: loads.extend(made.shelf.load(name, name) for name in ("x", "y")))
    for _ in range(5):
        made.step()
    assert made.read == ["h0", "x", "h1", "y", "h2"]
    assert [future.result(0)["name"] for future in loads] == ["x", "y"]


def test_what_a_key_reads_beyond_its_part_takes_the_place_of_its_own():
    made = Reading(20)
    for key, name in (("b", "b0"), ("h", "h0"), ("h", "h1"), ("h", "h2")):
        made.shelf.register(name, name)
        made.ask(key, name)
        made.settle()
        made.settle()
    assert {facts["name"] for facts in made.shelf.facts() if facts["in_memory"]} == {"b0", "h2"}


def test_what_was_read_for_nobody_does_not_stay():
    """Its request has gone while it was read, and it was unloaded."""
    made = Reading(1000)
    made.shelf.register("p", "p")
    one = made.ask("a", "p")
    read = made.shelf._source.read

    def gone(folder, root, check):
        held = read(folder, root, check)
        made.shelf.release(one.id)
        made.shelf.remove("p")
        return held

    made.shelf._source.read = gone
    made.step()
    assert made.read == ["p"]
    assert made.shelf.stats().counters["adapter_loads"] == 0
    assert made.shelf._memory.all() == []


def test_who_goes_while_its_first_is_read_has_the_others_not_read():
    made = Reading(1000)
    for name in "pqr":
        made.shelf.register(name, name)
    one = made.ask("a", "p", "q", "r")
    read = made.shelf._source.read

    def gone(folder, root, check):
        if folder == "p":
            made.shelf.release(one.id)
        return read(folder, root, check)

    made.shelf._source.read = gone
    made.settle()
    assert made.read == ["p"]
    assert all(facts["requests"] == 0 for facts in made.shelf.facts())


def test_a_mixture_that_never_fits_takes_nothing_out_of_memory_where_its_sizes_were_not_known():
    """All but its last were read, and others' left memory for them; so at the first request behind an engine's start."""
    made = Reading(30)
    made.know("b0", "b1")
    for number in range(4):
        made.shelf.register(f"h{number}", f"h{number}")
    refused = made.shelf.lease("never", tuple((f"h{number}", 0.25) for number in range(4)), "h")
    made.settle()
    with pytest.raises(
        CapacityError, match="takes 10 bytes beside 30 of the others in its mixture, and adapters may take 30"
    ):
        refused.result(0)
    assert made.read == []
    assert {facts["name"] for facts in made.shelf.facts() if facts["in_memory"]} == {"b0", "b1"}
    # Three of them fit, once those of before have left; now that their sizes are known a fourth is refused without a look.
    fits = made.ask("h", "h0", "h1", "h2")
    made.settle()
    assert fits.waited == pytest.approx(3 * READ_S)
    made.end()
    assert isinstance(
        made.shelf.lease("again", tuple((f"h{number}", 0.25) for number in range(4)), "h").exception(), CapacityError
    )


def test_what_takes_more_than_its_folder_tells_keeps_its_room_while_it_is_read_again():
    made = Reading(100)
    sizes = {"p": (40, 40), "c": (1, 60), "q": (50, 50)}
    meanwhile = []

    def told(folder, root, check):
        said, held = sizes[folder]
        check(said)
        while meanwhile:
            meanwhile.pop()()
        return Numbers(held, folder)

    made.shelf._source.read = told
    made.know("p", "c", "q")
    made.shelf.lease("p", (("p", 1.0),), "a")
    made.settle()
    large, late = made.shelf.lease("c", (("c", 1.0),), "b"), []
    meanwhile.append(lambda: late.append(made.shelf.lease("q", (("q", 1.0),), "h")))
    made.settle()
    assert large.done()
    assert large.exception() is None
    assert not late[0].done()
    made.shelf.release("c")
    made.settle()
    assert late[0].result(0) is None


def test_one_whose_size_nobody_knew_waits_behind_who_has_the_right_of_way():
    """It has begun before its size is known: where the first in line would have no room beside it, it is as if it came then."""
    made = Reading(100)
    sizes = {"p": 50, "q": 60, "u": 45}

    def told(folder, root, check):
        check(sizes[folder])
        return Numbers(sizes[folder], folder)

    made.shelf._source.read = told
    made.know("p", "q")
    made.shelf.register("u", "u")
    made.shelf.lease("p", (("p", 1.0),), "a")
    made.settle()
    first = made.shelf.lease("q", (("q", 1.0),), "b")
    later = made.shelf.lease("u", (("u", 1.0),), "h")
    made.settle()
    # Beside p it had room.
    assert not first.done()
    assert not later.done()
    made.shelf.release("p")
    made.settle()
    assert first.result(0) is None
    assert not later.done()
    made.shelf.release("q")
    made.settle()
    assert later.result(0) is None
