"""Keys that share the memory for adapters, with a clock of their own: what holds whatever they ask for, cancel and load."""

import heapq
import itertools
import math
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakSet

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import AnabranchError, CapacityError, InputError
from anabranch.serving.core.adapter_shelf import AdapterShelf

MOST, WAIT_S = 100, 30.0


@dataclass(eq=False)
class Numbers:
    nbytes: int
    version: str
    told: ClassVar[dict[str, str]] = {"kind": "made up"}


@dataclass(eq=False)
class Asked:
    """A request: its adapters, how long it lasts once it has begun, and when what became of it."""

    id: str
    key: str
    names: tuple[str, ...]
    length: float
    at: float
    ready: Any = None
    began: float | None = None
    ended: float | None = None
    refused: bool = False
    then: list = field(default_factory=list)


class Shared:
    """A shelf that reads at once, and requests that begin and end by a clock; what holds always is looked at after each step."""

    def __init__(self, sizes, pinned=(), *, known=None):
        self.now, self.events, self.serial = 0.0, [], itertools.count()
        self.sizes, self.alive = dict(sizes), WeakSet()
        self.waiting, self.running = {}, {}
        self.shelf = AdapterShelf(self._read, MOST, lambda: self.now, WAIT_S)
        self.shelf._submit = self._at_once
        self.shelf._watch = lambda: None
        for name in pinned:
            self.shelf.load_now(name, name, is_pinned=True)
        for name in self.sizes:
            if name not in pinned:
                self.shelf.register(name, name)
                if known is None or name in known:
                    self.ask("nobody", name, length=0.0)
                    self.run(self.now)
        self.pinned = set(pinned)

    @staticmethod
    def _at_once(key, work):
        done = Future()
        done.set_result(work())
        return done

    def _read(self, folder, root, check):
        check(self.sizes[folder])
        held = Numbers(self.sizes[folder], folder)
        self.alive.add(held)
        return held

    def at(self, when, what):
        heapq.heappush(self.events, (when, next(self.serial), what))

    def ask(self, key, *names, length, until=math.inf):
        """One request, which its sender leaves after ``until`` seconds."""
        one = Asked(f"{key}{next(self.serial)}", key, names, length, self.now)
        try:
            one.ready = self.shelf.lease(one.id, tuple((name, 1.0) for name in names), key)
        except InputError:
            one.refused = True
            return one
        self.waiting[one.id] = one
        self.at(self.now + WAIT_S, self.shelf.advance)
        if until < math.inf:
            self.at(self.now + until, lambda: self.end(one))
        return one

    def end(self, one):
        if one.id in self.waiting or one.id in self.running:
            self.waiting.pop(one.id, None)
            self.running.pop(one.id, None)
            one.ended = self.now
            self.shelf.release(one.id)

    def settle(self):
        while done := [one for one in self.waiting.values() if one.ready is None or one.ready.done()]:
            for one in done:
                error = None if one.ready is None else one.ready.exception()
                if error is None:
                    del self.waiting[one.id]
                    self.running[one.id], one.began = one, self.now
                    assert len(self.shelf.held_by(one.id)) == len(one.names)
                    self.at(self.now + one.length, lambda one=one: self.end(one))
                else:
                    assert isinstance(error, AnabranchError)
                    one.refused = True
                    self.end(one)
                for what in one.then:
                    what()
                one.then.clear()

    def run(self, until, check=lambda: None):
        while self.events and self.events[0][0] <= until:
            self.now, _, what = heapq.heappop(self.events)
            what()
            self.settle()
            self.look()
            check()
        self.now = until

    def look(self):
        """What holds always."""
        shelf, line, room = self.shelf, self.shelf._line, self.shelf._room
        # The gauge is the truth, and that is within the limit.
        there = sum(held.nbytes for held in self.alive)
        assert shelf.stats().gauges["adapter_resident_bytes"] == there <= MOST
        assert sum(entry.size for entry in room.used | set(room.pinned)) <= MOST
        # Nobody is kept or forgotten who is not here, and nobody waits for longer than may be.
        assert {one.id for one in line} == set(self.waiting)
        assert all(self.now <= one.at + WAIT_S for one in self.waiting.values())
        assert room._leases.keys() == self.running.keys()
        # Who adds no bytes waits only for what has to fall idle for another; and whoever waits with nobody before it has no room.
        closed, used = line.closed(self.now), room.used | set(room.pinned)
        assert not closed & set(room.pinned)
        assert line.head is None or sum(entry.size for entry in closed) > 0
        for waiter in line:
            if waiter.adapters <= used:
                assert waiter.adapters & closed
                assert waiter is not line.head
            if line.head is None or waiter is line.head:
                assert sum(entry.size for entry in used | waiter.adapters) > MOST

    def finish(self):
        """All end; nothing is kept of anybody."""
        self.run(self.now + 1000.0)
        shelf, line = self.shelf, self.shelf._line
        shelf.release("somebody else's")
        shelf._line.go(self.now)
        assert not len(line)
        assert not self.waiting
        assert not self.running
        assert not shelf._room.used
        assert all(facts["requests"] == 0 for facts in shelf.facts())
        assert (line.head, line._served, line._vain, line._kept) == (None, {}, {}, {})


# What a key does: `flow` has so many requests at a time, of which the next comes before one ends; `flood` asks for all at once; `leaver`
# asks again and again and leaves before it is served.
KEYS = st.tuples(
    st.sampled_from(["flow", "flow", "flood", "leaver"]),
    st.lists(st.lists(st.sampled_from("pqrstm"), min_size=1, max_size=2, unique=True), min_size=1, max_size=3),
    st.sampled_from([0.5, 1.0, 2.5, 4.0]),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.3, 1.7]),
)
SIZES = st.fixed_dictionaries({name: st.integers(5, 90) for name in "pqrst"}).map(lambda sizes: {**sizes, "m": 10})
LONGEST = 4.0


def live(shared, key, behaviour, until):
    """Let a key do what it does up to a time."""
    kind, wanted, length, many, first = behaviour
    asked = itertools.cycle(wanted)

    def next_one():
        if shared.now < until and sum(one.key == key for one in shared.waiting.values()) < 12:
            one = shared.ask(key, *next(asked), length=length)
            one.then.append(lambda: shared.at(shared.now + 0.9 * length, next_one) if one.began is not None else None)

    def flood():
        for _ in range(3 * many):
            shared.ask(key, *next(asked), length=length)
        if shared.now < until:
            shared.at(shared.now + 8.0, flood)

    def leave():
        for number in range(many):
            shared.ask(key, *next(asked), length=length, until=0.2 + number)
        if shared.now < until:
            shared.at(shared.now + 0.7, leave)

    for number in range(many if kind == "flow" else 1):
        shared.at(first + 0.4 * number, {"flow": next_one, "flood": flood, "leaver": leave}[kind])


SCENES = st.tuples(
    SIZES,
    st.booleans(),
    st.lists(KEYS, min_size=1, max_size=5),
    st.lists(st.sampled_from("pqrst"), min_size=1, max_size=2, unique=True),
)


def begins_within_a_bound(sizes, is_known, keys, wanted):
    """(n + 1) L seconds, where n other keys wait when it comes and no request lasts for longer than L."""
    wanted = wanted if sum(sizes[name] for name in wanted) <= 90 else wanted[:1]
    # How large those of others are may be found out as they ask for them.
    shared = Shared(sizes, "m", known=None if is_known else wanted)
    for number, behaviour in enumerate(keys):
        live(shared, f"k{number}-", behaviour, 18.0)
    bounds = []

    def ask():
        others = {one.key for one in shared.waiting.values()}
        one = shared.ask("victim", *wanted, length=0.5)
        bounds.append((one, (len(others) + 1) * LONGEST))
        one.then.append(lambda: shared.at(shared.now + 1.0, ask) if shared.now < 16.0 else None)

    shared.at(3.1, ask)
    shared.run(100.0)
    assert bounds
    for one, bound in bounds:
        assert one.began is not None
        assert one.began - one.at <= bound + 1e-6
    shared.finish()


@settings(max_examples=15, deadline=None)
@given(SCENES)
def test_a_key_with_one_request_at_a_time_begins_within_a_bound(scene):
    begins_within_a_bound(*scene)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(SCENES)
def test_a_key_with_one_request_at_a_time_begins_within_a_bound_in_many_scenes(scene):
    begins_within_a_bound(*scene)


@settings(max_examples=80, deadline=None)
@given(
    SIZES,
    st.lists(
        st.tuples(
            st.sampled_from(["ask", "ask", "ask", "cancel", "wait", "load", "remove", "late"]),
            st.sampled_from("abc"),
            st.lists(st.sampled_from("pqrstm"), min_size=1, max_size=3, unique=True),
            st.integers(1, 90),
        ),
        max_size=50,
    ),
)
def test_memory_is_never_overdrawn_and_nobody_is_left(sizes, steps):
    """Whoever asks, cancels, loads and unloads in whatever order, also adapters that are in use or waited for; requests of any length."""
    shared, versions = Shared(sizes, "m"), itertools.count()
    for what, key, names, number in steps:
        if what == "ask":
            shared.ask(key, *names, length=float(number))
        elif what == "cancel" and (there := [*shared.waiting.values(), *shared.running.values()]):
            shared.end(there[number % len(there)])
        elif what == "wait":
            shared.run(shared.now + number / 4)
        elif what == "load":
            folder = f"{names[0]}{next(versions)}"
            shared.sizes[folder] = number
            try:
                shared.shelf.load_now(names[0], folder)
            except AnabranchError:
                pass
        elif what == "remove":
            try:
                shared.shelf.remove(names[0])
            except InputError:
                pass
        elif what == "late":
            shared.run(shared.now + WAIT_S)
        shared.settle()
        shared.look()
    shared.finish()


@pytest.mark.parametrize("what", ["remove", "replace"])
def test_an_adapter_that_goes_while_a_request_waits_for_it_is_counted(what):
    shared = Shared({"p": 50, "q": 50, "r": 50, "r2": 50})
    first, second, third = (
        shared.ask(key, name, length=length)
        for key, name, length in (("a", "p", 1.0), ("a", "q", 9.0), ("b", "r", 9.0))
    )
    shared.settle()
    assert (first.began, second.began, third.began) == (0.0, 0.0, None)
    shared.shelf.remove("r")
    shared.run(1.0)
    assert third.began == 1.0
    if what == "replace":
        with pytest.raises(AnabranchError):
            shared.shelf.load_now("r", "r2")
    fourth = shared.ask("c", "p", length=1.0)
    shared.run(5.0)
    assert fourth.began is None
    assert shared.shelf.stats().gauges == {"adapters_in_memory": 2, "adapter_resident_bytes": 100}
    shared.run(9.0)
    assert fourth.began == 9.0
    shared.finish()


def test_who_was_kept_out_by_long_requests_is_not_kept_out_by_short_ones():
    """A key that waited in vain once, and went on asking, never had the right of way again."""
    shared = Shared({"p": 50, "q": 50, "r": 50})
    served = []

    def flow(name, length):
        one = shared.ask("a", name, length=length)
        if shared.now < 300.0:
            one.then.append(lambda: shared.at(shared.now + length - 0.25, lambda: flow(name, 1.0)))

    def ask():
        served.append(shared.ask("b", "r", length=1.0))
        shared.at(shared.now + 2.0, ask) if shared.now < 300.0 else None

    flow("p", 40.0), flow("q", 40.0)
    shared.at(1.0, ask)
    shared.run(340.0)
    assert any(one.refused for one in served)
    assert all(one.began is not None for one in served if one.at > 80.0)
    shared.finish()


@pytest.mark.parametrize("length", [0.1, 3.0])
@pytest.mark.parametrize(("many", "mix"), [(2, 2), (2, 4), (2, 10), (5, 7), (5, 10)])
def test_a_key_that_asks_for_more_at_a_time_takes_no_more_of_another_s_memory(many, mix, length):
    """Beside ten streams that fit together, of one key, another asks for mixtures: two at a time took five sixths of the memory.

    What it takes by one request at a time is the measure.
    """

    def served(at_a_time):
        shared = Shared({f"{key}{number}": 10 for key in "ah" for number in range(10)})
        asked = {"a": [], "h": []}

        def ask(key, *names, length):
            one = shared.ask(key, *names, length=length)
            asked[key].append(one)

            def again():
                if shared.now < 300.0:
                    ask(key, *names, length=length)

            one.then.append(lambda: shared.at(shared.now + (length if one.began is not None else 1.0), again))

        for number in range(10):
            shared.at(2.0 * number, lambda number=number: ask("a", f"a{number}", length=20.0))
        for _ in range(at_a_time):
            shared.at(25.0, lambda: ask("h", *[f"h{number}" for number in range(mix)], length=length))
        shared.run(300.0)
        assert not any(one.refused for one in (*asked["a"], *asked["h"]))
        return [sum(one.began is not None for one in asked[key]) for key in "ah"]

    alone, one, more = served(0)[0], served(1), served(many)
    assert more[0] >= 0.9 * one[0] >= 0.7 * alone
    assert more[1] >= one[1]


def test_a_mixture_that_never_fits_is_refused_at_once_and_keeps_nobody_waiting():
    shared = Shared({"p": 60, "q": 60, "m": 10}, "m")
    busy = shared.ask("a", "p", length=5.0)
    never = shared.ask("h", "p", "q", length=5.0)
    assert isinstance(never.ready.exception(), CapacityError)
    assert shared.shelf._room.used == {shared.shelf._entries["p"]}
    shared.settle()
    assert busy.began == 0.0
    shared.finish()
