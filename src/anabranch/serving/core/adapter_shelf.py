"""`AdapterShelf`: which adapters there are, which of them are in memory, and who uses them.

An adapter is known by a name and comes from a folder. Where there is no room some leave memory (`anabranch.serving.core.adapter_memory`),
and are read again when somebody asks for them; those that are pinned stay, and so does what a request under way uses. Under a name another
adapter may take the place of the one before: requests that began with that one end with it.

A request that finds no room (`anabranch.serving.core.adapter_room`) beside what others use waits in a line, in which keys take turns
(`anabranch.serving.core.adapter_line`).

Reading (`anabranch.serving.core.adapter_source`) is for a thread of the shelf's own, one adapter after the other. There too keys take
turns: the next is of the key for which one was read longest ago, and what operators load has turns as a key has. All methods may be called
from any thread.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic, TypeVar

from anabranch.errors import AnabranchError, InputError
from anabranch.serving.core.adapter_entry import Entry, H, Held, Read
from anabranch.serving.core.adapter_line import AdapterLine
from anabranch.serving.core.adapter_loads import AdapterLoads, Load
from anabranch.serving.core.adapter_memory import AdapterMemory, NoRoomError
from anabranch.serving.core.adapter_room import AdapterRoom, Waiter
from anabranch.serving.core.adapter_source import AdapterSource, bare
from anabranch.serving.core.client import BusyError, CalledOffError, EngineStats
from anabranch.serving.core.mixture import Mixture, check_name
from anabranch.serving.core.turns import Turns
from anabranch.sharing import most_beside

__all__ = ["AdapterShelf", "Held", "Read"]

# Seconds that a request waits for room at most, and requests that may.
WAIT_S = 30.0
MOST_WAITING = 256
# What operators wait as; no key has such a name.
_OPERATOR = "\n"
# Of the places that others leave, a key's.
_KEY_SHARE = 0.5
_ENDS = "the engine ends"

R = TypeVar("R")


class AdapterShelf(Generic[H]):
    """See the module.

    Attributes:
        most_bytes: that all adapters in memory may take together, beside the one that is being read.

    Args:
        read: what is in a folder, see `Read`; raises AnabranchError for one that cannot be had.
        most_bytes: see above.
        clock: seconds, monotonic.
        wait_s: how long a request may wait for room.
    """

    def __init__(
        self,
        read: Read[H],
        most_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        wait_s: float = WAIT_S,
    ) -> None:
        self._source, self.most_bytes, self._time = AdapterSource[H](read), most_bytes, clock
        self._room = AdapterRoom[H](most_bytes)
        self._line = AdapterLine[H](wait_s, self._room)
        # Looks after those that have waited for as long as they may, while anybody waits.
        self._timer: threading.Timer | None = None
        # Who is refused with the lock may be told what takes it.
        self._lock = threading.RLock()
        self._wait_s, self._serial, self._is_closed = wait_s, itertools.count(), False
        self._loads = AdapterLoads[H]()
        self._reads = Turns("anabranch-adapters", "adapters wait to be read", threads=1, most_waiting=None)
        self._memory = AdapterMemory[H](self._room, clock)
        self._entries = self._memory.entries

    # What an operator does

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that there are, in the order in which they came."""
        with self._lock:
            return tuple(self._entries)

    def peek(self, name: str) -> H | None:
        """What an adapter holds in memory, for whoever looks and does not keep it; None where it is not there."""
        with self._lock:
            entry = self._entries.get(name)
            return None if entry is None else entry.held

    def facts(self) -> list[dict[str, Any]]:
        """Each adapter: name, folder, whether it is pinned and in memory, bytes, version, requests under way, what it says of itself."""
        with self._lock:
            return [entry.facts() for entry in self._entries.values()]

    def load_now(
        self, name: str, folder: str, root: str | None = None, *, is_pinned: bool = False, version: str = ""
    ) -> dict[str, Any]:
        """Read an adapter, in this thread; its facts. It takes the place of one of the same name once it is there.

        Args:
            name, folder: see the module.
            root: folder that ``folder`` has to be below, now and whenever it is read again; None where it may be anywhere.
            is_pinned: it never leaves memory.
            version: that its numbers must have, as they were known before; "" for any.

        Raises InputError for a name that cannot be or is that of a pinned one, CapacityError or `BusyError` where it has no room, and what
        ``read`` raises, or with a ``version`` what `AdapterSource.again` does; all is as it was then.
        """
        self._check_place(name, is_pinned)
        with self._lock:
            load = self._loads.begin(Entry[H](name, folder, root, is_pinned, version=version))
        try:
            return self._load(load)
        finally:
            with self._lock:
                self._loads.end(load)

    def _load(self, load: Load[H]) -> dict[str, Any]:
        entry = load.entry

        def check(nbytes: int) -> None:
            entry.size = nbytes
            with self._lock:
                self._check_under_way(load)
                self._memory.find_room(entry, before=self._entries.get(entry.name))

        held = (self._source.again if entry.version else self._source.first)(entry, check)
        with self._lock:
            self._check_under_way(load)
            self._memory.hold(entry, held, before=self._entries.get(entry.name))
            self._room.touch(entry)
            older = self._know(load)
            facts = entry.facts()
        self._end(older, load, facts)
        return facts

    def load(self, name: str, folder: str, root: str | None = None) -> "Future[dict[str, Any]]":
        """`load_now` in the shelf's thread; where there is no room beside what requests use it waits in the line, as they do.

        Where the last word about the name is the same load, which waits, they wait together and end as one. Where that is another load,
        and waits, this one takes over its place in the line.

        The future raises `CalledOffError` where an operator's later word about the name was done, or waits for room, before this was.
        """
        self._check_place(name, False)
        with self._lock:
            load = self._loads.begin(Entry[H](name, folder, root))
            before = self._loads.before(load)
            if before is not None and before.is_same(load) and before.waits_as in self._line:
                self._loads.join(load, before)
                return load.told

        def tell(done: "Future[dict[str, Any]]") -> None:
            error = BusyError(_ENDS) if done.cancelled() else done.exception()
            if error is None:
                load.told.set_result(done.result())
            elif isinstance(error, NoRoomError) and self._wait_s > 0:
                self._wait_to_load(load)
            else:
                self._fail(load, error)

        self._submit(None, lambda: self._load(load)).add_done_callback(tell)
        return load.told

    def _wait_to_load(self, load: Load[H]) -> None:
        """Know an adapter once it has had room in its turn; until then all is as it was."""
        one = Waiter(f"{_OPERATOR}{next(self._serial)}", _OPERATOR, ((load.entry, 1.0),))

        def tell(done: "Future[None]") -> None:
            if (error := done.exception()) is not None:
                self._fail(load, error)
                return
            with self._lock:
                # Else whoever called it off has told so, and given its room to others.
                if load not in self._loads:
                    return
                older = self._know(load)
                self._memory.end(one.id)
                # No key has used it yet.
                load.entry.used_by.clear()
                facts = load.entry.facts()
            self._end(older, load, facts)
            self.advance()
            load.told.set_result(facts)

        one.ready.add_done_callback(tell)
        with self._lock:
            if load not in self._loads:
                return
            before = self._loads.before(load)
            if before is not None and before.is_same(load) and before.waits_as:
                # It waited to be looked at behind others, or is to be read in its turn.
                self._loads.join(load, before)
                return
            load.waits_as, older = one.id, self._loads.end_before(load)
            if before is not None:
                self._line.replace(before.waits_as, one)
            begun = self._join(one)
        self._go_on(begun)
        self._end(older)

    def _know(self, load: Load[H]) -> list[Load[H]]:
        """With the lock: it is done, and its adapter that of its name; those that end by it."""
        name, older = load.entry.name, self._loads.end_before(load)
        self._loads.end(load)
        before = self._entries.get(name)
        if before is not None:
            self._memory.retire(before)
        self._entries[name] = load.entry
        return older

    def _check_under_way(self, load: Load[H]) -> None:
        if load not in self._loads:
            raise CalledOffError(_called_off(load))

    def _fail(self, load: Load[H], error: BaseException) -> None:
        """Tell why it is not loaded, unless it is told already that it was called off."""
        with self._lock:
            was_under_way = self._loads.end(load)
        if was_under_way:
            load.told.set_exception(error)

    def _end(self, loads: "Iterable[Load[H]]", by: Load[H] | None = None, facts: dict[str, Any] | None = None) -> None:
        """Give the room of those that are under way no more to others, and tell them why: that they are called off.

        Those that are the same as what they end by are told its facts, where it is done.
        """
        for load in loads:
            if facts is not None and by is not None and load.is_same(by):
                load.told.set_result(facts)
            else:
                load.told.set_exception(CalledOffError(_called_off(load)))
            if load.waits_as:
                self.release(load.waits_as)

    def register(
        self, name: str, folder: str, root: str | None = None, version: str = "", *, is_pinned: bool = False
    ) -> None:
        """Know an adapter that is read when the first request asks for it; nothing for a name that there is. Raises InputError.

        Arguments as of `load_now`; with a ``version`` it is read as long as it is of that, and a pinned one stays once it is there.
        """
        check_name(name)
        with self._lock:
            self._entries.setdefault(name, Entry(name, folder, root, is_pinned, version=version))

    def remove(self, name: str) -> dict[str, Any]:
        """Know an adapter no more; its last facts. Requests under way end with it, and its memory is free then.

        What is being loaded under its name is called off, and is enough to be removed. Raises InputError for one that there is not, and for
        a pinned one.
        """
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None and entry.is_pinned:
                raise InputError(f"adapter {name!r} is pinned, and stays as long as the engine")
            loads = self._loads.end_all(name)
            last = entry or next((load.entry for load in reversed(loads)), None)
            if last is None:
                raise InputError(self._unknown(name))
            told = last.facts()
            if entry is not None:
                del self._entries[name]
                self._memory.retire(entry)
        self._end(loads)
        return told

    def stats(self) -> EngineStats:
        """For pictures of the engine."""
        with self._lock:
            held = [entry for entry in self._memory.all() if entry.held is not None]
            return EngineStats(
                counters={
                    "adapter_loads": self._memory.num_loads,
                    "adapter_evictions": self._memory.num_evictions,
                },
                gauges={
                    "adapters_in_memory": len(held),
                    "adapter_resident_bytes": sum(entry.nbytes for entry in held),
                },
            )

    # What requests do

    def lease(self, id: str, mixture: Mixture, key: str = "") -> "Future[None] | None":
        """Begin a request of a key with these adapters; a future where it has to wait or they have to be read, None where all are there.

        Until `release` they stay in memory. Raises InputError for a name that there is not. The future raises `BusyError` where there was
        no room for `WAIT_S` beside those that others use, where too many wait for some, or where one cannot be read, or that was in
        memory never has room now (why is logged), and CapacityError where they have no room together.
        """
        with self._lock:
            unknown = [name for name, _ in mixture if name not in self._entries]
            if unknown:
                raise InputError(self._unknown(unknown[0]))
            one = Waiter(id, key, tuple((self._entries[name], weight) for name, weight in mixture))
            # How large those are that were never in memory is told as they are read.
            if not all(entry.size for entry in one.adapters):
                self._room.begin(one)
                begun = [one]
            elif self._room.fits_ever(one):
                begun = self._join(one)
            else:
                one.ready.set_exception(self._why_never(one))
                return one.ready
            is_ready = one in begun and one.is_there
        self._go_on([other for other in begun if not (other is one and is_ready)])
        return None if is_ready else one.ready

    def held_by(self, id: str) -> tuple[tuple[str, H, float], ...]:
        """(name, what it holds, weight) of what a request uses, whose adapters are all there; nothing for one that has begun with none."""
        with self._lock:
            lease = self._room.lease(id)
            made = [] if lease is None else [(entry.name, entry.held, weight) for entry, weight in lease.entries]
        return tuple((name, held, weight) for name, held, weight in made if held is not None)

    def release(self, id: str) -> None:
        """A request has ended. Nothing for one that has begun with none."""
        with self._lock:
            has_waited = self._line.leave(id, self._time()) is not None
            has_begun = self._memory.end(id)
        if has_waited or has_begun:
            self.advance()

    def advance(self) -> None:
        """Begin requests that wait and have room now, and refuse those that have waited for as long as they may."""
        with self._lock:
            if not self._line:
                return
            now = self._time()
            late, begun = self._line.over(now), self._line.go(now)
            self._watch()
        for one in late:
            _refuse(one, "there was no memory for its adapters beside those in use; ask again")
        self._go_on(begun)

    def close(self) -> None:
        """End the shelf's threads, and tell whoever waits."""
        with self._lock:
            self._is_closed = True
            if self._timer is not None:
                self._timer.cancel()
            waiting = [one for one in self._line if self._line.leave(one.id, self._time())]
        for one in waiting:
            _refuse(one, _ENDS)
        self._reads.close()

    # In the shelf's thread

    def _submit(self, key: str | None, work: Callable[[], R]) -> "Future[R]":
        """Have something done in the turn of a key, or of operators; it is cancelled where the shelf is closed first."""
        try:
            return self._reads.submit(key, bare, work)
        except BusyError:
            # However many may wait, so it is closed.
            cancelled = Future[R]()
            cancelled.cancel()
            return cancelled

    def _submit_fill(self, one: Waiter[H]) -> None:
        def tell(done: "Future[None]") -> None:
            if done.cancelled():
                _refuse(one, _ENDS)

        self._submit(one.key, partial(self._fill, one)).add_done_callback(tell)

    def _go_on(self, begun: "Iterable[Waiter[H]]") -> None:
        """Tell requests that have begun that their adapters are there, or have these read."""
        for one in begun:
            if not one.is_there:
                self._submit_fill(one)
            elif _is_wanted(one):
                one.ready.set_result(None)

    def _fill(self, one: Waiter[H]) -> None:
        """Read the first of a request's adapters that are not in memory, the others in later turns; it waits where they have no room."""
        if not _is_wanted(one):
            return
        try:
            is_there = bare(partial(self._read_missing, one))
        except NoRoomError:
            with self._lock:
                # It may have gone meanwhile.
                begun = self._join(one) if self._room.lease(one.id) is one and self._memory.end(one.id) else []
            self._go_on(begun)
        except BaseException as error:
            # What it would have used is free for others, before who asked has heard of it.
            with self._lock:
                if self._room.lease(one.id) is one:
                    self._memory.end(one.id)
                self._forget_sizes(one)
            self.advance()
            one.ready.set_exception(error)
        else:
            if is_there:
                one.ready.set_result(None)
            else:
                self._submit_fill(one)

    def _read_missing(self, one: Waiter[H]) -> bool:
        """Read one of its adapters; whether there is no more to read for it."""
        # Another request may have waited for the same, and this one may have gone.
        missing = [entry for entry, _ in one.entries if entry.held is None]
        if not missing or self._room.lease(one.id) is not one:
            return True
        # First how large each of the others is: where they have no room together nothing leaves memory for any of them.
        unknown = next((entry for entry in missing[1:] if not entry.size), None)
        if unknown is not None:
            nbytes = self._source.size_of(unknown)
            with self._lock:
                self._note_size(unknown, nbytes)
            if unknown.size:
                return False
        held = self._read_again(missing[0], one)
        with self._lock:
            # It is nobody's where all have gone meanwhile for whom it was read, and it is known no more.
            if missing[0] in self._memory.all():
                self._memory.hold(missing[0], held, together=one.adapters, key=one.key)
        return len(missing) == 1

    def _read_again(self, entry: Entry[H], one: Waiter[H]) -> H:
        def check(nbytes: int) -> None:
            with self._lock:
                self._note_size(entry, nbytes)
                self._memory.find_room(entry, together=one.adapters, key=one.key)
                # Whoever waited may begin. One whose size nobody knew before has begun already, and is looked at as if it came now.
                if not one.until and self._room.end(one.id) is not None:
                    may_begin = self._room.fits(one) and self._line.spares(one, self._time())
                    self._room.begin(one)
                    if not may_begin:
                        raise NoRoomError("others use the memory for its adapters, or are first")

        # An operator is told all, as where there was room at once.
        return (self._source.first if one.key == _OPERATOR else self._source.again)(entry, check)

    # With the lock

    def _note_size(self, entry: Entry[H], nbytes: int) -> None:
        """Of one that is read again, by what its folder says. Raises `BusyError` where one that was in memory never has room now."""
        # Numbers may take more than was told before they were read, which is known where they were in memory.
        before, entry.size = entry.size, max(entry.size, nbytes)
        if (refused := self._refused(entry)) is not None:
            # Others that ask for it meanwhile would be measured by what is not its own, also once its files are back.
            entry.size = before
            raise refused

    def _refused(self, entry: Entry[H]) -> BusyError | None:
        """Of one that was in memory and never has room now, by its size."""
        # It had room, so that something else is in its folder or pinned: no fault of the request.
        error = None if entry.stays or not entry.version else self._memory.never(entry, ())
        return None if error is None else self._source.refused(entry, error)

    def _why_never(self, one: Waiter[H]) -> AnabranchError | None:
        """Of a request that never has room, whose adapters' sizes are known."""
        alone = (self._refused(entry) for entry, _ in one.entries)
        first = next(entry for entry, _ in one.entries if not entry.stays)
        return next(filter(None, alone), None) or self._memory.never(first, one.adapters)

    def _forget_sizes(self, one: Waiter[H]) -> None:
        """After a request in vain: what its adapters' folders said, in which something else may be by the next one, which looks again."""
        for entry in one.adapters:
            # Whoever still waits for it waits for as much room as it was told to take.
            is_wanted = entry.uses or any(entry in other.adapters for other in self._line)
            if entry.version and entry.held is None and not is_wanted:
                entry.size = 0

    def _join(self, one: Waiter[H]) -> list[Waiter[H]]:
        """Let a request begin, or wait, or refuse it where too many do, of its key or in all; those that begin now, whoever it is."""
        if self._is_closed:
            _refuse(one, _ENDS)
            return []
        now = self._time()
        self._line.join(one, now)
        begun = self._line.go(now)
        own, num = self._line.of_key(one.key), len(self._line)
        most = most_beside(num - own, MOST_WAITING, _KEY_SHARE)
        if one.id in self._line and (num > MOST_WAITING or own > max(most, 1)):
            self._line.leave(one.id, now)
            _refuse(one, "too many requests wait for memory for adapters; ask again")
        self._watch()
        return begun

    def _watch(self) -> None:
        """See to it that somebody looks when the next has waited for as long as it may."""
        if self._timer is None and (end := self._line.next_end()) is not None:
            self._timer = threading.Timer(max(end - self._time(), 0.0), self._look)
            self._timer.daemon = True
            self._timer.start()

    def _look(self) -> None:
        with self._lock:
            self._timer = None
        self.advance()

    def _check_place(self, name: str, is_pinned: bool) -> None:
        check_name(name)
        with self._lock:
            before = self._entries.get(name)
            if before is not None and (before.is_pinned or is_pinned):
                what = "is there already" if is_pinned else "is pinned, and nothing takes its place"
                raise InputError(f"adapter {name!r} {what}; give the other one another name")

    def _unknown(self, name: str) -> str:
        known = [repr(other) for other in itertools.islice(self._entries, 10)]
        more = f" and {len(self._entries) - len(known)} more" if len(self._entries) > len(known) else ""
        return f"there is no adapter {name!r:.80}; there {'are ' + ', '.join(known) + more if known else 'is none'}"


def _called_off(load: Load[Any]) -> str:
    name = load.entry.name
    return f"adapter {name!r} was loaded anew or unloaded while this waited to be loaded; what came later counts"


def _is_wanted(one: Waiter[Any]) -> bool:
    """Whether anybody still waits for it."""
    return one.ready.running() or one.ready.set_running_or_notify_cancel()


def _refuse(one: Waiter[Any], why: str) -> None:
    if _is_wanted(one):
        one.ready.set_exception(BusyError(why))
