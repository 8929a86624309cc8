"""Changes of many threads, made in groups: who finds nobody at it leads, for all that wait meanwhile."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from anabranch.graph.interrupts import Interrupts
from anabranch.graph.live import log
from anabranch.graph.live.changes import Change, payload_bytes

# Of one write to the disk; a change that is larger goes alone.
GROUP_BYTES = 16 << 20


@dataclass
class Waiting:
    """A change that waits for its turn, and what became of it.

    Attributes:
        change: what is asked for; how it was made, once it is.
        called: names instead of ids, of an index whose elements have some; they are looked up when it is its turn.
        number: of the write.
        known: which of the elements were there before, bool [N]; None until it is made.
        error: why it was not made, or None.
    """

    change: Change
    called: list | None = None
    is_done: bool = False
    number: int = 0
    known: np.ndarray | None = None
    error: BaseException | None = None


class Groups:
    """Makes changes, one group at a time.

    Args:
        check: raises where no changes are taken; asked with ``changed`` held.
        write: makes a group of changes.

    Attributes:
        turn: held while a group is made; for who must not be met by one.
        changed: guards what is waiting.
        waiting: changes whose turn has not come.
    """

    def __init__(self, check: Callable[[], None], write: Callable[[list[Waiting]], None]) -> None:
        self.turn, self.changed = threading.Lock(), threading.Condition()
        self.waiting: list[Waiting] = []
        self._check, self._write, self._is_led = check, write, False

    def make(self, mine: Waiting) -> None:
        """Make a change, with others. Raises what kept it from being made."""
        # An interrupt waits: in between lies what is in the log and not in the index.
        with Interrupts():
            with self.changed:
                self._check()
                self.waiting.append(mine)
                while not mine.is_done and self._is_led:
                    self.changed.wait()
                if not mine.is_done:
                    self._is_led = True
            if not mine.is_done:
                self._lead(mine)
        if mine.error is not None:
            raise mine.error

    def _lead(self, mine: Waiting) -> None:
        """Make the changes that wait, one write for as many as fit, until one's own is done."""
        try:
            while not mine.is_done:
                with self.turn:
                    with self.changed:
                        group = self._next()
                    try:
                        self._write(group)
                    except BaseException as error:
                        for one in group:
                            if one.known is None and one.error is None:
                                one.error = error
                    finally:
                        with self.changed:
                            for one in group:
                                one.is_done = True
                            self.changed.notify_all()
        finally:
            with self.changed:
                self._is_led = False
                self.changed.notify_all()

    def _next(self) -> list[Waiting]:
        size, count = 0, 0
        for one in self.waiting:
            size += payload_bytes(one.change)
            if count and size > min(GROUP_BYTES, log.MOST_PAYLOAD):
                break
            count += 1
        group, self.waiting = self.waiting[:count], self.waiting[count:]
        return group
