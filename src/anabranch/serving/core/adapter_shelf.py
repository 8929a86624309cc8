"""`AdapterShelf`: which adapters there are, which of them are in memory, and who uses them.

An adapter is known by a name and comes from a folder. The least recently used ones leave memory where there is no room, and are read
again when somebody asks for them; those that are pinned stay, and so does what a request under way uses. Under a name another adapter may
take the place of the one before: requests that began with that one end with it.

Where a key's request finds no room beside what others use, the key has a claim for `CLAIM_S`: until it has asked again, those who came
after it are told to ask again too, if what they use left it no room. So adapters fall idle and make some, and keys take turns.

Reading is for a thread of the shelf's own. All methods may be called from any thread.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from anabranch.errors import AnabranchError, CapacityError, InputError
from anabranch.serving.core.client import BusyError, EngineStats
from anabranch.serving.core.mixture import Mixture, check_name

__all__ = ["AdapterShelf", "Held", "Read"]

logger = logging.getLogger(__name__)

# Seconds in which one who was told to ask again has to.
CLAIM_S = 2.0


class Held(Protocol):
    """An adapter in memory."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""

    @property
    def version(self) -> str:
        """Equal where the numbers are, whatever the name or folder."""

    @property
    def told(self) -> dict[str, Any]:
        """What it says of itself: its kind, and whom it chooses among."""


H = TypeVar("H", bound=Held)
R = TypeVar("R")
# Of a folder, and the folder that it has to be below (None: it may be anywhere); what is given last is called with the bytes that the
# numbers will take before any of them is read, and raises where there is no room.
Read = Callable[[str, str | None, Callable[[int], None]], H]


@dataclass(eq=False)
class _Entry(Generic[H]):
    """One adapter.

    Attributes:
        name, folder: see above.
        root: folder that ``folder`` has to be below whenever it is read; None where it may be anywhere.
        is_pinned: it never leaves memory.
        held: its numbers; None where they are not in memory.
        uses: requests under way with it.
        used_at: when one last began, by a count.
        size: bytes of the numbers, in memory or not; 0 before they were first looked at.
    """

    name: str
    folder: str
    root: str | None = None
    is_pinned: bool = False
    held: H | None = None
    uses: int = 0
    used_at: int = 0
    size: int = 0

    @property
    def nbytes(self) -> int:
        return 0 if self.held is None else self.held.nbytes

    def facts(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "folder": self.folder,
            "pinned": self.is_pinned,
            "in_memory": self.held is not None,
            "bytes": self.nbytes,
            "version": None if self.held is None else self.held.version,
            "requests": self.uses,
            **({} if self.held is None else self.held.told),
        }


@dataclass(frozen=True)
class _Lease(Generic[H]):
    """What one request uses."""

    uses: tuple[tuple[_Entry[H], float], ...] = field(default=())


@dataclass(frozen=True)
class _Claim(Generic[H]):
    """Room that a key waits for.

    Attributes:
        entries: what it is for.
        until: seconds.
    """

    entries: tuple[_Entry[H], ...]
    until: float


class AdapterShelf(Generic[H]):
    """See the module.

    Attributes:
        most_bytes: that all adapters in memory may take together, beside the one that is being read.

    Args:
        read: what is in a folder, see `Read`; raises AnabranchError for one that cannot be had.
        most_bytes: see above.
        clock: seconds, monotonic.
    """

    def __init__(self, read: Read[H], most_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self.most_bytes, self._time = read, most_bytes, clock
        # By key, the oldest first.
        self._claims: dict[str, _Claim[H]] = {}
        self._lock = threading.Lock()
        self._worker: ThreadPoolExecutor | None = None
        self._entries: dict[str, _Entry[H]] = {}
        # Unloaded or replaced, and still in use.
        self._leaving: list[_Entry[H]] = []
        self._leases: dict[str, _Lease[H]] = {}
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
        entry = _Entry[H](name, folder, root, is_pinned)

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
            self._entries.setdefault(name, _Entry(name, folder, root))

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
        """Begin a request of a key with these adapters; a future where some of them have to be read first, None where all are there.

        Until `release` they stay in memory. Raises InputError for a name that there is not. The future raises `BusyError` where there is no
        room beside those that others use, where another key is to have some first, or where one cannot be read (why is logged), and
        CapacityError where they have no room together.
        """
        with self._lock:
            unknown = [name for name, _ in mixture if name not in self._entries]
            if unknown:
                raise InputError(self._unknown(unknown[0]))
            uses = tuple((self._entries[name], weight) for name, weight in mixture)
            if self._gives_way(key, [entry for entry, _ in uses]):
                waits: Future[None] = Future()
                waits.set_exception(BusyError("another key waits for memory for its adapters, and is first; ask again"))
                return waits
            for entry, _ in uses:
                entry.uses += 1
                entry.used_at = next(self._clock)
            self._leases[id] = _Lease(uses)
            entries = [entry for entry, _ in uses]
            is_there = all(entry.held is not None for entry in entries)
            if is_there:
                self._claims.pop(key, None)
        return None if is_there else self._submit(lambda: self._fill(entries, key))

    def held_by(self, id: str) -> tuple[tuple[str, H, float], ...]:
        """(name, what it holds, weight) of what a request uses, whose adapters are all there; nothing for one that has begun with none."""
        with self._lock:
            lease = self._leases.get(id)
            made = [] if lease is None else [(entry.name, entry.held, weight) for entry, weight in lease.uses]
        return tuple((name, held, weight) for name, held, weight in made if held is not None)

    def release(self, id: str) -> None:
        """A request has ended. Nothing for one that has begun with none."""
        with self._lock:
            lease = self._leases.pop(id, _Lease())
            for entry, _ in lease.uses:
                entry.uses -= 1
                if not entry.uses and entry in self._leaving:
                    self._leaving.remove(entry)
                    entry.held = None

    def close(self) -> None:
        """End the shelf's thread."""
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)

    # In the shelf's thread

    def _submit(self, work: Callable[[], R]) -> "Future[R]":
        with self._lock:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, "anabranch-adapters")
            return self._worker.submit(_bare, work)

    def _fill(self, entries: Sequence[_Entry[H]], key: str) -> None:
        """Read those of a request of a key that are not in memory."""
        try:
            self._read_missing(entries)
        except _NoRoomError:
            with self._lock:
                self._claims[key] = _Claim(tuple(entries), self._time() + CLAIM_S)
            raise
        with self._lock:
            self._claims.pop(key, None)

    def _read_missing(self, entries: Sequence[_Entry[H]]) -> None:
        for entry in entries:
            # Another request may have waited for the same.
            if entry.held is not None:
                continue
            held = self._read_again(entry, entries)
            with self._lock:
                self._make_room(entry, held, None, entries)
                entry.held = held
                self._num_loads += 1

    def _read_again(self, entry: _Entry[H], together: Sequence[_Entry[H]]) -> H:
        def check(nbytes: int) -> None:
            entry.size = nbytes
            with self._lock:
                self._find_room(entry, nbytes, None, together)

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

    def _gives_way(self, key: str, entries: Sequence[_Entry[H]]) -> bool:
        """Whether a request of a key has to wait, since with these adapters in use too another key would have no room that is first."""
        now = self._time()
        self._claims = {other: claim for other, claim in self._claims.items() if claim.until > now}
        everyone = (*self._entries.values(), *self._leaving)
        used = {entry for entry in everyone if entry.uses}.union(entries)
        stays = {entry for entry in everyone if entry.is_pinned}
        for other, claim in self._claims.items():
            if other == key:
                return False
            if sum(entry.size for entry in used.union(claim.entries, stays)) > self.most_bytes:
                return True
        return False

    def _check_place(self, name: str, is_pinned: bool) -> None:
        check_name(name)
        with self._lock:
            before = self._entries.get(name)
            if before is not None and (before.is_pinned or is_pinned):
                what = "is there already" if is_pinned else "is pinned, and nothing takes its place"
                raise InputError(f"adapter {name!r} {what}; give the other one another name")

    def _make_room(
        self, entry: _Entry[H], held: H, before: "_Entry[H] | None", together: "Sequence[_Entry[H]]" = ()
    ) -> None:
        """Let go of adapters that nobody uses until there is room for ``held``. Arguments and errors as `_find_room`."""
        entry.size = held.nbytes
        for other in self._find_room(entry, held.nbytes, before, together):
            other.held = None
            self._num_evictions += 1

    def _find_room(
        self, entry: _Entry[H], nbytes: int, before: "_Entry[H] | None", together: "Sequence[_Entry[H]]" = ()
    ) -> list[_Entry[H]]:
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

    def _retire(self, entry: _Entry[H]) -> None:
        """An adapter that no request to come gets."""
        if entry.uses:
            self._leaving.append(entry)
        else:
            entry.held = None

    def _unknown(self, name: str) -> str:
        known = [repr(other) for other in itertools.islice(self._entries, 10)]
        more = f" and {len(self._entries) - len(known)} more" if len(self._entries) > len(known) else ""
        return f"there is no adapter {name!r:.80}; there {'are ' + ', '.join(known) + more if known else 'is none'}"


class _NoRoomError(BusyError):
    """There is none beside what others use."""


def _bare(work: Callable[[], R]) -> R:
    """What work gives; its error comes without the frames of the work, in which the numbers of a whole adapter would be kept."""
    try:
        return work()
    except AnabranchError as error:
        error.__cause__ = error.__context__ = None
        raise error.with_traceback(None) from None
