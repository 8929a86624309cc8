"""The semantic cache: a last message that means the same as one before, in the same context of the same tenant.

Only the last user message is compared by meaning. Whatever else shapes the answer (model or strategy, the messages before, tools, sampling
fields) must be equal to the letter, so that "and in French?" never gets the answer to another conversation.
"""
# Shapes: D dimensions of a vector

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from anabranch.errors import InputError
from anabranch.gateway.cache.entry import Entry
from anabranch.gateway.cache.exact import IGNORED
from anabranch.gateway.cache.held import Held
from anabranch.routers.retrieve import Exact, Index


def context_key(endpoint: str, target: str, body: Mapping[str, Any]) -> tuple[bytes, str] | None:
    """What must be equal, as 32 bytes, and the text that may differ in wording.

    None where there is no such text: the last message is not the user's, or is more than text.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or messages[-1].get("role") != "user":
        return None
    text = messages[-1].get("content")
    if not isinstance(text, str) or not text.strip():
        return None
    fields = {name: value for name, value in body.items() if name not in IGNORED and name not in ("model", "messages")}
    last = {name: value for name, value in messages[-1].items() if name != "content"}
    context = json.dumps([endpoint, target, fields, messages[:-1], last], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(context.encode()).digest(), text


class SharedTexts(Protocol):
    """What other processes kept by the meaning of a text. Where they cannot be asked, there is nothing."""

    async def news(
        self, tenant: str, context: bytes, after: str
    ) -> tuple[str, list[tuple[np.ndarray, str, float]]] | None:
        """Texts of one context that others kept: vectors, names of the answers, and the seconds that these are still good for.

        None where they cannot be asked.

        Args:
            tenant, context: see `SemanticCache`.
            after: the place up to which they are known; "" for the beginning. The new one comes first in what is returned.
        """

    async def get(self, tenant: str, name: str) -> tuple[Entry | None, float] | None:
        """The answer of a name (None where it is gone), and the seconds that it is good for; None where they cannot be asked."""

    def put(self, tenant: str, context: bytes, vector_D: np.ndarray, entry: Entry, ttl_s: float) -> None:
        """Keep an answer for so long; nobody waits for that."""


@dataclass(slots=True)
class _Room:
    """What is held for one context of one tenant, and one length of vectors: those of another are compared with none of them."""

    index: Index
    ids: set[int] = field(default_factory=set)


class SemanticCache:
    """Answers by (namespace, context) and meaning. Once there are too many, those leave that were not used for longest, of who holds most.

    Args:
        threshold: least cosine of two texts that count as the same.
        ttl_s: seconds an answer is good for.
        size: most answers.
        size_bytes: most bytes of all answers together; None for no limit.
        index: makes the index of one context.
        clock: seconds, rising.
    """

    def __init__(
        self,
        *,
        threshold: float,
        ttl_s: float,
        size: int,
        size_bytes: int | None = None,
        index: Index.Config | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < threshold <= 1 or not ttl_s > 0 or size < 1:
            raise InputError(
                f"a semantic cache needs a threshold above 0 and at most 1, a ttl_s above 0 and a size of at least 1; "
                f"got {threshold}, {ttl_s} and {size}"
            )
        self.threshold, self.ttl_s, self.size = threshold, ttl_s, size
        self.most_bytes: float = math.inf if size_bytes is None else size_bytes
        self._index, self._clock = index or Exact.Config(), clock
        self._rooms: dict[tuple[str, bytes, int], _Room] = {}
        self._held: Held[int, tuple[bytes, int, Entry, float]] = Held(self._dropped)
        self._held.bound(size, self.most_bytes)
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._held)

    @property
    def size_bytes(self) -> int:
        """Of all answers."""
        return self._held.size_bytes

    def get(self, namespace: str, context: bytes, vector_D: np.ndarray) -> tuple[Entry, float] | None:
        """The answer to the nearest text with its cosine, if that reaches the threshold and is not too old."""
        room = self._rooms.get((namespace, context, len(vector_D)))
        while room is not None and room.ids and np.isfinite(vector_D).all():
            id_K, cosine_K = room.index.search(vector_D, 1)
            if not len(id_K) or cosine_K[0] < self.threshold:
                return None
            id, cosine = int(id_K[0]), float(cosine_K[0])
            found = self._held.get(namespace, id)
            assert found is not None, "what an index finds is held"
            _, _, entry, until = found
            if until > self._clock():
                self._held.use(namespace, id)
                return entry, min(cosine, 1.0)
            self._held.drop(namespace, id)
        return None

    def put(
        self, namespace: str, context: bytes, vector_D: np.ndarray, entry: Entry, ttl_s: float | None = None
    ) -> None:
        """Keep an answer. A vector of zeros (nothing in the text was known) means nothing, and is not kept.

        Args:
            namespace, context: where.
            vector_D: of the text.
            entry: the answer.
            ttl_s: seconds that it is good for, if that is less than the cache's own.
        """
        length = float(np.linalg.norm(vector_D))
        if not np.isfinite(length) or length == 0:
            return
        place = (namespace, context, len(vector_D))
        if place not in self._rooms:
            self._rooms[place] = _Room(self._index.build(len(vector_D)))
        room, id = self._rooms[place], self._next_id
        self._next_id += 1
        room.index.add(vector_D, [id])
        room.ids.add(id)
        until = self._clock() + min(self.ttl_s, self.ttl_s if ttl_s is None else ttl_s)
        value = (context, len(vector_D), entry, until)
        if not self._held.put(namespace, id, value, entry.size_bytes):
            self._dropped(namespace, id, value)

    def remove(self, namespace: str, context: bytes, dim: int, entry: Entry) -> None:
        """Forget this one answer, if it is there; ``dim``: of its vector."""
        room = self._rooms.get((namespace, context, dim))
        for id in [] if room is None else list(room.ids):
            found = self._held.get(namespace, id)
            if found is not None and found[2] is entry:
                self._held.drop(namespace, id)

    def delete(self, namespace: str) -> int:
        """Forget all of a namespace; returns how many answers there were."""
        return self._held.drop_all(namespace)

    def clear(self) -> None:
        """Forget everything."""
        self._rooms.clear()
        self._held.clear()

    def _dropped(self, namespace: str, id: int, value: tuple[bytes, int, Entry, float]) -> None:
        place = (namespace, value[0], value[1])
        room = self._rooms[place]
        room.index.remove([id])
        room.ids.discard(id)
        if not room.ids:
            del self._rooms[place]
