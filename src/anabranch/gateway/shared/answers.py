"""`SharedAnswers`: answers of the exact cache, for all processes. Each key has its own, as ever."""

import asyncio
import json
from typing import Any

from anabranch.gateway.cache import Entry
from anabranch.gateway.shared.link import AwayError, Link

# Writes under way at once; more are left out: it is a cache.
MOST_WRITES = 64

# Keys deleted in one go.
MANY = 500


class SharedAnswers:
    """See `anabranch.gateway.cache.SharedEntries`.

    Args:
        link: to Redis.
        most_bytes: of one answer; longer ones stay in the process that got them.
    """

    def __init__(self, link: Link, most_bytes: int) -> None:
        self._link, self._most_bytes = link, most_bytes
        self._writes: set[asyncio.Task[None]] = set()

    def _key(self, tenant: str, key: bytes) -> str:
        return self._link.key("answer", tenant, key.hex())

    async def get(self, tenant: str, key: bytes) -> Entry | None:
        """See there."""
        name = self._key(tenant, key)
        try:
            found = await self._link.run(lambda client: client.get(name))
        except AwayError:
            return None
        return None if found is None else _entry(found)

    def put(self, tenant: str, key: bytes, entry: Entry, ttl_s: float) -> None:
        """See there."""
        if not self._link.is_up or entry.size_bytes > self._most_bytes or len(self._writes) >= MOST_WRITES:
            return
        task = asyncio.ensure_future(self._put(self._key(tenant, key), entry, ttl_s))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _put(self, name: str, entry: Entry, ttl_s: float) -> None:
        try:
            await self._link.run(lambda client: client.set(name, _written(entry), px=max(1, int(ttl_s * 1e3))))
        except AwayError:
            # Others ask for themselves.
            return

    async def clear(self, tenant: str | None = None) -> int:
        """Forget the answers of a key, or all; how many there were. Raises AwayError."""
        # A tenant is an id: it has no sign that a pattern knows.
        pattern = self._link.key("answer", "*" if tenant is None else f"{tenant}:*")
        count, cursor = 0, -1
        while cursor != 0:
            cursor, names = await self._link.run(
                lambda client: client.scan(cursor=max(cursor, 0), match=pattern, count=MANY)  # noqa: B023
            )
            if names:
                count += await self._link.run(lambda client: client.unlink(*names))  # noqa: B023
        return count

    async def close(self) -> None:
        """Wait for what is being written."""
        await asyncio.gather(*self._writes, return_exceptions=True)


def _written(entry: Entry) -> bytes:
    head = [entry.model, entry.prompt_tokens, entry.completion_tokens, entry.nano]
    return json.dumps(head).encode() + b"\n" + entry.body


def _entry(raw: bytes) -> Entry | None:
    """What `_written` made of it; None of anything else."""
    head, _, body = raw.partition(b"\n")
    try:
        model, prompt, completion, nano = json.loads(head)
    except (ValueError, TypeError):
        return None
    counts: list[Any] = [prompt, completion, nano]
    if not isinstance(model, str) or not body or not all(type(count) is int and count >= 0 for count in counts):
        return None
    return Entry(body=body, model=model, prompt_tokens=prompt, completion_tokens=completion, nano=nano)
