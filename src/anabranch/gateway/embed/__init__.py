"""Text to unit vectors."""

from anabranch.gateway.embed.embedder import Embedder

__all__ = ["Embedder"]
