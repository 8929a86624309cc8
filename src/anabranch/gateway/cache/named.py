"""Answers to requests that their senders gave a name (``Idempotency-Key``): asked and paid for once, however often they are sent.

A name belongs to the key that it came with, and to one request: the same name with another request is refused. While the first is under
way, or is read on for its cost after everybody gave up on it, those who send it again wait for its answer. A request that failed
leaves its name free.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

from anabranch.errors import InputError
from anabranch.gateway.cache.entry import Entry
from anabranch.gateway.cache.flight import SingleFlight, Ticket

# Name of the sender's, and the digest of the request.
NameKey = tuple[str, bytes]
LONGEST_NAME = 255


class OtherRequestError(InputError):
    """A name was sent before with another request."""


class Named:
    """Answers by (tenant, name). When there are too many, the oldest go of whoever holds most: nobody's push out those of others.

    Args:
        ttl_s: seconds a name is held once its answer is there.
        size: most answers. size_bytes: most bytes of all of them.
        clock: seconds, rising.
    """

    def __init__(
        self, *, ttl_s: float, size: int, size_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._held: dict[str, OrderedDict[str, tuple[bytes, Entry, float]]] = {}
        self._bytes: dict[str, int] = {}
        self._count = self.size_bytes = 0
        # Of names under way, the request.
        self._marks: dict[tuple[str, str], bytes] = {}
        self.flights: SingleFlight[Entry] = SingleFlight()
        self.bound(ttl_s=ttl_s, size=size, size_bytes=size_bytes)

    def __len__(self) -> int:
        return self._count

    def bound(self, *, ttl_s: float, size: int, size_bytes: int) -> None:
        """Other limits from now on."""
        self._ttl_s, self._most, self._most_bytes = ttl_s, size, size_bytes
        self._shrink("")

    def get(self, tenant: str, name: str, mark: bytes) -> Entry | None:
        """The answer to a request, if it is there. Raises OtherRequestError."""
        own = self._held.get(tenant)
        held = None if own is None else own.get(name)
        if held is not None and held[2] <= self._clock():
            self._drop(tenant, name)
            held = None
        before = self._marks.get((tenant, name), mark) if held is None else held[0]
        if before != mark:
            raise OtherRequestError(
                f"the name {name!r} (Idempotency-Key) was sent with another request before; a name is for one request"
            )
        return None if held is None else held[1]

    async def claim(self, tenant: str, name: str, mark: bytes) -> Entry | Ticket[Entry]:
        """The answer to a request, once it is there; or the duty to fetch it.

        Args:
            mark: digest of the request.

        Raises OtherRequestError, and what the one who fetches it failed with.
        """
        found = self.get(tenant, name, mark)
        if found is not None:
            return found
        joined = await self.flights.join((tenant, name, mark))
        if isinstance(joined, Ticket):
            try:
                # Another request may have taken the name meanwhile.
                found = self.get(tenant, name, mark)
            except OtherRequestError:
                joined.abandon()
                raise
            if found is not None:
                joined.land(found)
                return found
            self._marks[tenant, name] = mark
            joined.on_end = lambda: self._marks.pop((tenant, name), None)
        return joined

    def put(self, tenant: str, key: NameKey, entry: Entry) -> None:
        """Hold the answer to a request; one that is larger than all room there is is not held."""
        name, mark = key
        self._drop(tenant, name)
        if entry.size_bytes > self._most_bytes:
            return
        self._held.setdefault(tenant, OrderedDict())[name] = (mark, entry, self._clock() + self._ttl_s)
        self._bytes[tenant] = self._bytes.get(tenant, 0) + entry.size_bytes
        self._count += 1
        self.size_bytes += entry.size_bytes
        self._shrink(tenant)

    def delete(self, tenant: str) -> int:
        """Forget all answers of a tenant; how many there were."""
        names = list(self._held.get(tenant, ()))
        for name in names:
            self._drop(tenant, name)
        return len(names)

    def clear(self) -> None:
        """Forget all answers."""
        self._held.clear()
        self._bytes.clear()
        self._count = self.size_bytes = 0

    def _drop(self, tenant: str, name: str) -> None:
        own = self._held.get(tenant)
        held = None if own is None else own.pop(name, None)
        if own is None or held is None:
            return
        self._count -= 1
        self.size_bytes -= held[1].size_bytes
        self._bytes[tenant] -= held[1].size_bytes
        if not own:
            del self._held[tenant], self._bytes[tenant]

    def _shrink(self, newest: str) -> None:
        while self._count > self._most or self.size_bytes > self._most_bytes:
            fullest = self._fullest(newest)
            self._drop(fullest, next(iter(self._held[fullest])))

    def _fullest(self, newest: str) -> str:
        """Who holds most. That of the newest is seen without a look at all others, if it holds its part or more."""
        if newest in self._held and self._part(newest) * len(self._held) >= 1:
            return newest
        return max(self._held, key=self._part)

    def _part(self, tenant: str) -> float:
        return max(len(self._held[tenant]) / self._most, self._bytes[tenant] / self._most_bytes)
