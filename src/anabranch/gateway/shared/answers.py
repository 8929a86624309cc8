"""`SharedAnswers`: answers of the exact cache, for all processes. Each key has its own, as ever."""

import asyncio
import json
import re
from typing import Any

from anabranch.gateway.cache import Entry
from anabranch.gateway.providers.usage import TOKENS
from anabranch.gateway.shared.link import AwayError, Link
from anabranch.routers.money import MOST_NANO

# Writes under way at once; more are left out: it is a cache.
MOST_WRITES = 64

# Keys deleted in one go.
MANY = 500

# What means something in a pattern of Redis.
_PATTERN = re.compile(r"[*?\[\]\\]")


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

    async def get(self, tenant: str, key: bytes) -> tuple[Entry, float] | None:
        """See there."""
        name = self._key(tenant, key)
        try:
            body, left_ms = await self._link.run(lambda client: read(client, name))
        except AwayError:
            return None
        entry = None if body is None or left_ms <= 0 else entry_of(body)
        return None if entry is None else (entry, left_ms / 1e3)

    def put(self, tenant: str, key: bytes, entry: Entry, ttl_s: float) -> None:
        """See there."""
        if not self._link.is_up or entry.size_bytes > self._most_bytes or len(self._writes) >= MOST_WRITES:
            return
        task = asyncio.ensure_future(self._put(self._key(tenant, key), entry, ttl_s))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _put(self, name: str, entry: Entry, ttl_s: float) -> None:
        try:
            await self._link.run(lambda client: client.set(name, written(entry), px=max(1, int(ttl_s * 1e3))))
        except AwayError:
            # Others ask for themselves.
            return

    async def clear(self, tenant: str | None = None) -> int:
        """Forget the answers of a key, or all; how many there were. Raises AwayError."""
        # What is being written would lie there afterwards.
        await self.close()
        return await deleted(self._link, all_of(self._link, "answer", tenant))

    async def close(self) -> None:
        """Wait for what is being written."""
        await asyncio.gather(*self._writes, return_exceptions=True)


def all_of(link: Link, kind: str, tenant: str | None) -> str:
    """The pattern of what is kept of a kind for a tenant, whatever signs are in its name; None for that of all."""
    return link.key(kind, "*" if tenant is None else _PATTERN.sub(r"\\\g<0>", tenant) + ":*")


async def deleted(link: Link, pattern: str) -> int:
    """Delete all whose names fit; how many there were. Raises AwayError."""
    count, cursor = 0, 0
    while True:
        cursor, some = await link.run(lambda client: _unlink(client, pattern, cursor))  # noqa: B023
        count += some
        if cursor == 0:
            return count


async def _unlink(client: Any, pattern: str, cursor: int) -> tuple[int, int]:
    """Delete some; where to go on (0 at the end), and how many there were. Raises ValueError for an answer that is none of a scan."""
    after, names = await client.scan(cursor=cursor, match=pattern, count=MANY)
    deleted = await client.unlink(*names) if names else 0
    if type(after) is not int or type(deleted) is not int or 0 != after == cursor:
        raise ValueError("its answer is none of a scan")
    return after, deleted


async def read(client: Any, name: str) -> tuple[bytes | None, int]:
    """What lies under a name, and how many milliseconds it will (negative if for ever, or not at all). Raises ValueError for all else."""
    async with client.pipeline(transaction=True) as pipe:
        pipe.get(name)
        pipe.pttl(name)
        body, left_ms = await pipe.execute()
    if not isinstance(body, bytes | None) or type(left_ms) is not int:
        raise ValueError("its answer is no text with its time")
    return body, left_ms


def written(entry: Entry) -> bytes:
    """As answers lie there."""
    head = [entry.model, entry.prompt_tokens, entry.completion_tokens, entry.nano, *filter(None, [entry.spare])]
    return json.dumps(head).encode() + b"\n" + entry.body


def entry_of(raw: bytes) -> Entry | None:
    """What `written` made of it; None of anything else."""
    head, _, body = raw.partition(b"\n")
    try:
        model, prompt, completion, nano, *more = json.loads(head)
    except (ValueError, TypeError, RecursionError):
        return None
    # A name and a reason go into headers, and counts into a store.
    said = [model, *more]
    if len(said) > 2 or not all(isinstance(one, str) and one.isprintable() for one in said) or not body:
        return None
    counts: list[tuple[Any, int]] = [(prompt, TOKENS), (completion, TOKENS), (nano, MOST_NANO)]
    if not all(type(count) is int and 0 <= count <= most for count, most in counts):
        return None
    return Entry(
        body=body, model=model, prompt_tokens=prompt, completion_tokens=completion, nano=nano, spare="".join(more)
    )
