"""Requests that have ended and whose row is still to be written: a call of theirs is read on for what it costs."""

import asyncio


class Unsettled:
    """Their ids, on one event loop."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        # Set, and replaced, when one is gone.
        self._gone = asyncio.Event()

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._ids

    def add(self, request_id: str) -> None:
        """One more; nothing if it is there."""
        self._ids.add(request_id)

    def discard(self, request_id: str) -> None:
        """Its row is with the store."""
        if request_id in self._ids:
            self._ids.discard(request_id)
            self._gone.set()
            self._gone = asyncio.Event()

    async def wait(self, request_id: str | None = None) -> None:
        """Until one is gone; None waits for all."""
        while self._ids if request_id is None else request_id in self._ids:
            await self._gone.wait()
