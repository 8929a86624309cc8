"""`HeldBody`: what the body of a request takes before anybody has read it, a place among its key's requests and room for its bytes."""

import asyncio
from collections.abc import Callable

from anabranch.web.body_room import Kept

__all__ = ["HeldBody"]


class HeldBody:
    """For one event loop. Whoever made it holds it; it is given back when the last holder has closed it.

    Args:
        kept: the room of its bytes.
        leave: gives the place among its key's requests back; None if it takes none.
    """

    def __init__(self, kept: Kept, leave: Callable[[], None] | None) -> None:
        self._kept, self._leave, self._holders = kept, leave, 1

    def more(self, num_bytes: int, left: asyncio.Timeout) -> None:
        """Some more of it comes, and ``left`` is the time that it has. Raises ApiError (429) where that has no room."""
        self._kept.more(num_bytes, left)

    def is_whole(self) -> None:
        """It has come. One that takes no place is small: it is counted no longer."""
        self._kept.is_whole()
        if self._leave is None:
            self._kept.close()

    def take_place(self) -> bool:
        """Whether a place is handed over, once. Whoever takes it leaves it: from there on the request is counted, and not its body."""
        leave, self._leave = self._leave, None
        return leave is not None

    def share(self) -> None:
        """One more holds it, and will `close` it."""
        self._holders += 1

    def close(self) -> None:
        """A holder has done with it."""
        self._holders -= 1
        if self._holders:
            return
        self._kept.close()
        if self._leave is not None:
            self._leave()
            self._leave = None
