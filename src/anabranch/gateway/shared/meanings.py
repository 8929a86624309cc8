"""`SharedMeanings`: answers of the semantic cache, for all processes. Each key has its own, as ever.

For each context of a key there is a stream of texts, as vectors, with the names of their answers: a process that finds nothing in its own
cache reads what is new in the stream, and looks for the nearest itself. Answers lie apart, and are read once one is wanted.
"""
# Shapes: D dimensions of a vector

import asyncio
import uuid
from typing import Any

import numpy as np

from anabranch.gateway.cache import Entry
from anabranch.gateway.shared.answers import MOST_WRITES, all_of, deleted, entry_of, read, written
from anabranch.gateway.shared.link import AwayError, Link, RefusedError

# Texts of one context that are held, about; the oldest go first.
MOST_TEXTS = 1000

# Read in one go: of 1,536 dimensions, 400 KB.
MANY = 64

# Of the ids of a stream: milliseconds in which none of ours can be (the year 33658), and the largest number that follows them. Behind the
# last id there is nothing can be written.
LAST_MS, LAST_COUNT = 10**15, 2**64 - 1

# How vectors are written.
NUMBERS = np.dtype("<f4")


class SharedMeanings:
    """See `anabranch.gateway.cache.SharedTexts`.

    Args:
        link: to Redis.
        most_bytes: of one answer; longer ones stay in the process that got them.
    """

    def __init__(self, link: Link, most_bytes: int) -> None:
        self._link, self._most_bytes = link, most_bytes
        self._process = uuid.uuid4().hex[:12].encode()
        self._writes: set[asyncio.Task[None]] = set()

    def _stream(self, tenant: str, context: bytes) -> str:
        return self._link.key("texts", tenant, context.hex())

    def _answer(self, tenant: str, name: str) -> str:
        return self._link.key("meant", tenant, name)

    async def news(
        self, tenant: str, context: bytes, after: str
    ) -> tuple[str, list[tuple[np.ndarray, str, float]]] | None:
        """See there."""
        stream, found = self._stream(tenant, context), list[tuple[np.ndarray, str, float]]()
        try:
            while True:
                items, now_ms = await self._link.run(lambda client: _some(client, stream, after))  # noqa: B023
                for id, fields in items:
                    text = self._text(id, fields, now_ms)
                    if text is not None:
                        found.append(text)
                if items:
                    after = items[-1][0].decode()
                if len(items) < MANY:
                    return after, found
        except AwayError:
            return None

    def _text(self, id: bytes, fields: dict[bytes, bytes], now_ms: int) -> tuple[np.ndarray, str, float] | None:
        """One item of a stream; None for what this process wrote itself, what is no good any more, and what is none of ours."""
        raw, name, ttl_ms = (fields.get(field, b"") for field in (b"vector", b"name", b"ttl_ms"))
        is_ours = fields.get(b"process") == self._process
        if is_ours or not raw or len(raw) % NUMBERS.itemsize or not name.isalnum() or not ttl_ms.isdigit():
            return None
        # By the clock of when it was written, which may have been ahead.
        left_ms = int(ttl_ms[:15]) - max(0, now_ms - _ms(id))
        return None if left_ms <= 0 else (np.frombuffer(raw, NUMBERS), name.decode(), left_ms / 1e3)

    async def get(self, tenant: str, name: str) -> tuple[Entry | None, float] | None:
        """See there."""
        key = self._answer(tenant, name)
        try:
            body, left_ms = await self._link.run(lambda client: read(client, key))
        except RefusedError:
            # Something else lies there.
            return None, 0.0
        except AwayError:
            return None
        entry = None if body is None or left_ms <= 0 else entry_of(body)
        return entry, max(0, left_ms) / 1e3

    def put(self, tenant: str, context: bytes, vector_D: np.ndarray, entry: Entry, ttl_s: float) -> None:
        """See there."""
        if not self._link.is_up or entry.size_bytes > self._most_bytes or len(self._writes) >= MOST_WRITES:
            return
        stream, name = self._stream(tenant, context), uuid.uuid4().hex
        fields = {
            "vector": vector_D.astype(NUMBERS).tobytes(),
            "name": name,
            "ttl_ms": max(1, int(ttl_s * 1e3)),
            "process": self._process,
        }
        task = asyncio.ensure_future(self._put(stream, self._answer(tenant, name), fields, entry))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _put(self, stream: str, answer: str, fields: dict[str, Any], entry: Entry) -> None:
        async def write(client: Any) -> None:
            async with client.pipeline(transaction=False) as pipe:
                # First: who reads of it finds it.
                pipe.set(answer, written(entry), px=fields["ttl_ms"])
                add(pipe)
                is_set, id, _ = await self._link.each(pipe)
                # What cannot even be set is refused for a reason of another kind, such as that there is no memory left.
                if is_set and (id is None or _ms(id) >= LAST_MS):
                    # It is no stream, or has come to its end: nobody would find anything that is added.
                    pipe.delete(stream)
                    add(pipe)
                    await self._link.each(pipe)

        def add(pipe: Any) -> None:
            pipe.xadd(stream, fields, maxlen=MOST_TEXTS, approximate=True)
            pipe.pexpire(stream, fields["ttl_ms"])

        try:
            await self._link.run(write)
        except AwayError:
            # Others ask for themselves.
            return

    async def clear(self, tenant: str | None = None) -> int:
        """Forget the answers of a key, or all; how many there were. Raises AwayError."""
        # What is being written would lie there afterwards.
        await self.close()
        await deleted(self._link, all_of(self._link, "texts", tenant))
        return await deleted(self._link, all_of(self._link, "meant", tenant))

    async def close(self) -> None:
        """Wait for what is being written."""
        await asyncio.gather(*self._writes, return_exceptions=True)


async def _some(client: Any, stream: str, after: str) -> tuple[list[tuple[bytes, dict[bytes, bytes]]], int]:
    """Items of a stream behind a place, and the time there in milliseconds since 1970. Raises ValueError for an answer of another kind."""
    async with client.pipeline(transaction=False) as pipe:
        pipe.xrange(stream, min=_next(after) if after else "-", max=f"{LAST_MS - 1}", count=MANY)
        pipe.time()
        items, (seconds, micros) = await pipe.execute()
    if not isinstance(items, list) or not all(
        isinstance(id, bytes) and id.replace(b"-", b"", 1).isdigit() and isinstance(fields, dict)
        for id, fields in items
    ):
        raise ValueError("its answer is none of a stream")
    return items, int(seconds) * 1000 + int(micros) // 1000


def _ms(id: bytes) -> int:
    """When an item was written, in milliseconds since 1970."""
    return int(id.partition(b"-")[0])


def _next(id: str) -> str:
    """The first id behind one."""
    head, _, count = id.partition("-")
    return f"{head}-{int(count) + 1}" if int(count) < LAST_COUNT else f"{int(head) + 1}-0"
