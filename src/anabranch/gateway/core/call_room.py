"""`CallRoom`: how many bytes the calls of one request send at once. Its own body is counted once, and each call makes one of it anew."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

# Bytes of bodies that are sent at once; one that is longer is sent alone.
MOST_BYTES = 4 << 20


class CallRoom:
    """For one event loop. Who comes first is let in first."""

    def __init__(self) -> None:
        self._num_bytes = 0
        self._turn, self._left = asyncio.Lock(), asyncio.Event()

    @asynccontextmanager
    async def taken(self, num_bytes: int) -> AsyncIterator[None]:
        """Room for so many bytes, from when there is some until the block ends."""
        async with self._turn:
            while self._num_bytes and self._num_bytes + num_bytes > MOST_BYTES:
                self._left.clear()
                await self._left.wait()
            self._num_bytes += num_bytes
        try:
            yield
        finally:
            self._num_bytes -= num_bytes
            self._left.set()
