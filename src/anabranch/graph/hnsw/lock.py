"""Many readers or one writer."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

from anabranch.errors import DataError
from anabranch.graph.hnsw.gate import new_gate, turn
from anabranch.graph.interrupts import Interrupts
from anabranch.graph.workers import Workers as Workers

# Between looks for an interrupt that is held back, while a lock is waited for.
LOOK_S = 0.05

# Between looks for a search of one query that is not over.
GATE_S = 5e-5


class _Reader:
    """One that waits: whether it wants things whole, and whether it was let in."""

    __slots__ = ("is_let_in", "whole")

    def __init__(self, whole: bool) -> None:
        self.whole, self.is_let_in = whole, False


TORN = "this process was forked while another thread changed the index, of which half is here; load it from a file"
_LOCKS: "WeakSet[ReadWriteLock]" = WeakSet()


def _after_fork() -> None:
    for lock in _LOCKS:
        lock.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class ReadWriteLock:
    """Many readers or one writer, and nobody starves. Not reentrant.

    A reader that comes while a writer waits lets it go first; readers who wait when a writer ends, or makes room, all go before the next
    one. Nobody else comes in while a writer waits for a reader that is in, so one that reads for long looks whether it does (`is_wanted`).
    A writer may let readers in while it only reads itself (`open_to_readers`), or between two steps (`make_room`): it keeps other writers
    out all the time. One that does nearly all of its work where nobody looks begins beside readers (`write_beside`), and keeps them out
    for a moment (`exclusive`). Who reads for long what must not change meanwhile comes as a writer that changes nothing (`still`), beside
    whom all read. Writers go in the order in which they came.

    Attributes:
        gate: where readers in compiled code come in and go out (`gate`), as long as one that comes now would be let in at once. A writer
            that wants to be alone waits for them, too; those who find it shut come as all others do.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._queue: list[_Reader] = []
        # Those that wait, in their order.
        self._writers: list[object] = []
        # Of those that were let in: who have not come yet.
        self._due = 0
        # A writer has it; has it alone; wants to have it alone again.
        self._is_owned = self._is_exclusive = self._is_closing = False
        # To the end of its work.
        self._is_alone = False
        # What it has begun to change may be half changed; it changes nothing.
        self._is_half = self._is_still = False
        self._is_torn = False
        self.gate = new_gate()
        _LOCKS.add(self)

    def after_fork(self) -> None:
        """In a process that was forked: other threads are not there. What one of them had begun to change stays so, and is refused.

        Who was beside readers had changed nothing, but within `exclusive`.
        """
        self._changed = threading.Condition()
        self._is_torn = self._is_torn or self._is_half
        self._readers = self._due = 0
        self._queue, self._writers = [], []
        self._is_owned = self._is_exclusive = self._is_closing = self._is_alone = self._is_half = self._is_still = False
        # In place: whoever holds it keeps it.
        self.gate[:] = self._is_torn, 0

    @contextmanager
    def read(self, *, whole: bool = False) -> Iterator[Interrupts]:
        """Hold it with other readers; ``whole``: not while a writer is in the middle of its work and lets readers in.

        An interrupt waits until it is given back, but where the caller looks for it, and leaves no trace while it is waited for.
        """
        with Interrupts() as interrupts:
            self.enter_read(interrupts, whole)
            try:
                yield interrupts
            finally:
                self.leave_read()

    def enter_read(self, interrupts: Interrupts, whole: bool = False) -> None:
        """Begin what `read` holds; for callers that cannot afford a context manager."""
        while True:
            with self._changed:
                if self._is_torn:
                    raise DataError(TORN)
                if self._is_free(whole) or self._wait(_Reader(whole), interrupts):
                    self._readers += 1
                    return
            interrupts.tell()

    def leave_read(self) -> None:
        """End it."""
        with self._changed:
            self._readers -= 1
            if self._writers or self._is_closing:
                self._changed.notify_all()

    @property
    def is_wanted(self) -> bool:
        """Whether a writer waits for those who read: a reader with more to do gives it back then, and comes again behind that writer."""
        return bool(self._writers) or self._is_closing

    def _wait(self, reader: _Reader, interrupts: Interrupts) -> bool:
        self._queue.append(reader)
        try:
            return self._until(lambda: reader.is_let_in or self._is_free(reader.whole), interrupts)
        finally:
            self._queue.remove(reader)
            if reader.is_let_in:
                self._due -= 1
                self._changed.notify_all()

    def _until(self, is_so: Callable[[], bool], interrupts: Interrupts) -> bool:
        """Wait; False where an interrupt came before, whose handler may use the lock, so that its caller must not wait any more."""
        while not is_so():
            if interrupts.is_due:
                return False
            self._changed.wait(LOOK_S if interrupts.is_holding else None)
        return True

    def _turn_gate(self) -> bool:
        """Open or shut it as a reader that comes now may be let in or not; whether nobody is in it. Whoever changes that calls this."""
        return bool(turn(self.gate, self._is_torn or not self._is_free(False)) == 0)

    def _empty_gate(self) -> None:
        """Wait for those in it to go, with it shut: each is as long as one search of one query."""
        while not self._turn_gate():
            time.sleep(GATE_S)

    def _is_free(self, whole: bool) -> bool:
        """For a reader that comes now."""
        if self._is_owned:
            return not ((whole and not self._is_still) or self._is_exclusive or self._is_closing)
        return not self._writers

    @contextmanager
    def write(self, *, alone: bool = False) -> Iterator[Interrupts]:
        """Hold it without other writers, and without readers until it lets them in; ``alone``: it never does.

        An interrupt while it waits lets the others go on; one that comes later is held back until it is given back, but where the caller
        looks for it.
        """
        with Interrupts() as interrupts:
            while not self._own(interrupts):
                interrupts.tell()
            self._is_alone, self._is_half = alone, True
            try:
                yield interrupts
            finally:
                self._is_half = False
                self._give_up()

    @contextmanager
    def write_beside(self) -> Iterator[Interrupts]:
        """Hold it without other writers, beside readers, who see what changes within `exclusive` alone; interrupts as in `write`."""
        with Interrupts() as interrupts:
            while not self._own(interrupts, beside=True):
                interrupts.tell()
            try:
                yield interrupts
            finally:
                self._give_up()

    @contextmanager
    def still(self) -> Iterator[Interrupts]:
        """Hold it without writers, and change nothing: whoever reads comes in, also who wants things whole; interrupts as in `write`."""
        with self.write_beside() as interrupts:
            with self._changed:
                self._is_still = True
                self._let_in()
            yield interrupts

    def _own(self, interrupts: Interrupts, *, beside: bool = False) -> bool:
        """Wait as a writer and have it then; False where an interrupt came before."""
        with self._changed:
            if self._is_torn:
                raise DataError(TORN)
            if beside and not (self._is_owned or self._writers):
                self._is_owned, self._is_alone = True, False
                return True
            me = object()
            self._writers.append(me)
            self._turn_gate()
            try:
                if not self._until(lambda: self._writers[0] is me and self._is_left(beside), interrupts):
                    return False
                self._is_owned, self._is_exclusive, self._is_alone = True, not beside, False
                if not beside:
                    self._empty_gate()
                return True
            finally:
                self._writers.remove(me)
                self._turn_gate()
                self._changed.notify_all()

    def _is_left(self, beside: bool) -> bool:
        """For the writer whose turn it is."""
        return not (self._is_owned or (not beside and (self._readers or self._due)))

    def _give_up(self) -> None:
        with self._changed:
            self._is_owned = self._is_still = False
            self._let_in()

    @contextmanager
    def open_to_readers(self) -> Iterator[None]:
        """For the writer: let readers in while it changes nothing that they see."""
        if self._is_alone:
            yield
            return
        with self._changed:
            self._let_in()
        try:
            yield
        finally:
            with self._changed:
                self._close()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """For the writer beside readers: wait for them to go, and keep others out for as long as this is entered."""
        with self._changed:
            self._close()
        self._is_half = True
        try:
            yield
        finally:
            self._is_half = False
            with self._changed:
                self._let_in()

    def _close(self) -> None:
        """Let nobody in, and wait for those who are in."""
        self._is_closing = True
        self._turn_gate()
        self._changed.wait_for(lambda: not (self._readers or self._due))
        self._empty_gate()
        self._is_closing, self._is_exclusive = False, True

    def make_room(self) -> None:
        """For the writer: let those readers in who wait, and go on when they have gone."""
        if self._queue:
            with self.open_to_readers():
                pass

    def _let_in(self) -> None:
        self._is_exclusive = False
        for reader in self._queue:
            if not (reader.is_let_in or (self._is_owned and reader.whole and not self._is_still)):
                reader.is_let_in = True
                self._due += 1
        self._turn_gate()
        self._changed.notify_all()
