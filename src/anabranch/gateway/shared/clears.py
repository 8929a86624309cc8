"""`SharedClears`: an operator who clears the cache of one process clears that of all.

Whoever is told to clear puts an order at the head of a short list, which all read twice a second: each forgets what it holds itself. A
process that was away from Redis reads it when it is back.
"""

import json
import uuid
from collections import deque
from typing import Any

from anabranch.gateway.shared.link import Link

# Orders that are held; who has missed more than these forgets everything.
MOST = 64

# How long they are, after the last: longer than a process is away and still has what it kept.
KEPT_S = 86_400


class SharedClears:
    """See the module.

    Args:
        link: to Redis.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        # The list as it was last read, and what this process put there: done with.
        self._read: list[bytes] = []
        self._own: deque[bytes] = deque(maxlen=MOST)

    async def tell(self, tenant: str | None) -> None:
        """Have all other processes forget the answers of a key; None for those of all. Raises AwayError."""
        order = json.dumps([uuid.uuid4().hex, tenant]).encode()
        self._own.append(order)
        name = self._link.key("clears")

        async def push(client: Any) -> None:
            async with client.pipeline(transaction=True) as pipe:
                pipe.lpush(name, order)
                pipe.ltrim(name, 0, MOST - 1)
                pipe.expire(name, KEPT_S)
                await pipe.execute()

        await self._link.run(push)

    async def news(self) -> list[str | None]:
        """Whose answers others have cleared since this was last asked, the earliest first; None means those of all. Raises AwayError."""
        head = await self._link.run(lambda client: self._listed(client, 1))
        if head == self._read[:1]:
            return []
        found = await self._link.run(lambda client: self._listed(client, MOST))
        done = {*self._read, *self._own}
        has_missed = len(found) == MOST and done.isdisjoint(found)
        self._read = found
        if has_missed:
            return [None]
        return [order[1] for raw in reversed(found) if raw not in done and (order := _order(raw)) is not None]

    async def _listed(self, client: Any, most: int) -> list[bytes]:
        found = await client.lrange(self._link.key("clears"), 0, most - 1)
        if not isinstance(found, list) or not all(isinstance(raw, bytes) for raw in found):
            raise ValueError("its answer is no list of texts")
        return found


def _order(raw: bytes) -> tuple[str, str | None] | None:
    """What `SharedClears.tell` wrote; None of anything else."""
    try:
        id, tenant = json.loads(raw)
    except (ValueError, TypeError, RecursionError):
        return None
    return (id, tenant) if isinstance(id, str) and isinstance(tenant, str | None) else None
