"""Single flight: of identical requests under way at once, the first is sent and the others wait for its answer."""

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class ReleasedError(Exception):
    """Who waited is to fetch for itself."""


class Ticket(Generic[T]):
    """The right and duty to fetch an answer for all who wait: end it by `land`, `fail`, `release` or `abandon`, whatever happens.

    Attributes:
        num_waiting: those who wait for it now.
        on_end: called once it has ended, however.
    """

    def __init__(self, flights: "SingleFlight[T]", key: Hashable) -> None:
        self._flights, self._key = flights, key
        self._future: asyncio.Future[T | None] = asyncio.get_running_loop().create_future()
        self.num_waiting = 0
        self.on_end: Callable[[], object] | None = None

    @property
    def is_open(self) -> bool:
        """It has not been ended."""
        return not self._future.done()

    def land(self, value: T) -> None:
        """Give the answer to all who wait."""
        if self._leave():
            self._future.set_result(value)

    def fail(self, error: Exception) -> None:
        """Raise the error in all who wait: asking again at once would give the same."""
        if self._leave():
            self._future.set_exception(error)
            # Nobody may be waiting.
            self._future.exception()

    def abandon(self) -> None:
        """Nothing came, and nothing is wrong (the client went away): one of those who wait takes over. Does nothing once ended."""
        if self._leave():
            self._future.set_result(None)

    def release(self) -> None:
        """It will not come in time: all who wait fetch it, each for itself. Does nothing once ended."""
        self.fail(ReleasedError())

    async def wait(self) -> T | None:
        """The answer; None once it was abandoned. Raises what it failed with."""
        self.num_waiting += 1
        try:
            return await asyncio.shield(self._future)
        finally:
            self.num_waiting -= 1

    def _leave(self) -> bool:
        if self._future.done():
            return False
        if self._flights._under_way.get(self._key) is self:
            del self._flights._under_way[self._key]
        if self.on_end is not None:
            self.on_end()
        return True


class SingleFlight(Generic[T]):
    """Requests under way, by key. All calls on one event loop."""

    def __init__(self) -> None:
        self._under_way: dict[Hashable, Ticket[T]] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    async def join(self, key: Hashable) -> T | Ticket[T]:
        """The answer that somebody else fetched meanwhile, or a ticket if the caller is the one to fetch it.

        Raises what the one who fetched failed with.
        """
        while (ticket := self._under_way.get(key)) is not None:
            try:
                value = await ticket.wait()
            except ReleasedError:
                # Nobody else waits for this one.
                return Ticket(self, key)
            if value is not None:
                return value
        ticket = self._under_way[key] = Ticket(self, key)
        return ticket
