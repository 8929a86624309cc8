"""Text to unit vectors."""

from anabranch.routers.embed.cache import embed_cached
from anabranch.routers.embed.checked import dim_of, embed_of, unit_vectors
from anabranch.routers.embed.embedder import Embedder

__all__ = ["Embedder", "dim_of", "embed_cached", "embed_of", "unit_vectors"]
