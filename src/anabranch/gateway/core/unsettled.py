"""Requests that have ended and whose row is still to be written: a call of theirs is read on for what it costs."""

import asyncio

from anabranch.gateway.store import LedgerRow


class Unsettled:
    """Their ids, on one event loop, and their rows as far as they are known: all but what they cost."""

    def __init__(self) -> None:
        self._rows: dict[str, LedgerRow | None] = {}
        # Set, and replaced, when one has changed.
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._rows

    def add(self, request_id: str, row: LedgerRow | None = None) -> None:
        """One more, or what is known of one by now."""
        if row is not None or request_id not in self._rows:
            self._rows[request_id] = row
            self._tell()

    def discard(self, request_id: str) -> None:
        """Its row is with the store."""
        if request_id in self._rows:
            del self._rows[request_id]
            self._tell()

    async def wait(self, request_id: str | None = None) -> None:
        """Until one is gone; None waits for all."""
        while self._rows if request_id is None else request_id in self._rows:
            await self._changed.wait()

    async def row(self, request_id: str) -> LedgerRow | None:
        """What is known of one, as soon as something is; None for what is not there."""
        while request_id in self._rows and self._rows[request_id] is None:
            await self._changed.wait()
        return self._rows.get(request_id)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
