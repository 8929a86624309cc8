"""`LargeAnswers`: how many bytes of large whole answers are read at once, and who is next."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

# Of all that are read: each takes some three times as much, as it came, as it was read, and as it is written.
READ_BYTES = 128 << 20


class LargeAnswers:
    """Places for answers while they are read, in bytes; for one event loop.

    Beyond the limit an answer waits, with the little that has come of it, and its upstream with it. Senders who wait take turns, so that
    one who asks for many waits for itself; the answers of each go in the order they came. One that is larger than all goes alone.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int = READ_BYTES) -> None:
        self._limit, self._held = limit, 0
        # The order of the senders is that of their turns.
        self._waiting: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}

    @asynccontextmanager
    async def place(self, sender: str, num_bytes: int) -> AsyncIterator[None]:
        """Wait until there is room for an answer; it is held until the block ends."""
        future = asyncio.get_running_loop().create_future()
        piece = (num_bytes, future)
        self._waiting.setdefault(sender, deque()).append(piece)
        self._let_in()
        try:
            await future
        except asyncio.CancelledError:
            self._forget(sender, piece)
            raise
        try:
            yield
        finally:
            self._held -= num_bytes
            self._let_in()

    def _forget(self, sender: str, piece: "tuple[int, asyncio.Future[None]]") -> None:
        num_bytes, future = piece
        pieces = self._waiting.get(sender)
        if not future.cancelled():
            # It was let in, and is not there any more.
            self._held -= num_bytes
        elif pieces is not None and piece in pieces:
            pieces.remove(piece)
            if not pieces:
                del self._waiting[sender]
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            sender = next(iter(self._waiting))
            pieces = self._waiting[sender]
            num_bytes, future = pieces[0]
            # Whoever has gone is passed over.
            if not future.cancelled():
                if self._held and self._held + num_bytes > self._limit:
                    return
                self._held += num_bytes
                future.set_result(None)
            del self._waiting[sender]
            pieces.popleft()
            if pieces:
                self._waiting[sender] = pieces
