"""`AdapterShelf`: which adapters there are, which of them are in memory, and who uses them.

An adapter is known by a name and comes from a folder. The least recently used ones leave memory where there is no room, and are read
again when somebody asks for them; those that are pinned stay, and so does what a request under way uses. Under a name another adapter may
take the place of the one before: requests that began with that one end with it.

A request that finds no room beside what others use waits in a line (`anabranch.serving.core.adapter_line`), in which keys take turns.

Reading is for a thread of the shelf's own. All methods may be called from any thread.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

from anabranch.errors import AnabranchError, CapacityError, InputError
from anabranch.serving.core.adapter_entry import Entry, H, Held, Read
from anabranch.serving.core.adapter_line import AdapterLine, Waiter
from anabranch.serving.core.client import BusyError, EngineStats
from anabranch.serving.core.mixture import Mixture, check_name
from anabranch.sharing import most_beside

__all__ = ["AdapterShelf", "Held", "Read"]

logger = logging.getLogger(__name__)

# Seconds that a request waits for room at most, and requests that may.
WAIT_S = 30.0
MOST_WAITING = 256
# Of the places that others leave, a key's.
_KEY_SHARE = 0.5
_TOO_MANY = "too many requests wait for memory for adapters; ask again"


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
        self._read, self.most_bytes, self._time = read, most_bytes, clock
        self._line = AdapterLine[Entry[H]](wait_s)
        # Looks after those that have waited for as long as they may, while anybody waits.
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._worker: ThreadPoolExecutor | None = None
        self._entries: dict[str, Entry[H]] = {}
        # Unloaded or replaced, and still in use.
        self._leaving: list[Entry[H]] = []
        # Requests under way, by id.
        self._leases: dict[str, Waiter[Entry[H]]] = {}
        self._clock = itertools.count(1)
        self._num_loads = self._num_evictions = 0

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

    def load_now(self, name: str, folder: str, root: str | None = None, *, is_pinned: bool = False) -> dict[str, Any]:
        """Read an adapter, in this thread; its facts. It takes the place of one of the same name once it is there.

        Args:
            name, folder: see the module.
            root: folder that ``folder`` has to be below, now and whenever it is read again; None where it may be anywhere.
            is_pinned: it never leaves memory.

        Raises InputError for a name that cannot be or is that of a pinned one, CapacityError or `BusyError` where it has no room, and what
        ``read`` raises; all is as it was then.
        """
        self._check_place(name, is_pinned)
        entry = Entry[H](name, folder, root, is_pinned)

        def check(nbytes: int) -> None:
            entry.size = nbytes
            with self._lock:
                self._find_room(entry, nbytes, self._entries.get(name))

        held = self._read(folder, root, check)
        with self._lock:
            before = self._entries.get(name)
            self._make_room(entry, held, before)
            if before is not None:
                self._retire(before)
            entry.held, entry.used_at = held, next(self._clock)
            self._num_loads += 1
            self._entries[name] = entry
            return entry.facts()

    def load(self, name: str, folder: str, root: str | None = None) -> "Future[dict[str, Any]]":
        """`load_now` in the shelf's thread."""
        self._check_place(name, False)
        return self._submit(lambda: self.load_now(name, folder, root))

    def register(self, name: str, folder: str, root: str | None = None) -> None:
        """Know an adapter that is read when the first request asks for it; nothing for a name that there is. Raises InputError.

        Arguments as of `load_now`.
        """
        check_name(name)
        with self._lock:
            self._entries.setdefault(name, Entry(name, folder, root))

    def remove(self, name: str) -> dict[str, Any]:
        """Know an adapter no more; its last facts. Requests under way end with it, and its memory is free then.

        Raises InputError for one that there is not, and for a pinned one.
        """
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                raise InputError(self._unknown(name))
            if entry.is_pinned:
                raise InputError(f"adapter {name!r} is pinned, and stays as long as the engine")
            told = entry.facts()
            del self._entries[name]
            self._retire(entry)
            return told

    def stats(self) -> EngineStats:
        """For pictures of the engine."""
        with self._lock:
            held = [entry for entry in (*self._entries.values(), *self._leaving) if entry.held is not None]
            return EngineStats(
                counters={"adapter_loads": self._num_loads, "adapter_evictions": self._num_evictions},
                gauges={
                    "adapters_in_memory": len(held),
                    "adapter_resident_bytes": sum(entry.nbytes for entry in held),
                },
            )

    # What requests do

    def lease(self, id: str, mixture: Mixture, key: str = "") -> "Future[None] | None":
        """Begin a request of a key with these adapters; a future where it has to wait or they have to be read, None where all are there.

        Until `release` they stay in memory. Raises InputError for a name that there is not. The future raises `BusyError` where there was
        no room for `WAIT_S` beside those that others use, where too many wait for some, or where one cannot be read (why is logged), and
        CapacityError where they have no room together.
        """
        with self._lock:
            unknown = [name for name, _ in mixture if name not in self._entries]
            if unknown:
                raise InputError(self._unknown(unknown[0]))
            one = Waiter(id, key, tuple((self._entries[name], weight) for name, weight in mixture))
            head = self._line.head(self._time(), self._leaves_room)
            is_able = self._fits(one) if head is None else self._fits(one, head)
            # What never fits is told as that where it is read; so is how large those are that never were.
            if all(entry.size for entry in one.adapters) and self._leaves_room(one, alone=True) and not is_able:
                if not self._wait(one):
                    _refuse(one, _TOO_MANY)
                return one.ready
            if self._begin(one):
                return None
        self._submit(partial(self._fill, one))
        return one.ready

    def held_by(self, id: str) -> tuple[tuple[str, H, float], ...]:
        """(name, what it holds, weight) of what a request uses, whose adapters are all there; nothing for one that has begun with none."""
        with self._lock:
            lease = self._leases.get(id)
            made = [] if lease is None else [(entry.name, entry.held, weight) for entry, weight in lease.entries]
        return tuple((name, held, weight) for name, held, weight in made if held is not None)

    def release(self, id: str) -> None:
        """A request has ended. Nothing for one that has begun with none."""
        with self._lock:
            self._line.leave(id)
            self._end(id)
        self.advance()

    def advance(self) -> None:
        """Begin requests that wait and have room now, and refuse those that have waited for as long as they may."""
        with self._lock:
            if not self._line:
                return
            late = self._line.over(self._time())
            begun = [(one, self._begin(one)) for one in self._line.able(self._time(), self._fits, self._leaves_room)]
            self._watch()
        for one in late:
            _refuse(one, "there was no memory for its adapters beside those in use; ask again")
        for one, is_there in begun:
            if not is_there:
                self._submit(partial(self._fill, one))
            elif _is_wanted(one):
                one.ready.set_result(None)

    def close(self) -> None:
        """End the shelf's threads."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            waiting = [one for one in self._line if self._line.leave(one.id)]
        for one in waiting:
            _refuse(one, "the engine ends")
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)

    # In the shelf's thread

    def _submit(self, work: Callable[[], R]) -> "Future[R]":
        with self._lock:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, "anabranch-adapters")
            return self._worker.submit(_bare, work)

    def _fill(self, one: Waiter[Entry[H]]) -> None:
        """Read those of a request's adapters that are not in memory; it waits where they have no room."""
        if not _is_wanted(one):
            return
        try:
            self._read_missing(one)
        except _NoRoomError:
            with self._lock:
                # Nobody else waits for one that has gone meanwhile.
                is_here = self._leases.get(one.id) is one
                if is_here:
                    self._end(one.id)
                is_refused = is_here and not self._wait(one)
            if is_refused:
                one.ready.set_exception(BusyError(_TOO_MANY))
            self.advance()
        except BaseException as error:
            one.ready.set_exception(error)
        else:
            one.ready.set_result(None)

    def _read_missing(self, one: Waiter[Entry[H]]) -> None:
        entries = [entry for entry, _ in one.entries]
        for entry in entries:
            # Another request may have waited for the same.
            if entry.held is not None:
                continue
            held = self._read_again(entry, one)
            with self._lock:
                self._make_room(entry, held, None, entries)
                entry.held = held
                self._num_loads += 1

    def _read_again(self, entry: Entry[H], one: Waiter[Entry[H]]) -> H:
        def check(nbytes: int) -> None:
            entry.size = nbytes
            with self._lock:
                self._find_room(entry, nbytes, None, [other for other, _ in one.entries])
                # Whoever waited may begin. One whose size nobody knew before is in use already, and may have to wait beside who waits.
                head = None if one.until else self._line.head(self._time(), self._leaves_room)
                if head is not None and not self._fits(head):
                    raise _NoRoomError("another request waits for memory for its adapters, and is first")

        try:
            return self._read(entry.folder, entry.root, check)
        except (BusyError, CapacityError):
            raise
        except Exception as error:
            # What has become of the folder is no fault of who asks, nor theirs to know: it is told to who runs the server.
            trace = None if isinstance(error, AnabranchError) else error
            logger.error("adapter %s cannot be read again: %s", entry.name, error, exc_info=trace)
        raise BusyError(
            f"adapter {entry.name!r} is known and cannot be read now, which is no fault of the request; the server's log says why"
        )

    # With the lock

    def _begin(self, one: Waiter[Entry[H]]) -> bool:
        """A request uses its adapters from now on; whether all are there."""
        self._line.leave(one.id)
        for entry, _ in one.entries:
            entry.uses += 1
            entry.used_at = next(self._clock)
        self._leases[one.id] = one
        return all(entry.held is not None for entry, _ in one.entries)

    def _end(self, id: str) -> None:
        """It does not any more. Nothing for one that has begun with none."""
        lease = self._leases.pop(id, None)
        for entry, _ in () if lease is None else lease.entries:
            entry.uses -= 1
            if not entry.uses and entry in self._leaving:
                self._leaving.remove(entry)
                entry.held = None

    def _wait(self, one: Waiter[Entry[H]]) -> bool:
        """Let a request wait; whether it may, since so many do, and of its key."""
        own = self._line.of_key(one.key)
        most = most_beside(len(self._line) - own, MOST_WAITING, _KEY_SHARE)
        if len(self._line) >= MOST_WAITING or (own and own + 1 > most):
            return False
        self._line.join(one, self._time())
        self._watch()
        return True

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

    def _leaves_room(self, one: Waiter[Entry[H]], *, alone: bool = False) -> bool:
        """Whether what its own key uses leaves a request room; ``alone``: whether it has some without that."""
        leases = () if alone else self._leases.values()
        own = {entry for lease in leases if lease.key == one.key for entry, _ in lease.entries}
        return self._bytes_of(own | one.adapters) <= self.most_bytes

    def _fits(self, one: Waiter[Entry[H]], *beside: Waiter[Entry[H]]) -> bool:
        """Whether a request's adapters have room beside all in use and those of others; it takes none where they are the same."""
        used = {entry for entry in (*self._entries.values(), *self._leaving) if entry.uses}
        return self._bytes_of(used.union(one.adapters, *(other.adapters for other in beside))) <= self.most_bytes

    def _bytes_of(self, entries: set[Entry[H]]) -> int:
        """Of these adapters and of those that are pinned."""
        return sum(entry.size for entry in entries | {entry for entry in self._entries.values() if entry.is_pinned})

    def _check_place(self, name: str, is_pinned: bool) -> None:
        check_name(name)
        with self._lock:
            before = self._entries.get(name)
            if before is not None and (before.is_pinned or is_pinned):
                what = "is there already" if is_pinned else "is pinned, and nothing takes its place"
                raise InputError(f"adapter {name!r} {what}; give the other one another name")

    def _make_room(
        self, entry: Entry[H], held: H, before: "Entry[H] | None", together: "Sequence[Entry[H]]" = ()
    ) -> None:
        """Let go of adapters that nobody uses until there is room for ``held``. Arguments and errors as `_find_room`."""
        entry.size = held.nbytes
        for other in self._find_room(entry, held.nbytes, before, together):
            other.held = None
            self._num_evictions += 1

    def _find_room(
        self, entry: Entry[H], nbytes: int, before: "Entry[H] | None", together: "Sequence[Entry[H]]" = ()
    ) -> list[Entry[H]]:
        """Adapters that nobody uses and that have to go for one more, the least recently used first.

        Args:
            entry: the one more.
            nbytes: of it.
            before: what it takes the place of.
            together: all that the request it is read for uses.

        Raises CapacityError where there never is room, `BusyError` where there is none now.
        """
        others = [other for other in (*self._entries.values(), *self._leaving) if other is not before]
        if before is not None and before.uses:
            others.append(before)
        pinned = sum(other.nbytes for other in others if other.is_pinned)
        mixed = sum(other.size for other in together if other is not entry and not other.is_pinned)
        if pinned + mixed + nbytes > self.most_bytes:
            beside = [f"{pinned:,} of those that are pinned"] if pinned else []
            beside += [f"{mixed:,} of the others in its mixture"] if mixed else []
            told = f" beside {' and '.join(beside)}" if beside else ""
            raise CapacityError(
                f"adapter {entry.name!r} takes {nbytes:,} bytes{told}, and adapters may take {self.most_bytes:,}; allow more with "
                "engine.adapters.memory"
            )
        total = sum(other.nbytes for other in others)
        free = [other for other in others if other.held is not None and not other.uses and not other.is_pinned]
        leaving = []
        for other in sorted(free, key=lambda other: other.used_at):
            if total + nbytes <= self.most_bytes:
                break
            leaving.append(other)
            total -= other.nbytes
        if total + nbytes > self.most_bytes:
            raise _NoRoomError(
                f"adapter {entry.name!r} takes {nbytes:,} bytes, and those in use {total:,} of {self.most_bytes:,}; ask again"
            )
        return leaving

    def _retire(self, entry: Entry[H]) -> None:
        """An adapter that no request to come gets."""
        if entry.uses:
            self._leaving.append(entry)
        else:
            entry.held = None

    def _unknown(self, name: str) -> str:
        known = [repr(other) for other in itertools.islice(self._entries, 10)]
        more = f" and {len(self._entries) - len(known)} more" if len(self._entries) > len(known) else ""
        return f"there is no adapter {name!r:.80}; there {'are ' + ', '.join(known) + more if known else 'is none'}"


def _is_wanted(one: Waiter[Any]) -> bool:
    """Whether anybody still waits for it."""
    return one.ready.running() or one.ready.set_running_or_notify_cancel()


def _refuse(one: Waiter[Any], why: str) -> None:
    if _is_wanted(one):
        one.ready.set_exception(BusyError(why))


class _NoRoomError(BusyError):
    """There is none beside what others use."""


def _bare(work: Callable[[], R]) -> R:
    """What work gives; its error comes without the frames of the work, in which the numbers of a whole adapter would be kept."""
    try:
        return work()
    except AnabranchError as error:
        error.__cause__ = error.__context__ = None
        raise error.with_traceback(None) from None
