"""Answers to requests that their senders gave a name (``Idempotency-Key``): asked and paid for once, however often they are sent.

A name belongs to the key that it came with, and to one request: the same name with another request is refused. While the first is under
way, or is read on for its cost after everybody gave up on it, those who send it again wait for its answer. A request that failed
leaves its name free.
"""

import time
from collections.abc import Callable

from anabranch.errors import InputError
from anabranch.gateway.cache.entry import Entry
from anabranch.gateway.cache.flight import SingleFlight, Ticket
from anabranch.gateway.cache.held import Held

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
        self._held: Held[str, tuple[bytes, Entry, float]] = Held()
        # Of names under way, the request.
        self._marks: dict[tuple[str, str], bytes] = {}
        self.flights: SingleFlight[Entry] = SingleFlight()
        self.bound(ttl_s=ttl_s, size=size, size_bytes=size_bytes)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def size_bytes(self) -> int:
        """Of all answers."""
        return self._held.size_bytes

    def bound(self, *, ttl_s: float, size: int, size_bytes: int) -> None:
        """Other limits from now on."""
        self._ttl_s = ttl_s
        self._held.bound(size, size_bytes)

    def get(self, tenant: str, name: str, mark: bytes) -> Entry | None:
        """The answer to a request, if it is there. Raises OtherRequestError."""
        held = self._held.get(tenant, name)
        if held is not None and held[2] <= self._clock():
            self._held.drop(tenant, name)
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
        self._held.put(tenant, name, (mark, entry, self._clock() + self._ttl_s), entry.size_bytes)

    def delete(self, tenant: str) -> int:
        """Forget all answers of a tenant; how many there were."""
        return self._held.drop_all(tenant)

    def clear(self) -> None:
        """Forget all answers."""
        self._held.clear()
