"""`Abroad`: what other processes kept by the meaning of a text, found by an index of this one's own."""
# Shapes: D dimensions of a vector

from collections import OrderedDict

import numpy as np

from anabranch.gateway.cache.entry import Entry
from anabranch.gateway.cache.semantic import SemanticCache, SharedTexts

# Answers that turn out to be gone, for one request; it asks a model then, and the next one looks further.
MOST_GONE = 8


class Abroad:
    """Vectors are held here, answers stay where they are until one is wanted.

    Args:
        texts: of other processes.
        index: holds, in place of answers, their names.
        mark: of the config: what is shared is shared with those alone that have the same.
    """

    def __init__(self, texts: SharedTexts, index: SemanticCache, mark: bytes) -> None:
        self._texts, self._index, self._mark = texts, index, mark
        # By tenant and context, up to where they are known.
        self._known: OrderedDict[tuple[str, bytes], str] = OrderedDict()

    async def find(self, tenant: str, context: bytes, vector_D: np.ndarray) -> tuple[Entry, float] | None:
        """The answer to the nearest text with its cosine, as `SemanticCache.get`."""
        if not await self._learn(tenant, context):
            return None
        for _ in range(MOST_GONE):
            near = self._index.get(tenant, context, vector_D)
            if near is None:
                return None
            name, cosine = near
            found = await self._texts.get(tenant, name.body.decode())
            if found is None:
                # Nobody knows whether it is there: it is asked for again.
                return None
            if found[0] is not None:
                return found[0], cosine
            # It ended there before it did here, or was cleared.
            self._index.remove(tenant, context, len(vector_D), name)
        return None

    async def _learn(self, tenant: str, context: bytes) -> bool:
        """Take in what others have kept meanwhile; whether they could be asked."""
        place = tenant, context
        after = self._known.get(place, "")
        news = await self._texts.news(tenant, self._mark + context, after)
        if news is None:
            return False
        if self._known.get(place, "") != after:
            # Another request has taken them in meanwhile.
            return True
        self._known[place], found = news
        self._known.move_to_end(place)
        while len(self._known) > self._index.size:
            self._known.popitem(last=False)
        for vector_D, name, left_s in found:
            self._index.put(tenant, context, vector_D, Entry(body=name.encode(), model=""), left_s)
        return True

    def put(self, tenant: str, context: bytes, vector_D: np.ndarray, entry: Entry) -> None:
        """Tell others of an answer."""
        self._texts.put(tenant, self._mark + context, vector_D, entry, self._index.ttl_s)

    def forget(self, tenant: str | None) -> None:
        """What is known of a tenant's, or of all."""
        if tenant is None:
            self._index.clear()
        else:
            self._index.delete(tenant)
