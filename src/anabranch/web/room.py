"""`Room`: how many bytes a server keeps of what others send it or read from it, and how much of that is for one of them.

`Shared` alone counts them; a `Room` refuses what is beyond.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Literal, Self

from anabranch.sharing import most_beside
from anabranch.web.api_error import ApiError

__all__ = ["PATIENCE_S", "Held", "Lack", "Room", "Shared"]

# Who has been slow for longer makes room for others.
PATIENCE_S = 2.0
Lack = Literal["share", "room"]


class Shared:
    """Bytes that are kept, in all and of each source. For one thread (an event loop).

    Args:
        limit: bytes.
        share: of what others leave, that one source may have; see `most_beside`.

    Attributes:
        limit: may be changed; what is kept stays.
        num_bytes: that are kept.
    """

    def __init__(self, limit: int, share: float) -> None:
        self.num_bytes = 0
        self.limit, self._share = limit, share
        self._of_source: Counter[str] = Counter()

    def _part(self, source: str) -> float:
        """Bytes that a source may have in all, beside those of others."""
        return most_beside(self.num_bytes - self._of_source[source], self.limit, self._share)

    def _add(self, held: "Held", more: int) -> None:
        self.num_bytes += more
        self._of_source[held.source] += more
        held.num_bytes += more

    def _forget(self, held: "Held") -> None:
        """Nothing is left of it. A second call does nothing."""
        self.num_bytes -= held.num_bytes
        self._of_source[held.source] -= held.num_bytes
        held.num_bytes = 0
        if not self._of_source[held.source]:
            del self._of_source[held.source]


class Room(Shared):
    """See `Shared`; what comes first from a source is taken where there is room.

    Args:
        limit: see `Shared`.
        share: likewise.
        status: of a refusal.
        refused: told of each.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        limit: int,
        share: float,
        status: int,
        refused: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(limit, share)
        self._status, self._refused, self._clock = status, refused, clock

    def _why_not(self, source: str, more: int, gone: "Iterable[Held]" = ()) -> Lack | None:
        """What ``more`` bytes of a source lack, even were those ``gone``."""
        late = list(gone)
        total = self.num_bytes - sum(held.num_bytes for held in late)
        own = self._of_source[source] - sum(held.num_bytes for held in late if held.source == source)
        if own and own + more > most_beside(total - own, self.limit, self._share):
            return "share"
        return "room" if total + more > self.limit else None

    def _refusal(self, what: str, **headers: str) -> ApiError:
        """``what`` takes all the room."""
        self._refused()
        message = f"overloaded: {what}; try again in 1 s"
        told = {"Retry-After": "1", "x-should-retry": "true", **headers}
        return ApiError(self._status, "overloaded", message, type="rate_limit_error", headers=told)


class Held:
    """What is kept of one. Also a context manager that closes it.

    Attributes:
        source: whose it is.
        num_bytes: that are kept.
    """

    def __init__(self, room: Shared, source: str) -> None:
        self._of, self.source, self.num_bytes = room, source, 0

    def close(self) -> None:
        """Nothing is left of it. A second call does nothing."""
        self._of._forget(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
