"""`OwnTime`: how long an upstream takes, without the time in which it is held up by this process."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

__all__ = ["OwnTime"]


class OwnTime:
    """That of one attempt. For one event loop; what holds the upstream up may be in another task than what waits for it.

    async with time.limited(30.0, left_s):   # TimeoutError after 30 s of the upstream's own
        ...
    with time.held():                        # for room, or for a turn
        ...
    """

    def __init__(self) -> None:
        self._held_s, self._ends = 0.0, 0.0
        # Since when it is held up; None if it is not.
        self._since: float | None = None
        self._limit: asyncio.Timeout | None = None

    @property
    def held_s(self) -> float:
        """Seconds in which it was held up, up to now."""
        return self._held_s + (0.0 if self._since is None else asyncio.get_running_loop().time() - self._since)

    @asynccontextmanager
    async def limited(self, own_s: float, all_s: float) -> AsyncIterator[None]:
        """Raises TimeoutError where the block takes more than ``own_s`` of the upstream's own, or ``all_s`` with what it is held up."""
        now = asyncio.get_running_loop().time()
        self._ends = now + max(all_s, 0.0)
        try:
            async with asyncio.timeout_at(min(now + max(own_s, 0.0), self._ends)) as self._limit:
                yield
        finally:
            self._limit = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """As long as the block lasts it is held up."""
        loop, limit = asyncio.get_running_loop(), self._limit
        since = self._since = loop.time()
        when = None if limit is None or limit.expired() else limit.when()
        if limit is not None and when is not None:
            limit.reschedule(self._ends)
        try:
            yield
        finally:
            self._since, took_s = None, loop.time() - since
            self._held_s += took_s
            if limit is not None and when is not None and limit is self._limit and not limit.expired():
                limit.reschedule(min(when + took_s, self._ends))
