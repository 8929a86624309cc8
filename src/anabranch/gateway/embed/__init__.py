"""Text to unit vectors."""

from anabranch.gateway.embed.cache import embed_cached
from anabranch.gateway.embed.embedder import Embedder

__all__ = ["Embedder", "embed_cached"]
