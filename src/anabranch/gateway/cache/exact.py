"""The exact cache: the same request of the same tenant gets the same answer, for a while."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from anabranch.errors import InputError
from anabranch.gateway.cache.entry import Entry
from anabranch.gateway.cache.held import Held
from anabranch.gateway.providers.media import Upload

# What does not change the answer: how it is sent, and notes for the books. All else does, fields we do not know among them.
IGNORED = frozenset(
    {"stream", "stream_options", "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"}
)


def exact_key(endpoint: str, target: str, body: Mapping[str, Any]) -> bytes:
    """What requests share that ask the same of the same model or strategy; 32 bytes. The order of JSON keys does not matter."""
    fields = {name: value for name, value in body.items() if name not in IGNORED and name != "model"}
    text = json.dumps(
        [endpoint, target, fields], sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_file
    )
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _file(value: Any) -> list[str]:
    """What tells a file of a form from others."""
    if not isinstance(value, Upload):
        raise TypeError(f"{type(value).__name__} is not ready for JSON")
    return ["file", value.name, value.type, hashlib.sha256(value.data).hexdigest()]


class SharedEntries(Protocol):
    """Answers that other processes kept, by (namespace, key). Where they cannot be asked, there are none."""

    async def get(self, tenant: str, key: bytes) -> tuple[Entry, float] | None:
        """The answer, if there is one, and the seconds that it is still good for."""

    def put(self, tenant: str, key: bytes, entry: Entry, ttl_s: float) -> None:
        """Keep an answer for so long; nobody waits for that."""


class ExactCache:
    """Answers by (namespace, key). Once there are too many bytes, those leave that were not used for longest, of who holds most.

    Args:
        ttl_s: seconds an answer is good for.
        size_bytes: most bytes of all answers together.
        clock: seconds, rising.
    """

    def __init__(self, *, ttl_s: float, size_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        if not ttl_s > 0 or size_bytes < 0:
            raise InputError(
                f"a cache needs a ttl_s above 0 and size_bytes of at least 0; got {ttl_s} and {size_bytes}"
            )
        self.ttl_s, self.most_bytes, self._clock = ttl_s, size_bytes, clock
        self._held: Held[bytes, tuple[Entry, float]] = Held()
        self._held.bound(math.inf, size_bytes)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def size_bytes(self) -> int:
        """Of all answers."""
        return self._held.size_bytes

    def get(self, namespace: str, key: bytes) -> Entry | None:
        """The answer, if there is one that is not too old."""
        found = self._held.get(namespace, key)
        if found is None:
            return None
        if found[1] <= self._clock():
            self._held.drop(namespace, key)
            return None
        self._held.use(namespace, key)
        return found[0]

    def put(self, namespace: str, key: bytes, entry: Entry, ttl_s: float | None = None) -> None:
        """Keep an answer; one that is larger than the whole cache is not kept.

        Args:
            namespace, key: where.
            entry: the answer.
            ttl_s: seconds that it is good for, if that is less than the cache's own.
        """
        until = self._clock() + min(self.ttl_s, self.ttl_s if ttl_s is None else ttl_s)
        self._held.put(namespace, key, (entry, until), entry.size_bytes)

    def delete(self, namespace: str, key: bytes | None = None) -> int:
        """Forget one answer, or all of a namespace; returns how many there were."""
        if key is None:
            return self._held.drop_all(namespace)
        count = len(self._held)
        self._held.drop(namespace, key)
        return count - len(self._held)

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
