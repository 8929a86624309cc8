"""The caches of one gateway, as its config wants them."""

import logging
from typing import Any

import numpy as np

from anabranch.gateway.cache import (
    Abroad,
    Entry,
    ExactCache,
    Named,
    NameKey,
    Retold,
    SemanticCache,
    SharedEntries,
    SharedTexts,
    SingleFlight,
)
from anabranch.gateway.config import CacheConfig
from anabranch.gateway.logged_error import raised
from anabranch.gateway.made_vectors import MadeVectors
from anabranch.routers.embed import Embedder, unit_vectors
from anabranch.web.turns import in_thread

logger = logging.getLogger(__name__)


class Caches:
    """What a request looks into before a model is asked.

    Attributes:
        exact: None if it is off.
        semantic: likewise.
        named: answers to requests that their senders gave a name (``Idempotency-Key``); never off, and kept where caches are made anew.
        flights: of identical requests under way.
        retold: kept answers that are being read.

    Args:
        config: see there.
        embedder: of texts, for the semantic one.
        previous: whose place these take.
        shared: exact answers of all processes; None if each has its own.
        meanings: likewise those of the semantic one.
        mark: of the config (`answer_mark`): what is shared is shared with those alone that have the same.
    """

    def __init__(
        self,
        config: CacheConfig,
        embedder: Embedder | None,
        previous: "Caches | None" = None,
        shared: SharedEntries | None = None,
        meanings: SharedTexts | None = None,
        mark: bytes = b"",
    ) -> None:
        self._shared, self._mark = shared, mark
        self.exact = ExactCache(ttl_s=config.ttl_s, size_bytes=config.max_bytes) if config.exact else None
        limits: dict[str, Any] = {"ttl_s": config.ttl_s, "size": config.max_entries, "size_bytes": config.max_bytes}
        self.named: Named = Named(**limits) if previous is None else previous.named
        self.named.bound(**limits)
        self.semantic: SemanticCache | None = None
        self._abroad: Abroad | None = None
        if config.semantic and embedder is not None:
            self.semantic = SemanticCache(threshold=config.threshold, **limits)
            if meanings is not None:
                self._abroad = Abroad(meanings, SemanticCache(threshold=config.threshold, **limits), mark)
        self.flights: SingleFlight[Entry] = SingleFlight()
        self.retold: Retold = Retold() if previous is None else previous.retold
        self._embedder = embedder
        # How often anything was forgotten.
        self._num_forgotten = 0

    async def embed(self, text: str, made: MadeVectors) -> np.ndarray | None:
        """A unit vector, made in a thread: it may take a while. None where the embedder fails: nothing is looked for by meaning then.

        It is put among ``made``, too.
        """
        embedder = self._embedder
        assert embedder is not None
        try:
            vector_D = await in_thread(lambda: unit_vectors(embedder, [text])[0])
        except Exception as error:
            logger.warning("the semantic cache is passed over, since the embedder failed: %s", raised(error))
            return None
        made.put(embedder, text, vector_D)
        return vector_D

    async def elsewhere(self, tenant: str, key: bytes) -> Entry | None:
        """An exact answer that another process kept; from now on it is here too, for as long as it is there."""
        num_forgotten = self._num_forgotten
        found = None if self._shared is None else await self._shared.get(tenant, self._mark + key)
        if found is None:
            return None
        entry, left_s = self.retold.one(found[0]), found[1]
        # What came out of there before it was cleared must not be here afterwards.
        if self.exact is not None and num_forgotten == self._num_forgotten:
            self.exact.put(tenant, key, entry, left_s)
        return entry

    async def alike(self, tenant: str, context: bytes, vector: np.ndarray) -> Entry | None:
        """The answer to a text that means the same, kept here or by another process."""
        near = None if self.semantic is None else self.semantic.get(tenant, context, vector)
        if near is None and self._abroad is not None:
            near = await self._abroad.find(tenant, context, vector)
            # Another object each time.
            return None if near is None else self.retold.one(near[0])
        return None if near is None else near[0]

    def put(
        self,
        tenant: str,
        exact: tuple[ExactCache, bytes] | tuple[Named, NameKey] | None,
        context: tuple[bytes, str] | None,
        vector: Any,
        entry: Entry,
        ttl_s: float | None = None,
    ) -> None:
        """Keep an answer wherever it was looked for; ``exact`` is `exact` or `named`, and the key.

        ``ttl_s``: seconds that it is good for, if that is less than usual: for the very same request alone. One with a name is held as long
        as any.
        """
        if exact is not None:
            cache, key = exact
            if isinstance(cache, ExactCache) and isinstance(key, bytes):
                ttl_s_here = cache.ttl_s if ttl_s is None else min(cache.ttl_s, ttl_s)
                cache.put(tenant, key, entry, ttl_s_here)
                if self._shared is not None:
                    self._shared.put(tenant, self._mark + key, entry, ttl_s_here)
            else:
                cache.put(tenant, key, entry)  # type: ignore[arg-type]
        if ttl_s is not None:
            return
        if context is not None and vector is not None and self.semantic is not None:
            self.semantic.put(tenant, context[0], vector, entry)
            if self._abroad is not None:
                self._abroad.put(tenant, context[0], vector, entry)

    def delete(self, tenant: str) -> int:
        """Forget a tenant's answers; returns how many there were."""
        self._num_forgotten += 1
        if self._abroad is not None:
            self._abroad.forget(tenant)
        return sum(cache.delete(tenant) for cache in (self.exact, self.named, self.semantic) if cache is not None)

    def forget(self, tenant: str | None) -> int:
        """`delete`, or `clear` for None."""
        return self.clear() if tenant is None else self.delete(tenant)

    def clear(self) -> int:
        """Forget all; returns how many there were."""
        self._num_forgotten += 1
        if self._abroad is not None:
            self._abroad.forget(None)
        held = [cache for cache in (self.exact, self.named, self.semantic) if cache is not None]
        count = sum(len(cache) for cache in held)
        for cache in held:
            cache.clear()
        return count
