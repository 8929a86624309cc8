"""Single flight: of identical requests under way at once, the first is sent and the others wait for its answer."""

import asyncio
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Ticket(Generic[T]):
    """The right and duty to fetch an answer for all who wait: end it by `land`, `fail` or `abandon`, whatever happens."""

    def __init__(self, flights: "SingleFlight[T]", key: Hashable) -> None:
        self._flights, self._key = flights, key
        self._future: asyncio.Future[T | None] = asyncio.get_running_loop().create_future()

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

    def _leave(self) -> bool:
        if self._future.done():
            return False
        self._flights._under_way.pop(self._key, None)
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
            value = await asyncio.shield(ticket._future)
            if value is not None:
                return value
        ticket = self._under_way[key] = Ticket(self, key)
        return ticket
