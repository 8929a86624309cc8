"""Keys: how they are made, hashed and remembered."""

import hashlib
import math
import secrets
import time
from collections import OrderedDict

from anabranch.gateway.store.records import KeyRecord

PREFIX = "sk-ab-"

# A key read longer ago is read again, meanwhile it still counts.
FRESH_S = 1.0

# Longer ago than this it does not: other processes may have revoked it.
STALE_S = 2.0
REMEMBERED = 10_000


def new_secret() -> str:
    """A key: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> str:
    """SHA-256 of a key, in hexadecimal. A key has 256 random bits, so that a slow hash would add nothing."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class Keyring:
    """The keys used last, by their hash."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[str, KeyRecord, float]] = OrderedDict()
        self.generation = 0
        self._has_any, self._looked_s = False, -math.inf

    @property
    def has_any(self) -> bool | None:
        """Whether there is any key; None if that is not known, or was not so `STALE_S` ago or longer."""
        if not self._has_any and time.monotonic() - self._looked_s >= STALE_S:
            return None
        return self._has_any

    def note_any(self, has_any: bool) -> None:
        """Remember whether there is any key: once there is, there always will be."""
        self._has_any, self._looked_s = has_any, time.monotonic()

    def get(self, digest: str) -> tuple[str, KeyRecord, float] | None:
        """Stored hash, key, and seconds since it was read."""
        found = self._known.get(digest)
        if found is None:
            return None
        age_s = time.monotonic() - found[2]
        if age_s >= STALE_S:
            del self._known[digest]
            return None
        self._known.move_to_end(digest)
        return found[0], found[1], age_s

    def put(self, digest: str, stored: str, record: KeyRecord, generation: int) -> None:
        """Remember what was read, unless something was written since ``generation``."""
        if generation == self.generation:
            self._known[digest] = (stored, record, time.monotonic())
            self._known.move_to_end(digest)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)

    def forget(self) -> None:
        """All, since a key was written."""
        self._known.clear()
        self._looked_s = -math.inf
        self.generation += 1
