"""Answers that are kept, in the config."""

from anabranch.config import Config, Field, configclass


@configclass
class CacheConfig(Config):
    """Answers kept. Nothing is shared between keys.

    Attributes:
        exact: answer an identical request again, if its temperature is 0 or it asks for that.
        semantic: answer a request that means the same; needs an embedder.
        threshold: least cosine of two requests that mean the same.
        ttl_s: seconds an answer is kept.
        max_entries, max_bytes: of all answers kept; beyond that those of whoever holds most make room, the least recently used first.
    """

    exact: bool = True
    semantic: bool = False
    threshold: float = Field(default=0.95, gt=0, le=1)
    ttl_s: float = Field(default=3600.0, gt=0)
    max_entries: int = Field(default=10_000, ge=1)
    max_bytes: int = Field(default=64 << 20, ge=1)
